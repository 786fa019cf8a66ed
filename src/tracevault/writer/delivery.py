"""What becomes of a batch: stored, tried again, split for the one record that is refused, or given up.

What a failure means is decided by `failure_of`; records are kept unless the database refuses them for what they are.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import Connection

from tracevault.config import Config
from tracevault.errors import DriverError, SpoolError, TracevaultError
from tracevault.events.prepare import unstored_record
from tracevault.flows import Flow
from tracevault.flows.write import copy_encoded, copy_many, insert_many
from tracevault.postgres.failures import Failure, Place, failure_of, from_psycopg, is_broken, outcome_unknown
from tracevault.postgres.run import run
from tracevault.writer import dead
from tracevault.writer.dead import Letter
from tracevault.writer.handover import Handover
from tracevault.writer.limit import Watch
from tracevault.writer.queue import Item, Lane, Queue
from tracevault.writer.spool import RetiredError, SpoolFile
from tracevault.writer.stats import Counters
from tracevault.writer.told import tell
from tracevault.writer.upkeep import Spool
from tracevault.writer.waiter import Waiter, finish_all, own_copy

if TYPE_CHECKING:
    from tracevault.writer.stream import Publisher

_log = logging.getLogger("tracevault")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 30.0
# While somebody waits for a sync emit, the pauses stay this short.
_SYNC_PAUSE = 0.1
# Seconds after which a paused lane is looked at again.
PROBE_INTERVAL = 5.0
# So many records refused with the same code, and none accepted in between: it is not the records' fault.
_REFUSALS_IN_A_ROW = 3
# The server gives up on a statement at `timeout`, and says so; only if it does not do we, this much later.
GRACE = 0.25
# Of which scopes without trouble of their own, held up by another one, have so much for their records.
_LAST_CHANCE = 1.0


class Delivery:
    """Stores the batches that the writers' threads take. One for all of them."""

    def __init__(self, config: Config, queue: Queue, counters: Counters) -> None:
        self._config = config
        self._queue = queue
        self._counters = counters
        self.spool: Spool | None = None
        self.stream: Publisher | None = None
        """Where async records go in place of the database."""
        self.give_up_at: float | None = None
        """When the vault is being closed: by `time.monotonic`, until when records are tried."""
        self.commit_cost = CommitCost()
        self.handover = Handover()

    def deliver(self, session: Session, lane: Lane, batch: list[Item]) -> None:
        """Store ``batch``, or decide what becomes of it, and when the rest is tried again."""
        place = Place("emit" if lane.sync else "storing async records", lane.scope, lane.table)
        first, parts = batch[0].number, [batch]
        if lane.probing and len(batch) > 1:
            # Any one of them: the first ones may be at fault themselves.
            probe = batch.pop(random.randrange(len(batch)))  # noqa: S311 - fairness
            parts.append([probe])
        done: list[Item] = []
        woken: list[Waiter] = []
        while parts:
            part = self._without_expired(lane, parts.pop(), place, done, woken)
            if not part:
                continue
            if not lane.sync and self._too_late(session, lane):
                self._give_up(lane, part, place, done)
                continue
            failure, connected, certain = self._try(session, lane, part, place)
            if failure is None:
                self._delivered(lane, part, done, woken)
                self._recovered(lane, place)
                continue
            if connected and not certain:
                for item in part:
                    item.in_doubt = True
            kind = failure_of(failure)
            if kind is Failure.REFUSED:
                if self._split(lane, part, failure, place, parts, done, woken):
                    continue
                parts = [*parts, part] if part else parts
            elif not lane.sync and self._too_late(session, lane):
                self._give_up(lane, part, place, done, failure)
                continue
            elif lane.sync and (certain or not connected) and self._is_final(failure, kind, connected=connected):
                self._fail(lane, part, failure, place, done, woken)
                continue
            else:
                parts.append(part)
                self._hold(lane, part, failure, kind, place)
            break
        rest = sorted((item for part in parts for item in part), key=lambda item: item.number)
        self._queue.settle(lane, first, done, rest)
        finish_all(woken)

    def _try(
        self, session: Session, lane: Lane, part: Sequence[Item], place: Place
    ) -> tuple[TracevaultError | None, bool, bool]:
        """Return why ``part`` could not be stored, whether anything was sent, and whether it certainly is not there."""
        if self.stream is not None and not lane.sync:
            return self._published(self.stream, lane, part, place)
        replay = any(item.in_doubt for item in part)
        late = self._out_of_time()
        overdue_at = self._overdue_at(lane, part, late=late)
        failure: TracevaultError
        connected = certain = False
        started, computed = time.perf_counter(), time.process_time()
        try:
            connection = session.open()
            connected = True
            # All or nothing, so that what is refused can be told apart from what is stored.
            several = replay or any(item.given_id for item in part)
            watch = Watch(connection, lambda: time.monotonic() >= overdue_at or (not late and self._out_of_time()))
            try:
                with self.handover.awaiting(connection), connection.transaction() if several else nullcontext():
                    found = run(connection, self._insertion(lane, part, several=several, replay=replay), place)
            finally:
                watch.end()
        except psycopg.Error as error:  # of connecting, BEGIN or COMMIT; those of a flow are ours already
            failure = from_psycopg(error, place)
            certain = session.holds(failure)
        except TracevaultError as error:
            failure = error
            certain = session.holds(error)
        except Exception as error:  # noqa: BLE001 - whatever a caller's `writer_connect` raises; the thread must live on
            if lane.failure is None:
                _log.exception("%s failed unexpectedly", place)
            failure = DriverError(f"{place} failed: {type(error).__name__}", transient=True)
        else:
            seconds = time.perf_counter() - started
            self.commit_cost.note(len(part), seconds, time.process_time() - computed)
            replayed = len(part) if replay else 0
            self._counters.add(
                batches=1, batch_rows=len(part), write_seconds=seconds, replayed=replayed, found=found if replay else 0
            )
            return None, True, True
        if failure_of(failure) not in (Failure.REFUSED, Failure.SLOW):
            # Whatever it was, a fresh session may be free of it: another server, other settings.
            session.close()
        return failure, connected, certain

    def _published(
        self, stream: Publisher, lane: Lane, part: Sequence[Item], place: Place
    ) -> tuple[TracevaultError | None, bool, bool]:
        """Like `_try`, into the stream. Some may be there when it fails: they are known by their ids."""
        started = time.perf_counter()
        timeout = _LAST_CHANCE / 3 if self._out_of_time() else self._config.timeout
        try:
            stream.publish(lane.scope, lane.table, part, timeout, place)
        except DriverError as error:
            return error, True, False
        replayed = sum(item.in_doubt for item in part)
        seconds = time.perf_counter() - started
        self._counters.add(batches=1, batch_rows=len(part), write_seconds=seconds, replayed=replayed)
        return None, True, True

    @staticmethod
    def _insertion(lane: Lane, part: Sequence[Item], *, several: bool, replay: bool) -> Flow[int]:
        if lane.sync or several:
            return insert_many(lane.table, [item.prepared for item in part], replay=replay)
        if lane.spool is None:
            return copy_many(lane.table, [item.prepared for item in part])
        return copy_encoded(lane.table, [item.encoded for item in part])

    def _overdue_at(self, lane: Lane, part: Sequence[Item], *, late: bool) -> float:
        now = time.monotonic()
        if late and not lane.sync:
            return now + _LAST_CHANCE / 3
        if not lane.sync:
            return now + self._config.timeout + GRACE
        soonest = min(item.waiter.deadline for item in part if item.waiter is not None)
        return max(soonest, now + _LAST_CHANCE / 3) + GRACE

    def _delivered(self, lane: Lane, part: Sequence[Item], done: list[Item], woken: list[Waiter]) -> None:
        if lane.spool is not None:
            self._forget(lane.spool, part)
        done += part
        woken += [item.waiter for item in part if item.waiter is not None]
        if not lane.sync:  # else `emit` counts it
            self._counters.add(delivered=len(part))
            if self._config.on_stored is not None and self.stream is None:
                tell(self._config.on_stored, [item.prepared for item in part], "database")
        lane.refusals = (None, 0)

    def _forget(self, file: SpoolFile, part: Sequence[Item]) -> None:
        assert self.spool is not None
        # Of a file that was closed meanwhile, whoever reads it next finds out that they are stored.
        with suppress(RetiredError):
            file.delete([item.number for item in part])
            if not file.depth:
                self.spool.wake()

    def _split(
        self,
        lane: Lane,
        part: list[Item],
        failure: TracevaultError,
        place: Place,
        parts: list[list[Item]],
        done: list[Item],
        woken: list[Waiter],
    ) -> bool:
        """Find the refused record in ``part``; True if what is left of it can be tried at once."""
        row = getattr(failure, "row", None)
        if lane.probing and failure.__cause__ is not None:
            self._pause(lane, failure, place, "records are still refused")
            return False
        if failure.__cause__ is None and len(part) > 1:
            # Found by us after the statement: PostgreSQL has stored those that nothing kept out.
            for item in part:
                item.in_doubt = True
        if len(part) > 1 and (row is None or row >= len(part)):
            half = len(part) // 2
            parts += [part[half:], part[:half]]
            return True
        index = row if row is not None and len(part) > 1 else 0
        refused = part[index]
        if lane.sync:
            self._fail(lane, [refused], failure, place, done, woken)
        else:
            self._bury(lane, refused, failure, place)
            done.append(refused)
        del part[index]
        code = getattr(failure, "sqlstate", None)
        # Rows before the refused one passed every check.
        in_a_row = 1 + (lane.refusals[1] if lane.refusals[0] == code and index == 0 else 0)
        lane.refusals = (code, in_a_row)
        if not lane.sync and in_a_row >= _REFUSALS_IN_A_ROW and failure.__cause__ is not None:
            lane.refusals, lane.probing = (None, 0), True
            self._pause(lane, failure, place, f"{in_a_row} records in a row were refused")
            return False
        if part:
            parts.append(part)
        return True

    def _bury(self, lane: Lane, item: Item, failure: TracevaultError, place: Place) -> None:
        self._counters.add(dead=1, poison=1)
        if lane.spool is not None:
            assert self.spool is not None
            code = getattr(failure, "sqlstate", None)
            letter = Letter(
                lane.spool.target, lane.scope, lane.table, item.prepared, code, str(failure), died_at=time.time()
            )
            try:
                dead.add(self.spool.folder.path, letter)
                lane.spool.delete([item.number])
            except SpoolError as error:
                _log.error("a refused record stays in the spool: %s", error)
        self._tell_lost(lane, item, failure, "is a dead letter" if lane.spool is not None else "is lost")

    def _tell_lost(self, lane: Lane, item: Item, reason: TracevaultError, fate: str) -> None:
        try:
            if self._config.on_error is None:
                _log.error("async record %s (%s) %s: %s", item.prepared.id, lane.scope, fate, reason)
            else:
                self._config.on_error(reason, unstored_record(item.prepared))
        except BaseException:  # noqa: BLE001 - the handler's fault, even SystemExit, must not cost other records
            _log.exception("on_error itself failed")

    def _fail(
        self,
        lane: Lane,
        part: Sequence[Item],
        failure: TracevaultError,
        place: Place,
        done: list[Item],
        woken: list[Waiter],
    ) -> None:
        """Tell the callers of sync emits."""
        for item in part:
            assert item.waiter is not None
            unknown = item.in_doubt and isinstance(failure, DriverError) and failure_of(failure) is not Failure.REFUSED
            item.waiter.error = (
                outcome_unknown(failure, item.prepared.id, place)
                if unknown and isinstance(failure, DriverError)
                else own_copy(failure)
            )
            woken.append(item.waiter)
        done += part

    @staticmethod
    def _is_final(failure: TracevaultError, kind: Failure, *, connected: bool) -> bool:
        """Whether a sync emit is told at once: what is certain, and not worth another attempt within seconds."""
        if not isinstance(failure, DriverError):
            return True
        if kind is Failure.SESSION:
            return False
        return connected or not failure.transient

    def _without_expired(
        self, lane: Lane, part: list[Item], place: Place, done: list[Item], woken: list[Waiter]
    ) -> list[Item]:
        if not lane.sync or lane.failure is None:
            return part
        now = time.monotonic()
        expired = [item for item in part if item.waiter is not None and item.waiter.deadline <= now]
        if expired:
            self._fail(lane, expired, lane.failure, place, done, woken)
            part = [item for item in part if item not in expired]
        return part

    def _hold(self, lane: Lane, part: Sequence[Item], failure: TracevaultError, kind: Failure, place: Place) -> None:
        """Keep what is left, and say when to try again."""
        self._counters.add(transient=1)
        if kind is Failure.OPERATOR and not lane.sync:
            self._pause(lane, failure, place, "it is paused")
            return
        if kind is Failure.SLOW and len(part) > 1:
            lane.most = max(1, len(part) // 2)
        seconds = 0.0
        if kind is not Failure.SESSION or lane.failures > 1:
            longest = min(_FIRST_PAUSE * 2 ** min(lane.failures, 12), _SYNC_PAUSE if lane.sync else _LONGEST_PAUSE)
            seconds = random.uniform(0.2, 1.0) * longest  # noqa: S311 - jitter
        lane.failures += 1
        if lane.failure is None and not lane.sync:
            _log.error("async records wait%s: %s", "" if lane.spool else " in memory", failure)
        lane.failure, lane.state = failure, "waiting"
        self._queue.postpone(lane, seconds)

    def _pause(self, lane: Lane, failure: TracevaultError, place: Place, why: str) -> None:
        if lane.state != "paused":
            _log.error(
                "async records wait%s until somebody mends this (%s; looked at every %g s): %s",
                "" if lane.spool else " in memory",
                why,
                PROBE_INTERVAL,
                failure,
            )
        lane.failure, lane.state = failure, "paused"
        self._queue.postpone(lane, PROBE_INTERVAL)

    def _recovered(self, lane: Lane, place: Place) -> None:
        lane.most = min(lane.most * 2, self._config.async_batch_size)
        if lane.failure is None:
            return
        lane.failure, lane.failures, lane.state, lane.probing = None, 0, "ok", False
        if not lane.sync:
            _log.info("%s works again", place)
        self._queue.resume()  # the other lanes waited for the same, perhaps

    def _too_late(self, session: Session, lane: Lane) -> bool:
        troubled = lane.failure is not None or not session.connected
        return self._out_of_time(0.0 if troubled else _LAST_CHANCE)

    def _give_up(
        self, lane: Lane, part: Sequence[Item], place: Place, done: list[Item], failure: TracevaultError | None = None
    ) -> None:
        """The vault is closed and time is up: leave to the spool what is there; the rest is lost."""
        done += part
        if lane.spool is not None:
            return
        error = failure or lane.failure or DriverError(f"{place}: the vault was closed first")
        for item in part:
            reason = error
            if item.in_doubt and isinstance(error, DriverError):
                reason = outcome_unknown(error, item.prepared.id, place)
            self._counters.add(dead=1)
            self._tell_lost(lane, item, reason, "is lost")

    def _out_of_time(self, extra: float = 0.0) -> bool:
        return self.give_up_at is not None and time.monotonic() >= self.give_up_at + extra


class Session:
    """A writer's connection, opened when it is needed."""

    def __init__(self, connect: Callable[[], Connection[Any]]) -> None:
        self._connect = connect
        self._connection: Connection[Any] | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def open(self) -> Connection[Any]:
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def holds(self, error: TracevaultError) -> bool:
        """Whether the connection survived ``error``, so that what it says is certain."""
        return self._connection is not None and not is_broken(self._connection, error)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class CommitCost:
    """What a commit costs besides its rows: the least of late, in seconds.

    The least, since a thread that waits for the interpreter's lock or for a processor takes longer as well, and more
    of them would only add to that. While hundreds of callers keep the interpreter busy, every batch waits for its
    lock: so what this process computed meanwhile, in any thread, is no cost of the commit. Where a commit takes
    milliseconds, more writers wait for the disk side by side; where it does not, fewer and larger batches cost less.
    """

    _ROW = 20e-6  # of the server's time, more or less
    _MOST = 0.002
    _RISE = 0.002  # of the difference, with each batch: among hundreds some are held up by nothing else

    def __init__(self) -> None:
        self.seconds = 0.0

    def note(self, rows: int, seconds: float, computed: float) -> None:
        """Note how long a batch took, and for how long of that the process computed."""
        # Without a lock: a value that two threads spoil for a moment does no harm.
        least = min(seconds - max(rows * self._ROW, computed), self._MOST)
        self.seconds = min(least, self.seconds + (least - self.seconds) * self._RISE)
