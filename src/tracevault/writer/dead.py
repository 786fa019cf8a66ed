"""Dead letters: records that the database refused, in one file of the spool's folder, until somebody decides.

Appended to by the processes that deliver, and by whoever discards; each opens the file for one act, under its lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tracevault.errors import SpoolError
from tracevault.events.binary import decode_row, encode_row
from tracevault.events.prepare import Prepared
from tracevault.events.record import INSERT_COLUMNS
from tracevault.writer.frames import frame, read_frames, write_all
from tracevault.writer.spool import CORRUPT_SUFFIX, flags_of, prepared_from

FILE_NAME = "dead-letters"
_EVENT = INSERT_COLUMNS.index("event")


class Letter(NamedTuple):
    """A dead letter."""

    target: str
    """The database that refused it."""
    scope: str
    table: str
    prepared: Prepared
    sqlstate: str | None
    message: str
    died_at: float
    """Seconds since 1970."""

    @property
    def id(self) -> str:
        """The id of the record."""
        return str(self.prepared.id)

    @property
    def event(self) -> str:
        """The name of the event."""
        return str(self.prepared.row[_EVENT])


def add(folder: Path, letter: Letter) -> None:
    """Keep a dead letter; it is on the disk when this returns."""
    about = {
        "columns": INSERT_COLUMNS,
        "flags": flags_of(letter.prepared),
        **{name: getattr(letter, name) for name in ("target", "scope", "table", "sqlstate", "message", "died_at")},
    }
    head = json.dumps(about).encode()
    body = b"L" + len(head).to_bytes(4) + head + encode_row(letter.prepared.row)
    with _locked(folder, create=True) as descriptor:
        _append(folder, descriptor, body)


def letters(folder: Path) -> list[Letter]:
    """Return the dead letters of a spool, the oldest first; one that was kept twice, once."""
    return look(folder)[0]


def look(folder: Path) -> tuple[list[Letter], bool]:
    """Return the dead letters like `letters`, and whether some of the file cannot be read."""
    with _locked(folder) as descriptor:
        found, damaged = ({}, False) if descriptor is None else _read(descriptor)
    return sorted(found.values(), key=lambda letter: letter.died_at), damaged


def discard(folder: Path, ids: Iterable[str]) -> None:
    """Forget dead letters; the file goes with the last of them, or is set aside if it was damaged."""
    with _locked(folder) as descriptor:
        if descriptor is None:
            return
        ids = list(ids)
        _append(folder, descriptor, b"G" + json.dumps(ids).encode())
        left, damaged = _read(descriptor)
        if not left:
            path = folder / FILE_NAME
            if damaged:
                path.rename(path.with_suffix(CORRUPT_SUFFIX))
            else:
                path.unlink()


def _read(descriptor: int) -> tuple[dict[str, Letter], bool]:
    found: dict[str, Letter] = {}
    damaged = False
    for _, _, body in read_frames(descriptor, 0, os.fstat(descriptor).st_size):
        if body is None:
            damaged = True
            continue
        if body.startswith(b"G"):
            for id_ in json.loads(body[1:]):
                found.pop(id_, None)
            continue
        end = 5 + int.from_bytes(body[1:5])
        about: dict[str, Any] = json.loads(body[5:end])
        row = decode_row(body[end:], about.pop("columns"))
        letter = Letter(prepared=prepared_from(about.pop("flags"), row), **about)
        found[letter.id] = letter
    return found, damaged


def _append(folder: Path, descriptor: int | None, body: bytes) -> None:
    assert descriptor is not None
    size = os.fstat(descriptor).st_size
    try:
        write_all(descriptor, frame(body))
        os.fsync(descriptor)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise SpoolError(f"{str(folder / FILE_NAME)!r} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _locked(folder: Path, *, create: bool = False) -> Iterator[int | None]:
    """Yield a descriptor of the file, with its lock; None if there is no such file."""
    path = folder / FILE_NAME
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            raise SpoolError(f"{str(path)!r} cannot be opened: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Whoever had the lock before may have removed the file.
            if not os.fstat(descriptor).st_nlink:
                continue
            yield descriptor
            return
        finally:
            os.close(descriptor)
