"""Async emits: one plain thread stores them, those of each scope in order, on a blocking connection of its own.

A record that the database refuses is given to ``on_error``, alone; its neighbours are stored. Any other
failure is not the records' fault: they wait, and the thread tries again until it succeeds or the vault closes.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from threading import Lock, Thread, current_thread
from typing import Any

import psycopg
from psycopg import Connection

from tracevault.config import Config
from tracevault.errors import DriverError, QueueFullError, TracevaultError, UndeliveredError
from tracevault.event.prepare import Prepared, unstored_record
from tracevault.flows.write import insert_many, needs_transaction
from tracevault.postgres.failures import Place, from_psycopg, is_broken, is_record_refused, outcome_unknown
from tracevault.postgres.run import run
from tracevault.writer.buffer import Buffer, Entry, Lane
from tracevault.writer.limit import Watch

_log = logging.getLogger("tracevault")

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0
# The server gives up on a statement at `timeout`, and says so; only if it does not do we, this much later.
_GRACE = 0.25
# An interpreter that exits without close() waits this long for what is queued.
_EXIT_SECONDS = 2.0
# And close() so long for a thread that was told to give up.
_LAST_SECONDS = 2.0
# Of which scopes without trouble of their own, held up by another one, have so much for their records.
_LAST_CHANCE = 1.0
_STATEMENT_TIMEOUT = "57014"


class BackgroundWriter:
    """The queue of a vault's async records and the thread that stores them; started with the first record."""

    def __init__(self, config: Config, connect: Callable[[], Connection[Any]]) -> None:
        self._config = config
        self._connect = connect
        self._buffer = Buffer(config.max_queue, config.async_batch_size, config.async_flush_interval_ms / 1000)
        self._start_lock = Lock()
        self._thread: Thread | None = None
        self._give_up_at: float | None = None
        self._dropping = False
        self._count_lock = Lock()
        self._lost = 0
        self._reported = 0
        self._connection: Connection[Any] | None = None  # the thread's own
        # From now on, not from the first record on: callbacks that the application registers later run earlier.
        self._pid = os.getpid()
        atexit.register(self._at_exit)

    # -- called by emit ------------------------------------------------------------------------------------

    def put(self, entry: Entry) -> bool:
        """Queue a record; False if ``on_full="drop_newest"`` dropped it. May wait, see ``on_full``."""
        self._start()
        if self._buffer.offer(entry):
            return self._kept()
        if not self._may_wait():
            return self._refuse()
        deadline = time.monotonic() + self._config.timeout
        while (left := deadline - time.monotonic()) > 0:
            self._buffer.wait_room(left)
            if self._buffer.offer(entry):
                return True
        raise self._full()

    async def put_async(self, entry: Entry) -> bool:
        """Queue a record from a coroutine: like `put`, and the event loop goes on meanwhile."""
        self._start()
        if self._buffer.offer(entry):
            return self._kept()
        if not self._may_wait():
            return self._refuse()
        if await self._wait_async(lambda: self._buffer.offer(entry), self._config.timeout):
            return True
        raise self._full()

    async def _wait_async(self, reached: Callable[[], bool], timeout: float) -> bool:
        """Wait until ``reached()``, looked at whenever the buffer changes; False if ``timeout`` seconds passed."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        deadline = loop.time() + timeout
        with self._buffer.listening(lambda: _wake(loop, changed)):
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
        # The writer's own thread, in on_error, would wait for itself.
        return self._config.on_full == "block" and current_thread() is not self._thread

    def _kept(self) -> bool:
        self._dropping = False
        return True

    def _refuse(self) -> bool:
        if self._config.on_full != "drop_newest":
            raise self._full()
        self._count_lost()
        if not self._dropping:
            self._dropping = True
            _log.error("the queue of %d async records is full: new ones are dropped", self._config.max_queue)
        return False

    def _full(self) -> QueueFullError:
        return QueueFullError(
            f"{self._config.max_queue:,} async records wait to be stored (`max_queue`): the database is slow or "
            "down; emit in sync mode to see why, or raise `max_queue`"
        )

    def _start(self) -> None:
        if self._thread is not None:
            return
        with self._start_lock:
            if self._thread is not None or self._buffer.closed:
                return
            thread = Thread(target=self._work, name="tracevault-writer", daemon=True)
            started = False
            with suppress(RuntimeError):
                thread.start()
                started = True
            if not started:
                raise TracevaultError("no thread can be started any more to write async records: emit in sync mode")
            self._thread = thread

    # -- called by flush and close -------------------------------------------------------------------------

    def flush(self, timeout: float) -> None:
        """Wait until every record accepted before is stored; raise `UndeliveredError` if one was lost or waits."""
        if current_thread() is self._thread:
            raise TracevaultError("flush() in `on_error` would wait for itself: call it elsewhere")
        mark = self._buffer.mark()
        in_time = self._buffer.wait_settled(mark, timeout)
        self._report(pending=0 if in_time else self._buffer.pending)

    async def flush_async(self, timeout: float) -> None:
        """Like `flush`, and the event loop goes on meanwhile."""
        mark = self._buffer.mark()
        in_time = await self._wait_async(lambda: self._buffer.settled(mark), timeout)
        self._report(pending=0 if in_time else self._buffer.pending)

    def close(self, timeout: float) -> None:
        """Accept no more, store what is queued within ``timeout`` s, give up the rest, and report losses."""
        self._give_up_at = time.monotonic() + timeout
        with self._start_lock:
            self._buffer.close()
            thread = self._thread
        if thread is not None and thread is not current_thread():
            thread.join(timeout + _LAST_SECONDS)
        atexit.unregister(self._at_exit)
        self._report(pending=self._buffer.pending)

    def _at_exit(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked child; the records are its parent's
        try:
            self.close(_EXIT_SECONDS)
        except UndeliveredError as error:
            _log.error("at exit: %s", error)

    def _count_lost(self) -> None:
        with self._count_lock:
            self._lost += 1

    def _report(self, *, pending: int) -> None:
        with self._count_lock:
            lost, self._reported = self._lost - self._reported, self._lost
        if lost or pending:
            parts = [f"{lost:,} lost (each was given to on_error, or dropped)"] if lost else []
            parts += [f"{pending:,} still waiting"] if pending else []
            raise UndeliveredError(
                f"async records are not in the database: {', '.join(parts)}", lost=lost, pending=pending
            )

    # -- the thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while taken := self._buffer.take():
            self._deliver(*taken)
        self._disconnect()

    def _deliver(self, lane: Lane, batch: Sequence[Prepared]) -> None:
        """Store ``batch``, the first records of ``lane``; or decide what becomes of it, and when to try again."""
        place = Place("storing async records", lane.scope, lane.table)
        troubled = lane.failure is not None or self._connection is None
        if self._out_of_time(0.0 if troubled else _LAST_CHANCE):
            self._lose(lane, batch, lane.failure or DriverError(f"{place}: the vault was closed first"), place)
            return
        failure, connected = self._try(lane, batch, place)
        if failure is None:
            self._buffer.settle(lane, len(batch))
            lane.most = min(lane.most * 2, self._config.async_batch_size)
            if lane.failure is not None:
                lane.failure, lane.failures = None, 0
                _log.info("%s works again", place)
        elif self._out_of_time() and not is_record_refused(failure):
            self._lose(lane, batch, failure, place)
        elif is_record_refused(failure):
            if len(batch) == 1:
                if failure.__cause__ is not None:  # PostgreSQL's own word, so no earlier attempt stored it either
                    lane.in_doubt = 0
                self._lose(lane, batch, failure, place)
            else:  # Halving finds the refused one in few attempts, and keeps the order.
                lane.most = len(batch) // 2
        else:
            self._wait(lane, batch, failure, place, connected=connected)

    def _try(self, lane: Lane, batch: Sequence[Prepared], place: Place) -> tuple[TracevaultError | None, bool]:
        """Return why ``batch`` could not be stored, and whether there was a connection to say so."""
        replay = lane.in_doubt > 0
        late = self._out_of_time()
        overdue_at = time.monotonic() + (_LAST_CHANCE / 3 if late else self._config.timeout + _GRACE)
        failure: TracevaultError
        connected = certain = False
        try:
            if self._connection is None:
                self._connection = self._connect()
            connected = True
            # All or nothing, so that what is refused can be told apart from what is stored.
            several = len(batch) > 1 or needs_transaction(batch, replay=replay)
            atomic = self._connection.transaction() if several else nullcontext()
            watch = Watch(
                self._connection, lambda: time.monotonic() >= overdue_at or (not late and self._out_of_time())
            )
            try:
                with atomic:
                    run(self._connection, insert_many(lane.table, batch, replay=replay), place)
            finally:
                watch.end()
        except psycopg.Error as error:  # of connecting, BEGIN or COMMIT; those of a flow are ours already
            failure = from_psycopg(error, place)
            certain = self._connection is not None and not is_broken(self._connection, failure)
        except TracevaultError as error:
            failure = error
            certain = self._connection is not None and not is_broken(self._connection, error)
        except Exception as error:  # noqa: BLE001 - whatever a caller's `writer_connect` raises; the thread must live on
            if lane.failure is None:
                _log.exception("%s failed unexpectedly", place)
            failure = DriverError(f"{place} failed: {type(error).__name__}", transient=True)
        else:
            return None, True
        if connected and not certain:
            lane.in_doubt = max(lane.in_doubt, len(batch))
        if not is_record_refused(failure) and getattr(failure, "sqlstate", None) != _STATEMENT_TIMEOUT:
            # Whatever it was, a fresh session may be free of it: another server, other settings.
            self._disconnect()
        return failure, connected and certain

    def _wait(
        self, lane: Lane, batch: Sequence[Prepared], failure: TracevaultError, place: Place, *, connected: bool
    ) -> None:
        """Leave ``batch`` where it is, to be tried again later."""
        if lane.failure is None:
            _log.error("async records wait in memory: %s", failure)
        lane.failure = failure
        lane.failures += 1
        if getattr(failure, "sqlstate", None) == _STATEMENT_TIMEOUT and len(batch) > 1:
            lane.most = len(batch) // 2
        seconds = min(_FIRST_PAUSE * 2 ** min(lane.failures, 10), _LONGEST_PAUSE) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        if connected:
            self._buffer.postpone(lane, seconds)
        else:
            self._buffer.pause(seconds)

    def _lose(self, lane: Lane, batch: Sequence[Prepared], error: TracevaultError, place: Place) -> None:
        for prepared in batch:
            reason = error
            if lane.in_doubt and isinstance(error, DriverError):
                reason = outcome_unknown(error, prepared.id, place)
            self._count_lost()
            try:
                if self._config.on_error is None:
                    _log.error("async record %s (%s) is lost: %s", prepared.id, lane.scope, reason)
                else:
                    self._config.on_error(reason, unstored_record(prepared))
            except BaseException:  # noqa: BLE001 - the handler's fault, even SystemExit, must not cost other records
                _log.exception("on_error itself failed")
            self._buffer.settle(lane, 1)

    def _out_of_time(self, extra: float = 0.0) -> bool:
        return self._give_up_at is not None and time.monotonic() >= self._give_up_at + extra

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _wake(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(changed.set)
