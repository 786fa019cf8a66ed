"""The anchor ``file:PATH``: a text file that grows by each checkpoint.

Before each signed note stands a line with the time at which it was appended::

    # 2026-11-25T03:04:05Z
    log.example.com/shop/audit_logs
    312
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

    — log.example.com/shop/audit_logs Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE

An empty line could not divide them, since notes hold one. A writer that finds the end torn, by a full disk or a loss of
power, goes on after a line ``# torn``: a signature right before that line is not whole. What else stands between the
signatures and the next line with a time was never whole either, and is passed over.

A file may hold checkpoints of several logs. It is best kept where the database's administrators cannot reach it, and
append-only (``chattr +a`` on Linux).
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from tracevault.errors import ProofError, SealError
from tracevault.integrity.note import Note, Verifier
from tracevault.sealing import durable
from tracevault.sealing.anchors.anchor import LogView, checkpoint_of, counts

_TIME = "# %Y-%m-%dT%H:%M:%SZ"
_HEAD = re.compile(rb"# \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\n")
_TORN = b"# torn\n"
_SIGNATURE = "— ".encode()
# Bytes that are read from the end to find the newest checkpoint; more if there is none of the origin among them.
_TAIL = 16_384
# A line of a file that is no anchor can be long; those of a note are not.
_MAX_LINE = 65_536


class FileAnchor:
    """A file on this machine, or on a share, which is only ever appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sink = f"file:{path}"

    def publish(self, note: Note, log: LogView) -> str:
        """Append the note; it is on the disk when this returns. The receipt says where it begins."""
        checkpoint_of(note)
        body = str(note).encode()
        if any(_HEAD.fullmatch(line) for line in body.splitlines(keepends=True)):
            raise SealError("a checkpoint with a line that looks like a time cannot be kept in a file")
        try:
            return self._append(body)
        except OSError as error:
            raise SealError(f"the anchor {self.sink!r} cannot be written: {error.strerror}") from None

    def _append(self, body: bytes) -> str:
        made = not self.path.exists()
        # Checkpoints are for everybody; those who may write are told apart by the folder.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            end = os.fstat(descriptor).st_size
            torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
            head = datetime.now(UTC).strftime(_TIME)
            begin = b"\n" + _TORN if torn else b""
            durable.write_all(descriptor, begin + f"{head}\n".encode() + body)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if made:
            durable.sync_folder(self.path.parent)
        return f"byte {end + len(begin)}"

    def newest(self, origin: str, verifiers: Sequence[Verifier] = ()) -> Note | None:
        """Return the largest of the last checkpoints of ``origin``: of those in as much as had to be read."""
        try:
            with self.path.open("rb") as file:
                end, length = os.fstat(file.fileno()).st_size, _TAIL
                while True:
                    file.seek(max(0, end - length))
                    found = [
                        (checkpoint.size, note)
                        for _, note in _records(file)
                        if (checkpoint := counts(note, origin)) is not None
                    ]
                    # To verify takes longer than to read, and the first is most often good.
                    for _, note in sorted(found, key=lambda pair: pair[0], reverse=True):
                        if counts(note, origin, verifiers):
                            return note
                    if length >= end:
                        return None
                    length *= 4
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SealError(f"the anchor {self.sink!r} cannot be read: {error.strerror}") from None


def read_checkpoints(path: Path) -> Iterator[tuple[datetime, Note]]:
    """Return the notes of an anchor file, the oldest first, and when each was appended; unverified.

    What is no note is passed over. A file that cannot be read raises `OSError`.
    """
    with path.open("rb") as file:
        yield from _records(file)


def _records(file: BinaryIO) -> Iterator[tuple[datetime, Note]]:
    """Read from where the file stands; what precedes the first line with a time is left out."""
    at: datetime | None = None
    lines: list[bytes] = []
    while True:
        line = file.readline(_MAX_LINE)
        if line and not _HEAD.fullmatch(line):
            if at is not None:
                lines.append(line)
            continue
        if at is not None and (note := _note(lines)) is not None:
            yield at, note
        if not line:
            return
        lines, at = [], _time(line)


def _time(line: bytes) -> datetime | None:
    try:
        return datetime.strptime(line.decode().rstrip("\n"), _TIME).replace(tzinfo=UTC)
    except ValueError:  # a month 13: the record of a stranger
        return None


def _note(lines: list[bytes]) -> Note | None:
    while lines and not lines[-1].startswith(_SIGNATURE):
        if lines.pop() == _TORN:
            del lines[-1:]
    try:
        return Note.parse(b"".join(lines).decode())
    except (ProofError, UnicodeDecodeError):
        return None
