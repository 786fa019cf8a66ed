"""Writing on a connection that the caller lends: inside its transaction, with nothing else run there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psycopg import AsyncConnection, Connection
from psycopg.pq import TransactionStatus

from tracevault.errors import ValidationError
from tracevault.events.prepare import Prepared
from tracevault.events.rules import got
from tracevault.flows import Flow
from tracevault.flows.write import insert, insert_many, needs_transaction, savepointed
from tracevault.postgres.callers import Caller, caller_of, run_on, run_on_async
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run, run_async
from tracevault.writer.direct import atomic, atomic_async


def write_on(
    connection: Any, table: str, batch: Sequence[Prepared], place: Place, *, allow_autocommit: bool, savepoint: bool
) -> bool:
    """Store a batch on a caller's connection; return whether that is in a transaction, and runs nothing else there."""
    several = len(batch) > 1 and needs_transaction(batch)  # statements, for one batch
    if isinstance(connection, Connection):
        inside = not connection.autocommit or connection.info.transaction_status != TransactionStatus.IDLE
        _check_transaction(inside, allow_autocommit)
        flow = _stored(table, batch, savepoint=inside and (savepoint or several), copies=True)
        if batch and inside:
            run(connection, flow, place)
        elif batch:
            with atomic(connection, place, needed=several):
                run(connection, flow, place)
        return inside
    caller = _caller(connection, asynchronous=False)
    inside = bool(caller.inside())
    _check_transaction(inside, allow_autocommit)
    _check_one_statement(inside, several)
    if batch:
        flow = _stored(table, batch, savepoint=inside and (savepoint or several), copies=False)
        run_on(caller, flow, place)
    return inside


async def write_on_async(
    connection: Any, table: str, batch: Sequence[Prepared], place: Place, *, allow_autocommit: bool, savepoint: bool
) -> bool:
    """Store a batch on a caller's async connection; return whether that is in a transaction."""
    several = len(batch) > 1 and needs_transaction(batch)  # statements, for one batch
    if isinstance(connection, AsyncConnection):
        inside = not connection.autocommit or connection.info.transaction_status != TransactionStatus.IDLE
        _check_transaction(inside, allow_autocommit)
        flow = _stored(table, batch, savepoint=inside and (savepoint or several), copies=True)
        if batch and inside:
            await run_async(connection, flow, place)
        elif batch:
            async with atomic_async(connection, place, needed=several):
                await run_async(connection, flow, place)
        return inside
    caller = _caller(connection, asynchronous=True)
    inside = bool(await caller.inside())
    _check_transaction(inside, allow_autocommit)
    _check_one_statement(inside, several)
    if batch:
        flow = _stored(table, batch, savepoint=inside and (savepoint or several), copies=False)
        await run_on_async(caller, flow, place)
    return inside


def _check_transaction(inside: bool, allow_autocommit: bool) -> None:
    if not inside and not allow_autocommit:
        raise ValidationError(
            "`connection` is in autocommit mode and outside a transaction, so the event would not be bound to your "
            "changes: emit inside `with connection.transaction():`, or pass allow_autocommit=True",
            field="connection",
        )


def _caller(connection: Any, *, asynchronous: bool) -> Caller:
    """Return what executes on a connection that is not psycopg's, or not of this vault's kind."""
    caller = caller_of(connection)
    if caller is None or caller.asynchronous is not asynchronous:
        kind = "AsyncConnection" if asynchronous else "Connection"
        others = "asyncpg's, SQLAlchemy's async ones" if asynchronous else "psycopg2's, Django's, SQLAlchemy's blocking"
        raise ValidationError(
            f"`connection` must be a psycopg.{kind} here, or one of {others}, got {got(connection)}", field="connection"
        )
    return caller


def _stored(table: str, batch: Sequence[Prepared], *, savepoint: bool, copies: bool) -> Flow[Any]:
    """Return the flow that stores a batch on a caller's connection."""
    flow: Flow[Any] = insert(table, batch[0]) if len(batch) == 1 else insert_many(table, batch, copies=copies)
    return savepointed(flow) if savepoint else flow


def _check_one_statement(inside: bool, several: bool) -> None:
    if several and not inside:
        raise ValidationError(
            "`connection` is outside a transaction, and events with ids of yours take several statements: open one",
            field="connection",
        )
