"""One file of the spool: async records that the operating system keeps until PostgreSQL has them.

A spool is a folder. Each process appends to a file of its own there, and holds a lock beside it; a file that
nobody holds is an orphan, see ``adoption``. What is appended is with the operating system when `SpoolFile.append`
returns, so it survives the process; what is synced survives the machine.

A file is only ever appended to: with records, and with notes of which of them are delivered. Once it has grown to
some size the process begins another one, and a file with nothing left in it is removed; see ``upkeep``. The bodies
of its frames begin with a letter:

====== ================================================================================================
``H``  JSON: the format, the columns of the rows, the database they wait for, and the numbers of scopes
       and tables. Repeated, so that no single damage makes a file unreadable.
``R``  a record: its number, its scope and table's number, flags, and the row as in ``event.binary``
``D``  delivered: pairs of numbers, the first and the last of a run of records
====== ================================================================================================
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from struct import Struct
from threading import RLock
from typing import Any, NamedTuple
from uuid import uuid4
from weakref import WeakSet

from tracevault.errors import SpoolError
from tracevault.events.binary import decode_row, encode_row
from tracevault.events.prepare import Prepared
from tracevault.events.record import INSERT_COLUMNS
from tracevault.writer.frames import begins_frame, frame, read_frames, write_all

_log = logging.getLogger("tracevault")

FORMAT = 1
SUFFIX, LOCK_SUFFIX, CORRUPT_SUFFIX = ".spool", ".lock", ".corrupt"
_RECORD = Struct("!cQHB")
_RUN = Struct("!QQ")
GIVEN_ID, _GIVEN_TIME, _IN_DOUBT = 1, 2, 4
# Bytes after which the header is repeated at first and later, and which are read for a lane in one go.
_FIRST_HEADER, _HEADER_EVERY = 1 << 13, 1 << 20
_LOAD_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class SpoolFullError(SpoolError):
    """The quota is reached, or the disk is full: nothing was kept."""


class RetiredError(SpoolError):
    """The process has begun another file: append there."""


class Spooled(NamedTuple):
    """A record as it was read back."""

    seq: int
    scope: str
    table: str
    encoded: bytes
    flags: int
    in_doubt: bool

    @property
    def occurred_at(self) -> datetime:
        """When it occurred."""
        return decode_row(self.encoded)[_OCCURRED_AT]  # type: ignore[no-any-return]


class Found(NamedTuple):
    """What a file says when it is read from end to end."""

    columns: tuple[str, ...]
    target: str
    lanes: dict[int, tuple[str, str]]
    last: int
    """The highest number of a record."""
    left: list[tuple[int, int, int]]
    """Of each record that is not known to be delivered: its number, its lane's, and its place."""
    unreadable: int
    """Records that are neither delivered nor readable."""
    torn: int
    """Bytes at the end that are no whole frame, nor the beginning of one: its writer died over that."""
    pieces: frozenset[int]
    """Where bytes stand that are no whole frame."""


class SpoolFile:
    """One file, open and locked by this process. Safe from any thread; not to be used in a forked child."""

    def __init__(self, path: Path, lock: int, descriptor: int, *, target: str, mine: bool) -> None:
        self.path = path
        self.target = target
        self.mine = mine
        """Whether this process has made it."""
        # Reentrant, since a signal handler may emit in the middle of an emit.
        self.mutex = RLock()
        self.size = 0
        self.limit = 1 << 62
        """Bytes up to which records are appended."""
        self.depth = 0
        self.damaged = False
        self._pieces: frozenset[int] = frozenset()
        self.unreadable = self.torn = 0
        """Of an orphan: records that cannot be read, and bytes at its end that are no whole frame."""
        self.distrusted = False
        """Whether a sync has failed: what it was to write is lost, perhaps, though later ones succeed."""
        self.copied = False
        """Whether records of it may stand in another file as well."""
        self.fsync_seconds = 0.0
        self._lock_descriptor = lock
        self._descriptor = descriptor
        self._columns: tuple[str, ...] = INSERT_COLUMNS
        self._lanes: dict[tuple[str, str], int] = {}
        self._names: dict[int, tuple[str, str]] = {}
        # Where to go on reading for lanes that have records on the disk alone; of an orphan, which ones to pass over.
        self._unread: dict[int, int] = {}
        self._delivered = b""
        self._unsaid: list[tuple[int, int]] = []
        self._header_at = 0
        self._next = 1
        self._sync_lock = RLock()
        self._appended = 0
        self._synced = 0
        self._listed = False
        self._retired = False
        self._closed = False
        self._pid = os.getpid()
        _open_files.add(self)

    @classmethod
    def create(cls, folder: Path, *, target: str) -> SpoolFile:
        """Make a file of this process's own in ``folder``."""
        abandon_inherited()
        while True:
            path = folder / f"{os.getpid()}-{uuid4().hex[:12]}{SUFFIX}"
            lock = None
            try:
                # Held before the file is there to be found, so that nobody takes it for an orphan.
                lock = acquire_lock(path.with_suffix(LOCK_SUFFIX))
                if lock is None:
                    continue
                descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if lock is not None:
                    _remove(path)
                    os.close(lock)
                kind = SpoolFullError if error.errno in _FULL else SpoolError
                raise kind(f"no spool file can be made in {str(folder)!r}: {error.strerror}") from None
            file = cls(path, lock, descriptor, target=target, mine=True)
            try:
                file._write_header()
            except SpoolError:
                file.close()
                raise
            return file

    @classmethod
    def take_over(cls, path: Path, lock: int) -> SpoolFile:
        """Open the file of a process that is gone; raises what `scan` does."""
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            found = scan(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        file = cls(path, lock, descriptor, target=found.target, mine=False)
        file.size = os.fstat(descriptor).st_size
        file.unreadable, file.torn, file._pieces = found.unreadable, found.torn, found.pieces
        file.damaged = bool(found.unreadable or found.torn)
        file._retired = True
        file._columns, file._names = found.columns, found.lanes
        file._lanes = {names: number for number, names in found.lanes.items()}
        file._next, file.depth = found.last + 1, len(found.left)
        file._read_again(found)
        return file

    def _read_again(self, found: Found) -> None:
        delivered = bytearray(b"\1" * (found.last + 1))
        for seq, lane, at in found.left:
            delivered[seq] = 0
            self._unread.setdefault(lane, at)
        self._delivered = bytes(delivered)

    # -- called by emit ------------------------------------------------------------------------------------

    def append(
        self,
        scope: str,
        table: str,
        encoded: bytes,
        flags: int,
        *,
        in_doubt: bool = False,
        kept: Callable[[int], bool] = lambda _seq: True,
    ) -> int:
        """Keep a record, the row as bytes and its `flags_of`, and return a mark for `sync`.

        ``kept`` is called with its number, in order, and quickly; it says whether the record is in memory as well,
        so that nobody has to `load` it.
        """
        flags |= in_doubt * _IN_DOUBT
        with self.mutex:
            if self._retired or self._closed:
                raise RetiredError(f"the spool file {str(self.path)!r} is closed")
            lane = self._lanes.get((scope, table)) or self._add_lane(scope, table)
            # At first after as much as stands before it: two headers side by side would be spoiled together.
            if self.size - self._header_at > min(self._header_at + _FIRST_HEADER, _HEADER_EVERY):
                self._write_header()
            seq, at = self._next, self.size
            data = frame(_RECORD.pack(b"R", seq, lane, flags) + encoded)
            if at + len(data) > self.limit:
                raise self._full()
            self._write(data)
            self._next = seq + 1
            self.depth += 1
            self._appended += 1
            if not kept(seq):
                self._unread.setdefault(lane, at)
            return self._appended

    def _add_lane(self, scope: str, table: str) -> int:
        number = len(self._lanes) + 1
        self._lanes[scope, table], self._names[number] = number, (scope, table)
        try:
            self._write_header()
        except SpoolError:
            del self._lanes[scope, table], self._names[number]
            raise
        return number

    def _write_header(self) -> None:
        header = {
            "format": FORMAT,
            "columns": self._columns,
            "target": self.target,
            "lanes": [[number, *names] for number, names in self._names.items()],
        }
        at = self.size
        self._write(frame(b"H" + json.dumps(header).encode()))
        self._header_at = at

    def _write(self, data: bytes) -> None:
        """Append ``data`` as a whole, or nothing of it."""
        try:
            write_all(self._descriptor, data)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.size)
            self.size = os.fstat(self._descriptor).st_size  # a piece that stays is passed over by readers
            if error.errno in _FULL:
                raise self._full() from None
            raise SpoolError(f"the spool file {str(self.path)!r} cannot be written: {error.strerror}") from None
        self.size += len(data)

    def _full(self) -> SpoolFullError:
        return SpoolFullError(f"the spool {str(self.path.parent)!r} is full (`spool_quota_bytes`, or the disk)")

    @property
    def unsynced(self) -> int:
        """The mark of what was appended and is not synced; 0 if all is."""
        return self._appended if self._synced < self._appended else 0

    def sync(self, mark: int) -> None:
        """Return when the record of ``mark`` is on the disk: it survives a loss of power. One sync serves many.

        After an error nothing that is in the file counts as synced any more, whatever a later sync says.
        """
        if self._synced >= mark:
            return
        with self._sync_lock:
            if self._synced >= mark:
                return
            if self._closed:
                raise RetiredError(f"the spool file {str(self.path)!r} is closed")
            if self.distrusted:
                raise SpoolError(f"the spool file {str(self.path)!r} could not be synced, and is trusted no more")
            covered = self._appended
            started = time.perf_counter()
            try:
                os.fdatasync(self._descriptor)
                if not self._listed:
                    _sync_folder(self.path.parent)
                    self._listed = True
            except OSError as error:
                self.distrusted = True
                raise SpoolError(f"the spool file {str(self.path)!r} cannot be synced: {error.strerror}") from None
            finally:
                self.fsync_seconds += time.perf_counter() - started
            self._synced = covered

    # -- called by the writer ------------------------------------------------------------------------------

    def lanes(self) -> list[tuple[str, str]]:
        """Return the scopes and tables with records that nobody has loaded."""
        with self.mutex:
            return [self._names[number] for number in self._unread]

    @property
    def last(self) -> int:
        """The highest number of a record; 0 if there is none."""
        return self._next - 1

    def load(self, scope: str, table: str, after: int, most: int) -> tuple[list[Spooled], int | None]:
        """Read on in a lane that has records on the disk alone: at most ``most`` above a number, perhaps none.

        Also return the number up to which there is none left, or None if there may be. One thread at a time may
        do so for a lane.
        """
        lane = self._lanes[scope, table]
        with self.mutex:
            if self._closed:
                raise RetiredError(f"the spool file {str(self.path)!r} is closed")
            start, end, last = self._unread.get(lane, self.size), self.size, self.last
        found: list[Spooled] = []
        at = start
        for place, following, body in read_frames(self._descriptor, start, end):
            if len(found) == most or place - start > _LOAD_BYTES:
                break
            at = following
            if body is None:
                # A piece that its writer left when it was killed is no damage: no `emit` had returned.
                self.damaged = self.damaged or place not in self._pieces
                continue
            if body.startswith(b"R"):
                _, seq, number, _ = _RECORD.unpack_from(body)
                if number == lane and seq > after and self._delivered[seq : seq + 1] != b"\1":
                    found.append(_spooled(body, self._columns, self._names))
        with self.mutex:
            if at < self.size:
                self._unread[lane] = at
            else:
                self._unread.pop(lane, None)
        return found, last if at >= end else None

    def first_unread(self) -> Iterator[Spooled]:
        """Return of each lane the first record that is on the disk alone."""
        with self.mutex:
            lanes = [] if self._closed else list(self._unread.items())
        for lane, start in lanes:
            for _, _, body in read_frames(self._descriptor, start, self.size):
                if body is not None and body.startswith(b"R") and _RECORD.unpack_from(body)[2] == lane:
                    yield _spooled(body, self._columns, self._names)
                    break

    def left(self) -> list[Spooled]:
        """Read back everything that is not delivered, so that `load` may do it again; the file must be retired."""
        with self.mutex:
            found = scan(self.path, self._descriptor)
            unsaid = _numbers(self._unsaid)
            found = found._replace(left=[place for place in found.left if place[0] not in unsaid])
            self._unread.clear()
            self._read_again(found)
            return list(read_records(self._descriptor, found))

    def delete(self, numbers: Sequence[int]) -> None:
        """Note that PostgreSQL has these records, in ascending order; never fails for want of room."""
        runs = [(numbers[0], numbers[0])]
        for number in numbers[1:]:
            if number == runs[-1][1] + 1:
                runs[-1] = (runs[-1][0], number)
            else:
                runs.append((number, number))
        with self.mutex:
            if self._closed:
                raise RetiredError(f"the spool file {str(self.path)!r} is closed")
            self.depth -= len(numbers)
            self._unsaid += runs
            if self.depth or not self._retired:  # else the file is removed at once
                self._say_delivered()

    def _say_delivered(self) -> None:
        body = b"D" + b"".join(_RUN.pack(*run) for run in self._unsaid)
        # Where it cannot be said, whoever reads the file next sends the records again, and finds them present.
        with contextlib.suppress(SpoolError):
            self._write(frame(body))
            self._unsaid = []

    # -- its end -------------------------------------------------------------------------------------------

    def retire(self) -> None:
        """Append no more records."""
        with self.mutex:
            self._retired = True

    def close(self) -> None:
        """Let go of the file; one with nothing left in it is removed, or set aside if it was damaged."""
        with self._sync_lock, self.mutex:
            if self._closed:
                return
            self._closed = True
            _open_files.discard(self)
            if self.depth:
                if self._unsaid:
                    self._say_delivered()
                with contextlib.suppress(OSError):
                    os.fdatasync(self._descriptor)
            elif self.damaged:
                set_aside(self.path)
            else:
                _remove(self.path)
            os.close(self._descriptor)
            os.close(self._lock_descriptor)

    def abandon_in_child(self) -> None:
        """Leave the parent's file alone for ever, and keep no lock on it."""
        self._closed = True
        # Closed by the file's number alone: unlocking would release the parent's lock, which both share.
        os.close(self._descriptor)
        os.close(self._lock_descriptor)


class NoHeaderError(SpoolError):
    """A file says nothing about itself."""


def scan(path: Path, descriptor: int) -> Found:
    """Read a file from end to end.

    Raises `NoHeaderError` if it is no spool file, `SpoolError` if it is one of a later version.
    """
    header: dict[str, Any] = {}
    lanes: dict[int, tuple[str, str]] = {}
    pieces: list[int] = []
    records: list[tuple[int, int, int]] = []
    runs: list[tuple[int, int]] = []
    size, whole = os.fstat(descriptor).st_size, 0
    for at, following, body in read_frames(descriptor, 0, size):
        if body is None:
            pieces.append(at)
            continue
        whole = following
        if body.startswith(b"R"):
            _, seq, lane, _ = _RECORD.unpack_from(body)
            records.append((seq, lane, at))
        elif body.startswith(b"D"):
            runs += _RUN.iter_unpack(body[1:])
        else:
            header = json.loads(body[1:])
            if header["format"] != FORMAT or not set(header["columns"]) <= set(INSERT_COLUMNS):
                raise SpoolError(f"{str(path)!r} was written by a later version, and this one cannot read it")
            lanes.update((number, (scope, table)) for number, scope, table in header["lanes"])
    if not header:
        raise NoHeaderError(f"{str(path)!r} is no spool file")
    delivered, read = _numbers(runs), {seq for seq, _, _ in records}
    last = max(read | delivered, default=0)
    return Found(
        columns=tuple(header["columns"]),
        target=header["target"],
        lanes=lanes,
        last=last,
        left=[record for record in records if record[0] not in delivered and record[1] in lanes],
        unreadable=last - len(read | delivered),
        torn=0 if begins_frame(descriptor, whole, size) else size - whole,
        pieces=frozenset(pieces),
    )


def read_records(descriptor: int, found: Found) -> Iterator[Spooled]:
    """Return the records that were found, and are not known to be delivered."""
    places = {at for _, _, at in found.left}
    if places:
        for at, _, body in read_frames(descriptor, min(places), os.fstat(descriptor).st_size):
            if at in places and body is not None:
                yield _spooled(body, found.columns, found.lanes)


def _spooled(body: bytes, columns: tuple[str, ...], names: dict[int, tuple[str, str]]) -> Spooled:
    _, seq, lane, flags = _RECORD.unpack_from(body)
    encoded = body[_RECORD.size :]
    if columns != INSERT_COLUMNS:
        encoded = encode_row(decode_row(encoded, columns))
    return Spooled(seq, *names[lane], encoded, flags & ~_IN_DOUBT, bool(flags & _IN_DOUBT))


def _numbers(runs: Sequence[tuple[int, int]]) -> set[int]:
    return {number for first, last in runs for number in range(first, last + 1)}


def flags_of(prepared: Prepared) -> int:
    """Return the flags that `prepared_from` takes."""
    return prepared.given_id * GIVEN_ID | prepared.given_time * _GIVEN_TIME


def prepared_from(flags: int, row: tuple[Any, ...]) -> Prepared:
    """Return the record of a row that was read back, with its flags."""
    return Prepared(row[_ID], row[_MODE], row, bool(flags & GIVEN_ID), bool(flags & _GIVEN_TIME))


_ID, _MODE, _OCCURRED_AT = map(INSERT_COLUMNS.index, ("id", "mode", "occurred_at"))


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


def is_held(path: Path) -> bool:
    """Whether a living process holds a file. Its lock is looked at, and never made."""
    try:
        descriptor = os.open(path.with_suffix(LOCK_SUFFIX), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def set_aside(path: Path) -> None:
    """Keep a file that is damaged, under a name that nobody looks for."""
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.with_suffix(CORRUPT_SUFFIX))
    path.with_suffix(LOCK_SUFFIX).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a spool file and its lock, the lock last."""
    path.unlink(missing_ok=True)
    path.with_suffix(LOCK_SUFFIX).unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# -- forks -------------------------------------------------------------------------------------------------

_open_files: WeakSet[SpoolFile] = WeakSet()


def abandon_inherited() -> None:
    """In a forked child: leave the files of the parent alone. Called again where a fork ran no hooks."""
    for file in list(_open_files):
        if file._pid != os.getpid():
            _open_files.discard(file)
            file.abandon_in_child()


os.register_at_fork(after_in_child=abandon_inherited)
