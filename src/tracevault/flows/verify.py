"""What a verification asks the database. It believes none of it: all is compared with what was signed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from tracevault.flows import Flow, Query
from tracevault.flows.seal import Tree
from tracevault.integrity.leaf import READ
from tracevault.schema.custody import ERASED, PRUNED
from tracevault.schema.trees import CHECKPOINTS, ERASURES, LEAVES, TILES


def rows_sql(tree: Tree, first: int, end: int) -> str:
    """Return the SELECT, for a binary COPY, of leaves ``first`` to ``end`` in order, with their rows.

    Columns: index, id, whether the row is there, what an erasure committed to for data and meta, its event, and
    `integrity.leaf.READ`.
    """
    time = " AND r.occurred_at = l.occurred_at" if tree.partitioned else ""
    fields = ", ".join(f"r.{name}" for name in READ)
    return (
        "SELECT l.index, l.id, r.id IS NOT NULL, e.data_commitment, e.meta_commitment, e.event_id, "
        f'{fields} FROM {LEAVES} AS l LEFT JOIN "{tree.table}" AS r ON r.id = l.id{time} '
        f"LEFT JOIN {ERASURES} AS e ON e.tree = l.tree AND e.index = l.index "
        f"WHERE l.tree = {tree.number} AND l.index >= {first} AND l.index < {end} ORDER BY l.index"
    )


def stored_checkpoints(tree: Tree) -> Flow[list[tuple[int, str]]]:
    """Return sizes and notes of the checkpoints in the database, ascending."""
    found = yield Query(f"SELECT size, note FROM {CHECKPOINTS} WHERE tree = $1 ORDER BY size", (tree.number,))
    return [(size, note) for size, note in found.rows]


def stored_tiles(tree: Tree, level: int, first: int, end: int) -> Flow[dict[int, bytes]]:
    """Return the tiles ``first`` to ``end`` of a level, by number."""
    found = yield Query(
        f"SELECT number, hashes FROM {TILES} WHERE tree = $1 AND level = $2 AND number >= $3 AND number < $4",
        (tree.number, level, first, end),
    )
    return dict(found.rows)


class Leafless(NamedTuple):
    """A row without a leaf. ``state``: ``waiting``, or what its transaction says against it."""

    id: UUID
    age: float
    state: str


# A row's transaction that the last sealed snapshot saw was sealed with it; one that no snapshot can see does not exist.
_STATE = """CASE
  WHEN $2 THEN 'waiting'
  WHEN r.stored_xid IS NULL THEN 'names no transaction'
  WHEN r.stored_xid >= pg_snapshot_xmax(pg_current_snapshot()) THEN 'names a transaction that has not begun'
  WHEN pg_visible_in_snapshot(r.stored_xid, $3::pg_snapshot) THEN 'names a transaction that was sealed without it'
  ELSE 'waiting' END"""


def leafless(tree: Tree, limit: int, *, everywhere: bool) -> Flow[tuple[int, float, list[Leafless]]]:
    """Return how many rows wait for a leaf, the age of the oldest in seconds, and at most ``limit`` suspicious ones.

    With ``everywhere`` the whole table is searched; else the transactions that were not sealed yet.
    """
    recent = "" if everywhere or tree.walking else "r.stored_xid >= pg_snapshot_xmin($3::pg_snapshot) AND "
    found = yield Query(
        f"""WITH missing AS MATERIALIZED (
  SELECT r.id, extract(epoch FROM clock_timestamp() - r.created_at)::float8 AS age, {_STATE} AS state
  FROM "{tree.table}" AS r
  WHERE {recent}NOT EXISTS (
    SELECT FROM {LEAVES} AS l WHERE l.tree = $1 AND l.id = r.id AND l.occurred_at = r.occurred_at)
)
(SELECT NULL::uuid, coalesce(max(age), 0), count(*)::text FROM missing WHERE state = 'waiting')
UNION ALL (SELECT id, age, state FROM missing WHERE state <> 'waiting' LIMIT $4)""",
        (tree.number, tree.walking or tree.resumed, tree.snapshot, limit),
    )
    (_none, oldest, count), *suspects = found.rows
    return int(count), oldest, [Leafless(*row) for row in suspects]


class Remark(NamedTuple):
    """A sealed event that says that leaves have lost their rows, or rows their payloads: which, as ranges."""

    id: UUID
    leaf: int | None
    event: str
    ranges: list[tuple[int, int]]


def remarks(tree: Tree) -> Flow[list[Remark]]:
    """Return the events of prunings and erasures, with the index of the leaf of each."""
    found = yield Query(
        f"""SELECT r.id, l.index, r.event, r.data->'ranges'
FROM "{tree.table}" AS r LEFT JOIN {LEAVES} AS l ON l.tree = $1 AND l.id = r.id AND l.occurred_at = r.occurred_at
WHERE r.event IN ($2, $3)""",
        (tree.number, PRUNED, ERASED),
    )
    return [Remark(id_, index, event, _ranges(ranges)) for id_, index, event, ranges in found.rows]


def _ranges(value: Any) -> list[tuple[int, int]]:
    try:
        return [(int(first), int(end)) for first, end in value]
    except (TypeError, ValueError):
        return []


def index_of(tree: Tree, id_: UUID) -> Flow[list[tuple[int, datetime]]]:
    """Return the leaves of an id."""
    found = yield Query(f"SELECT index, occurred_at FROM {LEAVES} WHERE tree = $1 AND id = $2", (tree.number, id_))
    return [(index, moment) for index, moment in found.rows]


def leaves_between(tree: Tree, first: int, end: int) -> Flow[Sequence[tuple[Any, ...]]]:
    """Return index and id of the leaves from ``first`` to ``end``."""
    found = yield Query(
        f"SELECT index, id FROM {LEAVES} WHERE tree = $1 AND index >= $2 AND index < $3 ORDER BY index",
        (tree.number, first, end),
    )
    return found.rows
