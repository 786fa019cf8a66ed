"""Reads through both vaults: pages, order, ties, refusals, and connections that die between them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.conftest import rows
from tests.faces import Face, OpenVault
from tracevault import AuditRecord, TracevaultError, ValidationError, start_tracevault

NO_DDL = {"ensure_schema": False}
START = datetime(2026, 1, 1, tzinfo=UTC)


def open_vault(face: OpenVault, dsn: str, **more: Any) -> Face:
    return face(connection_string=dsn, bootstrap=NO_DDL, **more)


def numbers(records: list[AuditRecord]) -> list[int]:
    return [(record.data or {})["n"] for record in records]


def test_pages_order_and_ties(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    # Ten moments of six events each: within one, the id decides.
    events = [
        {"event": "a", "occurred_at": START + timedelta(seconds=n // 6), "data": {"n": n}, "id": UUID(int=n)}
        for n in range(60)
    ]
    vault.emit_many(events[::-1])
    assert numbers(vault.query.find_many()) == list(range(59, 9, -1))
    assert numbers(vault.query.find_many(order="asc", limit=60)) == list(range(60))
    pages = [vault.query.find_many(limit=7, offset=offset) for offset in range(0, 63, 7)]
    assert [n for page in pages for n in numbers(page)] == list(range(59, -1, -1))
    assert vault.query.find_many(offset=60) == []
    assert vault.query.find_many(offset=2**63 - 1) == []
    assert vault.query.count() == 60
    second = START + timedelta(seconds=1)
    assert numbers(vault.query.find_many(since=second, until=second, order="asc")) == list(range(6, 12))
    assert vault.query.count(until=second - timedelta(microseconds=1)) == 6
    assert vault.query.count(since="2026-01-01T00:00:09Z") == 6
    record = vault.query.find_by_id(str(UUID(int=7)))
    assert (record.data, record.occurred_at) == ({"n": 7}, second)
    assert vault.query.find_by_id(uuid4()) is None


def test_every_filter_must_hold(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    common: dict[str, Any] = {
        "actor": {"id": "1", "type": "user"},
        "target": {"id": "2", "type": "product"},
        "correlation_id": "c",
        "request_id": "r",
        "environment": "e",
        "data": {"outcome": "failure", "severity": "error", "error": {"code": "E1"}},
    }
    mine = vault.emit("mine", **common).id
    changes: list[dict[str, Any]] = [{"actor": {"id": "x", "type": "user"}}, {"correlation_id": "x"}, {"data": {}}]
    for change in changes:
        vault.emit("mine", **{**common, **change})
    vault.emit("other", **common)
    filters: dict[str, Any] = {
        "event": "mine",
        "actor_id": "1",
        "actor_type": "user",
        "target_id": "2",
        "target_type": "product",
        "correlation_id": "c",
        "request_id": "r",
        "environment": "e",
        "mode": "sync",
        "outcome": "failure",
        "error_code": "E1",
        "severity": "error",
        "severities": ["error", "fatal"],
        "errors_only": True,
    }
    assert [record.id for record in vault.query.find_many(**filters)] == [mine]
    assert vault.query.count(**filters) == 1
    assert vault.query.count(errors_only=False) == 5
    for name in filters:
        if name not in ("mode", "severities", "errors_only"):
            assert vault.query.count(**{**filters, name: "nothing"}) == 0


def test_what_is_refused(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    for method, filters, field, says in (
        ("find_many", {"actor": "x"}, "actor", "actor_id"),
        ("find_many", {"evnt": "x"}, "evnt", "`event`"),
        ("find_many", {"actor_id": None}, "actor_id", "widen"),
        ("find_many", {"limit": None}, "limit", "None"),
        ("find_many", {"limit": 0}, "limit", "500"),
        ("find_many", {"limit": 501}, "limit", "500"),
        ("find_many", {"limit": True}, "limit", ""),
        ("find_many", {"offset": -1}, "offset", ""),
        ("find_many", {"order": "DESC"}, "order", "desc"),
        ("find_many", {"since": "2026-01-02", "until": "2026-01-01"}, "since", "until"),
        ("find_many", {"since": datetime(2026, 1, 1)}, "since", ""),
        ("find_many", {"severities": []}, "severities", "16"),
        ("find_many", {"errors_only": 1}, "errors_only", "True"),
        ("count", {"limit": 1}, "limit", "not a filter"),
        ("count", {"order": "asc"}, "order", "not a filter"),
        ("count", {"target_id": None}, "target_id", "widen"),
    ):
        with pytest.raises(ValidationError) as caught:
            getattr(vault.query, method)(**filters)
        assert caught.value.field == field
        assert says in str(caught.value)
    for id_ in (None, 1, "x", ""):
        with pytest.raises(ValidationError) as caught:
            vault.query.find_by_id(id_)
        assert caught.value.field == "id"


def test_a_dead_connection_between_reads(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    vault.emit("a")
    for read in (vault.query.count, vault.query.find_many, lambda: vault.query.find_by_id(uuid4()), vault.healthcheck):
        vault.query.count()
        rows(
            ready_dsn,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'tracevault' AND datname = current_database()",
        )
        read()  # type: ignore[no-untyped-call]
    assert vault.healthcheck()


async def test_another_event_loop(ready_dsn: str) -> None:
    async with start_tracevault(connection_string=ready_dsn, bootstrap=NO_DDL) as vault:
        await vault.emit("a")
        for read in (vault.query.count, vault.query.find_many, lambda: vault.query.find_by_id(uuid4())):

            def elsewhere(read: Any = read) -> None:
                asyncio.run(read())

            with pytest.raises(TracevaultError, match="event loop that started the vault"):
                await asyncio.to_thread(elsewhere)
        assert await vault.query.count() == 1


def test_a_session_of_other_habits(face: OpenVault, ready_dsn: str) -> None:
    """What a role or database sets for its sessions changes how PostgreSQL prints, not what we read."""
    name = conninfo_to_dict(ready_dsn)["dbname"]
    for setting in ("datestyle = 'SQL, DMY'", "timezone = 'Asia/Kathmandu'", "bytea_output = 'escape'"):
        rows(ready_dsn, f"ALTER DATABASE {name} SET {setting}")
    vault = open_vault(face, ready_dsn)
    when = datetime(2026, 2, 1, 12, 30, 0, 123456, tzinfo=UTC)
    receipt = vault.emit("a", occurred_at=when, data={"n": [1.10, 10**30, "é"]})
    record = vault.query.find_by_id(receipt.id)
    assert (record.occurred_at, record.occurred_at.tzinfo) == (when, UTC)
    assert repr(record.data) == repr({"n": [1.1, 10**30, "é"]})
    assert vault.query.count(since=when, until=when) == 1


def test_a_time_beyond_python(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    for when in ("20000-01-01 00:00:00+00", "0044-03-15 00:00:00+00 BC", "infinity", "-infinity"):
        rows(
            ready_dsn,
            f"INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'a', 'sync', '{when}')",
        )
    vault.emit("now")
    found = vault.query.find_many(order="asc")
    assert len(found) == 5
    assert {record.occurred_at for record in found if record.event == "a"} == {
        datetime.min.replace(tzinfo=UTC),
        datetime.max.replace(tzinfo=UTC),
    }


def test_a_read_that_takes_long_is_not_cut(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, timeout=0.2)
    vault.emit("a")
    with suppress(psycopg.errors.IdleInTransactionSessionTimeout), psycopg.connect(ready_dsn) as lock:
        lock.execute("LOCK TABLE audit_logs IN ACCESS EXCLUSIVE MODE")
        lock.execute("SET idle_in_transaction_session_timeout = 600")  # ends the lock
        assert vault.query.count() == 1
