"""The server is away, refuses or blocks: nothing is lost, nothing is dead, and writing resumes by itself."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import psycopg
import pytest

from tests.faults.ledger import FaultError, VacuousError
from tests.faults.server import ROLE
from tests.faults.supervisor import Scenario, Victim
from tracevault import generate_init_sql
from tracevault.writer.delivery import PROBE_INTERVAL

OUTAGE = 10.0
_ALARM = "until somebody mends this"


def emit_through(scenario: Scenario, writer: Victim, caller: Victim, seconds: float) -> None:
    """Load both for so long: async events through a spool, and sync emits, which must fail and say so."""
    refused = scenario.ledger.errors()["DriverError"]
    for victim in (writer, caller):
        victim.do("begin", threads=2, pause=0.05)
    time.sleep(seconds)
    caller.do("stop")
    if scenario.ledger.errors()["DriverError"] == refused:
        raise VacuousError("no sync emit was refused")
    if scenario.ledger.errors()["OutcomeUnknownError"]:
        raise FaultError(f"this failure is certain: {scenario.ledger.errors()}")


def recover(scenario: Scenario, writer: Victim, caller: Victim, within: float) -> float:
    """The fault is over: end all, and return how long the spool took to become empty."""
    caller.do("emit", count=5)
    began = time.monotonic()
    writer.do("stop")
    stats = scenario.drained(writer, within=within)
    took = time.monotonic() - began
    if stats["dead"] or stats["dropped"]:
        raise FaultError(f"{stats['dead']} dead, {stats['dropped']} dropped, though no record was at fault")
    caller.stats()
    assert [writer.finish(), caller.finish()] == [0, 0]
    print(f"delivered {took:.1f} s after the fault was over")
    return took


@pytest.mark.timeout(240)
def test_stopped_before_the_start_for_a_minute(scenario: Scenario) -> None:
    scenario.server.stop()
    writer = scenario.victim(max_queue=500)
    caller = scenario.victim(spool=False, default_mode="sync", timeout=1.0)
    emit_through(scenario, writer, caller, 60)
    if writer.stats()["delivered"] or scenario.server.running:
        raise VacuousError("the database was not down")
    scenario.server.start()
    recover(scenario, writer, caller, within=60)
    scenario.check(acknowledged=2000, transient=3)


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_black_hole_on_connect(scenario: Scenario, kind: str) -> None:
    """Connections are taken and nobody ever answers: everything that waits for the database ends in time."""
    proxy = scenario.proxy()
    proxy.mode = "black hole"
    dsn = scenario.through(proxy)
    timeout = 2.0
    maker = scenario.victim(dsn=dsn, kind=kind, start=False, bootstrap={"ensure_schema": True}, timeout=timeout)
    maker.do("stop")  # so that it is up
    began = time.monotonic()
    with pytest.raises(FaultError, match="DriverError"):
        maker.do("start")
    assert time.monotonic() - began < timeout + 1
    writer = scenario.victim(dsn=dsn, kind=kind, timeout=timeout)
    caller = scenario.victim(dsn=dsn, kind=kind, spool=False, default_mode="sync", timeout=timeout)
    writer.do("emit", count=50)
    for threads in (1, 4):
        began = time.monotonic()
        caller.do("emit", count=threads, threads=threads)
        assert time.monotonic() - began < timeout + 1
    if scenario.ledger.errors() != Counter(DriverError=5) or scenario.rows():
        raise VacuousError(f"not five certain failures: {scenario.ledger.errors()}")
    proxy.reset()
    proxy.open()
    recover(scenario, writer, caller, within=20)
    scenario.check(acknowledged=55, raised=5, transient=1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["read-only", "locked"])
def test_no_write_for_ten_seconds(scenario: Scenario, fault: str) -> None:
    """The server is read-only, as after a failover, or somebody holds the table exclusively."""
    writer = scenario.victim(timeout=2.0)
    caller = scenario.victim(spool=False, default_mode="sync", timeout=2.0)
    for victim in (writer, caller):
        victim.do("emit", count=5)
    writer.do("flush")
    server, dbname = scenario.server, scenario.dbname
    with server.read_only(dbname) if fault == "read-only" else server.locked(dbname, "audit_logs"):
        emit_through(scenario, writer, caller, OUTAGE)
    recover(scenario, writer, caller, within=30)
    scenario.check(acknowledged=200, transient=2, raised=1)


@contextlib.contextmanager
def full(scenario: Scenario) -> Iterator[None]:
    """Take every connection that the server has for the application."""
    with contextlib.ExitStack() as stack:
        for _ in range(500):
            try:
                stack.enter_context(psycopg.connect(scenario.dsn))
            except psycopg.OperationalError as error:
                if "connection slots" not in str(error) and "too many clients" not in str(error):
                    raise
                break
        else:
            raise VacuousError("the server has connections without end")
        yield


def test_too_many_connections(scenario: Scenario) -> None:
    with full(scenario):
        writer = scenario.victim(timeout=1.0)
        caller = scenario.victim(spool=False, default_mode="sync", timeout=1.0)
        emit_through(scenario, writer, caller, 3)
        if scenario.rows():
            raise VacuousError("somebody found a connection")
    recover(scenario, writer, caller, within=20)
    assert "53300" in writer.tail(), VacuousError("the server said something else")
    scenario.check(acknowledged=60, transient=2, raised=2)


# What is missing: how it is taken away from the table `audit_<name>`, and how it comes back.
MISSING = {
    "table": ("ALTER TABLE {0} RENAME TO elsewhere", "ALTER TABLE elsewhere RENAME TO {0}"),
    "column": ("ALTER TABLE {0} RENAME span_id TO elsewhere", "ALTER TABLE {0} RENAME elsewhere TO span_id"),
    "right": ("REVOKE INSERT ON {0} FROM " + ROLE, "GRANT INSERT ON {0} TO " + ROLE),
    "partition": ("ALTER TABLE {0} DETACH PARTITION {0}_all", "ALTER TABLE {0} ATTACH PARTITION {0}_all DEFAULT"),
}
_PARTITIONED = (
    "CREATE TABLE {0} (LIKE audit_logs INCLUDING DEFAULTS INCLUDING GENERATED, PRIMARY KEY (occurred_at, id)) "
    "PARTITION BY RANGE (occurred_at)"
)


@pytest.mark.timeout(120)
def test_errors_for_the_operator(scenario: Scenario) -> None:
    """Table, column, right and partition are missing, each in a scope of its own: that scope is paused, others go on.

    It raises the alarm once, is looked at every five seconds, and resumes by itself.
    """
    server, dbname = scenario.server, scenario.dbname
    tables = {name: f"audit_{name}" for name in MISSING}
    for name, table in tables.items():
        create = generate_init_sql(table) if name != "partition" else _PARTITIONED.format(table)
        grant = f"GRANT SELECT, INSERT ON {table} TO {ROLE}"
        server.sql(create, grant, dbname=dbname)
    server.sql("CREATE TABLE audit_partition_all PARTITION OF audit_partition DEFAULT", dbname=dbname)
    scopes = {"default": "audit_logs", **tables}
    victim = scenario.victim(scopes=scopes)
    for scope in scopes:
        victim.do("emit", count=20, scope=scope)
    victim.do("flush")
    for name, table in tables.items():
        server.sql(MISSING[name][0].format(table), dbname=dbname)

    for scope in scopes:
        victim.do("begin", scope=scope, pause=0.05)
    expected = {scope: "ok" if scope == "default" else "paused" for scope in scopes}
    scenario.until(lambda: victim.stats()["lanes"] == expected, 5, lambda: str(victim.stats()))
    attempts = victim.stats()["transient"]
    time.sleep(2 * PROBE_INTERVAL + 1)
    stats = victim.stats()
    probes = stats["transient"] - attempts
    assert stats["lanes"] == expected
    assert stats["dead"] == 0
    assert 2 * len(tables) <= probes <= 3 * len(tables), f"{probes} attempts in two intervals"
    assert stats["delivered"] >= 20 * len(scopes) + 50, "the scope that works does not go on"
    for name, table in tables.items():
        server.sql(MISSING[name][1].format(table), dbname=dbname)
    began = time.monotonic()
    scenario.until(lambda: set(victim.stats()["lanes"].values()) == {"ok"}, PROBE_INTERVAL + 1, victim.tail)
    print(f"{probes} probes, resumed after {time.monotonic() - began:.1f} s")
    victim.do("stop")
    stats = scenario.drained(victim)
    assert stats["dead"] == 0
    assert victim.finish() == 0
    log = victim.log.read_text()
    alarms = {
        table: sum(_ALARM in line and f"`{table}`" in line for line in log.splitlines()) for table in tables.values()
    }
    assert alarms == dict.fromkeys(tables.values(), 1), log
    scenario.check(tables=scopes.values(), acknowledged=500, transient=3 * len(tables))
