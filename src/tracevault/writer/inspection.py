"""A spool as an operator sees it: its files, and the dead letters in them, also while processes hold the files."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from tracevault.config import Config
from tracevault.errors import SpoolError
from tracevault.event.binary import decode_row, encode_row
from tracevault.event.payload import Encoder
from tracevault.event.prepare import Prepared, Settings, prepare
from tracevault.event.record import INSERT_COLUMNS
from tracevault.writer.spool import FORMAT, LOCK_SUFFIX, SUFFIX, SpoolFile, prepared_from

DROPPED = "tracevault.dead_letter.dropped"
# Seconds to wait for whoever writes in a file at the same moment.
_BUSY_TIMEOUT = 10.0
_EVENT, _OCCURRED_AT = INSERT_COLUMNS.index("event"), INSERT_COLUMNS.index("occurred_at")


class FileStatus(NamedTuple):
    """What is in one file."""

    name: str
    held: bool
    """Whether a living process holds it; else it is an orphan."""
    target: str
    waiting: int
    dead: int
    bytes: int
    oldest_seconds: float | None


class Letter(NamedTuple):
    """A dead letter, and the file that it is in."""

    path: Path
    seq: int
    target: str
    scope: str
    table: str
    prepared: Prepared
    encoded: bytes
    sqlstate: str | None
    message: str
    died_at: float

    @property
    def id(self) -> str:
        """The id of the record."""
        return str(self.prepared.id)

    @property
    def event(self) -> str:
        """The name of the event."""
        return str(self.prepared.row[_EVENT])


def paths(folder: Path) -> list[Path]:
    """Return the spool files; `SpoolError` if there is no such folder."""
    if not folder.is_dir():
        raise SpoolError(f"there is no spool {str(folder)!r}")
    return sorted(folder.glob(f"*{SUFFIX}"))


def statuses(folder: Path) -> list[FileStatus]:
    """Return what is in each file."""
    return [status for path in paths(folder) if (status := _status(path)) is not None]


def letters(folder: Path) -> list[Letter]:
    """Return the dead letters of all files, the oldest first."""
    found = [letter for path in paths(folder) for letter in _letters(path)]
    return sorted(found, key=lambda letter: letter.died_at)


def requeue(folder: Path, chosen: Iterable[Letter], quota: int = Config.spool_quota_bytes) -> None:
    """Have dead letters wait again, in new files that a vault adopts."""
    _move(folder, chosen, quota, lambda letter: (letter.prepared, letter.encoded, True))


def drop(folder: Path, chosen: Iterable[Letter], reason: str, quota: int = Config.spool_quota_bytes) -> None:
    """Discard dead letters; for each an event that says so is appended to the spool first."""

    def audit(letter: Letter) -> tuple[Prepared, bytes, bool]:
        data = {"id": letter.id, "event": letter.event, "table": letter.table}
        fields = {
            "data": {**data, "sqlstate": letter.sqlstate, "reason": reason},
            "actor": {"id": _operator(), "type": "operator"},
        }
        prepared = prepare(DROPPED, fields, Settings(Encoder(frozenset(), "", Config.max_event_bytes), None, "async"))
        return prepared, encode_row(prepared.row), False

    _move(folder, chosen, quota, audit)


def _operator() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user of a container without a name
        return f"uid {os.getuid()}"


def _move(
    folder: Path, chosen: Iterable[Letter], quota: int, made: Callable[[Letter], tuple[Prepared, bytes, bool]]
) -> None:
    files: dict[str, SpoolFile] = {}
    try:
        for letter in chosen:
            if letter.target not in files:
                files[letter.target] = SpoolFile.create(folder, quota=quota, target=letter.target)
            prepared, encoded, in_doubt = made(letter)
            file = files[letter.target]
            # On the disk before it is deleted where it was: after a crash it is in both, which its id makes harmless.
            file.sync(file.append(letter.scope, letter.table, prepared, encoded, in_doubt=in_doubt))
            with _open(letter.path, "rw") as database:
                database.execute("DELETE FROM dead WHERE seq = ?", (letter.seq,))
    finally:
        for file in files.values():
            file.close()


def _status(path: Path) -> FileStatus | None:
    held = is_held(path)
    with contextlib.suppress(FileNotFoundError), _open(path, "ro") as database:
        meta = _meta(path, database)
        ((waiting,),) = database.execute("SELECT count(*) FROM records")
        ((dead,),) = database.execute("SELECT count(*) FROM dead")
        first = database.execute("SELECT row FROM records ORDER BY seq LIMIT 1").fetchone()
        oldest = None
        if first is not None:
            oldest = time.time() - decode_row(first[0], json.loads(meta["columns"]))[_OCCURRED_AT].timestamp()
        size = sum(os.stat(name).st_size for name in (str(path), f"{path}-wal") if os.path.exists(name))
        return FileStatus(path.name, held, meta["target"], waiting, dead, size, oldest)
    return None


def _letters(path: Path) -> list[Letter]:
    with contextlib.suppress(FileNotFoundError), _open(path, "ro") as database:
        meta = _meta(path, database)
        columns = json.loads(meta["columns"])
        found = database.execute(
            'SELECT seq, scope, "table", flags, row, sqlstate, message, died_at '
            "FROM dead JOIN lanes ON lanes.id = lane ORDER BY seq"
        ).fetchall()
        letters = []
        for seq, scope, table, flags, encoded, *why in found:
            row = decode_row(encoded, columns)
            prepared = prepared_from(flags, row)
            letters.append(Letter(path, seq, meta["target"], scope, table, prepared, encode_row(row), *why))
        return letters
    return []


def _meta(path: Path, database: sqlite3.Connection) -> dict[str, str]:
    meta: dict[str, str] = dict(database.execute("SELECT key, value FROM meta").fetchall())
    if meta.get("format") != FORMAT:
        raise SpoolError(f"{str(path)!r} has format {meta.get('format')}, which this version cannot read")
    return meta


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


@contextlib.contextmanager
def _open(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """Yield a second connection to a file; `FileNotFoundError` if its owner has removed it."""
    try:
        database = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode={mode}", uri=True, timeout=_BUSY_TIMEOUT, isolation_level=None
        )
        with contextlib.closing(database):
            yield database
    except sqlite3.Error as error:
        if not path.exists():
            raise FileNotFoundError(path) from None
        raise SpoolError(f"the spool file {str(path)!r} cannot be used: {error}") from None
