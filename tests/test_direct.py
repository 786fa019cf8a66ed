"""Sync emits against time: locked tables, dead and frozen connections, exhausted pools."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from tests.conftest import rows
from tests.faces import Face, OpenVault
from tests.servers import one_server
from tracevault import DriverError, DuplicateIdError, OutcomeUnknownError, Tracevault, start_tracevault

OURS = "application_name = 'tracevault' AND datname = current_database()"
NO_DDL = {"ensure_schema": False}


def open_vault(face: OpenVault, dsn: str, **more: Any) -> Face:
    return face(connection_string=dsn, bootstrap=NO_DDL, **more)


def count(dsn: str) -> int:
    return int(rows(dsn, "SELECT count(*) FROM audit_logs")[0][0])


def pids(dsn: str) -> list[int]:
    return [row[0] for row in rows(dsn, f"SELECT pid FROM pg_stat_activity WHERE {OURS}")]


@contextmanager
def frozen(*processes: int) -> Iterator[None]:
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def locked(dsn: str) -> Iterator[None]:
    with psycopg.connect(dsn) as connection:
        connection.execute("LOCK TABLE audit_logs IN SHARE MODE")
        yield
        connection.rollback()


def failure(call: Callable[[], object], seconds: float) -> DriverError:
    """The error of a call that gives up soon after ``seconds``, neither before nor much later."""
    start = time.monotonic()
    with pytest.raises(DriverError) as caught:
        call()
    assert seconds * 0.9 <= time.monotonic() - start < seconds + 1.5
    return caught.value


@pytest.mark.parametrize("events", [None, 3, 20], ids=["emit", "insert", "copy"])
def test_a_locked_table(events: int | None, face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, timeout=0.4)
    with locked(ready_dsn):
        call = (lambda: vault.emit("a")) if events is None else (lambda: vault.emit_many(["a"] * events))
        error = failure(call, 0.4)
        assert (type(error), error.sqlstate, error.transient) == (DriverError, "57014", True)
        assert "locked" in str(error)
    time.sleep(0.1)
    assert count(ready_dsn) == 0  # certainly, and for ever
    vault.emit("b")


def test_a_locked_table_and_a_pool_of_the_callers(ready_dsn: str) -> None:
    """Its connections have no statement_timeout, and it is not ours to set one."""
    with (
        ConnectionPool(ready_dsn, min_size=1, open=True) as pool,
        Tracevault(pool=pool, timeout=0.4, bootstrap=NO_DDL) as vault,
    ):
        with locked(ready_dsn):
            error = failure(lambda: vault.emit("a"), 0.4)
            assert (type(error), error.sqlstate) == (DriverError, "57014")
            assert rows(ready_dsn, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'") == [(0,)]
        assert count(ready_dsn) == 0
        with pool.connection() as connection:
            assert connection.execute("SHOW statement_timeout").fetchone() == ("0",)
            assert "wait" not in vars(connection)
        vault.emit("b")


async def test_a_locked_table_and_an_async_pool_of_the_callers(ready_dsn: str) -> None:
    async with (
        AsyncConnectionPool(ready_dsn, min_size=1, open=False) as pool,
        start_tracevault(pool=pool, timeout=0.4, bootstrap=NO_DDL) as vault,
    ):
        with locked(ready_dsn):
            start = time.monotonic()
            with pytest.raises(DriverError) as caught:
                await vault.emit("a")
            assert 0.35 < time.monotonic() - start < 1.9
            assert (type(caught.value), caught.value.sqlstate) == (DriverError, "57014")
        assert count(ready_dsn) == 0
        async with pool.connection() as connection:
            assert "wait" not in vars(connection)
        await vault.emit("b")


@pytest.mark.parametrize("events", [None, 20], ids=["emit", "emit_many"])
def test_a_frozen_connection(events: int | None, face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, timeout=0.5)
    vault.emit("a")
    with frozen(*pids(ready_dsn)):
        call = (lambda: vault.emit("b")) if events is None else (lambda: vault.emit_many(["b"] * events))
        error = failure(call, 0.5)
        assert isinstance(error, OutcomeUnknownError)
        assert error.transient
        assert str(error.id) in str(error)
        if events is None:
            assert vault.emit("b", id=error.id).stored == "database"  # what its message advises
    time.sleep(0.2)
    assert count(ready_dsn) in ((2,) if events is None else (1, 21))
    vault.emit("c")


def test_a_health_check_of_a_frozen_server(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, timeout=0.4)
    assert vault.healthcheck()
    with frozen(*pids(ready_dsn)):
        start = time.monotonic()
        assert vault.healthcheck() is False
        assert time.monotonic() - start < 2.5
    assert vault.healthcheck()


@one_server
def test_a_pool_full_of_dead_connections(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    fill(vault, ready_dsn)
    assert len(pids(ready_dsn)) > 5
    calls: list[Callable[[], object]] = [
        lambda: vault.emit("b"),
        vault.query.count,
        lambda: vault.emit_many(["c"] * 20),
    ]
    for call in calls:
        rows(ready_dsn, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}")
        start = time.monotonic()
        call()
        assert time.monotonic() - start < 3
    assert count(ready_dsn) == 10 + 1 + 20


def fill(vault: Face, dsn: str) -> None:
    """Make the vault open ten connections: ten batches that wait for one lock."""
    raw = vault.vault
    with ThreadPoolExecutor(11) as pool, psycopg.connect(dsn) as lock:
        lock.execute("LOCK TABLE audit_logs IN SHARE MODE")
        unlocking = pool.submit(lambda: (time.sleep(0.5), lock.rollback()))  # type: ignore[func-returns-value]
        if vault.kind == "async":

            async def emits() -> None:
                await asyncio.gather(*(raw.emit_many(["a"]) for _ in range(10)))

            assert vault._runner is not None
            vault._runner.run(emits())
        else:
            list(pool.map(lambda _: raw.emit_many(["a"]), range(10)))
        unlocking.result()


def test_a_certain_failure_is_not_repeated(face: OpenVault, ready_dsn: str) -> None:
    rows(ready_dsn, "CREATE SEQUENCE tries")
    rows(
        ready_dsn,
        "CREATE FUNCTION try() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM nextval('tries'); RAISE 'no' USING ERRCODE = '40001'; END $$",
    )
    rows(ready_dsn, "CREATE TRIGGER try BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION try()")
    vault = open_vault(face, ready_dsn)
    with pytest.raises(DriverError) as caught:
        vault.emit("a")
    assert (caught.value.sqlstate, caught.value.transient) == ("40001", True)
    assert rows(ready_dsn, "SELECT last_value FROM tries") == [(1,)]


def test_an_exhausted_pool(ready_dsn: str) -> None:
    with (
        ConnectionPool(ready_dsn, min_size=1, max_size=1, open=True) as pool,
        Tracevault(pool=pool, timeout=0.4, bootstrap=NO_DDL) as vault,
        pool.connection(),
    ):
        error = failure(lambda: vault.emit("a"), 0.4)
        assert (type(error), error.sqlstate, error.transient) == (DriverError, None, True)
        assert "max_size" in str(error)
        error = failure(vault.query.count, 0.4)
        assert "max_size" in str(error)


@one_server
def test_it_is_back_soon_after_the_database(face: OpenVault, ready_dsn: str) -> None:
    """However long it was down: a pool by itself would wait as long again."""
    vault = open_vault(face, ready_dsn, timeout=0.3)
    vault.emit("a")
    name = conninfo_to_dict(ready_dsn)["dbname"]
    with psycopg.connect(ready_dsn, dbname="postgres", autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        admin.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'".encode())
        end = time.monotonic() + 4
        while time.monotonic() < end:
            with pytest.raises(DriverError):
                vault.emit("b")
        assert not vault.healthcheck()
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
    start = time.monotonic()
    while time.monotonic() - start < 5:
        try:
            vault.emit("c")
            vault.query.count()
            break
        except DriverError:
            pass
    assert time.monotonic() - start < 1.6


# --- answers that get lost ----------------------------------------------------------------------------------


class Proxy:
    """Stands between vault and server, and can lose an answer: the server has done it, and nobody is told."""

    def __init__(self, dsn: str, folder: Path) -> None:
        parts = conninfo_to_dict(dsn)
        self._server = f"{parts['host']}/.s.PGSQL.{parts.get('port', 5432)}"
        self.dsn = make_conninfo(dsn, host=str(folder), port=5432)
        self.lost = 0
        self._pattern: bytes | None = None
        self._ends: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen()
        self._threads = [Thread(target=self._accept)]
        self._threads[0].start()

    def lose(self, pattern: bytes) -> None:
        """Lose the next answer that contains this, and cut its connection."""
        self._pattern = pattern

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                self._ends += [client, server]
                thread = Thread(target=self._carry, args=(client, server))
                self._threads.append(thread)
                thread.start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, suppress(OSError):
            while True:
                for end in select.select([client, server], [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    if end is server and self._pattern is not None and self._pattern in data:
                        self._pattern = None
                        self.lost += 1
                        return
                    (server if end is client else client).sendall(data)


@pytest.fixture
def proxy(ready_dsn: str) -> Iterator[Proxy]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        proxy = Proxy(ready_dsn, Path(folder))
        yield proxy
        proxy.close()


@pytest.mark.parametrize("rights", ["INSERT", "INSERT, SELECT"])
def test_a_lost_answer(rights: str, face: OpenVault, ready_dsn: str, proxy: Proxy) -> None:
    """The row is there, and the second attempt finds it: that is success, not a taken id."""
    name = f"role_{uuid4().hex}"
    rows(ready_dsn, f"CREATE ROLE {name} LOGIN")
    rows(ready_dsn, f"GRANT {rights} ON audit_logs TO {name}")
    vault = open_vault(face, make_conninfo(proxy.dsn, user=name))
    proxy.lose(b"INSERT 0 1")
    receipt = vault.emit("a")
    for size, answer in ((3, b"INSERT 0 3"), (20, b"COPY 20")):
        proxy.lose(answer)
        assert len(vault.emit_many(["b"] * size)) == size
    for size in (1, 20):
        vault.flush()
        with locked(ready_dsn):
            vault.emit("first", mode="async")
            for _ in range(size):
                vault.emit("c", mode="async")
            proxy.lose(b"COPY ")
        vault.flush()
    assert proxy.lost == 5
    assert rows(ready_dsn, "SELECT event, count(*) FROM audit_logs GROUP BY 1 ORDER BY 1") == [
        ("a", 1),
        ("b", 23),
        ("c", 21),
        ("first", 2),
    ]
    assert rows(ready_dsn, "SELECT id FROM audit_logs WHERE event = 'a'") == [(receipt.id,)]
    vault.close()


def test_a_lost_answer_about_a_callers_id(face: OpenVault, ready_dsn: str, proxy: Proxy) -> None:
    vault = open_vault(face, proxy.dsn)
    event = {"event": "a", "id": uuid4()}
    proxy.lose(b"INSERT 0 1")
    vault.emit(event)
    batch = [{"event": "b", "id": uuid4()} for _ in range(20)]
    for answer in (b"COMMIT", b"INSERT 0 0"):
        proxy.lose(answer)
        vault.emit_many(batch)
    with pytest.raises(DuplicateIdError):
        vault.emit({**event, "event": "c"})
    assert proxy.lost == 3
    assert count(ready_dsn) == 21
    vault.close()


def test_a_lost_answer_and_no_time_left(face: OpenVault, ready_dsn: str, proxy: Proxy) -> None:
    vault = open_vault(face, proxy.dsn, timeout=0.3)
    vault.emit("a")
    with locked(ready_dsn):
        proxy.lose(b"57014")  # the server's word that it was not stored
        with pytest.raises(OutcomeUnknownError) as caught:
            vault.emit("b")
    assert vault.emit("b", id=caught.value.id).id == caught.value.id
    assert count(ready_dsn) == 2
    vault.close()
