"""What waits to be written, in memory: one lane for each scope's sync emits, and one for its async records.

Async records are bounded in number; those of a lane with a spool file stay on the disk beyond that, and are read
back in their order. Sync emits are as many as there are callers who wait for them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from threading import Condition, RLock
from typing import Literal, NamedTuple

from tracevault.errors import TracevaultError
from tracevault.events.binary import decode_row
from tracevault.events.prepare import Prepared
from tracevault.writer.spool import GIVEN_ID, SpoolFile, prepared_from
from tracevault.writer.waiter import Waiter

# Seconds between two batches of a lane for which nobody waits, unless whole ones wait: so that a busy process does
# not spend itself on many small ones. The first record after a pause goes at once.
_PACE = 0.005
# A closed queue is being emptied against the clock: no lane waits longer than this for its next attempt.
_PAUSE_ONCE_CLOSED = 0.05

LaneState = Literal["ok", "waiting", "paused"]


class Item:
    """One record on its way to a table: ``prepared``, or as bytes where a spool or a stream has it so."""

    __slots__ = ("_prepared", "encoded", "flags", "in_doubt", "number", "waiter")

    def __init__(
        self,
        prepared: Prepared | None,
        encoded: bytes = b"",
        flags: int = 0,
        waiter: Waiter | None = None,
        *,
        in_doubt: bool = False,
    ) -> None:
        self._prepared = prepared
        self.encoded = encoded
        self.flags = flags
        self.waiter = waiter
        self.in_doubt = in_doubt
        """An earlier attempt, or an earlier process, may have stored it."""
        self.number = 0
        """Its place in the lane; in a lane with a spool file, its number there."""

    @property
    def prepared(self) -> Prepared:
        """The record; of one that is bytes, made anew each time."""
        return self._prepared or prepared_from(self.flags, decode_row(self.encoded))

    @property
    def given_id(self) -> bool:
        """Whether the caller chose the id."""
        return self._prepared.given_id if self._prepared is not None else bool(self.flags & GIVEN_ID)


class Lane:
    """The records of one scope that are neither stored nor given up, in order, and what the writer knows of it."""

    def __init__(self, scope: str, table: str, most: int, *, sync: bool, spool: SpoolFile | None) -> None:
        self.scope = scope
        self.table = table
        self.sync = sync
        self.spool = spool
        # Kept by the queue: what is in memory and what a writer holds (by its first number); the last number that
        # was accepted, and the last one that came into memory.
        self.waiting: deque[Item] = deque()
        self.flights: dict[int, Item] = {}
        self.accepted = 0
        self.loaded = 0
        self.loading = False
        self.taken_at = 0.0
        # Since when its head waits, when a writer may look at it again, and up to which number without lingering.
        self.since = 0.0
        self.not_before = 0.0
        self.hurried = 0
        # Kept by the writer: rows per statement at present; why nothing gets through, if so, after how many
        # attempts; and the code of the last refusals in a row, with their number.
        self.most = most
        self.failure: TracevaultError | None = None
        self.failures = 0
        self.state: LaneState = "ok"
        self.refusals: tuple[str | None, int] = (None, 0)
        # Whether it is paused because of them, so that single records are tried, and none is given up.
        self.probing = False

    @property
    def on_disk(self) -> bool:
        """Whether records wait in the spool file alone."""
        return self.loaded < self.accepted

    def settled_below(self) -> int:
        """Return the lowest number that is neither stored nor given up."""
        open_numbers = [*self.flights, self.accepted + 1]
        if self.waiting:
            open_numbers.append(self.waiting[0].number)
        if self.on_disk:
            open_numbers.append(self.loaded + 1)
        return min(open_numbers)


class InMemory(NamedTuple):
    """How many async records without a spool were accepted so far, how many wait, and how many wait or are written."""

    accepted: int
    waiting: int
    unsettled: int


class Queue:
    """Holds records until they are settled, that is stored or given up. Safe from any thread.

    A writer is given up to ``most`` records of one lane at a time, once that many wait or the first has waited
    ``linger`` seconds; of several lanes, the one whose head waits longest. The lock is reentrant: a signal handler
    or a logging handler may emit.
    """

    def __init__(self, limit: int, most: int, linger: float) -> None:
        self._limit = limit
        self._most = most
        self._linger = linger
        self._lock = RLock()
        self._work = Condition(self._lock)
        self._progress = Condition(self._lock)
        self._lanes: dict[tuple[str, str, bool, SpoolFile | None], Lane] = {}
        self._listeners: dict[object, Callable[[], object]] = {}
        self._size = 0
        self._sync_size = 0
        self._memory_size = 0
        self._accepted = 0
        self._closed = False
        self._idle = 0

    # -- called by emit ------------------------------------------------------------------------------------

    def lane(self, scope: str, table: str, *, sync: bool = False, spool: SpoolFile | None = None) -> Lane:
        """Return the lane of a scope."""
        lane = self._lanes.get((scope, table, sync, spool))
        if lane is None:
            with self._work:
                made = Lane(scope, table, min(self._most, self._limit), sync=sync, spool=spool)
                lane = self._lanes.setdefault((scope, table, sync, spool), made)
        return lane

    def offer(self, lane: Lane, item: Item) -> bool:
        """Take ``item``, unless it is async and there is no room for it."""
        with self._lock:
            self.check_open()
            if not lane.sync:
                if self._size >= self._limit:
                    return False
                self._accepted += 1
            lane.accepted = item.number = lane.accepted + 1
            self._admit(lane, item)
            return True

    def offer_together(self, pairs: Sequence[tuple[Lane, Item]]) -> bool:
        """Take sync items at once, so that one writer gets those of a lane; return whether one was idle."""
        with self._lock:
            self.check_open()
            for lane, item in pairs:
                lane.accepted = item.number = lane.accepted + 1
                self._admit(lane, item)
            return self._idle > 0

    def offer_spooled(self, lane: Lane, item: Item, number: int) -> bool:
        """Take ``item``, which has this number in its file; False if it is to be read back from there in its turn."""
        with self._lock:
            was_on_disk = lane.on_disk
            lane.accepted = item.number = number
            if self._size >= self._limit or was_on_disk:
                return False
            self._admit(lane, item)
            return True

    def _admit(self, lane: Lane, item: Item) -> None:
        lane.loaded = item.number
        if not lane.waiting:
            lane.since = time.monotonic()
        lane.waiting.append(item)
        self._count(lane, 1)
        if self._idle and (len(lane.waiting) in (1, lane.most) or self._size == self._limit):
            self._work.notify()

    def overdue(self, moment: float) -> list[tuple[Lane, Item]]:
        """Return the sync emits that no writer holds and whose deadline was before a moment."""
        with self._lock:
            lanes = [lane for lane in self._lanes.values() if lane.sync]
            return [
                (lane, item) for lane in lanes for item in lane.waiting if item.waiter and item.waiter.deadline < moment
            ]

    def withdraw(self, lane: Lane, item: Item) -> bool:
        """Take back an item that no writer holds; False if one does, or it is settled."""
        with self._work:
            try:
                lane.waiting.remove(item)
            except ValueError:
                return False
            self._count(lane, -1)
            return True

    @property
    def has_room(self) -> bool:
        """Whether a quarter of the room is free: who waits for less will soon wait again."""
        return self._size <= self._limit * 3 // 4

    def wait_room(self, timeout: float) -> None:
        """Wait until there is room, or for ``timeout`` seconds."""
        with self._progress:
            self._progress.wait_for(lambda: self.has_room, timeout)

    def wait_change(self, timeout: float) -> None:
        """Wait until records were settled, or for ``timeout`` seconds."""
        with self._progress:
            self._progress.wait(timeout)

    @contextmanager
    def listening(self, callback: Callable[[], object]) -> Iterator[None]:
        """Have ``callback`` called, from another thread, whenever records were settled or the queue closed."""
        key = object()
        with self._progress:
            self._listeners[key] = callback
        try:
            yield
        finally:
            with self._progress:
                del self._listeners[key]

    @property
    def sync_busy(self) -> bool:
        """Whether sync emits wait, or are being written."""
        return self._sync_size > 0

    def is_untaken(self, lane: Lane) -> bool:
        """Whether a whole batch waits though a writer is idle, who was woken and has not had its turn."""
        return self._idle > 0 and len(lane.waiting) >= lane.most

    @property
    def wants_writer(self) -> bool:
        """Whether something waits and no writer is idle."""
        return not self._idle and self._size + self._sync_size > 0

    # -- called by flush and close -------------------------------------------------------------------------

    def mark(self) -> list[tuple[Lane, int]]:
        """Note what is accepted so far, and have it written without lingering."""
        with self._work:
            for lane in self._lanes.values():
                lane.hurried = lane.accepted
            self._work.notify_all()
            return [(lane, lane.accepted) for lane in self._lanes.values() if not lane.sync]

    def settled(self, mark: list[tuple[Lane, int]]) -> bool:
        """Whether everything noted by ``mark`` is stored or given up."""
        with self._work:
            return all(lane.settled_below() > accepted for lane, accepted in mark)

    def wait_settled(self, mark: list[tuple[Lane, int]], timeout: float) -> bool:
        """Wait until everything noted by ``mark`` is settled; False if ``timeout`` seconds passed."""
        with self._progress:
            return self._progress.wait_for(lambda: self.settled(mark), timeout)

    def close(self) -> None:
        """Accept nothing more; what is in the queue stays until it is settled."""
        with self._work:
            self._closed = True
            for lane in self._lanes.values():
                lane.not_before = 0.0
            self._work.notify_all()
        self.tell()

    @property
    def closed(self) -> bool:
        """Whether nothing more is accepted."""
        return self._closed

    def check_open(self) -> None:
        """Raise `TracevaultError` once nothing more is accepted."""
        if self._closed:
            raise TracevaultError("the vault is closed; no further events are accepted")

    def in_memory(self) -> InMemory:
        """Return the numbers of async records without a spool."""
        with self._work:
            lanes = [lane for lane in self._lanes.values() if not lane.sync and lane.spool is None]
            return InMemory(self._accepted, sum(len(lane.waiting) for lane in lanes), self._memory_size)

    def lanes(self) -> list[Lane]:
        """Return all lanes."""
        with self._work:
            return list(self._lanes.values())

    # -- called by the writers -----------------------------------------------------------------------------

    def take(self) -> tuple[Lane, list[Item]] | None:
        """Wait for the lane that is due; return it and its first records, or None once closed and empty.

        No records: the lane's next ones are on the disk, to be given to `fill`.
        """
        with self._work:
            while True:
                due = [(self._due(lane), lane) for lane in self._lanes.values() if self._has_work(lane)]
                now = time.monotonic()
                ready = [lane for at, lane in due if at <= now]
                if ready:
                    return self._take_from(min(ready, key=lambda lane: lane.since))
                if self._closed and not due and not any(lane.flights or lane.loading for lane in self._lanes.values()):
                    self._work.notify_all()  # the other writers are done as well
                    return None
                self._idle += 1
                try:
                    self._work.wait(min(at for at, _ in due) - now if due else None)
                finally:
                    self._idle -= 1

    def _take_from(self, lane: Lane) -> tuple[Lane, list[Item]]:
        if not lane.waiting:
            lane.loading = True
            return lane, []
        batch = [lane.waiting.popleft() for _ in range(min(lane.most, len(lane.waiting)))]
        lane.flights[batch[0].number] = batch[0]
        lane.since = lane.taken_at = time.monotonic()
        if self._idle and lane.waiting:
            self._work.notify()
        return lane, batch

    @staticmethod
    def _has_work(lane: Lane) -> bool:
        if not lane.waiting:
            return lane.on_disk and not lane.loading
        # Nobody waits for an async record: while one writer is at the lane, another one takes whole batches only.
        return lane.sync or not lane.flights or len(lane.waiting) >= lane.most

    def _due(self, lane: Lane) -> float:
        urgent = (
            self._closed
            or lane.sync
            or lane.on_disk
            or lane.hurried >= lane.waiting[0].number
            or len(lane.waiting) >= lane.most
            or self._size >= self._limit
        )
        return max(lane.not_before, 0.0 if urgent else max(lane.since + self._linger, lane.taken_at + _PACE))

    def on_disk(self, lane: Lane, last: int) -> None:
        """Note that ``lane`` has records on the disk alone, up to a number, and none in memory."""
        with self._work:
            lane.loaded, lane.accepted = 0, last
            lane.hurried = last  # nothing more comes: no lingering
            self._work.notify()

    def fill(self, lane: Lane, items: Sequence[Item], *, last: int | None) -> None:
        """Give ``lane`` its next records from the disk; ``last``: there is none left up to this number."""
        with self._work:
            lane.loading = False
            lane.waiting.extend(items)
            self._count(lane, len(items))
            if items:
                lane.loaded = max(lane.loaded, items[-1].number)
            if last is not None:
                lane.loaded = max(lane.loaded, last)
            lane.since = time.monotonic()
            self._work.notify()
        if not items:
            self.tell()

    def settle(self, lane: Lane, first: int, items: Sequence[Item], rest: Sequence[Item] = ()) -> None:
        """Note that ``items`` are stored, or given up; of the batch that began with ``first``, ``rest`` waits again."""
        with self._work:
            lane.flights.pop(first, None)
            self._count(lane, -len(items))
            if rest:
                if lane.waiting and lane.waiting[0].number < rest[-1].number:
                    lane.waiting = deque(sorted([*rest, *lane.waiting], key=lambda item: item.number))
                else:
                    lane.waiting.extendleft(reversed(rest))
                lane.since = 0.0  # it has waited already
            if self._idle:
                self._work.notify_all() if self._closed else self._work.notify()
        self.tell()

    def postpone(self, lane: Lane, seconds: float) -> None:
        """Leave ``lane`` alone for a while; not for long once the queue is closed."""
        with self._work:
            lane.not_before = time.monotonic() + (min(seconds, _PAUSE_ONCE_CLOSED) if self._closed else seconds)

    def resume(self) -> None:
        """Look at every lane at once: what held them up is over."""
        with self._work:
            for lane in self._lanes.values():
                lane.not_before = 0.0
            self._work.notify_all()

    def forget(self, spool: SpoolFile) -> None:
        """Drop the lanes of a spool file, and what of it is in memory: it stays in the file."""
        with self._work:
            for key, lane in list(self._lanes.items()):
                if lane.spool is spool:
                    self._count(lane, -len(lane.waiting))
                    lane.waiting.clear()
                    lane.loaded = lane.accepted
                    del self._lanes[key]
        self.tell()

    def done_with(self, spool: SpoolFile) -> bool:
        """Whether nothing of a spool file waits, or is held by a writer."""
        with self._work:
            lanes = [lane for lane in self._lanes.values() if lane.spool is spool]
            return not any(lane.waiting or lane.flights or lane.loading or lane.on_disk for lane in lanes)

    def drop_waiting(self, spool: SpoolFile | None = None) -> None:
        """Leave to the disk what of a spool file is in memory and no writer holds; by default of all of them."""
        with self._work:
            for lane in self._lanes.values():
                if lane.spool is not None and spool in (None, lane.spool):
                    self._count(lane, -len(lane.waiting))
                    lane.waiting.clear()
                    lane.loaded = lane.accepted
            self._work.notify_all()
        self.tell()

    def oldest(self) -> list[Item]:
        """Return of each lane of async records that has some in memory the first."""
        with self._work:
            lanes = [lane for lane in self._lanes.values() if not lane.sync]
            heads = [[*lane.flights.values(), *islice(lane.waiting, 1)] for lane in lanes]
            return [min(items, key=lambda item: item.number) for items in heads if items]

    def _count(self, lane: Lane, change: int) -> None:
        if lane.sync:
            self._sync_size += change
            return
        self._size += change
        if lane.spool is None:
            self._memory_size += change

    def tell(self) -> None:
        """Wake whoever waits for progress."""
        with self._progress:
            self._progress.notify_all()
            listeners = list(self._listeners.values())
        for listener in listeners:
            listener()
