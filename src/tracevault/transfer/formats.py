"""The formats of an export: how pages of events become bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any, Protocol, get_args

from tracevault.errors import ConfigError
from tracevault.events.json_text import escaped, json_record, json_text
from tracevault.events.record import RECORD_COLUMNS, AuditRecord
from tracevault.events.rules import got, nearest
from tracevault.transfer.manifest import FormatName
from tracevault.transfer.ocsf import ocsf_event

FORMATS: tuple[str, ...] = get_args(FormatName)
# What makes a spreadsheet take a cell for a formula; the wide forms of these signs count as well.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001


class Format(Protocol):
    """Makes the bytes of one file."""

    takes_lines: bool
    """Whether a page is made of lines of JSON that PostgreSQL has put together, and not of records."""
    resumable: bool

    def begin(self) -> bytes:
        """Return what the file begins with."""

    def page(self, rows: Sequence[Any]) -> bytes:
        """Return the next events."""

    def end(self) -> bytes:
        """Return what the file ends with."""


def format_of(name: Any, *, raw: bool, lines: bool) -> Format:
    """Return a new writer; ``lines`` says whether PostgreSQL can put lines of JSON together."""
    if name not in FORMATS:
        raise ConfigError(f"`format` is not one of ours, got {got(name)}; {nearest(name, FORMATS)}", field="format")
    if raw and name != "csv":
        raise ConfigError("`raw` means something for csv only", field="raw")
    if name == "jsonl":
        return JsonLines(takes_lines=lines)
    if name == "csv":
        return Csv(raw=raw)
    if name == "ocsf":
        return Ocsf()
    from tracevault.transfer.parquet import Parquet  # noqa: PLC0415 - it needs an extra

    return Parquet()


class JsonLines:
    """One JSON object a line, with every column; payloads nested, numbers exact."""

    resumable = True

    def __init__(self, *, takes_lines: bool) -> None:
        self.takes_lines = takes_lines

    def begin(self) -> bytes:
        """Return nothing."""
        return b""

    def page(self, rows: Sequence[Any]) -> bytes:
        """Return a line for each event."""
        lines = rows if self.takes_lines else [json_text(json_record(record)) for record in rows]
        text = "".join(f"{line}\n" for line in lines)
        # Seldom is there something to escape, so it is looked for in all at once.
        if self.takes_lines and not text.replace("\n", "").isprintable():
            text = "".join(f"{escaped(line)}\n" for line in lines)
        return text.encode()

    def end(self) -> bytes:
        """Return nothing."""
        return b""


class Csv:
    """RFC 4180, with a header. Payloads are JSON text; an empty cell is a column that is NULL.

    Unless ``raw``, a cell that a spreadsheet could take for a formula gets an apostrophe before it.
    """

    takes_lines = False
    resumable = True

    def __init__(self, *, raw: bool) -> None:
        self._raw = raw

    def begin(self) -> bytes:
        """Return the header."""
        return self._written([RECORD_COLUMNS])

    def page(self, rows: Sequence[AuditRecord]) -> bytes:
        """Return a line for each event; a cell may hold line breaks."""
        return self._written([self._cell(value) for value in json_record(record).values()] for record in rows)

    def end(self) -> bytes:
        """Return nothing."""
        return b""

    def _cell(self, value: Any) -> str:
        if isinstance(value, (dict, list)):
            return json_text(value)
        text = "" if value is None else str(value)
        return text if self._raw or not text.startswith(_FORMULA) else f"'{text}"

    def _written(self, rows: Any) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\r\n").writerows(rows)
        return text.getvalue().encode()


class Ocsf:
    """One OCSF event a line; see `tracevault.transfer.ocsf`."""

    takes_lines = False
    resumable = True

    def begin(self) -> bytes:
        """Return nothing."""
        return b""

    def page(self, rows: Sequence[AuditRecord]) -> bytes:
        """Return a line for each event."""
        return "".join(f"{json_text(ocsf_event(record))}\n" for record in rows).encode()

    def end(self) -> bytes:
        """Return nothing."""
        return b""
