"""A record, and any other value, as JSON text on one line: numbers exact, and nothing in it that acts on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from uuid import UUID

from tracevault.events.payload import iso_utc, jsonb_text
from tracevault.events.record import RECORD_COLUMNS, AuditRecord


class _Raw(str):
    """A piece of JSON that is text already."""

    __slots__ = ()


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    r"""Return ``value`` as JSON on one line, its numbers exact; what does not print is a ``\u`` escape."""
    return escaped("".join(_pieces(value)), ascii_only=ascii_only)


def json_record(record: AuditRecord) -> dict[str, Any]:
    """Return a record as values that `json_text` takes."""
    return {name: _plain(getattr(record, name)) for name in RECORD_COLUMNS}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return iso_utc(value)
    return str(value) if isinstance(value, UUID) else value


def escaped(text: str, *, ascii_only: bool = False) -> str:
    r"""Return JSON text in which whatever does not print is a ``\u`` escape."""
    # Outside its strings JSON is printable ASCII, so this changes the inside of strings alone.
    if text.isprintable() and (text.isascii() or not ascii_only):
        return text
    return "".join(c if c.isprintable() and (c.isascii() or not ascii_only) else json.dumps(c)[1:-1] for c in text)


def members(value: dict[str, Any] | list[Any]) -> list[tuple[str, Any]]:
    """Return what stands in a container: what precedes each value in JSON, and the value."""
    if isinstance(value, list):
        return [("", item) for item in value]
    return [(f"{jsonb_text(key)}: ", item) for key, item in value.items()]


def _pieces(value: Any) -> Iterator[str]:
    """Yield ``value`` as JSON in pieces; with a stack of its own, since a payload may be deeper than Python's."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, _Raw):
            yield item
        elif isinstance(item, (dict, list)) and item:
            opening, closing = "{}" if isinstance(item, dict) else "[]"
            yield opening
            stack.append(_Raw(closing))
            for place, (prefix, part) in reversed(list(enumerate(members(item)))):
                stack += [part, _Raw((", " if place else "") + prefix)]
        else:
            yield jsonb_text(item)
