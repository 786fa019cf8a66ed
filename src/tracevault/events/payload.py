"""Payloads: ``data`` and ``meta`` become JSON text, checked and masked in one pass; and back again.

The text is what PostgreSQL parses into ``jsonb``, so numbers are written exactly: an ``int`` and a ``Decimal``
digit for digit, a ``float`` as its shortest decimal text. Nothing that JSON or PostgreSQL cannot hold gets by:
the refusal names the path of the offender.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from json.encoder import encode_basestring
from typing import Any
from uuid import UUID

from tracevault.errors import ValidationError
from tracevault.events.mask import fold
from tracevault.events.rules import got, printable, shorten

MAX_DEPTH = 100
MAX_DIGITS = 1000
MAX_EXPONENT = 1000
_INT_LIMIT = 10**MAX_DIGITS
_WORD = 2**63
# Up to this length a text is covered by the count of nodes; see Walk.left.
_SHORT = 64
_KNOWN_KEYS = 4096
_quote = encode_basestring
_WORDS = {None: "null", True: "true", False: "false"}
# JSON text as `jsonb_text` wants it: every number a Decimal.
EXACT = json.JSONDecoder(parse_float=Decimal, parse_int=Decimal)


class Refused(Exception):  # noqa: N818 - control flow inside this module
    """A value that cannot be stored. ``path`` grows while the exception climbs, innermost key first.

    ``endless``: too deep or too large, as a cycle is.
    """

    def __init__(self, reason: str, *, endless: bool = False) -> None:
        self.reason = reason
        self.endless = endless
        self.path: list[str | int] = []


class Encoder:
    """Turns payloads into JSON text; holds what the options say about that, and which keys are fine.

    ``names`` are the masked keys, case-folded (``mask.masked_names``); ``max_bytes`` bounds the work that a
    payload may cause before its size is known, so that a small structure which mentions the same large list
    a thousand times is refused instead of filling the memory.
    """

    def __init__(self, names: frozenset[str], mask_value: str, max_bytes: int) -> None:
        self.names = names
        self.mask_value = mask_value
        self.mask_text: str = _quote(mask_value)
        self.max_bytes = max_bytes
        # '"key": ' of keys that were checked before and are not masked.
        self.prefixes: dict[str, str] = {}

    def masks(self, key: str) -> bool:
        """Whether the value under ``key`` is replaced."""
        return fold(key) in self.names

    def encode(self, value: Any, field: str, *, depth: int = 1, hidden: bool = False, walk: Walk | None = None) -> str:
        """Return the JSON object ``value`` as text; raise `ValidationError` with the path below ``field``.

        ``depth`` is the nesting level at which ``value`` counts; more than 100 levels are refused. ``hidden``:
        it is checked, and masked as a whole. ``walk``: how to go through it, where that is not the usual way.
        """
        if not isinstance(value, dict):
            raise ValidationError(f"`{field}` must be a dict with string keys, not {_describe(value)}", field=field)
        if walk is None:
            text = None if hidden else self._plain_text(value)
            if text is not None:
                return text
            walk = Walk(self)
        try:
            if hidden:
                walk.check_hidden(value, depth - 1)
                return self.mask_text
            return walk.object_text(value, depth)
        except Refused as refused:
            refusal = refused
        raise _refusal_error(value, field, refusal)

    def _plain_text(self, value: dict[Any, Any]) -> str | None:
        """Return the text of a payload as most are: one level of known keys with short texts, small integers, booleans.

        None for any other. `Walk.object_text` says the same, and takes a third more time.
        """
        if type(value) is not dict or len(value) >= self.max_bytes:
            return None
        known, parts = self.prefixes, []
        for key, item in value.items():
            if type(key) is not str or key not in known:
                return None
            kind = type(item)
            if kind is str and len(item) <= _SHORT and item.isascii() and "\0" not in item:
                parts.append(known[key] + _quote(item))
            elif kind is int and -_WORD < item < _WORD:
                parts.append(known[key] + repr(item))
            elif item is None or kind is bool:
                parts.append(known[key] + _WORDS[item])
            else:
                return None
        return "{" + ", ".join(parts) + "}"


class Walk:
    """One encoding under way. ``left`` is what remains of the budget: one per value, more for long texts."""

    __slots__ = ("behind", "encoder", "left")

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.left = encoder.max_bytes
        self.behind: _HiddenWalk | None = None

    def object_text(self, value: dict[Any, Any], depth: int) -> str:
        if depth > MAX_DEPTH:
            raise too_deep()
        self.left -= len(value) + 1
        if self.left < 0:
            raise self.too_large()
        known = self.encoder.prefixes
        parts = []
        key: Any = ""
        try:
            for key, item in value.items():
                prefix = known.get(key) if type(key) is str else None
                if prefix is None:
                    prefix = self.key_text(key)
                    if self.masks(key):
                        self.check_hidden(item, depth)
                        parts.append(prefix + self.encoder.mask_text)
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
        except Refused as refused:
            refused.path.append(key if isinstance(key, str) else self.key_shown(key))
            raise
        return "{" + ", ".join(parts) + "}"

    def array_text(self, value: list[Any] | tuple[Any, ...], depth: int) -> str:
        if depth > MAX_DEPTH:
            raise too_deep()
        self.left -= len(value) + 1
        if self.left < 0:
            raise self.too_large()
        parts: list[str] = []
        try:
            for item in value:
                parts.append(self.value_text(item, depth))  # noqa: PERF401 - len(parts) is the path on failure
        except Refused as refused:
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
        raise Refused(
            f"is {_describe(item)}, which JSON cannot hold: pass None, bool, int, float, Decimal, str, "
            "datetime, date, UUID, Enum, dict, list or tuple"
        )

    def string_text(self, item: str) -> str:
        if len(item) > _SHORT:
            self.spend(len(item))
        if "\0" in item:
            raise Refused(f"contains the character U+0000, which PostgreSQL cannot store{self.shown(item)}")
        if not item.isascii() and has_surrogate(item):
            raise Refused(f"contains a lone surrogate, which is not valid Unicode text{self.shown(item)}")
        quoted: str = _quote(item)
        return quoted

    def integer_text(self, item: int) -> str:
        if -_WORD < item < _WORD:
            return int.__repr__(item)
        if not -_INT_LIMIT < item < _INT_LIMIT:
            raise Refused(f"is an integer of more than {MAX_DIGITS:,} digits{self.shown(item)}")
        # By way of Decimal, since Python can be told to print no integer of more than 640 digits.
        text = str(Decimal(item))
        self.spend(len(text))
        return text

    def float_text(self, item: float) -> str:
        if not math.isfinite(item):
            raise Refused(f"is not a finite number, which JSON cannot hold{self.shown(item)}")
        return float.__repr__(item)

    def decimal_text(self, item: Decimal) -> str:
        _sign, digits, exponent = item.as_tuple()
        if not isinstance(exponent, int):
            raise Refused(f"is not a finite number, which JSON cannot hold{self.shown(item)}")
        if len(digits) > MAX_DIGITS or abs(exponent) > MAX_EXPONENT:
            raise Refused(
                f"is a Decimal beyond {MAX_DIGITS:,} digits or an exponent of {MAX_EXPONENT:,} either way"
                f"{self.shown(item)}"
            )
        text = Decimal.__str__(item)
        self.spend(len(text))
        return text

    def scalar_text(self, item: datetime | date | UUID) -> str:
        if not isinstance(item, datetime):
            return str(item) if isinstance(item, UUID) else item.isoformat()
        if item.utcoffset() is None:
            raise Refused(f"is a naive datetime; pass an aware one, as datetime.now(UTC){self.shown(item)}")
        try:
            return iso_utc(item)
        except OverflowError:
            raise Refused(f"lies outside the years 1 to 9999 in UTC{self.shown(item)}") from None

    def key_text(self, key: Any) -> str:
        """Return a key that is not known yet, or masked, as text; remember it, unless it is masked."""
        if not isinstance(key, str):
            raise Refused(f"is a key of type {type(key).__name__}; keys must be strings")
        key = str.__str__(key)
        if len(key) > _SHORT:
            self.spend(len(key))
        if "\0" in key or has_surrogate(key):
            raise Refused("is a key with U+0000 or a lone surrogate, which PostgreSQL cannot store")
        prefix: str = _quote(key) + ": "
        known = self.encoder.prefixes
        if len(known) < _KNOWN_KEYS and len(key) <= _SHORT and not self.encoder.masks(key):
            known[key] = prefix
        return prefix

    def masks(self, key: str) -> bool:
        """Whether the value under ``key`` is replaced."""
        return self.encoder.masks(key)

    def check_hidden(self, item: Any, depth: int) -> None:
        """Check what the mask is about to replace: it must be a payload too."""
        if self.behind is None:
            self.behind = _HiddenWalk(self.encoder)
        self.behind.value_text(item, depth)

    def spend(self, characters: int) -> None:
        """Take ``characters`` off the budget."""
        self.left -= characters
        if self.left < 0:
            raise self.too_large()

    def too_large(self) -> Refused:
        """Return the refusal of what exceeds the budget."""
        return Refused(f"makes the event larger than `max_event_bytes` ({self.encoder.max_bytes:,})", endless=True)

    def shown(self, item: object) -> str:
        """Return the value for the message."""
        return f" (got {got(item) if isinstance(item, int) else shorten(repr(item))})"

    def key_shown(self, key: object) -> str:
        """Return a key that is no string, for the path."""
        return got(key)


class _HiddenWalk(Walk):
    """Checks what stands below masked keys. It is not stored, so its size does not count, and it is not shown."""

    __slots__ = ("deepest", "heights")

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.left = max(16 * encoder.max_bytes, 2**24)
        # How many levels each checked container has: one that is mentioned a thousand times is checked once.
        self.heights: dict[int, int] = {}
        self.deepest = 0

    def object_text(self, value: dict[Any, Any], depth: int) -> str:
        return self.check_once(super().object_text, value, depth)

    def array_text(self, value: list[Any] | tuple[Any, ...], depth: int) -> str:
        return self.check_once(super().array_text, value, depth)

    def check_once(self, check: Callable[[Any, int], str], value: Any, depth: int) -> str:
        """Check a container, unless that was done and all its levels are within the limit here, too."""
        outer = self.deepest
        self.deepest = depth + self.heights.get(id(value), 2 * MAX_DEPTH)
        if self.deepest > MAX_DEPTH:
            self.deepest = depth
            check(value, depth)
            self.heights[id(value)] = self.deepest - depth
        self.deepest = max(outer, self.deepest)
        return ""

    def masks(self, key: str) -> bool:
        return False

    def too_large(self) -> Refused:
        return Refused("is too large to be checked, even though it is masked", endless=True)

    def shown(self, item: object) -> str:
        return ""

    def key_shown(self, key: object) -> str:
        return f"an instance of {type(key).__name__}"


def too_deep() -> Refused:
    """Return the refusal of what is nested too deep."""
    return Refused(f"is nested deeper than {MAX_DEPTH} levels", endless=True)


def _refusal_error(root: Any, field: str, refused: Refused) -> ValidationError:
    steps = refused.path[::-1]
    reason = refused.reason
    if refused.endless:
        closing = _cycle_length(root, steps)
        if closing is not None:
            steps, reason = steps[:closing], "refers back to a container that holds it (a cycle)"
    path = field + "".join(f"[{step}]" if isinstance(step, int) else "." + printable(step) for step in steps)
    return ValidationError(f"`{path}` {reason}", field=path)


def _cycle_length(root: Any, steps: list[str | int]) -> int | None:
    """Return how many steps lead from ``root`` to the first container met a second time, if any is."""
    seen = {id(root)}
    value = root
    for count, step in enumerate(steps, 1):
        value = value[step]
        while isinstance(value, Enum):
            value = value.value
        if id(value) in seen:
            return count
        seen.add(id(value))
    return None


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

    An integer is an ``int`` (a ``Decimal`` if it has more digits than Python converts: 4,300, see
    `sys.set_int_max_str_digits`); another number is the ``float`` that prints the same number, else a ``Decimal``.
    """
    try:
        return _scan(text, 0)[0]
    except RecursionError:
        return _decode_deep(text)


def _number(text: str) -> float | Decimal:
    value = float(text)
    if repr(value) == text:
        return value
    exact = Decimal(text)
    return value if math.isfinite(value) and Decimal(repr(value)) == exact else exact


def _whole_number(text: str) -> int | Decimal:
    try:
        return int(text)
    except ValueError:
        return Decimal(text)


_DECODER = json.JSONDecoder(parse_float=_number, parse_int=_whole_number)
# PostgreSQL prints nothing around a value, so nothing has to be skipped.
_scan: Callable[[str, int], tuple[Any, int]] = _DECODER.scan_once  # type: ignore[attr-defined]
_PIECE = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*"|[][{}]|[^][{}:,"\s]+)(\s*:)?')


def _decode_deep(text: str) -> Any:
    """Decode what other writers nested deeper than Python's stack allows."""
    root: list[Any] = []
    containers: list[Any] = [root]
    key = ""
    for piece, colon in _PIECE.findall(text):
        if colon:
            key = _DECODER.decode(piece)
        elif piece in "]}":
            containers.pop()
        else:
            value = {"[": [], "{": {}}[piece] if piece in "[{" else _DECODER.decode(piece)
            if type(containers[-1]) is dict:
                containers[-1][key] = value
            else:
                containers[-1].append(value)
            if piece in "[{":
                containers.append(value)
    return root[0]


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
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    # PostgreSQL's numeric knows no negative zero.
    return f"{number.copy_abs() if number.is_zero() else number:f}"
