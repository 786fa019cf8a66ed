"""What the callers of an event loop emit who were resumed together is offered to the writers together."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from tests.conftest import rows
from tests.test_background import no_thread
from tracevault import Receipt, TracevaultError, start_tracevault
from tracevault.writer.queue import Item, Lane
from tracevault.writer.turn import Turn
from tracevault.writer.waiter import LoopWaiter

LANE = Lane("default", "audit_logs", 500, sync=True, spool=None)


class Offers:
    """A turn of the running loop, and how many emits were offered each time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.stored: list[int] = []
        self.turn = Turn(asyncio.get_running_loop(), lambda _, emits: self.sizes.append(len(emits)), self.stored.append)

    def emit(self) -> None:
        self.turn.add(LANE, Item(None))

    async def resumed(self, callers: int, then: Callable[[int], None]) -> None:
        """Resume callers together, each of whom does ``then`` with its number."""
        waiters = [LoopWaiter(self.turn, time.monotonic() + 60) for _ in range(callers)]

        async def caller(number: int) -> None:
            await waiters[number].future
            then(number)

        tasks = [asyncio.create_task(caller(number)) for number in range(callers)]
        await asyncio.sleep(0)
        self.turn.resume(waiters)
        await asyncio.gather(*tasks)
        await asyncio.sleep(0)


async def test_an_emit_that_follows_nobody_is_offered_at_once() -> None:
    offers = Offers()
    offers.emit()
    assert offers.sizes == [1]
    await offers.resumed(16, lambda _: None)
    offers.emit()
    assert offers.sizes == [1, 1]


@pytest.mark.parametrize(
    ("callers", "sizes"), [(3, [1, 1, 1]), (10, [10]), (16, [16]), (31, [31]), (50, [17, 17, 16]), (64, [16] * 4)]
)
async def test_who_was_resumed_together_is_stored_together(callers: int, sizes: Sequence[int]) -> None:
    """But a few are quick; and of very many the first ones need not wait for the last ones."""
    offers = Offers()
    await offers.resumed(callers, lambda _: offers.emit())
    assert offers.sizes == list(sizes)


async def test_who_does_not_emit_again_is_not_waited_for() -> None:
    offers = Offers()
    await offers.resumed(12, lambda number: offers.emit() if number < 3 else None)
    assert offers.sizes == [3]


async def test_a_vault_that_is_closed_in_the_turn_stores_what_it_accepted_and_refuses_the_rest(dsn: str) -> None:
    vault = await start_tracevault(connection_string=dsn)
    closing: list[asyncio.Future[None]] = []

    async def caller(number: int) -> int:
        stored = 0
        try:
            while True:
                await vault.emit("order.shipped", data={"number": number})
                stored += 1
                if number == 8 and stored == 3:
                    closing.append(asyncio.ensure_future(vault.close()))
        except TracevaultError as error:
            assert "closed" in str(error)  # noqa: PT017 - it ends the loop
        return stored

    stored = sum(await asyncio.gather(*(caller(number) for number in range(16))))
    await closing[0]
    assert len(rows(dsn, "SELECT id FROM audit_logs")) == stored
    stats = vault.stats()
    assert (stats.delivered, stats.unknown, stats.in_flight) == (stored, 0, 0)


async def test_who_is_cancelled_while_being_resumed_is_counted_once(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resume = Turn.resume

    def resume_and_cancel(turn: Turn, group: Sequence[LoopWaiter]) -> None:
        resume(turn, group)
        for task in tasks:
            task.cancel()

    async with start_tracevault(connection_string=dsn) as vault:
        with monkeypatch.context() as patch:
            patch.setattr(Turn, "resume", resume_and_cancel)
            tasks = [asyncio.create_task(vault.emit("order.shipped")) for _ in range(16)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
        await vault.emit("order.shipped")
        stats = vault.stats()
    cancelled = sum(isinstance(result, asyncio.CancelledError) for result in results)
    assert cancelled > 0
    assert (stats.emitted, stats.delivered, stats.unknown, stats.in_flight) == (17, 17 - cancelled, cancelled, 0)


async def test_where_no_thread_can_be_started_each_caller_hears_of_it(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of theirs is stored later."""
    async with start_tracevault(connection_string=dsn) as vault:
        first = await vault.emit("order.shipped")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            emits = (vault.emit("order.shipped") for _ in range(16))
            results = await asyncio.gather(*emits, return_exceptions=True)
        stats = vault.stats()
    errors = [result for result in results if isinstance(result, TracevaultError)]
    stored = [first, *(result for result in results if isinstance(result, Receipt))]
    assert len(errors) == len({id(error) for error in errors}) == 17 - len(stored) > 0
    assert all("no thread can be started" in str(error) for error in errors)
    assert {row[0] for row in rows(dsn, "SELECT id FROM audit_logs")} == {receipt.id for receipt in stored}
    assert (stats.delivered, stats.raised, stats.in_flight) == (len(stored), len(errors), 0)
