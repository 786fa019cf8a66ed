"""How the log is followed: in an order in which no row is ever skipped, however late its transaction commits.

A step takes a snapshot, and then the rows that it sees and the one before did not: those of transactions that began
later, and of those that were under way, looked up one by one. So a transaction that stays open holds nobody up. Within
a step they come by (stored_xid, id). Rows without ``stored_xid``, older than the column, come first.

On a standby a snapshot does not tell which transactions are under way, but none below its xmin is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tracevault.errors import ValidationError
from tracevault.events.record import AuditRecord
from tracevault.flows import Flow, Query
from tracevault.flows.read import record, select
from tracevault.schema.filters import Condition, count_condition
from tracevault.schema.position import BEFORE_ALL, BEFORE_TRANSACTIONS, Position, Snapshot, read_position
from tracevault.schema.restriction import Restriction

BEGINNING = "beginning"
_NOW = (
    "SELECT (SELECT system_identifier FROM pg_control_system())::text, pg_is_in_recovery(), pg_current_snapshot()::text"
)


class Follower(NamedTuple):
    """A checked follower: which events of which table, and where it stands; None is for "from now on"."""

    table: str
    condition: Condition
    seen: Restriction
    after: Position | str | None


class Step(NamedTuple):
    """The next rows, each with the position after it.

    ``begun`` is the position before them, and ``position`` that after all, also of those that do not match.
    """

    rows: list[tuple[AuditRecord, Position]]
    begun: Position
    position: Position
    at_end: bool
    """Whether every row that could be had was had."""


def channel(table: str) -> str:
    """Return the channel on which followers of a table are told; of any length, and with any letters, the table is."""
    return f"tracevault_{hashlib.sha256(table.encode()).hexdigest()[:16]}"


def notify(tables: Sequence[str]) -> Flow[None]:
    """Tell the followers of ``tables`` that there may be something new."""
    yield Query("SELECT pg_notify(name, '') FROM unnest($1::text[]) AS name", ([channel(table) for table in tables],))


def follower(table: str, filters: Mapping[str, Any], after: Any, seen: Restriction) -> Follower:
    """Check the arguments of `tail`."""
    place = after if after in (None, BEGINNING) else read_position(after, "after")
    return Follower(table, count_condition(filters, "tail", seen), seen, place)


def step(follower: Follower, position: Position | None, limit: int) -> Flow[Step]:
    """Return the flow that takes at most ``limit`` rows more; ``position`` is None for the first step."""
    system, now = yield from _now()
    if position is None:
        if follower.after == BEGINNING:
            yield from _check_own(follower.table)
        position = _begin(follower.after, system, now)
        if follower.after is None:
            return Step([], position, position, at_end=True)
    if position.system != system:
        raise ValidationError(
            "`after` was reached on another server, whose transactions are not this one's: the database was restored "
            'or copied. Follow it anew, after="beginning" or by time',
            field="after",
        )
    begun = position
    if position.done == BEFORE_ALL:
        taken = yield from _take(follower, position, limit)
        full = len(taken) >= limit
        return Step(taken, begun, taken[-1][1] if full else Position(system, BEFORE_TRANSACTIONS), at_end=False)
    if position.target is None:
        position = Position(system, position.done, target=now)
    assert position.target is not None
    taken = yield from _take(follower, position, limit)
    if len(taken) >= limit:
        return Step(taken, begun, taken[-1][1], at_end=False)
    after_all = Position(system, position.done.union(position.target))
    return Step(taken, begun, after_all, at_end=position.target == now)


def _now() -> Flow[tuple[str, Snapshot]]:
    found = yield Query(_NOW)
    system, standby, snapshot = found.rows[0]
    now = Snapshot.parse(snapshot)
    return system, Snapshot(now.xmin, now.xmin, ()) if standby else now


def _check_own(table: str) -> Flow[None]:
    """Refuse a table whose rows speak of transactions that this server has not had: it was restored from a dump."""
    found = yield Query(
        f'SELECT EXISTS (SELECT FROM "{table}" WHERE stored_xid >= pg_snapshot_xmax(pg_current_snapshot()))'
    )
    if found.rows[0][0]:
        raise ValidationError(
            f"`after` cannot be the beginning: table `{table}` was restored from another server, whose transactions "
            "mean nothing here. Read what is there by `iterate`, and see the documentation of `tail`",
            field="after",
        )


def _begin(after: Position | str | None, system: str, now: Snapshot) -> Position:
    if isinstance(after, Position):
        return after
    return Position(system, now if after is None else BEFORE_ALL)


def _take(follower: Follower, position: Position, limit: int) -> Flow[list[tuple[AuditRecord, Position]]]:
    """Take rows after ``position``, in its walk or among those of no known transaction."""
    where = follower.condition
    if position.done == BEFORE_ALL:
        where = where.also("stored_xid IS NULL")
        if position.id is not None:
            where = where.also("id > {}", position.id)
        parts = [where.where]
    else:
        where = where.also("pg_visible_in_snapshot(stored_xid, {}::pg_snapshot)", str(position.target))
        if position.id is not None:
            where = where.also("(stored_xid, id) > ({}::xid8, {})", str(position.xid), position.id)
        first = len(where.params) + 1
        where = Condition(where.where, (*where.params, str(position.done), str(position.target)))
        done, target = f"${first}::pg_snapshot", f"${first + 1}::pg_snapshot"
        parts = [
            f"{where.where} AND stored_xid >= pg_snapshot_xmax({done}) AND stored_xid < pg_snapshot_xmax({target})",
            f"{where.where} AND stored_xid = ANY (ARRAY(SELECT pg_snapshot_xip({done})))",
        ]
    # In a partitioned table an id can stand twice, and both rows may be of one transaction.
    order = f"ORDER BY stored_xid, id FETCH FIRST {limit} ROWS WITH TIES"
    columns = f"{select(follower.seen)}, stored_xid::text AS shown, stored_xid AS xid, id AS row_id"
    selects = (f'(SELECT {columns} FROM "{follower.table}" {part} {order})' for part in parts)
    ordered = order.replace("stored_xid, id", "xid, row_id")
    found = yield Query(f"SELECT * FROM ({' UNION ALL '.join(selects)}) AS rows {ordered}", where.params)
    places = [(None if row[-3] is None else int(row[-3]), row[-1]) for row in found.rows]
    reached = position
    taken = []
    for number, (row, place) in enumerate(zip(found.rows, places, strict=True)):
        if place not in places[number + 1 : number + 2]:
            reached = replace(position, xid=place[0], id=place[1])
        taken.append((record(row), reached))
    return taken
