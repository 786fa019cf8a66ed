"""The spool: what was emitted is kept on this machine until PostgreSQL has it, once."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.conftest import rows
from tests.faces import Face, OpenVault
from tests.test_background import REFUSE_BAD, down, events, locked, no_thread, undelivered, wait_for
from tracevault import ConfigError, DriverError, QueueFullError, SpoolError, Stats
from tracevault.events.ids import uuid7
from tracevault.postgres.pool import target_of
from tracevault.writer.frames import frame


def open_vault(face: OpenVault, dsn: str, folder: Path, **more: Any) -> Face:
    options = {
        "connection_string": dsn,
        "bootstrap": {"ensure_schema": False},
        "default_mode": "async",
        "spool": folder / "spool",
        "scopes": {"default": "audit_logs", "users": "audit_user_events"},
    }
    return face(**{**options, **more})


def balanced(stats: Stats) -> bool:
    ends = ("delivered", "dead", "dropped", "spooled", "queued", "in_flight", "refused", "raised", "unknown")
    return stats.emitted + stats.adopted == sum(int(getattr(stats, end)) for end in ends)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "spool").iterdir())


def victim(dsn: str, folder: Path, body: str, **options: Any) -> subprocess.Popen[str]:
    """Start a process that emits; it ends by itself, or by a signal."""
    start = (
        "import os, sys, time\nfrom tracevault import Tracevault\n"
        f"vault = Tracevault(connection_string=sys.argv[1], default_mode='async', spool=sys.argv[2], "
        f"bootstrap={{'ensure_schema': False}}, **{options!r})\n"
    )
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", start + body, dsn, str(folder / "spool")],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_where_no_thread_can_be_started_a_record_waits_in_the_spool(
    face: OpenVault, ready_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vault = open_vault(face, ready_dsn, tmp_path)
    assert vault.stats().spooled == 0  # and the threads that keep the spool in order run
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        receipt = vault.emit("first")
    assert (receipt.stored, vault.stats().spooled) == ("spool", 1)
    assert "no thread can be started" in caplog.text
    vault.emit("second")
    vault.flush()
    assert events(ready_dsn) == ["first", "second"]
    assert balanced(vault.stats())
    vault.close()


@pytest.mark.parametrize("durability", ["os", "fsync"])
def test_what_is_delivered_is_forgotten(durability: str, face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    vault = open_vault(face, ready_dsn, tmp_path, durability=durability)
    receipts = [vault.emit(str(number), data={"n": [1.5, None, "ä"]}, tenant_id="t") for number in range(300)]
    vault.get_scope("users").emit("u")
    assert {receipt.stored for receipt in receipts} == {"spool"}
    vault.flush()
    assert events(ready_dsn) == [str(number) for number in range(300)]
    assert events(ready_dsn, "audit_user_events") == ["u"]
    stats = vault.stats()
    assert (stats.emitted, stats.delivered, stats.spooled, stats.lanes["default"]) == (301, 301, 0, "ok")
    assert balanced(stats)
    vault.close()
    assert files(tmp_path) == []
    assert (vault.stats().delivered, vault.stats().spooled) == (301, 0)  # counts outlive the vault


def test_more_than_memory_holds(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    vault = open_vault(face, ready_dsn, tmp_path, max_queue=20, async_batch_size=7)
    names = [str(number) for number in range(500)]
    with locked(ready_dsn):
        for name in names:
            vault.emit(name)
        stats = vault.stats()
        assert stats.spooled == 500
        assert balanced(stats)
    vault.flush(timeout=30)
    assert events(ready_dsn) == names
    assert balanced(vault.stats())


def test_an_outage_and_a_restart(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    vault = open_vault(face, ready_dsn, tmp_path)
    vault.emit("first")
    vault.flush()
    with down(ready_dsn):
        for number in range(50):
            vault.emit(str(number))
        vault.close(timeout=0.2)  # nothing is lost, so there is nothing to complain of
        assert events_while_down(tmp_path) == 1
    second = open_vault(face, ready_dsn, tmp_path)
    wait_for(lambda: len(events(ready_dsn)) == 51 and second.stats().spooled == 0)
    stats = second.stats()
    assert (stats.adopted, stats.delivered, stats.replayed, stats.found) == (50, 50, 50, 0)
    assert balanced(stats)
    wait_for(lambda: files(tmp_path) == [])


def events_while_down(folder: Path) -> int:
    return len([name for name in files(folder) if name.endswith(".spool")])


def test_what_a_killed_process_leaves_is_no_damage(
    face: OpenVault, ready_dsn: str, tmp_path: Path, impatient: None
) -> None:
    """A record whose writing was cut short, and the lock of a file that was being removed."""
    vault = open_vault(face, ready_dsn, tmp_path)
    with down(ready_dsn):
        for number in range(20):
            vault.emit(str(number))
        vault.close(timeout=0.2)
    (file,) = (tmp_path / "spool").glob("*.spool")
    whole = file.read_bytes()
    file.write_bytes(whole + whole[-(len(whole) - whole.rindex(b"\xf1TV\n")) :][:40])
    (tmp_path / "spool" / "1-0123456789ab.lock").touch()
    second = open_vault(face, ready_dsn, tmp_path)
    wait_for(lambda: files(tmp_path) == [])
    assert second.stats().dead == 0
    assert sorted(events(ready_dsn)) == sorted(map(str, range(20)))


def test_a_killed_process_loses_nothing(ready_dsn: str, face: OpenVault, tmp_path: Path) -> None:
    body = "n = 0\nwhile True:\n    print(vault.emit('e', data={'n': n}).id, flush=True)\n    n += 1\n"
    acknowledged: list[str] = []
    for _ in range(4):
        with victim(ready_dsn, tmp_path, body) as process:
            assert process.stdout is not None
            acknowledged += [process.stdout.readline().strip() for _ in range(300)]
            process.send_signal(signal.SIGKILL)
            acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
    open_vault(face, ready_dsn, tmp_path)
    wait_for(lambda: files(tmp_path) == [], 20)
    stored = Counter(str(row[0]) for row in rows(ready_dsn, "SELECT id FROM audit_logs"))
    assert set(acknowledged) <= set(stored)
    assert max(stored.values()) == 1


def test_orphans_of_another_database_are_left_alone(
    face: OpenVault, ready_dsn: str, dsn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vault = open_vault(face, ready_dsn, tmp_path)
    with down(ready_dsn):
        vault.emit("mine")
        vault.close(timeout=0)
        open_vault(face, dsn, tmp_path, bootstrap={"ensure_schema": True}).close()
        assert events(dsn) == []
        assert "waits for another database" in caplog.text
    assert events_while_down(tmp_path) == 1


def test_a_dead_letter(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    rows(ready_dsn, REFUSE_BAD)
    lost: list[Any] = []
    vault = open_vault(face, ready_dsn, tmp_path, on_error=lambda *args: lost.append(args))
    with locked(ready_dsn):
        for number in range(256):
            vault.emit("bad" if number == 57 else f"fine{number}")
    assert undelivered(vault.flush) == (1, 0)
    assert len(events(ready_dsn)) == 255
    ((error, record),) = lost
    assert isinstance(error, DriverError)
    assert record.event == "bad"
    stats = vault.stats()
    assert (stats.dead, stats.poison, stats.spooled) == (1, 1, 0)
    assert balanced(stats)
    vault.close()
    assert files(tmp_path) == ["dead-letters"]


@pytest.mark.usefixtures("impatient")
def test_all_refused_is_the_operators_matter(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    rows(ready_dsn, REFUSE_BAD)
    vault = open_vault(face, ready_dsn, tmp_path, on_error=lambda *_: None)
    with locked(ready_dsn):
        for _ in range(100):
            vault.emit("bad")
    wait_for(lambda: vault.stats().lanes["default"] == "paused")
    stats = vault.stats()
    assert (stats.dead, stats.spooled) == (3, 97)
    rows(ready_dsn, "DROP TRIGGER refuse ON audit_logs")
    wait_for(lambda: len(events(ready_dsn)) == 97)
    assert vault.stats().lanes["default"] == "ok"


@pytest.mark.usefixtures("impatient")
def test_a_missing_table_pauses_its_lane(
    face: OpenVault, ready_dsn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows(ready_dsn, "ALTER TABLE audit_logs RENAME TO elsewhere")
    vault = open_vault(face, ready_dsn, tmp_path)
    vault.emit("a")
    vault.get_scope("users").emit("u")
    wait_for(lambda: events(ready_dsn, "audit_user_events") == ["u"])
    wait_for(lambda: vault.stats().lanes["default"] == "paused")
    rows(ready_dsn, "ALTER TABLE elsewhere RENAME TO audit_logs")
    wait_for(lambda: events(ready_dsn) == ["a"])
    assert vault.stats().dead == 0
    assert caplog.text.count("until somebody mends this") == 1


def test_a_sync_emit_falls_back_to_the_spool(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    vault = open_vault(face, ready_dsn, tmp_path, default_mode="sync", on_unavailable="spool", timeout=0.5)
    assert vault.emit("a").stored == "database"
    with down(ready_dsn):
        assert vault.emit("b").stored == "spool"
    vault.flush(timeout=10)
    assert events(ready_dsn) == ["a", "b"]
    assert rows(ready_dsn, "SELECT mode FROM audit_logs") == [("sync",), ("sync",)]
    assert balanced(vault.stats())


def test_a_full_spool(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    vault = open_vault(face, ready_dsn, tmp_path, spool_quota_bytes=2**20, on_full="raise")
    accepted: list[UUID] = []
    with down(ready_dsn):
        with suppress(QueueFullError):
            while len(accepted) < 1000:
                accepted.append(vault.emit("a", data={"text": "x" * 10_000}).id)
        with pytest.raises(QueueFullError, match="the spool is full"):
            vault.emit("a", data={"text": "x" * 10_000})
        assert 50 < len(accepted) < 200
        assert balanced(vault.stats())
    vault.flush(timeout=20)
    assert vault.emit("b").stored == "spool"
    vault.flush()
    assert len(events(ready_dsn)) == len(accepted) + 1


def test_a_broken_file_is_set_aside(
    face: OpenVault, ready_dsn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    (folder / "1-abc.spool").write_bytes(b"this is no database " * 1000)
    vault = open_vault(face, ready_dsn, tmp_path)
    vault.emit("a")
    vault.flush()
    assert events(ready_dsn) == ["a"]
    assert "1-abc.corrupt" in files(tmp_path)
    assert "is no spool file" in caplog.text


def spoil(file: Path, part: float) -> None:
    """Overwrite a few bytes somewhere in a file."""
    with file.open("r+b") as stream:
        stream.seek(int(file.stat().st_size * part))
        stream.write(b"\xf1TV\n spoilt")


def the_file(folder: Path) -> Path:
    (found,) = (folder / "spool").glob("*.spool")
    return found


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_what_is_whole_in_a_damaged_file_is_delivered(
    part: float, face: OpenVault, ready_dsn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vault = open_vault(face, ready_dsn, tmp_path)
    with down(ready_dsn):
        for number in range(400):
            vault.emit(str(number))
        vault.close(timeout=0.0)
    spoil(the_file(tmp_path), part)
    second = open_vault(face, ready_dsn, tmp_path)
    lost = 1 if part else 0  # what stands at the beginning is said again later
    wait_for(lambda: len(events(ready_dsn)) == 400 - lost)
    wait_for(lambda: [Path(name).suffix for name in files(tmp_path)] == [".corrupt"] * lost)
    assert (f"damaged: {lost} records" in caplog.text) == bool(lost)
    assert balanced(second.stats())


@pytest.mark.usefixtures("impatient")
def test_damage_under_a_living_process(
    face: OpenVault, ready_dsn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vault = open_vault(face, ready_dsn, tmp_path, max_queue=20)
    with locked(ready_dsn):
        for number in range(400):
            vault.emit(str(number))
        spoil(the_file(tmp_path), 0.5)
    wait_for(lambda: len(events(ready_dsn)) == 399)
    wait_for(lambda: "1 records in it cannot be read" in caplog.text)
    vault.emit("more")
    wait_for(lambda: len(events(ready_dsn)) == 400)


def test_a_busy_process_gives_room_back(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    vault = open_vault(face, ready_dsn, tmp_path, spool_quota_bytes=2**20)
    for number in range(400):
        vault.emit(str(number), data={"text": "x" * 10_000})
    vault.flush(timeout=30)
    assert len(events(ready_dsn)) == 400
    wait_for(lambda: vault.stats().spool_bytes < 2**17)
    assert balanced(vault.stats())


def test_a_file_of_an_earlier_version(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    columns = ("id", "event", "occurred_at", "mode", "data")
    header = {"format": 1, "columns": columns, "target": target_of(ready_dsn), "lanes": [[1, "default", "audit_logs"]]}
    row = struct.pack("!hi16s", 5, 16, uuid7().bytes) + struct.pack("!i5s", 5, b"early")
    row += struct.pack("!iq", 8, 10**15) + struct.pack("!i5s", 5, b"async") + struct.pack("!i3s", 3, b"\x01{}")
    (tmp_path / "spool").mkdir()
    body = struct.pack("!cQHB", b"R", 1, 1, 0) + row
    (tmp_path / "spool" / "1-abc.spool").write_bytes(frame(b"H" + json.dumps(header).encode()) + frame(body))
    open_vault(face, ready_dsn, tmp_path)
    wait_for(lambda: events(ready_dsn) == ["early"])


def test_a_file_of_a_later_version_is_left_alone(
    face: OpenVault, ready_dsn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spool").mkdir()
    file = tmp_path / "spool" / "1-abc.spool"
    file.write_bytes(frame(b"H" + json.dumps({"format": 2}).encode()))
    open_vault(face, ready_dsn, tmp_path).close()
    assert file.exists()
    assert "written by a later version" in caplog.text


def test_a_forked_child_has_a_file_of_its_own(ready_dsn: str, tmp_path: Path) -> None:
    body = (
        "vault.emit('parent')\n"
        "pid = os.fork()\n"
        "vault.emit('child' if pid == 0 else 'parent')\n"
        "if pid == 0: vault.flush(10); os._exit(0)\n"
        "os.waitpid(pid, 0); vault.emit('parent'); vault.close(10)\n"
    )
    with victim(ready_dsn, tmp_path, body) as process:
        assert process.wait(30) == 0
    assert Counter(events(ready_dsn)) == {"parent": 3, "child": 1}


def test_an_owner_that_dies_while_its_child_lives(ready_dsn: str, face: OpenVault, tmp_path: Path) -> None:
    body = (
        "import signal\n"
        "for n in range(100): vault.emit(str(n))\n"
        "pid = os.fork()\n"
        "if pid == 0: time.sleep(20); os._exit(0)\n"
        "print(pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with locked(ready_dsn), victim(ready_dsn, tmp_path, body) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.wait(30)
        process.stdout.close()  # the child holds its other end
    try:
        open_vault(face, ready_dsn, tmp_path)
        wait_for(lambda: len(events(ready_dsn)) == 100)
    finally:
        os.kill(child, signal.SIGKILL)


def test_wrong_options(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    for options, field in (
        ({"spool": ""}, "spool"),
        ({"spool": 3}, "spool"),
        ({"durability": "disk"}, "durability"),
        ({"spool_quota_bytes": 10}, "spool_quota_bytes"),
        ({"spool": None, "on_unavailable": "spool"}, "on_unavailable"),
    ):
        with pytest.raises(ConfigError) as caught:
            open_vault(face, ready_dsn, tmp_path, **options)
        assert caught.value.field == field
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match="cannot be made"):
        open_vault(face, ready_dsn, tmp_path, spool=tmp_path / "file" / "spool")


def test_the_oldest_record_is_known(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    vault = open_vault(face, ready_dsn, tmp_path)
    with locked(ready_dsn):
        vault.emit("a")
        time.sleep(0.3)
        assert vault.stats().oldest_seconds > 0.25
    vault.flush()
    assert vault.stats().oldest_seconds == 0
    with down(ready_dsn):
        vault.emit("b")
        vault.close(timeout=0)
    stats = vault.stats()
    assert (stats.spooled, stats.oldest_seconds) == (1, 0)
