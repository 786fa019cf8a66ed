"""JetStream between emit and PostgreSQL, with one server: what goes in comes out, and what is refused says why."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import rows
from tests.faces import OpenVault
from tests.faults.cluster import BINARY, Cluster
from tests.newest import server
from tests.test_cli import Cli, cli
from tracevault import ConfigError, UndeliveredError
from tracevault.config import config_from
from tracevault.writer.stream import EVENTS, connected, decode, servers_of

__all__ = ["cli", "server"]  # fixtures

needs_server = pytest.mark.skipif(BINARY is None, reason="needs nats-server")


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path / "nats", 1)
    yield found
    found.close()


@contextmanager
def working(nats: Cluster, dsn: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker, which has stored all there is once this ends."""
    command = [sys.executable, "-m", "tracevault", "ingest", "run", "--nats", nats.address, "--dsn", dsn]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as worker:
        try:
            yield worker
        finally:
            worker.send_signal(signal.SIGTERM)


def arrived(dsn: str, count: int) -> None:
    deadline = time.monotonic() + 20
    while rows(dsn, "SELECT count(*) FROM audit_logs") != [(count,)]:
        assert time.monotonic() < deadline, rows(dsn, "SELECT event FROM audit_logs")
        time.sleep(0.05)


@needs_server
def test_async_events_go_through_the_stream(ready_dsn: str, nats: Cluster, face: OpenVault, tmp_path: Path) -> None:
    told: list[Any] = []
    audit = face(
        connection_string=ready_dsn,
        ingest=nats.address,
        spool=str(tmp_path / "spool"),
        default_mode="async",
        on_stored=lambda record, where: told.append((record.event, where)),
    )
    receipt = audit.emit("first", data={"n": 12345678901234567890, "é": None}, tenant_id="t")
    audit.emit("second")
    audit.emit("now", mode="sync")
    audit.flush()
    assert receipt.stored == "spool"
    assert rows(ready_dsn, "SELECT event FROM audit_logs") == [("now",)], "they wait for a worker"
    assert told == [("now", "database")]
    stats = audit.stats()
    assert (stats.delivered, stats.spooled, stats.lanes["default"]) == (3, 0, "ok")
    with working(nats, ready_dsn) as worker:
        arrived(ready_dsn, 3)
    assert worker.returncode == 0
    found = audit.query.find_by_id(receipt.id)
    assert (found.event, found.data, found.tenant_id) == ("first", {"n": 12345678901234567890, "é": None}, "t")
    audit.close()


@needs_server
def test_what_is_refused_says_why(ready_dsn: str, nats: Cluster, face: OpenVault) -> None:
    rows(ready_dsn, "ALTER TABLE audit_logs ADD CHECK (tenant_id IS DISTINCT FROM 'poison')")
    audit = face(connection_string=ready_dsn, ingest=nats.address, default_mode="async")
    first = audit.emit("good").id
    audit.emit("bad", tenant_id="poison")
    audit.emit("again", id=first)  # the id is another event's
    audit.emit("good")
    audit.flush()
    asyncio.run(publish(nats, f"{EVENTS}.audit_logs", b"nonsense"))
    with working(nats, ready_dsn) as worker:
        arrived(ready_dsn, 2)
        letters = asyncio.run(nats.dead_letters(3))
    said = sorted((letter["Tracevault-Code"], letter["Tracevault-Reason"]) for letter in letters)
    assert [code for code, _ in said] == ["", "", "23514"]
    assert "is taken in table `audit_logs` by an event with other content" in "".join(reason for _, reason in said)
    assert "no record of ours" in "".join(reason for _, reason in said)
    assert worker.returncode == 0


async def publish(nats: Cluster, subject: str, data: bytes) -> None:
    client = await connected(servers_of(nats.address), 10)
    try:
        await client.jetstream().publish(subject, data)
    finally:
        await client.close()


@needs_server
def test_without_the_stream_records_wait(ready_dsn: str, nats: Cluster, face: OpenVault, tmp_path: Path) -> None:
    spool = str(tmp_path / "spool")
    options = {"connection_string": ready_dsn, "ingest": nats.address, "default_mode": "async", "timeout": 1.0}
    for node in nats.nodes:
        node.kill()
    audit = face(**options, spool=spool)
    audit.emit("waits")
    with pytest.raises(UndeliveredError, match="1 waiting in the spool"):
        audit.flush(timeout=1.5)
    audit.close()
    for node in nats.nodes:
        node.start()
    successor = face(**options, spool=spool)
    successor.flush(timeout=20)
    with working(nats, ready_dsn):
        arrived(ready_dsn, 1)


def test_a_cluster_that_is_not_there(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracevault.cli.ingest.TIMEOUT", 0.3)
    done = cli("ingest", "setup", "--nats", "nats://127.0.0.1:1")
    assert (done.code, "the NATS cluster cannot be reached" in done.err) == (3, True)


@pytest.mark.parametrize("value", ["", "host:4222", "http://host", "nats://", "nats://a, b", 7])
def test_an_address_that_is_none(value: Any) -> None:
    with pytest.raises(ConfigError, match="`ingest` must be the address of a NATS cluster"):
        config_from({"connection_string": "host=x", "ingest": value})


def test_a_stream_is_for_one_server() -> None:
    far = {"table_name": "b", "connection_string": "host=y"}
    with pytest.raises(ConfigError, match="`ingest` is for scopes of one server"):
        config_from({"connection_string": "host=x", "scopes": {"default": "a", "far": far}, "ingest": "nats://n:4222"})


def test_addresses() -> None:
    assert servers_of("nats://a:1,b:2") == ["nats://a:1", "nats://b:2"]
    assert servers_of("tls://u:p@a:1,tls://b") == ["tls://u:p@a:1", "tls://b"]


@pytest.mark.parametrize(
    ("subject", "headers"),
    [
        (f"{EVENTS}.audit_logs", None),
        (
            f"{EVENTS}.audit_logs",
            {"Tracevault-Columns": "id,unknown", "Tracevault-Flags": "0", "Tracevault-Scope": "s"},
        ),
        (f"{EVENTS}.a.b", {}),
    ],
)
def test_a_message_that_is_no_record(subject: str, headers: dict[str, str] | None) -> None:
    with pytest.raises(ValueError, match=r"no record of ours|columns of another version"):
        decode(subject, headers, b"")


def test_sync_events_need_no_stream(ready_dsn: str, face: OpenVault) -> None:
    audit = face(connection_string=ready_dsn, ingest="nats://127.0.0.1:1", timeout=0.5)
    audit.emit("now")
    audit.emit("async", mode="async")
    with pytest.raises(UndeliveredError):
        audit.close(timeout=0.5)
    assert rows(ready_dsn, "SELECT event FROM audit_logs") == [("now",)]
