"""Legal holds: placed, listed, released."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from tracevault.flows import Flow, Query
from tracevault.schema.holds import HOLDS, STATEMENT, SUBJECTS

_COLUMNS = ("id", *SUBJECTS, "since", "until", "reason", "placed_at", "placed_by", "released_at", "released_by")


class Hold(NamedTuple):
    """A row of the table of holds."""

    id: UUID
    subjects: dict[str, str]
    since: datetime | None
    until: datetime | None
    reason: str
    placed_at: datetime
    placed_by: str
    released_at: datetime | None
    released_by: str | None


def holds_exist() -> Flow[bool]:
    """Whether there is a table of holds."""
    found = yield Query("SELECT to_regclass($1) IS NOT NULL", (HOLDS,))
    return bool(found.rows[0][0])


def make_holds() -> Flow[None]:
    """Make the table of holds, if it is missing."""
    if not (yield from holds_exist()):
        yield Query(STATEMENT)


def place(table: str, id_: UUID, given: dict[str, Any], reason: str) -> Flow[None]:
    """Place a hold; ``given`` are `SUBJECTS`, ``since`` and ``until``."""
    names = ["id", "table_name", "reason", *given]
    places = ", ".join(f"${number}" for number in range(1, len(names) + 1))
    yield Query(
        f"INSERT INTO {HOLDS} ({', '.join(names)}) VALUES ({places})",
        (id_, table, reason, *given.values()),
        reads=False,
    )


def holds(table: str, *, released: bool = False) -> Flow[list[Hold]]:
    """Return the holds on a table, the newest first; those that are released only if asked for."""
    if not (yield from holds_exist()):
        return []
    found = yield Query(
        f"SELECT {', '.join(_COLUMNS)} FROM {HOLDS} WHERE table_name = $1 AND ($2 OR released_at IS NULL) "
        "ORDER BY placed_at DESC, id DESC",
        (table, released),
    )
    result = []
    for row in found.rows:
        values = dict(zip(_COLUMNS, row, strict=True))
        subjects = {name: values.pop(name) for name in SUBJECTS}
        result.append(Hold(subjects={name: value for name, value in subjects.items() if value is not None}, **values))
    return result


def release(table: str, id_: UUID, reason: str) -> Flow[bool]:
    """Release a hold; return whether it was in force."""
    found = yield Query(
        f"UPDATE {HOLDS} SET released_at = clock_timestamp(), released_by = session_user, release_reason = $3 "
        "WHERE table_name = $1 AND id = $2 AND released_at IS NULL RETURNING 1",
        (table, id_, reason),
    )
    return bool(found.rows)
