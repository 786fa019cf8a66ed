"""The spool: kills, outages and rivals. What was acknowledged is stored, once."""

from __future__ import annotations

import time

import pytest

from tests.faults.ledger import VacuousError
from tests.faults.supervisor import Scenario
from tracevault.writer.spool import is_held


@pytest.mark.timeout(600)
def test_killed_a_hundred_times(scenario: Scenario) -> None:
    """kill -9 at a random moment, again and again; each next process takes over what the last one left."""
    for _ in range(100):
        victim = scenario.victim()
        victim.do("begin", threads=2)
        time.sleep(scenario.random.uniform(0.0, 0.08))
        scenario.kill(victim)
    scenario.drain(within=120)
    scenario.check(acknowledged=1000, killed=100, adopted=1)


def test_killed_between_commit_and_delete(scenario: Scenario) -> None:
    """The server has committed, the answer never comes, and the process dies: the successor finds all present."""
    proxy = scenario.proxy()
    victim = scenario.victim(dsn=scenario.through(proxy))
    victim.do("emit", count=5)
    victim.do("flush")
    stored = scenario.rows()
    proxy.on_commit = lambda _link: "hold"
    victim.do("emit", count=20)
    scenario.until(lambda: scenario.rows() > stored, 10, "nothing was committed")
    scenario.kill(victim)
    proxy.on_commit = None
    scenario.drain(dsn=scenario.through(proxy))
    scenario.check(acknowledged=25, killed=1, adopted=1, replayed=1, found=1)


def test_database_down_before_the_start(scenario: Scenario) -> None:
    """A backlog larger than memory grows while there is no database at all."""
    scenario.server.stop()
    victim = scenario.victim(max_queue=500)
    victim.do("emit", count=5000, threads=4, within=120)
    if victim.stats()["delivered"]:
        raise VacuousError("the database was not down")
    scenario.server.start()
    scenario.drained(victim, within=60)
    assert victim.finish() == 0
    scenario.check(acknowledged=5000)


def test_server_stopped_and_started_under_load(scenario: Scenario) -> None:
    """An immediate stop in the middle of batches: they are sent again, and stored once."""
    victim = scenario.victim()
    victim.do("begin", threads=4, pause=0.0005)
    for _ in range(3):
        time.sleep(0.4)
        scenario.server.stop()
        time.sleep(0.3)
        scenario.server.start()
    victim.do("stop")
    scenario.drained(victim, within=60)
    assert victim.finish() == 0
    scenario.check(acknowledged=1000, transient=1, replayed=1)


def test_two_processes_race_to_adopt(scenario: Scenario) -> None:
    """Two living vaults find the same orphan, and one of them is killed over it."""
    with scenario.server.locked(scenario.dbname, "audit_logs"):
        victim = scenario.victim()
        victim.do("emit", count=2000, threads=2)
        scenario.kill(victim)
    rivals = [scenario.victim(start=False) for _ in range(2)]
    for rival in rivals:
        rival.send("start")
    for rival in rivals:
        rival.answer()
    time.sleep(scenario.random.uniform(0.0, 0.05))
    scenario.kill(rivals[0])
    scenario.drained(rivals[1], within=60)
    assert rivals[1].finish() == 0
    scenario.check(acknowledged=2000, killed=2)


# So many that some are left for the next, however long the machine stops in between.
EVENTS = 20_000


def test_adopters_are_killed_again_and_again(scenario: Scenario) -> None:
    """Two processes race for the same orphans, one is killed while it starts or delivers; and the next two come."""
    with scenario.server.locked(scenario.dbname, "audit_logs"):
        victim = scenario.victim()
        victim.do("emit", count=EVENTS, threads=2)
        scenario.kill(victim)
    for _ in range(5):
        rivals = [scenario.victim(start=False, async_batch_size=10) for _ in range(2)]
        for rival in rivals:
            rival.send("start")
        # From the moment on in which one has taken the file: a Python needs longer than that to start.
        scenario.until(lambda: any(is_held(path) for path in scenario.spool.glob("*.spool")), 20, rivals[0].tail)
        time.sleep(scenario.random.uniform(0.0, 0.1))
        scenario.random.shuffle(rivals)
        for rival in rivals:
            scenario.kill(rival)
            time.sleep(scenario.random.uniform(0.0, 0.05))
        if scenario.rows() == EVENTS:
            break
    scenario.drain(within=60)
    scenario.check(acknowledged=EVENTS, killed=5, adopted=1, replayed=1)
