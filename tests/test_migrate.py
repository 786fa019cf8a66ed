"""Start-up and `migrate` at work: upgrades, in place and under load, interrupted, at once, without rights."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from tests.conftest import rows
from tests.faces import OpenVault
from tests.test_ddl import STAGES, columns_of, fresh_database, in_schema, indexes_of, reference_sql
from tests.test_state import plan_of
from tracevault import DriverError, MigrationError, Tracevault, generate_init_sql, start_tracevault
from tracevault.flows import Query, Result
from tracevault.flows import migrate as flows
from tracevault.flows.migrate import build_index, drop_indexes, lock_migrations, look, swap_index
from tracevault.postgres import schema
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.postgres.schema import ensure_schema, ensure_schema_async, migrate, migration_plan
from tracevault.schema.indexes import INDEXES, PARTITIONED_INDEXES, PAYLOAD_INDEXES, temporary_name

PLACE = Place("testing")
FILL = """
INSERT INTO {table} (id, event, actor_id, actor_type, data, meta, mode, occurred_at, correlation_id)
SELECT gen_random_uuid(), 'auth.' || n, 'u' || n, 'user',
  jsonb_build_object('n', n, 'outcome', ' failure ', 'severity', 'error', 'error', jsonb_build_object('code', n)),
  '{{"ip": "::1"}}', 'sync', timestamptz '2026-01-01Z' + n * interval '1 second', 'c' || n
FROM generate_series(1, {count}) AS n
"""
INDEX_EVENT = "idx_audit_logs_event"
NEW_EVENT = temporary_name("new", INDEX_EVENT)
OLD_EVENT = temporary_name("old", INDEX_EVENT)


@pytest.fixture(scope="module")
def database(server: str) -> Iterator[str]:
    with fresh_database(server, "migrations") as dsn:
        yield dsn


@pytest.fixture
def dsn(database: str) -> str:
    """An empty schema: quicker made than a database."""
    return in_schema(database, "empty")


@pytest.fixture
def ready_dsn(dsn: str) -> str:
    rows(dsn, generate_init_sql("audit_logs"))
    rows(dsn, generate_init_sql("audit_user_events"))
    return dsn


def fill(dsn: str, count: int, table: str = "audit_logs") -> None:
    rows(dsn, FILL.format(table=table, count=count))


@pytest.fixture
def old_event_dsn(ready_dsn: str) -> str:
    """A filled table in which one index is the reference's."""
    rows(ready_dsn, f"DROP INDEX {INDEX_EVENT}; CREATE INDEX {INDEX_EVENT} ON audit_logs (event)")
    fill(ready_dsn, 10)
    return ready_dsn


def run_migrate(dsn: str, *tables: str, settings: str = "") -> list[str]:
    """Run `migrate` as the command line does; return what it announced."""
    announced: list[str] = []
    names = tables or ("audit_logs",)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(settings.encode())
        migrate(connection, migration_plan(connection, names), announced.append)
        assert all(table_plan.done for table_plan in migration_plan(connection, names))
        # Nothing stays locked, and nothing temporary stays.
        assert connection.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,)
    temporary = r"relname ~ '^(new|old)_' AND relnamespace = quote_ident(current_schema)::regnamespace"
    assert rows(dsn, f"SELECT relname FROM pg_class WHERE {temporary}") == []
    return announced


def content(dsn: str, table: str = "audit_logs") -> list[tuple[Any, ...]]:
    return rows(dsn, f"SELECT id, event, actor_id, data::text, occurred_at, created_at FROM {table} ORDER BY id")


def file_of(dsn: str, name: str = "audit_logs") -> Any:
    return rows(dsn, "SELECT pg_relation_filenode(%s)", name)[0][0]


@contextmanager
def transaction(dsn: str, *statements: str) -> Iterator[psycopg.Connection[Any]]:
    """Another session, which stays in the middle of a transaction."""
    with psycopg.connect(dsn) as connection:
        for statement in statements:
            connection.execute(statement.encode())
        yield connection
        connection.rollback()


def stated(caught: pytest.ExceptionInfo[MigrationError], *phrases: str) -> None:
    for phrase in phrases:
        assert phrase in str(caught.value)


# --- upgrades of the reference's table ----------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_start_up_upgrades_the_columns_of_a_filled_table(
    dsn: str, face: OpenVault, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows(dsn, reference_sql(stage))
    fill(dsn, 200)
    rows_before, file_before, indexes_before = content(dsn), file_of(dsn), indexes_of(dsn)
    vault = face(connection_string=dsn)
    receipt = vault.emit("after.upgrade", tenant_id="t", data={"severity": "info"})
    assert vault.query.find_by_id(receipt.id).severity == "info"
    assert vault.query.count(outcome="failure", severity="error", error_code="7") == 1
    assert [row for row in content(dsn) if row[0] != receipt.id] == rows_before
    assert (file_of(dsn) == file_before) == (stage == "after 003")
    assert rows(dsn, "SELECT count(*), count(stored_xid), count(payload_salt) FROM audit_logs") == [(201, 1, 1)]
    # No index is built: those of the reference stay, and the log says what to do.
    assert indexes_of(dsn) == indexes_before
    vault.close()
    caplog.clear()
    face(connection_string=dsn)
    (warning,) = [record for record in caplog.records if record.name == "tracevault"]
    assert warning.levelno == logging.WARNING
    assert "indexes are missing or old" in warning.getMessage()
    assert "run `tracevault migrate --table audit_logs`" in warning.getMessage()


@pytest.mark.parametrize("stage", STAGES)
def test_migrate_upgrades_a_filled_table(dsn: str, stage: str) -> None:
    rows(dsn, generate_init_sql("fresh"))
    rows(dsn, reference_sql(stage))
    fill(dsn, 200)
    rows_before, file_before = content(dsn), file_of(dsn)
    announced = run_migrate(dsn)
    assert content(dsn) == rows_before
    assert (file_of(dsn) == file_before) == (stage == "after 003")
    rewrites = [text for text in announced if "writes the table anew" in text]
    assert len(rewrites) == (stage != "after 003")
    assert all(" MB" in text for text in rewrites)
    assert rows(dsn, "SELECT count(*) FROM audit_logs WHERE outcome = 'failure' AND error_code = data->>'n'") == [
        (200,)
    ]
    assert columns_of(dsn) == columns_of(dsn, "fresh")
    fresh = {text.replace("fresh", "audit_logs") for text in indexes_of(dsn, "fresh").values()}
    assert set(indexes_of(dsn).values()) == fresh
    assert run_migrate(dsn) == []


@pytest.mark.parametrize("stage", STAGES[:2])
def test_start_up_refuses_to_rewrite_a_large_table(
    dsn: str, face: OpenVault, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(dsn, reference_sql(stage))
    fill(dsn, 11)
    before = columns_of(dsn)
    monkeypatch.setattr(flows, "REWRITE_LIMIT", 10)
    with pytest.raises(MigrationError) as caught:
        face(connection_string=dsn)
    stated(caught, "`audit_logs` has more than 10 rows", " MB", "run `tracevault migrate --table audit_logs`")
    assert columns_of(dsn) == before
    monkeypatch.setattr(flows, "REWRITE_LIMIT", 11)
    face(connection_string=dsn)
    assert columns_of(dsn) != before


def test_a_text_that_no_generated_column_holds(dsn: str, face: OpenVault) -> None:
    rows(dsn, reference_sql("after 001"))
    fill(dsn, 1)
    rows(dsn, """UPDATE audit_logs SET data = jsonb_build_object('outcome', repeat('x', 65), 'secret', 's3cret')""")
    before = columns_of(dsn)
    for upgrade in (lambda: face(connection_string=dsn), lambda: run_migrate(dsn)):
        with pytest.raises(MigrationError) as caught:
            upgrade()
        stated(
            caught, "`audit_logs` holds a text that is too long", "outcome (64 characters), error_code (255 characters)"
        )
        assert "xxx" not in str(caught.value)
    assert columns_of(dsn) == before


def test_migrate_makes_a_table_that_is_missing(dsn: str) -> None:
    assert run_migrate(dsn, "one", "two") == ["one: create the table", "two: create the table"]
    assert run_migrate(dsn, "one", "two") == []
    assert len(indexes_of(dsn, "one")) == len(INDEXES) + 1


# --- while others use the table -----------------------------------------------------------------------------


def test_migrate_under_load(dsn: str, face: OpenVault) -> None:
    """Writers and readers go on: also those in the middle of a transaction that has read the table."""
    rows(dsn, reference_sql("after 003"))
    fill(dsn, 20_000)
    vault = face(connection_string=dsn)
    stop, slowest, written, errors = threading.Event(), [0.0], [0], list[BaseException]()

    def write() -> None:
        try:
            with psycopg.connect(dsn, autocommit=True) as connection:
                while not stop.is_set():
                    begun = time.monotonic()
                    with connection.transaction():
                        connection.execute("SELECT FROM audit_logs LIMIT 1")
                        connection.execute(FILL.format(table="audit_logs", count=1).encode())
                    slowest[0] = max(slowest[0], time.monotonic() - begun)
                    written[0] += 1
        except BaseException as error:  # noqa: BLE001 - reported by the test
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        announced = run_migrate(dsn)
    finally:
        stop.set()
        writer.join()
    vault.emit("still.there")
    assert errors == []
    assert len(announced) >= len(INDEXES) - 1
    assert written[0] > 50
    assert slowest[0] < 1.5, slowest
    assert rows(dsn, "SELECT count(*) FROM audit_logs") == [(20_000 + written[0] + 1,)]


@pytest.mark.parametrize(
    ("statement", "waiting"),
    [
        (
            "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'e', 'sync', now())",
            "CREATE",
        ),
        ("SELECT count(*) FROM audit_logs", "DROP"),
    ],
)
def test_a_long_transaction_makes_migrate_wait_but_nobody_else(
    old_event_dsn: str, face: OpenVault, statement: str, waiting: str
) -> None:
    """Neither the build, nor giving an index another's place, nor start-up meanwhile can block or deadlock."""
    with transaction(old_event_dsn, statement) as other:
        migrating = threading.Thread(target=run_migrate, args=(old_event_dsn,))
        migrating.start()
        activity = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        wait_until(old_event_dsn, f"{activity} AND starts_with(query, '{waiting} INDEX CONCURRENTLY')")
        begun = time.monotonic()
        vault = face(connection_string=old_event_dsn, scopes={"default": "audit_logs", "new": "made_meanwhile"})
        vault.emit("a.b")
        assert vault.query.count(event="a.b") == 1
        vault.get_scope("new").emit("a.b")
        assert time.monotonic() - begun < 2
        assert migrating.is_alive()
        other.rollback()
        migrating.join(30)
    assert not migrating.is_alive()
    assert plan_of(old_event_dsn).done


def wait_until(dsn: str, query: str) -> None:
    until = time.monotonic() + 10
    while rows(dsn, query) != [(True,)]:
        assert time.monotonic() < until, query
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("stage", "lock", "phrases"),
    [
        # A writer in the middle of its transaction; columns are to be added.
        ("after 003", "LOCK TABLE audit_logs IN ROW EXCLUSIVE MODE", ["`audit_logs` is locked", "try again"]),
        # A table that is being written anew; even to look at it takes a lock.
        ("after 003", "LOCK TABLE audit_logs IN ACCESS EXCLUSIVE MODE", ["`audit_logs` is locked", "try again"]),
        # Another process that starts, and takes long.
        ("after 001", f"SELECT pg_advisory_xact_lock({flows._START_LOCK})", ["schema of `audit_logs` is locked"]),
    ],
)
def test_start_up_does_not_wait_long_for_a_lock(
    dsn: str, face: OpenVault, stage: str, lock: str, phrases: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (flows._START_LOCK_TIMEOUT, flows._TABLE_LOCK_TIMEOUT) == ("10s", "2s")
    monkeypatch.setattr(flows, "_START_LOCK_TIMEOUT", "400ms")
    monkeypatch.setattr(flows, "_TABLE_LOCK_TIMEOUT", "200ms")
    rows(dsn, reference_sql(stage))
    fill(dsn, 1)
    before = columns_of(dsn)
    with transaction(dsn, lock):
        begun = time.monotonic()
        with pytest.raises(MigrationError) as caught:
            face(connection_string=dsn)
        assert time.monotonic() - begun < 2
    stated(caught, *phrases)
    assert columns_of(dsn) == before
    face(connection_string=dsn)
    assert columns_of(dsn) != before


def test_start_up_waits_for_another_one_that_rewrites(
    dsn: str, face: OpenVault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows, "_TABLE_LOCK_TIMEOUT", "200ms")
    rows(dsn, generate_init_sql("audit_logs"))
    lock = f"SELECT pg_advisory_xact_lock({flows._START_LOCK}); LOCK TABLE audit_logs IN ACCESS EXCLUSIVE MODE"
    with transaction(dsn, lock) as other:
        threading.Timer(0.8, other.rollback).start()
        face(connection_string=dsn).emit("a.b")


def test_migrate_waits_in_turns_and_gives_up(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "_TABLE_LOCK_TIMEOUT", "100ms")
    monkeypatch.setattr(schema, "PATIENCE", 0.5)
    monkeypatch.setattr(schema, "_PAUSE", 0.05)
    rows(dsn, reference_sql("after 003"))
    with transaction(dsn, "LOCK TABLE audit_logs IN ROW EXCLUSIVE MODE") as other:
        with pytest.raises(MigrationError, match=r"`audit_logs` is in use by a transaction that does not end; run"):
            run_migrate(dsn)
        monkeypatch.setattr(schema, "PATIENCE", 30)
        threading.Timer(0.5, other.rollback).start()
        run_migrate(dsn)


# --- interrupted, repaired, at once -------------------------------------------------------------------------


def test_migrate_goes_on_after_an_interruption(old_event_dsn: str) -> None:
    """Between each two statements of replacing an index."""
    with psycopg.connect(old_event_dsn, autocommit=True) as connection:
        (table_plan,) = migration_plan(connection, ["audit_logs"])
        (change,) = table_plan.changes
        run(connection, build_index(table_plan, change), PLACE)
        assert [to_do.built for to_do in plan_of(old_event_dsn).changes] == [True]
        built = file_of(old_event_dsn, NEW_EVENT)
        with connection.transaction():
            run(connection, swap_index(table_plan, change), PLACE)
        assert [to_do.summary for to_do in plan_of(old_event_dsn).changes] == [f"drop index {OLD_EVENT}"]
        run(connection, drop_indexes(table_plan, change), PLACE)
    assert plan_of(old_event_dsn).done

    rows(old_event_dsn, f"ALTER INDEX {INDEX_EVENT} RENAME TO {NEW_EVENT}")
    assert run_migrate(old_event_dsn) == [f"audit_logs: build index {INDEX_EVENT}"]
    assert file_of(old_event_dsn, INDEX_EVENT) == built  # not built again

    rows(old_event_dsn, f"CREATE INDEX {OLD_EVENT} ON audit_logs (event)")
    assert run_migrate(old_event_dsn) == [f"audit_logs: drop index {OLD_EVENT}"]


def test_an_index_of_a_failed_build_is_replaced(old_event_dsn: str) -> None:
    with (
        transaction(old_event_dsn, "UPDATE audit_logs SET meta = NULL"),
        psycopg.connect(old_event_dsn, autocommit=True) as connection,
    ):
        connection.execute("SET statement_timeout = 300")
        (table_plan,) = migration_plan(connection, ["audit_logs"])
        with pytest.raises(DriverError, match="statement timeout"):
            run(connection, build_index(table_plan, table_plan.changes[0]), PLACE)
    assert rows(old_event_dsn, "SELECT indisvalid FROM pg_index WHERE indexrelid = %s::regclass", NEW_EVENT) == [
        (False,)
    ]
    assert run_migrate(old_event_dsn) == [
        f"audit_logs: drop index {NEW_EVENT}",
        f"audit_logs: replace index {INDEX_EVENT}",
    ]


def test_migrate_lifts_the_timeouts_of_its_session(old_event_dsn: str) -> None:
    with transaction(old_event_dsn, "UPDATE audit_logs SET meta = NULL") as other:
        threading.Timer(0.6, other.rollback).start()
        run_migrate(old_event_dsn, settings="SET statement_timeout = 300; SET lock_timeout = 300")


def test_two_migrates_at_once(old_event_dsn: str) -> None:
    with psycopg.connect(old_event_dsn, autocommit=True) as one, psycopg.connect(old_event_dsn, autocommit=True) as two:
        plans = migration_plan(two, ["audit_logs"])
        run(one, lock_migrations(), PLACE)
        with pytest.raises(MigrationError, match="another `tracevault migrate` is running in this database"):
            migrate(two, plans, pytest.fail)
        one.close()
        run_migrate(old_event_dsn)
        migrate(two, plans, pytest.fail)  # a plan that was carried out meanwhile


@pytest.mark.parametrize("filled", [False, True])
def test_a_name_that_another_table_took(dsn: str, face: OpenVault, *, filled: bool) -> None:
    """As after the old table was renamed, whose indexes kept their names."""
    rows(dsn, generate_init_sql("audit_logs"))
    rows(dsn, "ALTER TABLE audit_logs RENAME TO audit_logs_2025")
    with pytest.raises(MigrationError, match=r'"idx_audit_logs_\w+" already exists .* belongs to another table'):
        face(connection_string=dsn)
    rows(dsn, generate_init_sql("audit_logs"))
    if filled:
        fill(dsn, 1)
    with pytest.raises(MigrationError, match=r'"idx_audit_logs_\w+" already exists .* belongs to another table'):
        run_migrate(dsn)
    for index in INDEXES:
        rows(dsn, f"ALTER INDEX {index.name('audit_logs')} RENAME TO {index.name('audit_logs_2025')}")
    run_migrate(dsn)
    # The function kept its name as well, and is the new table's by now.
    assert [change.kind for change in plan_of(dsn, "audit_logs_2025").changes] == ["function"]


def test_a_function_that_is_missing_is_made_while_others_write(dsn: str, face: OpenVault) -> None:
    """By start-up also on a filled table: it waits for no lock of the table's."""
    rows(dsn, generate_init_sql("audit_logs"))
    fill(dsn, 10)
    for upgrade in (lambda: face(connection_string=dsn), lambda: run_migrate(dsn)):
        rows(dsn, "DROP FUNCTION audit_logs_compare")
        with transaction(dsn, "LOCK TABLE audit_logs IN ROW EXCLUSIVE MODE"):
            upgrade()
        assert plan_of(dsn).done


def test_migrate_of_a_filled_partitioned_table(dsn: str, face: OpenVault) -> None:
    rows(dsn, generate_init_sql("template"))
    rows(
        dsn,
        "CREATE TABLE audit_logs (LIKE template INCLUDING DEFAULTS INCLUDING GENERATED, "
        "PRIMARY KEY (occurred_at, id)) PARTITION BY RANGE (occurred_at);"
        "CREATE TABLE audit_rest PARTITION OF audit_logs DEFAULT;"
        f"CREATE INDEX {INDEX_EVENT} ON audit_logs (event)",
    )
    fill(dsn, 10)
    vault = face(connection_string=dsn)
    assert len(plan_of(dsn).pending("index")) == len(PARTITIONED_INDEXES)
    announced = run_migrate(dsn)
    assert len(announced) == len(PARTITIONED_INDEXES)
    assert vault.query.count(event="auth.7") == 1
    assert len(indexes_of(dsn, "audit_rest")) == len(PARTITIONED_INDEXES) + 1


# --- many at once, and few rights ---------------------------------------------------------------------------

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tracevault"])


def start_and_emit(dsn: str, kind: str, together: Barrier, errors: SimpleQueue[str]) -> None:
    """One of the processes: open a vault at the same moment as the others, and emit one event."""

    async def start_and_emit_async() -> None:
        async with start_tracevault(connection_string=dsn) as audit:
            await audit.emit("a.b")

    together.wait(60)
    try:
        if kind == "async":
            asyncio.run(start_and_emit_async())
        else:
            with Tracevault(connection_string=dsn) as audit:
                audit.emit("a.b")
    except BaseException as error:  # noqa: BLE001 - reported by the test
        errors.put(repr(error))


@pytest.mark.parametrize("stage", [None, "after 001"])
def test_twenty_processes_start_at_once(dsn: str, stage: str | None) -> None:
    if stage:
        rows(dsn, reference_sql(stage))
    together, errors = PROCESSES.Barrier(20), PROCESSES.SimpleQueue()
    processes = [
        PROCESSES.Process(target=start_and_emit, args=(dsn, kind, together, errors))
        for kind in ("blocking", "async") * 10
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert errors.empty(), errors.get()
    assert [process.exitcode for process in processes] == [0] * 20
    assert rows(dsn, "SELECT count(*) FROM audit_logs") == [(20,)]
    assert plan_of(dsn).done


def test_start_up_beside_scripts_that_take_no_lock(dsn: str) -> None:
    """The same SQL from elsewhere, at the same moment: whoever is second finds it made."""
    errors: list[BaseException] = []
    tables = [f"audit_{number}" for number in range(10)]

    def script() -> None:
        try:
            for table in tables:
                rows(dsn, generate_init_sql(table))
        except (psycopg.errors.UniqueViolation, psycopg.errors.DuplicateTable):
            script()  # the script's own trouble
        except BaseException as error:  # noqa: BLE001 - reported by the test
            errors.append(error)

    thread = threading.Thread(target=script)
    thread.start()
    for table in tables:
        with psycopg.connect(dsn, autocommit=True) as connection:
            ensure_schema(connection, [table])
    thread.join()
    assert errors == []
    assert all(plan_of(dsn, table).done for table in tables)


def test_one_round_trip_when_nothing_is_to_do(ready_dsn: str, tmp_path: Path) -> None:
    tables = ["audit_logs", "audit_user_events"]
    flow = look(tables)
    query = next(flow)
    assert isinstance(query, Query)
    with psycopg.connect(ready_dsn) as connection:
        found = psycopg.RawCursor(connection).execute(query.sql.encode(), query.params).fetchall()
    with pytest.raises(StopIteration) as stopped:
        flow.send(Result(found, 2))
    assert all(table_plan.done for table_plan in stopped.value.value)

    trace = tmp_path / "trace"
    with psycopg.connect(ready_dsn, autocommit=True) as connection, trace.open("w") as stream:
        connection.pgconn.trace(stream.fileno())
        ensure_schema(connection, tables)
        connection.pgconn.untrace()
    assert round_trips(trace) == 1


async def test_one_round_trip_when_nothing_is_to_do_async(ready_dsn: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    async with await psycopg.AsyncConnection.connect(ready_dsn, autocommit=True) as connection:
        with trace.open("w") as stream:
            connection.pgconn.trace(stream.fileno())
            await ensure_schema_async(connection, ["audit_logs", "audit_user_events"])
            connection.pgconn.untrace()
    assert round_trips(trace) == 1


def round_trips(trace: Path) -> int:
    """How often libpq's trace shows the server being asked."""
    return len(re.findall(r"\tF\t\d+\t(?:Sync|Query)\b", trace.read_text()))


@pytest.fixture
def role(server: str) -> Iterator[str]:
    """A role that may only log in."""
    rows(server, "CREATE ROLE app LOGIN")
    yield "app"
    rows(server, "DROP ROLE app")


def test_a_role_without_the_right_to_change_the_schema(ready_dsn: str, face: OpenVault, role: str) -> None:
    limited = make_conninfo(ready_dsn, user=role)
    rows(ready_dsn, f"GRANT INSERT, SELECT ON audit_logs TO {role}; GRANT USAGE ON SCHEMA empty TO {role}")
    vault = face(connection_string=limited)
    vault.emit("a.b")
    assert vault.query.count() == 1

    # Old indexes are no reason to fail, nor is it that the role may not look at the rows.
    rows(ready_dsn, f"DROP INDEX {INDEX_EVENT}; REVOKE SELECT ON audit_logs FROM {role}")
    face(connection_string=limited).emit("a.b")

    rows(ready_dsn, "ALTER TABLE audit_logs DROP COLUMN span_id")
    for table in ("audit_logs", "new_table"):
        with pytest.raises(MigrationError) as caught:
            face(connection_string=limited, scopes={"default": table})
        stated(caught, f"this role may not change `{table}`: run `tracevault migrate`")
    rows(ready_dsn, f"DROP OWNED BY {role}")


def test_pools_of_the_caller_s_that_are_not_autocommit(dsn: str) -> None:
    with ConnectionPool(dsn, min_size=1, open=True) as pool, pool.connection() as connection:
        ensure_schema(connection, ["audit_logs", "audit_user_events"])
        connection.rollback()
    assert plan_of(dsn).done


async def test_async_pools_of_the_caller_s_that_are_not_autocommit(dsn: str) -> None:
    async with AsyncConnectionPool(dsn, min_size=1, open=False) as pool, pool.connection() as connection:
        await ensure_schema_async(connection, ["audit_logs", "audit_user_events"])
        await connection.rollback()
    assert plan_of(dsn).done


def test_a_deadlock_free_order_of_tables(dsn: str) -> None:
    """Each table is upgraded in a transaction of its own: an application may hold another one's lock."""
    for table in ("one", "two"):
        rows(dsn, reference_sql("after 003", table))
        fill(dsn, 1, table)
    failed: list[BaseException] = []
    with transaction(dsn, "LOCK TABLE two IN ROW EXCLUSIVE MODE") as application:

        def go_on() -> None:
            wait_until(dsn, "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted")
            try:
                application.execute(FILL.format(table="one", count=1).encode())
                application.commit()
            except BaseException as error:  # noqa: BLE001 - reported by the test
                failed.append(error)

        thread = threading.Thread(target=go_on)
        thread.start()
        with psycopg.connect(dsn, autocommit=True) as connection:
            ensure_schema(connection, ["one", "two"])
        thread.join()
    assert failed == []
    assert not plan_of(dsn, "one").pending("columns")
    assert not plan_of(dsn, "two").pending("columns")


def test_a_table_in_another_schema_is_upgraded(database: str) -> None:
    elsewhere = in_schema(database, 'an "odd" Schema')
    rows(elsewhere, reference_sql("after 002"))
    fill(elsewhere, 10)
    run_migrate(elsewhere)
    assert len(indexes_of(elsewhere)) == len(INDEXES) + 1


def test_indexes_of_payloads_are_built_where_they_are_asked_for(dsn: str) -> None:
    announced: list[str] = []
    with psycopg.connect(dsn, autocommit=True) as connection:
        migrate(connection, migration_plan(connection, ["audit_logs"], payloads=True), announced.append, payloads=True)
        assert sum("build index" in change for change in announced) == len(PAYLOAD_INDEXES) == 3
        for payloads in (False, True):  # and they stay where they are not asked for
            assert [plan.changes for plan in migration_plan(connection, ["audit_logs"], payloads=payloads)] == [()]
        assert {index.name("audit_logs") for index in PAYLOAD_INDEXES} <= set(indexes_of(dsn))
        for query in (
            """data @> '{"a": 1}'""",
            """meta @> '{"a": 1}'""",
            "data->'diff' ? 'price'",
        ):
            connection.execute("SET enable_seqscan = off")
            plan = connection.execute(f"EXPLAIN SELECT FROM audit_logs WHERE {query}".encode()).fetchall()
            assert any("Bitmap Index Scan on idx_audit_logs_" in line for (line,) in plan), query
        connection.execute(f"DROP INDEX {PAYLOAD_INDEXES[0].name('audit_logs')}".encode())
        (table_plan,) = migration_plan(connection, ["audit_logs"], payloads=True)
        assert [change.summary for change in table_plan.changes] == ["build index idx_audit_logs_data_paths"]
        assert migration_plan(connection, ["audit_logs"])[0].done
