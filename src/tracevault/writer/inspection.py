"""A spool as an operator sees it: its files, and the dead letters in them, also while processes hold the files."""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from tracevault.config import Config
from tracevault.errors import SpoolError
from tracevault.event.binary import encode_row
from tracevault.event.payload import Encoder
from tracevault.event.prepare import Prepared, Settings, prepare
from tracevault.event.record import INSERT_COLUMNS
from tracevault.writer import dead
from tracevault.writer.dead import Letter
from tracevault.writer.spool import SUFFIX, SpoolFile, flags_of, is_held, read_records, scan

_OCCURRED_AT = INSERT_COLUMNS.index("occurred_at")
DROPPED = "tracevault.dead_letter.dropped"


class FileStatus(NamedTuple):
    """What is in one file."""

    name: str
    held: bool
    """Whether a living process holds it; else it is an orphan."""
    target: str
    waiting: int
    dead: int
    """Dead letters, which are all in one file."""
    unreadable: int
    """Records that are damaged."""
    bytes: int
    oldest_seconds: float | None
    """How long ago the oldest record that waits was emitted; None if none does."""


def paths(folder: Path) -> list[Path]:
    """Return the spool files; `SpoolError` if there is no such folder."""
    if not folder.is_dir():
        raise SpoolError(f"there is no spool {str(folder)!r}")
    return sorted(folder.glob(f"*{SUFFIX}"))


def statuses(folder: Path) -> list[FileStatus]:
    """Return what is in each file."""
    found = [status for path in paths(folder) if (status := _status(path)) is not None]
    refused = dead.letters(folder)
    if refused:
        targets = ", ".join(sorted({letter.target for letter in refused}))
        oldest = time.time() - refused[0].prepared.row[_OCCURRED_AT].timestamp()
        size = (folder / dead.FILE_NAME).stat().st_size
        found.append(FileStatus(dead.FILE_NAME, False, targets, 0, len(refused), 0, size, oldest))
    return found


def letters(folder: Path) -> list[Letter]:
    """Return the dead letters, the oldest first."""
    paths(folder)
    return dead.letters(folder)


def requeue(folder: Path, chosen: Iterable[Letter]) -> None:
    """Have dead letters wait again, in new files that a vault adopts."""
    _move(folder, chosen, lambda letter: (letter.prepared, True))


def drop(folder: Path, chosen: Iterable[Letter], reason: str) -> None:
    """Discard dead letters; for each an event that says so is appended to the spool first."""

    def audit(letter: Letter) -> tuple[Prepared, bool]:
        data = {"id": letter.id, "event": letter.event, "table": letter.table}
        fields = {
            "data": {**data, "sqlstate": letter.sqlstate, "reason": reason},
            "actor": {"id": _operator(), "type": "operator"},
        }
        prepared = prepare(DROPPED, fields, Settings(Encoder(frozenset(), "", Config.max_event_bytes), None, "async"))
        return prepared, False

    _move(folder, chosen, audit)


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


def _status(path: Path) -> FileStatus | None:
    held = is_held(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # its owner has removed it meanwhile
        return None
    except OSError as error:
        raise SpoolError(f"the spool file {str(path)!r} cannot be read: {error.strerror}") from None
    try:
        found, size = scan(path, descriptor), os.fstat(descriptor).st_size
        first = next(read_records(descriptor, found), None)
    finally:
        os.close(descriptor)
    oldest = None if first is None else time.time() - first.occurred_at.timestamp()
    return FileStatus(path.name, held, found.target, len(found.left), 0, found.unreadable, size, oldest)
