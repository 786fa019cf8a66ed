"""How rows are sealed: which ones, in what order, and what is stored of them.

Every flow here runs in a transaction of its own under REPEATABLE READ. A row gets its leaf once it is committed: taken
are those that the present snapshot sees and the last sealed one did not. So a transaction that commits late loses
nothing, and one that stays open holds nobody up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from tracevault.errors import SealError
from tracevault.flows import Flow, Query
from tracevault.integrity.leaf import CANARY_HASH, canary_sql, hash_sql, leaf_prefix
from tracevault.integrity.merkle import EMPTY_ROOT
from tracevault.integrity.tiles import Growth, right_edge
from tracevault.schema.custody import define_custody
from tracevault.schema.holds import HOLDS
from tracevault.schema.trees import ANCHORS, CHECKPOINTS, ERASURES, LEAVES, TILES, TREES, tree_statements

HASH = 32
# A snapshot that brings no row and is at most so many transactions newer is not stored.
_IDLE = 1000
_TABLES_LOCK = 0x74726165
# What is signed must be on the disk before: after a crash the signer would see a rollback. So must the note, which is
# not signed again until the tree grows.
_DURABLE = """set_config('synchronous_commit', CASE WHEN current_setting('synchronous_commit') IN ('off', 'local')
  THEN 'on' ELSE current_setting('synchronous_commit') END, true)"""


@dataclass(frozen=True)
class Tree:
    """A row of ``tracevault_trees``: what is sealed of one audit table."""

    number: int
    name: str
    epoch: int
    table: str
    origin: str
    size: int
    root: bytes
    snapshot: str
    target: str | None
    walk: str
    resumed: bool
    partitioned: bool
    same_system: bool
    """Whether this is the server whose transactions `snapshot` speaks of."""
    after: tuple[str | None, UUID, str] | None
    """Transaction, id and time of the last row of a walk. The time is text: Python has none for infinity."""

    @property
    def walking(self) -> bool:
        """Whether a walk over more rows than one batch is under way."""
        return self.walk != "snapshot" or self.target is not None


_TREE = f"""SELECT t.tree, t.name, t.epoch, t.table_name, t.origin, t.size, t.root, t.snapshot::text, t.target::text,
  t.walk, t.resumed,
  coalesce((SELECT c.relkind = 'p' FROM pg_class AS c WHERE c.oid = to_regclass(quote_ident(t.table_name))), false),
  t.system_identifier = (SELECT s.system_identifier FROM pg_control_system() AS s),
  t.after_xid::text, t.after_id, t.after_time::text
FROM {TREES} AS t
WHERE t.table_name = $1 AND t.epoch = (SELECT max(e.epoch) FROM {TREES} AS e WHERE e.table_name = $1)"""


def find_tree(table: str, *, lock: bool = False) -> Flow[Tree | None]:
    """Return the present tree of ``table``; with ``lock`` None as well where somebody else is sealing it."""
    result = yield Query(_TREE + (" FOR UPDATE OF t SKIP LOCKED" if lock else ""), (table,))
    if not result.rows:
        return None
    *columns, after_xid, after_id, after_time = result.rows[0]
    after = None if after_id is None else (after_xid, after_id, after_time)
    return Tree(*(*columns, after))


def make_tables() -> Flow[None]:
    """Make the tables of `schema.trees`, and the functions of `schema.custody`; two at once wait for each other."""
    yield Query("SELECT pg_advisory_xact_lock($1)", (_TABLES_LOCK,))
    for statement in (*tree_statements(), define_custody()):
        yield Query(statement, reads=False)


def tables_exist() -> Flow[bool]:
    """Whether the tables of `schema.trees` are there."""
    # The last two that are made; holds may have been made alone.
    found = yield Query("SELECT to_regclass($1) IS NOT NULL AND to_regclass($2) IS NOT NULL", (ERASURES, HOLDS))
    return bool(found.rows[0][0])


def sealed_tree(table: str) -> Flow[Tree | None]:
    """Return the present tree of ``table``; None where it was never sealed."""
    return (yield from find_tree(table)) if (yield from tables_exist()) else None


def check_canary() -> Flow[None]:
    """Make sure that this server hashes a known row as everybody else does; else `SealError`, before it hashes ours."""
    found = yield Query(canary_sql())
    if bytes(found.rows[0][0]) != CANARY_HASH:
        raise SealError(
            "this server hashes a row otherwise than it should, so nothing that it seals could be verified: is the "
            "database's encoding UTF8?"
        )


def estimate(table: str) -> Flow[int]:
    """Return about how many rows the table has; 0 where PostgreSQL has not counted."""
    found = yield Query(
        "SELECT coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint FROM pg_class AS c WHERE c.relkind = 'r' AND "
        "(c.oid = to_regclass(quote_ident($1)) OR c.oid IN "
        "(SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass(quote_ident($1))))",
        (table,),
    )
    return int(found.rows[0][0])


def has_checkpoints(tree: Tree) -> Flow[bool]:
    """Whether a checkpoint of ``tree`` was ever signed."""
    found = yield Query(f"SELECT EXISTS (SELECT FROM {CHECKPOINTS} WHERE tree = $1)", (tree.number,))
    return bool(found.rows[0][0])


def plant(table: str, origin: str, *, name: str | None = None, epoch: int = 1) -> Flow[None]:
    """Begin a tree, unless it is there. Its name stands in every leaf and never changes; by default the table's."""
    yield Query(f"SELECT {_DURABLE}")
    yield Query(
        f"INSERT INTO {TREES} (name, epoch, table_name, origin, root, system_identifier) "
        "SELECT $1, $2, $3, $4, $5, system_identifier FROM pg_control_system() ON CONFLICT DO NOTHING",
        (name or table, epoch, table, origin, EMPTY_ROOT),
        reads=False,
    )


# Rows that the snapshot $4 does not see, and $5 might.
_UNSEEN = (
    "r.stored_xid >= pg_snapshot_xmin($4::pg_snapshot) AND r.stored_xid < pg_snapshot_xmax($5::pg_snapshot) "
    "AND NOT pg_visible_in_snapshot(r.stored_xid, $4::pg_snapshot)"
)
# The same in two parts: transactions that began later, and those that were under way, looked up one by one. From the
# oldest of them on, sealed rows would be read in each round for as long as somebody keeps a transaction open.
_LATER = "r.stored_xid >= pg_snapshot_xmax($4::pg_snapshot) AND r.stored_xid < pg_snapshot_xmax($5::pg_snapshot)"
_UNDER_WAY = "r.stored_xid = ANY (ARRAY(SELECT pg_snapshot_xip($4::pg_snapshot)))"
# Statistics of a table that is new or grows fast tempt the planner to sort all of a backlog for each batch.
_BY_INDEX = "set_config('enable_sort', 'off', true)"
# Its costs are guessed too high where statistics are missing, and then compiling takes longer than all the rest.
_UNCOMPILED = "set_config('jit', 'off', true)"
# A vault's connections end a statement after its option `timeout`; a batch of a table without indexes takes longer.
_UNHURRIED = "set_config('statement_timeout', '0', true)"


def _picked(tree: Tree, limit: int) -> Query:
    """Return the statement that gives leaves to the next rows: it returns their hashes in one piece, and how many."""
    params: list[Any] = [b"\x00" + leaf_prefix(tree.name), tree.number, tree.size]
    # Within a transaction by id, which for ours is the order of emits. In a partitioned table an id can stand twice.
    order = ["r.id", "r.occurred_at"] if tree.partitioned else ["r.id"]
    # As a scalar, so that it is looked up in the index whatever the planner thinks of the table's size.
    leafless = (
        f"(SELECT true FROM {LEAVES} AS l WHERE l.tree = $2 AND l.id = r.id AND l.occurred_at = r.occurred_at) IS NULL"
    )
    conditions = [leafless] if tree.walk == "scan" or tree.resumed else []
    parts: tuple[str, ...] = ()
    if tree.walk == "legacy":
        conditions.append("r.stored_xid IS NULL")
    elif tree.walk == "snapshot":
        order.insert(0, "r.stored_xid")
        params += [tree.snapshot, tree.target]
        conditions.append("pg_visible_in_snapshot(r.stored_xid, $5::pg_snapshot)")
        # Within a walk the index is entered behind the last row.
        parts = (_LATER, _UNDER_WAY) if tree.after is None else (_UNSEEN,)
    if tree.after is not None:
        after = dict(zip(("r.stored_xid", "r.id", "r.occurred_at"), tree.after, strict=True))
        first = len(params) + 1
        casts = {"r.stored_xid": "::xid8", "r.id": "::uuid", "r.occurred_at": "::text::timestamptz"}
        places = (f"${first + number}{casts[column]}" for number, column in enumerate(order))
        conditions.append(f"({', '.join(order)}) > ({', '.join(places)})")
        params += [after[column] for column in order]
    ordered = f"ORDER BY {', '.join(order)} LIMIT {limit}"
    rows = " UNION ALL ".join(
        f'(SELECT r.* FROM "{tree.table}" AS r WHERE {" AND ".join((*conditions, part))} {ordered})'
        for part in parts or ("true",)
    )
    sql = f"""WITH picked AS MATERIALIZED (
  SELECT row_number() OVER (ORDER BY {", ".join(order)}) - 1 AS place, r.id, r.occurred_at,
    {hash_sql("$1::bytea")} AS hash
  FROM ({rows}) AS r
  {ordered}
), added AS (
  INSERT INTO {LEAVES} (tree, index, id, occurred_at)
  SELECT $2, $3::bigint + place, id, occurred_at FROM picked
)
SELECT coalesce(string_agg(hash, ''::bytea ORDER BY place), ''), count(*) FROM picked"""
    return Query(sql, tuple(params))


class Sealed(NamedTuple):
    """What one transaction sealed: the tree as it is then, how many rows, and whether its own snapshot is sealed next.

    It is not where it went on with a walk that has another target: rows that were committed since wait for the next.
    """

    tree: Tree
    rows: int
    current: bool


def seal_rows(table: str, limit: int) -> Flow[Sealed | None]:
    """Give leaves to at most ``limit`` rows; None if another does it.

    Raises `SealError` if the hashes that are stored do not make the root that is stored.
    """
    tree = yield from find_tree(table, lock=True)
    if tree is None:
        return None
    if not tree.same_system:
        raise SealError(
            f"the tree of table `{table}` was begun on another server, so its transactions are not this one's: the "
            "database was restored or copied. Run `tracevault seal --resume` to go on with what is here"
        )
    now = yield Query(
        "SELECT pg_current_snapshot()::text, pg_snapshot_xmax(pg_current_snapshot())::text::bigint "
        f"- pg_snapshot_xmax($1::pg_snapshot)::text::bigint < $2, {_DURABLE}, {_BY_INDEX}, {_UNCOMPILED}, {_UNHURRIED}",
        (tree.snapshot, _IDLE),
    )
    target, idle, *_ = now.rows[0]
    current = tree.target is None
    tree = replace(tree, target=tree.target or target)
    picked = yield _picked(tree, limit)
    hashes, count = picked.rows[0]
    if count == 0 and idle and current and tree.walk == "snapshot":
        # To store the snapshot would be a transaction, and so another snapshot.
        return Sealed(replace(tree, target=None), 0, current)
    grown = (yield from _grow(tree, hashes)) if count else tree
    if count == limit:
        grown = replace(grown, after=(yield from _last(grown)))
    elif tree.walk == "legacy":
        grown = replace(grown, walk="snapshot", target=target, after=None)
        current = True
    else:  # the walk has come to its end
        assert tree.target is not None
        grown = replace(grown, snapshot=tree.target, target=None, walk="snapshot", after=None)
    yield from _store(grown)
    return Sealed(grown, count, current)


def _last(tree: Tree) -> Flow[tuple[str | None, UUID, str]]:
    # By the leaf; the join finds the transaction.
    time = " AND r.occurred_at = l.occurred_at" if tree.partitioned else ""
    found = yield Query(
        "SELECT r.stored_xid::text, l.id, l.occurred_at::text "
        f'FROM {LEAVES} AS l JOIN "{tree.table}" AS r ON r.id = l.id'
        f"{time} WHERE l.tree = $1 AND l.index = $2",
        (tree.number, tree.size - 1),
    )
    xid, id_, moment = found.rows[0]
    return xid, id_, moment


def _grow(tree: Tree, hashes: bytes) -> Flow[Tree]:
    """Add leaf hashes to the stored tiles; return the tree as it is with them."""
    edge = yield from read_edge(tree)
    growth = Growth(tree.size, edge)
    if growth.root != tree.root:
        raise SealError(
            f"the stored hashes of the tree of table `{tree.table}` do not make its root, so they were changed; "
            "`tracevault verify` says more"
        )
    growth.add(hashes[place : place + HASH] for place in range(0, len(hashes), HASH))
    for level, number, content in growth.changes():
        yield Query(
            f"INSERT INTO {TILES} AS t (tree, level, number, hashes) VALUES ($1, $2, $3, $4) "
            "ON CONFLICT (tree, level, number) DO UPDATE SET hashes = excluded.hashes "
            "WHERE length(t.hashes) < length(excluded.hashes)",
            (tree.number, level, number, content),
            reads=False,
        )
    return replace(tree, size=growth.size, root=growth.root)


def read_edge(tree: Tree) -> Flow[dict[int, bytes]]:
    """Return the hashes of the incomplete tile of each level."""
    partial = right_edge(tree.size)
    found = yield from read_tiles(tree.number, [(tile.level, tile.number) for tile in partial])
    edge = {}
    for tile in partial:
        hashes = found.get((tile.level, tile.number), b"")
        if len(hashes) < tile.width * HASH:
            raise SealError(
                f"tree {tree.number} has {tree.size} leaves, and hashes of them are missing in {TILES}; "
                "`tracevault verify` says more"
            )
        edge[tile.level] = hashes[: tile.width * HASH]
    return edge


def read_tiles(number: int, tiles: Iterable[tuple[int, int]]) -> Flow[Mapping[tuple[int, int], bytes]]:
    """Return stored tiles by (level, number); those that are missing are left out."""
    wanted = list(tiles)
    if not wanted:
        return {}
    found = yield Query(
        f"SELECT level, number, hashes FROM {TILES} WHERE tree = $1 "
        "AND (level, number) IN (SELECT * FROM unnest($2::smallint[], $3::bigint[]))",
        (number, [level for level, _ in wanted], [place for _, place in wanted]),
    )
    return {(level, place): hashes for level, place, hashes in found.rows}


def _store(tree: Tree) -> Flow[None]:
    after_xid, after_id, after_time = tree.after or (None, None, None)
    yield Query(
        f"UPDATE {TREES} SET size = $2, root = $3, snapshot = $4::pg_snapshot, target = $5::pg_snapshot, walk = $6, "
        "after_xid = $7::xid8, after_id = $8, after_time = $9::text::timestamptz, sealed_at = now() WHERE tree = $1",
        (
            tree.number,
            tree.size,
            tree.root,
            tree.snapshot,
            tree.target,
            tree.walk,
            after_xid,
            after_id,
            after_time,
        ),
        reads=False,
    )


def resume(tree: Tree) -> Flow[None]:
    """Go on with a tree whose database now stands on another server: first comes a scan for rows without a leaf."""
    yield Query(f"SELECT {_DURABLE}")
    yield Query(
        f"UPDATE {TREES} SET walk = 'scan', resumed = true, target = pg_current_snapshot(), after_xid = NULL, "
        "after_id = NULL, after_time = NULL, system_identifier = (SELECT system_identifier FROM pg_control_system()) "
        "WHERE tree = $1",
        (tree.number,),
        reads=False,
    )


def store_checkpoint(tree: Tree, note: str) -> Flow[None]:
    """Keep a signed checkpoint."""
    yield Query(f"SELECT {_DURABLE}")
    yield Query(
        f"INSERT INTO {CHECKPOINTS} (tree, size, note) VALUES ($1, $2, $3) "
        "ON CONFLICT (tree, size) DO UPDATE SET note = excluded.note",
        (tree.number, tree.size, note),
        reads=False,
    )


def store_outcomes(outcomes: Sequence[tuple[str, str, int, datetime, str | None, str | None]]) -> Flow[None]:
    """Note what anchors said: sink, origin, size, when, and the receipt or the error."""
    for sink, origin, size, at, receipt, error in outcomes:
        yield Query(
            f"INSERT INTO {ANCHORS} AS a (tree, sink, size, receipt, error, at) "
            f"SELECT tree, $1, $3, $5, $6, $4 FROM {TREES} WHERE origin = $2 "
            "ON CONFLICT (tree, sink, size) DO UPDATE SET attempts = a.attempts + 1, at = excluded.at, "
            "receipt = coalesce(excluded.receipt, a.receipt), error = excluded.error",
            (sink, origin, size, at, receipt, error),
            reads=False,
        )


def sealed_as(table: str, id_: UUID) -> Flow[int | None]:
    """Return the index of an event's leaf if a signed checkpoint covers it, else None."""
    if not (yield from tables_exist()):
        return None
    found = yield Query(
        f"SELECT min(l.index) FROM {LEAVES} AS l JOIN (SELECT tree FROM {TREES} WHERE table_name = $1 "
        f"ORDER BY epoch DESC LIMIT 1) AS t ON t.tree = l.tree WHERE l.id = $2 "
        f"AND l.index < (SELECT max(c.size) FROM {CHECKPOINTS} AS c WHERE c.tree = l.tree)",
        (table, id_),
    )
    return None if found.rows[0][0] is None else int(found.rows[0][0])


class Standing(NamedTuple):
    """How far the sealing of a table is: leaves, the newest signed checkpoint, and rows that wait."""

    signed: int
    signed_at: datetime | None
    sealed_at: datetime | None
    waiting: int
    oldest_waiting: float
    """Seconds since the oldest waiting row was stored."""


def standing(tree: Tree) -> Flow[Standing]:
    """Return how far the sealing of a tree is. Quick while little waits."""
    found = yield Query(
        f"SELECT max(c.size), max(c.created_at), (SELECT t.sealed_at FROM {TREES} AS t WHERE t.tree = $1) "
        f"FROM {CHECKPOINTS} AS c WHERE c.tree = $1",
        (tree.number,),
    )
    signed, signed_at, sealed_at = found.rows[0]
    waiting = yield Query(
        f"""SELECT count(*), coalesce(extract(epoch FROM clock_timestamp() - min(r.created_at)), 0)::float8
FROM "{tree.table}" AS r WHERE r.stored_xid >= pg_snapshot_xmin($1::pg_snapshot)
  AND NOT pg_visible_in_snapshot(r.stored_xid, $1::pg_snapshot)""",
        (tree.snapshot,),
    )
    return Standing(signed or 0, signed_at, sealed_at, *waiting.rows[0])


class Receipts(NamedTuple):
    """What one anchor has said: its last receipt, and what went wrong since."""

    sink: str
    size: int | None
    at: datetime | None
    receipt: str | None
    error: str | None
    error_at: datetime | None


def receipts(tree: Tree) -> Flow[list[Receipts]]:
    """Return what each anchor of a tree has said last."""
    found = yield Query(
        f"""SELECT sinks.sink, good.size, good.at, good.receipt, bad.error, bad.at
FROM (SELECT DISTINCT sink FROM {ANCHORS} WHERE tree = $1) AS sinks
LEFT JOIN LATERAL (SELECT size, at, receipt FROM {ANCHORS} AS a WHERE a.tree = $1 AND a.sink = sinks.sink
  AND a.receipt IS NOT NULL ORDER BY a.size DESC LIMIT 1) AS good ON true
LEFT JOIN LATERAL (SELECT error, at FROM {ANCHORS} AS a WHERE a.tree = $1 AND a.sink = sinks.sink
  AND a.error IS NOT NULL AND a.at > coalesce(good.at, '-infinity') ORDER BY a.at DESC LIMIT 1) AS bad ON true
ORDER BY sinks.sink""",
        (tree.number,),
    )
    return [Receipts(*row) for row in found.rows]
