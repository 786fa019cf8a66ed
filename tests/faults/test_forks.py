"""Forks: a child leaves its parent's spool alone, and whoever dies, what was acknowledged is stored, once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.ledger import FaultError, VacuousError
from tests.faults.supervisor import Scenario, Victim
from tracevault.writer.spool import is_held
from tracevault.writer.upkeep import ADOPTION_INTERVAL

# How a child ends, and its exit code.
WAYS = {"_exit": 0, "exit": 0, "raise": 1}


def files_of(scenario: Scenario, process: int) -> list[Path]:
    """Return the spool files that a process has made."""
    return sorted(scenario.spool.glob(f"{process}-*.spool"))


@contextmanager
def living_child(victim: Victim, count: int, *, hooks: bool = True) -> Iterator[int]:
    """Let the victim fork a child that emits ``count`` events and stays; it is killed in the end."""
    victim.listening = True
    child = victim.do("fork", way="stay", count=count, hooks=hooks)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("hooks", [True, False], ids=["fork", "fork from C"])
def test_children_end_in_every_way(scenario: Scenario, *, hooks: bool) -> None:
    """A vault is used, and forked; no child harms its parent's file, and what it has emitted itself is kept."""
    with scenario.server.locked(scenario.dbname, "audit_logs"):
        victim = scenario.victim()
        victim.do("emit", count=50)
        mine = files_of(scenario, victim.pid)
        for way, code in WAYS.items():
            for count in (0, 20):
                child = victim.do("fork", way=way, count=count, hooks=hooks)
                assert victim.do("reap", child=child) == code, victim.tail()
                if bool(files_of(scenario, child)) != bool(count):
                    raise VacuousError("the child has not used a file of its own")
                victim.do("emit", count=10)
        if not mine or files_of(scenario, victim.pid) != mine:
            raise FaultError(f"the files of the parent were {mine}, and are {files_of(scenario, victim.pid)}")
        scenario.kill(victim)
    scenario.drain()
    scenario.check(acknowledged=50 + 3 * 20 + 6 * 10, killed=1, adopted=50 + 3 * 20 + 6 * 10)


def test_a_fork_under_load(scenario: Scenario) -> None:
    """Threads emit and deliver in the moment of the fork."""
    victim = scenario.victim()
    victim.do("begin", threads=2)
    for number in range(12):
        time.sleep(scenario.random.uniform(0.0, 0.03))
        child = victim.do("fork", way=list(WAYS)[number % 3], count=10)
        assert victim.do("reap", child=child) in (0, 1), victim.tail()
    scenario.kill(victim)
    scenario.drain()
    scenario.check(acknowledged=12 * 10 + 100, killed=1, adopted=1)


@pytest.mark.parametrize("hooks", [True, False], ids=["fork", "fork from C"])
def test_the_owner_is_killed_while_its_child_lives(scenario: Scenario, *, hooks: bool) -> None:
    """The child has inherited the lock's descriptor, and must not keep others from the file of the dead."""
    with scenario.server.locked(scenario.dbname, "audit_logs"):
        victim = scenario.victim()
        victim.do("emit", count=50)
        with living_child(victim, 10, hooks=hooks):
            scenario.until(lambda: scenario.ledger.count("spool") == 60, 10, victim.tail)
            scenario.kill(victim)
            rival = scenario.victim()
            if rival.stats()["adopted"] != 50:
                raise FaultError(f"the file of the dead was not taken over: {rival.stats()}")
    # The child was killed as well, and with it what it was about to deliver: that is taken over in its turn.
    scenario.drained(rival)
    assert rival.finish() == 0
    scenario.check(acknowledged=60, killed=1, adopted=60)


def test_a_child_from_c_that_never_emits_holds_its_dead_parents_file(scenario: Scenario) -> None:
    """No hook has run in it, and it has never asked the vault: its parent's file waits until it ends, unharmed."""
    with scenario.server.locked(scenario.dbname, "audit_logs"):
        victim = scenario.victim()
        victim.do("emit", count=50)
        with living_child(victim, 0, hooks=False):
            scenario.kill(victim)
            rival = scenario.victim()
            time.sleep(ADOPTION_INTERVAL + 0.5)
            (file,) = files_of(scenario, victim.pid)
            if not is_held(file) or rival.stats()["adopted"]:
                raise VacuousError("the child holds nothing")
    scenario.until(lambda: rival.stats()["adopted"] == 50, 10, rival.tail)
    scenario.drained(rival)
    assert rival.finish() == 0
    scenario.check(acknowledged=50, killed=1, adopted=50)


def test_nobody_takes_over_the_file_of_a_parent_that_lives(scenario: Scenario) -> None:
    """Its children close what they inherited of its lock; that must not release it."""
    with scenario.server.locked(scenario.dbname, "audit_logs"):
        victim = scenario.victim()
        victim.do("emit", count=50)
        for hooks in (True, False):
            child = victim.do("fork", way="_exit", count=5, hooks=hooks)
            assert victim.do("reap", child=child) == 0, victim.tail()
        rival = scenario.victim()
        if rival.stats()["adopted"] != 10:
            raise FaultError(f"took over {rival.stats()['adopted']} records: more than the dead children left")
        victim.do("emit", count=10)
        scenario.kill(victim)
    scenario.until(lambda: rival.stats()["adopted"] == 70, 10, rival.tail)
    scenario.drained(rival)
    assert rival.finish() == 0
    scenario.check(acknowledged=70, killed=1, adopted=70)
