"""Pools that the caller owns: used, never closed, and their connections left as they were."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import AsyncClientCursor, ClientCursor
from psycopg.adapt import Loader
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from tests.conftest import rows
from tests.faces import Face, OpenVault
from tracevault import ConfigError, DriverError, TracevaultError

SECRET = "s3cr3t-sword"
NO_DDL = {"ensure_schema": False}


@pytest.fixture
def pools(face: OpenVault, ready_dsn: str) -> Iterator[Callable[..., Face]]:
    """A function that opens a pool of the kind that the face's vaults take, behind a face of its own."""
    first = face(connection_string=ready_dsn, bootstrap=NO_DDL)
    with ExitStack() as stack:

        def make(dsn: Any = ready_dsn, **options: Any) -> Face:
            kind: Any = AsyncConnectionPool if first.kind == "async" else ConnectionPool
            pool = Face(
                first.kind, kind(dsn, **{"min_size": 1, "max_size": 3, "open": False, **options}), first._runner
            )
            if options.get("open", True):
                pool.open()
                stack.callback(pool.close)
            return pool

        yield make


@pytest.mark.parametrize("autocommit", [False, True])
def test_everything_through_a_callers_pool(
    autocommit: bool, face: OpenVault, pools: Callable[..., Face], ready_dsn: str
) -> None:
    pool = pools(kwargs={"autocommit": autocommit})
    vault = face(pool=pool.vault, scopes={"default": "new_table"})  # made through the pool as well
    given = {"event": "b", "id": uuid4()}
    vault.emit("a")
    vault.emit(given)
    vault.emit(given)
    vault.emit_many(["c"] * 20)
    vault.emit_many([{"event": "d", "id": uuid4()} for _ in range(20)])
    vault.emit("e", mode="async")
    vault.flush()
    assert vault.query.count() == 43
    assert len(vault.query.find_many()) == 43
    assert vault.healthcheck()
    rows(ready_dsn, "ALTER TABLE new_table ADD CHECK (event <> 'bad')")
    for call in (lambda: vault.emit("bad"), lambda: vault.emit_many(["x", {"event": "bad", "id": uuid4()}])):
        with pytest.raises(DriverError):
            call()  # type: ignore[no-untyped-call]
    assert rows(ready_dsn, "SELECT count(*) FROM new_table") == [(43,)]
    vault.close()
    vault.close()
    assert not pool.vault.closed
    connection = Face(pool.kind, pool.getconn(), pool._runner)
    assert connection.vault.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert connection.vault.autocommit is autocommit
    connection.execute("SELECT 1")
    connection.rollback()
    pool.putconn(connection.vault)


def test_a_read_pool(face: OpenVault, pools: Callable[..., Face], ready_dsn: str) -> None:
    reader, writer = f"role_{uuid4().hex}", f"role_{uuid4().hex}"
    for name, right in ((reader, "SELECT"), (writer, "INSERT")):
        rows(ready_dsn, f"CREATE ROLE {name} LOGIN")
        rows(ready_dsn, f"GRANT {right} ON audit_logs TO {name}")
    writes, reads = pools(make_conninfo(ready_dsn, user=writer)), pools(make_conninfo(ready_dsn, user=reader))
    vault = face(pool=writes.vault, read_pool=reads.vault, bootstrap=NO_DDL)
    vault.emit("a")
    vault.emit("b", mode="async")
    vault.flush()
    assert vault.query.count() == 2
    vault.close()
    assert not writes.vault.closed
    assert not reads.vault.closed
    swapped = face(pool=reads.vault, read_pool=writes.vault, bootstrap=NO_DDL)
    with pytest.raises(DriverError, match="INSERT"):
        swapped.emit("c")


def test_the_wrong_kind_of_pool(face: OpenVault, pools: Callable[..., Face], ready_dsn: str) -> None:
    right = pools()
    other: Any = ConnectionPool if right.kind == "async" else AsyncConnectionPool
    for wrong in (other(ready_dsn, open=False, min_size=0, max_size=1), object(), ready_dsn):
        for options, field in (({"pool": wrong}, "pool"), ({"pool": right.vault, "read_pool": wrong}, "read_pool")):
            with pytest.raises(ConfigError, match="psycopg_pool") as caught:
                face(**options)
            assert caught.value.field == field


def test_a_pool_that_is_closed(face: OpenVault, pools: Callable[..., Face], ready_dsn: str) -> None:
    unopened = pools(open=False)
    with pytest.raises(TracevaultError, match=r"closed|open"):
        face(pool=unopened.vault)
    pool = pools()
    vault = face(pool=pool.vault, bootstrap=NO_DDL)
    vault.emit("a")
    pool.close()
    for call in (lambda: vault.emit("b"), lambda: vault.emit_many(["b"]), vault.query.count):
        with pytest.raises(TracevaultError, match="pool is closed"):
            call()  # type: ignore[no-untyped-call]
    assert not vault.healthcheck()
    vault.emit("c", mode="async")  # the background writer has a connection of its own
    vault.close()
    assert rows(ready_dsn, "SELECT event FROM audit_logs ORDER BY event") == [("a",), ("c",)]


def test_a_pool_with_a_queue_that_is_full(face: OpenVault, pools: Callable[..., Face]) -> None:
    pool = pools(max_size=1, max_waiting=1)
    vault = face(pool=pool.vault, bootstrap=NO_DDL, timeout=0.3)
    connection = pool.getconn()
    with pytest.raises(DriverError) as caught:
        vault.emit("a")
    assert caught.value.transient
    pool.putconn(connection)
    vault.emit("b")


class Lie(Loader):
    """What an application may register for its own needs."""

    def load(self, data: Any) -> str:
        return ""


def test_the_habits_of_its_connections_do_not_matter(face: OpenVault, pools: Callable[..., Face]) -> None:
    def configure(connection: Any) -> None:
        connection.cursor_factory = AsyncClientCursor if asynchronous else ClientCursor
        for name in ("uuid", "timestamptz", "text", "varchar", "int8", "bool", "jsonb"):
            connection.adapters.register_loader(name, Lie)

    async def configure_async(connection: Any) -> None:
        configure(connection)

    asynchronous = pools(open=False).kind == "async"
    pool = pools(configure=configure_async if asynchronous else configure, kwargs={"row_factory": dict_row})
    vault = face(pool=pool.vault, bootstrap=NO_DDL)
    given = {"event": "a", "id": uuid4(), "data": {"n": 1}, "occurred_at": "2026-01-01"}
    vault.emit(given)
    vault.emit(given)
    vault.emit(given, mode="async")
    vault.flush()
    (record,) = vault.query.find_many()
    assert (record.id, record.event, record.data) == (given["id"], "a", {"n": 1})
    assert isinstance(record.id, UUID)
    assert record.occurred_at.isoformat() == "2026-01-01T00:00:00+00:00"
    assert vault.query.count() == 1


def test_where_background_writers_connect(face: OpenVault, pools: Callable[..., Face], ready_dsn: str) -> None:
    pool = pools(kwargs={"application_name": "the caller", "row_factory": dict_row, "autocommit": False})
    vault = face(pool=pool.vault, bootstrap=NO_DDL, default_mode="async")
    vault.emit("a")
    vault.flush()
    names = "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{}' AND query LIKE 'COPY%%'"
    assert rows(ready_dsn, names.format("the caller")) == [(1,)]
    vault.close()

    made = []

    def writer_connect() -> Any:
        made.append(psycopg.connect(ready_dsn, application_name="by hand"))
        return made[-1]

    vault = face(pool=pool.vault, writer_connect=writer_connect, bootstrap=NO_DDL, default_mode="async")
    vault.emit("b")
    vault.flush()
    assert rows(ready_dsn, names.format("by hand")) == [(1,)]
    vault.close()
    assert [connection.closed for connection in made] == [True]

    vault = face(pool=pool.vault, connection_string=ready_dsn, bootstrap=NO_DDL, default_mode="async")
    vault.emit("c")
    vault.flush()
    assert rows(ready_dsn, names.format("tracevault")) == [(1,)]


def test_a_pool_that_says_its_conninfo_anew(face: OpenVault, pools: Callable[..., Face], ready_dsn: str) -> None:
    for options in ({"dsn": lambda: ready_dsn}, {"kwargs": lambda: {"autocommit": True}}):
        pool = pools(**options)
        with pytest.raises(ConfigError, match="writer_connect") as caught:
            face(pool=pool.vault, bootstrap=NO_DDL)
        assert caught.value.field == "writer_connect"
        vault = face(pool=pool.vault, bootstrap=NO_DDL, writer_connect=lambda: psycopg.connect(ready_dsn))
        vault.emit("a")
        vault.emit("b", mode="async")
        vault.close()


def test_a_pool_that_cannot_connect(
    face: OpenVault, pools: Callable[..., Face], caplog: pytest.LogCaptureFixture
) -> None:
    for wrong in (f"host=x password '{SECRET}'", f"postgresql://u:{SECRET}@@h/d"):
        with pytest.raises(TracevaultError) as caught:
            face(pool=pools(wrong, open=False).vault, bootstrap=NO_DDL)
        assert SECRET not in "".join(traceback.format_exception(caught.value))
    pool = pools(f"host=/no/such/folder password={SECRET}", min_size=0)
    vault = face(pool=pool.vault, bootstrap=NO_DDL, timeout=0.3)
    with pytest.raises(DriverError) as failed:
        vault.emit("a")
    assert failed.value.transient
    assert SECRET not in "".join(traceback.format_exception(failed.value))
    assert SECRET not in caplog.text


@pytest.mark.parametrize("source", ["connection string", "environment", "writer_connect"])
def test_another_client_encoding(source: str, face: OpenVault, ready_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the surroundings ask for, events are said in UTF-8; a caller's connection is refused, or says it."""
    dsn = make_conninfo(ready_dsn, client_encoding="latin1")
    options: dict[str, Any] = {"connection_string": ready_dsn}
    if source == "connection string":
        options["connection_string"] = dsn
    elif source == "environment":
        monkeypatch.setenv("PGCLIENTENCODING", "latin1")
    else:
        options["writer_connect"] = lambda: psycopg.connect(dsn)
    vault = face(**options, bootstrap=NO_DDL)
    text = "é€"
    vault.emit("a", request_id=text)
    for _ in range(20):
        vault.emit("a", request_id=text, mode="async")
    vault.flush()
    vault.emit_many([{"event": "a", "request_id": text}] * 20)
    assert vault.query.count(request_id=text) == 41
    connection = vault.connect(dsn, autocommit=True)
    vault.emit("a", request_id="é", connection=connection.vault, allow_autocommit=True)
    assert vault.query.count(request_id="é") == 1
    with pytest.raises(DriverError, match="client_encoding"):
        vault.emit("a", request_id=text, connection=connection.vault, allow_autocommit=True)
    with pytest.raises(DriverError, match="client_encoding"):
        vault.emit_many([{"event": "a", "request_id": text}] * 20, connection=connection.vault, allow_autocommit=True)
    assert vault.query.count() == 42
    connection.close()
