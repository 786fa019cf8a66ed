"""One file of the spool: async records that the operating system keeps until PostgreSQL has them.

A spool is a folder. Each process appends to a file of its own there, SQLite in WAL mode, and holds a lock beside
it; a file that nobody holds is an orphan, see ``adoption``. What is appended is with the operating system when
`SpoolFile.append` returns, so it survives the process; what is synced survives the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4
from weakref import WeakSet

from tracevault.errors import SpoolError
from tracevault.event.binary import decode_row
from tracevault.event.prepare import Prepared
from tracevault.event.record import INSERT_COLUMNS

_log = logging.getLogger("tracevault")
T = TypeVar("T")

FORMAT = "1"
SUFFIX, LOCK_SUFFIX, CORRUPT_SUFFIX, BALLAST_SUFFIX = ".spool", ".lock", ".corrupt", ".ballast"
_PAGE = 4096
# Freed when the disk is full: even to delete takes room. A delete of a batch writes a few pages.
_BALLAST_BYTES = 1 << 20
# The log is folded into the file when it has grown to this many bytes; and beyond so many, emits wait for it.
CHECKPOINT_BYTES = 4 << 20
_BLOCKING_CHECKPOINT_BYTES = 32 << 20
_GIVEN_ID, _GIVEN_TIME, _IN_DOUBT = 1, 2, 4

_SCHEMA = """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE lanes (id INTEGER PRIMARY KEY, scope TEXT NOT NULL, "table" TEXT NOT NULL, UNIQUE (scope, "table"));
    CREATE TABLE records (seq INTEGER PRIMARY KEY, lane INTEGER NOT NULL, flags INTEGER NOT NULL, row BLOB NOT NULL);
    CREATE TABLE dead (
        seq INTEGER PRIMARY KEY, lane INTEGER NOT NULL, flags INTEGER NOT NULL, row BLOB NOT NULL,
        sqlstate TEXT, message TEXT NOT NULL, died_at REAL NOT NULL
    );
"""
_APPEND = "INSERT INTO records VALUES (?, ?, ?, ?)"


class SpoolFullError(SpoolError):
    """The quota is reached, or the disk is full: nothing was kept."""


class Spooled(NamedTuple):
    """A record as it was read back."""

    seq: int
    prepared: Prepared
    encoded: bytes
    in_doubt: bool


class SpoolLane(NamedTuple):
    """The records of one scope and table in a file."""

    id: int
    scope: str
    table: str
    last: int
    """The highest sequence number that waits; 0 if none does."""


class SpoolFile:
    """One file, open and locked by this process. Safe from any thread; not to be used in a forked child."""

    def __init__(self, path: Path, lock: int, *, quota: int, target: str, create: bool) -> None:
        self.path = path
        self.quota = quota
        # Reentrant, since a signal handler may emit in the middle of an emit.
        self.mutex = RLock()
        self.depth = 0
        self.dead = 0
        self.fsync_seconds = 0.0
        self._lock_descriptor = lock
        self._lanes: dict[tuple[str, str], int] = {}
        self._sync_lock = RLock()
        self._appended = 0
        self._synced = 0
        self._closed = False
        self._wal: int | None = None
        self._db = self._checkpointer = _connect(path)
        try:
            if create:
                self._create(target)
            self._read_meta()
        except BaseException:
            self._db.close()
            raise
        self._checkpointer = _connect(path)
        _open_files.add(self)

    @classmethod
    def create(cls, folder: Path, *, quota: int, target: str) -> SpoolFile:
        """Make a file of this process's own in ``folder``."""
        while True:
            path = folder / f"{os.getpid()}-{uuid4().hex[:12]}{SUFFIX}"
            # Held before the file is there to be found, so that nobody takes it for an orphan.
            lock = acquire_lock(path.with_suffix(LOCK_SUFFIX))
            if lock is None:
                continue
            try:
                return cls(path, lock, quota=quota, target=target, create=True)
            except BaseException as error:
                os.close(lock)
                _remove(path)
                if isinstance(error, (sqlite3.Error, OSError)):
                    raise SpoolError(f"no spool file can be made in {str(folder)!r}: {error}") from None
                raise

    def _create(self, target: str) -> None:
        self.path.touch(0o600)
        self._db.execute(f"PRAGMA page_size = {_PAGE}")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.executescript(f"BEGIN; {_SCHEMA} COMMIT")
        meta = {"format": FORMAT, "columns": json.dumps(INSERT_COLUMNS), "target": target}
        self._db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # and with it the file is synced
        self._fill_ballast()
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read_meta(self) -> None:
        meta = dict(self._db.execute("SELECT key, value FROM meta"))
        if meta.get("format") != FORMAT:
            raise SpoolError(f"{str(self.path)!r} has format {meta.get('format')}, which this version cannot read")
        self.target: str = meta["target"]
        self._columns: tuple[str, ...] = tuple(json.loads(meta["columns"]))
        self._db.execute(f"PRAGMA max_page_count = {max(16, self.quota // _PAGE)}")
        self._lanes = {(scope, table): id_ for id_, scope, table in self._db.execute("SELECT * FROM lanes")}
        ((self.depth, last),) = self._db.execute("SELECT count(*), coalesce(max(seq), 0) FROM records")
        ((self.dead, last_dead),) = self._db.execute("SELECT count(*), coalesce(max(seq), 0) FROM dead")
        self._next = max(last, last_dead) + 1

    # -- called by emit ------------------------------------------------------------------------------------

    def append(
        self,
        scope: str,
        table: str,
        prepared: Prepared,
        encoded: bytes,
        *,
        in_doubt: bool = False,
        kept: Callable[[int], object] = lambda _seq: None,
    ) -> int:
        """Keep a record, and return a mark for `sync`. ``kept`` is called with its number, in order, and quickly."""
        flags = prepared.given_id * _GIVEN_ID | prepared.given_time * _GIVEN_TIME | in_doubt * _IN_DOUBT
        with self.mutex:
            self._check_open()
            lane = self._lanes.get((scope, table)) or self._add_lane(scope, table)
            seq = self._next
            try:
                self._db.execute(_APPEND, (seq, lane, flags, encoded))
            except sqlite3.Error as error:
                raise self._translated(error) from None
            self._next = seq + 1
            self.depth += 1
            self._appended += 1
            kept(seq)
            return self._appended

    def _add_lane(self, scope: str, table: str) -> int:
        try:
            cursor = self._db.execute('INSERT INTO lanes (scope, "table") VALUES (?, ?)', (scope, table))
        except sqlite3.Error as error:
            raise self._translated(error) from None
        assert cursor.lastrowid is not None
        self._lanes[scope, table] = cursor.lastrowid
        return cursor.lastrowid

    def _translated(self, error: sqlite3.Error) -> SpoolError:
        if _is_full(error):
            return SpoolFullError(f"the spool {str(self.path.parent)!r} is full (`spool_quota_bytes`, or the disk)")
        return SpoolError(f"the spool file {str(self.path)!r} cannot be written: {error}")

    def sync(self, mark: int) -> None:
        """Return when the record of ``mark`` is on the disk: it survives a loss of power. One sync serves many."""
        if self._synced >= mark:
            return
        with self._sync_lock:
            if self._synced >= mark:
                return
            covered = self._appended
            started = time.perf_counter()
            try:
                with self.mutex:
                    self._check_open()
                    if self._wal is None:
                        self._wal = os.open(f"{self.path}-wal", os.O_RDWR)
                os.fdatasync(self._wal)
            except OSError as error:
                raise SpoolError(f"the spool file {str(self.path)!r} cannot be synced: {error.strerror}") from None
            finally:
                self.fsync_seconds += time.perf_counter() - started
            self._synced = covered

    # -- called by the writer ------------------------------------------------------------------------------

    def lanes(self) -> list[SpoolLane]:
        """Return what waits in the file, by scope and table."""
        with self.mutex:
            last = dict(self._db.execute("SELECT lane, max(seq) FROM records GROUP BY lane"))
            return [SpoolLane(id_, scope, table, last.get(id_, 0)) for (scope, table), id_ in self._lanes.items()]

    def load(self, scope: str, table: str, after: int, most: int) -> list[Spooled]:
        """Return the first ``most`` records of a lane whose number is above ``after``."""
        with self.mutex:
            self._check_open()
            found = self._db.execute(
                "SELECT seq, flags, row FROM records WHERE lane = ? AND seq > ? ORDER BY seq LIMIT ?",
                (self._lanes.get((scope, table)), after, most),
            ).fetchall()
        return [Spooled(seq, self._prepared(flags, row), row, bool(flags & _IN_DOUBT)) for seq, flags, row in found]

    def _prepared(self, flags: int, encoded: bytes) -> Prepared:
        return prepared_from(flags, decode_row(encoded, self._columns))

    def delete(self, numbers: Sequence[int]) -> None:
        """Forget records that PostgreSQL has."""
        # Numbers with no gap between them: nobody else's record can stand among them.
        runs = [[numbers[0], numbers[0]]]
        for number in numbers[1:]:
            if number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])

        def work() -> int:
            return self._db.executemany("DELETE FROM records WHERE seq BETWEEN ? AND ?", runs).rowcount

        with self.mutex:
            self.depth -= self._write(work)

    def bury(self, number: int, sqlstate: str | None, message: str) -> None:
        """Make a record a dead letter."""

        def work() -> None:
            self._db.execute(
                "INSERT INTO dead SELECT seq, lane, flags, row, ?, ?, ? FROM records WHERE seq = ?",
                (sqlstate, message, time.time(), number),
            )
            self._db.execute("DELETE FROM records WHERE seq = ?", (number,))

        with self.mutex:
            self._write(work)
            self.depth -= 1
            self.dead += 1

    # -- upkeep --------------------------------------------------------------------------------------------

    def _write(self, work: Callable[[], T]) -> T:
        """Do ``work`` in one transaction; with the ballast thrown overboard if the disk is full."""
        self._check_open()
        for last in (False, True):
            try:
                with self._transaction():
                    return work()
            except sqlite3.Error as error:
                if last or not _is_full(error):
                    raise self._translated(error) from None
                self._ballast.unlink(missing_ok=True)
        raise AssertionError

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite has rolled back already after some errors
                self._db.execute("ROLLBACK")
            raise

    def upkeep(self) -> None:
        """Sync what is not, and fold the log into the file where it has grown. Called by one thread, at intervals."""
        if self._closed:
            return
        with contextlib.suppress(FileNotFoundError):
            size = os.stat(f"{self.path}-wal").st_size
            # Folded on a connection of its own, so that emits go on. SQLite begins the log anew only at a moment
            # when nothing is left in it, which under load never comes by itself.
            if size >= CHECKPOINT_BYTES and self._appended != self._folded:
                self._folded = self._appended
                self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                if size >= _BLOCKING_CHECKPOINT_BYTES:
                    with self.mutex:
                        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if self._synced < self._appended:
            self.sync(self._appended)
        if not self._ballast.exists():
            self._fill_ballast()

    _folded = 0

    @property
    def _ballast(self) -> Path:
        return self.path.with_suffix(BALLAST_SUFFIX)

    def _fill_ballast(self) -> None:
        try:
            with self._ballast.open("wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, _BALLAST_BYTES)
                else:
                    file.write(bytes(_BALLAST_BYTES))
        except OSError:
            self._ballast.unlink(missing_ok=True)

    @property
    def size(self) -> int:
        """Bytes on the disk, the ballast not counted."""
        paths = (str(self.path), f"{self.path}-wal")
        return sum(os.stat(path).st_size for path in paths if os.path.exists(path))

    def oldest(self) -> Prepared | None:
        """Return the record that waits longest."""
        with self.mutex:
            if self._closed:
                return None
            found = self._db.execute("SELECT flags, row FROM records ORDER BY seq LIMIT 1").fetchone()
        return None if found is None else self._prepared(*found)

    def _check_open(self) -> None:
        if self._closed:
            raise SpoolError(f"the spool file {str(self.path)!r} is closed")

    def close(self) -> None:
        """Let go of the file; one with nothing left in it is removed."""
        with self._sync_lock, self.mutex:
            if self._closed:
                return
            self._closed = True
            _open_files.discard(self)
            if self._wal is not None:
                with contextlib.suppress(OSError):
                    os.fdatasync(self._wal)
                os.close(self._wal)
            for connection in (self._checkpointer, self._db):
                with contextlib.suppress(sqlite3.Error):
                    connection.close()
            if not self.depth and not self.dead:
                _remove(self.path)
            os.close(self._lock_descriptor)

    def quarantine(self) -> Path:
        """Set a broken file aside, and return its new path. What could be read of it was taken before."""
        self.depth = self.dead = 1  # so that `close` keeps it
        self.close()
        aside = self.path.with_suffix(CORRUPT_SUFFIX)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
        _remove(self.path)
        return aside

    def abandon_in_child(self) -> None:
        """Leave the parent's file alone for ever: neither close nor collect its connections, keep no lock on it."""
        self._closed = True
        # Closed by the file's number alone: unlocking would release the parent's lock, which both share.
        os.close(self._lock_descriptor)
        for connection in (self._db, self._checkpointer):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def prepared_from(flags: int, row: tuple[Any, ...]) -> Prepared:
    """Return the record of a row that was read back, with its flags."""
    mode = row[INSERT_COLUMNS.index("mode")]
    return Prepared(row[0], mode, row, bool(flags & _GIVEN_ID), bool(flags & _GIVEN_TIME))


def acquire_lock(path: Path) -> int | None:
    """Return a descriptor that holds the lock of ``path``, or None if another process does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        # Its last holder may have removed it between our two calls; then we hold a lock that nobody else sees.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a spool file and all that belongs to it, the lock last."""
    for name in (f"{path}-wal", f"{path}-shm", path, path.with_suffix(BALLAST_SUFFIX), path.with_suffix(LOCK_SUFFIX)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=16)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    return connection


def _is_full(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def is_corrupt(error: BaseException) -> bool:
    """Whether SQLite says that the file itself is broken."""
    code: Any = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


# -- forks -------------------------------------------------------------------------------------------------

_open_files: WeakSet[SpoolFile] = WeakSet()
_held: list[SpoolFile] = []


def _before_fork() -> None:
    # Nobody may be inside SQLite when memory is copied: its own locks would stay taken in the child.
    _held[:] = sorted(_open_files, key=id)
    for file in _held:
        file._sync_lock.acquire()
        file.mutex.acquire()


def _after_in_parent() -> None:
    for file in reversed(_held):
        file.mutex.release()
        file._sync_lock.release()
    _held.clear()


def abandon_all() -> None:
    """In a forked child: leave the files of the parent alone."""
    for file in list(_open_files):
        _open_files.discard(file)
        file.abandon_in_child()
    _held.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=abandon_all)
