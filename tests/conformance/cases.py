"""The conformance data: what Tracevault 1.0.1 for Node.js was seen to do, and how ours is compared with it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "reference-1.0.1.json").read_text())


class Unstorable:
    """A value that JSON cannot hold."""


def decoded(value: Any, dsn: str = "") -> Any:
    """Return a case's value with its tags replaced by what they stand for."""
    if value == "$DSN":
        return dsn
    if isinstance(value, list):
        return [decoded(item, dsn) for item in value]
    if not isinstance(value, dict):
        return value
    match list(value):
        case ["$float"]:
            return float(value["$float"].replace("Infinity", "inf"))
        case ["$datetime"]:
            return datetime.fromisoformat(value["$datetime"])
        case ["$object"]:
            return {1, 2} if value["$object"] == "Set" else Unstorable()
        case ["$cycle"]:
            cycle: dict[str, Any] = {"b": {}}
            cycle["b"]["c"] = cycle
            return cycle
    return {key: decoded(item, dsn) for key, item in value.items()}


def same(found: Any, expected: Any) -> bool:
    """Compare as JSON values: numbers by value, booleans apart."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, (int, float, Decimal)) and isinstance(expected, (int, float, Decimal)):
        return Decimal(str(found)) == Decimal(str(expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(found, datetime) and isinstance(expected, str):
        return found == datetime.fromisoformat(expected).astimezone(UTC)
    return bool(found == expected)


def field_matches(found: str | None, expected: str | None) -> bool:
    """A null field is not compared, and ours may be longer."""
    return expected is None or (found or "").startswith(expected)
