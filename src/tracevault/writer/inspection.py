"""A spool as an operator sees it: its files, and the dead letters in them, also while processes hold the files."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from tracevault.config import Config
from tracevault.errors import SpoolError
from tracevault.events.binary import decode_row, encode_row
from tracevault.events.ids import uuid7
from tracevault.events.payload import Encoder
from tracevault.events.prepare import Prepared, Settings, prepare
from tracevault.events.record import INSERT_COLUMNS, Actor, Target
from tracevault.writer import dead
from tracevault.writer.adoption import is_barely_begun
from tracevault.writer.dead import Letter
from tracevault.writer.spool import (
    CORRUPT_SUFFIX,
    SUFFIX,
    Found,
    NoHeaderError,
    Spooled,
    SpoolFile,
    flags_of,
    is_held,
    read_records,
    scan,
)

_OCCURRED_AT = INSERT_COLUMNS.index("occurred_at")
DROPPED = "tracevault.dead_letter.dropped"
_NOTE_SUFFIX = ".drop"


class FileStatus(NamedTuple):
    """What is in one file."""

    name: str
    held: bool
    """Whether a living process holds it; else it is an orphan."""
    pid: int | None
    """Which one, if it is the process that made the file; one that took it over is not known."""
    target: str
    waiting: int
    dead: int
    """Dead letters, which are all in one file."""
    unreadable: int
    """Records that are damaged."""
    bytes: int
    oldest_seconds: float | None
    """How long ago the oldest record that waits was emitted; None if none does."""


class BrokenFile(NamedTuple):
    """A file that cannot be read, and why."""

    name: str
    held: bool
    pid: int | None
    bytes: int
    reason: str


def paths(folder: Path) -> list[Path]:
    """Return the spool files; `SpoolError` if there is no such folder."""
    if not folder.is_dir():
        raise SpoolError(f"there is no spool {str(folder)!r}")
    return sorted(folder.glob(f"*{SUFFIX}"))


def statuses(folder: Path) -> tuple[list[FileStatus], list[BrokenFile]]:
    """Return what is in each file, and the files that cannot be read; those set aside earlier are among them."""
    found, broken = [], []
    for path in paths(folder):
        try:
            # Without a file its owner has removed it meanwhile.
            with contextlib.suppress(FileNotFoundError):
                found += _status(path)
        except (SpoolError, OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            reason = str(error).removeprefix(f"{str(path)!r} ") if isinstance(error, SpoolError) else repr(error)
            broken.append(_broken(path, reason))
    aside = sorted(folder.glob(f"*{CORRUPT_SUFFIX}"))
    broken += [_broken(path, "set aside, since it was damaged") for path in aside]
    refused: list[Letter] = []
    try:
        refused, damaged = dead.look(folder)
        if damaged:
            broken.append(_broken(folder / dead.FILE_NAME, "some of it is damaged"))
    except SpoolError as error:
        broken.append(_broken(folder / dead.FILE_NAME, str(error)))
    if refused:
        targets = ", ".join(sorted({letter.target for letter in refused}))
        oldest = time.time() - refused[0].prepared.row[_OCCURRED_AT].timestamp()
        size = (folder / dead.FILE_NAME).stat().st_size
        found.append(FileStatus(dead.FILE_NAME, False, None, targets, 0, len(refused), 0, size, oldest))
    return found, broken


class Kept(NamedTuple):
    """What a spool keeps of one actor or target: records that wait, and dead letters."""

    waiting: int
    letters: list[Letter]


def kept_of(folder: Path, subject: Actor | Target) -> Kept:
    """Return what the spool keeps of ``subject``. `SpoolError` for a file that cannot be read: it may keep more."""
    side = "actor" if isinstance(subject, Actor) else "target"
    id_, type_ = INSERT_COLUMNS.index(f"{side}_id"), INSERT_COLUMNS.index(f"{side}_type")

    def concerns(row: Sequence[object]) -> bool:
        return (row[id_], row[type_]) == (subject.id, subject.type)

    waiting = 0
    for path in paths(folder):
        with contextlib.suppress(FileNotFoundError):  # delivered meanwhile
            waiting += sum(concerns(decode_row(record.encoded)) for record in _records(path))
    refused, damaged = dead.look(folder)
    if damaged or list(folder.glob(f"*{CORRUPT_SUFFIX}")):
        raise SpoolError(f"some of the spool {str(folder)!r} is damaged; see `tracevault spool status`")
    return Kept(waiting, [letter for letter in refused if concerns(letter.prepared.row)])


def _records(path: Path) -> list[Spooled]:
    with _scanned(path) as (descriptor, found):
        if found is None:
            return []
        if found.unreadable:
            raise SpoolError(f"records in {str(path)!r} are damaged; see `tracevault spool status`")
        return list(read_records(descriptor, found))


@contextlib.contextmanager
def _scanned(path: Path) -> Iterator[tuple[int, Found | None]]:
    """Open a spool file and say what is in it: None if it is barely begun."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            found = scan(path, descriptor)
        except NoHeaderError:
            if not is_barely_begun(path):
                raise
            found = None
        yield descriptor, found
    finally:
        os.close(descriptor)


def _broken(path: Path, reason: str) -> BrokenFile:
    held, size = is_held(path), 0
    with contextlib.suppress(OSError):
        size = path.stat().st_size
    return BrokenFile(path.name, held, _maker(path) if held else None, size, reason)


def letters(folder: Path) -> list[Letter]:
    """Return the dead letters, the oldest first."""
    paths(folder)
    return dead.letters(folder)


def requeue(folder: Path, chosen: Iterable[Letter]) -> None:
    """Have dead letters wait again, in new files that a vault adopts."""
    _move(folder, chosen, lambda letter: (letter.prepared, True))


def drop(folder: Path, chosen: Iterable[Letter], reason: str) -> None:
    """Discard dead letters; for each an event that says so is appended to the spool first.

    After a crash in between, a repeated drop says the same once more, under the same id: it is stored once.
    """

    def audit(letter: Letter) -> tuple[Prepared, bool]:
        note = _noted(folder, letter, reason)
        data = {"id": letter.id, "event": letter.event, "table": letter.table}
        fields = {
            "data": {**data, "sqlstate": letter.sqlstate, "reason": note["reason"]},
            "actor": {"id": note["operator"], "type": "operator"},
            "id": note["id"],
            "occurred_at": note["occurred_at"],
        }
        prepared = prepare(DROPPED, fields, Settings(Encoder(frozenset(), "", Config.max_event_bytes), None, "async"))
        # An id of our own making: where it is taken, it is by the same event.
        return prepared._replace(given_id=False, given_time=False), True

    _move(folder, chosen, audit)
    kept = {_note_path(folder, letter) for letter in dead.letters(folder)}
    for note in set(folder.glob(f"*{_NOTE_SUFFIX}")) - kept:
        note.unlink(missing_ok=True)


def _note_path(folder: Path, letter: Letter) -> Path:
    return folder / f"{letter.id}{_NOTE_SUFFIX}"


def _noted(folder: Path, letter: Letter, reason: str) -> dict[str, str]:
    """Return what the event of a dropped letter says: what was noted by the first who tried, or now."""
    path = _note_path(folder, letter)
    made = path.with_name(f"{path.name}-{os.getpid()}")
    note = {
        "id": str(uuid7()),
        "occurred_at": datetime.now(UTC).isoformat(),
        "operator": _operator(),
        "reason": reason,
    }
    try:
        with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            json.dump(note, file)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(made, path)
        noted: dict[str, str] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SpoolError(f"{str(path)!r} cannot be used: {error}") from None
    finally:
        made.unlink(missing_ok=True)
    return noted


def _operator() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user of a container without a name
        return f"uid {os.getuid()}"


def _move(folder: Path, chosen: Iterable[Letter], made: Callable[[Letter], tuple[Prepared, bool]]) -> None:
    files: dict[str, SpoolFile] = {}
    try:
        for letter in chosen:
            if letter.target not in files:
                files[letter.target] = SpoolFile.create(folder, target=letter.target)
            prepared, in_doubt = made(letter)
            file, encoded, flags = files[letter.target], encode_row(prepared.row), flags_of(prepared)
            # On the disk before it is discarded: after a crash it is in both, which its id makes harmless.
            file.sync(file.append(letter.scope, letter.table, encoded, flags, in_doubt=in_doubt))
            dead.discard(folder, [letter.id])
    finally:
        for file in files.values():
            file.close()


def _status(path: Path) -> list[FileStatus]:
    held = is_held(path)
    with _scanned(path) as (descriptor, found):
        if found is None:
            return []
        size = os.fstat(descriptor).st_size
        first = next(read_records(descriptor, found), None)
    oldest = None if first is None else time.time() - first.occurred_at.timestamp()
    pid = _maker(path) if held else None
    return [FileStatus(path.name, held, pid, found.target, len(found.left), 0, found.unreadable, size, oldest)]


def _maker(path: Path) -> int | None:
    """Return the process that made the file, as its name says, if it lives."""
    number = path.name.partition("-")[0]
    if not number.isdecimal():
        return None
    try:
        os.kill(int(number), 0)
    except PermissionError:
        pass  # it lives, and is another user's
    except (OSError, OverflowError):
        return None
    return int(number)
