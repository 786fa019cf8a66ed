"""The wall clock jumps. Nothing but the times in the rows may follow it."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from tests.faults.ledger import VacuousError
from tests.faults.supervisor import Scenario

SHIFTS = pytest.mark.parametrize("shift", [-3600, 86_400], ids=["an-hour-back", "a-day-forward"])
_SLACK = 0.005


@SHIFTS
def test_clock_jumps_while_emitting(scenario: Scenario, shift: int) -> None:
    """Ids stay unique and rise, nothing waits for the clock, and each row says what the clock said."""
    shim = scenario.shim()
    victim = scenario.victim(shim=shim)
    victim.do("begin", pause=0.001)
    time.sleep(0.2)
    shim.shift_clock(shift)
    time.sleep(0.2)
    assert victim.do("emit", count=20, mode="sync")
    shim.shift_clock(0)
    time.sleep(0.2)
    victim.do("stop")
    assert victim.do("flush") is None
    assert victim.finish() == 0
    scenario.check(acknowledged=100, clock=False)
    rows = scenario.server.sql("SELECT correlation_id, id, occurred_at, mode FROM audit_logs", dbname=scenario.dbname)
    there = 0
    for token, _, occurred_at, _ in rows:
        entry = scenario.ledger.entries[token]
        # Said by the victim's own clock, which may have jumped in between.
        early, late = sorted((entry.intended or 0.0, entry.returned or 0.0))
        assert early - _SLACK <= occurred_at.timestamp() <= late + _SLACK, token
        there += abs(occurred_at.timestamp() - shift - time.time()) < 60
    if not 40 <= there <= len(rows) - 40:
        raise VacuousError(f"{there} of {len(rows)} events were emitted while the clock was wrong")
    for mode in ("sync", "async"):
        one_thread = sorted((row for row in rows if row[3] == mode), key=lambda row: int(row[0].rpartition("/")[2]))
        assert all(before[1] < after[1] for before, after in pairwise(one_thread)), "ids do not rise"


@SHIFTS
def test_clock_jumps_while_the_database_is_down(scenario: Scenario, shift: int) -> None:
    """Pauses between attempts, and deadlines, are measured by a clock that does not jump."""
    shim = scenario.shim()
    victim = scenario.victim(shim=shim, timeout=1.0)
    scenario.server.stop()
    victim.do("emit", count=50)
    shim.shift_clock(shift)
    victim.do("emit", count=50)
    began = time.monotonic()
    victim.do("emit", count=1, mode="sync")
    assert time.monotonic() - began < 5
    scenario.server.start()
    scenario.drained(victim, within=15)
    assert victim.finish() == 0
    if scenario.ledger.errors().total() != 1:
        raise VacuousError("the database was not down")
    scenario.check(acknowledged=100, transient=1)
