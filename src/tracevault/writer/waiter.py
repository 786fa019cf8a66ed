"""Callers who wait for the write of their own record, blocking or in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from tracevault.errors import TracevaultError

if TYPE_CHECKING:
    from tracevault.writer.turn import Turn


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

    __slots__ = ("future", "turn")

    def __init__(self, turn: Turn, deadline: float) -> None:
        self.deadline = deadline
        self.error = None
        self.turn = turn
        self.future: asyncio.Future[None] = turn.loop.create_future()

    def finish(self) -> None:
        """Wake the caller; to be called in its loop."""
        if not self.future.done():
            self.future.set_result(None)

    @property
    def has_landed(self) -> bool:
        """Whether the caller learns, or has learnt, that its record is stored."""
        return self.future.done() and not self.future.cancelled() and self.error is None


def finish_all(waiters: Iterable[Waiter]) -> None:
    """Wake callers, those of one event loop by one message to it."""
    by_turn: dict[Turn, list[LoopWaiter]] = {}
    for waiter in waiters:
        if isinstance(waiter, LoopWaiter):
            by_turn.setdefault(waiter.turn, []).append(waiter)
        else:
            waiter.finish()
    for turn, group in by_turn.items():
        with suppress(RuntimeError):  # the loop was closed meanwhile
            turn.loop.call_soon_threadsafe(turn.resume, group)


def fail_all(waiters: Sequence[Waiter], error: TracevaultError) -> None:
    """Wake callers whose record is not stored, and will not be."""
    for waiter in waiters:
        waiter.error = own_copy(error)
    finish_all(waiters)


def own_copy(error: TracevaultError) -> TracevaultError:
    """Return an exception for one of several callers: a traceback belongs to one only."""
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy
