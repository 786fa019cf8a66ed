"""An export on its way into a file: it grows beside its place, page by page, and takes it when it is whole.

Meanwhile it is ``NAME.part``. Every few seconds what is on the disk is noted in ``NAME.part.json``: how many bytes and
rows that is, and the cursor of the page after them. There an export that was interrupted goes on.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

from tracevault.errors import ConfigError
from tracevault.events.payload import iso_utc
from tracevault.events.record import AuditRecord
from tracevault.flows import Query
from tracevault.flows.read import Walk, next_walk, page_query, record, select, select_line, walk_after, write_walk
from tracevault.schema.query_text import format_query
from tracevault.sealing.durable import replace, sync_folder
from tracevault.transfer.formats import Format, format_of
from tracevault.transfer.manifest import Manifest

# Seconds of work that an interruption may cost.
_NOTED_EVERY = 5.0
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Subject:
    """What an export is of. ``fingerprint`` tells it from others where it is resumed."""

    format: str
    table: str
    filters: str
    order: str
    fingerprint: str


class ExportBytes:
    """What an export asks of the database, and the bytes that it makes of the answers."""

    def __init__(self, writer: Format) -> None:
        self._writer = writer

    def query(self, walk: Walk, limit: int) -> Query:
        """Return the statement for the next rows of a walk."""
        return page_query(walk, (select_line if self._writer.takes_lines else select)(walk.seen), limit)

    def records(self, rows: Sequence[tuple[Any, ...]]) -> list[AuditRecord]:
        """Return the records that `add` needs beside the rows of `query`: none where those are lines of JSON."""
        return [] if self._writer.takes_lines else [record(row) for row in rows]

    def begin(self) -> bytes:
        """Return what the export begins with."""
        return self._writer.begin()

    def page(self, rows: Sequence[tuple[Any, ...]], records: Sequence[AuditRecord]) -> bytes:
        """Return the next events."""
        return self._writer.page([row[0] for row in rows] if self._writer.takes_lines else records) if rows else b""

    def end(self) -> bytes:
        """Return what the export ends with."""
        return self._writer.end()


class ExportFile(ExportBytes):
    """The file of one export. ``target`` is a path, or a file that takes bytes, which is not closed.

    Compressed with gzip where its name ends with ``.gz``, each page by itself. Raises `ConfigError` for what cannot be.
    """

    def __init__(self, target: Any, writer: Format, subject: Subject, *, resume: bool) -> None:
        super().__init__(writer)
        self._subject = subject
        self._rows = self._bytes = 0
        self._ids: tuple[str | None, str | None] = None, None
        self._hash = hashlib.sha256()
        self._noted = time.monotonic()
        self.cursor: str | None = None
        self._walk: Walk | None = None
        self._path: Path | None = None
        self._place: Path | None = None
        if hasattr(target, "write"):
            self._file = cast("BinaryIO", target)
        else:
            self._path = Path(target).resolve()  # a link stays one
            self._gzip = self._path.suffix == ".gz"
            if self._path.exists() and not self._path.is_file():
                self._file = self._path.open("wb")  # a pipe or a terminal: nothing can take its place
            else:
                self._place = self._path.with_name(f"{self._path.name}.part")
                self._notes = self._path.with_name(f"{self._path.name}.part.json")
                self._file = self._opened(self._place)
        if self._path is None:
            self._gzip = False
        if resume and (self._place is None or not writer.resumable):
            self.close()
            raise ConfigError("an export of this kind cannot be resumed: it has no place to go on", field="resume")
        if self._place is not None:
            self._begin_or_resume(resume)
        if self._bytes == 0:
            self._write(self.begin())

    def _opened(self, part: Path) -> BinaryIO:
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ConfigError(f"{str(part)!r} is being written by another export", field="target") from None
        return file

    def _begin_or_resume(self, resume: bool) -> None:
        notes = self._read_notes() if resume else None
        if notes is None:  # those of an earlier export say nothing of this one
            self._notes.unlink(missing_ok=True)
        else:
            self._rows, size, self.cursor = notes["rows"], notes["bytes"], notes["cursor"]
            self._ids = notes["first_id"], notes["last_id"]
            while self._bytes < size:
                block = self._file.read(min(_BLOCK, size - self._bytes))
                if not block:
                    self.close()
                    raise ConfigError(f"{str(self._place)!r} is shorter than its notes say: begin anew", field="resume")
                self._hash.update(block)
                self._bytes += len(block)
        self._file.seek(self._bytes)
        self._file.truncate()

    def _read_notes(self) -> dict[str, Any] | None:
        try:
            notes = json.loads(self._notes.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if notes.get("fingerprint") != self._subject.fingerprint:
            self.close()
            raise ConfigError(f"{str(self._notes)!r} is of an export of something else: begin anew", field="resume")
        return cast("dict[str, Any]", notes)

    @property
    def rows(self) -> int:
        """How many events are in it."""
        return self._rows

    def add(self, walk: Walk, rows: Sequence[tuple[Any, ...]], records: Sequence[AuditRecord]) -> Walk:
        """Write the next rows of a walk; return the walk that goes on after them."""
        if not rows:
            return walk
        self._write(self.page(rows, records))
        self._rows += len(rows)
        self._ids = self._ids[0] or str(rows[0][-1]), str(rows[-1][-1])
        walk = walk_after(walk, rows[-1])
        self._walk = walk
        if time.monotonic() > self._noted + _NOTED_EVERY:
            self._note()
        return walk

    def _write(self, content: bytes) -> None:
        if not content:
            return
        if self._gzip:
            content = gzip.compress(content, mtime=0)
        self._file.write(content)
        self._hash.update(content)
        self._bytes += len(content)

    def _note(self) -> None:
        if self._place is None or not self._writer.resumable or self._walk is None:
            return
        self._sync()
        notes = {
            "fingerprint": self._subject.fingerprint,
            "cursor": write_walk(self._walk),
            "bytes": self._bytes,
            "rows": self._rows,
            "first_id": self._ids[0],
            "last_id": self._ids[1],
        }
        replace(self._notes, json.dumps(notes).encode(), 0o600)
        self._noted = time.monotonic()

    def finish(self) -> Manifest:
        """Put the file in its place, and return what is in it."""
        self._write(self.end())
        if self._place is None:
            self._file.flush()
        else:
            self._sync()
            self._place.replace(cast("Path", self._path))
            self._notes.unlink(missing_ok=True)
            sync_folder(self._place.parent)
        self.close()
        subject = self._subject
        return Manifest(
            format=subject.format,
            table=subject.table,
            filters=subject.filters,
            order=subject.order,
            rows=self._rows,
            first_id=self._ids[0],
            last_id=self._ids[1],
            bytes=self._bytes,
            sha256=self._hash.hexdigest(),
            created_at=iso_utc(datetime.now(UTC)),
        )

    def interrupt(self) -> None:
        """Close it unfinished, noting where it can be resumed. What cannot be is removed."""
        try:
            if self._writer.resumable and (self._walk is not None or self.cursor is not None):
                self._note()
            elif self._place is not None:
                self._place.unlink(missing_ok=True)
                self._notes.unlink(missing_ok=True)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file, unless it is the caller's."""
        if self._path is not None:
            self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def begin_export(
    target: Any,
    format: Any,  # noqa: A002
    walk: Walk,
    filters: Mapping[str, Any],
    *,
    raw: bool,
    resume: bool,
    lines: bool,
) -> tuple[ExportFile, Walk]:
    """Open the file of an export; return it, and the walk that goes on where the file ends."""
    writer = format_of(format, raw=raw, lines=lines)
    fingerprint = f"{format} {raw} {walk.filters.hex()} {walk.limit}"
    file = ExportFile(
        target, writer, Subject(format, walk.table, format_query(filters), walk.order, fingerprint), resume=resume
    )
    return file, walk if file.cursor is None else next_walk(walk, file.cursor)
