"""Values of models as payloads hold them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from hashlib import sha256
from math import isfinite
from typing import Any
from uuid import UUID

_PLAIN = (type(None), bool, int, str, UUID)


def plain(value: Any) -> Any:
    """Return a model's value as an event may hold it.

    Numbers, texts, aware times, dates, UUIDs and enums stay what they are, and so does what mappings, lists and sets
    hold. Bytes become their length and their SHA-256; a time without an offset, and anything else, its text.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (float, Decimal)):
        return value if isfinite(value) else str(value)
    if isinstance(value, datetime):
        return value if value.tzinfo is not None else value.isoformat()
    if isinstance(value, date):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        content = bytes(value)
        return {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    return str(value)
