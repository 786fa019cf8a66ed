"""The disk of the spool fails: it is full, writes and syncs fail, bytes are spoiled, a write ends in the middle."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.ledger import TOKEN, VacuousError
from tests.faults.shim import Fault, Shim
from tests.faults.supervisor import Died, Scenario, Victim

MIB = 1 << 20


def _dies(scenario: Scenario, victim: Victim, shim: Shim) -> None:
    """Wait until the shim has killed it."""
    if victim.ended() != -9 or not shim.seen:
        raise VacuousError(f"{victim.name} was not killed in a write:\n{victim.tail()}")
    scenario.died()


def test_killed_in_a_write(scenario: Scenario) -> None:
    """Killed before, amid or after the n-th write to a spool file, records and notes of delivery alike."""
    rounds = 12
    for _ in range(rounds):
        shim = scenario.shim()
        shim.fault(Fault.KILL_AT_WRITE, scenario.random.randrange(150), piece=scenario.random.random())
        victim = scenario.victim(shim=shim)
        victim.send("emit", count=1000, threads=2)
        _dies(scenario, victim, shim)
    scenario.drain()
    scenario.check(acknowledged=100, killed=rounds, adopted=1)


@pytest.mark.parametrize("count", range(3))
def test_killed_while_a_file_is_made(scenario: Scenario, count: int) -> None:
    """Its first writes come to nothing, or to a piece: the successor removes it."""
    for piece in (0.0, 0.5, 1.0):
        shim = scenario.shim()
        victim = scenario.victim(shim=shim)
        shim.fault(Fault.KILL_AT_WRITE, count, piece=piece)
        with pytest.raises(Died):
            victim.do("emit", count=10)
        _dies(scenario, victim, shim)
    if not list(scenario.spool.glob("*.spool")):
        raise VacuousError("no file was left behind")
    scenario.drain()
    victim = scenario.victim()
    victim.do("emit", count=1)
    victim.do("flush")
    assert victim.finish() == 0
    assert list(scenario.spool.iterdir()) == []
    scenario.check(killed=3)


@pytest.mark.parametrize("piece", [0.0, 0.5, 1.0])
def test_killed_while_another_file_is_begun(scenario: Scenario, piece: float) -> None:
    """A process with a backlog goes on in a new file, and dies over it."""
    shim = scenario.shim()
    scenario.server.stop()
    victim = scenario.victim(shim=shim, spool_quota_bytes=MIB)
    shim.fault(Fault.KILL_AT_FIRST_WRITE, 2, piece=piece)
    victim.send("emit", count=5000)
    _dies(scenario, victim, shim)
    if len(list(scenario.spool.glob("*.spool"))) != 3:
        raise VacuousError("it had not begun its third file")
    scenario.server.start()
    scenario.drain()
    scenario.check(acknowledged=100, killed=1, adopted=100)


# -- full --------------------------------------------------------------------------------------------------


def test_disk_full_while_the_database_is_up(scenario: Scenario) -> None:
    """Emits are refused, what was acknowledged is delivered all the same, and then everything goes on."""
    shim = scenario.shim()
    victim = scenario.victim(shim=shim, on_full="raise", timeout=0.5)
    with scenario.server.locked(scenario.dbname, "audit_logs"):
        victim.do("emit", count=300)
        shim.fault(Fault.WRITE_ENOSPC, scenario.random.randrange(3000))
        victim.do("emit", count=50)
    _refused(scenario, 1)
    assert victim.do("flush") is None  # deliveries need no room
    shim.fault(Fault.NOTHING)
    victim.do("emit", count=50)
    assert victim.do("flush") is None
    scenario.drained(victim)
    assert victim.finish() == 0
    assert shim.seen >= 1
    scenario.check(acknowledged=350)


@pytest.mark.parametrize("on_full", ["raise", "block", "drop_newest"])
def test_disk_full_while_the_database_is_down(scenario: Scenario, on_full: str) -> None:
    shim = scenario.shim()
    scenario.server.stop()
    victim = scenario.victim(shim=shim, on_full=on_full, timeout=1.0, max_queue=100)
    victim.do("emit", count=300)
    shim.fault(Fault.WRITE_ENOSPC, scenario.random.randrange(3000))
    _full(scenario, victim, on_full, until=lambda: shim.fault(Fault.NOTHING))
    shim.fault(Fault.WRITE_ENOSPC, 0)
    scenario.server.start()
    scenario.until(lambda: victim.stats()["spooled"] == 0, 15, "a full disk keeps deliveries back")
    shim.fault(Fault.NOTHING)
    victim.do("emit", count=50)
    scenario.drained(victim)
    assert victim.finish() == 0
    scenario.check(acknowledged=350)


def _full(scenario: Scenario, victim: Victim, on_full: str, until: Callable[[], object]) -> None:
    """Emit while there is no room, and with ``block`` once more until there is."""
    if on_full == "block":
        victim.do("emit", count=100, threads=100)  # those that do not fit wait for `timeout`
        _refused(scenario, 1)
        before = scenario.ledger.count("spool")
        victim.send("emit", count=1)
        time.sleep(0.4)
        assert scenario.ledger.count("spool") == before, VacuousError("there was room")
        until()
        victim.answer()
        assert scenario.ledger.count("spool") == before + 1, "an emit that waited for room did not get it"
        return
    victim.do("emit", count=100)
    if on_full == "raise":
        _refused(scenario, 1)
    else:
        dropped = scenario.ledger.count("dropped")
        assert dropped == victim.stats()["dropped"]
        assert dropped >= 1, VacuousError("nothing was dropped")
    until()


def _refused(scenario: Scenario, least: int) -> None:
    errors = scenario.ledger.errors()
    assert set(errors) <= {"QueueFullError"}, errors
    if errors["QueueFullError"] < least:
        raise VacuousError("no emit was refused")


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("this root may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_small_disk_full(scenario: Scenario) -> None:
    """The same with a file system that is truly full, and with a successor that finds it so."""
    with _small_disk(scenario.spool, MIB):
        scenario.server.stop()
        victim = scenario.victim(on_full="raise", max_queue=100)
        victim.do("emit", count=6000)
        _refused(scenario, 100)
        scenario.kill(victim)
        victim = scenario.victim(on_full="raise", max_queue=100)
        refused = scenario.ledger.errors()["QueueFullError"]
        victim.do("emit", count=100)
        _refused(scenario, refused + 50)
        scenario.server.start()
        scenario.drained(victim)
        victim.do("emit", count=50)
        scenario.drained(victim)
        assert victim.finish() == 0
        scenario.check(acknowledged=1050, killed=1, adopted=1000)


@pytest.mark.parametrize("on_full", ["raise", "block", "drop_newest"])
def test_quota_reached_and_released(scenario: Scenario, on_full: str) -> None:
    """A backlog reaches the quota; once the database is back there is room again."""
    scenario.server.stop()
    victim = scenario.victim(spool_quota_bytes=MIB, on_full=on_full, timeout=1.0, max_queue=100)
    while victim.stats()["spool_bytes"] < MIB * 31 // 32:
        victim.do("emit", count=10)

    def release() -> None:
        assert sum(path.stat().st_size for path in scenario.spool.glob("*.spool")) <= MIB
        scenario.server.start()

    _full(scenario, victim, on_full, until=release)
    scenario.drained(victim)
    victim.do("emit", count=50)
    scenario.drained(victim)
    assert victim.finish() == 0
    scenario.check(acknowledged=1000)


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["os", "fsync"])
def test_sync_fails_once(scenario: Scenario, durability: str) -> None:
    """What a failed sync took along is written again elsewhere, though the next sync succeeds."""
    shim = scenario.shim()
    scenario.server.stop()
    victim = scenario.victim(shim=shim, durability=durability, max_queue=50)
    victim.do("emit", count=200, threads=2)
    shim.fault(Fault.SYNC_EIO, 1)
    victim.do("emit", count=200, threads=2)
    time.sleep(0.3)
    if shim.seen != 1:
        raise VacuousError("no sync has failed")
    shim.fault(Fault.NOTHING)
    victim.do("emit", count=50)
    time.sleep(0.3)
    assert not scenario.ledger.errors(), scenario.ledger.errors()
    scenario.kill(victim)
    shim.lose_power(scenario.random)
    scenario.server.start()
    scenario.drain()
    scenario.check(acknowledged=450, killed=1, adopted=1)
    assert victim.log.read_text().count("cannot be synced") == 1, victim.tail()


@pytest.mark.parametrize("durability", ["os", "fsync"])
def test_syncs_fail_for_a_while(scenario: Scenario, durability: str) -> None:
    """With nothing delivered meanwhile: emits say that they do not know, and the spool does not grow by itself."""
    shim = scenario.shim()
    scenario.server.stop()
    victim = scenario.victim(shim=shim, durability=durability, max_queue=50)
    victim.do("emit", count=200)
    before = victim.stats()["spool_bytes"]
    shim.fault(Fault.SYNC_EIO)
    victim.do("emit", count=30, threads=2)
    time.sleep(1.0)
    victim.do("emit", count=30, threads=2)
    assert victim.stats()["spool_bytes"] < 2 * before
    if shim.seen < 2:
        raise VacuousError("no sync has failed")
    shim.fault(Fault.NOTHING)
    time.sleep(0.3)  # until it tries again
    victim.do("emit", count=50)
    time.sleep(1.0)  # until the upkeep has moved the rest
    assert victim.log.read_text().count("synced") < 20, victim.tail()
    scenario.kill(victim)
    shim.lose_power(scenario.random)
    scenario.server.start()
    scenario.drain()
    scenario.check(acknowledged=250, killed=1, adopted=1, unknown=60 if durability == "fsync" else 0)


@pytest.mark.parametrize("fault", [Fault.SYNC_EIO, Fault.WRITE_EIO], ids=["sync", "write"])
@pytest.mark.parametrize("durability", ["os", "fsync"])
def test_disk_fails_while_the_database_is_up(scenario: Scenario, durability: str, fault: Fault) -> None:
    """What emits say is true, and afterwards everything goes on."""
    shim = scenario.shim()
    victim = scenario.victim(shim=shim, durability=durability)
    victim.do("emit", count=50)
    shim.fault(fault)
    victim.do("emit", count=20, threads=2)
    time.sleep(0.3)
    shim.fault(Fault.NOTHING)
    if not shim.seen:
        raise VacuousError("nothing has failed")
    victim.do("emit", count=50)
    scenario.drained(victim)
    assert victim.finish() == 0
    assert victim.log.read_text().count("\n") < 20, victim.tail()
    errors = scenario.ledger.errors()
    if fault == Fault.WRITE_EIO:
        assert errors == {"SpoolError": 20}
    else:
        assert errors == ({"OutcomeUnknownError": 20} if durability == "fsync" else {})
    scenario.check(acknowledged=100)


# -- spoiled bytes -----------------------------------------------------------------------------------------


def _spoil(scenario: Scenario, place: str, size: int) -> tuple[set[str], set[str]]:
    """Overwrite bytes of the largest spool file; return the tokens hit, and those hit perhaps."""
    path = max(scenario.spool.glob("*.spool"), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    start = 0 if place == "start" else len(data) // 2 + scenario.random.randrange(200)
    hit, near = set(), set()
    for match in TOKEN.finditer(data.decode("latin-1")):
        if start <= match.start() < start + size:
            hit.add(match.group())
        if start - 1000 <= match.start() < start + size + 1000:
            near.add(match.group())
    with path.open("r+b") as file:
        file.seek(start)
        file.write(scenario.random.randbytes(size))
    return hit, near


@pytest.mark.parametrize(("owner", "place"), [("alive", "middle"), ("dead", "middle"), ("dead", "start")])
def test_spool_file_spoiled(scenario: Scenario, owner: str, place: str) -> None:
    """What can be read is delivered, the file is set aside, and the log says how much is missing."""
    scenario.server.stop()
    victim = scenario.victim(max_queue=50)
    victim.do("emit", count=1000)
    if owner == "dead":
        scenario.kill(victim)
    hit, near = _spoil(scenario, place, 5000)
    if len(hit) < 3:
        raise VacuousError("nothing was hit")
    if owner == "dead":
        victim = scenario.victim()
    scenario.server.start()
    if owner == "alive":
        victim.do("emit", count=50)
    scenario.drained(victim)
    victim.do("emit", count=50)
    scenario.drained(victim)
    assert victim.finish() == 0
    scenario.check(acknowledged=1050, excused=near)
    found = {row[0] for row in scenario.server.sql("SELECT correlation_id FROM audit_logs", dbname=scenario.dbname)}
    missing = {token for token, entry in scenario.ledger.entries.items() if entry.id and token not in found}
    assert hit <= missing
    assert list(scenario.spool.glob("*.corrupt"))
    assert f"{len(missing)} record" in victim.log.read_text(), victim.tail()
