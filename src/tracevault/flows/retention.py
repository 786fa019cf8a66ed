"""What is older than it is to be kept: found, and removed where a table is not sealed.

Time is the database's own, less the age of the oldest transaction that is open, whose events may still come.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from tracevault.errors import MigrationError
from tracevault.flows import Flow, Query
from tracevault.flows.custody import Affected, affected
from tracevault.flows.holds import holds_exist
from tracevault.flows.partitions import Layout, look
from tracevault.flows.seal import Tree
from tracevault.schema import guards
from tracevault.schema.custody import OURS
from tracevault.schema.holds import is_held
from tracevault.schema.retention import FOREVER, Rule, condition

_BEFORE = """
SELECT least(clock_timestamp(), (SELECT min(prepared) FROM pg_prepared_xacts),
  (SELECT min(xact_start) FROM pg_stat_activity WHERE pid <> pg_backend_pid())) - $1::interval
"""
OURS_ONLY = f"starts_with(r.event, '{OURS}')"


class Due(NamedTuple):
    """What one rule lets go: the rows that happened before a moment."""

    rule: Rule
    before: datetime
    affected: Affected


class Retention(NamedTuple):
    """What is to go of a table. ``tree`` is None where it is not sealed; its rows then all count as unsealed.

    ``drops`` are the partitions that go as a whole.
    """

    table: str
    tree: Tree | None
    due: tuple[Due, ...]
    drops: tuple[str, ...]

    @property
    def rows(self) -> int:
        """How many rows can go now."""
        return sum(self.rows_of(due) for due in self.due)

    def rows_of(self, due: Due) -> int:
        """Return how many rows can go now by one rule."""
        return due.affected.rows if self.tree else due.affected.unsealed


def retention(table: str, tree: Tree | None, known: Sequence[Rule]) -> Flow[Retention]:
    """Return what the rules let go of a table. In a transaction of the caller's."""
    layout = yield from look(table)
    if layout is None:
        raise MigrationError(f"table `{table}` does not exist")
    held = yield from held_rows(table)
    due: list[Due] = []
    for rule in known:
        if rule.period != FOREVER:
            found = yield Query(_BEFORE, (rule.period,))
            before = found.rows[0][0]
            clause, params = _due(rule, known, before)
            if tree is not None:
                due.append(Due(rule, before, (yield from affected(tree, clause, params))))
            else:
                due.append(Due(rule, before, (yield from count_unsealed(table, _placed(clause, params), params, held))))
    return Retention(table, tree, tuple(due), (yield from _drops(layout, due, known, held)))


def _due(rule: Rule, known: Sequence[Rule], before: datetime) -> tuple[str, tuple[Any, ...]]:
    clause, params = condition(rule, known)
    return f"r.occurred_at < {{}} AND {clause}", (before, *params)


def _any_due(due: Sequence[Due], known: Sequence[Rule]) -> tuple[str, tuple[Any, ...]]:
    pieces = [_due(one.rule, known, one.before) for one in due]
    return " OR ".join(f"({clause})" for clause, _ in pieces), tuple(value for _, params in pieces for value in params)


def _placed(clause: str, params: Sequence[Any], first: int = 1) -> str:
    return clause.format(*(f"${place}" for place in range(first, first + len(params))))


def held_rows(table: str) -> Flow[str]:
    """Return the condition that a row is held; a table that was never sealed may have no holds."""
    return is_held(f"'{table}'") if (yield from holds_exist()) else "false"


def count_unsealed(table: str, condition: str, params: Sequence[Any], held: str) -> Flow[Affected]:
    """Return how many rows ``r`` a condition holds for, of a table that is not sealed, and how many are held."""
    found = yield Query(
        "SELECT count(*) FILTER (WHERE NOT held), count(*) FILTER (WHERE held) "
        f'FROM (SELECT {held} AS held FROM "{table}" AS r WHERE {condition}) AS due',
        tuple(params),
    )
    return Affected([], *found.rows[0])


def _drops(layout: Layout, due: Sequence[Due], known: Sequence[Rule], held: str) -> Flow[tuple[str, ...]]:
    """Return the partitions of which every row goes, the empty ones as well, the oldest first."""
    if not due:
        return ()
    latest = max(one.before for one in due)
    names = []
    for found in sorted(layout.partitions, key=lambda one: one.start):
        # The function that drops one looks for it beside the table.
        if found.default or found.end > latest or found.schema != layout.schema:
            continue
        if (yield from _goes_whole(found.sql, due, known, held)):
            names.append(found.name)
    return tuple(names)


def _goes_whole(part: str, due: Sequence[Due], known: Sequence[Rule], held: str) -> Flow[bool]:
    """Whether every row of a partition goes, but for those of tracevault itself."""
    clause, params = _any_due(due, known)
    result = yield Query(
        f"SELECT NOT EXISTS (SELECT FROM {part} AS r "
        f"WHERE NOT {OURS_ONLY} AND (({_placed(clause, params)}) IS NOT TRUE OR {held}))",
        params,
    )
    return bool(result.rows[0][0])


def drop_unsealed(table: str, name: str, planned: Retention, known: Sequence[Rule]) -> Flow[int]:
    """Drop a partition of a table that is not sealed, if all its rows still go; return how many went.

    In one transaction of the caller's, as the table's owner.
    """
    layout = yield from look(table)
    assert layout is not None
    part, parent = layout.beside(name), layout.beside(table)
    yield Query(f"LOCK TABLE {part} IN ACCESS EXCLUSIVE MODE")
    held = yield from held_rows(table)
    if not (yield from _goes_whole(part, planned.due, known, held)):
        return 0
    clause, params = _any_due(planned.due, known)
    goes = f"(({_placed(clause, params)}) AND NOT {held})"
    found = yield Query(f"SELECT count(*) FROM {part} AS r WHERE {goes}", params)
    yield Query(f"ALTER TABLE {parent} DETACH PARTITION {part}")
    # Of tracevault itself; the default partition takes them.
    yield Query(
        f"INSERT INTO {parent} ({layout.columns}) SELECT {layout.columns} FROM {part} AS r WHERE {goes} IS NOT TRUE",
        params,
        reads=False,
    )
    yield Query(f"DROP TABLE {part}")
    return int(found.rows[0][0])


def delete_unsealed(table: str, due: Due, known: Sequence[Rule], limit: int) -> Flow[int]:
    """Delete at most ``limit`` rows of a table that is not sealed; return how many went.

    In one transaction of the caller's, as the table's owner.
    """
    clause, params = _due(due.rule, known, due.before)
    return (yield from delete_rows(table, _placed(clause, params), params, limit))


def delete_rows(table: str, condition: str, params: Sequence[Any], limit: int) -> Flow[int]:
    """Delete at most ``limit`` rows ``r`` for which a condition holds, but those that are held; return how many went.

    In one transaction of the caller's, as the table's owner.
    """
    held = yield from held_rows(table)
    yield Query(f"SELECT set_config('{guards.CUSTODY}', 'on', true)")
    done = yield Query(
        f'WITH due AS MATERIALIZED (SELECT r.id, r.occurred_at FROM "{table}" AS r '
        f"WHERE {condition} AND NOT {held} LIMIT ${len(params) + 1}), "
        f'gone AS (DELETE FROM "{table}" AS r USING due WHERE r.id = due.id AND r.occurred_at = due.occurred_at '
        "RETURNING 1) SELECT count(*) FROM gone",
        (*params, limit),
    )
    return int(done.rows[0][0])
