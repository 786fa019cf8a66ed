"""The sealer: gives leaves to committed rows, signs what has grown, and tells the anchors.

One sealer serves several audit tables over one connection of its own. Any number may run anywhere: while one holds a
tree, the others do nothing. The order is always the same: leaves and root are committed, then signed, then the note is
stored, then anchors hear of it. Whatever breaks in between is made up for by the next round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar

import psycopg
from psycopg import Connection, IsolationLevel

from tracevault.errors import DriverError, RollbackError, SealError, TracevaultError
from tracevault.flows import Flow
from tracevault.flows.seal import (
    Tree,
    check_canary,
    estimate,
    find_tree,
    has_checkpoints,
    make_tables,
    plant,
    read_tiles,
    resume,
    seal_rows,
    store_checkpoint,
    store_outcomes,
    tables_exist,
)
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.note import Note
from tracevault.postgres.failures import Place, from_psycopg
from tracevault.postgres.run import run
from tracevault.sealing.keys import verifiers
from tracevault.sealing.log import LogConnection, StoredLog
from tracevault.sealing.publisher import Publisher
from tracevault.sealing.signer import CheckpointSigner

_log = logging.getLogger("tracevault")
_SEALING = Place("sealing")
# Rows that get their leaves in one transaction: a tenth of a second, and half a megabyte of memory.
BATCH = 8192
# Seconds between signatures while a long backlog is sealed.
_SIGN_INTERVAL = 1.0
# Seconds after which an idle log is published again.
HEARTBEAT = 3600.0
_SERIALIZATION_FAILURE = "40001"
_NO_RIGHT = "42501"
_LONGEST_PAUSE = 60.0
_ATTEMPTS = 10

T = TypeVar("T")


@dataclass(frozen=True)
class Round:
    """What one round did for a table: rows that got a leaf, whether more wait, and the tree as it is then.

    ``current`` says whether it sealed, or began to, what was committed when the round began: one that goes on with a
    walk seals what was committed when the walk began.
    """

    sealed: int
    more: bool
    tree: Tree
    current: bool


class Sealer:
    """Seals audit tables. Not safe for two threads at once; two sealers are.

    ``connect`` returns a new blocking connection. An idle log tells its anchors every ``heartbeat`` seconds that it
    is there.
    """

    def __init__(
        self,
        connect: Callable[[], Connection[Any]],
        tables: Sequence[str],
        signer: CheckpointSigner,
        *,
        publisher: Publisher | None = None,
        heartbeat: float = HEARTBEAT,
        batch: int = BATCH,
    ) -> None:
        self.tables = tuple(tables)
        self._connect = connect
        self._signer = signer
        self._publisher = publisher
        self._heartbeat = heartbeat
        self._batch = batch
        self._log = LogConnection(connect)
        self._connection: Connection[Any] | None = None
        self._ready = False
        self._signed: dict[str, Tree] = {}
        self._signed_at: dict[str, float] = {}
        self._published: dict[str, tuple[float, Tree, Note]] = {}

    def round(self, table: str) -> Round | None:
        """Give leaves to one batch of rows; sign if the tree has grown. None while somebody else seals the table.

        Raises `SealError` for what an operator has to see to, and `DriverError` for what passes.
        """
        self._prepare()
        try:
            sealed = self._transaction(lambda: seal_rows(table, self._batch), attempts=1)
        except DriverError as error:
            if error.sqlstate == _SERIALIZATION_FAILURE:  # another sealer was faster
                return None
            raise
        if sealed is None:
            return None
        tree, count, current = sealed
        due = not tree.walking or time.monotonic() - self._signed_at.get(table, -_SIGN_INTERVAL) >= _SIGN_INTERVAL
        if due:
            self.sign(table)
        return Round(count, tree.walking, tree, current)

    def seal(self, table: str, announce: Callable[[Round], None] = lambda _round: None) -> Round | None:
        """Seal everything that is committed now, batch by batch; return the last round, or None as `round` does."""
        current = False
        while True:
            done = self.round(table)
            if done is None:
                return None
            current = current or done.current
            if current and not done.more:
                return done
            announce(done)

    def run(self, stop: Event, every: float) -> None:
        """Seal every ``every`` seconds until ``stop`` is set, whatever happens; what is wrong is logged, once."""
        failed: dict[str, str] = {}
        pause = every
        while not stop.is_set():
            worst = every
            for table in self.tables:
                try:
                    done = self.seal(table, lambda _round: _stop_if(stop))
                except _StoppedError:
                    return
                except TracevaultError as error:
                    worst = max(worst, min(_LONGEST_PAUSE, max(2 * pause, 1.0)))
                    if failed.get(table) != str(error):
                        _log.error("table %s is not sealed: %s", table, error)
                    failed[table] = str(error)
                    if isinstance(error, DriverError):
                        self._disconnect()
                else:
                    if failed.pop(table, None) is not None and done is not None:
                        _log.info("table %s is sealed again", table)
            try:
                self.beat()
            except TracevaultError as error:
                _log.warning("what the anchors said could not be stored: %s", error)
            pause = worst
            stop.wait(pause)

    def sign(self, table: str) -> Note | None:
        """Sign the tree as it is committed, unless this sealer has; store the note, and tell ``publish``."""
        tree = self._tree(table)
        before = self._signed.get(table)
        if tree.size == 0 or (before is not None and _same(before, tree)):
            return None
        while True:
            try:
                note = self._note(tree)
                break
            except RollbackError:
                # Another sealer with this state may have signed more since we looked.
                now = self._tree(table)
                if now.size <= tree.size:
                    raise
                tree = now
        self._transaction(lambda: store_checkpoint(tree, str(note)))
        self._signed[table], self._signed_at[table] = tree, time.monotonic()
        self._publish(tree, note)
        return note

    def _publish(self, tree: Tree, note: Note) -> None:
        if self._publisher is not None:
            self._publisher.submit(note, StoredLog(self._log.tiles(tree.number), tree.size))
            self._published[tree.table] = (time.monotonic(), tree, note)

    def beat(self) -> None:
        """Tell the anchors of a log that has not grown for long, and store what they said since."""
        for at, tree, note in list(self._published.values()):
            if time.monotonic() - at >= self._heartbeat:
                self._publish(tree, note)
        if self._publisher is not None:
            outcomes = self._publisher.outcomes()
            if outcomes:
                self._transaction(lambda: store_outcomes(outcomes))

    def _note(self, tree: Tree) -> Note:
        checkpoint = Checkpoint(tree.origin, tree.size, tree.root)
        first = tree.table not in self._signed
        # What a restart could get wrong: the state is not the one of before, or an anchor knows more than the state.
        known = first and self._transaction(lambda: has_checkpoints(tree))
        newest = list(self._anchored(tree.origin)) if first else ()
        return self._signer.sign(checkpoint, self._log_of(tree).prove, newest, expect_state=known)

    def _anchored(self, origin: str) -> Iterator[Note]:
        """Yield the newest checkpoint of each anchor that can tell."""
        known = verifiers(self._signer.signers, origin)
        for anchor in self._publisher.anchors if self._publisher else ():
            try:
                note = anchor.newest(origin, known)
            except SealError as error:
                _log.warning("whether the log extends what an anchor holds is not known: %s", error)
            else:
                if note is not None:
                    yield note

    def _log_of(self, tree: Tree) -> StoredLog:
        return StoredLog(lambda tiles: self._transaction(lambda: read_tiles(tree.number, tiles)), tree.size)

    def _tree(self, table: str) -> Tree:
        tree = self._transaction(lambda: find_tree(table))
        if tree is None:
            raise SealError(f"table `{table}` has no tree")
        return tree

    def _prepare(self) -> None:
        """Make tables and trees that are missing; a role that may not is told who may."""
        if self._ready:
            return
        self._transaction(check_canary)
        if not self._transaction(tables_exist):
            try:
                self._transaction(make_tables)
            except (DriverError, SealError) as error:
                if not self._transaction(tables_exist):  # else another sealer was faster
                    raise SealError(
                        f"the tables that sealing needs are missing and cannot be made: {error}; run "
                        "`tracevault roles` as the owner of the audit tables"
                    ) from error
        for table in self.tables:
            if self._transaction(lambda table=table: find_tree(table)) is None:  # type: ignore[misc]
                origin = origin_of(self._signer.name, table, 1)
                self._transaction(lambda table=table, origin=origin: plant(table, origin))  # type: ignore[misc]
        self._ready = True

    def resume(self, table: str) -> None:
        """Go on with a tree whose database was restored or moved to another server: an operator's decision."""
        self._prepare()
        tree = self._tree(table)
        self._transaction(lambda: resume(tree))

    def new_epoch(self, table: str) -> Tree:
        """Begin the log of ``table`` anew, under the next origin, and keep the old one as evidence.

        An operator's decision after a rollback: whoever verifies has to be told of the new origin and its key.
        """
        self._prepare()
        tree = self._tree(table)
        origin = origin_of(self._signer.name, tree.name, tree.epoch + 1)
        self._transaction(lambda: plant(table, origin, name=tree.name, epoch=tree.epoch + 1))
        self._signed.pop(table, None)
        return self._tree(table)

    def verifier_keys(self, origin: str) -> list[str]:
        """Return what verifies checkpoints of ``origin`` that this sealer signs."""
        return [str(verifier) for verifier in verifiers(self._signer.signers, origin)]

    def adopt_state(self, table: str) -> None:
        """Begin the signer's state anew with the newest checkpoint in the database: an operator's decision.

        What anchors hold must be the beginning of it, else `RollbackError`.
        """
        self._prepare()
        tree = self._tree(table)
        checkpoint = Checkpoint(tree.origin, tree.size, tree.root)
        self._signer.adopt(checkpoint, self._log_of(tree).prove, list(self._anchored(tree.origin)))

    def estimate(self, table: str) -> int:
        """Return about how many rows the table holds, as PostgreSQL's statistics say."""
        self._prepare()
        return self._transaction(lambda: estimate(table))

    def _transaction(self, flow: Callable[[], Flow[T]], *, attempts: int = _ATTEMPTS) -> T:
        """Run a flow in a transaction of its own, anew where another sealer wrote the same at the same time."""
        while True:
            attempts -= 1
            try:
                connection = self._connected()
                with connection.transaction():
                    return run(connection, flow(), _SEALING)
            except psycopg.Error as error:
                raise from_psycopg(error, _SEALING) from None
            except DriverError as error:
                if error.sqlstate == _NO_RIGHT:
                    raise SealError(
                        f"the sealer's role lacks a right: {error.__cause__}; run `tracevault roles --sealer ROLE` as "
                        "the owner of the audit tables"
                    ) from error
                if error.sqlstate != _SERIALIZATION_FAILURE or not attempts:
                    raise

    def _connected(self) -> Connection[Any]:
        if self._connection is None or self._connection.closed:
            connection = self._connect()
            connection.autocommit = True
            connection.isolation_level = IsolationLevel.REPEATABLE_READ
            self._connection = connection
        return self._connection

    def close(self) -> None:
        """Let go of the connections."""
        self._disconnect()
        self._log.close()

    def _disconnect(self) -> None:
        """Let go of the connection; another one is made when it is needed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                connection.close()


def origin_of(key_name: str, tree: str, epoch: int) -> str:
    """Return the origin of a tree's checkpoints: ``<key name>/<tree>``, and ``/<epoch>`` from the second on."""
    return f"{key_name}/{tree}" if epoch == 1 else f"{key_name}/{tree}/{epoch}"


def _same(one: Tree, other: Tree) -> bool:
    return (one.origin, one.size, one.root) == (other.origin, other.size, other.root)


class _StoppedError(Exception):
    """Ends a backlog in between."""


def _stop_if(stop: Event) -> None:
    if stop.is_set():
        raise _StoppedError
