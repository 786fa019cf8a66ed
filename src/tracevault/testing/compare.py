"""How an expectation and an event are compared, and how their differences are told."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from tracevault.errors import ValidationError
from tracevault.events.catalog import has_fields, payload_of, typed
from tracevault.events.payload import Encoder, decode
from tracevault.events.record import RECORD_COLUMNS, Actor, Target
from tracevault.events.rules import nearest

_encoder = Encoder(frozenset(), "", 2**28)

# Text that is told from everything else without quotes.
_BARE = re.compile(r"[A-Za-z_][\w.:@/-]*", re.ASCII)
# What an expectation may name, besides the columns of a record.
_SIDES = ("before", "after", "diff")
EXPECTED = frozenset({"actor", "target", "scope", "stored", *_SIDES, *RECORD_COLUMNS} - {"event", "created_at"})


class Nothing:
    """Stands for what is not there."""

    def __repr__(self) -> str:
        """Show it."""
        return "nothing"


NOTHING = Nothing()


class Difference(NamedTuple):
    """Where an event differs from what was expected."""

    path: str
    expected: Any
    emitted: Any


def differences(emitted: Mapping[str, Any], event: str | None, fields: Mapping[str, Any]) -> list[Difference]:
    """Return where an event differs from an expectation: mappings may hold more than is expected of them."""
    found = []
    if event is not None and emitted["event"] != event:
        found.append(Difference("event", event, emitted["event"]))
    for name, expected in fields.items():
        if name in ("actor", "target"):
            found += _identity(name, expected, emitted)
        elif name in _SIDES:
            found += _compare(f"data.{name}", _plain(expected), (emitted["data"] or {}).get(name, NOTHING))
        elif expected is None:
            if emitted[name] is not None:
                found.append(Difference(name, NOTHING, emitted[name]))
        else:
            value = emitted[name]
            found += _compare(name, _plain(expected, name), NOTHING if value is None else value)
    return found


def _identity(name: str, expected: Any, emitted: Mapping[str, Any]) -> list[Difference]:
    id_, type_ = emitted[f"{name}_id"], emitted[f"{name}_type"]
    shown = NOTHING if id_ is None else f"{type_}:{id_}"
    if expected is None:
        return [] if id_ is None else [Difference(name, NOTHING, shown)]
    if isinstance(expected, (Actor, Target)):
        expected = {"id": expected.id, "type": expected.type}
    if isinstance(expected, Mapping):
        if id_ is None:
            return [Difference(name, f"{expected.get('type', '*')}:{expected.get('id', '*')}", shown)]
        return _compare(name, dict(expected), {"id": id_, "type": type_})
    if isinstance(expected, str):
        return [] if expected == shown else [Difference(name, expected, shown)]
    return [] if expected == {"id": id_, "type": type_} else [Difference(name, expected, shown)]


def _compare(path: str, expected: Any, emitted: Any) -> list[Difference]:
    if isinstance(expected, Mapping) and isinstance(emitted, Mapping):
        return [
            difference
            for key, value in expected.items()
            for difference in _compare(f"{path}.{key}", value, emitted.get(key, NOTHING))
        ]
    if isinstance(expected, list) and isinstance(emitted, list) and len(expected) == len(emitted):
        return [
            difference
            for place, (one, other) in enumerate(zip(expected, emitted, strict=True))
            for difference in _compare(f"{path}[{place}]", one, other)
        ]
    return [] if _equal(expected, emitted) else [Difference(path, expected, emitted)]


def _equal(expected: Any, emitted: Any) -> bool:
    if isinstance(expected, (int, float, Decimal)) and isinstance(expected, bool) is not isinstance(emitted, bool):
        return False
    return bool(expected == emitted)  # whatever compares in a way of its own, as unittest.mock.ANY


def _plain(value: Any, name: str = "data") -> Any:
    """Return an expected value as one that was stored reads: times as text, enums as their values."""
    if name not in ("data", "meta"):
        return value
    if has_fields(value):
        value = payload_of(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    try:
        return decode(_encoder.encode({"": value}, ""))[""]
    except ValidationError:
        return value


def expectation(event: Any, fields: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the name and the fields that are expected; a typed event stands for its name and its payload.

    Raises `TypeError` for a field that no event has.
    """
    unknown = next((name for name in fields if name not in EXPECTED), None)
    if unknown is not None:
        raise TypeError(f"`{unknown}` is not a field of an event; {nearest(unknown, EXPECTED)}")
    if event is None or isinstance(event, str):
        return event, fields
    found = typed(event)
    if found is None:
        raise TypeError(f"`event` must be an event's name or a typed event, got {event!r}")
    declared, payload = found
    return declared.name, fields if payload is None else {"data": dict(payload), **fields}


def line(emitted: Mapping[str, Any]) -> str:
    """Return an event on one line."""
    words = [emitted["event"]]
    words += [
        f"{name}={emitted[f'{name}_type']}:{emitted[f'{name}_id']}"
        for name in ("actor", "target")
        if emitted[f"{name}_id"] is not None
    ]
    words += [f"{name}={_shown(emitted[name], 100)}" for name in ("data", "meta") if emitted[name]]
    return "  ".join(words)


def described(event: str | None, fields: Mapping[str, Any]) -> str:
    """Return an expectation on one line."""
    return "  ".join([event or "any event", *(f"{name}={_shown(value, 100)}" for name, value in fields.items())])


def table(found: Iterable[Difference]) -> list[str]:
    """Return differences side by side."""
    rows = [("field", "expected", "emitted")]
    rows += [(each.path, _shown(each.expected, 60), _shown(each.emitted, 60)) for each in found]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{path:{first}}  {expected:{second}}  {emitted}" for path, expected, emitted in rows]


def _shown(value: Any, most: int) -> str:
    bare = isinstance(value, str) and _BARE.fullmatch(value) and value not in {"True", "False", "None", "nothing"}
    text = value if bare else repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"
