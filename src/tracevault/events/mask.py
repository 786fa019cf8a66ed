"""Masking: the value under a secret's key never leaves the process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tracevault.errors import ValidationError

DEFAULT_MASK_VALUE = "[REDACTED]"


def fold(key: str) -> str:
    """Return ``key`` as it is compared: by Unicode case folding, the i's of Turkish taken as one letter."""
    folded = key.casefold()
    return folded if folded.isascii() else folded.replace("i\u0307", "i").replace("\u0131", "i")


def masked_names(fields: Iterable[str]) -> frozenset[str]:
    """Return ``fields`` as they are compared: whole keys, without regard to case."""
    if isinstance(fields, str):  # its letters would be taken for keys, and the secret would get out
        raise ValidationError(f'`fields` must be a list of keys: ["{fields[:32]}"], not a string', field="fields")
    return frozenset(map(fold, fields))


def mask(value: Any, fields: Iterable[str], mask_value: str = DEFAULT_MASK_VALUE) -> Any:
    """Return a deep copy of ``value`` in which whatever stands under a key named in ``fields`` is replaced.

    Keys match whole and case-insensitively, at any depth of mappings (which become dicts), lists and tuples;
    the whole subtree is replaced, also where it is None. Other objects are kept as they are. The input is
    never changed; a container that appears twice is copied once, so cycles are safe.
    """
    return _copy(value, masked_names(fields), mask_value, {})


def _copy(value: Any, names: frozenset[str], mask_value: str, copies: dict[int, Any]) -> Any:
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Mapping):
        copy: dict[Any, Any] = {}
        copies[id(value)] = copy
        for key, item in value.items():
            hidden = isinstance(key, str) and fold(key) in names
            copy[key] = mask_value if hidden else _copy(item, names, mask_value, copies)
        return copy
    if isinstance(value, list):
        items: list[Any] = []
        copies[id(value)] = items
        items.extend(_copy(item, names, mask_value, copies) for item in value)
        return items
    if isinstance(value, tuple):
        # A tuple can only be part of a cycle through a list or mapping, which the memo stops.
        copies[id(value)] = tuple([_copy(item, names, mask_value, copies) for item in value])
        return copies[id(value)]
    return value
