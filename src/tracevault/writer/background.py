"""The background writers of a vault: up to four plain threads that store async records and concurrent sync emits.

Each has a blocking connection of its own, opened when it is needed. There is no lingering: a batch goes as soon as
a writer is idle, and grows only while all are busy. What becomes of a batch is in ``delivery``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock, Thread, current_thread, local
from typing import Any, Literal, TypeAlias

from psycopg import Connection

from tracevault.config import Config
from tracevault.errors import (
    DriverError,
    OutcomeUnknownError,
    QueueFullError,
    SpoolError,
    TracevaultError,
    UndeliveredError,
)
from tracevault.events.binary import encode_row
from tracevault.events.prepare import Prepared
from tracevault.events.record import INSERT_COLUMNS
from tracevault.postgres.failures import Place, outcome_unknown
from tracevault.writer.adoption import SpoolFolder
from tracevault.writer.delivery import GRACE, Delivery, Session
from tracevault.writer.herald import Herald
from tracevault.writer.process import at_exit, warn_about_threads
from tracevault.writer.queue import Item, Lane, Queue
from tracevault.writer.spool import RetiredError, SpoolFile, SpoolFullError, flags_of
from tracevault.writer.stats import Counters, Stats
from tracevault.writer.turn import Turn
from tracevault.writer.upkeep import Spool
from tracevault.writer.waiter import LoopWaiter, Waiter, fail_all, own_copy

_log = logging.getLogger("tracevault")

Where = Literal["memory", "spool", "dropped"]
# Where a record was appended, and the mark for `SpoolFile.sync`.
_Mark: TypeAlias = tuple[SpoolFile, int]

MAX_WRITERS = 4
# So many where a commit is quick: more would only compete for the processor. Measured, see `CommitCost`.
_QUICK_WRITERS = 2
_SLOW_COMMIT = 0.0005
# An interpreter that exits without close() waits this long for what is queued, and close() so long for threads.
_EXIT_SECONDS = 2.0
_LAST_SECONDS = 2.0
# Seconds between looks at the deadlines of an event loop's sync emits.
_WATCH_INTERVAL = 0.1
# Seconds between attempts to move away from a spool file that could not be synced.
_MOVE_INTERVAL = 0.25


class BackgroundWriter:
    """The queue of a vault, its spool, and the threads that store what is in them; started when needed."""

    def __init__(
        self,
        config: Config,
        connect: Callable[[], Connection[Any]],
        target: str | None = None,
        *,
        shared: bool = False,
    ) -> None:
        self._config = config
        self._connect = connect
        self._queue = Queue(config.max_queue, config.async_batch_size, config.async_flush_interval_ms / 1000)
        self.counters = Counters()
        self._lock = Lock()
        self._moving = Lock()
        self._move_at = 0.0
        self._threads: list[Thread] = []
        self._dropping = False
        self._reported = 0
        self._turns = local()
        self._delivery = Delivery(config, self._queue, self.counters)
        if config.ingest is not None:
            from tracevault.writer.stream import Publisher  # noqa: PLC0415 - it needs an extra

            self._delivery.stream = Publisher(config.ingest)
        self._herald: Herald | None = None
        if config.notify:
            self._herald = Herald(connect, list(dict.fromkeys(config.tables.values())), self.counters)
            self._herald.start()
        self.spool: Spool | None = None
        if config.spool is not None:
            self.spool = Spool(
                SpoolFolder(os.fspath(config.spool), target=target, shared=shared),
                config.spool_quota_bytes,
                adopted=self._adopt,
                failed=self._move_on,
                is_done=self._queue.done_with,
                let_go=self._let_go,
            )
            self._delivery.spool = self.spool
            self.spool.start()
        # From now on, not from the first record on: callbacks that the application registers later run earlier.
        self._pid = os.getpid()
        self._stop_waiting_for_exit = at_exit(self._at_exit)
        warn_about_threads()

    # -- async records -------------------------------------------------------------------------------------

    def put_now(self, scope: str, table: str, prepared: Prepared) -> Where | None:
        """Keep a record if that takes no waiting, and nothing is wrong; else return None, and it is not kept."""
        if self._config.durability == "fsync":
            return None
        kept = self._offer(scope, table, self._item(prepared))
        return kept and kept[0]

    def put(self, scope: str, table: str, prepared: Prepared) -> Where:
        """Keep a record, and return where: "memory", "spool" or "dropped". May wait, see ``on_full``."""
        item = self._item(prepared)
        kept = self._offer(scope, table, item)
        if kept is None and self._may_wait():
            deadline = time.monotonic() + self._config.timeout
            while kept is None and (left := deadline - time.monotonic()) > 0:
                if self.spool is None:
                    self._queue.wait_room(left)
                else:
                    self._queue.wait_change(min(left, 0.1))
                kept = self._offer(scope, table, item)
        where, spooled = kept or self._refuse()
        if spooled is not None and self._config.durability == "fsync":
            self._sync(*spooled, prepared)
        return where

    async def put_async(self, scope: str, table: str, prepared: Prepared) -> Where:
        """Keep a record from a coroutine: like `put`, and the event loop goes on meanwhile."""
        item = self._item(prepared)
        kept = self._offer(scope, table, item)
        if kept is None and self._may_wait():

            def offered() -> bool:
                nonlocal kept
                if self.spool is not None or self._queue.has_room:
                    kept = self._offer(scope, table, item)
                return kept is not None

            await self._wait_async(offered, self._config.timeout)
        where, spooled = kept or self._refuse()
        if spooled is not None and self._config.durability == "fsync":
            await asyncio.to_thread(self._sync, *spooled, prepared)
        return where

    def _item(self, prepared: Prepared, *, in_doubt: bool = False) -> Item:
        # A spool and a stream take each record as bytes; for the database those of a batch are encoded together.
        if self.spool is None and self._delivery.stream is None:
            return Item(prepared)
        return Item(None, encode_row(prepared.row), flags_of(prepared), in_doubt=in_doubt)

    def _offer(self, scope: str, table: str, item: Item) -> tuple[Where, _Mark | None] | None:
        """Take a record if there is room, and count it; return where it is, and what to sync."""
        try:
            if self.spool is not None:
                spooled = self._keep(scope, table, item)
                self.counters.add_emitted()
                return "spool", spooled
            lane = self._queue.lane(scope, table)
            if not self._queue.offer(lane, item):  # which counts what it takes
                return None
        except SpoolFullError:
            return None
        except TracevaultError:
            self.counters.add(emitted=1, refused=1)
            raise
        self._dropping = False
        try:
            self._ensure_writer()
        except TracevaultError:
            if self._queue.withdraw(lane, item):
                self.counters.add(refused=1)
                raise
        self._delivery.handover.give_way(time.monotonic(), wanted=self._queue.is_untaken(lane))
        return "memory", None

    def keep(self, scope: str, table: str, prepared: Prepared, *, in_doubt: bool = False) -> _Mark:
        """Append a record to the spool, and have it delivered. Return the file, and its mark there."""
        return self._keep(scope, table, self._item(prepared, in_doubt=in_doubt))

    def _keep(self, scope: str, table: str, item: Item) -> _Mark:
        self._queue.check_open()
        spool = self.spool
        assert spool is not None
        file = spool.own()
        try:
            mark = self._append(file, scope, table, item)
        except SpoolFullError:
            raise
        except SpoolError as error:
            if not isinstance(error, RetiredError):
                _log.error("%s; another one is begun", error)
                spool.begin_another(file)
            file = spool.own()
            mark = self._append(file, scope, table, item)
        self._dropping = False
        spool.appended(file)
        try:
            self._ensure_writer()
        except TracevaultError as error:
            _log.error("%s; until then they wait in the spool", error)
        return file, mark

    def _append(self, file: SpoolFile, scope: str, table: str, item: Item) -> int:
        lane = self._queue.lane(scope, table, spool=file)

        def kept(number: int) -> bool:
            return self._queue.offer_spooled(lane, item, number)

        return file.append(scope, table, item.encoded, item.flags, in_doubt=item.in_doubt, kept=kept)

    def _sync(self, file: SpoolFile, mark: int, prepared: Prepared) -> None:
        try:
            file.sync(mark)
        except RetiredError:
            pass  # whoever closed it had seen everything in it delivered, or synced elsewhere
        except SpoolError:
            try:
                self._move_on(file)
            except TracevaultError as error:
                raise OutcomeUnknownError(
                    f"{error}; the event is kept, but a loss of power may take it along: emit it again with the same "
                    f"content and id={str(prepared.id)!r} to have it once",
                    id=prepared.id,
                ) from None

    def _move_on(self, file: SpoolFile) -> None:
        """Keep in another file what ``file`` holds, because what it says of the disk cannot be trusted any more.

        After a failed sync the operating system forgets what it could not write, and the next one succeeds.
        """
        spool = self.spool
        assert spool is not None
        with self._moving:
            if file not in spool.files():
                return  # somebody else has done it
            if time.monotonic() < self._move_at:
                raise SpoolError(f"the spool file {str(file.path)!r} cannot be synced")
            self._move_at = time.monotonic() + _MOVE_INTERVAL
            heir = spool.own()
            if heir.distrusted:
                spool.begin_another(heir)
                heir = spool.own()
            heir.sync(heir.last + 1)  # while the disk fails, nothing is gained by copies
            deadline = time.monotonic() + self._config.timeout + _LAST_SECONDS
            self._queue.drop_waiting(file)
            while not self._queue.done_with(file) and time.monotonic() < deadline:
                self._queue.wait_change(0.1)
                self._queue.drop_waiting(file)
            left = file.left()
            try:
                items = [Item(None, one.encoded, one.flags, in_doubt=True) for one in left]
                kept = dict(self._keep(one.scope, one.table, item) for one, item in zip(left, items, strict=True))
                for other, mark in kept.items():
                    with suppress(RetiredError):  # everything in it is delivered
                        other.sync(mark)
            except TracevaultError:
                file.copied = True
                self._deliver_from(file)
                raise
            self._move_at = 0.0
            _log.error("the spool file %s cannot be synced: what was left in it moved to another one", file.path)
            file.depth = 0
            spool.let_go(file)

    async def _wait_async(self, reached: Callable[[], bool], timeout: float) -> bool:
        """Wait until ``reached()``, looked at whenever the queue changes; False if ``timeout`` seconds passed."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        deadline = loop.time() + timeout
        with self._queue.listening(lambda: _wake(loop, changed)):
            while not reached():
                left = deadline - loop.time()
                if left <= 0:
                    return False
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await changed.wait()
                changed.clear()
        return True

    def _may_wait(self) -> bool:
        # A writer's own thread, in on_error, would wait for itself.
        return self._config.on_full == "block" and current_thread() not in self._threads

    def _refuse(self) -> tuple[Where, None]:
        where = "the spool is full (`spool_quota_bytes`, or the disk)"
        if self.spool is None:
            where = f"{self._config.max_queue:,} async records wait to be stored (`max_queue`)"
        if self._config.on_full != "drop_newest":
            self.counters.add(emitted=1, refused=1)
            raise QueueFullError(
                f"{where}: the database is slow or down; emit in sync mode to see why, or allow for more"
            )
        self.counters.add(emitted=1, dropped=1)
        if not self._dropping:
            self._dropping = True
            _log.error("%s: new ones are dropped", where)
        return "dropped", None

    # -- sync emits ----------------------------------------------------------------------------------------

    @property
    def sync_busy(self) -> bool:
        """Whether sync emits are under way here, so that another one had better join them."""
        return self._queue.sync_busy

    @property
    def loop_busy(self) -> bool:
        """Whether sync emits are under way here, or others of the running event loop are about to be."""
        return self._queue.sync_busy or self._turn().goes_on

    def store(self, scope: str, table: str, prepared: Prepared, place: Place) -> None:
        """Store a record with whatever else is to be stored, and return when it is."""
        waiter = Waiter(time.monotonic() + self._config.timeout)
        lane, item = self._queue.lane(scope, table, sync=True), Item(prepared, waiter=waiter)
        self._queue.offer(lane, item)
        self._ensure_writer()
        while not waiter.wait(waiter.deadline + GRACE - time.monotonic()):
            self._withdraw(lane, item, place)
            waiter.deadline = time.monotonic() + 1.0  # a writer has it: it will end, and say how
        if waiter.error is not None:
            raise waiter.error

    async def store_async(self, scope: str, table: str, prepared: Prepared) -> None:
        """Store a record with whatever else is to be stored; like `store`, and the event loop goes on meanwhile."""
        turn = self._turn()
        waiter = LoopWaiter(turn, time.monotonic() + self._config.timeout)
        item = Item(prepared, waiter=waiter)
        turn.add(self._queue.lane(scope, table, sync=True), item)
        try:
            await waiter.future
        except asyncio.CancelledError:
            item.waiter = Waiter(waiter.deadline)  # it is stored all the same, or not; nobody asks
            if waiter.has_landed:
                self.counters.add(in_flight=1, delivered=-1)  # it counts as any other that was cancelled
            raise
        if waiter.error is not None:
            raise waiter.error

    def _turn(self) -> Turn:
        """Return the turn of the event loop that runs here."""
        loop = asyncio.get_running_loop()
        turn: Turn | None = getattr(self._turns, "last", None)
        if turn is None or turn.loop is not loop:
            turn = self._turns.last = Turn(loop, self._offer_turn, self._count_landed)
        return turn

    def _offer_turn(self, turn: Turn, pairs: Sequence[tuple[Lane, Item]]) -> None:
        """Have the emits of a turn stored."""
        self.counters.add(emitted=len(pairs), in_flight=len(pairs))
        try:
            idle = self._queue.offer_together(pairs)
        except TracevaultError as error:  # the vault was closed just now
            fail_all([item.waiter for _, item in pairs if item.waiter], error)
            return
        try:
            self._ensure_writer()
        except TracevaultError as error:
            fail_all([item.waiter for lane, item in pairs if self._queue.withdraw(lane, item) and item.waiter], error)
            return
        if idle and turn.goes_on:
            self._delivery.handover.pause()  # or it would begin only when the loop lets go of the lock
        else:
            self._delivery.handover.give_way(time.monotonic())
        if not turn.watched:
            turn.watched = True
            self._watch(turn)

    def _count_landed(self, count: int) -> None:
        self.counters.add(in_flight=-count, delivered=count)

    def _watch(self, turn: Turn) -> None:
        """Give up on the emits of a loop for which time has run out, now and again: one timer for all of them."""
        for lane, item in self._queue.overdue(time.monotonic() - GRACE):
            waiter = item.waiter
            if isinstance(waiter, LoopWaiter) and waiter.turn is turn:
                try:
                    self._withdraw(lane, item, Place("emit", lane.scope, lane.table))
                except TracevaultError as error:
                    waiter.error = error
                    waiter.finish()
        if self._queue.sync_busy:
            turn.loop.call_later(_WATCH_INTERVAL, self._watch, turn)
        else:
            turn.watched = False

    def _withdraw(self, lane: Lane, item: Item, place: Place) -> None:
        """Give up on an item for which time has run out, unless a writer holds it just now."""
        if not self._queue.withdraw(lane, item):
            return
        error = lane.failure
        if not isinstance(error, DriverError):
            error = DriverError(
                f"{place} failed: no background writer became free within {self._config.timeout:g} s; is the server "
                "overloaded?",
                transient=True,
            )
        raise outcome_unknown(error, item.prepared.id, place) if item.in_doubt else own_copy(error)

    # -- threads -------------------------------------------------------------------------------------------

    def _ensure_writer(self) -> None:
        """Start a writer where something waits, none is idle, and another one would help."""
        if self._queue.wants_writer:
            self._start_writer()

    def _start_writer(self) -> None:
        most = MAX_WRITERS if self._delivery.commit_cost.seconds > _SLOW_COMMIT else _QUICK_WRITERS
        if len(self._threads) >= most:
            return
        with self._lock:
            if len(self._threads) >= most or (self._queue.closed and self._threads):
                return
            number = len(self._threads) + 1
            thread = Thread(target=self._work, name=f"tracevault-writer-{number}", daemon=True)
            started = False
            with suppress(RuntimeError):
                thread.start()
                started = True
            if started:
                self._threads.append(thread)
            elif not self._threads:
                raise TracevaultError("no thread can be started any more to write records: emit alone in sync mode")

    def _adopt(self, file: SpoolFile) -> None:
        """Have what another process left in ``file`` delivered."""
        self.counters.add(adopted=file.depth)
        self._deliver_from(file)
        if not self._threads:
            self._start_writer()

    def _let_go(self, file: SpoolFile) -> None:
        self._queue.forget(file)
        if file.depth:  # what nobody could read
            self.counters.add(dead=file.depth)

    def _deliver_from(self, file: SpoolFile) -> None:
        for scope, table in file.lanes():
            self._queue.on_disk(self._queue.lane(scope, table, spool=file), file.last)

    def _work(self) -> None:
        session = Session(self._connect)
        while taken := self._queue.take():
            lane, batch = taken
            if batch:
                self._delivery.deliver(session, lane, batch)
            else:
                self._load(lane)
        session.close()

    def _load(self, lane: Lane) -> None:
        """Read the next records of ``lane`` back from its file."""
        file = lane.spool
        assert file is not None
        most = min(4 * self._config.async_batch_size, self._config.max_queue)
        items: list[Item] = []
        last: int | None = lane.accepted
        try:
            found, last = file.load(lane.scope, lane.table, lane.loaded, most)
            for one in found:
                item = Item(None, one.encoded, one.flags, in_doubt=one.in_doubt or file.copied or not file.mine)
                item.number = one.seq
                items.append(item)
        except Exception as error:  # noqa: BLE001 - a broken file must not end the thread
            file.damaged = True
            if not self._queue.closed:
                _log.error("the spool file %s cannot be read: %s", file.path, error)
        self._queue.fill(lane, items, last=last)

    # -- called by flush and close -------------------------------------------------------------------------

    def flush(self, timeout: float) -> None:
        """Wait until every record accepted before is stored; raise `UndeliveredError` if one was lost or waits."""
        if current_thread() in self._threads:
            raise TracevaultError("flush() in `on_error` would wait for itself: call it elsewhere")
        mark = self._queue.mark()
        in_time = self._queue.wait_settled(mark, timeout)
        self._report(waiting=not in_time)

    async def flush_async(self, timeout: float) -> None:
        """Like `flush`, and the event loop goes on meanwhile."""
        mark = self._queue.mark()
        in_time = await self._wait_async(lambda: self._queue.settled(mark), timeout)
        self._report(waiting=not in_time)

    def close(self, timeout: float) -> None:
        """Accept no more, store what is queued within ``timeout`` s, give up the rest, and report losses.

        What is in the spool stays there, for the next process.
        """
        self._delivery.give_up_at = time.monotonic() + timeout
        with self._lock:
            self._queue.close()
            threads = [thread for thread in self._threads if thread is not current_thread()]
        deadline = self._delivery.give_up_at + _LAST_SECONDS
        for thread in threads:
            thread.join(max(0.0, self._delivery.give_up_at + GRACE - time.monotonic()))
            if thread.is_alive():
                self._queue.drop_waiting()
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._herald is not None:
            self._herald.close(_LAST_SECONDS)
        if self._delivery.stream is not None:
            self._delivery.stream.close()
        if self.spool is not None:
            self.spool.close()
        self._stop_waiting_for_exit()
        self._report(waiting=self._queue.in_memory().waiting > 0, closing=True)

    def _at_exit(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked child; the records are its parent's
        try:
            self.close(_EXIT_SECONDS)
        except UndeliveredError as error:
            _log.error("at exit: %s", error)

    def _report(self, *, waiting: bool, closing: bool = False) -> None:
        total = self.counters.count("dead") + self.counters.count("dropped")
        lost, self._reported = total - self._reported, total
        pending = self._queue.in_memory().unsettled if waiting else 0
        spooled = sum(file.depth for file in self.spool.files()) if self.spool and waiting and not closing else 0
        if lost or pending or spooled:
            fate = "each was given to on_error, or dropped" if self.spool is None else "dead letters, or dropped"
            parts = [f"{lost:,} lost ({fate})"] if lost else []
            parts += [f"{pending:,} still waiting"] if pending else []
            parts += [f"{spooled:,} waiting in the spool"] if spooled else []
            raise UndeliveredError(
                f"async records are not in the database: {', '.join(parts)}",
                lost=lost,
                pending=pending,
                spooled=spooled,
            )

    # -- stats ---------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return the counters, and what waits."""
        counts: dict[str, Any] = self.counters.snapshot()
        files = self.spool.files() if self.spool is not None else []
        counts["spooled"] = sum(file.depth for file in files)
        counts["fsync_seconds"] = self.spool.fsync_seconds if self.spool is not None else 0.0
        counts["spool_bytes"] = sum(file.size for file in files)
        memory = self._queue.in_memory()
        counts["emitted"] += memory.accepted
        counts["queued"] = memory.waiting
        counts["in_flight"] += memory.unsettled - memory.waiting
        counts["writers"] = sum(thread.is_alive() for thread in self._threads)
        times = [item.prepared.row[_OCCURRED_AT] for item in self._queue.oldest()]
        times += [one.occurred_at for file in files for one in file.first_unread()]
        counts["oldest_seconds"] = max((time.time() - moment.timestamp() for moment in times), default=0.0)
        states: dict[str, str] = {}
        for lane in self._queue.lanes():
            if not lane.sync:
                states[lane.scope] = max(states.get(lane.scope, "ok"), lane.state, key=_SEVERITY.index)
        return Stats(**counts, lanes=states)


_OCCURRED_AT = INSERT_COLUMNS.index("occurred_at")
_SEVERITY = ("ok", "waiting", "paused")


def _wake(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(changed.set)
