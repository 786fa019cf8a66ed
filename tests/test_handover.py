"""The interpreter's lock goes to a writer whose answer has come, however busy the callers are."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Event, Thread

import psycopg
import pytest

from tracevault import start_tracevault
from tracevault.writer.handover import Handover

BUSY = 1.0


@contextmanager
def no_switch() -> Iterator[None]:
    """Whoever computes keeps the lock until it lets go of it."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(30)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


@pytest.mark.parametrize("said", [True, False])
def test_who_has_an_answer_gets_the_lock_from_who_computes(dsn: str, said: bool) -> None:
    """And keeps waiting for it where nobody knows that it waits: so this is no accident."""
    handover, waiting, ended = Handover(), Event(), [0.0]
    with psycopg.connect(dsn, autocommit=True) as connection, no_switch():

        def wait() -> None:
            with handover.awaiting(connection) if said else nullcontext():
                waiting.set()
                connection.execute("SELECT pg_sleep(0.5)")
            ended[0] = time.monotonic()

        thread = Thread(target=wait)
        thread.start()
        waiting.wait()
        time.sleep(0.2)  # until it has sent its statement
        began = now = time.monotonic()
        while now < began + BUSY:
            now = time.monotonic()
            handover.give_way(now)
        thread.join()
    assert (0.05 < ended[0] - began < 0.8 * BUSY) if said else ended[0] - began >= BUSY


async def test_async_records_are_stored_though_who_emits_them_waits_for_nothing(ready_dsn: str) -> None:
    async with start_tracevault(connection_string=ready_dsn, default_mode="async", max_queue=1_000_000) as vault:
        for _ in range(2000):
            await vault.emit("before")
        await vault.flush()
        emitted = 0
        with no_switch():
            began = time.monotonic()
            while time.monotonic() < began + BUSY:
                await vault.emit("meanwhile")
                emitted += 1
            stored = vault.stats().delivered - 2000
    assert emitted > 1000
    assert stored > emitted / 10  # and nothing at all while nobody gave way


def test_a_connection_that_is_closed_meanwhile_is_none_that_waits(dsn: str) -> None:
    handover = Handover()
    with psycopg.connect(dsn, autocommit=True) as connection, handover.awaiting(connection):
        connection.close()
        handover.give_way(time.monotonic())
    handover.give_way(time.monotonic() + 1)
