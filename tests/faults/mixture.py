"""A mixed load for a victim: threads, and tasks of one event loop, that emit sync and async events at once."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import tracevault
from tests.faults.ledger import payload_of

if TYPE_CHECKING:
    from tests.faults.victim import Victim

MODES = ("sync", "async")
_EVENT = "faults.mixed"
# Seconds between two looks at how late the event loop is.
_INTERVAL = 0.005


class Mixture:
    """The load. Tasks use the victim's vault, threads a blocking one of the same process and spool."""

    def __init__(self, victim: Victim, blocking: Any) -> None:
        assert victim.loop is not None
        self._victim = victim
        self._blocking = blocking

    def run(
        self, threads: int, tasks: int, each: tuple[int, int], seconds: float, costs: dict[str, float] | None
    ) -> dict[str, float]:
        """Emit ``each`` events per thread and per task, spread over ``seconds``; return how late the loop was.

        ``costs``: burn so much processor time instead, by where and mode.
        """
        workers = [threading.Thread(target=self._thread, args=(each[0], seconds, costs)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        lags = sorted(self._victim.wait(self._tasks(tasks, each[1], seconds, costs)))
        for worker in workers:
            worker.join()
        return {"p50": lags[len(lags) // 2], "p99": lags[len(lags) * 99 // 100], "samples": len(lags)}

    def costs(self, count: int) -> dict[str, float]:
        """Return the processor time that one emit takes from the thread or the event loop that calls it."""
        found: dict[str, float] = {}
        for mode in MODES:
            spent = 0.0
            for _ in range(count):
                with _Told(self._victim) as told:
                    began = time.thread_time()
                    told.receipt = self._blocking.emit(_EVENT, mode=mode, **_content(told.token))
                    spent += time.thread_time() - began
            found[f"thread {mode}"] = spent / count
            found[f"task {mode}"] = self._victim.wait(self._cost_of_task(mode, count))
        return found

    async def _cost_of_task(self, mode: str, count: int) -> float:
        spent = 0.0
        for _ in range(count):
            with _Told(self._victim) as told:
                began = time.thread_time()
                told.receipt = await self._victim.vault.emit(_EVENT, mode=mode, **_content(told.token))
                spent += time.thread_time() - began
        return spent / count

    def _thread(self, each: int, seconds: float, costs: dict[str, float] | None) -> None:
        for due, mode in _plan(each, seconds):
            time.sleep(max(0.0, due - time.monotonic()))
            with _Told(self._victim, real=costs is None) as told:
                if costs is None:
                    told.receipt = self._blocking.emit(_EVENT, mode=mode, **_content(told.token))
                else:
                    _burn(costs[f"thread {mode}"])

    async def _tasks(self, tasks: int, each: int, seconds: float, costs: dict[str, float] | None) -> list[float]:
        lags: list[float] = []
        watching = asyncio.ensure_future(_watch(lags))
        await asyncio.gather(*(self._task(each, seconds, costs) for _ in range(tasks)))
        watching.cancel()
        return lags

    async def _task(self, each: int, seconds: float, costs: dict[str, float] | None) -> None:
        for due, mode in _plan(each, seconds):
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            with _Told(self._victim, real=costs is None) as told:
                if costs is None:
                    told.receipt = await self._victim.vault.emit(_EVENT, mode=mode, **_content(told.token))
                else:
                    _burn(costs[f"task {mode}"])


class _Told:
    """Reports one event to the ledger: what is meant, and what came of it."""

    def __init__(self, victim: Victim, *, real: bool = True) -> None:
        self._victim = victim
        self._real = real
        self.token = victim.token(_EVENT)
        self.receipt: Any = None

    def __enter__(self) -> _Told:
        self._victim.tell("I" if self._real else "-", self.token, time.time())
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if isinstance(error, tracevault.TracevaultError):
            self._victim.raised(self.token, error)
            return True
        if self.receipt is not None:
            self._victim.tell("R", self.token, self.receipt.id, self.receipt.stored, time.time())
        else:
            self._victim.tell("-", self.token, time.time())
        return False


def _content(token: str) -> dict[str, Any]:
    return {"correlation_id": token, "data": payload_of(token)}


def _plan(each: int, seconds: float) -> list[tuple[float, str]]:
    """Return when to emit, and in which mode."""
    began = time.monotonic()
    return [
        (began + moment, random.choice(MODES)) for moment in sorted(random.uniform(0, seconds) for _ in range(each))
    ]


def _burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


async def _watch(lags: list[float]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _INTERVAL
        await asyncio.sleep(_INTERVAL)
        lags.append(max(0.0, loop.time() - due))
