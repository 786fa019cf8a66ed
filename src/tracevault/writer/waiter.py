"""Callers who wait for the write of their own record, blocking or in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from threading import Lock

from tracevault.errors import TracevaultError


class Waiter:
    """A caller in a thread of its own. ``deadline`` is when it gives up, by `time.monotonic`."""

    __slots__ = ("_done", "deadline", "error")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.error: TracevaultError | None = None
        self._done = Lock()
        self._done.acquire()

    def wait(self, seconds: float) -> bool:
        """Return whether the write ended, well or not, within ``seconds``."""
        return self._done.acquire(timeout=max(0.0, seconds))

    def finish(self) -> None:
        """Wake the caller."""
        with suppress(RuntimeError):
            self._done.release()


class LoopWaiter(Waiter):
    """A caller in an event loop, which goes on meanwhile."""

    __slots__ = ("future", "loop")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.error = None
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()

    def finish(self) -> None:
        """Wake the caller; to be called in its loop."""
        if not self.future.done():
            self.future.set_result(None)


def finish_all(waiters: Iterable[Waiter]) -> None:
    """Wake callers, those of one event loop by one message to it."""
    by_loop: dict[asyncio.AbstractEventLoop, list[LoopWaiter]] = {}
    for waiter in waiters:
        if isinstance(waiter, LoopWaiter):
            by_loop.setdefault(waiter.loop, []).append(waiter)
        else:
            waiter.finish()
    for loop, group in by_loop.items():
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(_finish, group)


def _finish(group: list[LoopWaiter]) -> None:
    for waiter in group:
        waiter.finish()
