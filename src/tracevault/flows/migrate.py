"""How tables are made and upgraded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracevault.errors import DriverError, MigrationError
from tracevault.flows import Flow, Query
from tracevault.schema.ddl import STEPS, step_statements
from tracevault.schema.indexes import Index
from tracevault.schema.state import (
    INSPECT,
    REWRITE_LIMIT,
    Change,
    TableState,
    column_changes,
    foreign_traits,
    index_changes,
    table_state,
    temporary_index_name,
)

# One number for all of tracevault's start-ups in a database ("trac" in ASCII); another for `migrate`.
_START_LOCK = 0x74726163
_MIGRATE_LOCK = _START_LOCK + 1
_START_LOCK_TIMEOUT = "10s"
_TABLE_LOCK_TIMEOUT = "2s"
_LOCK_NOT_AVAILABLE = "55P03"


@dataclass(frozen=True)
class Plan:
    """What there is to do for one table. ``filled``: it holds at least one row."""

    state: TableState
    changes: tuple[Change, ...]
    filled: bool

    @property
    def done(self) -> bool:
        """Whether the table is as it should be."""
        return self.state.exists and not self.changes

    def pending(self, *kinds: str) -> tuple[Change, ...]:
        """Return the changes of these kinds."""
        return tuple(change for change in self.changes if change.kind in kinds)


def plan(tables: Sequence[str]) -> Flow[list[Plan]]:
    """Return the plan for each table, in one round trip if nothing is to do; refuse a table that is not ours."""
    result = yield Query(INSPECT, (list(tables),))
    plans = []
    for row in result.rows:
        state = table_state(row)
        if not state.exists:
            plans.append(Plan(state, (), filled=False))
            continue
        traits = foreign_traits(state)
        if traits:
            raise MigrationError(
                f"table `{state.name}` is not an audit table of tracevault: {'; '.join(traits)}. "
                "Use another `table_name`, or move that table away"
            )
        changes = (*column_changes(state), *index_changes(state))
        filled = False
        if changes:
            rows = yield Query(f'SELECT EXISTS (SELECT FROM "{state.name}")')
            filled = rows.rows[0][0]
        plans.append(Plan(state, changes, filled))
    return plans


def start_up(tables: Sequence[str]) -> Flow[list[Plan]]:
    """Make what is missing, as an application's start may: in one transaction of the caller's.

    Creates absent tables, adds columns, and indexes a table only while it is empty. Returns the plans, whose
    index changes on filled tables were left to ``tracevault migrate``.
    """
    yield Query(f"SET LOCAL lock_timeout = '{_START_LOCK_TIMEOUT}'")
    try:
        yield Query("SELECT pg_advisory_xact_lock($1)", (_START_LOCK,))
    except DriverError as error:
        raise _busy(error, "another process is changing the schema") from error
    yield Query(f"SET LOCAL lock_timeout = '{_TABLE_LOCK_TIMEOUT}'")
    plans = yield from plan(tables)  # again: another process may have been faster
    for table_plan in plans:
        try:
            yield from _start_up_table(table_plan)
        except DriverError as error:
            raise _busy(error, f"table `{table_plan.state.name}` is in use by a long transaction") from error
    return plans


def _start_up_table(table_plan: Plan) -> Flow[None]:
    name = table_plan.state.name
    if not table_plan.state.exists:
        for step in STEPS:
            for statement in step_statements(step.number, name):
                yield Query(statement)
        return
    for change in table_plan.pending("rewrite"):
        rows = yield Query(f'SELECT count(*) FROM (SELECT FROM "{name}" LIMIT {REWRITE_LIMIT + 1}) AS rows')
        if rows.rows[0][0] > REWRITE_LIMIT:
            raise MigrationError(
                f"table `{name}` has more than {REWRITE_LIMIT:,} rows, and to {change.summary} would stop its "
                "writers for long: run `tracevault migrate` at a quiet time"
            )
    for change in table_plan.pending("rewrite", "columns"):
        for statement in change.statements:
            yield Query(statement)
    if not table_plan.filled:
        for change in table_plan.pending("index"):
            for statement in _index_statements(change, name):
                yield Query(statement)


def _index_statements(change: Change, table: str) -> list[str]:
    if change.index is None:
        return list(change.statements)
    name = change.index.name(table)
    return [f'DROP INDEX IF EXISTS "{name}"', f'CREATE INDEX "{name}" ON {change.index.definition(table)}']


def _busy(error: DriverError, what: str) -> Exception:
    if error.sqlstate != _LOCK_NOT_AVAILABLE:
        return error
    return MigrationError(f"the schema could not be changed: {what}. Try again, or run `tracevault migrate`")


def lock_migrations() -> Flow[None]:
    """Take the lock that lets one `migrate` run at a time in a database; it is the session's."""
    result = yield Query("SELECT pg_try_advisory_lock($1)", (_MIGRATE_LOCK,))
    if not result.rows[0][0]:
        raise MigrationError("another `tracevault migrate` is running in this database")


def change_columns(table_plan: Plan) -> Flow[None]:
    """Create a table, or add its columns, rewriting it if need be; in one transaction of the caller's."""
    name = table_plan.state.name
    if not table_plan.state.exists:
        yield Query("SELECT pg_advisory_xact_lock($1)", (_START_LOCK,))
        for step in STEPS:
            for statement in step_statements(step.number, name):
                yield Query(statement)
        return
    yield Query("SET LOCAL lock_timeout = '30s'")
    for change in table_plan.pending("rewrite", "columns"):
        for statement in change.statements:
            yield Query(statement)


def build_index(table_plan: Plan, change: Change) -> Flow[None]:
    """Carry out one index change; outside a transaction.

    An index is built under a temporary name, CONCURRENTLY, so that neither writers nor readers wait for it;
    then `swap_index` gives it its name. On a partitioned table, which PostgreSQL cannot index CONCURRENTLY,
    writers wait.
    """
    name = table_plan.state.name
    if change.index is None:
        for statement in change.statements:
            yield Query(statement.replace("DROP INDEX", "DROP INDEX CONCURRENTLY"))
        return
    temporary = temporary_index_name(change.index, name)
    concurrently = "" if table_plan.state.partitioned else "CONCURRENTLY "
    yield Query(f'DROP INDEX {concurrently}IF EXISTS "{temporary}"')  # what an interrupted run left
    yield Query(f'CREATE INDEX {concurrently}"{temporary}" ON {change.index.definition(name)}')


def swap_index(table: str, index: Index) -> Flow[None]:
    """Give a finished index its name, in one transaction of the caller's."""
    name = index.name(table)
    yield Query("SET LOCAL lock_timeout = '30s'")
    yield Query(f'DROP INDEX IF EXISTS "{name}"')
    yield Query(f'ALTER INDEX "{temporary_index_name(index, table)}" RENAME TO "{name}"')
