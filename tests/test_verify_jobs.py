"""Several processes check one log: they find what one finds, and end however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.conftest import rows
from tests.faces import OpenVault
from tests.sealed import Sealed, Sealing
from tests.test_cli import Cli, cli
from tests.test_custody import fill
from tracevault import ConfigError, DriverError, Report, Verdict
from tracevault.flows.seal import find_tree
from tracevault.integrity.report import Problem
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.sealing import jobs as jobs_module
from tracevault.sealing import verify as verify_module
from tracevault.sealing.findings import Bad, Findings
from tracevault.sealing.jobs import Helper, jobs_for
from tracevault.sealing.rows import Allowed, Ranges, RowCheck
from tracevault.sealing.verify import Trust, verify

__all__ = ["cli"]  # the fixture

PLACE = Place("verifying")
ROWS = 1500
CHUNK = 256
# Of what a helper is, for tests: one that could begin, and then does nothing.
IDLE = "import time; print('ready', flush=True); time.sleep(60)"


class Noted(Helper):
    """A helper that notes what it is given."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.given: list[int] = []

    def give(self, start: int, end: int) -> None:
        self.given.append(start)
        super().give(start, end)


@pytest.fixture
def log(ready_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sealed]:
    """A log of six chunks."""
    monkeypatch.setattr(verify_module, "CHUNK", CHUNK)
    sealed = Sealed(ready_dsn, tmp_path)
    fill(ready_dsn, ROWS)
    assert sealed.seal() == ROWS
    yield sealed
    sealed.close()


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Noted]]:
    """The helpers that were begun. None of them outlives the test."""
    begun: list[Noted] = []

    def begin(*arguments: Any) -> Noted:
        helper = Noted(*arguments)
        begun.append(helper)
        return helper

    monkeypatch.setattr(jobs_module, "Helper", begin)
    yield begun
    assert all(helper._process.returncode is not None for helper in begun)


def check(log: Sealed, jobs: int | None, helpers: list[Noted] | None = None, dsn: str = "", **options: Any) -> Report:
    """Verify. With ``helpers``, go on after the first chunk when all have begun, or it would be over before."""
    if helpers is not None:
        told = options.get("progress", lambda _done, _all: None)

        def progress(done: int, of: int) -> None:
            assert [helper.ready for helper in helpers]
            told(done, of)

        options["progress"] = progress
    dsn = dsn or log.dsn
    with psycopg.connect(dsn, autocommit=True) as connection:
        return verify(connection, "audit_logs", Trust([log.key()]), jobs=jobs, conninfo=dsn, **options)


def without_time(report: Report) -> dict[str, Any]:
    values = report.as_dict()
    for name in ("seconds", "oldest_unsealed_seconds", "oldest_unsigned_seconds"):
        values.pop(name)
    return values


def tamper(log: Sealed) -> None:
    with psycopg.connect(log.dsn) as connection:
        connection.execute("SET session_replication_role = replica")
        row = "id = (SELECT id FROM tracevault_leaves WHERE index = {})"
        for statement in (
            f"UPDATE audit_logs SET actor_id = 'x' WHERE {row.format(3)}",
            f"UPDATE audit_logs SET data = '{{}}' WHERE {row.format(300)}",
            "UPDATE tracevault_leaves SET occurred_at = now() WHERE index = 301",
            f"DELETE FROM audit_logs WHERE {row.format(600)}",
            f"DELETE FROM audit_logs WHERE {row.format(1400)}",
            # Exchanged with one of another chunk, and so with one that another process looks at.
            "UPDATE tracevault_leaves SET index = 40000 WHERE index = 100",
            "UPDATE tracevault_leaves SET index = 100 WHERE index = 900",
            "UPDATE tracevault_leaves SET index = 900 WHERE index = 40000",
            "DELETE FROM tracevault_leaves WHERE index IN (700, 1200)",
            f"DELETE FROM audit_logs WHERE {row.format(1201)}",
            "DELETE FROM tracevault_leaves WHERE index = 1201",
            "UPDATE tracevault_tiles SET hashes = substr(hashes, 1, 32 * 200) WHERE level = 0 AND number = 4",
            "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'x', 'sync', now())",
            "UPDATE audit_logs SET stored_xid = '3' WHERE event = 'x'",
        ):
            connection.execute(statement.encode())


@pytest.mark.parametrize("jobs", [2, 3, 9])
def test_several_processes_find_what_one_finds(log: Sealed, helpers: list[Noted], jobs: int) -> None:
    good = check(log, jobs, helpers)
    assert (good.verdict, good.checked, good.problems) == (Verdict.CONSISTENT, ROWS, [])
    tamper(log)
    alone, together = check(log, 1), check(log, jobs, helpers)
    assert without_time(together) == without_time(alone)
    assert {"changed", "moved", "deleted", "leaf", "tile", "inserted"} <= {one.kind for one in alone.problems}
    assert len(helpers) == 2 * min(jobs - 1, 5)  # no more processes than chunks
    assert all(helper._ready for helper in helpers)
    half = len(helpers) // 2
    assert all(any(helper.given for helper in some) for some in (helpers[:half], helpers[half:]))


def test_rows_that_went_rightly(log: Sealed, helpers: list[Noted], cli: Cli) -> None:
    with Sealing(log):
        erased = cli("erase", "--target", "user/u1", "--reason", "r", "--yes", "--dsn", log.dsn)
        pruned = cli("prune", "--before", "2021-01-01", "--yes", "--dsn", log.dsn)
    assert (erased.code, pruned.code) == (0, 0)
    alone, together = check(log, 1), check(log, 3, helpers)
    assert (together.pruned, together.erased, together.problems) == (ROWS // 2, ROWS // 6, [])
    assert without_time(together) == without_time(alone)
    assert any(helper.given for helper in helpers)


def test_they_see_one_snapshot(log: Sealed, helpers: list[Noted]) -> None:
    def change(done: int, _all: int) -> None:
        if done == CHUNK:
            rows(log.dsn, "SET session_replication_role = replica; UPDATE audit_logs SET actor_id = 'late'")

    assert check(log, 3, helpers, progress=change).problems == []
    assert len(check(log, 3, helpers).problems) == ROWS
    assert len(helpers) == 4


def test_findings_come_over_whole() -> None:
    one, two = UUID(int=1), UUID(int=2)
    found = Findings(
        7, 1, 2, [Problem("deleted", "gone\n“ü”", 4, one)], 3, [Bad(5, two, b"\0\xff", b"\n")], {one: 4}, {b"\0": 9}
    )
    text = found.to_json()
    assert "\n" not in text
    assert Findings.from_json(text) == found


# ------------------------------------------------------------------------------------------------ what fails


def test_a_helper_that_is_killed(log: Sealed, helpers: list[Noted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "_BEGIN", IDLE)

    def kill(_done: int, _all: int) -> None:
        os.kill(helpers[0]._process.pid, signal.SIGKILL)

    with pytest.raises(DriverError, match=r"a process that checked rows ended by signal 9") as caught:
        check(log, 2, helpers, progress=kill)
    assert caught.value.transient


def test_what_a_helper_met_is_raised(log: Sealed, helpers: list[Noted], monkeypatch: pytest.MonkeyPatch) -> None:
    error = {"message": "verifying failed: no room", "sqlstate": "53100", "transient": True}
    monkeypatch.setattr(jobs_module, "_BEGIN", f"print('ready')\nprint('error ' + {json.dumps(error)!r})")
    with pytest.raises(DriverError, match=r"^verifying failed: no room$") as caught:
        check(log, 2, helpers)
    assert (caught.value.sqlstate, caught.value.transient) == ("53100", True)
    assert len(helpers) == 1


@pytest.mark.parametrize("begin", ["raise SystemExit(3)", "print('no module')", "import os; os.close(0)"])
def test_helpers_that_cannot_begin(
    log: Sealed, helpers: list[Noted], monkeypatch: pytest.MonkeyPatch, begin: str
) -> None:
    monkeypatch.setattr(jobs_module, "_BEGIN", begin)
    assert check(log, 3, helpers).checked == ROWS
    assert [helper.ready for helper in helpers] == [False, False]


def test_a_server_with_no_connection_to_spare(log: Sealed, helpers: list[Noted]) -> None:
    name = make_role(log.dsn, "CONNECTION LIMIT 1")
    report = check(log, 3, helpers, make_conninfo(log.dsn, user=name, password="x"))
    assert report.checked == ROWS
    assert [helper._ready for helper in helpers] == [False, False]


def make_role(dsn: str, options: str) -> str:
    name = f"reader_{os.urandom(4).hex()}"
    rows(
        dsn,
        f"CREATE ROLE {name} LOGIN PASSWORD 'x' {options}; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}; "
        f"GRANT pg_read_all_data TO {name}",
    )
    return name


def test_where_no_helper_is_begun(log: Sealed, helpers: list[Noted], monkeypatch: pytest.MonkeyPatch) -> None:
    with psycopg.connect(log.dsn, autocommit=True) as connection:
        assert verify(connection, "audit_logs", Trust(), jobs=3).checked == ROWS  # nobody knows how to connect
    assert check(log, 1).checked == ROWS
    assert check(log, None).checked == ROWS  # too few rows
    for name in ("/usr/bin/uwsgi", "", None):
        monkeypatch.setattr(sys, "executable", name)
        assert check(log, 3).checked == ROWS
    monkeypatch.undo()
    rows(log.dsn, "REVOKE EXECUTE ON FUNCTION pg_export_snapshot() FROM PUBLIC")
    dsn = make_conninfo(log.dsn, user=make_role(log.dsn, ""), password="x")
    with psycopg.connect(dsn, autocommit=True) as connection:
        assert verify(connection, "audit_logs", Trust(), jobs=3, conninfo=dsn).checked == ROWS
    assert not helpers


def test_ctrl_c_ends_all(log: Sealed, helpers: list[Noted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "_BEGIN", IDLE)

    def interrupt(_done: int, _all: int) -> None:
        threading.Timer(0.3, partial(os.kill, os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        check(log, 3, helpers, progress=interrupt)
    assert len(helpers) == 2


def job(log: Sealed, connection: psycopg.Connection[Any], **changed: Any) -> dict[str, Any]:
    """What `jobs.crew` tells a helper."""
    told: list[dict[str, Any]] = []

    class Told(Helper):
        def __init__(self, job: dict[str, Any], *_: Any) -> None:
            told.append(job)
            raise OSError

    tree = run(connection, find_tree("audit_logs"), PLACE)
    assert tree is not None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jobs_module, "Helper", Told)
        own = RowCheck(connection, tree, PLACE, Allowed(Ranges([]), Ranges([])))
        jobs_module.crew(connection, own, tree, list(jobs_module.ranges(0, ROWS, CHUNK)), log.dsn, 2, PLACE)
    return {**told[0], **changed}


@pytest.fixture
def begun() -> Iterator[Callable[[dict[str, Any]], subprocess.Popen[bytes]]]:
    """Starts a helper that nobody listens to."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin(what: dict[str, Any]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", jobs_module._BEGIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        processes.append(process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(what).encode() + b"\n")
        process.stdin.flush()
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def test_a_helper_ends_with_the_process_that_began_it(
    log: Sealed, begun: Callable[[dict[str, Any]], subprocess.Popen[bytes]]
) -> None:
    with psycopg.connect(log.dsn) as connection, psycopg.connect(log.dsn) as blocking:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        what = job(log, connection)
        blocking.execute("LOCK audit_logs IN ACCESS EXCLUSIVE MODE")
        process = begun(what)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdin.close()
        assert process.wait(20) == 1
        process.stdin = None


@pytest.mark.parametrize(
    ("changed", "transient"),
    [({"conninfo": "host=127.0.0.1 port=1 user=nobody"}, True), ({"snapshot": "00000000-00000000-0"}, False)],
    ids=["connection", "snapshot"],
)
def test_a_helper_says_why_it_cannot_begin(
    log: Sealed,
    begun: Callable[[dict[str, Any]], subprocess.Popen[bytes]],
    changed: dict[str, str],
    transient: bool,
) -> None:
    with psycopg.connect(log.dsn) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        process = begun(job(log, connection, **changed))
        assert process.stdout is not None
        kind, _, said = process.stdout.readline().partition(b" ")
        assert kind == b"error"
        assert json.loads(said)["transient"] is transient
        assert process.wait(20) == 0


def test_a_password_is_in_no_command_line_and_no_environment(log: Sealed, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Watched(Helper):
        def __init__(self, job: dict[str, Any], *more: Any) -> None:
            assert "hush-hush" in job["conninfo"]
            super().__init__(job, *more)
            folder = Path(f"/proc/{self._process.pid}")
            while not (folder / "cmdline").read_bytes():  # it is empty for a moment at first
                time.sleep(0.001)
            seen.extend((folder / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ"))

    monkeypatch.setattr(jobs_module, "Helper", Watched)
    with psycopg.connect(log.dsn, autocommit=True) as connection:
        conninfo = make_conninfo(log.dsn, password="hush-hush")
        assert verify(connection, "audit_logs", Trust(), jobs=2, conninfo=conninfo).checked == ROWS
    assert len(seen) == 2
    assert "python" in seen[0]
    assert not any("hush-hush" in text for text in seen)


# ------------------------------------------------------------------------------------------- how it is asked


@pytest.mark.parametrize("jobs", [0, -1, 65, True, 1.5, "2"])
def test_a_number_of_jobs_that_is_none(log: Sealed, jobs: Any) -> None:
    with pytest.raises(ConfigError, match="`jobs` must be a number from 1 to 64") as caught:
        check(log, jobs)
    assert caught.value.field == "jobs"


def test_how_many_jobs_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)), raising=False)
    assert [jobs_for(leaves) for leaves in (0, 100_000, 10_000_000)] == [1, 1, 4]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert jobs_for(10_000_000) == 1


def test_the_vault_and_the_command_line(log: Sealed, helpers: list[Noted], face: OpenVault, cli: Cli) -> None:
    audit = face(connection_string=log.dsn)
    assert audit.verify(keys=[str(log.key())], jobs=2).checked == ROWS
    assert len(helpers) == 1
    done = cli("verify", "--key", str(log.key()), "--jobs", "3", "--json", "--dsn", log.dsn)
    assert (done.code, json.loads(done.out)["checked"]) == (Verdict.CONSISTENT.value, ROWS)
    assert len(helpers) == 3
    assert cli("verify", "--jobs", "0", "--dsn", log.dsn).code == 2


def test_a_vault_that_only_its_owner_can_connect(log: Sealed, helpers: list[Noted], face: OpenVault) -> None:
    audit = face(connection_string=log.dsn, writer_connect=lambda: psycopg.connect(log.dsn))
    assert audit.verify(jobs=3).checked == ROWS
    assert not helpers
