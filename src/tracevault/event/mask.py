"""Masking: the value under a secret's key never leaves the process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

DEFAULT_MASK_VALUE = "[REDACTED]"

T = TypeVar("T")


def masked_names(fields: Iterable[str]) -> frozenset[str]:
    """Return ``fields`` as they are compared: whole keys, without regard to case (Unicode case folding)."""
    return frozenset(field.casefold() for field in fields)


def mask(value: T, fields: Iterable[str], mask_value: str = DEFAULT_MASK_VALUE) -> T:
    """Return a deep copy of ``value`` in which whatever stands under a key named in ``fields`` is replaced.

    Keys match whole and case-insensitively, at any depth of dicts, lists and tuples; the whole subtree is
    replaced, also where it is None. Other objects are kept as they are. The input is never changed; a
    container that appears twice is copied once, so cycles are safe.
    """
    copied: Any = _copy(value, masked_names(fields), mask_value, {})
    return copied  # type: ignore[no-any-return]


def _copy(value: Any, names: frozenset[str], mask_value: str, copies: dict[int, Any]) -> Any:
    if isinstance(value, dict):
        if id(value) not in copies:
            copy: dict[Any, Any] = {}
            copies[id(value)] = copy
            for key, item in value.items():
                hidden = isinstance(key, str) and key.casefold() in names
                copy[key] = mask_value if hidden else _copy(item, names, mask_value, copies)
        return copies[id(value)]
    if isinstance(value, list):
        if id(value) not in copies:
            items: list[Any] = []
            copies[id(value)] = items
            items.extend(_copy(item, names, mask_value, copies) for item in value)
        return copies[id(value)]
    if isinstance(value, tuple):
        # A tuple can only be part of a cycle through a list or dict, which the memo stops.
        return tuple(_copy(item, names, mask_value, copies) for item in value)
    return value
