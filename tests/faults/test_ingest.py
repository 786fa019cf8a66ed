"""JetStream between emit and PostgreSQL: whatever dies, what was acknowledged is in the table, once."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cluster import BINARY, Cluster, Relay
from tests.faults.ledger import FaultError, VacuousError
from tests.faults.supervisor import SOURCES, Scenario, Victim

pytestmark = [
    pytest.mark.skipif(BINARY is None, reason="needs nats-server"),
    pytest.mark.timeout(180),
]


class Stage:
    """A cluster, and workers of `tracevault ingest run` that a scenario may kill."""

    def __init__(self, scenario: Scenario, cluster: Cluster) -> None:
        self.scenario = scenario
        self.cluster = cluster
        self.workers: list[subprocess.Popen[bytes]] = []
        self.killed = 0

    def work(self, *options: str) -> subprocess.Popen[bytes]:
        """Start a worker."""
        command = [sys.executable, "-m", "tracevault", "ingest", "run", "--nats", self.cluster.address]
        log = (self.scenario.folder / f"worker{len(self.workers)}.log").open("ab")
        with log:
            worker = subprocess.Popen(
                [*command, "--dsn", self.scenario.dsn, *options],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": SOURCES},
            )
        self.workers.append(worker)
        return worker

    def kill_worker(self) -> None:
        """kill -9 the newest worker, and start another one."""
        worker = self.workers[-1]
        worker.kill()
        worker.wait(10)
        self.killed += 1
        self.work()

    def victim(self, address: str | None = None, **options: Any) -> Victim:
        return self.scenario.victim(ingest=address or self.cluster.address, **options)

    def arrived(self, count: int, within: float = 60.0) -> None:
        """Wait until so many events are in the table."""
        logs = sorted(self.scenario.folder.glob("worker*.log"))
        self.scenario.until(
            lambda: self.scenario.rows() >= count,
            within,
            lambda: f"{self.scenario.rows()} of {count}\n" + "\n".join(log.read_text()[-1500:] for log in logs),
        )

    def settled(self, victim: Victim, count: int) -> None:
        """All of it left the process, and is in the table; and nothing more comes."""
        self.scenario.drained(victim)
        self.arrived(count)
        if victim.finish() != 0:
            raise FaultError(victim.tail())
        time.sleep(1.0)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait(10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nats")


@pytest.fixture
def stage(scenario: Scenario, folder: Path) -> Iterator[Stage]:
    cluster = Cluster(folder / scenario.dbname)
    found = Stage(scenario, cluster)
    try:
        yield found
    finally:
        found.close()
        cluster.close()


def test_one_node_is_killed(stage: Stage) -> None:
    stage.work()
    victim = stage.victim()
    victim.do("begin", pause=0.002)
    time.sleep(1.0)
    leader = stage.cluster.leader()
    leader.kill()
    time.sleep(4.0)
    leader.start()
    time.sleep(2.0)
    victim.do("stop")
    count = victim.stats()["emitted"]
    stage.settled(victim, count)
    assert count > 500, VacuousError(f"only {count} were emitted")
    stage.scenario.check(acknowledged=count)


def test_all_nodes_are_killed(stage: Stage) -> None:
    stage.work()
    victim = stage.victim()
    victim.do("emit", count=200)
    for node in stage.cluster.nodes:
        node.kill()
    victim.do("emit", count=300)
    waits = victim.stats()["spooled"]
    assert waits >= 300, VacuousError(f"{waits} wait in the spool")
    for node in stage.cluster.nodes:
        node.start()
    victim.do("emit", count=100)
    stage.settled(victim, 600)
    stage.scenario.check(acknowledged=600)


def test_the_leader_is_paused(stage: Stage) -> None:
    stage.work()
    victim = stage.victim()
    victim.do("begin", pause=0.002)
    time.sleep(1.0)
    with stage.cluster.leader().frozen():
        time.sleep(12.0)
    time.sleep(1.0)
    victim.do("stop")
    count = victim.stats()["emitted"]
    stage.settled(victim, count)
    stage.scenario.check(acknowledged=count)


def test_the_publisher_is_cut_and_killed(stage: Stage) -> None:
    """What was on its way when the connection broke is published again, and known by its id."""
    stage.work()
    relays = [Relay(node.port) for node in stage.cluster.nodes]
    address = "nats://" + ",".join(f"127.0.0.1:{relay.port}" for relay in relays)
    victim = stage.victim(address)
    victim.do("begin", pause=0.001)
    for _ in range(15):
        time.sleep(0.2)
        for relay in relays:
            relay.cut()
    time.sleep(0.5)
    stage.scenario.kill(victim)
    successor = stage.victim()
    stage.scenario.drained(successor)
    count = sum(entry.stored is not None for entry in stage.scenario.ledger.entries.values())
    stage.settled(successor, count)
    stage.scenario.check(acknowledged=500, killed=1, replayed=1)
    for relay in relays:
        relay.close()


def test_workers_are_killed_before_they_acknowledge(stage: Stage) -> None:
    """With the table locked a worker hangs in its statement; killed there, or after the commit, it loses nothing."""
    stage.work("--batch", "50")
    victim = stage.victim()
    victim.do("begin", pause=0.001)
    for _ in range(12):
        time.sleep(0.35)
        stage.kill_worker()
    with stage.scenario.server.locked(stage.scenario.dbname, "audit_logs"):
        stage.scenario.until(lambda: waits_for_the_table(stage), 30, "no worker waits for the table")
        stage.kill_worker()
    victim.do("stop")
    count = victim.stats()["emitted"]
    stage.settled(victim, count)
    assert stage.killed == 13
    stage.scenario.check(acknowledged=count)


def waits_for_the_table(stage: Stage) -> bool:
    """Whether a worker has taken a batch, and cannot store it."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return bool(stage.scenario.server.sql(waiting, dbname=stage.scenario.dbname)[0][0])


def test_the_database_is_down_for_a_while(stage: Stage) -> None:
    stage.work()
    victim = stage.victim()
    victim.do("emit", count=100)
    stage.arrived(100)
    stage.scenario.server.stop()
    victim.do("emit", count=200)
    stage.scenario.until(lambda: victim.stats()["spooled"] == 0, 30, victim.tail)
    stage.scenario.server.start()
    stage.settled(victim, 300)
    stage.scenario.check(acknowledged=300)


def test_poison_goes_to_the_dead_letter_subject(stage: Stage) -> None:
    stage.work()
    table = "ALTER TABLE audit_logs ADD CHECK (tenant_id IS DISTINCT FROM 'poison')"
    stage.scenario.server.sql(table, dbname=stage.scenario.dbname)
    victim = stage.victim()
    victim.do("emit", count=100)
    tokens = victim.do("emit", count=3, tenant_id="poison")
    victim.do("emit", count=100)
    stage.settled(victim, 200)
    letters = asyncio.run(stage.cluster.dead_letters(3))
    assert [headers["Tracevault-Code"] for headers in letters] == ["23514"] * 3
    stage.scenario.check(acknowledged=203, dead=tokens)
