"""How tables are made and upgraded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tracevault.config import Interval
from tracevault.errors import DriverError, MigrationError
from tracevault.events.record import GENERATED_COLUMNS
from tracevault.flows import Flow, Query
from tracevault.flows.partitions import make_first
from tracevault.schema.comparison import BODY, define, signature
from tracevault.schema.ddl import STEPS, create_index, step_statements
from tracevault.schema.indexes import INDEXES, PARTITIONED_INDEXES, temporary_name
from tracevault.schema.state import (
    INSPECT,
    REWRITE_LIMIT,
    Change,
    TableState,
    column_changes,
    foreign_traits,
    function_changes,
    index_changes,
    table_state,
)

# One number for all of tracevault's start-ups in a database ("trac" in ASCII); another for `migrate`.
_START_LOCK = 0x74726163
_MIGRATE_LOCK = _START_LOCK + 1
_START_LOCK_TIMEOUT = "10s"
# Whoever waits for a table's lock makes its writers wait as well: less than the 5 s that an emit waits.
_TABLE_LOCK_TIMEOUT = "2s"
_LOOK_LOCK_TIMEOUT = "200ms"
LOCK_NOT_AVAILABLE = "55P03"
_NOT_ALLOWED = "42501"


@dataclass(frozen=True)
class Plan:
    """What there is to do for one table."""

    state: TableState
    changes: tuple[Change, ...]

    @property
    def filled(self) -> bool:
        """Whether the table may hold rows."""
        return self.state.filled

    @property
    def done(self) -> bool:
        """Whether the table is as it should be."""
        return self.state.exists and not self.changes

    def pending(self, *kinds: str) -> tuple[Change, ...]:
        """Return the changes of these kinds."""
        return tuple(change for change in self.changes if change.kind in kinds)


def look(tables: Sequence[str], *, payloads: bool = False, lock_timeout: str = _LOOK_LOCK_TIMEOUT) -> Flow[list[Plan]]:
    """Return the plan for each table, in one round trip; refuse a table that is not ours.

    Fails with SQLSTATE 55P03 where a table is being written anew or the like, perhaps by another start-up.
    """
    result = yield Query(INSPECT, (list(tables), lock_timeout, [signature(name) for name in tables], BODY))
    return [_plan_of(table_state(row), payloads) for row in result.rows]


def plan(tables: Sequence[str], *, payloads: bool = False) -> Flow[list[Plan]]:
    """Return the plan for each table like `look`, more patiently, and say what to do where that fails.

    Indexes of payloads are in it only with ``payloads``.
    """
    with _explained(" or ".join(f"`{table}`" for table in tables)):
        return (yield from look(tables, payloads=payloads, lock_timeout=_TABLE_LOCK_TIMEOUT))


def _plan_of(state: TableState, payloads: bool) -> Plan:
    if not state.exists:
        return Plan(state, ())
    traits = foreign_traits(state)
    if traits:
        raise MigrationError(
            f"table `{state.name}` is not an audit table of tracevault: {'; '.join(traits)}. "
            "Use another `table_name`, or move that table away"
        )
    return Plan(state, (*column_changes(state), *function_changes(state), *index_changes(state, payloads=payloads)))


def start_up(table: str, by: Interval | None = None) -> Flow[None]:
    """Make what ``table`` lacks, as an application's start may: in one transaction of the caller's.

    Creates the table, in partitions if ``by`` says so, adds columns, and builds indexes only while it is empty. The
    others, on a filled table, are left to ``tracevault migrate``.
    """
    yield Query(f"SET LOCAL lock_timeout = '{_START_LOCK_TIMEOUT}'")
    with _explained(f"the schema of `{table}`"):
        yield Query("SELECT pg_advisory_xact_lock($1)", (_START_LOCK,))
    # Again, since another process may have been faster. This also sets the shorter lock_timeout.
    (table_plan,) = yield from plan([table])
    with _explained(f"`{table}`"):
        if not table_plan.state.exists:
            yield from _create(table, by)
            return
        for change in table_plan.pending("rewrite"):
            yield from _refuse_long_rewrite(table, change)
        for change in table_plan.pending("rewrite", "columns"):
            yield Query(change.statement)
        if not table_plan.filled:
            for change in table_plan.pending("index"):
                yield from replace_index(table_plan, change)
    if table_plan.pending("function") and table_plan.state.may_define:
        yield from _define_if_allowed(table)


def _define_if_allowed(table: str) -> Flow[None]:
    """Make the function of ``table``; a role that may not do that goes on without it."""
    yield Query("SAVEPOINT tracevault")
    try:
        yield Query(define(table))
    except DriverError as error:
        if error.sqlstate != _NOT_ALLOWED:
            raise
        yield Query("ROLLBACK TO SAVEPOINT tracevault")
    yield Query("RELEASE SAVEPOINT tracevault")


def _create(table: str, by: Interval | None) -> Flow[None]:
    for step in STEPS:
        if not step.indexes and not step.function:
            for statement in step_statements(step.number, table, partitioned=by is not None):
                yield Query(statement)
    # Not as the step does it, which passes over an index of that name on another table.
    for index in INDEXES if by is None else PARTITIONED_INDEXES:
        yield Query(create_index(index, index.name(table), table))
    if by is not None:
        yield from make_first(table, by)
    yield from _define_if_allowed(table)


def _refuse_long_rewrite(table: str, change: Change) -> Flow[None]:
    result = yield Query(f'SELECT count(*) FROM (SELECT FROM "{table}" LIMIT {REWRITE_LIMIT + 1}) AS rows')
    if result.rows[0][0] > REWRITE_LIMIT:
        raise MigrationError(
            f"table `{table}` has more than {REWRITE_LIMIT:,} rows and has to be upgraded: {change.summary}. Its "
            f"writers would wait for long: run `tracevault migrate --table {table}` at a quiet time"
        )


_LIMITS = ", ".join(f"{stored.name} ({stored.column.limit} characters)" for stored in GENERATED_COLUMNS)
_ADVICE = {
    _NOT_ALLOWED: "this role may not change {}: run `tracevault migrate` as the owner of the tables",
    "22001": f"{{}} holds a text that is too long for one of the generated columns {_LIMITS}: shorten it",
}
_ADVICE_ON_LOCKS = dict.fromkeys(
    (LOCK_NOT_AVAILABLE, "40P01"), "{} is locked by another transaction: try again when that has ended"
)


@contextmanager
def _explained(what: str, *, locks: bool = True) -> Iterator[None]:
    """Say what to do where the database refuses to change ``what``."""
    try:
        yield
    except DriverError as error:
        advice = (_ADVICE | (_ADVICE_ON_LOCKS if locks else {})).get(error.sqlstate or "")
        if advice is None:
            raise
        raise MigrationError(f"{advice.format(what)} ({error.__cause__ or error})") from error


def lock_migrations() -> Flow[None]:
    """Take the lock that lets one `migrate` run at a time in a database; it is the session's.

    The session's timeouts are lifted: an index may take hours.
    """
    yield Query("SELECT set_config('statement_timeout', '0', false), set_config('lock_timeout', '0', false)")
    result = yield Query("SELECT pg_try_advisory_lock($1)", (_MIGRATE_LOCK,))
    if not result.rows[0][0]:
        raise MigrationError("another `tracevault migrate` is running in this database")


def unlock_migrations() -> Flow[None]:
    """Let the next `migrate` run."""
    yield Query("SELECT pg_advisory_unlock($1)", (_MIGRATE_LOCK,))


def change_columns(table_plan: Plan, by: Interval | None = None) -> Flow[None]:
    """Create a table, or add its columns, rewriting it if need be; in one transaction of the caller's."""
    name = table_plan.state.name
    with _explained(f"`{name}`", locks=False):
        if not table_plan.state.exists:
            yield Query("SELECT pg_advisory_xact_lock($1)", (_START_LOCK,))
            yield from _create(name, by)
            return
        yield Query(f"SET LOCAL lock_timeout = '{_TABLE_LOCK_TIMEOUT}'")
        for change in table_plan.pending("rewrite", "columns"):
            yield Query(change.statement)


def make_function(table_plan: Plan, change: Change) -> Flow[None]:
    """Make or replace the function that compares. Neither writers nor readers wait."""
    with _explained(f"`{table_plan.state.name}`", locks=False):
        yield Query(change.statement)


def replace_index(table_plan: Plan, change: Change) -> Flow[None]:
    """Carry out an index change while writers wait; in one transaction of the caller's."""
    state = table_plan.state
    yield Query(f"SET LOCAL lock_timeout = '{_TABLE_LOCK_TIMEOUT}'")
    for name in change.drops:
        yield Query(f"DROP INDEX IF EXISTS {state.beside(name)}")
    if change.index is not None:
        yield Query(create_index(change.index, change.index.name(state.name), state.name))


def build_index(table_plan: Plan, change: Change) -> Flow[None]:
    """Build an index under its temporary name; outside a transaction. Neither writers nor readers wait."""
    table, index = table_plan.state.name, change.index
    if index is not None and not change.built:
        with _explained(f"`{table}`", locks=False):
            yield Query(create_index(index, temporary_name("new", index.name(table)), table, "CONCURRENTLY "))


def swap_index(table_plan: Plan, change: Change) -> Flow[None]:
    """Give a finished index its name, and the one in its place another; in one transaction of the caller's.

    Renaming, unlike dropping, lets the table's writers go on.
    """
    state, index = table_plan.state, change.index
    if index is None:
        return
    yield Query(f"SET LOCAL lock_timeout = '{_TABLE_LOCK_TIMEOUT}'")
    name = index.name(state.name)
    if name in change.drops:
        yield Query(f'ALTER INDEX {state.beside(name)} RENAME TO "{temporary_name("old", name)}"')
    yield Query(f'ALTER INDEX {state.beside(temporary_name("new", name))} RENAME TO "{name}"')


def drop_indexes(table_plan: Plan, change: Change) -> Flow[None]:
    """Drop what a change made superfluous; outside a transaction. Neither writers nor readers wait."""
    for name in change.drops:
        superfluous = name if change.index is None else temporary_name("old", name)
        yield Query(f"DROP INDEX CONCURRENTLY IF EXISTS {table_plan.state.beside(superfluous)}")
