"""Making and upgrading tables: at start-up, and by ``tracevault migrate``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from psycopg import AsyncConnection, Connection

from tracevault.config import Interval
from tracevault.errors import DriverError, MigrationError
from tracevault.flows import Flow
from tracevault.flows.migrate import (
    LOCK_NOT_AVAILABLE,
    Plan,
    build_index,
    change_columns,
    drop_indexes,
    lock_migrations,
    look,
    make_function,
    plan,
    replace_index,
    start_up,
    swap_index,
    unlock_migrations,
)
from tracevault.postgres.failures import Place, translated
from tracevault.postgres.run import run, run_async

_log = logging.getLogger("tracevault")
_CHECKING = Place("checking the schema")
_MIGRATING = Place("migrating")
# Somebody else, who does not take our lock, made the same object at the same moment: look again.
_DUPLICATE_TABLE = "42P07"
_MADE_MEANWHILE = frozenset({_DUPLICATE_TABLE, "42701", "42710", "23505"})
# Seconds: how long `migrate` tries to get a lock that it does not wait for in one piece, and its pause between.
PATIENCE = 60.0
_PAUSE = 1.0

T = TypeVar("T")


def ensure_schema(
    connection: Connection[Any], tables: Sequence[str], partitions: Mapping[str, Interval] = MappingProxyType({})
) -> None:
    """Make what start-up may make; one round trip if nothing is to do."""
    with translated(_CHECKING):
        try:
            to_do = _to_do(run(connection, look(tables), _CHECKING))
        except DriverError as error:
            to_do = _all_if_locked(error, tables)
        connection.rollback()  # ends what a connection has begun that is not autocommit
        for table in to_do:
            for attempt in (1, 2):
                try:
                    with connection.transaction():
                        run(connection, start_up(table, partitions.get(table)), _CHECKING)
                    break
                except DriverError as error:
                    _check_worth_repeating(error, attempt)


async def ensure_schema_async(
    connection: AsyncConnection[Any], tables: Sequence[str], partitions: Mapping[str, Interval] = MappingProxyType({})
) -> None:
    """Make what start-up may make; one round trip if nothing is to do."""
    with translated(_CHECKING):
        try:
            to_do = _to_do(await run_async(connection, look(tables), _CHECKING))
        except DriverError as error:
            to_do = _all_if_locked(error, tables)
        await connection.rollback()
        for table in to_do:
            for attempt in (1, 2):
                try:
                    async with connection.transaction():
                        await run_async(connection, start_up(table, partitions.get(table)), _CHECKING)
                    break
                except DriverError as error:
                    _check_worth_repeating(error, attempt)


def _all_if_locked(error: DriverError, tables: Sequence[str]) -> list[str]:
    """Return all tables where one is locked: by another start-up, perhaps, for which ours then waits."""
    if error.sqlstate != LOCK_NOT_AVAILABLE:
        raise error
    return list(tables)


def _to_do(plans: list[Plan]) -> list[str]:
    """Return the tables for which start-up has something to do; what it leaves to `migrate` is logged."""
    tables = []
    for table_plan in plans:
        state, indexes = table_plan.state, table_plan.pending("index")
        if indexes and table_plan.filled:
            _log.warning(
                "table %s: %d of its indexes are missing or old, so that queries are slow; "
                "run `tracevault migrate --table %s`",
                state.name,
                len(indexes),
                state.name,
            )
            indexes = ()
        function = state.may_define and table_plan.pending("function")
        if not state.exists or indexes or function or table_plan.pending("columns", "rewrite"):
            tables.append(state.name)
    return tables


def _check_worth_repeating(error: DriverError, attempt: int) -> None:
    if attempt == 1 and error.sqlstate in _MADE_MEANWHILE:
        return
    _check_name_free(error)
    raise error


def _check_name_free(error: DriverError) -> None:
    if error.sqlstate == _DUPLICATE_TABLE:
        advice = "it belongs to another table, perhaps one that was renamed: rename it as well"
        raise MigrationError(f"{error}: {advice}") from error


def migration_plan(connection: Connection[Any], tables: Sequence[str], *, payloads: bool = False) -> list[Plan]:
    """Return what `migrate` would do; with ``payloads`` it builds the indexes of payloads as well."""
    return run(connection, plan(tables, payloads=payloads), _CHECKING)


def migrate(
    connection: Connection[Any],
    plans: Sequence[Plan],
    announce: Callable[[str], None],
    *,
    payloads: bool = False,
    by: Interval | None = None,
) -> None:
    """Carry out ``plans`` on an autocommit connection, whose timeouts it lifts.

    ``announce`` is told of each change before it begins. A table that is made is partitioned where ``by`` says how.
    Interrupted, it can be run again.
    """
    with translated(_MIGRATING):
        run(connection, lock_migrations(), _MIGRATING)
        try:
            # Planned again: what another process did since is not done twice.
            names = [planned.state.name for planned in plans]
            for table_plan in run(connection, plan(names, payloads=payloads), _MIGRATING):
                _migrate_table(connection, table_plan, announce, by)
            made = [planned.state.name for planned in plans if payloads and not planned.state.exists]
            if made:  # a table that was not there had no indexes to plan
                for table_plan in run(connection, plan(made, payloads=True), _MIGRATING):
                    _migrate_table(connection, table_plan, announce)
        except DriverError as error:
            _check_name_free(error)
            raise
        finally:
            with suppress(DriverError):
                run(connection, unlock_migrations(), _MIGRATING)


def _migrate_table(
    connection: Connection[Any], table_plan: Plan, announce: Callable[[str], None], by: Interval | None = None
) -> None:
    name, columns = table_plan.state.name, table_plan.pending("rewrite", "columns")
    if not table_plan.state.exists:
        announce(f"{name}: create the table")
    for change in columns:
        announce(f"{name}: {change.summary}")
    if columns or not table_plan.state.exists:
        patiently(connection, partial(change_columns, table_plan, by), name)
    for change in table_plan.pending("function"):
        announce(f"{name}: {change.summary}")
        patiently(connection, partial(make_function, table_plan, change), name)
    for change in table_plan.pending("index"):
        announce(f"{name}: {change.summary}")
        if table_plan.state.partitioned:  # PostgreSQL cannot index it CONCURRENTLY
            patiently(connection, partial(replace_index, table_plan, change), name)
            continue
        run(connection, build_index(table_plan, change), _MIGRATING)
        patiently(connection, partial(swap_index, table_plan, change), name)
        run(connection, drop_indexes(table_plan, change), _MIGRATING)


def patiently(
    connection: Connection[Any],
    flow: Callable[[], Flow[T]],
    table: str,
    command: str = "migrate",
    place: Place = _MIGRATING,
    *,
    states: frozenset[str] = frozenset({LOCK_NOT_AVAILABLE}),
    patience: float | None = None,
) -> T:
    """Run a flow in a transaction; again while it does not get a lock, letting writers go on in between.

    ``states`` are the SQLSTATEs after which it is tried again, for ``patience`` seconds (default: `PATIENCE`); then
    `MigrationError` says to run ``command`` later.
    """
    seconds = PATIENCE if patience is None else patience
    until = time.monotonic() + seconds
    while True:
        try:
            with connection.transaction():
                return run(connection, flow(), place)
        except DriverError as error:
            if error.sqlstate not in states:
                raise
            if time.monotonic() > until:
                raise MigrationError(
                    f"table `{table}` is in use by a transaction that does not end; run `tracevault {command}` "
                    "again when it has ended: what is done stays done"
                ) from error
        time.sleep(min(_PAUSE, seconds / 10))
