"""Events in the caller's transaction: each is there exactly if that transaction, or its savepoint, was committed."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.faults.ledger import FaultError, VacuousError, event_of
from tests.faults.server import ROLE
from tests.faults.supervisor import Scenario

KINDS = pytest.mark.parametrize("kind", ["blocking", "async"])


def prepare(scenario: Scenario) -> None:
    scenario.server.sql(
        "CREATE TABLE changes (token text)",
        f"GRANT INSERT ON changes TO {ROLE}",
        "ALTER TABLE audit_logs ADD CHECK (tenant_id IS NULL)",
        dbname=scenario.dbname,
    )


def changed(scenario: Scenario) -> set[str]:
    """Return the tokens whose transactions were committed, as the application's own table says."""
    return {token for (token,) in scenario.server.sql("SELECT token FROM changes", dbname=scenario.dbname)}


def check_both_tables(scenario: Scenario) -> None:
    events = scenario.server.sql(
        "SELECT correlation_id FROM audit_logs WHERE event = 'faults.outer'", dbname=scenario.dbname
    )
    if sorted(token for (token,) in events) != sorted(changed(scenario)):
        raise FaultError(f"events and changes differ: {len(events)} and {len(changed(scenario))}")


def settle(scenario: Scenario) -> tuple[int, int]:
    """Tell the ledger which transactions were committed; return how many, and of how many the victims knew."""
    committed = changed(scenario)
    entries = scenario.ledger.entries
    heard = {token for token, entry in entries.items() if entry.committed}
    for token in [token for token, entry in entries.items() if entry.committed is None]:
        scenario.ledger.hear("tables", f"{'K' if token in committed else 'B'} {token}")
    return len(committed), len(heard)


@KINDS
def test_the_ends_of_a_transaction(scenario: Scenario, kind: str) -> None:
    """Commit, rollback, a savepoint that is rolled back, and a refused event that leaves the transaction alive."""
    prepare(scenario)
    victim = scenario.victim(kind=kind, spool=False)
    ends = ["commit", "rollback", "inner", "refused"] * 25
    scenario.random.shuffle(ends)
    victim.do("transactions", dsn=scenario.dsn, ends=ends)
    stats = victim.stats()
    assert victim.finish() == 0
    found = Counter(
        event_of(token)
        for (token,) in scenario.server.sql("SELECT correlation_id FROM audit_logs", dbname=scenario.dbname)
    )
    assert found == {"faults.outer": 75}
    assert scenario.ledger.errors() == {"DriverError": 25}
    assert (stats["delivered"], stats["raised"]) == (125, 25), stats
    check_both_tables(scenario)
    scenario.check(acknowledged=125, raised=25)


@KINDS
@pytest.mark.parametrize("when", ["request", "before", "after"])
def test_connection_lost_at_commit(scenario: Scenario, kind: str, when: str) -> None:
    """It is cut before the server sees the COMMIT, before its confirmation is forwarded, or right after that."""
    prepare(scenario)
    proxy = scenario.proxy()
    victim = scenario.victim(kind=kind, spool=False)
    if when == "request":
        proxy.cut_at = b"COMMIT"
        proxy.cut_requests = 10
    else:
        proxy.cut_commits(when, most=10)
    victim.do("transactions", dsn=scenario.through(proxy), ends=["commit", "inner"] * 10)
    victim.stats()
    assert victim.finish() == 0
    assert proxy.cuts == 10, VacuousError("the connections were not cut")
    committed, heard = settle(scenario)
    expected = {"request": (10, 10), "before": (20, 10), "after": (20, 20)}[when]
    if (committed, heard) != expected:
        raise VacuousError(f"{committed} committed, {heard} of them confirmed")
    check_both_tables(scenario)
    scenario.check(acknowledged=30)


@KINDS
def test_killed_in_transactions(scenario: Scenario, kind: str) -> None:
    """kill -9 anywhere in a transaction."""
    prepare(scenario)
    for _ in range(5):
        victim = scenario.victim(kind=kind, spool=False)
        victim.send("transactions", dsn=scenario.dsn, ends=["commit", "rollback", "inner", "refused"] * 1000)
        time.sleep(scenario.random.uniform(0.1, 0.4))
        scenario.kill(victim)
    # A session whose client is gone ends its transaction when it notices that.
    query = f"SELECT FROM pg_stat_activity WHERE datname = '{scenario.dbname}' AND usename = '{ROLE}'"
    scenario.until(lambda: not scenario.server.sql(query), 10, "sessions of the dead go on")
    committed, heard = settle(scenario)
    print(f"{committed} committed, {heard} confirmed")
    check_both_tables(scenario)
    scenario.check(acknowledged=20, killed=5)
