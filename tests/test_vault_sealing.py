"""The option ``seal``: a vault that seals what it stores, and what it says of it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import rows
from tests.faces import OpenVault
from tests.servers import one_server
from tracevault import ConfigError, SealError, Tracevault, Verdict, start_tracevault, verify_proof
from tracevault.integrity.note import Signer

NAME = "log.example.com/shop"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "seal.key"
    path.touch(0o600)
    path.write_text(f"{Signer.generate(NAME).encode()}\n")
    return path


def vkey(key: Path, table: str = "audit_logs") -> str:
    return str(Signer.parse(key.read_text().strip()).renamed(f"{NAME}/{table}").verifier)


def sealing(dsn: str, key: Path, **more: Any) -> dict[str, Any]:
    anchors = [f"file:{key.with_name('anchor')}"]
    return {"connection_string": dsn, "seal": {"key": str(key), "every_ms": 20, "anchors": anchors, **more}}


def test_an_event_is_sealed_proven_and_verified(dsn: str, key: Path, face: OpenVault) -> None:
    audit = face(**sealing(dsn, key))
    ids = [audit.emit("order.paid", data={"n": number}).id for number in range(5)]
    assert [audit.await_sealed(id_) for id_ in ids] == [0, 1, 2, 3, 4]
    assert audit.await_sealed(str(ids[2])) == 2
    proof = verify_proof(str(audit.prove(ids[3])), [vkey(key)])
    assert (proof.index, proof.values["event"]) == (3, "order.paid")
    assert audit.verify(keys=[vkey(key)]).verdict is Verdict.CONSISTENT
    audit.close()
    later = face(connection_string=dsn)
    report = later.verify(keys=[vkey(key)], anchors=[str(key.with_name("anchor"))])
    assert (report.verdict, report.checked, report.anchor is not None and report.anchor.size) == (Verdict.OK, 5, 5)
    rows(dsn, "UPDATE audit_logs SET event = 'order.refunded' WHERE data = '{\"n\": 1}'")
    report = later.verify(keys=[vkey(key)])
    assert (report.verdict, [(problem.index, problem.id) for problem in report.problems]) == (
        Verdict.TAMPERED,
        [(1, ids[1])],
    )


def test_closing_seals_and_anchors_what_was_emitted_last(dsn: str, key: Path, face: OpenVault) -> None:
    audit = face(**sealing(dsn, key, every_ms=3_600_000), default_mode="async")
    for _ in range(100):
        audit.emit("order.paid")
    audit.close()
    report = face(connection_string=dsn).verify(keys=[vkey(key)], anchors=[f"file:{key.with_name('anchor')}"])
    assert (report.verdict, report.checked, report.unsealed) == (Verdict.OK, 100, 0)


def test_every_scope_has_a_log(dsn: str, key: Path, face: OpenVault) -> None:
    audit = face(**sealing(dsn, key), scopes={"default": "audit_logs", "users": "audit_users"})
    users = audit.get_scope("users")
    first, second = audit.emit("a").id, users.emit("b").id
    assert (audit.await_sealed(first), users.await_sealed(second)) == (0, 0)
    assert users.verify(keys=[vkey(key, "audit_users")]).origin == f"{NAME}/audit_users"
    with pytest.raises(SealError, match="not sealed yet"):
        users.await_sealed(first, timeout=0.1)


def test_without_a_sealer_nothing_is_awaited_for_ever(dsn: str, face: OpenVault) -> None:
    audit = face(connection_string=dsn)
    id_ = audit.emit("a").id
    with pytest.raises(SealError, match="is a sealer running"):
        audit.await_sealed(id_, timeout=0.1)
    asking: tuple[Any, ...] = (audit.verify, lambda: audit.prove(id_))
    for ask in asking:
        with pytest.raises(SealError):
            ask()
    assert audit.emit("b").stored == "database"


def test_the_key_may_come_from_the_environment(
    dsn: str, key: Path, face: OpenVault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEVAULT_SIGNING_KEY", key.read_text())
    with pytest.raises(ConfigError, match=r"`seal\.state`"):
        face(connection_string=dsn, seal={})
    audit = face(connection_string=dsn, seal={"state": key.with_name("state"), "every_ms": 20})
    assert audit.await_sealed(audit.emit("a").id) == 0
    assert audit.verify(keys=[vkey(key)]).signatures_checked


@pytest.mark.parametrize(
    ("seal", "field"),
    [
        ("seal.key", "seal"),
        ({"kye": "x"}, "seal.kye"),
        ({"key": ""}, "seal.key"),
        ({"key": 7}, "seal.key"),
        ({"key": "k", "anchors": "file:x"}, "seal.anchors"),
        ({"key": "k", "anchors": [1]}, "seal.anchors"),
        ({"key": "k", "every_ms": 0}, "seal.every_ms"),
        ({"key": "k", "every_ms": True}, "seal.every_ms"),
        ({"key": "k", "heartbeat_s": "1h"}, "seal.heartbeat_s"),
    ],
    ids=str,
)
def test_wrong_options(seal: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Tracevault(connection_string="host=127.0.0.1", seal=seal)
    assert caught.value.field == field


@one_server
@pytest.mark.parametrize("seal", [{}, {"key": "missing"}, {"key": "KEY", "anchors": ["ftp://x"]}], ids=str)
def test_what_cannot_seal_does_not_start(
    dsn: str, key: Path, face: OpenVault, seal: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRACEVAULT_SIGNING_KEY", raising=False)
    with pytest.raises(ConfigError):
        face(connection_string=dsn, seal={**seal, **({"key": str(key)} if seal.get("key") == "KEY" else {})})


@one_server
def test_a_forked_child_does_not_seal_and_does_not_end_the_sealing(dsn: str, key: Path) -> None:
    code = f"""
import os
from tracevault import Tracevault
audit = Tracevault(**{sealing(dsn, key)!r})
first = audit.emit("parent").id
audit.await_sealed(first)
pid = os.fork()
if pid == 0:
    audit.emit("child")
    audit.close()
    os._exit(0)
os.waitpid(pid, 0)
print(audit.await_sealed(audit.emit("after").id, 10))
audit.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


@one_server
def test_the_event_loop_goes_on_while_it_verifies(dsn: str, key: Path) -> None:
    async def longest() -> float:
        async with start_tracevault(**sealing(dsn, key)) as audit:
            await audit.emit_many([{"event": "a", "data": {"n": number}} for number in range(20_000)])
            await audit.await_sealed((await audit.emit("last")).id, 30)
            verifying = asyncio.ensure_future(audit.verify(keys=[vkey(key)]))
            gaps, before = [], time.perf_counter()
            while not verifying.done():
                await asyncio.sleep(0.001)
                now = time.perf_counter()
                gaps.append(now - before)
                before = now
            assert verifying.result().checked == 20_001
            return sorted(gaps)[len(gaps) * 9 // 10]

    assert asyncio.run(longest()) < 0.1
