"""What a vault says when the database refuses: which error, whose fault, what to do, and never a row."""

from __future__ import annotations

import logging
import time
import traceback
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import PoolClosed, PoolTimeout

from tests.conftest import rows
from tests.faces import Face, OpenVault
from tracevault import DriverError, DuplicateIdError, MigrationError, OutcomeUnknownError, TracevaultError
from tracevault.postgres.failures import (
    Failure,
    Place,
    failure_of,
    from_pool,
    from_psycopg,
    is_transient,
    outcome_unknown,
)

SECRET = "s3cr3t-sword"
NO_DDL = {"ensure_schema": False}


def open_vault(face: OpenVault, dsn: str, **more: Any) -> Face:
    return face(connection_string=dsn, bootstrap=NO_DDL, **more)


def told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error) + repr(error.__cause__) + repr(vars(error))


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ("ALTER TABLE audit_logs RENAME TO elsewhere", "42P01"),
        ("ALTER TABLE audit_logs RENAME span_id TO elsewhere", "42703"),
    ],
    ids=["table", "column"],
)
def test_a_table_that_is_not_as_it_should_be(change: str, state: str, face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, scopes={"default": "audit_user_events", "products": "audit_logs"})
    products = vault.get_scope("products")
    rows(ready_dsn, change)
    for call in ("emit", "emit_many"):
        event: Any = "a" if call == "emit" else ["a"] * 20
        start = time.monotonic()
        with pytest.raises(DriverError) as caught:
            getattr(products, call)(event)
        assert time.monotonic() - start < 1
        error = caught.value
        assert (type(error), error.sqlstate, error.transient) == (DriverError, state, False)
        for part in ("`products`", "`audit_logs`", "migrate", state, "emit"):
            assert part in str(error)
    with pytest.raises(DriverError, match="migrate"):
        products.query.find_many()
    vault.emit("b")


def test_a_role_without_rights(face: OpenVault, ready_dsn: str) -> None:
    name = f"role_{uuid4().hex}"
    rows(ready_dsn, f"CREATE ROLE {name} LOGIN")
    vault = open_vault(face, make_conninfo(ready_dsn, user=name))
    for call in (lambda: vault.emit("a"), lambda: vault.emit_many(["a"] * 20), vault.query.count):
        with pytest.raises(DriverError, match="INSERT") as caught:
            call()  # type: ignore[no-untyped-call]
        assert (caught.value.sqlstate, caught.value.transient) == ("42501", False)
    with pytest.raises((DriverError, MigrationError), match="permission"):
        face(connection_string=make_conninfo(ready_dsn, user=name), scopes={"default": "new_table"})


@pytest.mark.parametrize(
    ("wrong", "state", "transient", "advice"),
    [
        ({"user": "nobody_here"}, "28000", False, "connection string"),
        ({"dbname": "no_such_database"}, "3D000", False, "create it"),
        ({"host": "/no/such/folder"}, None, True, "is the server up"),
        ({"host": "127.0.0.1", "port": 1}, None, True, "is the server up"),
    ],
    ids=["role", "database", "socket", "port"],
)
def test_a_server_that_cannot_be_reached(
    wrong: dict[str, Any], state: str | None, transient: bool, advice: str, face: OpenVault, ready_dsn: str
) -> None:
    dsn = make_conninfo(ready_dsn, **wrong)
    with pytest.raises(DriverError) as at_start:
        face(connection_string=dsn)
    vault = open_vault(face, dsn, timeout=0.7)
    assert not vault.healthcheck()
    start = time.monotonic()
    with pytest.raises(DriverError) as at_emit:
        vault.emit("a")
    with pytest.raises(DriverError) as at_read:
        vault.query.count()
    assert time.monotonic() - start < 3
    for caught in (at_start, at_emit, at_read):
        error = caught.value
        assert (type(error), error.sqlstate, error.transient) == (DriverError, state, transient)
        assert advice in str(error)
        assert isinstance(error.__cause__, psycopg.Error)
    assert "scope `default`" in str(at_emit.value)


def test_a_row_is_never_quoted(face: OpenVault, ready_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """PostgreSQL's DETAIL and CONTEXT hold values; neither messages nor tracebacks nor logs may."""
    caplog.set_level(logging.DEBUG)
    rows(
        ready_dsn, f"ALTER TABLE audit_logs ADD CHECK (event <> 'check'), ADD CHECK (data->>'x' <> '{SECRET}' OR true)"
    )
    rows(ready_dsn, "CREATE UNIQUE INDEX ON audit_logs (request_id)")
    rows(ready_dsn, "ALTER TABLE audit_logs ALTER COLUMN tenant_id SET NOT NULL")
    lost: list[BaseException] = []
    vault = open_vault(face, ready_dsn, on_error=lambda error, record: lost.append(error))
    content: dict[str, Any] = {"data": {"x": SECRET}, "request_id": SECRET, "tenant_id": SECRET}
    vault.emit("first", **content)
    connection = vault.connect(ready_dsn)
    for name, state, change in (
        ("check", "23514", {"request_id": "other"}),
        ("unique", "23505", {}),
        ("null", "23502", {"tenant_id": None, "request_id": "other"}),
    ):
        event = {"event": name, **content, **change}
        plenty = [{**event, "request_id": f"{number}"} for number in range(20)]
        try:
            raise KeyError("of the caller's")
        except KeyError:  # an error raised while another is handled shows that one, and no other
            with pytest.raises(DriverError) as one:
                vault.emit(event)
        with pytest.raises(DriverError) as mine:
            vault.emit(event, connection=connection.vault, savepoint=True)
        errors: list[DriverError] = [one.value, mine.value]
        if state != "23505":
            with pytest.raises(DriverError) as many:
                vault.emit_many(plenty)
            errors.append(many.value)
        vault.emit(event, mode="async")
        with pytest.raises(TracevaultError) as undelivered:
            vault.flush()
        errors.append(lost.pop())  # type: ignore[arg-type]
        for error in errors:
            assert error.sqlstate == state
            assert state in str(error)
            assert SECRET not in told(error)
            assert isinstance(error.__cause__, psycopg.Error)
            assert error.__cause__.diag.message_detail is None
            assert error.__cause__.__context__ is None
            assert error.__context__ is None or isinstance(error.__context__, (KeyError, psycopg.Error))
        assert SECRET not in told(undelivered.value)
    connection.close()
    ours = [record for record in caplog.records if record.name.startswith("tracevault")]
    assert SECRET not in "".join(record.getMessage() for record in ours)


# --- the rules, on errors made by hand ----------------------------------------------------------------------

PLACE = Place("emit", "default", "audit_logs")


def ours(kind: type[psycopg.Error], text: str = "text") -> DriverError:
    return from_psycopg(kind(text), PLACE)


def test_where_it_happened() -> None:
    assert str(Place("starting")) == "starting"
    assert str(PLACE) == "emit (scope `default`, table `audit_logs`)"


@pytest.mark.parametrize(
    ("state", "transient"),
    [
        *[(state, True) for state in ("08006", "53300", "57P01", "57014", "58030", "40001", "40P01", "55P03", "25006")],
        *[(state, False) for state in ("42P01", "42501", "23505", "22001", "28P01", "3D000", "XX000", None)],
    ],
)
def test_which_are_transient(state: str | None, transient: bool) -> None:
    assert is_transient(state) is transient


def test_whose_fault_it_is() -> None:
    errors = psycopg.errors
    refused: tuple[type[psycopg.Error], ...] = (
        errors.CheckViolation,
        errors.UniqueViolation,
        errors.StringDataRightTruncation,
        errors.RaiseException,
        psycopg.DataError,  # psycopg itself cannot say it to the server
    )
    others: dict[type[psycopg.Error], Failure] = {
        errors.UndefinedTable: Failure.OPERATOR,
        errors.UndefinedColumn: Failure.OPERATOR,
        errors.DatatypeMismatch: Failure.OPERATOR,
        errors.InsufficientPrivilege: Failure.OPERATOR,
        errors.InvalidPassword: Failure.OPERATOR,
        errors.InvalidCatalogName: Failure.OPERATOR,
        errors.InvalidSchemaName: Failure.OPERATOR,
        errors.QueryCanceled: Failure.SLOW,
        errors.InvalidSqlStatementName: Failure.SESSION,
        errors.DuplicatePreparedStatement: Failure.SESSION,
        errors.InFailedSqlTransaction: Failure.SESSION,
        errors.AdminShutdown: Failure.TRANSIENT,
        errors.DiskFull: Failure.TRANSIENT,
        errors.ReadOnlySqlTransaction: Failure.TRANSIENT,
        errors.LockNotAvailable: Failure.TRANSIENT,
        errors.InternalError_: Failure.TRANSIENT,
        psycopg.OperationalError: Failure.TRANSIENT,
        psycopg.InterfaceError: Failure.TRANSIENT,
        psycopg.InternalError: Failure.TRANSIENT,
    }
    assert all(failure_of(ours(kind)) is Failure.REFUSED for kind in refused)
    assert {kind: failure_of(ours(kind)) for kind in others} == others
    assert failure_of(DuplicateIdError("taken", id=uuid4())) is Failure.REFUSED
    assert failure_of(DriverError("found by us: the id is taken", sqlstate="42501")) is Failure.REFUSED
    assert failure_of(DriverError("found by us: a trigger keeps it out")) is Failure.REFUSED
    assert failure_of(DriverError("no thread, no memory", transient=True)) is Failure.TRANSIENT
    # No partition for it is the operator's to mend, and the record waits for that.
    missing = ours(errors.CheckViolation, 'no partition of relation "audit_logs" found for row')
    assert failure_of(missing) is Failure.OPERATOR
    # And of what is no error of a write, no record is to blame.
    assert failure_of(TracevaultError("closed")) is Failure.TRANSIENT
    assert failure_of(ValueError()) is Failure.TRANSIENT


def test_a_long_message_is_cut() -> None:
    assert len(str(ours(psycopg.OperationalError, "x" * 10_000))) < 600


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ('FATAL:  password authentication failed for user "u"', "28P01"),
        ('FATAL:  role "u" does not exist', "28000"),
        ('FATAL:  no pg_hba.conf entry for host "h"', "28000"),
        ('FATAL:  database "d" does not exist', "3D000"),
        ("FATAL:  sorry, too many clients already", "53300"),
        ("FATAL:  the database system is starting up", "57P03"),
        ("connection refused", None),
    ],
)
def test_why_a_connection_failed(text: str, state: str | None) -> None:
    error = ours(psycopg.OperationalError, f'connection to server at "h", port 5432 failed: {text}')
    assert error.sqlstate == state
    assert error.transient is (state in (None, "53300", "57P03"))


def test_an_unknown_outcome_keeps_its_cause() -> None:
    id_ = uuid4()
    error = outcome_unknown(ours(psycopg.errors.AdminShutdown), id_, PLACE)
    assert isinstance(error, OutcomeUnknownError)
    assert (error.id, error.sqlstate, error.transient) == (id_, "57P01", True)
    assert isinstance(error.__cause__, psycopg.errors.AdminShutdown)
    assert f"id='{id_}'" in str(error)


def test_why_a_pool_gave_no_connection() -> None:
    closed = from_pool(PoolClosed("x"), PLACE, None, 5)
    assert type(closed) is TracevaultError
    assert "closed" in str(closed)
    busy = from_pool(PoolTimeout("x"), PLACE, None, 5)
    assert isinstance(busy, DriverError)
    assert busy.transient
    assert "5 s" in str(busy)
    refused = from_pool(PoolTimeout("x"), PLACE, psycopg.OperationalError('role "u" does not exist'), 5)
    assert isinstance(refused, DriverError)
    assert refused.sqlstate == "28000"
    odd = from_pool(PoolTimeout("x"), PLACE, LookupError(SECRET), 5)
    assert "LookupError" in str(odd)
    assert SECRET not in told(odd)
    told_by_us = from_pool(PoolTimeout("x"), PLACE, TracevaultError("`writer_connect` is wrong"), 5)
    assert "`writer_connect` is wrong" in str(told_by_us)
