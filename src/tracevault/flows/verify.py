"""What a verification asks the database. It believes none of it: all is compared with what was signed.

Columns are cast to the types that they were made with: whoever owns the database may have changed those as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from tracevault.events.record import GENERATED_COLUMNS
from tracevault.flows import Flow, Query
from tracevault.flows.seal import Tree
from tracevault.integrity.leaf import READ
from tracevault.schema.custody import ERASED, PRUNED
from tracevault.schema.ddl import generation_expression
from tracevault.schema.trees import ANCHORS, CHECKPOINTS, ERASURES, LEAVES, TILES, TREES

# Values of the third column of `rows_sql`.
GONE, THERE, OTHER_TIME, NOT_DERIVED = 0, 1, 2, 3

# How far a row's `created_at` is from now, in seconds. One in the future is as suspicious as one long past; "infinity"
# can be stored, and a column may have lost its NOT NULL.
_AGE = (
    "coalesce(least(abs(extract(epoch FROM clock_timestamp())::float8 - extract(epoch FROM r.created_at)::float8), "
    "1e15), 1e15)"
)


def prepare() -> Flow[None]:
    """Let texts come as UTF-8, a policy that would hide rows from this role be an error, and take any time."""
    yield Query("SET LOCAL client_encoding = 'UTF8'", reads=False)
    yield Query("SET LOCAL statement_timeout = 0", reads=False)
    yield Query("SET LOCAL row_security = off", reads=False)


def share_snapshot(process: int) -> Flow[str | None]:
    """Let other sessions see what this transaction sees; return the name of that, or None where it cannot be.

    ``process`` is the server's, as it said when we connected: a pooler has named another one.
    """
    found = yield Query(
        "SELECT CASE WHEN pg_catalog.pg_backend_pid() = $1 "
        "AND pg_catalog.has_function_privilege('pg_catalog.pg_export_snapshot()', 'EXECUTE') "
        "THEN pg_catalog.pg_export_snapshot() END",
        (process,),
    )
    name = found.rows[0][0]
    return None if name is None else str(name)


def use_snapshot(name: str) -> Flow[None]:
    """See what the transaction sees that shares this snapshot, for as long as that takes. To be run first of all."""
    quoted = name.replace("'", "''")
    yield Query(f"SET TRANSACTION SNAPSHOT '{quoted}'", reads=False)
    yield Query("SET LOCAL statement_timeout TO 0", reads=False)


_WHOLESALE = ("enable_hashjoin", "enable_mergejoin", "enable_seqscan", "enable_bitmapscan")


def stream(on: bool) -> Flow[None]:
    """Let the rows of leaves come one by one in their order, from the indexes, while others are hashed.

    Otherwise PostgreSQL may read the whole table for each piece of it, and sort the piece before the first row comes.
    """
    for setting in (*_WHOLESALE, "max_parallel_workers_per_gather"):
        yield Query(
            f"SET LOCAL {setting} TO {('off' if setting in _WHOLESALE else '0') if on else 'DEFAULT'}", reads=False
        )


def rows_sql(tree: Tree, first: int, end: int) -> str:
    """Return the SELECT, for `postgres.run.raw_rows`, of leaves ``first`` to ``end`` in order, with their rows.

    Columns: index, id, what there is of the row (`GONE`, `THERE`, `OTHER_TIME` than the leaf names, or
    `NOT_DERIVED`: a generated column does not follow from the data), what an erasure committed to for data and meta,
    its event, and `integrity.leaf.READ`.
    """
    time = " AND r.occurred_at = l.occurred_at" if tree.partitioned else ""
    return (
        f"SELECT l.index::bigint, l.id::uuid, (CASE WHEN r.id IS NULL THEN {GONE} "
        f"WHEN r.occurred_at IS DISTINCT FROM l.occurred_at THEN {OTHER_TIME} "
        f'WHEN {_FOLLOWS} THEN {THERE} ELSE {NOT_DERIVED} END)::"char", '
        "e.data_commitment::bytea, e.meta_commitment::bytea, e.event_id, "
        f'{_READ} FROM {LEAVES} AS l LEFT JOIN "{tree.table}" AS r ON r.id = l.id{time} '
        f"LEFT JOIN {ERASURES} AS e ON e.tree = l.tree AND e.index = l.index "
        f"WHERE l.tree = {tree.number} AND l.index >= {first} AND l.index < {end} AND l.id IS NOT NULL "
        "ORDER BY l.index"
    )


_READ = ", ".join(f"r.{name}" for name in READ)
# No leaf has the generated columns, since they follow from the data; unless somebody made plain columns of them.
_FOLLOWS = " AND ".join(
    f"r.{name}::text IS NOT DISTINCT FROM {generation_expression(column.generated)}"
    for name, column, _ in GENERATED_COLUMNS
    if column.generated is not None
)


def rows_by_id_sql(tree: Tree, ids: Sequence[UUID]) -> str:
    """Return the SELECT, for `postgres.run.raw_rows`, of rows by id: the id, and `integrity.leaf.READ`."""
    return f"SELECT r.id::uuid, {_READ} FROM \"{tree.table}\" AS r WHERE r.id = ANY ('{{{','.join(map(str, ids))}}}')"


def not_tables(tree: Tree) -> Flow[list[str]]:
    """Return the names that should be those of tables, and are not: a view can show what was never stored."""
    names = [tree.table, TREES, LEAVES, TILES, CHECKPOINTS, ANCHORS, ERASURES]
    found = yield Query(
        "SELECT n.name FROM unnest($1::text[]) WITH ORDINALITY AS n (name, place) "
        "JOIN pg_catalog.pg_class AS c ON c.oid = to_regclass(quote_ident(n.name)) "
        "WHERE c.relkind NOT IN ('r', 'p') ORDER BY n.place",
        (names,),
    )
    return [str(name) for (name,) in found.rows]


def stored_checkpoints(tree: Tree, first: int, last: int, limit: int) -> Flow[list[tuple[int, str]]]:
    """Return sizes and notes of at most ``limit`` checkpoints in the database, of sizes ``first`` to ``last``."""
    found = yield Query(
        f"SELECT size::bigint, coalesce(note::text, '') FROM {CHECKPOINTS} WHERE tree = $1 AND size >= $2 "
        "AND size <= $3 ORDER BY size LIMIT $4",
        (tree.number, first, last, limit),
    )
    return [(size, note) for size, note in found.rows]


def newest_checkpoint(tree: Tree, size: int) -> Flow[str | None]:
    """Return the note of the newest checkpoint of at most ``size`` leaves."""
    found = yield Query(
        f"SELECT note FROM {CHECKPOINTS} WHERE tree = $1 AND size <= $2 ORDER BY size DESC LIMIT 1",
        (tree.number, size),
    )
    return found.rows[0][0] if found.rows else None


def stored_tiles(tree: Tree, level: int, first: int, end: int) -> Flow[dict[int, bytes]]:
    """Return the tiles ``first`` to ``end`` of a level, by number."""
    found = yield Query(
        f"SELECT number::bigint, coalesce(hashes::bytea, '') FROM {TILES} WHERE tree = $1 AND level = $2 "
        "AND number >= $3 AND number < $4",
        (tree.number, level, first, end),
    )
    return dict(found.rows)


def tile_count(tree: Tree) -> Flow[int]:
    """Return how many tiles the lowest level has."""
    found = yield Query(f"SELECT count(*) FROM {TILES} WHERE tree = $1 AND level = 0", (tree.number,))
    return int(found.rows[0][0])


def row_count(tree: Tree) -> Flow[int]:
    """Return how many rows the table has."""
    found = yield Query(f'SELECT count(*) FROM "{tree.table}"')
    return int(found.rows[0][0])


def leaf_count(tree: Tree) -> Flow[int]:
    """Return how many leaves are listed."""
    found = yield Query(f"SELECT count(*) FROM {LEAVES} WHERE tree = $1", (tree.number,))
    return int(found.rows[0][0])


def leaves_outside(tree: Tree, limit: int) -> Flow[list[tuple[int, UUID]]]:
    """Return index and id of at most ``limit`` leaves that the tree's size leaves no place for."""
    found = yield Query(
        f"SELECT index::bigint, id::uuid FROM {LEAVES} WHERE tree = $1 AND (index >= $2 OR index < 0) "
        "ORDER BY index LIMIT $3",
        (tree.number, tree.size, limit),
    )
    return [(index, id_) for index, id_ in found.rows]


def tiles_outside(tree: Tree) -> Flow[list[tuple[int, int]]]:
    """Return level and number of tiles that hold hashes of more leaves than the tree has."""
    found = yield Query(
        f"SELECT t.level::int, t.number::bigint FROM generate_series(0, 7) AS s (level) JOIN {TILES} AS t "
        "ON t.tree = $1 AND t.level = s.level AND t.number >= ($2::bigint >> (8 * s.level + 8)) "
        "WHERE t.number::numeric * 256 + octet_length(t.hashes) / 32.0 > ($2::bigint >> (8 * s.level)) "
        "ORDER BY 1, 2 LIMIT 100",
        (tree.number, tree.size),
    )
    return [(level, number) for level, number in found.rows]


def unsigned_age(tree: Tree, signed: int) -> Flow[float]:
    """Return the age in seconds of the oldest row whose leaf no signed checkpoint covers."""
    found = yield Query(
        f'SELECT max({_AGE}) FROM {LEAVES} AS l JOIN "{tree.table}" AS r ON r.id = l.id '
        "WHERE l.tree = $1 AND l.index >= $2",
        (tree.number, signed),
    )
    return float(found.rows[0][0] or 0)


class Leafless(NamedTuple):
    """A row without a leaf. ``state``: ``waiting``, or what its transaction says against it."""

    id: UUID
    state: str


# A row's transaction that the last sealed snapshot saw was sealed with it; one that no snapshot can see does not exist.
# While a walk over more rows is under way, or the transactions are another server's, nothing can be said.
_STATE = """CASE
  WHEN $2 THEN 'waiting'
  WHEN r.stored_xid IS NULL THEN 'names no transaction'
  WHEN r.stored_xid >= pg_snapshot_xmax(pg_current_snapshot()) THEN 'names a transaction that has not begun'
  WHEN pg_visible_in_snapshot(r.stored_xid, $3::pg_snapshot) THEN 'names a transaction that was sealed without it'
  ELSE 'waiting' END"""


def leafless(tree: Tree, limit: int, *, everywhere: bool) -> Flow[tuple[int, float, int, list[Leafless]]]:
    """Return how many rows wait for a leaf, the age of the oldest in seconds, and how many are suspicious, and which.

    At most ``limit`` of these are named. With ``everywhere`` the whole table is searched; else the transactions that
    were not sealed yet.
    """
    recent = "" if everywhere or tree.walking else "r.stored_xid >= pg_snapshot_xmin($3::pg_snapshot) AND "
    # Elsewhere than in a partitioned table the id alone says which leaf is a row's, whatever became of its time.
    time = " AND l.occurred_at = r.occurred_at" if tree.partitioned else ""
    found = yield Query(
        f"""WITH missing AS MATERIALIZED (
  SELECT r.id::uuid AS id, {_AGE} AS age, {_STATE} AS state
  FROM "{tree.table}" AS r
  WHERE {recent}NOT EXISTS (SELECT FROM {LEAVES} AS l WHERE l.tree = $1 AND l.id = r.id{time})
)
(SELECT NULL::uuid, coalesce(max(age) FILTER (WHERE state = 'waiting'), 0), NULL,
  count(*) FILTER (WHERE state = 'waiting'), count(*) FILTER (WHERE state <> 'waiting') FROM missing)
UNION ALL (SELECT id, NULL, state, NULL, NULL FROM missing WHERE state <> 'waiting' ORDER BY id LIMIT $4)""",
        (tree.number, tree.walking or not tree.same_system, tree.snapshot, limit),
    )
    (_none, oldest, _state, waiting, suspicious), *suspects = found.rows
    return int(waiting), float(oldest), int(suspicious), [Leafless(row[0], row[2]) for row in suspects]


class Remark(NamedTuple):
    """An event with a leaf that says that earlier leaves have lost their rows, or payloads: which, as ranges."""

    id: UUID
    leaf: int
    event: str
    ranges: list[tuple[int, int]]


def remarks(tree: Tree) -> Flow[list[Remark]]:
    """Return the events of prunings and erasures that have a leaf. Whether they are what was sealed is not checked."""
    found = yield Query(
        f"""SELECT r.id::uuid, l.index::bigint, r.event::text, (r.data->'ranges')::text
FROM "{tree.table}" AS r JOIN {LEAVES} AS l ON l.tree = $1 AND l.id = r.id AND l.occurred_at = r.occurred_at
WHERE r.event IN ($2, $3)""",
        (tree.number, PRUNED, ERASED),
    )
    return [Remark(id_, index, event, _ranges(ranges, index)) for id_, index, event, ranges in found.rows]


def _ranges(text: str | None, leaf: int) -> list[tuple[int, int]]:
    """Return what is named before ``leaf``: of what comes after itself an event can say nothing."""
    try:
        return [(int(first), min(int(end), leaf)) for first, end in json.loads(text or "[]")]
    except (TypeError, ValueError, OverflowError, RecursionError):
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
