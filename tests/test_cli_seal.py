"""``tracevault seal``, ``status`` and ``verify``: what they print, and with which code they end."""

from __future__ import annotations

import functools
import http.server
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import rows
from tests.sealed import NAME
from tests.servers import one_server
from tests.test_background import wait_for
from tests.test_cli import Cli, Done, cli, in_terminal, plain
from tracevault import Tracevault

__all__ = ["cli"]  # the fixture

OK, TAMPERED, WRONG, UNKNOWN, CONSISTENT, INCOMPLETE = 0, 1, 2, 3, 4, 5


class Log:
    """The commands on one database, with a key and an anchor in a folder."""

    def __init__(self, cli: Cli, dsn: str, folder: Path) -> None:
        self._cli = cli
        self.dsn, self.folder = dsn, folder
        self.key = folder / "seal.key"
        self.anchor = folder / "anchor"
        done = cli("keygen", NAME, "-o", str(self.key))
        assert done.code == 0
        self.vkey = done.out.strip()

    def emit(self, count: int = 1) -> None:
        with Tracevault(connection_string=self.dsn) as audit:
            audit.emit_many([{"event": "order.paid", "data": {"n": number}} for number in range(count)])

    def seal(self, *more: str) -> Done:
        return self._cli("seal", "--dsn", self.dsn, "--key", str(self.key), *more)

    def seal_once(self, *more: str) -> None:
        done = self.seal("--once", "--anchor", f"file:{self.anchor}", *more)
        assert done.code == 0, done.err

    def status(self, *more: str) -> Done:
        return self._cli("status", "--dsn", self.dsn, *more)

    def verify(self, *more: str, key: bool = True) -> Done:
        return self._cli("verify", "--dsn", self.dsn, *(("--key", self.vkey) if key else ()), *more)

    def anchored(self, *more: str) -> Done:
        return self.verify("--anchor", str(self.anchor), *more)


@pytest.fixture
def log(cli: Cli, ready_dsn: str, tmp_path: Path) -> Log:
    return Log(cli, ready_dsn, tmp_path)


def test_sealing_once(log: Log) -> None:
    log.emit(3)
    done = log.seal("--once", "--anchor", f"file:{log.anchor}")
    assert (done.code, done.out, done.err) == (0, "", "audit_logs: 3 rows sealed\n")
    assert log.anchor.read_text().count(f"{NAME}/audit_logs\n3\n") == 1
    assert log.seal("--once").err == "audit_logs: 3 rows sealed\n"


def test_an_empty_table_is_sealed_too(log: Log) -> None:
    assert log.seal("--once").err == "audit_logs: 0 rows sealed\n"
    assert log.verify().code == CONSISTENT


def test_several_tables(log: Log) -> None:
    done = log.seal("--once", "--table", "audit_logs", "--table", "audit_user_events")
    assert (done.code, done.err) == (0, "audit_logs: 0 rows sealed\naudit_user_events: 0 rows sealed\n")


@contextmanager
def sealing(log: Log, *more: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tracevault", "seal", "--dsn", log.dsn, "--key", str(log.key), *more]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@one_server
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_it_seals_until_it_is_stopped_and_tells_the_anchor_before_it_ends(log: Log, ending: signal.Signals) -> None:
    with sealing(log, "--every", "50ms", "--anchor", f"file:{log.anchor}") as process:
        log.emit(2)
        wait_for(lambda: log.status().out != "" and json.loads(log.status().out).get("signed") == 2)
        log.emit(2)
        wait_for(lambda: json.loads(log.status().out).get("signed") == 4)
        process.send_signal(ending)
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert "sealing audit_logs every 50 ms; Ctrl-C ends it" in process.stderr.read()
    assert log.anchored().code == OK
    assert json.loads(log.anchored().out)["anchor"]["size"] == 4


@pytest.mark.parametrize(
    "more",
    [["--every", "0s"], ["--every", "soon"], ["--anchor-every", "5"], ["--table", "no table"], ["--anchor", "ftp://x"]],
    ids=" ".join,
)
def test_wrong_options(log: Log, more: list[str]) -> None:
    assert log.seal("--once", *more).code == WRONG


def test_without_a_key(cli: Cli, ready_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACEVAULT_SIGNING_KEY", raising=False)
    done = cli("seal", "--once", "--dsn", ready_dsn)
    assert (done.code, "`tracevault keygen` makes one" in done.err) == (WRONG, True)
    assert cli("seal", "--once", "--dsn", ready_dsn, "--key", str(tmp_path / "none")).code == WRONG
    assert rows(ready_dsn, "SELECT to_regclass('tracevault_trees')") == [(None,)]


def test_a_rollback_is_told_and_an_epoch_goes_on(log: Log) -> None:
    log.emit(5)
    log.seal_once()
    # Everything of the newest two rows is gone, as after a restore of an older copy.
    tables = "tracevault_trees, tracevault_leaves, tracevault_tiles, tracevault_checkpoints, tracevault_anchors"
    rows(log.dsn, f"TRUNCATE {tables}; DELETE FROM audit_logs WHERE (data->>'n')::int >= 3")
    done = log.seal("--once")
    assert (done.code, "ROLLBACK DETECTED" in done.err) == (3, True)
    assert log.anchored().code == TAMPERED
    done = log.seal("--once", "--new-epoch")
    assert done.code == 0
    assert f"the log is {NAME}/audit_logs/2 from now on" in done.err
    assert json.loads(log.status().out)["epoch"] == 2
    vkey = done.out.strip()
    assert vkey.startswith(f"{NAME}/audit_logs/2+")
    log.emit(1)
    log.seal_once()
    log.vkey = vkey
    assert (log.anchored().code, json.loads(log.anchored().out)["checked"]) == (OK, 4)


def test_a_lost_state_is_adopted_by_an_operator_alone(log: Log) -> None:
    log.emit(5)
    log.seal_once()
    log.key.with_name("seal.key.state").unlink()
    log.emit(1)
    done = log.seal("--once")
    assert (done.code, "--adopt-state" in done.err) == (3, True)
    assert log.seal("--once", "--adopt-state").code == 0
    assert log.anchored().code == OK


def test_another_server_is_noticed(log: Log) -> None:
    log.emit(5)
    log.seal_once()
    rows(log.dsn, "UPDATE tracevault_trees SET system_identifier = 1")
    log.emit(1)
    done = log.seal("--once")
    assert (done.code, "--resume" in done.err) == (3, True)
    log.seal_once("--resume")
    assert json.loads(log.anchored().out)["checked"] == 6


# --- status -------------------------------------------------------------------------------------------------


def test_status(log: Log) -> None:
    done = log.status()
    assert (done.code, json.loads(done.out)) == (1, {"table": "audit_logs", "sealed": False})
    assert "never sealed" in log.status("-o", "table").out
    log.emit(3)
    log.seal_once()
    log.emit(2)
    done = log.status()
    said = json.loads(done.out)
    assert done.code == 0
    assert (said["origin"], said["size"], said["signed"], said["waiting"]) == (f"{NAME}/audit_logs", 3, 3, 2)
    assert [(anchor["sink"], anchor["size"], anchor["error"]) for anchor in said["anchors"]] == [
        (f"file:{log.anchor}", 3, None)
    ]
    shown = log.status("-o", "table").out
    for text in (
        "audit_logs  log.example.com/shop/audit_logs",
        "3 rows sealed, signed up to 3",
        "2 rows not sealed yet",
    ):
        assert text in shown
    rows(log.dsn, "UPDATE audit_logs SET created_at = created_at - interval '2 minutes'")
    assert log.status().code == 1


def test_an_anchor_that_fails_is_shown(log: Log) -> None:
    log.emit(3)
    done = log.seal("--once", "--anchor", "command:echo no room >&2; false")
    assert (done.code, "an anchor has not got the newest checkpoint" in done.err) == (0, True)
    done = log.status("-o", "table")
    assert done.code == 1
    assert "command:echo no room >&2; false: never told" in done.out
    assert "fails: " in done.out


def test_status_of_a_log_without_anchors(log: Log) -> None:
    log.seal("--once")
    assert "no anchor: whoever owns the database could still make the log anew" in log.status("-o", "table").out


# --- verify -------------------------------------------------------------------------------------------------


def test_verdicts_and_codes(log: Log) -> None:
    done = log.verify()
    assert (done.code, "was never sealed" in done.err) == (UNKNOWN, True)
    log.emit(3)
    log.seal_once()
    done = log.verify(key=False)
    assert (done.code, json.loads(done.out)["signatures_checked"]) == (CONSISTENT, False)
    assert log.verify().code == CONSISTENT
    done = log.anchored()
    assert (done.code, json.loads(done.out)["verdict"]) == (OK, "OK")
    log.emit(1)
    assert log.anchored().code == OK
    rows(log.dsn, "UPDATE audit_logs SET created_at = created_at - interval '1 hour' WHERE data->>'n' = '0'")
    assert log.anchored().code == TAMPERED


def test_rows_that_wait_too_long(log: Log) -> None:
    log.emit(3)
    log.seal_once()
    log.emit(1)
    rows(
        log.dsn,
        "UPDATE audit_logs SET created_at = now() - interval '1 hour' "
        "WHERE id = (SELECT max(id::text)::uuid FROM audit_logs)",
    )
    done = log.anchored("-o", "table")
    assert done.code == INCOMPLETE
    assert "INCOMPLETE  1 row not sealed, the oldest waits for 60 minutes" in done.out
    assert log.anchored("--grace", "2h").code == OK


def test_what_is_wrong_is_shown(log: Log) -> None:
    log.emit(30)
    log.seal_once()
    rows(log.dsn, "UPDATE audit_logs SET event = E'\\x1b[31mred' WHERE (data->>'n')::int >= 5")
    done = log.anchored("-o", "table")
    assert done.code == TAMPERED
    assert done.out.startswith("TAMPERED  25 things are not as they were sealed\n")
    assert "\x1b" not in done.out
    assert "and 5 more; `-o json` names" in done.out
    problems = json.loads(log.anchored().out)["problems"]
    ids = {row[0] for row in rows(log.dsn, "SELECT id::text FROM audit_logs WHERE (data->>'n')::int >= 5")}
    assert {problem["id"] for problem in problems} == ids
    assert {problem["kind"] for problem in problems} == {"changed"}


def test_only_what_is_new_is_looked_at(log: Log) -> None:
    state = ("--state", str(log.folder / "verified"))
    log.emit(300)
    log.seal_once()
    first = json.loads(log.verify(*state).out)
    assert (first["verdict"], first["first"], first["checked"]) == ("CONSISTENT", 0, 300)
    log.emit(10)
    log.seal_once()
    second = log.verify(*state)
    said = json.loads(second.out)
    # What this machine saw before is a checkpoint from outside the database.
    assert (second.code, said["first"], said["checked"], said["anchor"]["size"]) == (OK, 300, 10, 300)
    rows(log.dsn, "UPDATE audit_logs SET event = 'x' WHERE id = (SELECT id FROM tracevault_leaves WHERE index = 7)")
    assert log.verify(*state).code == OK  # as documented: that row was looked at before
    assert log.verify(*state, "--full").code == TAMPERED
    rows(log.dsn, "UPDATE audit_logs SET event = 'x' WHERE id = (SELECT id FROM tracevault_leaves WHERE index = 305)")
    rows(log.dsn, "DELETE FROM audit_logs WHERE id = (SELECT id FROM tracevault_leaves WHERE index = 306)")
    assert log.verify(*state, "--full").code == TAMPERED


def test_a_state_is_no_state_of_another_log(log: Log) -> None:
    state = log.folder / "verified"
    state.write_text("nonsense")
    log.emit(1)
    log.seal_once()
    done = log.verify("--state", str(state))
    assert (done.code, "does not say what was verified" in done.err) == (UNKNOWN, True)
    assert log.verify("--state", str(state), key=False).code == WRONG


def test_anchors_of_every_kind(log: Log) -> None:
    log.emit(3)
    static = log.folder / "static"
    log.seal_once("--anchor", f"dir:{static}")
    checkpoint = static / NAME / "audit_logs" / "checkpoint"
    handler = functools.partial(QuietHandler, directory=str(static))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            addresses = (url, f"{url}/{NAME}/audit_logs", f"{url}/{NAME}/audit_logs/checkpoint")
            for anchor in (f"dir:{static}", str(static), str(checkpoint), f"file:{checkpoint}", *addresses):
                done = log.verify("--anchor", anchor)
                assert done.code == OK, done
                assert json.loads(done.out)["anchor"]["source"] == anchor
            assert log.verify("--anchor", f"{url}/nothing").code == UNKNOWN
        finally:
            server.shutdown()
            thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_an_anchor_that_cannot_be_read_is_no_verdict(log: Log) -> None:
    log.emit(1)
    log.seal_once()
    missing = log.verify("--anchor", str(log.folder / "none"))
    assert (missing.code, "cannot be read" in missing.err) == (UNKNOWN, True)
    (log.folder / "empty").write_text("")
    assert log.verify("--anchor", str(log.folder / "empty")).code == UNKNOWN
    assert log.verify("--anchor", str(log.anchor), key=False).code == WRONG  # nothing to believe it by
    assert log.verify("--key", "nonsense").code == WRONG


def test_in_a_terminal(log: Log) -> None:
    log.emit(3)
    log.seal_once()
    arguments = ["verify", "--dsn", log.dsn, "--key", log.vkey, "--anchor", str(log.anchor)]
    done = in_terminal(*arguments)
    assert done.code == OK
    assert "OK  nothing was changed up to a checkpoint of 3 leaves kept outside" in plain(done.out)
