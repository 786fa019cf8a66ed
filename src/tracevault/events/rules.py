"""The rules that fields and filters share: text, names, times, ids. Each raises `ValidationError`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, date, datetime
from decimal import Decimal
from difflib import get_close_matches
from typing import Any
from uuid import UUID

from tracevault.errors import ValidationError

_SHOWN = 64
# ISO 8601 extended format with an offset (the profile of RFC 3339), or a calendar date alone.
_TIME = re.compile(
    r"\d{4}-\d\d-\d\d(?:(?P<time>[Tt ]\d\d:\d\d(?::\d\d(?:[.,]\d{1,9})?)?)(?P<offset>[Zz]|[+-]\d\d(?::?\d\d)?)?)?",
    re.ASCII,
)
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)
_HEX = re.compile(r"[0-9a-f]+", re.ASCII)
# A dot within a key, and a backslash, are written with a backslash before them.
_STEP = re.compile(r"(?:[^.\\]|\\[.\\])+")
_LINE_BREAKERS = re.compile(r"[\n\r\t\0]")
# Names of events that passed: an application has few, and says them again and again.
_event_names: set[str] = set()
_MOST_NAMES = 4096


def shorten(text: str, length: int = _SHOWN) -> str:
    """Return ``text`` cut to ``length`` characters, the cut marked with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def got(value: object) -> str:
    """Return a value for a message: plain scalars as they are, shortened; of others the type."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return shorten(str(Decimal(value)))  # Python refuses to print an int of more than 4,300 digits
    if isinstance(value, (str, int, float, bool)) or value is None:
        return shorten(repr(value))
    return f"an instance of {type(value).__name__}"


def printable(name: object) -> str:
    """Return a name that is not ours for a message: shortened, what would not print written as an escape."""
    if not isinstance(name, str):
        return got(name)
    return shorten("".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[: _SHOWN + 1]))


def nearest(name: object, known: Iterable[str]) -> str:
    """Return a hint that names the known word closest to ``name``, or all of them."""
    known = sorted(known)
    close = get_close_matches(printable(name), known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"known are {', '.join(known)}"


def is_blank(text: str) -> bool:
    """Whether ``text`` holds nothing but white space (ECMAScript's, which counts U+FEFF, included)."""
    return not text.replace("\ufeff", "").strip()


def text(value: Any, field: str, limit: int, *, blank: bool = True) -> str:
    """Return ``value`` if it is a string of 1 to ``limit`` characters that PostgreSQL can store."""
    # What nearly every value is; the rest is looked at in turn.
    if (
        type(value) is str
        and 0 < len(value) <= limit
        and value.isascii()
        and value.isprintable()
        and not value.isspace()
    ):
        return value
    if type(value) is not str:
        if not isinstance(value, str):
            raise ValidationError(f"`{field}` must be a string, got {got(value)}", field=field)
        value = str.__str__(value)  # a StrEnum stands for its value
    if not 0 < len(value) <= limit:
        raise ValidationError(
            f"`{field}` must have 1 to {limit} characters, got {len(value)}: {shorten(repr(value))}"
            if value
            else f"`{field}` must not be empty{'; leave it out, or pass None' if blank else ''}",
            field=field,
        )
    if "\0" in value:
        raise ValidationError(
            f"`{field}` must not contain U+0000, which PostgreSQL cannot store, got {shorten(repr(value))}",
            field=field,
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            message = f"`{field}` contains a lone surrogate, which is not valid Unicode text: {shorten(repr(value))}"
        else:
            message = ""
        if message:
            raise ValidationError(message, field=field)
    if not blank and is_blank(value):
        raise ValidationError(f"`{field}` must not be blank, got {shorten(repr(value))}", field=field)
    return value  # type: ignore[no-any-return]


def event_name(value: Any, field: str, limit: int) -> str:
    """Return ``value`` if it can name an event: text that is not blank and stays on one line."""
    if type(value) is str and value in _event_names and len(value) <= limit:
        return value
    name = text(value, field, limit, blank=False)
    if not name.isprintable() and _LINE_BREAKERS.search(name):
        raise ValidationError(
            f"`{field}` must not contain newline, carriage return, tab or U+0000, got {shorten(repr(name))}",
            field=field,
        )
    if len(_event_names) < _MOST_NAMES:
        _event_names.add(name)
    return name


def choice(value: Any, field: str, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``, letter for letter."""
    if not isinstance(value, str) or value not in choices:
        allowed = " or ".join(f'"{word}"' for word in choices)
        raise ValidationError(f"`{field}` must be {allowed}, got {got(value)}", field=field)
    return str.__str__(value)


def uuid(value: Any, field: str) -> UUID:
    """Return ``value`` as a UUID: one already, or its 36 characters, in either case."""
    if isinstance(value, UUID):
        return value
    if not isinstance(value, str) or not _UUID.fullmatch(value):
        raise ValidationError(
            f"`{field}` must be a UUID such as 018f4e5c-7a1b-7c3d-9e2f-1a2b3c4d5e6f, got {got(value)}",
            field=field,
        )
    return UUID(value)


def hex_id(value: Any, field: str, digits: int) -> str:
    """Return ``value`` if it is a W3C Trace Context id: ``digits`` lower-case hex digits, not all zero."""
    if not isinstance(value, str) or len(value) != digits or not _HEX.fullmatch(value) or not value.strip("0"):
        raise ValidationError(
            f"`{field}` must be {digits} lower-case hex digits, not all zero (W3C Trace Context), got {got(value)}",
            field=field,
        )
    return str.__str__(value)


def moment(value: Any, field: str) -> datetime:
    """Return ``value`` as an aware datetime in UTC.

    Takes an aware ``datetime``, a ``date`` (midnight UTC), or ISO 8601 text: with an offset
    (``2026-01-02T03:04:05+02:00``, ``...Z``), or a date alone (midnight UTC). Years 1 to 9999.
    """
    if isinstance(value, str):
        given = _parse_time(value, field)
    elif isinstance(value, date) and not isinstance(value, datetime):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    elif not isinstance(value, datetime):
        raise ValidationError(
            f"`{field}` must be an aware datetime, a date, or ISO 8601 text with an offset, got {got(value)}",
            field=field,
        )
    else:
        given = value
    offset = given.utcoffset()
    if offset is None:
        raise ValidationError(
            f"`{field}` is a naive datetime, {given.isoformat()}: nobody knows which clock it means; "
            "pass datetime.now(UTC), or value.replace(tzinfo=UTC) if it is in UTC",
            field=field,
        )
    if given.tzinfo is UTC:
        return given
    try:
        return given.astimezone(UTC)
    except OverflowError:
        message = f"`{field}` lies outside the years 1 to 9999 in UTC: {given.isoformat()}"
    raise ValidationError(message, field=field)


def _parse_time(value: str, field: str) -> datetime:
    match = _TIME.fullmatch(value)
    if match is None:
        message = (
            f"`{field}` must be ISO 8601 text with an offset (2026-01-02T03:04:05Z) or a date (2026-01-02), "
            f"got {shorten(repr(value))}"
        )
    elif match["time"] and not match["offset"]:
        message = f"`{field}` has no offset from UTC, got {shorten(repr(value))}: append Z or +02:00"
    else:
        try:
            parsed = datetime.fromisoformat(value.upper())
        except ValueError:
            message = f"`{field}` is not a time that exists, got {shorten(repr(value))}"
        else:
            return parsed if match["time"] else parsed.replace(tzinfo=UTC)
    raise ValidationError(message, field=field)


def path_keys(path: Any, field: str) -> tuple[str, ...]:
    r"""Return the keys of ``payment.currency``; ``\.`` is a dot within a key."""
    joined = text(path, field, 512, blank=False)
    steps = _STEP.findall(joined)
    if ".".join(steps) != joined or len(steps) > 100:
        raise ValidationError(
            f"`{field}` must be keys with dots between them, such as payment.currency, got {got(path)}; "
            r"a dot within a key is written as \.",
            field=field,
        )
    return tuple(re.sub(r"\\(.)", r"\1", step) for step in steps)


def whole_number(value: Any, field: str, least: int, most: int) -> int:
    """Return ``value`` if it is an int (True is not 1) from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValidationError(
            f"`{field}` must be a whole number from {least:,} to {most:,}, got {got(value)}", field=field
        )
    return int(value)
