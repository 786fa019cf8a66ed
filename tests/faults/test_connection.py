"""Connections that break: what a sync emit says then must be true."""

from __future__ import annotations

import time

import pytest

from tests.faults.ledger import VacuousError
from tests.faults.supervisor import Scenario


@pytest.mark.parametrize("when", ["before", "after"])
def test_commit_confirmation_cut(scenario: Scenario, when: str) -> None:
    """Every third connection is cut before, or after, the server's confirmation is forwarded."""
    proxy = scenario.proxy()
    victim = scenario.victim(dsn=scenario.through(proxy), spool=False, default_mode="sync")
    proxy.cut_commits(when, every=3)
    victim.do("emit", count=60, threads=4)
    proxy.on_commit = None
    assert victim.finish() == 0
    assert proxy.cuts >= 5, VacuousError("no commit was cut")
    scenario.check(acknowledged=50)


def test_request_cut_before_the_server_sees_it(scenario: Scenario) -> None:
    proxy = scenario.proxy()
    victim = scenario.victim(dsn=scenario.through(proxy), spool=False, default_mode="sync")
    victim.do("emit", count=5)
    proxy.cut_requests = 4
    victim.do("emit", count=30, threads=2)
    assert victim.finish() == 0
    assert proxy.cuts == 4, VacuousError("no request was cut")
    scenario.check(acknowledged=30)


def test_frozen_connection(scenario: Scenario) -> None:
    """Nothing passes and nothing closes: emit ends near `timeout`, and says that it does not know."""
    proxy = scenario.proxy()
    victim = scenario.victim(dsn=scenario.through(proxy), spool=False, default_mode="sync", timeout=2.0)
    victim.do("emit", count=3)
    proxy.mode = "freeze"
    began = time.monotonic()
    victim.do("emit", count=1, within=30)
    assert time.monotonic() - began < 10
    proxy.reset()
    proxy.open()
    victim.do("emit", count=3)
    assert victim.finish() == 0
    assert sum(scenario.ledger.errors().values()) == 1, VacuousError("the frozen emit succeeded")
    scenario.check(acknowledged=6)


def test_sessions_killed_all_the_time(scenario: Scenario) -> None:
    """One session is ended every 200 ms, for three seconds of load."""
    victim = scenario.victim(spool=False, default_mode="sync")
    victim.do("begin", threads=4, pause=0.002)
    killed, end = 0, time.monotonic() + 3
    while time.monotonic() < end:
        time.sleep(0.2)
        killed += scenario.server.kill_backend(scenario.dbname)
    victim.do("stop")
    assert victim.finish() == 0
    assert killed >= 3, VacuousError("no session was there to kill")
    scenario.check(acknowledged=100)


def test_server_stopped_and_started_under_load(scenario: Scenario) -> None:
    """An immediate stop loses nothing that emit acknowledged."""
    victim = scenario.victim(spool=False, default_mode="sync")
    victim.do("begin", threads=4, pause=0.002)
    time.sleep(0.5)
    scenario.server.stop()
    time.sleep(0.5)
    scenario.server.start()
    time.sleep(1)
    victim.do("stop")
    assert victim.finish() == 0
    scenario.check(acknowledged=100)


def test_killed_while_emitting(scenario: Scenario) -> None:
    """kill -9 amid sync emits: what was acknowledged is there, once."""
    for _ in range(5):
        victim = scenario.victim(spool=False, default_mode="sync")
        victim.do("begin", threads=4)
        time.sleep(scenario.random.uniform(0.05, 0.4))
        scenario.kill(victim)
    scenario.check(acknowledged=20, killed=5)
