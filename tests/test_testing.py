"""The log of a test: vaults in memory, assertions, what they say, and the pytest plugin as users run it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from textwrap import dedent
from typing import Any
from unittest.mock import ANY

import pytest

import tracevault
from tests.conftest import rows
from tests.docs.pages import ROOT
from tracevault import Tracevault, TracevaultError, ValidationError, start_tracevault
from tracevault.events import catalog
from tracevault.testing import AuditLog

NOWHERE: Any = {"connection_string": "postgresql://nobody@127.0.0.1:1/nothing"}


@dataclass
class Shared:
    with_: str
    times: int = 1


@pytest.fixture(autouse=True)
def own_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_by_name", {})
    monkeypatch.setattr(catalog, "_by_class", {})
    tracevault.event("doc.shared")(Shared)


def failure(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# --------------------------------------------------------------------------------------------- vaults


def test_blocking_vaults_need_no_database(audit_log: AuditLog) -> None:
    told: list[str] = []
    with Tracevault(
        **NOWHERE,
        scopes={"default": "audit_logs", "users": "audit_user_events"},
        mask_fields=["password"],
        environment="test",
        on_stored=lambda record, where: told.append(f"{record.event} {where}"),
    ) as audit:
        with tracevault.context(actor={"id": "1", "type": "user"}):
            receipt = audit.emit("login", data={"password": "x"})
        queued = audit.get_scope("users").emit("user.made", mode="async")
        audit.emit_many(["one", {"event": "two"}])
        audit.emit_diff("renamed", before={"a": 1}, after={"a": 2})
        with pytest.raises(ValidationError):
            audit.emit("", data={})
        audit.flush()
        assert audit.healthcheck()
        assert (audit.stats().emitted, audit.stats().delivered) == (5, 5)
    assert (receipt.stored, queued.stored) == ("database", "memory")
    assert not audit.healthcheck()
    with pytest.raises(TracevaultError, match="closed"):
        audit.emit("late")
    assert [record.event for record in audit_log.events] == ["login", "user.made", "one", "two", "renamed"]
    first = audit_log.events[0]
    assert (first.id, first.actor_id, first.data, first.environment) == (
        receipt.id,
        "1",
        {"password": "[REDACTED]"},
        "test",
    )
    assert told == ["login database", "user.made database", "one database", "two database", "renamed database"]
    audit_log.assert_emitted("user.made", scope="users", stored="memory", mode="async")


async def test_async_vaults_need_no_database(audit_log: AuditLog) -> None:
    async with start_tracevault(**NOWHERE) as audit:
        await audit.emit("login")
        await audit.emit("queued", mode="async")
        await audit.emit_many(["one"])
        await audit.flush()
        assert await audit.healthcheck()
        async with audit.unit_of_work() as unit:
            await unit.emit("kept")
            assert len(audit_log.events) == 3
        with suppress(RuntimeError):
            async with audit.unit_of_work() as unit:
                await unit.get_scope("default").emit("dropped")
                raise RuntimeError
        for reading in (audit.query.find_many(), audit.query.count(), audit.await_sealed(audit_log.events[0].id)):
            with pytest.raises(
                TracevaultError, match=r"in memory, for tests; see what was emitted in `audit_log.events`"
            ):
                await reading
    assert [record.event for record in audit_log.events] == ["login", "queued", "one", "kept"]
    await audit_log.async_vault.emit("direct")
    assert audit_log.async_vault is audit_log.async_vault
    audit_log.assert_emitted("direct")


def test_a_unit_of_work_has_no_database(audit_log: AuditLog) -> None:
    with audit_log.vault.unit_of_work() as unit:
        unit.emit("kept")
        with pytest.raises(TracevaultError, match=r"`connection.execute` needs a database"):
            unit.connection.execute("SELECT 1")
    with suppress(KeyError), audit_log.vault.unit_of_work() as unit:
        unit.emit("dropped")
        raise KeyError
    audit_log.assert_emitted("kept", stored="transaction")
    audit_log.assert_no_more()


def test_a_connection_of_the_tests_own(audit_log: AuditLog) -> None:
    receipt = audit_log.vault.emit("x", connection=object())
    assert receipt.stored == "transaction"
    audit_log.assert_emitted("x", stored="transaction")


def test_a_vault_is_captured_and_let_go(ready_dsn: str) -> None:
    scopes: Any = {"default": "audit_logs", "users": "audit_user_events"}
    with Tracevault(connection_string=ready_dsn, scopes=scopes, mask_fields=["pin"]) as audit:
        users = audit.get_scope("users")
        with AuditLog() as log:
            log.capture(audit)
            audit.emit("captured", data={"pin": 1})
            users.emit("captured too")
            with pytest.raises(TracevaultError, match="in memory"):
                audit.query.count()
        audit.emit("stored")
        assert audit.query.count() == 1
    assert log.assert_emitted("captured").data == {"pin": "[REDACTED]"}
    log.assert_emitted("captured too", scope="users")
    assert rows(ready_dsn, "SELECT event FROM audit_logs") == [("stored",)]
    assert rows(ready_dsn, "SELECT event FROM audit_user_events") == []


def test_a_vault_that_outlives_its_test(ready_dsn: str) -> None:
    with AuditLog() as first:
        held = Tracevault(**NOWHERE)
        held.emit("one")
    with pytest.raises(TracevaultError, match="its test has ended"):
        held.emit("between")
    with AuditLog() as second:
        held.emit("two")
    assert [record.event for record in (*first.events, *second.events)] == ["one", "two"]
    with Tracevault(connection_string=ready_dsn) as real:
        real.emit("three")
        assert real.query.count() == 1


def test_threads_and_loops_share_it(audit_log: AuditLog) -> None:
    async def emit() -> None:
        await asyncio.gather(*(audit_log.async_vault.emit("many") for _ in range(50)))

    asyncio.run(emit())
    asyncio.run(emit())
    assert len(audit_log.events) == 100


# ----------------------------------------------------------------------------------------- assertions


@pytest.fixture
def emitted(audit_log: AuditLog) -> AuditLog:
    audit = audit_log.vault
    user = {"id": "1", "type": "user"}
    audit.emit(
        "doc.created", actor=user, target={"id": "7", "type": "doc"}, data={"size": 1.50, "tags": ["a", {"b": 1}]}
    )
    audit.emit(Shared("bea"), actor=user, correlation_id="c")
    audit.emit("login", meta={"at": datetime(2026, 1, 2, tzinfo=UTC), "ok": True})
    return audit_log


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        ("doc.created", {}),
        (None, {"target": "doc:7"}),
        ("doc.created", {"actor": tracevault.Actor("1", "user"), "target": {"type": "doc"}}),
        ("doc.created", {"data": {"size": Decimal("1.5")}}),
        ("doc.created", {"data": {"tags": ["a", {}]}}),
        ("doc.created", {"data": {"tags": ANY, "size": ANY}, "id": ANY, "correlation_id": None}),
        (Shared, {"correlation_id": "c"}),
        (Shared("bea"), {}),
        (Shared("bea"), {"data": {"with_": "bea"}}),
        ("login", {"actor": None, "data": None, "meta": {"at": datetime(2026, 1, 2, tzinfo=UTC), "ok": True}}),
        ("login", {"mode": "sync", "stored": "database", "scope": "default"}),
    ],
)
def test_what_was_emitted(emitted: AuditLog, event: Any, fields: dict[str, Any]) -> None:
    record = emitted.assert_emitted(event, **fields)
    assert record in emitted.events
    assert "is such an event, but was asserted before; there is no other one" in failure(
        emitted.assert_emitted, event, **fields
    )
    assert "this was emitted" in failure(emitted.assert_not_emitted, event, **fields)
    assert failure(emitted.assert_no_more).startswith("2 events more than was asserted")


@pytest.mark.parametrize(
    ("event", "fields", "differs"),
    [
        ("doc.create", {}, ["event  doc.create  doc.created"]),
        ("doc.shared", {"actor": "user:2"}, ["actor  user:2    user:1"]),
        ("doc.shared", {"actor": {"id": "2"}}, ["actor.id  '2'"]),
        ("doc.shared", {"target": "doc:7"}, ["target  doc:7     nothing"]),
        (
            "doc.shared",
            {"data": {"with_": "cid", "x": 1}},
            ["data.with_  cid       bea", "data.x      1         nothing"],
        ),
        ("doc.shared", {"correlation_id": None}, ["correlation_id  nothing   c"]),
        ("doc.created", {"data": {"tags": ["a", {"b": True}]}}, ["data.tags[1].b  True      1"]),
        ("doc.created", {"data": {"tags": ["a"]}}, ["data.tags  ['a']     ['a', {'b': 1}]"]),
        ("login", {"meta": {"ok": 1}}, ["meta.ok  1         True"]),
        ("login", {"after": {"a": 1}}, ["data.after  {'a': 1}  nothing"]),
        (Shared("cid"), {}, ["data.with_  cid       bea"]),
    ],
)
def test_what_was_not(emitted: AuditLog, event: Any, fields: dict[str, Any], differs: list[str]) -> None:
    told = failure(emitted.assert_emitted, event, **fields)
    assert "the nearest is number" in told
    for words in differs:
        assert words.replace(" ", "") in told.replace(" ", "")
    emitted.assert_not_emitted(event, **fields)


def test_the_whole_message(emitted: AuditLog) -> None:
    emitted.assert_emitted("login")
    assert failure(
        emitted.assert_emitted, "doc.shared", actor="user:2", data={"with_": "bea", "note": "hi there"}
    ) == dedent(
        """\
        no such event was emitted: doc.shared  actor=user:2  data={'with_': 'bea', 'note': 'hi there'}

        the nearest is number 2:
            field      expected    emitted
            actor      user:2      user:1
            data.note  'hi there'  nothing

        all that was emitted (+ asserted, - not):
          - 1. doc.created  actor=user:1  target=doc:7  data={'size': 1.5, 'tags': ['a', {'b': 1}]}
          - 2. doc.shared  actor=user:1  data={'with_': 'bea', 'times': 1}
          + 3. login  meta={'at': '2026-01-02T00:00:00.000Z', 'ok': True}"""
    )


def test_nothing_at_all(audit_log: AuditLog) -> None:
    audit_log.assert_no_more()
    audit_log.assert_not_emitted()
    assert failure(audit_log.assert_emitted, "x").endswith("nothing was emitted at all")
    audit_log.vault.emit("x")
    audit_log.clear()
    audit_log.assert_no_more()
    with pytest.raises(TypeError, match="`aktor` is not a field of an event; did you mean `actor`"):
        audit_log.assert_emitted("x", aktor=1)
    with pytest.raises(TypeError, match="must be an event's name or a typed event, got 5"):
        audit_log.assert_emitted(5)


# ---------------------------------------------------------------------------------------------- pytest


def pytest_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "DATABASE"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments],
        cwd=folder,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_example_runs_without_a_database() -> None:
    done = pytest_run(ROOT / "examples" / "testing")
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def test_a_failure_points_at_the_test(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        dedent(
            """
            def test_it(audit_log):
                audit_log.vault.emit("doc.shared", actor={"id": "2", "type": "user"})
                audit_log.assert_emitted("doc.shared", actor="user:1")
            """
        )
    )
    done = pytest_run(tmp_path)
    assert done.returncode == 1
    assert "test_it.py:4: AssertionError" in done.stdout
    assert "actor  user:1    user:2" in done.stdout
    assert "testing/log.py" not in done.stdout


def test_the_plugin_imports_nothing_at_first(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        dedent(
            """
            import sys

            def test_it():
                assert "pytest_tracevault" in sys.modules
                assert "tracevault" not in sys.modules
            """
        )
    )
    done = pytest_run(tmp_path)
    assert done.returncode == 0, done.stdout
