"""``tracevault spool``: what waits on this machine is shown and delivered, dead letters are repeated or dropped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import rows
from tests.servers import one_server
from tests.test_background import REFUSE_BAD, down, events, wait_for
from tests.test_cli import UNREACHABLE, Cli, cli, in_terminal, plain
from tests.test_spool import spoil, victim
from tracevault import Tracevault, UndeliveredError, generate_init_sql
from tracevault.writer import inspection

__all__ = ["cli"]  # the fixture

DROPPED = "tracevault.dead_letter.dropped"
PARTITIONED = """
    ALTER TABLE audit_logs RENAME TO template;
    CREATE TABLE audit_logs (LIKE template INCLUDING DEFAULTS INCLUDING GENERATED, PRIMARY KEY (occurred_at, id))
        PARTITION BY RANGE (occurred_at);
    CREATE TABLE audit_rest PARTITION OF audit_logs DEFAULT;
"""


def open_vault(dsn: str, folder: Path) -> Tracevault:
    return Tracevault(
        connection_string=dsn, bootstrap={"ensure_schema": False}, default_mode="async", spool=folder / "spool"
    )


def dead_letters(dsn: str, folder: Path, *names: str) -> list[str]:
    """Leave dead letters in an orphan, and return their ids."""
    rows(dsn, REFUSE_BAD)
    with suppress(UndeliveredError), open_vault(dsn, folder) as vault:
        ids = [str(vault.emit(name, data={"n": 1}).id) for name in names]
        wait_for(lambda: vault.stats().dead == len(ids))
    rows(dsn, "ALTER TABLE audit_logs DISABLE TRIGGER USER")
    return ids


def orphan(dsn: str, folder: Path, count: int) -> None:
    """Leave events of a process that was killed."""
    body = f"for n in range({count}): vault.emit('e')\nos._exit(0)\n"
    with down(dsn), victim(dsn, folder, body) as process:
        assert process.wait(30) == 0


@contextmanager
def holder(dsn: str, folder: Path, count: int) -> Iterator[int]:
    """A living process with events in its file that nobody can store; yields its pid."""
    body = f"for n in range({count}): vault.emit('e', mode='async')\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n"
    rows(dsn, "ALTER TABLE audit_logs RENAME TO elsewhere")
    with victim(dsn, folder, body) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()
            rows(dsn, "ALTER TABLE elsewhere RENAME TO audit_logs")


def break_a_file(folder: Path) -> str:
    (folder / "spool").mkdir(exist_ok=True)
    (folder / "spool" / "1-abc.spool").write_bytes(b"this is no spool file " * 1000)
    return "1-abc.spool"


def letters(folder: Path) -> list[str]:
    return [letter.id for letter in inspection.letters(folder / "spool")]


def files(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in (folder / "spool").glob(pattern))


# --- status and the list of dead letters --------------------------------------------------------------------


@one_server
def test_status_tells_who_holds_what(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "spool")
    orphan(ready_dsn, tmp_path, 1)
    (name,) = files(tmp_path, "*.spool")
    done = cli("spool", "status", "--spool", folder)
    status = json.loads(done.out)
    assert (done.code, status["name"], status["held"], status["pid"]) == (0, name, False, None)
    assert (status["waiting"], status["dead"], status["broken"]) == (1, 0, None)
    assert 0 < status["oldest_seconds"] < 60
    with holder(ready_dsn, tmp_path, 3) as pid:
        wait_for(lambda: [file.held for file in inspection.statuses(tmp_path / "spool")[0]] == [True, True])
        lines = cli("spool", "status", "--spool", folder).out.splitlines()
    shown = {line["name"]: line for line in map(json.loads, lines)}
    # The one that died is held by who took it over, which its name does not tell.
    assert shown.pop(name)["pid"] is None
    ((other, status),) = shown.items()
    assert (other.partition("-")[0], status["pid"], status["waiting"]) == (str(pid), pid, 3)


@one_server
def test_a_broken_file_is_shown_among_the_others(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "spool")
    (id_,) = dead_letters(ready_dsn, tmp_path, "bad")
    orphan(ready_dsn, tmp_path, 1)
    name = break_a_file(tmp_path)
    done = cli("spool", "status", "--spool", folder)
    whole, dead, broken = map(json.loads, done.out.splitlines())
    assert (done.code, whole["waiting"], whole["broken"], dead["dead"]) == (1, 1, None, 1)
    assert (broken["name"], broken["waiting"], broken["held"], broken["bytes"]) == (name, None, False, 22_000)
    assert broken["broken"] == "is no spool file"
    assert broken.keys() == whole.keys()
    assert json.loads(cli("spool", "dead", "list", "--spool", folder).out)["id"] == id_
    flushed = cli("spool", "flush", "--spool", folder, "--dsn", ready_dsn)
    aside = "1-abc.corrupt: set aside, since it was damaged"
    assert (flushed.code, flushed.err) == (1, f"delivered 1 event of 1 file\nbroken:\n  {aside}\n")
    shown = cli("spool", "status", "--spool", folder, "-o", "table")
    assert (shown.code, aside.partition(":")[0] in shown.out) == (1, True)


@one_server
def test_a_damaged_file_is_no_obstacle(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "spool")
    dead_letters(ready_dsn, tmp_path, "bad", "bad.other")
    orphan(ready_dsn, tmp_path, 100)
    (name,) = files(tmp_path, "*.spool")
    spoil(tmp_path / "spool" / name, 0.5)
    spoil(tmp_path / "spool" / "dead-letters", 0.1)
    done = cli("spool", "status", "--spool", folder)
    file, dead, broken = map(json.loads, done.out.splitlines())
    assert (done.code, file["waiting"], file["unreadable"], dead["dead"]) == (1, 99, 1, 1)
    assert (broken["name"], broken["broken"]) == ("dead-letters", "some of it is damaged")
    assert "damaged" in cli("spool", "status", "--spool", folder, "-o", "table").out.splitlines()[1]
    assert cli("spool", "dead", "drop", "--all", "--reason", "r", "--spool", folder).code == 0
    flushed = cli("spool", "flush", "--spool", folder, "--dsn", ready_dsn)
    assert (flushed.code, flushed.err.splitlines()[0]) == (1, "delivered 100 events of 2 files")
    assert files(tmp_path, "*") == sorted([name.replace(".spool", ".corrupt"), "dead-letters.corrupt"])


def test_a_folder_without_files(cli: Cli, tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert cli("spool", "status", "--spool", folder) == (0, "", "")
    assert cli("spool", "status", "--spool", folder, "-o", "table") == (0, "", "no events wait\n")
    assert cli("spool", "dead", "list", "--spool", folder, "-o", "table") == (0, "", "no dead letters\n")
    for name in ("status", "dead list"):
        done = cli("spool", *name.split(), "--spool", folder + "/none")
        assert (done.code, done.out) == (3, "")
        assert "there is no spool" in done.err


@one_server
def test_on_a_terminal_of_80_columns(ready_dsn: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "spool")
    ids = dead_letters(ready_dsn, tmp_path, "bad", "bad.\x1b[2Jthing" + "x" * 100)
    for count in (1, 1200):
        orphan(ready_dsn, tmp_path, count)
    break_a_file(tmp_path)
    status = in_terminal("spool", "status", "--spool", folder, columns=80)
    lines = plain(status.out).splitlines()
    assert status.code == 1
    assert max(map(len, lines)) <= 80
    database, header, *table = lines[: lines.index("broken")]
    assert database.startswith("host=")
    assert header.split() == ["file", "held", "by", "waiting", "size", "oldest"]
    place = header.index("waiting") + len("waiting")
    assert {re.split(r" +", line[:place].strip())[-1] for line in table} == {"1", "1,200"}
    assert all(line[:place] == line[:place].rstrip() for line in table)
    assert lines[-1] == "2 dead letters: see `tracevault spool dead list`"
    listed = in_terminal("spool", "dead", "list", "--spool", folder, columns=80)
    shown = plain(listed.out)
    assert max(map(len, shown.splitlines())) <= 80
    assert all(id_ in shown for id_ in ids)
    assert "table audit_logs, scope default" in shown
    assert "\x1b[2J" not in listed.out
    assert r"bad.\x1b[2Jthing" in shown


# --- flush --------------------------------------------------------------------------------------------------


@one_server
def test_flush_delivers_the_orphans_of_a_database(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "spool")
    for count in (1, 1233):
        orphan(ready_dsn, tmp_path, count)
    for expected in ("delivered 1,234 events of 2 files\n", "nothing to deliver\n"):
        assert cli("spool", "flush", "--spool", folder, "--dsn", ready_dsn) == (0, "", expected)
    assert len(events(ready_dsn)) == 1234
    assert files(tmp_path, "*") == []
    orphan(ready_dsn, tmp_path, 1)
    assert cli("spool", "flush", "--spool", folder, "--dsn", ready_dsn).err == "delivered 1 event of 1 file\n"


@one_server
def test_flush_leaves_to_a_living_process_what_it_holds(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "spool")
    with holder(ready_dsn, tmp_path, 2) as pid:
        (name,) = files(tmp_path, "*.spool")
        done = cli("spool", "flush", "--spool", folder, "--dsn", ready_dsn)
        assert (done.code, done.out) == (0, "")
        assert done.err == (
            f"nothing to deliver\nheld by living processes, which deliver it:\n  {name} (process {pid}): 2 events\n"
        )
    assert cli("spool", "flush", "--spool", folder, "--dsn", ready_dsn).code == 0
    assert len(events(ready_dsn)) == 2


@one_server
def test_flush_of_another_database(cli: Cli, ready_dsn: str, dsn: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "spool")
    orphan(ready_dsn, tmp_path, 1)
    (name,) = files(tmp_path, "*.spool")
    rows(dsn, generate_init_sql("audit_logs"))
    done = cli("spool", "flush", "--spool", folder, "--dsn", dsn)
    assert (done.code, events(dsn)) == (0, [])
    assert re.fullmatch(
        r"nothing to deliver\nfor another database, host=.* dbname=\w+ \(--any-database delivers it here\):\n"
        rf"  {name}: 1 event\n",
        done.err,
    )
    moved = cli("spool", "flush", "--any-database", "--spool", folder, "--dsn", dsn)
    assert moved == (0, "", "delivered 1 event of 1 file\n")
    assert (events(dsn), events(ready_dsn)) == (["e"], [])


@one_server
def test_flush_connects_before_it_touches_a_file(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    orphan(ready_dsn, tmp_path, 1)
    break_a_file(tmp_path)
    before = files(tmp_path, "*")
    started = time.monotonic()
    done = cli("spool", "flush", "--spool", str(tmp_path / "spool"), "--dsn", UNREACHABLE)
    assert (done.code, done.out) == (3, "")
    assert "connecting failed" in done.err
    assert "refused" in done.err
    assert "s3cret" not in done.err
    assert time.monotonic() - started < 2
    assert files(tmp_path, "*") == before
    assert cli("spool", "flush", "--spool", str(tmp_path / "spool")).code == 2


@one_server
def test_flush_tells_what_it_could_not_deliver(
    cli: Cli, ready_dsn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tmp_path / "spool")
    orphan(ready_dsn, tmp_path, 2)
    (name,) = files(tmp_path, "*.spool")
    rows(ready_dsn, "ALTER TABLE audit_logs RENAME TO elsewhere")
    done = cli("spool", "flush", "--spool", folder, "--dsn", ready_dsn, "--timeout", "0.3")
    assert (done.code, done.err) == (3, f"left, as time is up:\n  {name}: 2 events\n")
    assert "42P01" in caplog.text  # why, logged by the library
    rows(ready_dsn, "ALTER TABLE elsewhere RENAME TO audit_logs")
    rows(ready_dsn, REFUSE_BAD.replace("'bad'", "'e'"))
    done = cli("spool", "flush", "--spool", folder, "--dsn", ready_dsn)
    assert (done.code, done.err) == (1, "refused 2 events: see `tracevault spool dead list`\n")
    assert len(letters(tmp_path)) == 2


# --- dead letters -------------------------------------------------------------------------------------------


@one_server
def test_a_dead_letter_is_shown_in_full(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    (id_,) = dead_letters(ready_dsn, tmp_path, "bad")
    shown = json.loads(cli("spool", "dead", "show", id_, "--spool", str(tmp_path / "spool")).out)
    assert (shown["record"]["data"], shown["why"]["table"], shown["why"]["sqlstate"]) == (
        {"n": 1},
        "audit_logs",
        "P0001",
    )


@pytest.mark.usefixtures("impatient")
@one_server
@pytest.mark.parametrize(
    ("command", "said", "stored"),
    [(["requeue"], "requeued", "bad"), (["drop", "--reason", "a test"], "dropped", DROPPED)],
    ids=["requeue", "drop"],
)
def test_dead_letters_of_a_living_process(
    cli: Cli, command: list[str], said: str, stored: str, ready_dsn: str, tmp_path: Path
) -> None:
    spool = ["--spool", str(tmp_path / "spool")]
    rows(ready_dsn, REFUSE_BAD)
    with suppress(UndeliveredError), open_vault(ready_dsn, tmp_path) as vault:
        id_ = str(vault.emit("bad").id)
        wait_for(lambda: vault.stats().dead == 1)
        rows(ready_dsn, "ALTER TABLE audit_logs DISABLE TRIGGER USER")
        assert cli("spool", "dead", *command, id_, *spool) == (0, "", f"{said}: 1 dead letter\n")
        wait_for(lambda: events(ready_dsn) == [stored])
        assert cli("spool", "dead", *command, id_, *spool) == (1, "", f"no such dead letter: {id_}\n")


@one_server
def test_flush_delivers_what_was_requeued(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "spool")
    dead_letters(ready_dsn, tmp_path, "bad", "bad")
    assert cli("spool", "dead", "requeue", "--all", "--spool", folder).err == "requeued: 2 dead letters\n"
    assert cli("spool", "flush", "--spool", folder, "--dsn", ready_dsn).code == 0
    assert events(ready_dsn) == ["bad", "bad"]


_STEPS = {
    "noted": ("inspection._noted", True),
    "appended": ("inspection.dead.discard", False),
    "forgotten": ("inspection.dead.discard", True),
}


def drop_and_be_killed(folder: Path, id_: str, when: str) -> None:
    """Drop a dead letter in a process that kills itself on the way: after a step, or before it."""
    step, first = _STEPS[when]
    code = (
        "import os, signal, sys\n"
        "from tracevault.cli.group import run\n"
        "from tracevault.writer import inspection\n"
        f"step = {step}\n"
        "def killed(*args):\n"
        f"    if {first}: step(*args)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{step} = killed\n"
        "run(sys.argv[1:])\n"
    )
    arguments = ["spool", "dead", "drop", id_, "--reason", "the first", "--spool", str(folder / "spool")]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *arguments], check=False)
    assert done.returncode == -signal.SIGKILL


@one_server
@pytest.mark.parametrize(
    ("when", "delivered", "partitioned"),
    [
        ("noted", False, False),
        ("appended", False, False),
        ("appended", True, False),
        ("appended", True, True),
        ("forgotten", True, False),
    ],
)
def test_a_drop_that_was_killed_can_be_repeated(
    cli: Cli, when: str, delivered: bool, partitioned: bool, ready_dsn: str, tmp_path: Path
) -> None:
    if partitioned:
        rows(ready_dsn, PARTITIONED)
    spool = ["--spool", str(tmp_path / "spool")]
    id_, other = dead_letters(ready_dsn, tmp_path, "bad", "bad.other")
    drop_and_be_killed(tmp_path, id_, when)
    assert files(tmp_path, "*.drop") == [f"{id_}.drop"]
    if delivered:
        assert cli("spool", "flush", *spool, "--dsn", ready_dsn).code == 0
        assert events(ready_dsn) == [DROPPED]
    if when == "forgotten":
        assert letters(tmp_path) == [other]
    else:
        assert letters(tmp_path) == [id_, other]
        assert cli("spool", "dead", "drop", id_, "--reason", "the second", *spool).code == 0
    assert cli("spool", "dead", "drop", other, "--reason", "the third", *spool).code == 0
    assert cli("spool", "flush", *spool, "--dsn", ready_dsn).code == 0
    told: dict[str, Any] = dict(rows(ready_dsn, "SELECT data->>'id', data->>'reason' FROM audit_logs"))
    assert told == {id_: "the first", other: "the third"}
    assert events(ready_dsn) == [DROPPED, DROPPED]
    assert files(tmp_path, "*") == []
