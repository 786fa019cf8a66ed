"""One vault over two servers: what befalls the one does not concern the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from tests.faults.ledger import FaultError
from tests.faults.server import ROLE, Server
from tests.faults.supervisor import Scenario, Victim

FAR = "far"


@pytest.fixture
def far(other_server: Server, scenario: Scenario) -> Iterator[Server]:
    """The other server, with a database of the same name."""
    other_server.sql(f"CREATE DATABASE {scenario.dbname} TEMPLATE template_faults")
    yield other_server
    if not other_server.running:
        other_server.start()
    other_server.sql(f"DROP DATABASE {scenario.dbname} WITH (FORCE)")


def over_both(scenario: Scenario, far: Server, **options: Any) -> Victim:
    """A vault whose tables have one name, on two servers."""
    there = make_conninfo(far.admin, dbname=scenario.dbname, user=ROLE)
    scopes = {"default": "audit_logs", FAR: {"table_name": "audit_logs", "connection_string": there}}
    return scenario.victim(scopes=scopes, **options)


def rows(scenario: Scenario, far: Server) -> tuple[int, int]:
    """How many events are here, and there."""
    there = far.sql("SELECT count(*) FROM audit_logs", dbname=scenario.dbname)[0][0]
    return scenario.rows(), there


def lanes(victim: Victim) -> dict[str, str]:
    found: dict[str, str] = victim.stats()["lanes"]
    return found


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_one_of_two_servers_is_stopped(scenario: Scenario, far: Server, kind: str) -> None:
    """Its events wait in the spool, those of the other flow; a successor starts without it, and delivers in the end."""
    victim = over_both(scenario, far, kind=kind)
    victim.do("emit", count=50)
    victim.do("emit", count=30, scope=FAR)
    scenario.drained(victim)
    assert rows(scenario, far) == (50, 30)
    far.stop()
    victim.do("emit", count=100, scope=FAR)
    victim.do("emit", count=200)
    victim.do("emit", count=5, mode="sync")
    scenario.until(lambda: scenario.rows() == 255, 10, victim.tail)
    scenario.until(lambda: lanes(victim)[FAR] == "waiting", 20, victim.tail)
    assert lanes(victim)["default"] == "ok"
    assert victim.stats()["spooled"] == 100
    if "100 " not in (victim.do("flush", timeout=0.5) or ""):
        raise FaultError("flush does not say what waits")
    victim.do("emit", count=20)
    scenario.until(lambda: scenario.rows() == 275, 10, victim.tail)
    scenario.kill(victim)
    successor = over_both(scenario, far, kind=kind)
    successor.do("emit", count=20)
    scenario.until(lambda: scenario.rows() == 295, 10, successor.tail)
    assert successor.stats()["spooled"] == 100
    far.start()
    scenario.drained(successor)
    assert rows(scenario, far) == (295, 130)
    assert successor.finish() == 0
    elsewhere = [make_conninfo(far.admin, dbname=scenario.dbname)]
    scenario.check(acknowledged=425, killed=1, adopted=100, elsewhere=elsewhere)


def test_both_are_stopped_in_turn_under_load(scenario: Scenario, far: Server) -> None:
    """Whichever stops, all is delivered once, and to where it belongs."""
    victim = over_both(scenario, far)
    victim.do("begin", pause=0.001)
    victim.do("begin", pause=0.001, scope=FAR)
    for server in (far, scenario.server, far):
        server.stop()
        victim.do("emit", count=50)
        victim.do("emit", count=50, scope=FAR)
        server.start()
    victim.do("stop")
    scenario.drained(victim)
    here, there = rows(scenario, far)
    assert min(here, there) > 150
    assert victim.finish() == 0
    scenario.check(acknowledged=here + there, elsewhere=[make_conninfo(far.admin, dbname=scenario.dbname)])
