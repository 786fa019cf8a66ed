"""Partitions: made with the table, ahead, and out of a plain table while it is written."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo

from tests.conftest import rows
from tests.faces import OpenVault
from tests.sealed import Sealed
from tests.servers import one_server
from tests.test_cli import Cli, cli
from tests.test_guards import faults, refused
from tests.test_roles import make_names
from tracevault import ConfigError, MigrationError, Tracevault, Verdict
from tracevault.config import INTERVALS, Interval
from tracevault.postgres import partitions
from tracevault.postgres.schema import migration_plan
from tracevault.schema.partitions import (
    Partition,
    floor,
    following,
    interval_of,
    is_partition_name,
    missing,
    partition_name,
)

__all__ = ["cli", "make_names"]  # fixtures

MONTHLY = {"scopes": {"default": {"table_name": "audit_logs", "partition": "month"}}}


def bounds(dsn: str, table: str = "audit_logs") -> list[tuple[str, str]]:
    """Each partition and its bounds."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        return connection.execute(
            "SELECT c.relname::text, pg_get_expr(c.relpartbound, c.oid) FROM pg_inherits JOIN pg_class AS c "
            "ON c.oid = inhrelid WHERE inhparent = %s::regclass ORDER BY 1",
            (f'"{table}"',),
        ).fetchall()


def place_of(dsn: str, id_: UUID) -> str:
    return str(rows(dsn, "SELECT tableoid::regclass::text FROM audit_logs WHERE id = %s", id_)[0][0])


def month(moment: datetime, later: int = 0) -> datetime:
    return following(floor(moment, "month"), "month", later)


def now(dsn: str) -> datetime:
    found: datetime = rows(dsn, "SELECT now()")[0][0]
    return found.astimezone(UTC)


# --- which there should be ---------------------------------------------------------------------------------


def part(start: datetime, end: datetime) -> Partition:
    return Partition("p", "public", start, end, False, False, 0, 0)


moments = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))


@given(
    moments,
    st.sampled_from(INTERVALS),
    st.integers(1, 40),
    st.lists(st.tuples(moments, st.integers(1, 90)), max_size=5),
)
def test_what_is_missing_covers_everything_and_overlaps_nothing(
    first: datetime, by: Interval, count: int, taken: list[tuple[datetime, int]]
) -> None:
    there: list[Partition] = []
    for start, days in sorted(taken):
        begin = floor(max([start, *(one.end for one in there)]), "day")
        begin = max([begin, *(one.end for one in there)])
        there.append(part(begin, begin + timedelta(days=days)))
    made = missing(there, by, first, count)
    every = sorted([(one.start, one.end) for one in made] + [(one.start, one.end) for one in there])
    for (_, end), (start, _) in pairwise(every):
        assert end <= start, "partitions overlap"
    at, until = floor(first, by), following(floor(first, by), by, count)
    for start, end in every:
        if start <= at < end:
            at = end
    assert at >= until, "a moment has no partition"
    assert all(one.end <= following(floor(one.start, by), by) for one in made)
    assert len({partition_name("t", one.start, by) for one in made}) == len(made)
    assert missing([*there, *(part(one.start, one.end) for one in made)], by, first, count) == []


@given(moments, st.sampled_from(INTERVALS))
def test_an_interval_is_known_by_its_partition(moment: datetime, by: Interval) -> None:
    start = floor(moment, by)
    assert start <= moment < following(start, by)
    assert interval_of([part(start, following(start, by))]) == by


def test_names_are_those_of_months_and_days() -> None:
    monday = datetime(2026, 11, 30, tzinfo=UTC)
    assert partition_name("audit_logs", datetime(2026, 1, 1, tzinfo=UTC), "month") == "audit_logs_2026_01"
    assert partition_name("audit_logs", monday, "month") == "audit_logs_2026_11_30"
    assert partition_name("audit_logs", monday, "week") == "audit_logs_2026_11_30"
    for name in ("audit_logs_2026_01", "audit_logs_2026_11_30", "audit_logs_default", "audit_logs_before_2027_01_01"):
        assert is_partition_name("audit_logs", name)
        assert not is_partition_name("audit", name)
    assert not is_partition_name("audit_logs", "audit_logs_archive")
    long = partition_name("a" * 60, monday, "day")
    assert is_partition_name("a" * 60, long)
    assert len(long) == 63
    assert long.endswith("_2026_11_30")


# --- made with the table and ahead -------------------------------------------------------------------------


def test_a_scope_may_be_partitioned(dsn: str, face: OpenVault) -> None:
    audit = face(connection_string=dsn, **MONTHLY)
    present = month(now(dsn))
    expected = [
        (f"audit_logs_{month(present, later):%Y_%m}", month(present, later), month(present, later + 1))
        for later in (-1, 0, 1, 2, 3)
    ]
    wanted = [
        (name, f"FOR VALUES FROM ('{start:%Y-%m-%d} 00:00:00+00') TO ('{end:%Y-%m-%d} 00:00:00+00')")
        for name, start, end in expected
    ]
    assert bounds(dsn) == [*wanted, ("audit_logs_default", "DEFAULT")]
    with psycopg.connect(dsn, autocommit=True) as connection:
        assert migration_plan(connection, ["audit_logs"])[0].done
    usual = audit.emit("a").id
    early = audit.emit("b", occurred_at="2001-02-03T04:05:06Z").id
    chosen = audit.emit("c", id=uuid4()).id
    assert place_of(dsn, usual) == f"audit_logs_{present:%Y_%m}"
    assert place_of(dsn, early) == "audit_logs_default"
    assert [audit.query.find_by_id(id_).event for id_ in (usual, early, chosen)] == ["a", "b", "c"]
    assert audit.query.find_by_id(uuid4()) is None
    assert [event.event for event in audit.query.find_many()][-1] == "b"
    # The reference's INSERT, which knows no column of ours.
    rows(
        dsn,
        "INSERT INTO audit_logs (id, event, mode, occurred_at, created_at) VALUES (%s, 'r', 'sync', now(), now())",
        uuid4(),
    )
    assert audit.query.count(event="r") == 1


def test_a_partition_of_the_next_month_is_made_while_a_vault_runs(
    dsn: str, face: OpenVault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "INTERVAL", 0.1)
    audit = face(connection_string=dsn, **MONTHLY)
    *_, last, default = [name for name, _ in bounds(dsn)]
    rows(dsn, f"DROP TABLE {last}")
    rows(dsn, f"ALTER TABLE audit_logs DETACH PARTITION {default}; DROP TABLE {default}")
    deadline = time.monotonic() + 10
    while [name for name, _ in bounds(dsn)][-2:] != [last, default]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    audit.close()


def test_a_role_that_may_not_make_partitions_says_so_once_and_writes_on(
    dsn: str, face: OpenVault, make_names: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(partitions, "INTERVAL", 0.05)
    face(connection_string=dsn, **MONTHLY).close()
    names = make_names("writer")
    rows(dsn, f"CREATE ROLE {names['writer']} LOGIN; GRANT INSERT ON audit_logs TO {names['writer']}")
    rows(dsn, f"DROP TABLE {bounds(dsn)[-2][0]}")
    audit = face(connection_string=make_conninfo(dsn, user=names["writer"]), **MONTHLY)
    time.sleep(0.5)
    assert audit.emit("a").stored == "database"
    said = [record.message for record in caplog.records if "partitions" in record.message]
    assert len(said) == 1
    assert "this role may not make them: run `tracevault partitions ensure --table audit_logs`" in said[0]


def test_options_of_partitions_are_checked() -> None:
    def opened(**scopes: Any) -> None:
        Tracevault(connection_string="host=nowhere", scopes=scopes)

    with pytest.raises(ConfigError, match="must be one of day, week, month, got 'year'"):
        opened(default={"table_name": "a", "partition": "year"})
    with pytest.raises(ConfigError, match="table `a` would be partitioned by day and by week"):
        opened(default={"table_name": "a", "partition": "day"}, other={"table_name": "a", "partition": "week"})
    with pytest.raises(ConfigError, match="known are table_name, partition"):
        opened(default={"table_name": "a", "partitions": "day"})


@one_server
def test_a_vault_leaves_a_long_move_to_somebody_who_chooses_when(
    cli: Cli, dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(partitions, "INTERVAL", 0.05)
    monkeypatch.setattr(partitions, "MOST_MOVED", 2)
    assert cli("migrate", "--dsn", dsn, "--partition", "day").code == 0
    today = f"audit_logs_{now(dsn):%Y_%m_%d}"
    rows(dsn, f"DROP TABLE {today}")
    insert = "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'a', 'sync', now())"
    for _ in range(3):
        rows(dsn, insert)
    daily = {"default": {"table_name": "audit_logs", "partition": "day"}}
    with Tracevault(connection_string=dsn, scopes=daily) as audit:
        deadline = time.monotonic() + 10
        while not any("has more than 2 events from" in record.message for record in caplog.records):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert audit.query.count() == 3
    assert today not in dict(bounds(dsn))
    assert "and moved 3 events there" in cli("partitions", "ensure", "--dsn", dsn).out
    assert today in dict(bounds(dsn))


@one_server
def test_ensure_moves_what_the_default_partition_holds(cli: Cli, dsn: str, tmp_path: Path) -> None:
    assert cli("migrate", "--dsn", dsn, "--partition", "month").code == 0
    assert cli("roles", "--dsn", dsn).code == 0
    assert faults(dsn) == []
    insert = (
        "INSERT INTO audit_logs (id, event, mode, occurred_at, data) VALUES (gen_random_uuid(), 'a', 'sync', %s, '{}')"
    )
    for moment in ("2025-03-03Z", "2025-03-31T23:59:59.999Z", "2025-05-01Z", "infinity", "0044-03-15 BC"):
        rows(dsn, insert, moment)
    sealed = Sealed(dsn, tmp_path)
    assert sealed.seal() == 5
    before = rows(dsn, "SELECT r.*::text FROM audit_logs AS r ORDER BY id")
    dry = cli("partitions", "ensure", "--dsn", dsn, "--dry-run")
    assert dry.out.splitlines() == [
        "audit_logs: would make the month 2025-03-01 to 2025-04-01",
        "audit_logs: would make the month 2025-05-01 to 2025-06-01",
    ]
    done = cli("partitions", "ensure", "--dsn", dsn)
    assert (done.code, done.out.splitlines()) == (
        0,
        [
            "audit_logs: made 2025-03-01 to 2025-04-01, and moved 2 events there",
            "audit_logs: made 2025-05-01 to 2025-06-01, and moved 1 event there",
        ],
    )
    assert rows(dsn, "SELECT r.*::text FROM audit_logs AS r ORDER BY id") == before
    assert [row[0] for row in rows(dsn, "SELECT occurred_at::text FROM audit_logs_default ORDER BY 1")] == [
        "0044-03-15 00:00:00+00 BC",
        "infinity",
    ]
    assert faults(dsn) == [], "new partitions are guarded"
    refused(dsn, "TRUNCATE audit_logs_2025_03")
    assert cli("partitions", "ensure", "--dsn", dsn).out == ""
    assert sealed.verify().verdict is Verdict.OK
    sealed.close()


@one_server
def test_partitions_are_listed_and_doctored(cli: Cli, dsn: str) -> None:
    assert cli("migrate", "--dsn", dsn, "--partition", "week").code == 0
    listed = [json.loads(line) for line in cli("partitions", "list", "--dsn", dsn, "--json").out.splitlines()]
    assert [one["default"] for one in listed] == [True, *[False] * 5]
    assert all(datetime.fromisoformat(one["from"]).weekday() == 0 for one in listed[1:])
    assert listed[1]["name"] in cli("partitions", "list", "--dsn", dsn, "-o", "table").out
    assert "audit_logs: 6 partitions, by week" in cli("doctor", "--dsn", dsn).out
    rows(dsn, f"DROP TABLE {listed[2]['name']}, {listed[1]['name']}, {listed[3]['name']}")
    rows(
        dsn,
        "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'a', 'sync', '1999-01-01Z')",
    )
    report = cli("doctor", "--dsn", dsn).out
    assert "audit_logs: the next week has no partition" in report
    assert "audit_logs: events are in the default partition audit_logs_default" in report
    assert cli("partitions", "ensure", "--dsn", dsn, "--ahead", "5").code == 0
    report = cli("doctor", "--dsn", dsn).out
    assert "events are in the default" not in report
    assert "audit_logs: 9 partitions, by week" in report
    rows(dsn, "CREATE TABLE audit_logs_2001_01_01 ()")
    rows(
        dsn,
        "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'a', 'sync', '2001-01-01Z')",
    )
    failed = cli("partitions", "ensure", "--dsn", dsn)
    assert failed.code == 3
    assert 'whose name public."audit_logs_2001_01_01" a relation has' in failed.err


def test_a_table_that_is_not_partitioned_is_told_from_one_that_is(cli: Cli, ready_dsn: str) -> None:
    assert cli("partitions", "list", "--dsn", ready_dsn, "-o", "table").out == "audit_logs: not partitioned\n"
    failed = cli("partitions", "ensure", "--dsn", ready_dsn)
    assert (failed.code, "`tracevault partitions convert` does that" in failed.err) == (3, True)
    failed = cli("partitions", "ensure", "--dsn", ready_dsn, "--table", "nothing")
    assert (failed.code, "does not exist" in failed.err) == (3, True)


# --- converting --------------------------------------------------------------------------------------------


@pytest.fixture
def writers(ready_dsn: str, face: OpenVault) -> Iterator[list[tuple[UUID, float]]]:
    """Emits for as long as the test runs; what it has stored, and how long each took."""
    stored: list[tuple[UUID, float]] = []
    failures: list[BaseException] = []
    stop = threading.Event()
    audit = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})

    def work() -> None:
        while not stop.is_set():
            begun = time.monotonic()
            try:
                stored.append((audit.emit("written", correlation_id="c").id, time.monotonic() - begun))
            except BaseException as error:  # noqa: BLE001 - the test says what it was
                failures.append(error)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=work)
    thread.start()
    yield stored
    stop.set()
    thread.join()
    assert failures == []


def test_a_table_is_converted_while_it_is_written(
    writers: list[tuple[UUID, float]], cli: Cli, ready_dsn: str, tmp_path: Path, make_names: Any
) -> None:
    names = make_names("writer", "reader", "tenant-reader")
    sealed = Sealed(ready_dsn, tmp_path)
    sealed.seal()
    assert cli("roles", "--dsn", ready_dsn, *names.options).code == 0
    fill = (
        "INSERT INTO audit_logs (id, event, mode, occurred_at, tenant_id) SELECT gen_random_uuid(), 'old', 'sync', "
        "now() - number * interval '1 hour', 't' FROM generate_series(1, 3000) AS number"
    )
    rows(ready_dsn, fill)
    rows(ready_dsn, "CREATE INDEX mine ON audit_logs (environment)")
    sealed.seal()
    before = rows(ready_dsn, "SELECT r.*::text FROM audit_logs AS r WHERE event = 'old' ORDER BY id")
    dry = cli("partitions", "convert", "--dsn", ready_dsn, "--dry-run")
    assert dry.code == 0
    assert "ATTACH PARTITION" in dry.out
    done = cli("partitions", "convert", "--dsn", ready_dsn)
    assert done.code == 0, done.err
    made = len(writers)
    while len(writers) < made + 20:
        time.sleep(0.01)
    layout = bounds(ready_dsn)
    assert len(layout) >= 4
    assert layout[-1][0] == "audit_logs_default"
    assert any("MINVALUE" in bound for _, bound in layout)
    with psycopg.connect(ready_dsn, autocommit=True) as connection:
        assert migration_plan(connection, ["audit_logs"])[0].done
    assert faults(ready_dsn) == []
    assert cli("roles", "--dsn", ready_dsn, *names.options, "--check").out == "audit_logs: nothing to do\n"
    assert rows(ready_dsn, "SELECT r.*::text FROM audit_logs AS r WHERE event = 'old' ORDER BY id") == before
    reading = names.login(ready_dsn, "tenant-reader")
    with psycopg.connect(reading) as tenant:
        tenant.execute("SELECT set_config('tracevault.tenant_id', 't', false)")
        assert tenant.execute("SELECT count(*) FROM audit_logs_tenant").fetchone() == (3000,)
    stored = {id_ for id_, _ in list(writers)}
    assert stored <= {row[0] for row in rows(ready_dsn, "SELECT id FROM audit_logs WHERE event = 'written'")}
    sealed.seal()
    assert sealed.verify().problems == []
    assert cli("partitions", "convert", "--dsn", ready_dsn).err == "audit_logs: partitioned already\n"
    sealed.close()


STOPS = ("the unique index", "the index", "say that", "check that", "make the partitioned")


@one_server
@pytest.mark.parametrize("stop", STOPS)
def test_a_conversion_that_was_interrupted_goes_on_or_is_undone(cli: Cli, ready_dsn: str, stop: str) -> None:
    class StoppedError(Exception):
        pass

    def announce(text: str) -> None:
        if stop in text:
            raise StoppedError

    rows(
        ready_dsn,
        "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'a', 'sync', now())",
    )
    for again in (["--abort"], []):
        with psycopg.connect(ready_dsn, autocommit=True) as connection:
            planned = partitions.plan_conversion(connection, "audit_logs", "month")
            with pytest.raises(StoppedError):
                partitions.convert(connection, planned, announce)
        # Not even an event of the far future is refused meanwhile.
        rows(
            ready_dsn,
            "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'b', 'sync', 'infinity')",
        )
        rows(ready_dsn, "DELETE FROM audit_logs WHERE event = 'b'")
        assert cli("partitions", "convert", "--dsn", ready_dsn, *again).code == 0
        if again:
            left = rows(
                ready_dsn,
                "SELECT conname::text FROM pg_constraint WHERE conrelid = 'audit_logs'::regclass AND contype <> 'n' "
                "UNION ALL SELECT indexrelid::regclass::text FROM pg_index "
                "WHERE indrelid = 'audit_logs'::regclass AND (indisunique OR indnatts = 1) ORDER BY 1",
            )
            assert left == [("audit_logs_pkey",), ("audit_logs_pkey",), ("idx_audit_logs_event_prefix",)]
    assert rows(ready_dsn, "SELECT event FROM audit_logs") == [("a",)]
    assert len(bounds(ready_dsn)) >= 4


@one_server
def test_doctor_finds_a_conversion_that_was_killed(cli: Cli, ready_dsn: str) -> None:
    script = cli("partitions", "convert", "--dsn", ready_dsn, "--dry-run").out
    constraint = next(line for line in script.splitlines() if "ADD CONSTRAINT" in line)
    rows(ready_dsn, constraint)
    assert (
        "audit_logs: a conversion was interrupted, and events are refused unless (occurred_at <"
        in cli("doctor", "--dsn", ready_dsn).out
    )
    assert cli("partitions", "convert", "--dsn", ready_dsn, "--abort").code == 0
    assert "a conversion was interrupted" not in cli("doctor", "--dsn", ready_dsn).out


@one_server
def test_the_printed_sql_converts_as_well(cli: Cli, ready_dsn: str) -> None:
    script = cli("partitions", "convert", "--dsn", ready_dsn, "--dry-run", "--by", "day").out
    with psycopg.connect(ready_dsn, autocommit=True) as connection:
        for stage in script.split("-- ")[1:-1]:
            text = stage.split("\n", 1)[1].strip()
            connection.execute(text.encode())
    assert cli("partitions", "ensure", "--dsn", ready_dsn, "--by", "day").code == 0
    with psycopg.connect(ready_dsn, autocommit=True) as connection:
        assert migration_plan(connection, ["audit_logs"])[0].done


@one_server
@pytest.mark.parametrize(
    ("statement", "obstacle"),
    [
        ("CREATE TABLE other (log uuid REFERENCES audit_logs)", "foreign key other_log_fkey refers to it"),
        ("CREATE VIEW seen AS SELECT id FROM audit_logs", "the view seen reads it"),
        ("ALTER TABLE audit_logs ENABLE ROW LEVEL SECURITY", "it has row level security"),
        ("ALTER TABLE audit_logs ADD UNIQUE (request_id)", "it has the constraint audit_logs_request_id_key"),
        ("CREATE RULE quiet AS ON DELETE TO audit_logs DO INSTEAD NOTHING", "it has the rule quiet"),
        ("CREATE PUBLICATION told FOR TABLE audit_logs", "the publication told has it"),
        ("CREATE PUBLICATION told FOR ALL TABLES", "the publication told has all tables"),
        (
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
            "CREATE TRIGGER mine BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION f()",
            "it has the trigger mine",
        ),
        ("DROP INDEX idx_audit_logs_event", "is not up to date: run `tracevault migrate"),
    ],
)
def test_what_would_be_lost_is_refused(ready_dsn: str, statement: str, obstacle: str) -> None:
    rows(ready_dsn, statement)
    with psycopg.connect(ready_dsn, autocommit=True) as connection, pytest.raises(MigrationError) as caught:
        partitions.plan_conversion(connection, "audit_logs", "month")
    assert obstacle in str(caught.value)


@one_server
def test_the_cutoff_lies_behind_everything(cli: Cli, ready_dsn: str) -> None:
    insert = "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'a', 'sync', %s)"
    soon = month(now(ready_dsn), 3)
    rows(ready_dsn, insert, soon)
    assert (
        f"TO ('{month(soon, 1):%Y-%m-%d} 00:00:00+00:00')"
        in cli("partitions", "convert", "--dsn", ready_dsn, "--dry-run").out
    )
    failed = cli("partitions", "convert", "--dsn", ready_dsn, "--at", f"{soon:%Y-%m-%d}")
    assert (failed.code, "is too early" in failed.err) == (3, True)
    failed = cli("partitions", "convert", "--dsn", ready_dsn, "--at", f"{soon:%Y-%m}-02")
    assert (failed.code, "is not the beginning of a month" in failed.err) == (3, True)
    rows(ready_dsn, insert, "infinity")
    failed = cli("partitions", "convert", "--dsn", ready_dsn)
    assert (failed.code, "has an event of the time 9990-01-01T00:00:00.000Z or later" in failed.err) == (3, True)
