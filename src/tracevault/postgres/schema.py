"""Making and upgrading tables: at start-up, and by ``tracevault migrate``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from psycopg import AsyncConnection, Connection

from tracevault.errors import DriverError
from tracevault.flows.migrate import (
    Plan,
    build_index,
    change_columns,
    lock_migrations,
    plan,
    start_up,
    swap_index,
)
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run, run_async

_log = logging.getLogger("tracevault")
_PLACE = Place("checking the schema")
# Somebody else, who does not take our lock, made the same object at the same moment: look again.
_MADE_MEANWHILE = frozenset({"42P07", "42701", "42710", "23505"})


def ensure_schema(connection: Connection[Any], tables: Sequence[str]) -> None:
    """Make what start-up may make; one round trip if nothing is to do."""
    if not _needs_work(run(connection, plan(tables), _PLACE)):
        return
    for attempt in (1, 2):
        try:
            with connection.transaction():
                run(connection, start_up(tables), _PLACE)
        except DriverError as error:
            if attempt == 2 or error.sqlstate not in _MADE_MEANWHILE:
                raise
        else:
            return


async def ensure_schema_async(connection: AsyncConnection[Any], tables: Sequence[str]) -> None:
    """Make what start-up may make; one round trip if nothing is to do."""
    if not _needs_work(await run_async(connection, plan(tables), _PLACE)):
        return
    for attempt in (1, 2):
        try:
            async with connection.transaction():
                await run_async(connection, start_up(tables), _PLACE)
        except DriverError as error:
            if attempt == 2 or error.sqlstate not in _MADE_MEANWHILE:
                raise
        else:
            return


def _needs_work(plans: list[Plan]) -> bool:
    """Whether start-up has something to do; what it must leave to `migrate` is logged."""
    work = False
    for table_plan in plans:
        if not table_plan.state.exists or table_plan.pending("columns", "rewrite"):
            work = True
        if table_plan.pending("index"):
            if table_plan.filled:
                _log.warning(
                    "table %s: %d of its indexes are missing or old and queries slow; run `tracevault migrate`",
                    table_plan.state.name,
                    len(table_plan.pending("index")),
                )
            else:
                work = True
    return work


def migration_plan(connection: Connection[Any], tables: Sequence[str]) -> list[Plan]:
    """Return what `migrate` would do."""
    return run(connection, plan(tables), _PLACE)


def migrate(connection: Connection[Any], plans: Sequence[Plan], announce: Callable[[str], None]) -> None:
    """Carry out ``plans`` on an autocommit connection without a statement timeout.

    ``announce`` is told of each change before it begins. Interrupted, it can be run again.
    """
    place = Place("migrating")
    run(connection, lock_migrations(), place)
    for table_plan in plans:
        name = table_plan.state.name
        columns = table_plan.pending("rewrite", "columns")
        if not table_plan.state.exists or columns:
            for summary in [change.summary for change in columns] or ["create the table"]:
                announce(f"{name}: {summary}")
            with connection.transaction():
                run(connection, change_columns(table_plan), place)
        for change in table_plan.pending("index"):
            announce(f"{name}: {change.summary}")
            run(connection, build_index(table_plan, change), place)
            if change.index is not None:
                with connection.transaction():
                    run(connection, swap_index(name, change.index), place)
