"""What changed between two versions of one thing."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from tracevault.events.payload import iso_utc


def compute_diff(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return ``{key: {"before": old, "after": new}}`` for each top-level key whose value differs.

    A side on which the key is missing has no entry. Values are compared as the JSON they would be stored as,
    at any depth: key order, and list against tuple, do not matter; ``1`` equals ``1.0`` but not ``True``;
    None is not a missing key. The inputs are not changed.
    """
    old, new = before or {}, after or {}
    diff: dict[str, dict[str, Any]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        if key in old and key in new and same_json(old[key], new[key]):
            continue
        change = {}
        if key in old:
            change["before"] = old[key]
        if key in new:
            change["after"] = new[key]
        diff[key] = change
    return diff


def same_json(one: Any, other: Any) -> bool:
    """Whether two values are stored as the same JSON value.

    No pair of containers is compared twice: neither cycles nor values that appear often cost more than once.
    """
    pairs = [(one, other)]
    compared: set[tuple[int, int]] = set()
    while pairs:
        one, other = map(_plain, pairs.pop())
        if one is other or (id(one), id(other)) in compared:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            if one.keys() != other.keys():
                return False
            pairs.extend((value, other[key]) for key, value in one.items())
        elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            if len(one) != len(other):
                return False
            pairs.extend(zip(one, other, strict=True))
        elif _same_scalar(one, other):
            continue
        else:
            return False
        compared.add((id(one), id(other)))
    return True


def _same_scalar(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return False  # the singletons were compared by identity
    if isinstance(one, (int, float, Decimal)) and isinstance(other, (int, float, Decimal)):
        return _exact(one) == _exact(other)
    return type(one) is type(other) and bool(one == other)


def _plain(value: Any) -> Any:
    while isinstance(value, Enum):
        value = value.value
    if isinstance(value, datetime) and value.utcoffset() is not None:
        try:
            return iso_utc(value)
        except OverflowError:  # outside the years 1 to 9999 in UTC
            return value.isoformat()
    if isinstance(value, (date, UUID)):
        return str(value)
    if isinstance(value, str):
        return str.__str__(value)
    return value


def _exact(number: float | Decimal) -> float | Decimal:
    """A float stands for its shortest decimal text, which is what is stored."""
    return Decimal(repr(float(number))) if isinstance(number, float) else number
