"""Connections of a caller's that are not psycopg's: of asyncpg and psycopg2, and what SQLAlchemy and Django wrap.

A flow is said by the connection's own ``execute``, so that whatever a framework does around a statement (logging,
checks, greenlets) it does around ours. None of these packages is imported here: a connection brings its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import psycopg

from tracevault.errors import DriverError, ValidationError
from tracevault.events.rules import got
from tracevault.flows import Copy, Flow, Query, Result
from tracevault.postgres.failures import Place, from_psycopg

T = TypeVar("T")

_PLACEHOLDER = re.compile(r"\$(\d+)")
# asyncpg applies a codec of the caller's to jsonb, and would encode our text once more; to text it applies none.
_JSON = re.compile(r"(\$\d+)::jsonb")
_TOUCHED = re.compile(r"\d+$")
# What a driver, or what wraps it, calls the errors of the database and of the connection to it.
_DATABASE_ERRORS = frozenset({"DatabaseError", "DBAPIError", "InterfaceError", "PostgresError"})
_CONNECTION_ERRORS = frozenset({"InterfaceError", "OperationalError"})


class Caller(NamedTuple):
    """A connection that somebody else made. Of an asynchronous one the functions return what is to be awaited."""

    asynchronous: bool
    inside: Callable[[], Any]
    """Whether a transaction is open, or will be with the next statement."""
    execute: Callable[[Query], Any]
    """Execute a query and return its `Result`."""


def caller_of(connection: Any) -> Caller | None:
    """Return what executes on ``connection``; None if it is of no kind that is known here."""
    for kind in type(connection).__mro__:
        make = _KINDS.get((kind.__module__.partition(".")[0], kind.__name__))
        if make is not None:
            return make(connection)
    return None


def run_on(caller: Caller, flow: Flow[T], place: Place) -> T:
    """Drive ``flow`` over a caller's blocking connection."""
    try:
        statement = next(flow)
        while True:
            try:
                result = caller.execute(_query(statement))
            except Exception as error:
                failure = _failure(error, place)
                if failure is None:
                    raise
            else:
                statement = flow.send(result)
                continue
            statement = flow.throw(failure)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


async def run_on_async(caller: Caller, flow: Flow[T], place: Place) -> T:
    """Drive ``flow`` over a caller's async connection."""
    try:
        statement = next(flow)
        while True:
            try:
                result = await caller.execute(_query(statement))
            except Exception as error:
                failure = _failure(error, place)
                if failure is None:
                    raise
            else:
                statement = flow.send(result)
                continue
            statement = flow.throw(failure)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def _query(statement: Query | Copy) -> Query:
    assert isinstance(statement, Query), "COPY is said to psycopg alone"
    return statement


def _failure(error: Exception, place: Place) -> DriverError | None:
    """Return our error for one of the database's, with nothing of the statement in it; None for any other."""
    chain = list(_causes(error))
    names = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    states = (getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) for cause in reversed(chain))
    sqlstate = next((state for state in states if isinstance(state, str)), None)
    if sqlstate is None and not names & _DATABASE_ERRORS:
        return None
    text = next((text for cause in reversed(chain) if (text := _primary(cause))), type(error).__name__)
    kind: type[psycopg.Error] = psycopg.OperationalError if names & _CONNECTION_ERRORS else psycopg.DatabaseError
    if sqlstate is not None:
        with suppress(KeyError):
            kind = psycopg.errors.lookup(sqlstate)
    clean = kind(text)
    if sqlstate is not None:
        clean.sqlstate = sqlstate
    return from_psycopg(clean, place)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and those it wraps, the driver's own last."""
    seen: list[BaseException] = []
    found: Any = error
    while isinstance(found, BaseException) and found not in seen:
        seen.append(found)
        yield found
        found = getattr(found, "orig", None) or found.__cause__


def _primary(error: BaseException) -> str:
    """Return the server's message without DETAIL, which can quote a row, and without the statement."""
    diag = getattr(error, "diag", None)
    text = getattr(diag, "message_primary", None) or getattr(error, "message", None) or str(error)
    return str(text).partition("\n")[0].strip()


def _check_dialect(name: str) -> None:
    if name != "postgresql":
        raise ValidationError(f"`connection` must be one to PostgreSQL, got {got(name)}", field="connection")


def _formatted(query: Query) -> tuple[str, tuple[Any, ...]]:
    """Return a query as drivers take it that have ``%s`` placeholders; values as text, whose type the server infers."""
    values: list[Any] = []

    def place(found: re.Match[str]) -> str:
        value = query.params[int(found[1]) - 1]
        if isinstance(value, UUID):
            value = str(value)
        elif isinstance(value, datetime):
            value = value.isoformat()
        values.append(value)
        return "%s"

    if not query.params:
        return query.sql, ()
    return _PLACEHOLDER.sub(place, query.sql.replace("%", "%%")), tuple(values)


def _asyncpg(connection: Any) -> Caller:
    async def inside() -> bool:
        return bool(connection.is_in_transaction())

    async def execute(query: Query) -> Result:
        sql = _JSON.sub(r"\1::text::jsonb", query.sql)
        if query.reads and query.params:
            rows = await connection.fetch(sql, *query.params)
            return Result([tuple(row) for row in rows], len(rows))
        count = _TOUCHED.search(await connection.execute(sql, *query.params))
        return Result([], int(count[0]) if count else 0)

    return Caller(True, inside, execute)


def _psycopg2(connection: Any) -> Caller:
    def inside() -> bool:
        return not connection.autocommit or connection.info.transaction_status != 0

    return Caller(False, inside, lambda query: _by_cursor(query, connection))


def _django(connection: Any) -> Caller:
    _check_dialect(connection.vendor)

    def inside() -> bool:
        return connection.in_atomic_block or not connection.get_autocommit()

    return Caller(False, inside, lambda query: _by_cursor(query, connection))


def _by_cursor(query: Query, connection: Any) -> Result:
    sql, values = _formatted(query)
    with connection.cursor() as cursor:
        cursor.execute(sql, values or None)
        rows = cursor.fetchall() if query.reads and cursor.description else []
        return Result([tuple(row) for row in rows], cursor.rowcount)


def _sqlalchemy(connection: Any) -> Caller:
    """Return the caller for a Session, or a Connection."""
    bound = connection.connection() if hasattr(connection, "flush") else connection
    _check_dialect(bound.dialect.name)

    def execute(query: Query) -> Result:
        return _result(query, bound.exec_driver_sql(*_spoken(query, bound.dialect)))

    return Caller(False, lambda: not _autocommits(bound), execute)


def _sqlalchemy_async(connection: Any) -> Caller:
    """Return the caller for an AsyncSession, or an AsyncConnection."""

    async def bound() -> Any:
        found = await connection.connection() if hasattr(connection, "flush") else connection
        _check_dialect(found.dialect.name)
        return found

    async def inside() -> bool:
        return not _autocommits((await bound()).sync_connection)

    async def execute(query: Query) -> Result:
        found = await bound()
        return _result(query, await found.exec_driver_sql(*_spoken(query, found.dialect)))

    return Caller(True, inside, execute)


def _autocommits(bound: Any) -> bool:
    """Whether a SQLAlchemy connection is one whose every statement is committed at once."""
    # SQLAlchemy's DBAPI connections of every PostgreSQL driver say so, its own adapters of async ones included.
    return bool(getattr(bound.connection.dbapi_connection, "autocommit", False))


def _spoken(query: Query, dialect: Any) -> tuple[Any, ...]:
    if dialect.paramstyle == "numeric_dollar":
        sql, values = _JSON.sub(r"\1::text::jsonb", query.sql), query.params
    else:
        sql, values = _formatted(query)
    return (sql, values) if values else (sql,)


def _result(query: Query, done: Any) -> Result:
    rows = [tuple(row) for row in done.fetchall()] if query.reads and done.returns_rows else []
    return Result(rows, done.rowcount)


# By the package that defines the class, and the class's name: subclasses, such as SQLModel's, are found by their bases.
_KINDS: dict[tuple[str, str], Callable[[Any], Caller]] = {
    ("asyncpg", "Connection"): _asyncpg,
    ("asyncpg", "PoolConnectionProxy"): _asyncpg,
    ("psycopg2", "connection"): _psycopg2,
    ("django", "BaseDatabaseWrapper"): _django,
    ("django", "ConnectionProxy"): _django,
    ("sqlalchemy", "Connection"): _sqlalchemy,
    ("sqlalchemy", "Session"): _sqlalchemy,
    ("sqlalchemy", "scoped_session"): _sqlalchemy,
    ("sqlalchemy", "AsyncConnection"): _sqlalchemy_async,
    ("sqlalchemy", "AsyncSession"): _sqlalchemy_async,
    ("sqlalchemy", "async_scoped_session"): _sqlalchemy_async,
}
