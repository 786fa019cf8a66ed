"""What is asked and said when rows leave a table, or lose their payload; see `schema.custody`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from tracevault.events.record import Actor, Target
from tracevault.flows import Flow, Query
from tracevault.flows.seal import Tree
from tracevault.schema.custody import DROP, ERASE, ERASED, PRUNE, PRUNED
from tracevault.schema.holds import is_held
from tracevault.schema.trees import ANCHORS, LEAVES

Ranges = list[tuple[int, int]]


class Affected(NamedTuple):
    """Rows to prune or erase: the ranges of their leaves, each from its first to before its end.

    ``unsealed`` is how many have no leaf yet, ``held`` how many a legal hold keeps, which are not in the ranges.
    """

    ranges: Ranges
    unsealed: int
    held: int

    @property
    def rows(self) -> int:
        """How many rows have leaves."""
        return sum(end - first for first, end in self.ranges)


def older_than(tree: Tree, before: datetime) -> Flow[Affected]:
    """Return the rows that happened before a moment."""
    return affected(tree, "r.occurred_at < {}", (before,))


def about(tree: Tree, subject: Actor | Target) -> Flow[Affected]:
    """Return the rows that have this actor, or this target, and a payload."""
    side = "actor" if isinstance(subject, Actor) else "target"
    return affected(
        tree,
        f"r.{side}_id = {{}} AND r.{side}_type = {{}} AND (r.data IS NOT NULL OR r.meta IS NOT NULL)",
        (subject.id, subject.type),
    )


def affected(tree: Tree, condition: str, params: tuple[Any, ...]) -> Flow[Affected]:
    """Return the rows ``r`` for which a condition holds; its ``{}`` stand for ``params``."""
    condition = condition.format(*(f"${place}" for place in range(3, len(params) + 3)))
    # Neighbouring leaves share the difference between index and position, and become one range.
    found = yield Query(
        f"""WITH affected AS MATERIALIZED (
  SELECT l.index, {is_held("$2")} AS held FROM "{tree.table}" AS r
  LEFT JOIN {LEAVES} AS l ON l.tree = $1 AND l.id = r.id AND l.occurred_at = r.occurred_at
  WHERE {condition} AND r.event NOT IN ('{PRUNED}', '{ERASED}')
)
SELECT min(index), max(index) + 1, 0, 0 FROM (
  SELECT index, index - row_number() OVER (ORDER BY index) AS range FROM affected WHERE index IS NOT NULL AND NOT held
) AS ranged GROUP BY range
UNION ALL SELECT NULL, NULL, count(*) FILTER (WHERE index IS NULL AND NOT held), count(*) FILTER (WHERE held)
  FROM affected
ORDER BY 1""",
        (tree.number, tree.table, *params),
    )
    *ranges, (_, _, unsealed, held) = found.rows
    return Affected([(first, end) for first, end, _, _ in ranges], unsealed, held)


def stated(tree: Tree, event_id: UUID) -> Flow[tuple[str, Ranges] | None]:
    """Return the name and the ranges of an event of a pruning or an erasure; None if it is none."""
    found = yield Query(
        f"SELECT event, data->'ranges' FROM \"{tree.table}\" WHERE id = $1 AND event IN ($2, $3)",
        (event_id, PRUNED, ERASED),
    )
    if not found.rows:
        return None
    event, ranges = found.rows[0]
    return event, [(first, end) for first, end in ranges]


def anchored(tree: Tree, index: int) -> Flow[bool]:
    """Whether an anchor has a checkpoint that covers a leaf."""
    found = yield Query(
        f"SELECT EXISTS (SELECT FROM {ANCHORS} WHERE tree = $1 AND size > $2 AND receipt IS NOT NULL)",
        (tree.number, index),
    )
    return bool(found.rows[0][0])


def carry_out(table: str, event: str, event_id: UUID, first: int, end: int) -> Flow[int]:
    """Prune or erase a part of what a sealed event states; return how many rows."""
    function = PRUNE if event == PRUNED else ERASE
    done = yield Query(f"SELECT {function}($1, $2, $3, $4)", (table, event_id, first, end))
    return int(done.rows[0][0])


def drop_partition(table: str, event_ids: Sequence[UUID], partition: str) -> Flow[int]:
    """Drop a partition whose rows sealed and anchored events name; return how many rows."""
    done = yield Query(f"SELECT {DROP}($1, $2, $3)", (table, list(event_ids), partition))
    return int(done.rows[0][0])


def as_data(ranges: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return ranges as they stand in an event's data."""
    return [[first, end] for first, end in ranges]
