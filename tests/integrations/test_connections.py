"""Emitting on connections of other drivers, and on those that SQLAlchemy wraps: the transaction is the caller's."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
import psycopg2
import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from tests.conftest import rows
from tracevault import DriverError, DuplicateIdError, Tracevault, ValidationError, start_tracevault

AWKWARD = {"text": "100% of 'it' \\ $1 :name %s {x} \N{SNOWMAN}", "number": 12345678901234567890, "none": None}
NOTHING_BUT_THE_LOG: Any = {"bootstrap": {"ensure_schema": False}}

# Each kind opens a transaction: it yields what to pass as connection, what executes SQL there, commit and rollback.
Opened = tuple[Any, Callable[[str], Any], Callable[[], Any], Callable[[], Any]]


def _url(dsn: str, driver: str) -> str:
    given = conninfo_to_dict(dsn)
    return (
        f"postgresql+{driver}://{given['user']}@/{given['dbname']}?host={given['host']}&port={given.get('port', 5432)}"
    )


@asynccontextmanager
async def _psycopg2(dsn: str) -> AsyncIterator[Opened]:
    connection = psycopg2.connect(dsn)
    yield connection, connection.cursor().execute, connection.commit, connection.rollback
    connection.close()


def _connection(driver: str) -> Callable[[str], AbstractAsyncContextManager[Opened]]:
    @asynccontextmanager
    async def opened(dsn: str) -> AsyncIterator[Opened]:
        with create_engine(_url(dsn, driver), poolclass=NullPool).connect() as connection:
            yield connection, lambda sql: connection.execute(text(sql)), connection.commit, connection.rollback

    return opened


def _session(driver: str, scoped: bool = False) -> Callable[[str], AbstractAsyncContextManager[Opened]]:
    @asynccontextmanager
    async def opened(dsn: str) -> AsyncIterator[Opened]:
        maker = sessionmaker(create_engine(_url(dsn, driver), poolclass=NullPool))
        session: Any = scoped_session(maker) if scoped else maker()
        yield session, lambda sql: session.execute(text(sql)), session.commit, session.rollback
        session.close()

    return opened


@asynccontextmanager
async def _asyncpg(dsn: str) -> AsyncIterator[Opened]:
    given = conninfo_to_dict(dsn)
    connection = await asyncpg.connect(
        user=given["user"], database=given["dbname"], host=given["host"], port=int(str(given.get("port", 5432)))
    )
    # What many applications do; our payloads are text already.
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    transaction = connection.transaction()
    await transaction.start()
    yield connection, connection.execute, transaction.commit, transaction.rollback
    await connection.close()


@asynccontextmanager
async def _asyncpg_pool(dsn: str) -> AsyncIterator[Opened]:
    given = conninfo_to_dict(dsn)
    async with (
        asyncpg.create_pool(
            user=given["user"], database=given["dbname"], host=given["host"], port=int(str(given.get("port", 5432)))
        ) as pool,
        pool.acquire() as connection,
    ):
        transaction = connection.transaction()
        await transaction.start()
        yield connection, connection.execute, transaction.commit, transaction.rollback


def _async_connection(driver: str) -> Callable[[str], AbstractAsyncContextManager[Opened]]:
    @asynccontextmanager
    async def opened(dsn: str) -> AsyncIterator[Opened]:
        engine = create_async_engine(_url(dsn, driver), poolclass=NullPool)
        async with engine.connect() as connection:
            yield connection, lambda sql: connection.execute(text(sql)), connection.commit, connection.rollback

    return opened


def _async_session(driver: str) -> Callable[[str], AbstractAsyncContextManager[Opened]]:
    @asynccontextmanager
    async def opened(dsn: str) -> AsyncIterator[Opened]:
        engine = create_async_engine(_url(dsn, driver), poolclass=NullPool)
        async with async_sessionmaker(engine)() as session:
            yield session, lambda sql: session.execute(text(sql)), session.commit, session.rollback

    return opened


KINDS: dict[str, tuple[bool, Callable[[str], AbstractAsyncContextManager[Opened]]]] = {
    "psycopg2": (False, _psycopg2),
    "sqlalchemy connection, psycopg": (False, _connection("psycopg")),
    "sqlalchemy connection, psycopg2": (False, _connection("psycopg2")),
    "sqlalchemy session, psycopg": (False, _session("psycopg")),
    "sqlalchemy session, psycopg2": (False, _session("psycopg2")),
    "sqlalchemy scoped session, psycopg": (False, _session("psycopg", scoped=True)),
    "asyncpg": (True, _asyncpg),
    "asyncpg pool": (True, _asyncpg_pool),
    "sqlalchemy async connection, asyncpg": (True, _async_connection("asyncpg")),
    "sqlalchemy async connection, psycopg": (True, _async_connection("psycopg")),
    "sqlalchemy async session, asyncpg": (True, _async_session("asyncpg")),
    "sqlalchemy async session, psycopg": (True, _async_session("psycopg")),
}


class Lent:
    """A lent connection in a transaction, and a vault of its kind."""

    def __init__(self, vault: Any, opened: Opened) -> None:
        self.vault = vault
        self.connection, self._execute, self._commit, self._rollback = opened

    async def emit(self, *args: Any, **kwargs: Any) -> Any:
        return await _done(self.vault.emit(*args, connection=self.connection, **kwargs))

    async def emit_many(self, *args: Any, **kwargs: Any) -> Any:
        return await _done(self.vault.emit_many(*args, connection=self.connection, **kwargs))

    async def execute(self, sql: str) -> None:
        await _done(self._execute(sql))

    async def commit(self) -> None:
        await _done(self._commit())

    async def rollback(self) -> None:
        await _done(self._rollback())


async def _done(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


Lend = Callable[[str], AbstractAsyncContextManager[Lent]]


@pytest.fixture(params=KINDS)
def lend(request: pytest.FixtureRequest) -> Lend:
    """A function that opens a transaction on a connection of each kind in turn."""
    asynchronous, opens = KINDS[request.param]

    @asynccontextmanager
    async def lent(dsn: str) -> AsyncIterator[Lent]:
        vault: Any
        if asynchronous:
            async with start_tracevault(connection_string=dsn, **NOTHING_BUT_THE_LOG) as vault, opens(dsn) as opened:
                yield Lent(vault, opened)
        else:
            with Tracevault(connection_string=dsn, **NOTHING_BUT_THE_LOG) as vault:
                async with opens(dsn) as opened:
                    yield Lent(vault, opened)

    return lent


async def test_an_event_shares_the_fate_of_the_transaction(lend: Lend, ready_dsn: str) -> None:
    rows(ready_dsn, "CREATE TABLE things (name text)")
    async with lend(ready_dsn) as lent:
        await lent.execute("INSERT INTO things VALUES ('one')")
        receipt = await lent.emit("thing.made", actor={"id": "u%1", "type": "user"}, data=AWKWARD, meta={"%": "'"})
        assert receipt.stored == "transaction"
        assert rows(ready_dsn, "SELECT FROM audit_logs") == []
        await lent.commit()
        ((id_, data, meta, actor),) = rows(ready_dsn, "SELECT id, data, meta, actor_id FROM audit_logs")
        assert (id_, data, meta, actor) == (receipt.id, AWKWARD, {"%": "'"}, "u%1")
        assert rows(ready_dsn, "SELECT t.xmin::text = a.stored_xid::text FROM things t, audit_logs a") == [(True,)]
        assert lent.vault.stats().delivered == 1


async def test_a_rollback_takes_the_event_back(lend: Lend, ready_dsn: str) -> None:
    async with lend(ready_dsn) as lent:
        await lent.emit("thing.made")
        await lent.emit_many([{"event": f"many.{number}", "data": AWKWARD} for number in range(20)])
        await lent.rollback()
    assert rows(ready_dsn, "SELECT FROM audit_logs") == []


async def test_a_batch_is_stored_whole(lend: Lend, ready_dsn: str) -> None:
    async with lend(ready_dsn) as lent:
        receipts = await lent.emit_many([{"event": f"many.{number}", "data": AWKWARD} for number in range(1100)])
        await lent.commit()
    assert rows(ready_dsn, "SELECT id FROM audit_logs ORDER BY id") == [(receipt.id,) for receipt in receipts]


async def test_an_id_may_come_again_with_the_same_content(lend: Lend, ready_dsn: str) -> None:
    id_ = uuid4()
    async with lend(ready_dsn) as lent:
        for _ in range(2):
            await lent.emit("thing.made", id=id_, data=AWKWARD)
        with pytest.raises(DuplicateIdError):
            await lent.emit("thing.made", id=id_, data={"another": 1})
        await lent.commit()
    assert rows(ready_dsn, "SELECT data FROM audit_logs") == [(AWKWARD,)]


async def test_a_savepoint_keeps_the_transaction_alive(lend: Lend, ready_dsn: str) -> None:
    rows(ready_dsn, "ALTER TABLE audit_logs ADD CHECK (event <> 'refused')")
    async with lend(ready_dsn) as lent:
        await lent.emit("before")
        with pytest.raises(DriverError) as refusal:
            await lent.emit("refused", data={"secret": "hunter2"}, savepoint=True)
        assert refusal.value.sqlstate == "23514"
        assert not refusal.value.transient
        told = f"{refusal.value} {refusal.value.__cause__} {refusal.value.__context__}"
        assert "check constraint" in told
        assert "hunter2" not in told
        assert "INSERT" not in told
        await lent.emit("after")
        await lent.commit()
    assert rows(ready_dsn, "SELECT event FROM audit_logs ORDER BY id") == [("before",), ("after",)]


async def test_a_missing_table_is_named(lend: Lend, ready_dsn: str) -> None:
    async with lend(ready_dsn) as lent:
        rows(ready_dsn, "DROP TABLE audit_logs")
        with pytest.raises(DriverError, match="tracevault migrate") as refusal:
            await lent.emit("thing.made")
        assert refusal.value.sqlstate == "42P01"
        await lent.rollback()


async def test_autocommit_is_refused_unless_allowed(ready_dsn: str) -> None:
    options: Any = {"connection_string": ready_dsn, **NOTHING_BUT_THE_LOG}
    with Tracevault(**options) as audit:
        old = psycopg2.connect(ready_dsn)
        old.autocommit = True
        engine = create_engine(_url(ready_dsn, "psycopg"), isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection, Session(engine) as session:
            for lent in (old, connection, session):
                with pytest.raises(ValidationError, match="allow_autocommit=True"):
                    audit.emit("thing.made", connection=lent)
                assert audit.emit("thing.made", connection=lent, allow_autocommit=True).stored == "database"
                with pytest.raises(ValidationError, match="several statements"):
                    audit.emit_many(
                        [{"event": "a", "id": uuid4()}, {"event": "b"}], connection=lent, allow_autocommit=True
                    )
        old.close()
    assert rows(ready_dsn, "SELECT count(*) FROM audit_logs") == [(3,)]
    async with start_tracevault(**options) as vault, _asyncpg_pool(ready_dsn) as (connection, _, commit, _rollback):
        await commit()
        with pytest.raises(ValidationError, match="allow_autocommit=True"):
            await vault.emit("thing.made", connection=connection)


async def test_the_other_kind_of_connection_is_refused(ready_dsn: str) -> None:
    with Tracevault(connection_string=ready_dsn, **NOTHING_BUT_THE_LOG) as audit:
        engine = create_async_engine(_url(ready_dsn, "asyncpg"), poolclass=NullPool)
        async with AsyncSession(engine) as session:
            with pytest.raises(ValidationError, match="psycopg2's, Django's, SQLAlchemy's blocking"):
                audit.emit("thing.made", connection=session)
        for wrong in ("postgresql://", object()):
            with pytest.raises(ValidationError, match="`connection` must be"):
                audit.emit("thing.made", connection=wrong)
        with create_engine("sqlite://").connect() as sqlite, pytest.raises(ValidationError, match="PostgreSQL"):
            audit.emit("thing.made", connection=sqlite)
    async with start_tracevault(connection_string=ready_dsn, **NOTHING_BUT_THE_LOG) as vault:
        with Session(create_engine(_url(ready_dsn, "psycopg"), poolclass=NullPool)) as blocking:
            with pytest.raises(ValidationError, match="asyncpg's, SQLAlchemy's async ones"):
                await vault.emit("thing.made", connection=blocking)
            # Which code that SQLAlchemy runs for an AsyncSession sees.
            assert vault.emit_many_blocking(["thing.made"], connection=blocking)[0].stored == "transaction"
            blocking.commit()
    assert rows(ready_dsn, "SELECT event FROM audit_logs") == [("thing.made",)]


async def test_an_error_that_is_not_the_databases_is_passed_on(ready_dsn: str) -> None:
    async with start_tracevault(connection_string=ready_dsn, **NOTHING_BUT_THE_LOG) as vault:
        engine = create_async_engine(_url(ready_dsn, "asyncpg"), poolclass=NullPool)
        async with AsyncSession(engine) as session:
            task = asyncio.ensure_future(vault.emit("thing.made", connection=session))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
