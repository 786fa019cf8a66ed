"""Many at once, while connections break: every event is stored once, or its emit said that it is not."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
import pytest

from tests.conftest import rows
from tracevault import OutcomeUnknownError, Tracevault, TracevaultError, start_tracevault

OURS = "application_name = 'tracevault' AND datname = current_database()"


class Outcome(NamedTuple):
    """What one emit said."""

    number: int
    id: UUID | None
    error: BaseException | None


def stored(dsn: str) -> dict[int, list[UUID]]:
    found: dict[int, list[UUID]] = {}
    for number, id_ in rows(dsn, "SELECT (data->>'n')::int, id FROM audit_logs"):
        found.setdefault(number, []).append(id_)
    return found


def check(dsn: str, outcomes: list[Outcome]) -> Counter[str]:
    """Compare what the emits said with what is there; count what they said."""
    found = stored(dsn)
    said: Counter[str] = Counter()
    for number, id_, error in outcomes:
        there = found.pop(number, [])
        if error is None:
            assert there == [id_], (number, id_)
        elif isinstance(error, (OutcomeUnknownError, asyncio.CancelledError)):
            assert len(there) <= 1, (number, error)
        else:
            assert isinstance(error, TracevaultError), repr(error)
            assert there == [], (number, error)
        said[type(error).__name__] += 1
    assert found == {}
    return said


def connections(dsn: str) -> int:
    return int(rows(dsn, f"SELECT count(*) FROM pg_stat_activity WHERE {OURS}")[0][0])


def all_gone(dsn: str) -> bool:
    """Whether the server is soon rid of the vault's connections; a process of its takes a moment to end."""
    deadline = time.monotonic() + 3
    while connections(dsn) and time.monotonic() < deadline:
        time.sleep(0.02)
    return connections(dsn) == 0


@contextmanager
def killer(dsn: str, every: float, which: str = "ORDER BY random() LIMIT 1") -> Iterator[list[int]]:
    """Terminate connections of the vault, again and again; yield their process ids."""
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        with psycopg.connect(dsn, autocommit=True) as admin:
            statement = f"SELECT pid FROM pg_stat_activity WHERE {OURS} {which}"
            while not done.wait(every):
                for (pid,) in admin.execute(statement.encode()).fetchall():
                    admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
                    killed.append(pid)

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        try:
            yield killed
        finally:
            done.set()
        killing.result()


def attempt(vault: Tracevault, number: int, mode: str = "sync") -> Outcome:
    try:
        return Outcome(number, vault.emit("a", data={"n": number}, mode=mode).id, None)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001
        return Outcome(number, None, error)


async def attempt_async(vault: Any, number: int, mode: str = "sync") -> Outcome:
    try:
        return Outcome(number, (await vault.emit("a", data={"n": number}, mode=mode)).id, None)
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001
        return Outcome(number, None, error)


def run_threads(dsn: str, count: int, seconds: float, **options: Any) -> list[Outcome]:
    """Emit ``count`` events from 50 threads, spread over ``seconds``."""
    each = count // 50

    def emit(thread: int) -> list[Outcome]:
        outcomes = []
        for number in range(thread * each, (thread + 1) * each):
            outcomes.append(attempt(vault, number))
            time.sleep(seconds / each * random.uniform(0.5, 1.3))
        return outcomes

    with Tracevault(connection_string=dsn, **options) as vault, ThreadPoolExecutor(50) as pool:
        return [outcome for outcomes in pool.map(emit, range(50)) for outcome in outcomes]


def run_tasks(dsn: str, count: int, seconds: float, **options: Any) -> list[Outcome]:
    """Emit ``count`` events from 50 tasks, spread over ``seconds``."""
    each = count // 50

    async def main() -> list[Outcome]:
        async def emit(task: int) -> list[Outcome]:
            outcomes = []
            for number in range(task * each, (task + 1) * each):
                outcomes.append(await attempt_async(vault, number))
                await asyncio.sleep(seconds / each * random.uniform(0.5, 1.3))
            return outcomes

        async with start_tracevault(connection_string=dsn, **options) as vault:
            return [outcome for outcomes in await asyncio.gather(*map(emit, range(50))) for outcome in outcomes]

    return asyncio.run(main())


RUNS: dict[str, Callable[..., list[Outcome]]] = {"blocking": run_threads, "async": run_tasks}


@pytest.mark.parametrize("kind", RUNS)
def test_5000_emits_while_a_backend_dies_every_second(kind: str, dsn: str, request: pytest.FixtureRequest) -> None:
    full = kind == "async" and "pg18" in request.node.name
    seconds = 10.0 if full else 2.0
    with killer(dsn, 1.0 if full else 0.1) as killed:
        outcomes = RUNS[kind](dsn, 5000 if full else 1000, seconds)
    assert len(killed) >= 5
    assert check(dsn, outcomes) == {"NoneType": len(outcomes)}  # within `timeout` every one found its way
    assert all_gone(dsn)


@pytest.mark.parametrize("kind", RUNS)
def test_what_an_error_says_is_so(kind: str, ready_dsn: str) -> None:
    """With hardly any time for a second attempt, some emits fail; what they say must be true."""
    with killer(ready_dsn, 0.02, which="") as killed:
        outcomes = RUNS[kind](ready_dsn, 1500, 1.0, timeout=0.03, bootstrap={"ensure_schema": False})
    said = check(ready_dsn, outcomes)
    assert len(killed) > 10
    assert said["NoneType"] > 50
    assert said["OutcomeUnknownError"] + said["DriverError"] > 0, said
    assert set(said) <= {"NoneType", "OutcomeUnknownError", "DriverError"}


def test_four_processes_start_and_write_at_once(dsn: str) -> None:
    body = (
        "import sys\n"
        "from tracevault import Tracevault\n"
        "with Tracevault(connection_string=sys.argv[1]) as vault:\n"
        "    first = int(sys.argv[2])\n"
        "    for n in range(first, first + 100):\n"
        "        vault.emit('a', data={'n': n}, mode='async' if n % 2 else 'sync')\n"
        "    vault.emit_many({'event': 'a', 'data': {'n': n}} for n in range(first + 100, first + 300))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", body, dsn, str(number * 300)]) for number in range(4)
    ]
    assert [process.wait(60) for process in processes] == [0] * 4
    found = stored(dsn)
    assert sorted(found) == list(range(1200))
    assert all(len(ids) == 1 for ids in found.values())


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_close_during_emits_blocking(mode: str, ready_dsn: str) -> None:
    vault = Tracevault(connection_string=ready_dsn)

    def emit(thread: int) -> list[Outcome]:
        outcomes = []
        for number in range(thread * 10_000, thread * 10_000 + 10_000):
            outcomes.append(attempt(vault, number, mode))
            if isinstance(outcomes[-1].error, Exception):
                return outcomes
        return outcomes

    with ThreadPoolExecutor(24) as pool:
        running = [pool.submit(emit, thread) for thread in range(20)]
        while vault.stats().delivered <= 20:
            time.sleep(0.01)
        for closed in [pool.submit(vault.close) for _ in range(4)]:
            closed.result(10)
        outcomes = [outcome for future in running for outcome in future.result(10)]
    said = check(ready_dsn, outcomes)
    assert said["NoneType"] > 20
    assert said["TracevaultError"] == 20
    assert all_gone(ready_dsn)


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_close_during_emits_async(mode: str, ready_dsn: str) -> None:
    vault = await start_tracevault(connection_string=ready_dsn)

    async def emit(task: int) -> list[Outcome]:
        outcomes = []
        for number in range(task * 10_000, task * 10_000 + 10_000):
            outcomes.append(await attempt_async(vault, number, mode))
            if isinstance(outcomes[-1].error, Exception):
                return outcomes
            await asyncio.sleep(0)
        return outcomes

    running = [asyncio.create_task(emit(task)) for task in range(20)]
    while vault.stats().delivered <= 20:  # noqa: ASYNC110 - a vault has no event for that
        await asyncio.sleep(0.01)
    other_loop = asyncio.to_thread(lambda: asyncio.run(vault.close()))
    await asyncio.wait_for(asyncio.gather(other_loop, *(vault.close() for _ in range(3))), 10)
    outcomes = [outcome for task in running for outcome in await asyncio.wait_for(task, 10)]
    said = check(ready_dsn, outcomes)
    assert said["NoneType"] > 20
    assert said["TracevaultError"] == 20
    assert all_gone(ready_dsn)


async def test_a_cancelled_emit(ready_dsn: str) -> None:
    async with start_tracevault(connection_string=ready_dsn) as vault:
        outcomes = []
        for first in range(0, 1500, 50):
            tasks = [asyncio.create_task(attempt_async(vault, first + number)) for number in range(50)]
            await asyncio.sleep(0)
            for task in random.sample(tasks, 40):
                if random.random() < 0.3:
                    await asyncio.sleep(random.uniform(0, 0.001))
                task.cancel()
            outcomes += await asyncio.gather(*tasks)
        said = check(ready_dsn, outcomes)
        assert said["CancelledError"] > 100
        assert said["NoneType"] > 100
        assert set(said) == {"CancelledError", "NoneType"}

        await nothing_leaks(vault._engine._write[0])
        stats = vault.stats()
        assert (stats.delivered, stats.unknown, stats.in_flight) == (said["NoneType"], said["CancelledError"], 0)
        assert stats.emitted == 1500
        assert connections(ready_dsn) <= 10
        await asyncio.gather(*(vault.emit("a", data={"n": -number}) for number in range(1, 51)))
    assert all_gone(ready_dsn)


async def nothing_leaks(pool: Any) -> None:
    await asyncio.sleep(0.1)  # until what was cancelled has ended
    stats = pool.get_stats()
    assert stats["pool_available"] == stats["pool_size"], stats


async def test_a_cancelled_read(ready_dsn: str) -> None:
    async with start_tracevault(connection_string=ready_dsn) as vault:
        await vault.emit("a")
        for _ in range(20):
            tasks = [asyncio.create_task(vault.query.count()) for _ in range(30)]
            await asyncio.sleep(0)
            for task in random.sample(tasks, 20):
                if random.random() < 0.3:
                    await asyncio.sleep(random.uniform(0, 0.001))
                task.cancel()
            counts = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(count == 1 for count in counts) >= 10
            assert all(isinstance(count, asyncio.CancelledError) for count in counts if count != 1)
        await nothing_leaks(vault._engine._read[0])
        assert await asyncio.gather(*(vault.query.count() for _ in range(30))) == [1] * 30
    assert all_gone(ready_dsn)


async def test_a_cancelled_emit_returns_at_once(ready_dsn: str) -> None:
    async with start_tracevault(connection_string=ready_dsn, timeout=1) as vault:
        with psycopg.connect(ready_dsn) as lock:
            lock.execute("LOCK TABLE audit_logs IN SHARE MODE")
            start = time.monotonic()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await vault.emit("a", data={"n": 1})
            assert time.monotonic() - start < 0.5
        await vault.close()  # waits for it
        assert len(stored(ready_dsn)) <= 1
        assert all_gone(ready_dsn)


async def test_a_cancelled_emit_in_async_mode(ready_dsn: str) -> None:
    async with start_tracevault(connection_string=ready_dsn, max_queue=10, default_mode="async") as vault:
        tasks = [asyncio.create_task(attempt_async(vault, number, "async")) for number in range(500)]
        for task in random.sample(tasks, 300):
            await asyncio.sleep(0)
            task.cancel()
        outcomes = [
            result for result in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(result, Outcome)
        ]
        await vault.flush()
        for outcome in outcomes:
            if isinstance(outcome.error, asyncio.CancelledError):
                assert outcome.number not in stored(ready_dsn)
        assert check(ready_dsn, outcomes)["NoneType"] >= 200
