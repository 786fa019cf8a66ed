"""The host loses power: of the spool there is what was synced, and of the rest anything."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.faults.ledger import Entry, VacuousError
from tests.faults.shim import Fault
from tests.faults.supervisor import Scenario
from tracevault.writer.upkeep import SYNC_INTERVAL

# What the machine may add: a sync, its copy by the shim, and threads that wait for a processor.
_SLACK = 0.1
# So many, since only some are struck at a moment that tells one order of syncs from another.
_ROUNDS = 12


def _lose_power_often(scenario: Scenario, threads: int = 1, **options: Any) -> int:
    """Emit until the power is lost, a few times; return how many bytes were lost.

    At a random moment, or just before a sync. Files are small, so that a process has several.
    """
    lost = 0
    for number in range(_ROUNDS):
        shim = scenario.shim()
        victim = scenario.victim(shim=shim, spool_quota_bytes=1 << 20, **options)
        if number % 2:
            shim.fault(Fault.KILL_AT_SYNC, scenario.random.randrange(4, 20))
        victim.send("begin", threads=threads)
        if number % 2:
            victim.ended()
            scenario.died()
        else:
            time.sleep(scenario.random.uniform(0.05, 0.25))
            scenario.kill(victim)
        lost += shim.lose_power(scenario.random)
    return lost


@pytest.mark.parametrize("database", ["up", "down"])
def test_power_lost_with_fsync(scenario: Scenario, database: str) -> None:
    """Nothing acknowledged is lost; and what was delivered already is not doubled, though its file is back."""
    if database == "down":
        scenario.server.stop()
    _lose_power_often(scenario, threads=3, durability="fsync", max_queue=100, on_full="raise")
    if database == "down":
        scenario.server.start()
    scenario.drain()
    scenario.check(acknowledged=200, killed=_ROUNDS, adopted=1, found=int(database == "up"))


def test_power_lost_without_fsync(scenario: Scenario) -> None:
    """Of each process only the last events before the loss are lost, and none before one that is there."""
    scenario.server.stop()
    lost = _lose_power_often(scenario, on_full="drop_newest")
    scenario.server.start()
    scenario.drain()
    rows = scenario.server.sql("SELECT correlation_id FROM audit_logs", dbname=scenario.dbname)
    found = {row[0] for row in rows}
    excused: set[str] = set()
    for victim in scenario.victims[:_ROUNDS]:
        mine = {token: entry for token, entry in scenario.ledger.entries.items() if token.startswith(f"{victim.name}.")}
        kept = {token: entry for token, entry in mine.items() if entry.stored == "spool"}
        missing = {token: entry for token, entry in kept.items() if token not in found}
        last = max((_number(token) for token in kept if token in found), default=0)
        assert all(_number(token) > last for token in missing), f"{victim.name} lost something in the middle"
        # It emitted without a pause, so it died when it last said something.
        died = max(_time(entry) for entry in mine.values())
        age = max((died - _time(entry) for entry in missing.values()), default=0.0)
        print(f"{victim.name}: {len(missing)} of {len(kept)} lost, the oldest {age * 1000:.0f} ms old")
        assert age < SYNC_INTERVAL + _SLACK
        excused |= missing.keys()
    if not lost or not excused:
        raise VacuousError("nothing was lost, so nothing could have been")
    scenario.check(acknowledged=200, killed=_ROUNDS, adopted=1, excused=excused)


def _number(token: str) -> int:
    return int(token.rpartition("/")[2])


def _time(entry: Entry) -> float:
    return entry.returned or entry.intended or 0.0
