"""Both vaults at their public surface: emit, scopes, ids, batches, and that no secret shows."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from psycopg.conninfo import make_conninfo

from tests.conftest import rows
from tests.faces import OpenVault
from tracevault import (
    ConfigError,
    DriverError,
    DuplicateIdError,
    Tracevault,
    TracevaultError,
    ValidationError,
    start_tracevault,
)

SECRET = "s3cr3t-sword"
SCOPES = {"default": "audit_logs", "users": {"table_name": "audit_user_events"}}
NO_DDL = {"ensure_schema": False}


def ready(dsn: str, **more: Any) -> dict[str, Any]:
    return {"connection_string": dsn, "scopes": SCOPES, "bootstrap": NO_DDL, **more}


def role(dsn: str, *grants: str, attributes: str = "LOGIN") -> str:
    """Conninfo of a new role that may do this much."""
    name = f"role_{uuid4().hex}"
    rows(dsn, f"CREATE ROLE {name} {attributes}")
    for grant in grants:
        rows(dsn, f"GRANT {grant} TO {name}")
    return make_conninfo(dsn, user=name)


def ids(dsn: str, table: str = "audit_logs") -> list[UUID]:
    return [row[0] for row in rows(dsn, f"SELECT id FROM {table} ORDER BY occurred_at, id")]


# --- emit and scopes ----------------------------------------------------------------------------------------


def test_emit_returns_after_the_commit(face: OpenVault, dsn: str) -> None:
    vault = face(connection_string=dsn)
    receipt = vault.emit("user.created", data={"n": 1})
    assert receipt.stored == "database"
    assert rows(dsn, "SELECT id, event, mode, data FROM audit_logs") == [(receipt.id, "user.created", "sync", {"n": 1})]
    diff = vault.emit_diff({"event": "user.changed", "before": {"a": 1}, "after": {"a": 2}})
    assert vault.query.find_by_id(diff.id).data["after"] == {"a": 2}


def test_a_receipt_of_async_mode(face: OpenVault, ready_dsn: str) -> None:
    vault = face(**ready(ready_dsn, default_mode="async"))
    receipt = vault.emit("a")
    assert receipt.stored == "memory"
    vault.flush()
    assert rows(ready_dsn, "SELECT id, mode FROM audit_logs") == [(receipt.id, "async")]
    assert vault.emit("b", mode="sync").stored == "database"


def test_scopes_have_their_own_tables(face: OpenVault, dsn: str) -> None:
    vault = face(connection_string=dsn, scopes=SCOPES, default_scope="users")
    mine, other = vault.emit("a"), vault.get_scope("default").emit("b", mode="async")
    vault.get_scope("default").flush()
    assert (ids(dsn, "audit_user_events"), ids(dsn)) == ([mine.id], [other.id])
    assert vault.get_scope("default").query.count() == 1
    assert vault.get_scope("users").vault is vault.vault
    assert vault.get_scope("default").vault is vault.get_scope("default").vault


def test_an_unknown_scope_names_the_nearest(face: OpenVault, ready_dsn: str) -> None:
    vault = face(**ready(ready_dsn))
    with pytest.raises(ConfigError, match="users") as caught:
        vault.get_scope("user")
    assert "`user`" in str(caught.value)


def test_writes_and_reads_use_their_own_roles(face: OpenVault, ready_dsn: str) -> None:
    writer = role(ready_dsn, "INSERT ON audit_logs")
    reader = role(ready_dsn, "SELECT ON audit_logs")
    vault = face(**ready(writer, read_connection_string=reader))
    receipt = vault.emit("a")
    later = vault.emit("b", mode="async")
    vault.flush()
    assert [record.id for record in vault.query.find_many(order="asc")] == [receipt.id, later.id]
    assert vault.healthcheck()

    swapped = face(**ready(reader, read_connection_string=writer, on_error=print))
    calls: list[Callable[[], object]] = [
        lambda: swapped.emit("c"),
        lambda: swapped.emit_many(["c"] * 10),
        swapped.query.count,
    ]
    for emit in calls:
        with pytest.raises(DriverError) as caught:
            emit()
        assert caught.value.sqlstate == "42501"
    assert len(ids(ready_dsn)) == 2


def test_what_means_nothing_without_a_connection(face: OpenVault, ready_dsn: str) -> None:
    vault = face(**ready(ready_dsn))
    for name in ("allow_autocommit", "savepoint"):
        for method, event in (("emit", "a"), ("emit_diff", "a"), ("emit_many", ["a"])):
            with pytest.raises(ValidationError) as caught:
                getattr(vault, method)(event, **{name: True})
            assert caught.value.field == name
    assert ids(ready_dsn) == []


def test_a_wrong_timeout(face: OpenVault, ready_dsn: str) -> None:
    vault = face(**ready(ready_dsn))
    for timeout in (-1, float("nan"), "1", True):
        for call in (vault.flush, vault.close):
            with pytest.raises(ValidationError, match="seconds") as caught:
                call(timeout=timeout)
            assert caught.value.field == "timeout"
    vault.flush(timeout=float("inf"))
    assert vault.healthcheck()
    vault.close(timeout=0)


# --- ids of the caller --------------------------------------------------------------------------------------


def test_the_same_event_twice_is_stored_once(face: OpenVault, ready_dsn: str) -> None:
    lost: list[Any] = []
    vault = face(**ready(ready_dsn, mask_fields=["pin"], on_error=lambda *args: lost.append(args)))
    content = {"event": "a", "data": {"x": [1.50, None, {"pin": 1}]}, "actor": {"id": "é", "type": "u"}}
    for when in ({}, {"occurred_at": "2026-01-02T03:04:05.678901+02:00"}):
        for mode, again in product(("sync", "async"), repeat=2):
            event: dict[str, Any] = {**content, **when, "id": str(uuid4())}
            for how in (mode, again, again):
                assert vault.emit({**event, "mode": how}).id == UUID(event["id"])
                vault.flush()
            assert vault.emit_many([event, {"event": "other"}])[0].id == UUID(event["id"])
    assert (len(ids(ready_dsn)), lost) == (2 * 8, [])


@pytest.mark.parametrize("change", [{"event": "b"}, {"data": {"x": 2}}, {"actor": None}, {"occurred_at": "2026-01-01"}])
def test_another_event_under_a_taken_id(change: dict[str, Any], face: OpenVault, ready_dsn: str) -> None:
    lost: list[Any] = []
    vault = face(**ready(ready_dsn, on_error=lambda *args: lost.append(args)))
    event = {"event": "a", "id": uuid4(), "data": {"x": 1}, "actor": {"id": "i", "type": "t"}}
    vault.emit(event)
    calls: list[Callable[[], object]] = [
        lambda: vault.emit({**event, **change}),
        lambda: vault.emit_many([{**event, **change}]),
        lambda: vault.emit_many(["fine", {**event, **change}, *["fine"] * 10]),
    ]
    for call in calls:
        with pytest.raises(DuplicateIdError, match=str(event["id"])) as caught:
            call()
        assert caught.value.id == event["id"]
    vault.emit({**event, **change}, mode="async")
    with pytest.raises(TracevaultError):
        vault.flush()
    ((error, record),) = lost
    assert isinstance(error, DuplicateIdError)
    assert record.id == event["id"]
    assert ids(ready_dsn) == [event["id"]]  # and none of the neighbours in a batch


def test_the_same_id_twice_in_a_batch(face: OpenVault, ready_dsn: str) -> None:
    vault = face(**ready(ready_dsn))
    event = {"event": "a", "id": uuid4()}
    first, second = vault.emit_many([event, dict(event)])
    assert first == second
    assert ids(ready_dsn) == [event["id"]]
    other = {"event": "a", "id": uuid4()}
    with pytest.raises(DuplicateIdError):
        vault.emit_many([other, *["fine"] * 8, {**other, "data": {}}])
    assert ids(ready_dsn) == [event["id"]]


def test_a_retry_by_a_role_that_may_not_read_and_has_no_function(face: OpenVault, ready_dsn: str) -> None:
    lost: list[Any] = []
    writer = role(ready_dsn, "INSERT ON audit_logs")
    rows(ready_dsn, "DROP FUNCTION audit_logs_compare")
    vault = face(**ready(writer, on_error=lambda *args: lost.append(args)))
    event = {"event": "a", "id": uuid4()}
    vault.emit(event)
    for method, again in (("emit", event), ("emit_many", [event, "b"])):
        with pytest.raises(DriverError, match="run `tracevault migrate --table audit_logs`") as caught:
            getattr(vault, method)(again)
        assert (caught.value.sqlstate, caught.value.transient) == ("42501", False)
    vault.emit(event, mode="async")
    vault.emit("c", mode="async")  # it must not wait for ever behind the other
    with pytest.raises(TracevaultError):
        vault.flush()
    ((error, record),) = lost
    assert (error.sqlstate, record.id) == ("42501", event["id"])
    assert rows(ready_dsn, "SELECT event FROM audit_logs ORDER BY ctid") == [("a",), ("c",)]


# --- batches ------------------------------------------------------------------------------------------------


def test_batches_in_order(face: OpenVault, ready_dsn: str) -> None:
    vault = face(**ready(ready_dsn, default_mode="async"))
    for count in (0, 1, 7, 8, 5000):
        receipts = vault.emit_many({"event": f"{count}", "data": {"n": n}} for n in range(count))
        assert all(receipt.stored == "database" for receipt in receipts)
        stored = rows(ready_dsn, f"SELECT id, mode FROM audit_logs WHERE event = '{count}' ORDER BY (data->>'n')::int")
        assert stored == [(receipt.id, "sync") for receipt in receipts]


def test_a_batch_with_ids_longer_than_a_statement(face: OpenVault, ready_dsn: str) -> None:
    vault = face(**ready(ready_dsn))
    events = [{"event": "a", "id": uuid4()} for _ in range(1500)]
    assert [receipt.id for receipt in vault.emit_many(events)] == [event["id"] for event in events]
    vault.emit_many(events)
    with pytest.raises(DuplicateIdError):
        vault.emit_many([*[{"event": "a", "id": uuid4()} for _ in range(1500)], {**events[0], "event": "b"}])
    assert len(ids(ready_dsn)) == 1500


def test_a_refused_row_refuses_the_batch(face: OpenVault, ready_dsn: str) -> None:
    rows(ready_dsn, "ALTER TABLE audit_logs ADD CHECK (event <> 'bad')")
    vault = face(**ready(ready_dsn))
    for size, with_ids in product((1, 8, 1500), (False, True)):
        events: list[Any] = [{"event": "good", "id": uuid4()} if with_ids else "good" for _ in range(size)]
        with pytest.raises(DriverError) as caught:
            vault.emit_many([*events, "bad"])
        assert (caught.value.sqlstate, caught.value.transient) == ("23514", False)
        assert ids(ready_dsn) == []
        assert len(vault.emit_many(events)) == size
        rows(ready_dsn, "TRUNCATE audit_logs")


def test_an_invalid_event_in_a_batch(face: OpenVault, ready_dsn: str) -> None:
    vault = face(**ready(ready_dsn))
    batch: list[Any] = ["a"] * 9
    batch[7] = {"event": "b", "data": {"x": float("nan")}}
    for invalid, field in (
        (batch, "events[7].data.x"),
        (["a", {"event": "b", "mode": "async"}], "events[1].mode"),
        (["a", 5], "events[1]"),
        ("a", "events"),
        ({"event": "a"}, "events"),
        (None, "events"),
        (5, "events"),
    ):
        with pytest.raises(ValidationError) as caught:
            vault.emit_many(invalid)
        assert caught.value.field in (field, f"{field}.event")
        assert field.split(".")[0] in str(caught.value)
    assert ids(ready_dsn) == []


def test_an_invalid_event_late_in_a_large_batch(face: OpenVault, ready_dsn: str) -> None:
    """By then the first ones are with the server already; none of them is stored, and the vault goes on."""
    vault = face(**ready(ready_dsn))
    batch: list[Any] = [{"event": "e", "data": {"n": number}} for number in range(5000)]
    batch[4321] = {"event": "e", "data": {"n": float("nan")}}
    with pytest.raises(ValidationError) as caught:
        vault.emit_many(batch)
    assert caught.value.field == "events[4321].data.n"
    assert vault.query.count() == 0
    batch[4321] = "f"
    receipts = vault.emit_many(batch)
    assert [receipt.id for receipt in receipts] == ids(ready_dsn)
    assert vault.query.count(event="f") == 1


def test_a_generator_that_fails(face: OpenVault, ready_dsn: str) -> None:
    def events() -> Iterator[str]:
        yield "a"
        raise LookupError

    vault = face(**ready(ready_dsn))
    with pytest.raises(LookupError):
        vault.emit_many(events())
    assert ids(ready_dsn) == []
    vault.emit("b")


def test_a_unique_index_of_the_users_own(face: OpenVault, ready_dsn: str) -> None:
    """A row that conflicts by another index than the id's is refused, never left out."""
    rows(ready_dsn, "CREATE UNIQUE INDEX ON audit_logs (request_id)")
    lost: list[Any] = []
    vault = face(**ready(ready_dsn, on_error=lambda *args: lost.append(args)))
    vault.emit("a", request_id="r")
    calls: list[Callable[[], object]] = [
        lambda: vault.emit("b", request_id="r"),
        lambda: vault.emit_many(["c", {"event": "d", "request_id": "r"}]),
        lambda: vault.emit_many([*["c"] * 8, {"event": "d", "request_id": "r"}]),
        lambda: vault.emit("e", request_id="r", id=uuid4()),
        lambda: vault.emit_many(["c", {"event": "d", "request_id": "r", "id": uuid4()}]),
        lambda: vault.emit_many([{"event": "c", "id": uuid4()}, {"event": "d", "request_id": "r"}]),
    ]
    for call in calls:
        with pytest.raises(DriverError) as caught:
            call()
        assert caught.value.sqlstate == "23505"
    for event in ("e", "f"):
        vault.emit(event, mode="async", request_id="r")
    vault.emit("g", mode="async")
    with pytest.raises(TracevaultError):
        vault.flush()
    assert [record.event for _, record in lost] == ["e", "f"]
    assert [row[0] for row in rows(ready_dsn, "SELECT event FROM audit_logs ORDER BY id")] == ["a", "g"]


def test_a_trigger_that_keeps_rows_out(face: OpenVault, ready_dsn: str) -> None:
    """A row that a trigger passes over is not stored, and must not be called stored."""
    rows(
        ready_dsn,
        "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF NEW.event = 'skip' THEN RETURN NULL; END IF; RETURN NEW; END $$",
    )
    rows(ready_dsn, "CREATE TRIGGER skip BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION skip()")
    vault = face(**ready(ready_dsn))
    vault.emit("a")
    for method, event in (
        ("emit", "skip"),
        ("emit", {"event": "skip", "id": uuid4()}),
        ("emit_many", ["b", "skip"]),
        ("emit_many", [*["b"] * 8, "skip"]),
        ("emit_many", ["b", {"event": "skip", "id": uuid4()}]),
    ):
        with pytest.raises(DriverError, match="trigger"):
            getattr(vault, method)(event)


# --- opening and closing ------------------------------------------------------------------------------------


def test_a_context_manager(dsn: str) -> None:
    with Tracevault(connection_string=dsn) as vault:
        vault.emit("a", mode="async")
    assert len(ids(dsn)) == 1
    with pytest.raises(TracevaultError, match="closed"):
        vault.emit("b")
    with pytest.raises(KeyError), Tracevault(connection_string=dsn) as vault:
        raise KeyError
    assert not vault.healthcheck()


async def test_await_and_async_with(dsn: str) -> None:
    awaited = await start_tracevault(connection_string=dsn)
    await awaited.emit("a")
    await awaited.close()
    async with start_tracevault(connection_string=dsn) as entered:
        await entered.emit("b", mode="async")
    async with await start_tracevault(connection_string=dsn) as both:
        assert await both.query.count() == 2
    with pytest.raises(TracevaultError, match="closed"):
        await both
    assert not await both.healthcheck()


async def test_an_async_vault_that_is_not_started(dsn: str) -> None:
    vault = start_tracevault(connection_string=dsn)
    scope = vault.get_scope("default")
    for call in (
        scope.emit("a"),
        scope.emit("a", mode="async"),
        scope.emit_many(["a"]),
        vault.flush(),
        vault.query.count(),
        vault.emit("a", connection=object()),
    ):
        with pytest.raises(TracevaultError, match="not started"):
            await call
    assert not await vault.healthcheck()
    assert "new" in repr(vault)
    await vault.close()
    with pytest.raises(TracevaultError, match="closed"):
        await vault


def test_after_close(face: OpenVault, ready_dsn: str) -> None:
    vault = face(**ready(ready_dsn))
    scope = vault.get_scope("users")
    connection = vault.connect(ready_dsn)
    vault.close()
    vault.close()
    calls: list[Callable[[], object]] = [
        lambda: vault.emit("a"),
        lambda: scope.emit("a", mode="async"),
        lambda: vault.emit_diff("a"),
        lambda: vault.emit_many([]),
        lambda: vault.emit("a", connection=connection.vault),
        vault.flush,
        vault.query.count,
        lambda: scope.query.find_by_id(uuid4()),
    ]
    for call in calls:
        with pytest.raises(TracevaultError, match="closed"):
            call()
    connection.close()
    assert vault.healthcheck() is False
    assert "closed" in repr(vault.vault)
    assert ids(ready_dsn) == ids(ready_dsn, "audit_user_events") == []


# --- secrets ------------------------------------------------------------------------------------------------


def told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))


UNPARSABLE = (
    f"postgresql://user:{SECRET}@[::1/db",
    f"postgresql://user:%zz{SECRET}@host/db",
    f"host=localhost password '{SECRET}'",
    f"host=localhost password='{SECRET}",
    f"{SECRET}",
    f"postgresql://user:pw@host/db?{SECRET}",
    f"postgresql://user:pw@host/db?{SECRET}=1",
    # libpq takes these apart in other places than their author meant.
    f"postgresql://user:a/{SECRET}@127.0.0.1/db",
    f"postgresql://user:{SECRET}/a@127.0.0.1/db",
    f"postgresql://user:a@{SECRET}@127.0.0.1/db",
    f"postgresql://user:{SECRET}@@127.0.0.1/db",
)


@pytest.mark.parametrize("option", ["connection_string", "read_connection_string"])
def test_an_unparsable_connection_string(option: str, face: OpenVault, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    for unparsable in UNPARSABLE:
        with pytest.raises(ConfigError, match="percent-encoded") as caught:
            face(**{**ready("dbname=any"), option: unparsable})
        assert caught.value.field == option
        assert SECRET not in told(caught.value) + caplog.text


def test_no_password_in_errors(face: OpenVault, ready_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    nobody = role(ready_dsn, attributes="NOLOGIN")
    for wrong, state in (
        ({"user": "nobody_here"}, "28000"),
        ({"user": nobody.split("user=")[1].split()[0]}, "28000"),
        ({"dbname": "no_such_database"}, "3D000"),
        ({"host": "127.0.0.1", "port": 1}, None),
        ({"host": "/no/such/socket"}, None),
        ({"host": "no-such-host.invalid"}, None),
        ({"sslmode": "verify-full", "sslrootcert": "/no/such/file", "host": "127.0.0.1"}, None),
    ):
        dsn = make_conninfo(ready_dsn, password=SECRET, **wrong)
        for bootstrap in ({}, {"bootstrap": NO_DDL}):
            with pytest.raises(DriverError) as caught:
                face(connection_string=dsn, timeout=0.2, **bootstrap).emit("a")
            assert caught.value.sqlstate == state
            assert SECRET not in told(caught.value)
    assert SECRET not in caplog.text


def test_a_wrong_password(face: OpenVault, ready_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    dsn = role(ready_dsn, "INSERT ON audit_logs", attributes="LOGIN PASSWORD 'right'")
    ((path,),) = rows(ready_dsn, "SHOW hba_file")
    hba = Path(path)
    before = hba.read_text()
    name = dsn.split("user=")[1].split()[0]
    hba.write_text(f"local all {name} scram-sha-256\n{before}")
    try:
        rows(ready_dsn, "SELECT pg_reload_conf(), pg_sleep(0.1)")
        face(**ready(make_conninfo(dsn, password="right"))).emit("a")
        for wrong in (make_conninfo(dsn, password=SECRET), dsn):
            vault = face(**ready(wrong, timeout=0.5, on_error=print))
            with pytest.raises(DriverError, match="correct the connection string") as caught:
                vault.emit("b")
            assert (caught.value.sqlstate, caught.value.transient) == ("28P01", False)
            assert SECRET not in told(caught.value)
            vault.emit("c", mode="async")
            with pytest.raises(TracevaultError) as undelivered:
                vault.close(timeout=0.1)
            assert SECRET not in told(undelivered.value)
    finally:
        hba.write_text(before)
        rows(ready_dsn, "SELECT pg_reload_conf()")
    assert SECRET not in caplog.text


def test_no_password_in_a_repr(face: OpenVault, ready_dsn: str) -> None:
    dsn = make_conninfo(ready_dsn, password=SECRET)
    vault = face(**ready(dsn, read_connection_string=dsn))
    scope = vault.get_scope("users").vault
    for thing in (vault.vault, scope, vault.query.vault, vault.vault._engine, vault.vault._engine.config):
        assert SECRET not in repr(thing) + str(thing)
    assert "default" in repr(vault.vault)
    assert "open" in repr(vault.vault)


async def test_a_vault_is_started_once(ready_dsn: str) -> None:
    vault = start_tracevault(**ready(ready_dsn))

    async def start() -> object:
        return await vault

    results = await asyncio.gather(start(), start(), return_exceptions=True)
    assert [isinstance(result, TracevaultError) for result in results] == [False, True]
    async with vault:
        await vault.emit("a")


async def test_closed_while_it_starts(ready_dsn: str) -> None:
    vault = start_tracevault(**ready(ready_dsn))

    async def start() -> object:
        return await vault

    starting = asyncio.create_task(start())
    await asyncio.sleep(0)
    await vault.close()
    with pytest.raises(TracevaultError, match="closed while"):
        await starting
    assert not await vault.healthcheck()
    assert rows(ready_dsn, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tracevault'") == [(0,)]


async def test_a_failed_start_can_be_repeated(ready_dsn: str) -> None:
    rows(ready_dsn, "ALTER TABLE audit_logs RENAME COLUMN event TO evt")
    vault = start_tracevault(connection_string=ready_dsn)
    with pytest.raises(TracevaultError):
        await vault
    rows(ready_dsn, "ALTER TABLE audit_logs RENAME COLUMN evt TO event")
    async with vault:
        await vault.emit("a")
