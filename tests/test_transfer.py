"""Files of events: every format, read back; interrupted and resumed; imported again; and batches that are pushed."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import hmac
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.conftest import rows
from tests.faces import Face, OpenVault
from tests.rows import fill
from tests.servers import one_server
from tests.test_cli import Cli, cli, command, emit, environment, found
from tracevault import ConfigError, DriverError, Tracevault, ValidationError
from tracevault.events.json_text import json_record, json_text
from tracevault.events.record import RECORD_COLUMNS
from tracevault.transfer import file as transfer_file

__all__ = ["cli"]  # the fixture

START = datetime(2026, 1, 1, tzinfo=UTC)
EVIL = "\x1b]0;\u202e\u2028\"\\</script>'\U0001f600\x7f"
HOSTILE: list[dict[str, Any]] = [
    {"event": "a", "data": {EVIL: EVIL, "n": 10**40, "d": Decimal("1.15"), "f": 1e-7, "deep": [[[{"x": None}]]]}},
    {"event": "=cmd|'/C calc'!A1", "actor": {"id": "@SUM(1)", "type": "+1"}, "target": {"id": "\t=1", "type": "-2"}},
    {"event": "b", "data": {}, "meta": {"a": "", "b": "line\nbreak\r\n,;"}, "correlation_id": "x,\"y\"\nz"},
    {"event": "c", "data": {"outcome": "failure", "error": {"code": EVIL[:5]}, "severity": "fatal"}, "tenant_id": EVIL},
]  # fmt: skip


def open_vault(face: OpenVault, dsn: str, **more: Any) -> Face:
    return face(connection_string=dsn, bootstrap={"ensure_schema": False}, **more)


def hostile(vault: Face) -> None:
    vault.emit_many({**event, "occurred_at": START + timedelta(microseconds=n)} for n, event in enumerate(HOSTILE))


# ----------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("compressed", [False, True])
def test_json_lines_say_what_records_say(face: OpenVault, ready_dsn: str, tmp_path: Path, *, compressed: bool) -> None:
    vault = open_vault(face, ready_dsn)
    hostile(vault)
    for time_ in ("infinity", "-infinity", "12026-01-01", "0044-03-15 BC", "2026-01-01 00:00:00.5+00"):
        rows(ready_dsn, "INSERT INTO audit_logs (id, event, mode, occurred_at) "
             "VALUES (gen_random_uuid(), 'odd', 'sync', %s)", time_)  # fmt: skip
    path = tmp_path / ("log.jsonl.gz" if compressed else "log.jsonl")
    manifest = vault.query.export(path)
    content = path.read_bytes()
    text = (gzip.decompress(content) if compressed else content).decode()
    records = list(vault.query.iterate(order="asc"))
    assert text == "".join(json_text(json_record(record)) + "\n" for record in records)
    assert text.replace("\n", "").isprintable()
    assert (manifest.rows, manifest.bytes, manifest.sha256) == (9, len(content), hashlib.sha256(content).hexdigest())
    assert (manifest.first_id, manifest.last_id) == (str(records[0].id), str(records[-1].id))
    assert list(tmp_path.iterdir()) == [path]
    target = io.BytesIO()
    newest = vault.query.export(target, order="desc", event_prefix="=", since="2026-01-01")
    assert json.loads(target.getvalue())["event"] == HOSTILE[1]["event"]
    assert (newest.rows, newest.filters, newest.order) == (1, 'since:2026-01-01 event:"="*', "desc") or newest.filters
    assert vault.query.export(io.BytesIO(), event="none").rows == 0


def test_csv_is_read_back_and_defused(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    vault = open_vault(face, ready_dsn)
    hostile(vault)
    path = tmp_path / "log.csv"
    for raw in (True, False):
        vault.query.export(path, "csv", raw=raw)
        with path.open(newline="", encoding="utf-8") as file:
            header, *cells = csv.reader(file)
        assert header == list(RECORD_COLUMNS)
        for row, record in zip(cells, vault.query.iterate(order="asc"), strict=True):
            said = json_record(record)
            for name, cell in zip(header, row, strict=True):
                value = said[name]
                text = "" if value is None else json_text(value) if isinstance(value, dict) else value
                assert cell in ((text,) if raw else (text, "'" + text))
                assert raw or not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert sum(cell.startswith("'") for row in cells for cell in row) == 5


def test_ocsf(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    hostile(vault)
    target = {"id": "7", "type": "product"}
    vault.emit_diff(
        "product.price.updated",
        before={"price": 1},
        after={"price": 2},
        target=target,
        actor={"id": "u", "type": "user"},
        tenant_id="t",
        occurred_at="2026-02-01T00:00:00.123Z",
    )
    out = io.BytesIO()
    assert vault.query.export(out, "ocsf").rows == 5
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    for event in events:
        assert {"activity_id", "category_uid", "class_uid", "metadata", "severity_id", "time", "type_uid"} <= set(event)
        assert event["type_uid"] == event["class_uid"] * 100 + event["activity_id"]
        assert event["class_uid"] == (3004 if "entity" in event else 0)
    assert (events[3]["status_id"], events[3]["severity_id"], events[3]["severity"]) == (2, 6, "Fatal")
    diff = events[4]
    assert (diff["activity_id"], diff["activity_name"], diff["time"]) == (3, "Update", 1769904000123)
    assert diff["entity"] == {"uid": "7", "type": "product", "data": {"price": 1}}
    assert diff["entity_result"] == {"uid": "7", "type": "product", "data": {"price": 2}}
    assert diff["actor"] == {"user": {"uid": "u", "type_id": 1, "type": "User"}}
    assert diff["metadata"]["tenant_uid"] == "t"


def test_parquet(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason='needs the extra "parquet"')
    vault = open_vault(face, ready_dsn)
    hostile(vault)
    path = tmp_path / "log.parquet"
    assert vault.query.export(path, "parquet").rows == 4
    read = parquet.read_table(path).to_pylist()
    for row, record in zip(read, vault.query.iterate(order="asc"), strict=True):
        said = json_record(record)
        for name, value in row.items():
            expected = getattr(record, name)
            if isinstance(expected, dict):
                expected = json_text(expected)
            assert value == (said[name] if isinstance(expected, UUID) else expected), name
    assert vault.query.export(path, "parquet", event="none").rows == 0
    assert parquet.read_table(path).num_rows == 0


def test_a_restricted_query_exports_what_it_sees(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    for tenant in ("a", "b"):
        vault.emit("x", tenant_id=tenant, data={"secret": "s3cret", "kept": 1}, meta={"m": "s3cret"})
    query = vault.query.restricted(tenant_ids=["a"], hidden=["meta", "data.secret"])
    for kind in ("jsonl", "csv", "ocsf"):
        out = io.BytesIO()
        assert query.export(out, kind).rows == 1
        assert b"s3cret" not in out.getvalue()
        assert b"kept" in out.getvalue()


def test_what_export_refuses(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    query = open_vault(face, ready_dsn).query
    path = tmp_path / "f"
    for arguments, kind in (
        ({"format": "xml"}, ConfigError),
        ({"raw": True}, ConfigError),
        ({"format": "parquet", "resume": True}, ConfigError),
        ({"order": "up"}, ValidationError),
        ({"limit": 5}, ValidationError),
        ({"actor_id": None}, ValidationError),
    ):
        with pytest.raises(kind):
            query.export(path, **arguments)
        assert not path.exists()
    with pytest.raises(ConfigError):
        query.export(io.BytesIO(), resume=True)
    with pytest.raises(OSError, match="No such file"):
        query.export(tmp_path / "none" / "f")


def test_an_export_that_fails_leaves_the_old_file(face: OpenVault, dsn: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("old")
    vault = face(connection_string=dsn, bootstrap={"ensure_schema": False})
    with pytest.raises(DriverError):
        vault.query.export(path)
    assert path.read_text() == "old"


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv", "log.jsonl.gz"])
def test_an_interrupted_export_goes_on(face: OpenVault, ready_dsn: str, tmp_path: Path, name: str) -> None:
    vault = open_vault(face, ready_dsn)
    with psycopg.connect(ready_dsn, autocommit=True) as connection:
        fill(connection, 3000)
    kind = "csv" if "csv" in name else "jsonl"
    whole = vault.query.export(tmp_path / f"whole.{name}", kind, event_prefix="a")
    path = tmp_path / name
    stops = iter((500, 500, 1000))

    def stop_at(rows: int) -> None:
        if rows >= limit:
            raise Stop

    path.write_text("old")
    for limit in stops:
        with pytest.raises(Stop):
            vault.query.export(path, kind, event_prefix="a", resume=True, progress=stop_at)
        assert path.read_text() == "old"
        assert json.loads(path.with_name(f"{name}.part.json").read_text())["rows"] >= limit
        with pytest.raises(ConfigError, match="something else"):
            vault.query.export(path, kind, event_prefix="b", resume=True)
        with path.with_name(f"{name}.part").open("ab") as part:
            part.write(b"what was not synced")
    made = vault.query.export(path, kind, event_prefix="a", resume=True)
    assert path.read_bytes() == (tmp_path / f"whole.{name}").read_bytes()
    assert (made.rows, made.sha256, made.first_id, made.last_id) == (
        whole.rows,
        whole.sha256,
        whole.first_id,
        whole.last_id,
    )
    assert not list(tmp_path.glob("*.part*"))


def test_notes_of_an_earlier_export_say_nothing_of_the_next(ready_dsn: str, tmp_path: Path) -> None:
    def stop(_rows: int) -> None:
        raise Stop

    with Tracevault(connection_string=ready_dsn) as vault:
        vault.emit_many(f"e{n}" for n in range(1200))
        with pytest.raises(Stop):
            vault.query.export(tmp_path / "f", progress=stop)
        code = (
            "import os; from tracevault import Tracevault\n"
            f"audit = Tracevault(connection_string={ready_dsn!r})\n"
            f"audit.query.export({str(tmp_path / 'f')!r}, progress=lambda _rows: os.kill(os.getpid(), 9))"
        )
        assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == -9
        assert not (tmp_path / "f.part.json").exists()
        assert vault.query.export(tmp_path / "f", resume=True).rows == 1200
        assert len((tmp_path / "f").read_bytes().splitlines()) == 1200


def test_two_exports_into_one_file(ready_dsn: str, tmp_path: Path) -> None:
    with Tracevault(connection_string=ready_dsn) as vault:
        for n in range(3):
            vault.emit(f"e{n}")

        def again(_rows: int) -> None:
            with pytest.raises(ConfigError, match="another export"):
                vault.query.export(tmp_path / "f")

        assert vault.query.export(tmp_path / "f", progress=again).rows == 3


@one_server
def test_a_killed_export_goes_on(ready_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with psycopg.connect(ready_dsn, autocommit=True) as connection:
        fill(connection, 60_000)
    path = tmp_path / "log.jsonl"
    code = (
        "import os; from tracevault import Tracevault; from tracevault.transfer import file; file._NOTED_EVERY = 0.05\n"
        "def kill(rows):\n    if rows >= 20000: os.kill(os.getpid(), 9)\n"
        f"Tracevault(connection_string={ready_dsn!r}).query.export({str(path)!r}, progress=kill)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False, timeout=60).returncode == -9
    monkeypatch.setattr(transfer_file, "_NOTED_EVERY", 0.0)
    begun: list[int] = []
    with Tracevault(connection_string=ready_dsn) as vault:
        made = vault.query.export(path, resume=True, progress=begun.append)
        whole = vault.query.export(tmp_path / "whole")
    assert made.sha256 == whole.sha256
    assert 500 < begun[0] <= 21_000, "it began anew"


@one_server
def test_memory_does_not_grow_with_rows(ready_dsn: str, tmp_path: Path) -> None:
    """Rows of 100 kB each, 200 MB in all."""
    with psycopg.connect(ready_dsn, autocommit=True) as connection:
        connection.execute(
            b"INSERT INTO audit_logs (id, event, mode, occurred_at, data) "
            b"SELECT gen_random_uuid(), 'big', 'sync', now(), jsonb_build_object("
            b"'x', (SELECT string_agg(md5(n::text || m::text), '') FROM generate_series(1, 3200) AS m)) "
            b"FROM generate_series(1, 2000) AS n"
        )
    code = (
        "import re, sys; from tracevault import Tracevault\n"
        f"audit = Tracevault(connection_string={ready_dsn!r})\n"
        f"made = audit.query.export({str(tmp_path / 'f')!r}, sys.argv[1])\n"
        # Not by getrusage, which counts the process that has started this one as well.
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]\n"
        "print(made.rows, made.bytes, int(peak) // 1024)"
    )
    for kind in ("jsonl", "csv"):
        done = subprocess.run([sys.executable, "-c", code, kind], env=environment(), check=True, timeout=100, stdout=-1)
        count, size, mebibytes = map(int, done.stdout.split())
        assert (count, size > 200_000_000) == (2000, True)
        assert mebibytes < 200


# ------------------------------------------------------------------------------------------ import


@one_server
def test_what_was_exported_is_imported(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    with Tracevault(connection_string=ready_dsn) as vault:
        vault.emit_many({**event, "occurred_at": START + timedelta(days=n)} for n, event in enumerate(HOSTILE))
        for n in range(1500):
            vault.emit("more", data={"n": n}, mode="async")
        vault.flush()
        vault.query.export(tmp_path / "log.jsonl.gz")
    file = str(tmp_path / "log.jsonl.gz")
    target = ["--dsn", ready_dsn, "--table", "audit_user_events"]
    assert cli("import", file, *target) == (0, "", "1,504 events stored, 0 there already, 0 refused\n")
    assert cli("import", file, *target).err == "0 events stored, 1,504 there already, 0 refused\n"
    scopes = {"default": "audit_logs", "copy": "audit_user_events"}
    with Tracevault(connection_string=ready_dsn, scopes=scopes) as vault:
        pairs = zip(vault.query.iterate(), vault.get_scope("copy").query.iterate(), strict=True)
        for one, other in pairs:
            for name in set(RECORD_COLUMNS) - {"created_at", "mode"}:
                assert getattr(one, name) == getattr(other, name)
            assert json_text(one.data) == json_text(other.data)


@one_server
def test_lines_that_are_refused(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    good = {"id": str(UUID(int=1)), "event": "good", "occurred_at": "2026-01-01"}
    bad: list[tuple[bytes, str]] = [
        (b"{", "not JSON"),
        (b"[]", "no object"),
        (b'{"a": 1}', "not a column"),
        (b'{"event": "x"}', "`id` is missing"),
        (json.dumps({**good, "id": "x"}).encode(), "UUID"),
        (json.dumps({**good, "id": 5}).encode(), "UUID"),
        (json.dumps({**good, "event": ""}).encode(), "`event`"),
        (json.dumps({**good, "actor_id": "x"}).encode(), "together"),
        (json.dumps({**good, "occurred_at": "infinity"}).encode(), "ISO 8601"),
        (json.dumps({**good, "data": [1]}).encode(), "`data`"),
        (json.dumps({**good, "event": "other"}).encode(), "taken"),
        (b'{"id": 1, "id": 2}', "twice"),
        (b'{"event": "\xff"}', "JSON"),
        (b"[" * 100_000, "deep"),
        (json.dumps({**good, "data": {"a": float("nan")}}).encode(), "finite"),
    ]  # fmt: skip
    lines = [json.dumps(good).encode(), b"", *(line for line, _ in bad)]
    lines.append(json.dumps({**good, "id": str(UUID(int=2))}).encode())
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"\n".join(lines))
    rejects = tmp_path / "rejects.jsonl"
    done = cli("import", str(file), "--rejects", str(rejects), "--dsn", ready_dsn)
    assert (done.code, done.err) == (1, f"2 events stored, 0 there already, {len(bad)} refused\n")
    refused = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [entry["line"] for entry in refused] == list(range(3, 3 + len(bad)))
    for entry, (_, says) in zip(refused, bad, strict=True):
        assert says in entry["why"], entry
    assert sorted(record["id"] for record in found(cli("find", "--dsn", ready_dsn))) == [
        str(UUID(int=1)), str(UUID(int=2))]  # fmt: skip
    shown = cli("import", str(file), "--dsn", ready_dsn)
    assert shown.code == 1
    assert f"{file}:3: it is not JSON" in shown.err
    assert cli("import", str(tmp_path / "none"), "--dsn", ready_dsn).code == 3


@one_server
def test_the_command_exports(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    emit(ready_dsn, *({"event": f"e{n}", "occurred_at": f"2026-01-0{n}"} for n in range(1, 6)))
    assert [record["event"] for record in found(cli_out(ready_dsn))] == [f"e{n}" for n in range(1, 6)]
    path, manifest = tmp_path / "log.csv", tmp_path / "manifest.json"
    done = cli("export", "--dsn", ready_dsn, "-o", str(path), "--format", "csv", "--order", "desc",
               "--where", "event:e*", "--until", "2026-01-04", "--manifest", str(manifest))  # fmt: skip
    noted = json.loads(manifest.read_text())
    assert done == (0, "", f"{path}: 4 events, sha256 {noted['sha256']}\n")
    assert (noted["rows"], noted["format"], noted["table"]) == (4, "csv", "audit_logs")
    assert noted["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    for wrong in (["--resume"], ["--verifiable", "--event", "x"], ["--verifiable", "--format", "csv"], ["--raw"]):
        assert cli("export", "--dsn", ready_dsn, *wrong).code == 2
    assert cli("export", "--dsn", ready_dsn, "-o", str(tmp_path / "no" / "file")).code == 3


def cli_out(dsn: str) -> Any:
    from tests.test_cli import Done

    done = subprocess.run(command("export", "--dsn", dsn), env=environment(), capture_output=True, check=False)
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


# -------------------------------------------------------------------------------------------- push


class Receiver:
    """An endpoint that answers as it is told, and remembers what it took."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], bytes, int]] = []
        self.answers: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = outer.answers.pop(0) if outer.answers else 204
                outer.requests.append(({key.lower(): value for key, value in self.headers.items()}, body, 0))
                if answer == "cut":
                    self.connection.close()
                    return
                status, headers = answer if isinstance(answer, tuple) else (answer, {})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/in?x=1"

    def taken(self) -> list[list[str]]:
        return [
            [json.loads(line)["event"] for line in gzip.decompress(body).splitlines()] for _, body, _ in self.requests
        ]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.05,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@one_server
def test_push(cli: Cli, ready_dsn: str, tmp_path: Path, receiver: Receiver) -> None:
    secrets = [bytes(range(32)), bytes(range(24))]
    files = []
    for n, secret in enumerate(secrets):
        (tmp_path / f"s{n}").write_text(f"whsec_{base64.b64encode(secret).decode()}\n")
        files += ["--secret-file", str(tmp_path / f"s{n}")]
    push = ["push", "--to", receiver.url, "--state", str(tmp_path / "state"), "--once", "--dsn", ready_dsn, *files]
    emit(ready_dsn, {"event": "old"})
    assert cli(*push).err == "0 events pushed\n"
    emit(ready_dsn, *({"event": f"e{n}"} for n in range(5)))
    assert cli(*push, "--batch", "2").err == "5 events pushed\n"
    assert receiver.taken() == [["e0", "e1"], ["e2", "e3"], ["e4"]]
    for headers, body, _ in receiver.requests:
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = [f"v1,{base64.b64encode(hmac.new(s, signed, hashlib.sha256).digest()).decode()}" for s in secrets]
        assert headers["webhook-signature"] == " ".join(expected)
        assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
        assert (headers["content-type"], headers["content-encoding"]) == ("application/x-ndjson", "gzip")
    assert len({headers["webhook-id"] for headers, _, _ in receiver.requests}) == 3
    assert cli(*push).err == "0 events pushed\n"
    emit(ready_dsn, {"event": "x"}, {"event": "y"})
    assert cli(*push, "--event", "y").err == "1 event pushed\n"


@one_server
def test_push_tries_again(cli: Cli, ready_dsn: str, tmp_path: Path, receiver: Receiver) -> None:
    push = [
        "push",
        "--to",
        receiver.url,
        "--state",
        str(tmp_path / "state"),
        "--once",
        "--from-beginning",
        "--dsn",
        ready_dsn,
    ]
    emit(ready_dsn, {"event": "a"})
    receiver.answers = [503, "cut", (429, {"Retry-After": "1"}), 200]
    began = time.monotonic()
    done = cli(*push)
    assert (done.code, done.err.splitlines()[1:]) == (0, ["pushing again", "1 event pushed"])
    assert done.err.startswith("waiting: pushing to http://127.0.0.1")
    assert "x=1" not in done.err
    assert time.monotonic() - began > 1
    assert len({headers["webhook-id"] for headers, _, _ in receiver.requests}) == 1
    assert receiver.taken() == [["a"]] * 4
    emit(ready_dsn, {"event": "b"})
    for answer in (400, 302, 410):
        receiver.answers = [answer]
        refused = cli(*push)
        assert (refused.code, str(answer) in refused.err) == (3, True)
    # It comes again as it was, although there is more by now.
    emit(ready_dsn, {"event": "c"})
    receiver.requests.clear()
    assert cli(*push).code == 0
    assert receiver.taken() == [["b"], ["c"]]


@pytest.mark.parametrize(
    "url",
    ["http://example.com/", "ftp://x/", "https://user:pass@example.com/", "example.com", "https://", "https://x/#y"],
)
def test_push_goes_nowhere_unsafe(cli: Cli, tmp_path: Path, url: str) -> None:
    done = cli("push", "--to", url, "--state", str(tmp_path / "s"), "--dsn", "postgresql://127.0.0.1:1/x")
    assert done.code == 2
    assert "pass" not in done.err
    (tmp_path / "key").write_text("whsec_c2hvcnQ=")
    short = ["push", "--to", "https://x/", "--state", str(tmp_path / "s"), "--secret-file", str(tmp_path / "key")]
    assert cli(*short, "--dsn", "postgresql://127.0.0.1:1/x").code == 2
