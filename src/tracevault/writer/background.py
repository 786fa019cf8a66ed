"""Async emits: one plain thread stores them in order, with a blocking connection of its own.

A record that the database refuses is given to ``on_error``, alone; its neighbours are stored. Any other
failure is not the records' fault: they wait, and the thread tries again until it succeeds or the vault closes.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from threading import Lock, Thread
from typing import Any

import psycopg
from psycopg import Connection

from tracevault.config import Config
from tracevault.errors import DriverError, QueueFullError, TracevaultError, UndeliveredError
from tracevault.event.prepare import Prepared, unstored_record
from tracevault.flows.write import insert_many, needs_transaction
from tracevault.postgres.failures import Place, from_psycopg, is_record_refused
from tracevault.postgres.run import run
from tracevault.writer.buffer import Buffer, Entry

_log = logging.getLogger("tracevault")

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0
# An interpreter that exits without close() waits this long for what is queued.
_EXIT_SECONDS = 2.0


class BackgroundWriter:
    """The queue of a vault's async records and the thread that stores them; started with the first record."""

    def __init__(self, config: Config, connect: Callable[[], Connection[Any]]) -> None:
        self._config = config
        self._connect = connect
        self._start_lock = Lock()
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._buffer = Buffer(self._config.max_queue)
        self._thread: Thread | None = None
        self._connection: Connection[Any] | None = None
        self._give_up_at: float | None = None
        self._failing = False
        self._dropping = False
        self._count_lock = Lock()
        self._lost = 0
        self._reported = 0

    # -- called by emit ------------------------------------------------------------------------------------

    def put(self, entry: Entry) -> bool:
        """Queue a record; False if ``on_full="drop_newest"`` dropped it. May wait, see ``on_full``."""
        self._start()
        if self._buffer.offer(entry):
            return self._kept()
        if self._config.on_full != "block":
            return self._refuse()
        deadline = time.monotonic() + self._config.timeout
        while time.monotonic() < deadline:
            self._buffer.wait_room(deadline)
            if self._buffer.offer(entry):
                return True
        raise self._full()

    async def put_async(self, entry: Entry) -> bool:
        """Queue a record from a coroutine: like `put`, and the event loop goes on meanwhile."""
        self._start()
        if self._buffer.offer(entry):
            return self._kept()
        if self._config.on_full != "block":
            return self._refuse()
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + self._config.timeout
        while time.monotonic() < deadline:
            room = asyncio.Event()
            if self._buffer.offer(entry, lambda room=room: _wake(loop, room)):  # type: ignore[misc]
                return True
            with suppress(TimeoutError):
                await asyncio.wait_for(room.wait(), max(0.0, deadline - time.monotonic()))
        raise self._full()

    def _kept(self) -> bool:
        self._dropping = False
        return True

    def _refuse(self) -> bool:
        if self._config.on_full == "raise":
            raise self._full()
        self._count_lost(1)
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
        if self._thread is not None and self._pid == os.getpid():
            return
        with self._start_lock:
            if self._pid != os.getpid():
                # A forked child has neither the thread nor a right to the parent's records and connection.
                self._reset()
            if self._thread is None and not self._buffer.closed:
                self._thread = Thread(target=self._work, name="tracevault-writer", daemon=True)
                self._thread.start()
                atexit.register(self._at_exit)

    # -- called by flush and close -------------------------------------------------------------------------

    def flush(self, timeout: float) -> None:
        """Wait until every record accepted before is stored; raise `UndeliveredError` if one was lost or waits."""
        in_time = self._buffer.wait_settled(self._buffer.accepted, timeout)
        self._report(pending=0 if in_time else self._buffer.pending)

    def close(self, timeout: float) -> None:
        """Accept no more, store what is queued within ``timeout`` s, give up the rest, and report losses."""
        self._give_up_at = time.monotonic() + timeout
        self._buffer.close()
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join(timeout)
            if self._thread.is_alive():
                self._cut()
                self._thread.join(_EXIT_SECONDS)
            atexit.unregister(self._at_exit)
        self._report(pending=self._buffer.pending)

    def _at_exit(self) -> None:
        if self._pid != os.getpid():
            return
        try:
            self.close(_EXIT_SECONDS)
        except UndeliveredError as error:
            _log.error("at exit: %s", error)

    def _cut(self) -> None:
        """Shut the writer's socket, so that a thread that waits for a silent server fails and ends."""
        with suppress(OSError, psycopg.Error, AttributeError):
            assert self._connection is not None
            with socket.socket(fileno=os.dup(self._connection.fileno())) as duplicate:
                duplicate.shutdown(socket.SHUT_RDWR)

    def _count_lost(self, count: int) -> None:
        with self._count_lock:
            self._lost += count

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
        linger = self._config.async_flush_interval_ms / 1000
        while batch := self._buffer.take(self._config.async_batch_size, linger):
            lanes: dict[tuple[str, str], list[Entry]] = {}
            for entry in batch:
                lanes.setdefault((entry.scope, entry.table), []).append(entry)
            for entries in lanes.values():
                self._deliver(entries)
        if self._connection is not None:
            self._connection.close()

    def _deliver(self, entries: Sequence[Entry]) -> None:
        """Store ``entries`` of one scope, or account for each of them."""
        place = Place("storing async records", entries[0].scope, entries[0].table)
        batch = [entry.prepared for entry in entries]
        replay = False
        pause = _FIRST_PAUSE
        while True:
            error = self._try(entries[0].table, batch, place, replay=replay)
            if error is None:
                if self._failing:
                    self._failing = False
                    _log.info("async records are stored again")
                self._buffer.settle(len(entries))
                return
            if is_record_refused(error):
                if len(entries) == 1:
                    self._lose(entries, error)
                    return
                # Halving finds the refused one in few attempts, and keeps the order.
                middle = len(entries) // 2
                self._deliver(entries[:middle])
                self._deliver(entries[middle:])
                return
            if self._give_up_at is not None and time.monotonic() >= self._give_up_at:
                self._lose(entries, error)
                return
            if not self._failing:
                self._failing = True
                _log.error("async records wait in memory: %s", error)
            replay = True
            self._buffer.pause(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            if self._buffer.closed:
                time.sleep(_FIRST_PAUSE)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _try(self, table: str, batch: Sequence[Prepared], place: Place, *, replay: bool) -> TracevaultError | None:
        try:
            if self._connection is None or self._connection.closed:
                self._connection = self._connect()
            atomic = self._connection.transaction() if needs_transaction(batch, replay=replay) else nullcontext()
            with atomic:
                run(self._connection, insert_many(table, batch, replay=replay), place)
        except psycopg.Error as error:
            return from_psycopg(error, place)
        except TracevaultError as error:
            return error
        except Exception as error:  # noqa: BLE001 - whatever a caller's `writer_connect` raises; the thread must live on
            _log.exception("the background writer could not connect")
            return DriverError(f"{place} failed: {type(error).__name__}", transient=True)
        return None

    def _lose(self, entries: Sequence[Entry], error: TracevaultError) -> None:
        for entry in entries:
            self._count_lost(1)
            if self._config.on_error is None:
                _log.error("async record %s (%s) is lost: %s", entry.prepared.id, entry.scope, error)
            else:
                try:
                    self._config.on_error(error, unstored_record(entry.prepared))
                except Exception:  # noqa: BLE001 - the handler's fault must not cost other records
                    _log.exception("on_error itself failed")
            self._buffer.settle(1)


def _wake(loop: asyncio.AbstractEventLoop, room: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(room.set)
