"""JSON Lines of an export, read back as events that can be emitted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, BinaryIO, NamedTuple

from tracevault.errors import ValidationError
from tracevault.events.record import RECORD_COLUMNS
from tracevault.events.rules import got, nearest

# What the new row has of its own: when it was stored, how, and what PostgreSQL takes out of `data`.
_MADE_ANEW = frozenset({"created_at", "mode", "outcome", "error_code", "severity"})
_IDENTITIES = ("actor", "target")
MAX_LINE = 64 * 1024 * 1024


class Line(NamedTuple):
    """A line of a file: its number, counted from 1, and its event, or why it is none."""

    number: int
    text: bytes
    event: dict[str, Any] | None
    refusal: str | None


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """Yield the lines of an export. Blank lines are passed over."""
    number = 0
    while text := file.readline(MAX_LINE):
        number += 1
        if not text.strip():
            continue
        event = refusal = None
        try:
            event = _event(text)
        except ValidationError as error:
            refusal = str(error)
        yield Line(number, text.rstrip(b"\r\n"), event, refusal)


def _event(text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(text, parse_float=Decimal, object_pairs_hook=_object)
    except RecursionError:
        message = "it is nested deeper than events can be"
    except ValueError as error:  # also of bytes that are not UTF-8
        message = f"it is not JSON: {error}"
    else:
        return _fields(record)
    raise ValidationError(message)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _fields(record: Any) -> dict[str, Any]:
    """Return the event of a record: the fields that `emit_many` takes."""
    if not isinstance(record, dict):
        raise ValidationError(f"it is no object, but {got(record)}")
    unknown = next((name for name in record if name not in RECORD_COLUMNS), None)
    if unknown is not None:
        raise ValidationError(f"`{unknown[:64]}` is not a column; {nearest(unknown, RECORD_COLUMNS)}")
    for name in ("id", "event", "occurred_at"):
        if record.get(name) is None:
            raise ValidationError(f"`{name}` is missing")
    event = {name: value for name, value in record.items() if name not in _MADE_ANEW and value is not None}
    for identity in _IDENTITIES:
        parts = {part: event.pop(f"{identity}_{part}", None) for part in ("id", "type")}
        given = {part: value for part, value in parts.items() if value is not None}
        if len(given) == 1:
            raise ValidationError(f"`{identity}_id` and `{identity}_type` stand together, or neither")
        if given:
            event[identity] = given
    return event
