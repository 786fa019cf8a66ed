"""The bounded queue between `emit` and the background writer: one lane per scope, each in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from threading import Condition, RLock
from typing import NamedTuple

from tracevault.errors import TracevaultError
from tracevault.event.prepare import Prepared

# A closed buffer is being emptied against the clock: no lane waits longer than this for its next attempt.
_PAUSE_ONCE_CLOSED = 0.05


class Entry(NamedTuple):
    """One record on its way to a table."""

    scope: str
    table: str
    prepared: Prepared


class Lane:
    """The records of one scope that are neither stored nor lost, in order, and what the writer knows of it."""

    def __init__(self, scope: str, table: str, most: int) -> None:
        self.scope = scope
        self.table = table
        self.waiting: deque[Prepared] = deque()
        self.accepted = 0
        self.settled = 0
        # Kept by the buffer: since when its head waits, and when the writer may look at it again.
        self.since = 0.0
        self.not_before = 0.0
        self.hurried = 0
        # Kept by the writer: rows per statement at present, how many at the head may be stored already, and
        # why they are not, if so, after how many attempts.
        self.most = most
        self.in_doubt = 0
        self.failure: TracevaultError | None = None
        self.failures = 0


class Buffer:
    """Holds at most ``limit`` records until they are settled, that is stored or lost. Safe from any thread.

    The writer is given up to ``most`` records of one lane at a time, once that many wait or the first has
    waited ``linger`` seconds. The lock is reentrant: a signal handler or a logging handler may emit.
    """

    def __init__(self, limit: int, most: int, linger: float) -> None:
        self._limit = limit
        self._most = min(most, limit)
        self._linger = linger
        lock = RLock()
        self._work = Condition(lock)
        self._progress = Condition(lock)
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._listeners: dict[object, Callable[[], object]] = {}
        self._size = 0
        self._closed = False

    # -- called by emit ------------------------------------------------------------------------------------

    def offer(self, entry: Entry) -> bool:
        """Take ``entry`` if there is room."""
        scope, table, prepared = entry
        with self._work:
            if self._closed:
                raise TracevaultError("the vault is closed; no further events are accepted")
            if self._size >= self._limit:
                return False
            lane = self._lanes.get((scope, table))
            if lane is None:
                lane = self._lanes[scope, table] = Lane(scope, table, self._most)
            if not lane.waiting:
                lane.since = time.monotonic()
            lane.waiting.append(prepared)
            lane.accepted += 1
            self._size += 1
            if len(lane.waiting) in (1, lane.most) or self._size == self._limit:
                self._work.notify()
            return True

    def wait_room(self, timeout: float) -> None:
        """Wait until there may be room, or for ``timeout`` seconds."""
        with self._progress:
            self._progress.wait_for(lambda: self._closed or self._size < self._limit, timeout)

    @contextmanager
    def listening(self, callback: Callable[[], object]) -> Iterator[None]:
        """Have ``callback`` called, from another thread, whenever records were settled or the buffer closed."""
        key = object()
        with self._progress:
            self._listeners[key] = callback
        try:
            yield
        finally:
            with self._progress:
                del self._listeners[key]

    # -- called by flush and close -------------------------------------------------------------------------

    def mark(self) -> list[tuple[Lane, int]]:
        """Note what is accepted so far, and have it written without lingering."""
        with self._work:
            for lane in self._lanes.values():
                lane.hurried = lane.accepted
            self._work.notify()
            return [(lane, lane.accepted) for lane in self._lanes.values()]

    def settled(self, mark: list[tuple[Lane, int]]) -> bool:
        """Whether everything noted by ``mark`` is stored or lost."""
        return all(lane.settled >= accepted for lane, accepted in mark)

    def wait_settled(self, mark: list[tuple[Lane, int]], timeout: float) -> bool:
        """Wait until everything noted by ``mark`` is settled; False if ``timeout`` seconds passed."""
        with self._progress:
            return self._progress.wait_for(lambda: self.settled(mark), timeout)

    def close(self) -> None:
        """Accept nothing more; what is in the buffer stays until it is settled."""
        with self._work:
            self._closed = True
            for lane in self._lanes.values():
                lane.not_before = 0.0
            self._work.notify()
        self._tell()

    @property
    def closed(self) -> bool:
        """Whether nothing more is accepted."""
        return self._closed

    @property
    def pending(self) -> int:
        """Records that are neither stored nor lost."""
        return self._size

    # -- called by the writer ------------------------------------------------------------------------------

    def take(self) -> tuple[Lane, list[Prepared]] | None:
        """Wait for the lane that is due first; return it and its first records, or None once closed and empty.

        The records stay in the lane until they are settled.
        """
        with self._work:
            while self._size or not self._closed:
                lane = min((lane for lane in self._lanes.values() if lane.waiting), key=self._due, default=None)
                wait = None if lane is None else self._due(lane) - time.monotonic()
                if lane is not None and wait is not None and wait <= 0:
                    return lane, list(islice(lane.waiting, lane.most))
                self._work.wait(wait)
            return None

    def _due(self, lane: Lane) -> float:
        urgent = (
            self._closed or lane.hurried > lane.settled or len(lane.waiting) >= lane.most or self._size >= self._limit
        )
        return max(lane.not_before, lane.since + (0.0 if urgent else self._linger))

    def settle(self, lane: Lane, count: int) -> None:
        """Note that the first ``count`` records of ``lane`` are stored, or lost."""
        with self._work:
            for _ in range(count):
                lane.waiting.popleft()
            lane.settled += count
            lane.in_doubt = max(0, lane.in_doubt - count)
            lane.since = time.monotonic()
            self._size -= count
        self._tell()

    def postpone(self, lane: Lane, seconds: float) -> None:
        """Leave ``lane`` alone for a while; not for long once the buffer is closed."""
        with self._work:
            lane.not_before = time.monotonic() + (min(seconds, _PAUSE_ONCE_CLOSED) if self._closed else seconds)

    def pause(self, seconds: float) -> None:
        """Sleep; not for long once the buffer is closed."""
        with self._work:
            if not self._work.wait_for(lambda: self._closed, seconds):
                return
        time.sleep(min(seconds, _PAUSE_ONCE_CLOSED))

    def _tell(self) -> None:
        with self._progress:
            self._progress.notify_all()
            listeners = list(self._listeners.values())
        for listener in listeners:
            listener()
