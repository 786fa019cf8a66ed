"""The bounded queue between `emit` and the background writer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from threading import Condition
from typing import NamedTuple

from tracevault.errors import TracevaultError
from tracevault.event.prepare import Prepared


class Entry(NamedTuple):
    """One record on its way to a table."""

    scope: str
    table: str
    prepared: Prepared


class Buffer:
    """Holds at most ``limit`` entries, those in flight included; first in, first out. Safe from any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = Condition()
        self._waiting: deque[Entry] = deque()
        self._in_flight = 0
        self._room_callbacks: list[Callable[[], object]] = []
        self._closed = False
        self.accepted = 0
        self.settled = 0

    def offer(self, entry: Entry, on_room: Callable[[], object] | None = None) -> bool:
        """Take ``entry`` if there is room; else call ``on_room`` once there may be, from another thread."""
        with self._changed:
            if self._closed:
                raise TracevaultError("the vault is closed; no further events are accepted")
            if len(self._waiting) + self._in_flight >= self._limit:
                if on_room is not None:
                    self._room_callbacks.append(on_room)
                return False
            self._waiting.append(entry)
            self.accepted += 1
            self._changed.notify_all()
            return True

    def take(self, most: int, linger: float) -> list[Entry]:
        """Wait for entries and take up to ``most``, letting them gather for ``linger`` s; empty when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if linger:
                self._changed.wait_for(lambda: len(self._waiting) >= most or self._closed, linger)
            batch = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            self._in_flight = len(batch)
            return batch

    def settle(self, count: int) -> None:
        """Note that ``count`` of the entries in flight are stored, or lost."""
        with self._changed:
            self._in_flight -= count
            self.settled += count
            callbacks, self._room_callbacks = self._room_callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            callback()

    def wait_settled(self, mark: int, timeout: float) -> bool:
        """Wait until the first ``mark`` accepted entries are settled; False if ``timeout`` seconds passed."""
        with self._changed:
            return self._changed.wait_for(lambda: self.settled >= mark, timeout)

    def pause(self, seconds: float) -> None:
        """Sleep, but wake when the buffer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def wait_room(self, deadline: float) -> None:
        """Wait until there may be room, or until ``deadline`` (by `time.monotonic`)."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or len(self._waiting) + self._in_flight < self._limit,
                max(0.0, deadline - time.monotonic()),
            )

    def close(self) -> None:
        """Accept nothing more; what is in the buffer stays until it is settled."""
        with self._changed:
            self._closed = True
            callbacks, self._room_callbacks = self._room_callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            callback()

    @property
    def closed(self) -> bool:
        """Whether nothing more is accepted."""
        return self._closed

    @property
    def pending(self) -> int:
        """Entries that are neither stored nor lost."""
        return self.accepted - self.settled
