"""`emit(connection=...)`: in the caller's transaction, and nothing else is run there."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import AsyncConnection
from psycopg.adapt import Dumper, Loader
from psycopg.pq import Trace, TransactionStatus
from psycopg.rows import dict_row

from tests.conftest import rows
from tests.faces import Face, OpenVault
from tracevault import DriverError, DuplicateIdError, Tracevault, ValidationError, start_tracevault

NO_DDL = {"ensure_schema": False}


def open_vault(face: OpenVault, dsn: str, **more: Any) -> Face:
    return face(connection_string=dsn, bootstrap=NO_DDL, **more)


def events(dsn: str) -> list[str]:
    return [row[0] for row in rows(dsn, "SELECT event FROM audit_logs ORDER BY ctid")]


def status(connection: Face) -> TransactionStatus:
    return TransactionStatus(connection.vault.info.transaction_status)


@pytest.mark.parametrize("autocommit", [False, True])
def test_the_event_shares_the_transactions_fate(autocommit: bool, face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, default_mode="async")
    with closing(vault.connect(ready_dsn, autocommit=autocommit)) as connection:
        for end, stored in (("ROLLBACK", []), ("COMMIT", ["one", "two", "three", *["four"] * 20])):
            if autocommit:
                connection.execute("BEGIN")
            assert vault.emit("one", connection=connection.vault).stored == "transaction"
            assert vault.emit_diff("two", after={"a": 1}, connection=connection.vault).stored == "transaction"
            batch = vault.emit_many(["three", *["four"] * 20], connection=connection.vault)
            assert {receipt.stored for receipt in batch} == {"transaction"}
            assert status(connection) == TransactionStatus.INTRANS
            assert events(ready_dsn) == []
            connection.execute(end)
            assert events(ready_dsn) == stored
        assert {row[0] for row in rows(ready_dsn, "SELECT mode FROM audit_logs")} == {"sync"}


def test_nested_transactions(ready_dsn: str) -> None:
    with (
        Tracevault(connection_string=ready_dsn, bootstrap=NO_DDL) as vault,
        psycopg.connect(ready_dsn, autocommit=True) as connection,
        connection.transaction(),
    ):
        vault.emit("a", connection=connection)
        with connection.transaction():
            vault.emit("b", connection=connection)
            raise psycopg.Rollback
        with connection.transaction():
            vault.emit("c", connection=connection)
    assert events(ready_dsn) == ["a", "c"]


async def test_nested_transactions_async(ready_dsn: str) -> None:
    async with (
        start_tracevault(connection_string=ready_dsn, bootstrap=NO_DDL) as vault,
        await AsyncConnection.connect(ready_dsn, autocommit=True) as connection,
        connection.transaction(),
    ):
        await vault.emit("a", connection=connection)
        async with connection.transaction():
            await vault.emit("b", connection=connection)
            raise psycopg.Rollback
        async with connection.transaction():
            await vault.emit("c", connection=connection)
    assert events(ready_dsn) == ["a", "c"]


def test_autocommit_outside_a_transaction(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    with closing(vault.connect(ready_dsn, autocommit=True)) as connection:
        for method, event in (("emit", "a"), ("emit_diff", "a"), ("emit_many", ["a"])):
            with pytest.raises(ValidationError, match="allow_autocommit=True") as caught:
                getattr(vault, method)(event, connection=connection.vault)
            assert caught.value.field == "connection"
        assert events(ready_dsn) == []
        assert vault.emit("b", connection=connection.vault, allow_autocommit=True).stored == "database"
        assert vault.emit("c", connection=connection.vault, allow_autocommit=True, savepoint=True).stored == "database"
        batch = vault.emit_many(["d"] * 9, connection=connection.vault, allow_autocommit=True)
        assert {receipt.stored for receipt in batch} == {"database"}
        assert events(ready_dsn) == ["b", "c", *["d"] * 9]
        taken = {"event": "e", "id": uuid4()}
        vault.emit(taken)
        for mine in ({**taken, "event": "f"}, {"event": "bad", "id": uuid4()}):
            rows(
                ready_dsn,
                "ALTER TABLE audit_logs DROP CONSTRAINT IF EXISTS fine, ADD CONSTRAINT fine CHECK (event<>'bad')",
            )
            with pytest.raises((DuplicateIdError, DriverError)):
                vault.emit_many(
                    ["g", *[{"event": "h", "id": uuid4()} for _ in range(1200)], mine],
                    connection=connection.vault,
                    allow_autocommit=True,
                )
            assert len(events(ready_dsn)) == 12  # all or none
            assert status(connection) == TransactionStatus.IDLE


def test_what_is_refused_before_anything_is_run(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    with closing(vault.connect(ready_dsn)) as connection:
        mine = connection.vault
        connection.execute("SELECT 1")
        for method, event, field in (
            ("emit", {"event": "a", "mode": "async"}, "mode"),
            ("emit_many", [{"event": "a", "mode": "async"}], "events[0].mode"),
            ("emit", {"event": "a", "data": {"x": {1}}}, "data.x"),
            ("emit_diff", {"event": "a", "before": {"x": 1j}}, "before.x"),
            ("emit_many", ["a", ""], "events[1].event"),
        ):
            with pytest.raises(ValidationError) as caught:
                getattr(vault, method)(event, connection=mine)
            assert caught.value.field == field
            assert status(connection) == TransactionStatus.INTRANS
        vault.emit("b", mode="sync", connection=mine)
        connection.commit()
        assert events(ready_dsn) == ["b"]


def test_the_wrong_kind_of_connection(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    with closing(vault.connect(ready_dsn)) as connection:
        cursor = connection.vault.cursor()
        wrong: list[Any] = [object(), "x", cursor, connection]
        with psycopg.connect(ready_dsn) as blocking:
            if vault.kind == "async":
                wrong.append(blocking)
            for thing in wrong:
                with pytest.raises(ValidationError, match="psycopg") as caught:
                    vault.emit("a", connection=thing)
                assert caught.value.field == "connection"
                assert ready_dsn not in str(caught.value)


async def test_an_async_connection_for_the_blocking_vault(ready_dsn: str) -> None:
    async with await AsyncConnection.connect(ready_dsn) as connection:
        vault = Tracevault(connection_string=ready_dsn, bootstrap=NO_DDL)
        with vault, pytest.raises(ValidationError, match=r"psycopg\.Connection"):
            vault.emit("a", connection=connection)


def test_savepoint_keeps_the_transaction_alive(face: OpenVault, ready_dsn: str) -> None:
    rows(ready_dsn, "ALTER TABLE audit_logs ADD CHECK (event <> 'bad')")
    vault = open_vault(face, ready_dsn)
    taken = {"event": "taken", "id": uuid4()}
    vault.emit(taken)
    with closing(vault.connect(ready_dsn)) as connection:
        mine = connection.vault
        vault.emit("a", connection=mine, savepoint=True)
        with pytest.raises(DuplicateIdError):
            vault.emit({**taken, "data": {}}, connection=mine, savepoint=True)
        with pytest.raises(DriverError) as caught:
            vault.emit("bad", connection=mine, savepoint=True)
        assert caught.value.sqlstate == "23514"
        for batch in (["x", "bad"], [*["x"] * 8, "bad"], ["x", {**taken, "data": {}}]):
            with pytest.raises((DuplicateIdError, DriverError)):
                vault.emit_many(batch, connection=mine, savepoint=True)
        vault.emit_many(["b"] * 9, connection=mine, savepoint=True)
        assert status(connection) == TransactionStatus.INTRANS
        connection.commit()
        assert events(ready_dsn) == ["taken", "a", *["b"] * 9]

        with pytest.raises(DriverError):
            vault.emit("bad", connection=mine)  # without it the transaction has failed
        assert status(connection) == TransactionStatus.INERROR


def test_a_taken_id_leaves_the_transaction_alive(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    taken = {"event": "taken", "id": uuid4()}
    vault.emit(taken)
    with closing(vault.connect(ready_dsn)) as connection:
        vault.emit("a", connection=connection.vault)
        vault.emit(taken, connection=connection.vault)
        with pytest.raises(DuplicateIdError):
            vault.emit({**taken, "data": {}}, connection=connection.vault)
        with pytest.raises(DuplicateIdError):
            vault.emit_many(["b", {**taken, "data": {}}], connection=connection.vault)
        connection.commit()
        assert events(ready_dsn) == ["taken", "a"]  # and nothing of the refused batch


def test_a_failed_transaction(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    with closing(vault.connect(ready_dsn)) as connection:
        with pytest.raises(psycopg.Error):
            connection.execute("SELECT 1/0")
        for savepoint in (False, True):
            with pytest.raises(DriverError, match="roll it back") as caught:
                vault.emit("a", connection=connection.vault, savepoint=savepoint)
            assert (caught.value.sqlstate, caught.value.transient) == ("25P02", False)
        connection.rollback()
        vault.emit("b", connection=connection.vault)
        connection.commit()
        assert events(ready_dsn) == ["b"]


def test_a_closed_connection(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    with closing(vault.connect(ready_dsn)) as connection:
        connection.execute("SELECT 1")
        ((pid,),) = [(connection.vault.info.backend_pid,)]
        rows(ready_dsn, f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(DriverError) as caught:
            vault.emit("a", connection=connection.vault, savepoint=True)
        assert caught.value.sqlstate in ("57P01", None)
        connection.close()
        for savepoint in (False, True):
            with pytest.raises(DriverError, match=r"closed|lost"):
                vault.emit("a", connection=connection.vault, savepoint=savepoint)
        assert events(ready_dsn) == []
        vault.emit("b")


def test_nothing_but_the_insert_is_run(face: OpenVault, ready_dsn: str, tmp_path: Path) -> None:
    vault = open_vault(face, ready_dsn)
    with closing(vault.connect(ready_dsn)) as connection:
        connection.execute("SELECT 1")
        pgconn = connection.vault.pgconn
        path = tmp_path / "trace"
        with path.open("w") as file:
            pgconn.trace(file.fileno())
            pgconn.set_trace_flags(Trace.SUPPRESS_TIMESTAMPS)
            for _ in range(10):
                vault.emit("a", connection=connection.vault)
                vault.emit_many(["a", "b"], connection=connection.vault)
            vault.emit_many(["a"] * 20, connection=connection.vault)
            pgconn.untrace()
        said = re.findall(r'^F\s+\d+\s+(?:Query|Parse|Close)\b.*?"([A-Z]\w+)', path.read_text(), re.MULTILINE)
        assert said
        assert set(said) == {"INSERT", "COPY"}
        assert said.count("COPY") == 1
        connection.rollback()


class Shout(Dumper):
    def dump(self, obj: Any) -> bytes:
        return f"{obj}!".encode()


class Lie(Loader):
    def load(self, data: Any) -> str:
        return ""


def test_the_callers_habits_do_not_matter(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    with closing(vault.connect(ready_dsn, row_factory=dict_row)) as connection:
        mine = connection.vault
        mine.cursor_factory = psycopg.AsyncClientCursor if vault.kind == "async" else psycopg.ClientCursor
        for kind in (str, int, bool, type(None)):
            mine.adapters.register_dumper(kind, Shout)
        for name in ("bool", "uuid", "int8", "text", "timestamptz"):
            mine.adapters.register_loader(name, Lie)
        event = {"event": "a", "id": uuid4(), "occurred_at": "2026-01-01", "data": {"x": [1]}}
        vault.emit(event, connection=mine)
        vault.emit(event, connection=mine)
        vault.emit_many([{**event, "id": uuid4()} for _ in range(9)], connection=mine)
        with pytest.raises(DuplicateIdError):
            vault.emit({**event, "data": {"x": [2]}}, connection=mine)
        connection.commit()
        assert {(record.event, record.data["x"][0]) for record in vault.query.find_many()} == {("a", 1)}
        assert vault.query.count() == 10
