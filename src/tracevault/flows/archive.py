"""What an archive asks the database: which rows go into it, and what proves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from tracevault.flows import Flow, Query
from tracevault.flows.custody import Affected, affected
from tracevault.flows.partitions import look
from tracevault.flows.retention import OURS_ONLY, count_unsealed, delete_rows, held_rows
from tracevault.flows.seal import Tree
from tracevault.integrity.leaf import READ
from tracevault.schema.holds import is_held
from tracevault.schema.position import Snapshot
from tracevault.schema.trees import ANCHORS, CHECKPOINTS, ERASURES, LEAVES, TILES

_ARCHIVE_LOCK = 0x61726368
_READ = ", ".join(f"r.{name}" for name in READ)


class Seen(NamedTuple):
    """What was archived of a table that was not sealed: what a snapshot saw of before a moment."""

    end: datetime
    snapshot: Snapshot


@dataclass(frozen=True)
class Slice:
    """A stretch of a table's time, without what was archived of it earlier. ``tree`` is None where it is not sealed."""

    table: str
    tree: Tree | None
    size: int
    """Leaves that the checkpoint covers; no other row is in it."""
    start: datetime
    end: datetime
    leaves: tuple[tuple[int, int], ...] = ()
    """Leaves that were archived earlier, as ranges from the first to before the end."""
    seen: tuple[Seen, ...] = ()

    @property
    def source(self) -> str:
        """What to select from."""
        if self.tree is None:
            return f'"{self.table}" AS r'
        return (
            f'"{self.table}" AS r JOIN {LEAVES} AS l '
            f"ON l.tree = {self.tree.number} AND l.id = r.id AND l.occurred_at = r.occurred_at"
        )

    @property
    def where(self) -> str:
        """The condition. It has no parameters: `raw_rows` takes none."""
        clauses = [f"r.occurred_at >= {_literal(self.start)} AND r.occurred_at < {_literal(self.end)}"]
        if self.tree is not None:
            clauses.append(f"l.index < {self.size} AND NOT {_among(self.leaves)}")
        clauses += [f"NOT {_was_seen(one)}" for one in self.seen]
        return " AND ".join(clauses)


def rows_sql(part: Slice) -> str:
    """Return the SELECT, for `postgres.run.raw_rows`, of a slice's rows in order of time and id.

    Columns: index of the leaf and its hash as the tree has it, transaction, what an erasure committed to for data and
    meta, and `integrity.leaf.READ`.
    """
    if part.tree is None:
        proof, joined = "NULL::bigint, NULL::bytea, r.stored_xid, NULL::bytea, NULL::bytea", ""
    else:
        proof = (
            "l.index::bigint, substring(t.hashes FROM (l.index % 256 * 32 + 1)::int FOR 32), r.stored_xid, "
            "e.data_commitment::bytea, e.meta_commitment::bytea"
        )
        joined = (
            f" LEFT JOIN {TILES} AS t ON t.tree = l.tree AND t.level = 0 AND t.number = l.index / 256"
            f" LEFT JOIN {ERASURES} AS e ON e.tree = l.tree AND e.index = l.index"
        )
    return f"SELECT {proof}, {_READ} FROM {part.source}{joined} WHERE {part.where} ORDER BY r.occurred_at, r.id"


def ranges(part: Slice) -> Flow[list[tuple[int, int]]]:
    """Return the leaves of a slice as ranges from the first to before the end; none where it is not sealed."""
    if part.tree is None:
        return []
    found = yield Query(
        "SELECT min(index), max(index) + 1 FROM ("
        "SELECT l.index, l.index - row_number() OVER (ORDER BY l.index) AS range "
        f"FROM {part.source} WHERE {part.where}) AS ranged GROUP BY range ORDER BY 1"
    )
    return [(first, end) for first, end in found.rows]


def oldest(table: str, since: datetime, before: datetime) -> Flow[datetime | None]:
    """Return when the first event happened, from ``since`` on and before another moment."""
    found = yield Query(
        f'SELECT min(occurred_at) FROM "{table}" WHERE occurred_at >= $1 AND occurred_at < $2', (since, before)
    )
    moment: datetime | None = found.rows[0][0]
    return moment


def left_out(part: Slice) -> Flow[int]:
    """Return how many rows of a slice have no leaf that the checkpoint covers."""
    if part.tree is None:
        return 0
    found = yield Query(
        f'SELECT count(*) FROM "{part.table}" AS r WHERE r.occurred_at >= $1 AND r.occurred_at < $2 AND NOT EXISTS '
        f"(SELECT FROM {LEAVES} AS l WHERE l.tree = $3 AND l.id = r.id AND l.occurred_at = r.occurred_at "
        "AND l.index < $4)",
        (part.start, part.end, part.tree.number, part.size),
    )
    return int(found.rows[0][0])


def checkpoint(tree: Tree) -> Flow[str | None]:
    """Return the note of the newest checkpoint that an anchor has; where none has one, of the newest."""
    found = yield Query(
        f"SELECT c.note FROM {CHECKPOINTS} AS c WHERE c.tree = $1 AND c.size <= $2 ORDER BY EXISTS "
        f"(SELECT FROM {ANCHORS} AS a WHERE a.tree = c.tree AND a.size = c.size AND a.receipt IS NOT NULL) DESC, "
        "c.size DESC LIMIT 1",
        (tree.number, tree.size),
    )
    return found.rows[0][0] if found.rows else None


def hold_archive(table: str) -> Flow[bool]:
    """Keep other runs from archiving a table as long as this session lasts; False where one is at work."""
    found = yield Query("SELECT pg_try_advisory_lock($1, hashtext($2))", (_ARCHIVE_LOCK, table))
    return bool(found.rows[0][0])


class Moment(NamedTuple):
    """Which server it is, and what is visible there now."""

    system: str
    snapshot: str


def moment() -> Flow[Moment]:
    """Return which server it is and what this transaction sees."""
    found = yield Query("SELECT (SELECT system_identifier FROM pg_control_system())::text, pg_current_snapshot()::text")
    return Moment(*found.rows[0])


# ------------------------------------------------------------------------------- what is archived goes


def archived(tree: Tree, leaves: Sequence[tuple[int, int]], until: datetime) -> Flow[Affected]:
    """Return which rows of some leaves may go, of before a moment: not those that are held, nor tracevault's own."""
    among = _among(leaves).replace("{", "{{").replace("}", "}}")
    return affected(tree, f"r.occurred_at < {{}} AND {among} AND NOT {OURS_ONLY}", (until,))


def emptied(tree: Tree, leaves: Sequence[tuple[int, int]], until: datetime) -> Flow[tuple[str, ...]]:
    """Return the partitions of before a moment of which every row goes that may. In a transaction of the caller's.

    Only events of tracevault itself may stay, which move to the default partition.
    """
    layout = yield from look(tree.table)
    assert layout is not None
    names = []
    for found in sorted(layout.partitions, key=lambda one: one.start):
        if found.default or found.end > until or found.schema != layout.schema:
            continue
        stays = yield Query(
            f"SELECT EXISTS (SELECT FROM {found.sql} AS r LEFT JOIN {LEAVES} AS l "
            "ON l.tree = $1 AND l.id = r.id AND l.occurred_at = r.occurred_at "
            f"WHERE NOT {OURS_ONLY} AND ({_among(leaves)} IS NOT TRUE OR {is_held('$2')}))",
            (tree.number, tree.table),
        )
        if not stays.rows[0][0]:
            names.append(found.name)
    return tuple(names)


def archived_unsealed(table: str, start: datetime, seen: Seen) -> Flow[Affected]:
    """Return how many rows of what was archived of a table that is not sealed may go, and how many are held."""
    held = yield from held_rows(table)
    return (yield from count_unsealed(table, _gone(start, seen), (), held))


def delete_archived(table: str, start: datetime, seen: Seen, limit: int) -> Flow[int]:
    """Delete at most ``limit`` rows of what was archived of a table that is not sealed; return how many went.

    In one transaction of the caller's, as the table's owner.
    """
    return (yield from delete_rows(table, _gone(start, seen), (), limit))


def _gone(start: datetime, seen: Seen) -> str:
    return f"r.occurred_at >= {_literal(start)} AND {_was_seen(seen)} AND NOT {OURS_ONLY}"


def _was_seen(seen: Seen) -> str:
    visible = f"pg_visible_in_snapshot(r.stored_xid, '{seen.snapshot}'::pg_snapshot)"
    return f"(r.occurred_at < {_literal(seen.end)} AND coalesce({visible}, true))"


def _among(leaves: Sequence[tuple[int, int]]) -> str:
    pieces = ",".join(f"[{int(first)},{int(end)})" for first, end in leaves)
    return f"(l.index <@ '{{{pieces}}}'::int8multirange)"


def _literal(moment: datetime) -> str:
    return f"'{moment.isoformat(' ')}'::timestamptz"
