"""Payloads: ``data`` and ``meta`` become JSON text, checked and masked in one pass; and back again.

The text is what PostgreSQL parses into ``jsonb``, so numbers are written exactly: an ``int`` and a ``Decimal``
digit for digit, a ``float`` as its shortest decimal text. Nothing that JSON or PostgreSQL cannot hold gets by:
the refusal names the path of the offender.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from json.encoder import encode_basestring
from typing import Any
from uuid import UUID

from tracevault.errors import ValidationError
from tracevault.event.rules import shorten

MAX_DEPTH = 100
MAX_DIGITS = 1000
MAX_EXPONENT = 1000
_INT_LIMIT = 10**MAX_DIGITS
_WORD = 2**63
# Below this length a string's size is covered by the count of nodes; see Encoder.left.
_SHORT = 256
_PREFIX_CACHE_SIZE = 4096
_quote = encode_basestring


class _Refused(Exception):  # noqa: N818 - control flow inside this module
    """A value that cannot be stored. ``path`` grows while the exception climbs, innermost key first."""

    def __init__(self, reason: str, *, too_deep: bool = False) -> None:
        self.reason = reason
        self.too_deep = too_deep
        self.path: list[str | int] = []


class Encoder:
    """Turns payloads into JSON text; holds what the options say about that, and no state.

    ``names`` are the masked keys, case-folded (``mask.masked_names``); ``max_bytes`` bounds the work that a
    payload may cause before its size is known, so that a small structure which mentions the same large list
    a thousand times is refused instead of filling the memory.
    """

    def __init__(self, names: frozenset[str], mask_value: str, max_bytes: int) -> None:
        self.names = names
        self.mask_value = mask_value
        self.mask_text: str = _quote(mask_value)
        self.max_bytes = max_bytes

    def masks(self, key: str) -> bool:
        """Whether the value under ``key`` is replaced."""
        return key.casefold() in self.names

    def encode(self, value: Any, field: str, *, depth: int = 1) -> str:
        """Return the JSON object ``value`` as text; raise `ValidationError` with the path below ``field``.

        ``depth`` is the nesting level at which ``value`` counts; more than 100 levels are refused.
        """
        if not isinstance(value, dict):
            raise ValidationError(f"`{field}` must be a dict with string keys, not {_describe(value)}", field=field)
        try:
            return _Walk(self).object_text(value, depth)
        except _Refused as refused:
            refusal = refused
        raise _refusal_error(value, field, refusal)


class _Walk:
    """One encoding under way. ``left`` is what remains of the budget; ``hidden`` is set below a masked key."""

    __slots__ = ("hidden", "left", "mask_text", "max_bytes", "names")

    def __init__(self, encoder: Encoder) -> None:
        self.names = encoder.names
        self.mask_text = encoder.mask_text
        self.max_bytes = encoder.max_bytes
        self.left = encoder.max_bytes
        self.hidden = False

    def object_text(self, value: dict[Any, Any], depth: int) -> str:
        if depth > MAX_DEPTH:
            raise _Refused(f"is nested deeper than {MAX_DEPTH} levels", too_deep=True)
        self.left -= len(value) + 1
        if self.left < 0:
            raise _Refused(f"makes the event larger than `max_event_bytes` ({self.max_bytes})")
        names = self.names
        parts = []
        key: Any = ""
        try:
            for key, item in value.items():
                prefix = _PREFIXES.get(key) if type(key) is str else None
                if prefix is None:
                    prefix = _prefix(key)
                if names and key.casefold() in names:
                    if not self.hidden:
                        self.check_hidden(item, depth)
                    parts.append(prefix + self.mask_text)
                    continue
                kind = type(item)
                if kind is str:
                    parts.append(prefix + self.string_text(item))
                elif kind is int and -_WORD < item < _WORD:
                    parts.append(prefix + repr(item))
                elif item is None:
                    parts.append(prefix + "null")
                else:
                    parts.append(prefix + self.value_text(item, depth))
        except _Refused as refused:
            refused.path.append(key if isinstance(key, str) else shorten(repr(key)))
            raise
        return "{" + ", ".join(parts) + "}"

    def array_text(self, value: list[Any] | tuple[Any, ...], depth: int) -> str:
        if depth > MAX_DEPTH:
            raise _Refused(f"is nested deeper than {MAX_DEPTH} levels", too_deep=True)
        self.left -= len(value) + 1
        if self.left < 0:
            raise _Refused(f"makes the event larger than `max_event_bytes` ({self.max_bytes})")
        parts: list[str] = []
        try:
            for item in value:
                parts.append(self.value_text(item, depth))  # noqa: PERF401 - len(parts) is the path on failure
        except _Refused as refused:
            refused.path.append(len(parts))
            raise
        return "[" + ", ".join(parts) + "]"

    def value_text(self, item: Any, depth: int) -> str:
        kind = type(item)
        if kind is str:
            return self.string_text(item)
        if kind is bool:
            return "true" if item else "false"
        if item is None:
            return "null"
        if kind is dict:
            return self.object_text(item, depth + 1)
        if kind is list or kind is tuple:
            return self.array_text(item, depth + 1)
        if isinstance(item, Enum):
            return self.value_text(item.value, depth)
        if isinstance(item, int):
            return self.integer_text(item)
        if isinstance(item, float):
            return self.float_text(item)
        if isinstance(item, Decimal):
            return self.decimal_text(item)
        if isinstance(item, str):
            return self.string_text(str.__str__(item))
        if isinstance(item, (datetime, date, UUID)):
            return _quote(self.scalar_text(item))
        if isinstance(item, dict):
            return self.object_text(item, depth + 1)
        if isinstance(item, (list, tuple)):
            return self.array_text(item, depth + 1)
        raise _Refused(
            f"is {_describe(item)}, which JSON cannot hold: pass None, bool, int, float, Decimal, str, "
            "datetime, date, UUID, Enum, dict, list or tuple"
        )

    def string_text(self, item: str) -> str:
        if len(item) > _SHORT:
            self.left -= len(item)
            if self.left < 0:
                raise _Refused(f"makes the event larger than `max_event_bytes` ({self.max_bytes})")
        if "\0" in item:
            raise _Refused(f"contains the character U+0000, which PostgreSQL cannot store{self.shown(item)}")
        if not item.isascii() and has_surrogate(item):
            raise _Refused(f"contains a lone surrogate, which is not valid Unicode text{self.shown(item)}")
        quoted: str = _quote(item)
        return quoted

    def integer_text(self, item: int) -> str:
        if not -_INT_LIMIT < item < _INT_LIMIT:
            raise _Refused(f"is an integer of more than {MAX_DIGITS:,} digits")
        return int.__repr__(item)

    def float_text(self, item: float) -> str:
        if not math.isfinite(item):
            raise _Refused(f"is not a finite number, which JSON cannot hold{self.shown(item)}")
        return float.__repr__(item)

    def decimal_text(self, item: Decimal) -> str:
        _sign, digits, exponent = item.as_tuple()
        if not isinstance(exponent, int):
            raise _Refused(f"is not a finite number, which JSON cannot hold{self.shown(item)}")
        if len(digits) > MAX_DIGITS or abs(exponent) > MAX_EXPONENT:
            raise _Refused(f"is a Decimal beyond {MAX_DIGITS:,} digits or an exponent of {MAX_EXPONENT:,} either way")
        return Decimal.__str__(item)

    def scalar_text(self, item: datetime | date | UUID) -> str:
        if not isinstance(item, datetime):
            return str(item) if isinstance(item, UUID) else item.isoformat()
        if item.utcoffset() is None:
            raise _Refused(f"is a naive datetime; pass an aware one, as datetime.now(UTC){self.shown(item)}")
        try:
            return iso_utc(item)
        except OverflowError:
            raise _Refused(f"lies outside the years 1 to 9999 in UTC{self.shown(item)}") from None

    def check_hidden(self, item: Any, depth: int) -> None:
        """Check what the mask is about to replace: it must be a payload too, but its size does not count."""
        left = self.left
        self.left = max(16 * self.max_bytes, 2**24)
        self.hidden = True
        try:
            self.value_text(item, depth)
        finally:
            self.hidden = False
            self.left = left

    def shown(self, item: object) -> str:
        """Return the value for the message, unless it stands below a masked key."""
        return "" if self.hidden else f" (got {shorten(repr(item))})"


_PREFIXES: dict[str, str] = {}


def _prefix(key: Any) -> str:
    if not isinstance(key, str):
        raise _Refused(f"is a key of type {type(key).__name__}; keys must be strings")
    key = str.__str__(key)
    if "\0" in key or has_surrogate(key):
        raise _Refused("is a key with U+0000 or a lone surrogate, which PostgreSQL cannot store")
    prefix: str = _quote(key) + ": "
    if len(_PREFIXES) < _PREFIX_CACHE_SIZE and len(key) <= _SHORT:
        _PREFIXES[key] = prefix
    return prefix


def _refusal_error(root: Any, field: str, refused: _Refused) -> ValidationError:
    steps = refused.path[::-1]
    reason = refused.reason
    if refused.too_deep:
        closing = _cycle_length(root, steps)
        if closing is not None:
            steps, reason = steps[:closing], "refers back to a container that holds it (a cycle)"
    path = field + "".join(f"[{step}]" if isinstance(step, int) else "." + _plain_key(step) for step in steps)
    return ValidationError(f"`{path}` {reason}", field=path)


def _cycle_length(root: Any, steps: list[str | int]) -> int | None:
    """Return how many steps lead from ``root`` to the first container met a second time, if any is."""
    seen = {id(root)}
    value = root
    for count, step in enumerate(steps, 1):
        value = value[step]
        if isinstance(value, Enum):
            value = value.value
        if id(value) in seen:
            return count
        seen.add(id(value))
    return None


def _plain_key(key: str) -> str:
    """Return a key as part of a path: long ones shortened, what would not print written as an escape."""
    return shorten("".join(c if c.isprintable() else ascii(c)[1:-1] for c in key[:65]))


def _describe(value: object) -> str:
    """Name a value's type only: the repr of a foreign object may hold secrets, or run code."""
    if value is None:
        return "None"
    name = type(value).__name__
    if callable(value) and not isinstance(value, type):
        return f"a {name}"
    return f"an instance of {name}"


def has_surrogate(text: str) -> bool:
    """Whether ``text`` holds a lone surrogate, so that it has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def utf8_length(text: str) -> int:
    """Bytes of ``text`` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def iso_utc(moment: datetime) -> str:
    """Return an aware datetime as ISO 8601 in UTC, three fractional digits, or six where it needs them."""
    precision = "microseconds" if moment.microsecond % 1000 else "milliseconds"
    return moment.astimezone(UTC).isoformat(timespec=precision)[:-6] + "Z"


def decode(text: str) -> Any:
    """Return the Python value of a ``jsonb`` column's text.

    An integer is an ``int``; another number is the ``float`` that prints the same number, else a ``Decimal``.
    """
    return _DECODER.decode(text)


def _number(text: str) -> float | Decimal:
    value = float(text)
    if repr(value) == text:
        return value
    exact = Decimal(text)
    return value if math.isfinite(value) and Decimal(repr(value)) == exact else exact


def _whole_number(text: str) -> int | Decimal:
    # Python refuses to parse integers of more than 4,300 digits; PostgreSQL may hold them.
    return int(text) if len(text) <= 4 * MAX_DIGITS else Decimal(text)


_DECODER = json.JSONDecoder(parse_float=_number, parse_int=_whole_number)


def jsonb_text(value: Any) -> str:
    """Return the text that PostgreSQL prints for ``value`` as ``jsonb``.

    ``value`` is made of what JSON text parses into (``float`` or ``Decimal``, as you like). Keys are ordered
    by length, then bytes; numbers are written without an exponent.
    """
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: (len(key.encode()), key.encode()))
        return "{" + ", ".join(f"{_quote(key)}: {jsonb_text(value[key])}" for key in keys) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(jsonb_text, value)) + "]"
    if isinstance(value, str):
        return str(_quote(value))
    if isinstance(value, float):
        value = Decimal(repr(value))
    if isinstance(value, Decimal):
        # PostgreSQL's numeric knows no negative zero.
        return f"{abs(value) if value.is_zero() else value:f}"
    return "null" if value is None else str(value).lower()
