"""Retries by roles that may not read: what they are told, and what nobody can make of the function that tells it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.conftest import rows
from tests.faces import OpenVault
from tests.test_ddl import in_schema
from tests.test_state import plan_of
from tracevault import DriverError, DuplicateIdError, MigrationError, generate_init_sql
from tracevault.postgres.schema import migrate, migration_plan
from tracevault.schema.comparison import ARGUMENTS, CONTENT, call, function_name

NO_DDL = {"ensure_schema": False}
CALL = call("public", "audit_logs")
EVENT: dict[str, Any] = {
    "event": "a",
    "data": {"x": [1.50, None, {"é": 10**30}]},
    "actor": {"id": "é", "type": "u"},
    "target": {"id": "t", "type": "u"},
    "meta": {"m": 1},
    "correlation_id": "c",
    "request_id": "r",
    "environment": "e",
    "tenant_id": "t",
    "trace_id": "0" * 31 + "1",
    "span_id": "0" * 15 + "1",
}


@pytest.fixture
def roles(server: str, ready_dsn: str) -> Iterator[dict[str, str]]:
    """Names of new roles: a writer with INSERT alone, an owner of tables, and one with no right at all."""
    names = {kind: f"{kind}_{uuid4().hex[:8]}" for kind in ("writer", "owner", "nobody")}
    for name in names.values():
        rows(ready_dsn, f"CREATE ROLE {name} LOGIN")
    rows(ready_dsn, f"GRANT INSERT ON audit_logs TO {names['writer']}")
    yield names
    for name in names.values():
        rows(ready_dsn, f"DROP OWNED BY {name} CASCADE")
        rows(ready_dsn, f"DROP ROLE {name}")


def given(**values: Any) -> tuple[Any, ...]:
    """Arguments of the function."""
    return tuple(values.get(name, False if kind == "boolean" else None) for name, kind in ARGUMENTS)


def ask(connection: psycopg.Connection[Any], sql: str = CALL, **values: Any) -> Any:
    (row,) = psycopg.RawCursor(connection).execute(f"SELECT {sql}".encode(), given(**values)).fetchall()
    return row[0]


def store(dsn: str) -> UUID:
    """Store an event and return its id."""
    query = "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'a', 'sync', now())"
    return rows(dsn, f"{query} RETURNING id")[0][0]  # type: ignore[no-any-return]


def test_names() -> None:
    assert function_name("audit_logs") == "audit_logs_compare"
    tables = [*("a" * length for length in range(1, 64)), "a" * 62 + "b", "A" * 63, "A" * 10]
    names = {function_name(table) for table in tables}
    assert len(names) == len(tables)
    assert max(map(len, names)) == 63


@pytest.mark.parametrize("timed", [False, True])
def test_a_retry_by_a_role_that_may_not_read(
    face: OpenVault, ready_dsn: str, roles: dict[str, str], timed: bool
) -> None:
    lost: list[Any] = []
    writer = make_conninfo(ready_dsn, user=roles["writer"])
    vault = face(connection_string=writer, bootstrap=NO_DDL, on_error=lambda *args: lost.append(args))
    event = {**EVENT, "id": uuid4()} | ({"occurred_at": "2026-01-02T03:04:05.678901+02:00"} if timed else {})
    vault.emit(event)
    vault.emit(event)
    vault.emit_many([event, "b"])
    vault.emit(event, mode="async")
    vault.flush()
    others = {
        **dict.fromkeys(("event", "correlation_id", "request_id", "environment", "tenant_id"), "other"),
        **{name: {"id": "o", "type": "u"} for name in ("actor", "target")},
        **{name: {"x": 2} for name in ("data", "meta")},
        "trace_id": "1" * 32,
        "span_id": "1" * 16,
        "occurred_at": "2026-01-02T03:04:05Z",
    }
    assert len(others) == len(CONTENT) - 2 + 1  # two identities of two columns each, and the time
    for name, other in others.items():
        for changed in (other, *([] if name in {"event", "occurred_at"} else [None])):
            with pytest.raises(DuplicateIdError):
                vault.emit({**event, name: changed})
    assert (rows(ready_dsn, "SELECT count(*) FROM audit_logs"), lost) == ([(2,)], [])
    rows(ready_dsn, "CREATE UNIQUE INDEX ON audit_logs (span_id)")
    with pytest.raises(DriverError) as caught:  # the function says absent: another index is in the way
        vault.emit({**event, "id": uuid4()})
    assert caught.value.sqlstate == "23505"


@pytest.mark.parametrize("reads", [False, True])
def test_a_retry_in_a_partitioned_table(face: OpenVault, ready_dsn: str, roles: dict[str, str], reads: bool) -> None:
    rows(
        ready_dsn,
        "ALTER TABLE audit_logs RENAME TO template;"
        "CREATE TABLE audit_logs (LIKE template INCLUDING DEFAULTS INCLUDING GENERATED, PRIMARY KEY (occurred_at, id))"
        "PARTITION BY RANGE (occurred_at);"
        "CREATE TABLE audit_2026 PARTITION OF audit_logs FOR VALUES FROM ('2026-01-01Z') TO ('2027-01-01Z');"
        "CREATE TABLE audit_rest PARTITION OF audit_logs DEFAULT;"
        f"GRANT INSERT {', SELECT' if reads else ''} ON audit_logs TO {roles['writer']}",
    )
    vault = face(connection_string=make_conninfo(ready_dsn, user=roles["writer"]), bootstrap=NO_DDL)
    event = {**EVENT, "id": uuid4(), "occurred_at": "2026-05-01T00:00Z"}
    for _ in range(2):
        vault.emit(event)
        vault.emit({**event, "occurred_at": "2031-05-01T00:00Z", "event": "b"})  # another key
    with pytest.raises(DuplicateIdError):
        vault.emit({**event, "event": "b"})
    assert rows(ready_dsn, "SELECT count(*) FROM audit_logs") == [(2,)]


# --- who may ask --------------------------------------------------------------------------------------------


def test_who_is_answered(ready_dsn: str, roles: dict[str, str]) -> None:
    id_ = store(ready_dsn)
    with psycopg.connect(make_conninfo(ready_dsn, user=roles["writer"]), autocommit=True) as writer:
        answers = [ask(writer, id=id_, event="a"), ask(writer, id=id_, event="b"), ask(writer, id=uuid4(), event="a")]
        assert answers == ["same", "different", "absent"]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            writer.execute("SELECT FROM audit_logs")
    for user in (roles["nobody"], psycopg.conninfo.conninfo_to_dict(ready_dsn)["user"]):
        with (
            psycopg.connect(make_conninfo(ready_dsn, user=str(user)), autocommit=True) as other,
            pytest.raises(psycopg.errors.InsufficientPrivilege, match="may INSERT into its table and not SELECT"),
        ):
            ask(other, id=id_, event="a")


def test_after_set_role_the_new_role_counts(ready_dsn: str, roles: dict[str, str]) -> None:
    id_ = store(ready_dsn)
    writer, nobody = roles["writer"], roles["nobody"]
    with psycopg.connect(ready_dsn, autocommit=True) as superuser:
        superuser.execute(f"SET ROLE {writer}".encode())
        assert ask(superuser, id=id_, event="a") == "same"
        superuser.execute(f"SET ROLE {nobody}".encode())
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ask(superuser, id=id_, event="a")
    with psycopg.connect(make_conninfo(ready_dsn, user=nobody), autocommit=True) as other:
        for attempt in (f"SET ROLE {writer}", f"SELECT set_config('role', '{writer}', false)"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                other.execute(attempt.encode())
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ask(other, id=id_, event="a")
    rows(ready_dsn, f"GRANT {nobody} TO {writer}")
    with psycopg.connect(make_conninfo(ready_dsn, user=writer), autocommit=True) as member:
        member.execute(f"SET ROLE {nobody}".encode())
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ask(member, id=id_, event="a")


def test_code_that_runs_in_a_superuser_s_session(ready_dsn: str, roles: dict[str, str]) -> None:
    """An index expression runs as the table's owner, in the session of whoever analyses the table."""
    id_, nobody = store(ready_dsn), roles["nobody"]
    rows(ready_dsn, f"CREATE SCHEMA theirs AUTHORIZATION {nobody}")
    nulls = ", ".join(f"'{id_}'" if name == "id" else "'a'" if name == "event" else "NULL" for name, _ in ARGUMENTS)
    arguments = nulls.replace("NULL, NULL, 'a'", "NULL, false, 'a'", 1)
    function = "CREATE FUNCTION theirs.f(n int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN"
    with psycopg.connect(make_conninfo(ready_dsn, user=nobody), autocommit=True) as attacker:
        attacker.execute(f"{function} RETURN ''; END $$".encode())
        attacker.execute(b"CREATE TABLE theirs.t (n int); CREATE INDEX ON theirs.t (theirs.f(n))")
        attacker.execute(b"INSERT INTO theirs.t VALUES (1)")
        body = f"RETURN public.audit_logs_compare({arguments}); END $$"
        attacker.execute(f"{function.replace('CREATE', 'CREATE OR REPLACE')} {body}".encode())
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="may INSERT into its table and not SELECT"):
        rows(ready_dsn, "ANALYZE theirs.t")


# --- what it cannot be made to do ---------------------------------------------------------------------------


def test_temporary_tables_and_search_paths_change_nothing(ready_dsn: str, roles: dict[str, str]) -> None:
    id_, nobody, writer = store(ready_dsn), roles["nobody"], roles["writer"]
    rows(ready_dsn, f"CREATE SCHEMA theirs AUTHORIZATION {nobody}; GRANT USAGE ON SCHEMA theirs TO {writer}")
    with psycopg.connect(make_conninfo(ready_dsn, user=nobody), autocommit=True) as attacker:
        attacker.execute(
            b"CREATE FUNCTION theirs.lie(varchar, varchar) RETURNS bool LANGUAGE sql AS 'SELECT true';"
            b"CREATE OPERATOR theirs.= (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = theirs.lie)"
        )
    with psycopg.connect(make_conninfo(ready_dsn, user=writer), autocommit=True) as connection:
        connection.execute(b"SET search_path = theirs, pg_catalog, public")
        assert connection.execute("SELECT 'x'::varchar = 'y'::varchar").fetchone() == (True,)
        assert ask(connection, id=id_, event="b") == "different"
        connection.execute(b"CREATE TEMPORARY TABLE audit_logs (id uuid, event varchar)")
        connection.execute(b"CREATE TEMPORARY TABLE pg_class (oid oid)")
        assert ask(connection, id=id_, event="b") == "different"
        assert ask(connection, id=id_, event="a") == "same"


def test_a_function_of_somebody_else_is_not_asked(face: OpenVault, ready_dsn: str, roles: dict[str, str]) -> None:
    """It would see the events, and could say that they are stored."""
    vault = face(connection_string=make_conninfo(ready_dsn, user=roles["writer"]), bootstrap=NO_DDL)
    event = {**EVENT, "id": uuid4()}
    vault.emit(event)
    rows(ready_dsn, f"ALTER FUNCTION audit_logs_compare OWNER TO {roles['nobody']}")
    with pytest.raises(DriverError, match="run `tracevault migrate --table audit_logs`") as caught:
        vault.emit(event)
    assert caught.value.sqlstate == "42501"
    assert [change.summary for change in plan_of(ready_dsn).changes] == ["replace function audit_logs_compare"]


def test_a_view_in_the_table_s_place_is_not_read(ready_dsn: str, roles: dict[str, str]) -> None:
    id_, nobody = store(ready_dsn), roles["nobody"]
    for make in ("CREATE VIEW audit_logs AS SELECT * FROM kept", "CREATE TABLE audit_logs (LIKE kept)"):
        rows(ready_dsn, "ALTER TABLE audit_logs RENAME TO kept")
        rows(ready_dsn, f"{make}; ALTER TABLE audit_logs OWNER TO {nobody}")
        rows(ready_dsn, f"GRANT INSERT ON audit_logs TO {roles['writer']}")
        with (
            psycopg.connect(make_conninfo(ready_dsn, user=roles["writer"])) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege, match="must have one owner"),
        ):
            ask(connection, id=id_, event="a")
        rows(ready_dsn, f"DROP {make.split()[1]} audit_logs; ALTER TABLE kept RENAME TO audit_logs")


# --- how it comes to be -------------------------------------------------------------------------------------


def test_it_belongs_to_the_owner_of_the_table_whoever_migrates(ready_dsn: str, roles: dict[str, str]) -> None:
    rows(ready_dsn, f"ALTER TABLE audit_logs OWNER TO {roles['owner']}")
    with psycopg.connect(ready_dsn, autocommit=True) as connection:
        announced: list[str] = []
        migrate(connection, migration_plan(connection, ["audit_logs"]), announced.append)
    assert announced == ["audit_logs: replace function audit_logs_compare"]
    query = "SELECT proowner::regrole::text FROM pg_proc WHERE proname = 'audit_logs_compare'"
    assert rows(ready_dsn, query) == [(roles["owner"],)]
    assert plan_of(ready_dsn).done


def test_start_up_makes_it_where_it_may_and_else_goes_on(
    face: OpenVault, ready_dsn: str, roles: dict[str, str]
) -> None:
    owner, writer = (make_conninfo(ready_dsn, user=roles[kind]) for kind in ("owner", "writer"))
    rows(ready_dsn, f"DROP FUNCTION audit_logs_compare; ALTER TABLE audit_logs OWNER TO {roles['owner']}")
    rows(ready_dsn, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    for conninfo in (writer, owner):
        face(connection_string=conninfo).emit("a")
        assert not plan_of(ready_dsn).done
    with psycopg.connect(owner, autocommit=True) as connection, pytest.raises(MigrationError, match="as the owner"):
        migrate(connection, migration_plan(connection, ["audit_logs"]), print)
    # May create, but not replace what another role made.
    rows(ready_dsn, f"GRANT CREATE ON SCHEMA public TO {roles['owner']}")
    rows(ready_dsn, generate_init_sql("audit_logs"))
    rows(ready_dsn, f"ALTER FUNCTION audit_logs_compare OWNER TO {roles['nobody']}")
    face(connection_string=owner).emit("a")
    assert not plan_of(ready_dsn).done
    rows(ready_dsn, "DROP FUNCTION audit_logs_compare")
    face(connection_string=owner).emit("a")
    assert plan_of(ready_dsn).done


@pytest.mark.parametrize("table", ["audit_logs", "Select", "a" * 63])
def test_odd_names(face: OpenVault, ready_dsn: str, roles: dict[str, str], table: str) -> None:
    schema = 'it\'s an "odd" \\ Schema'
    quoted = '"' + schema.replace('"', '""') + '"'
    elsewhere = in_schema(ready_dsn, "plain")
    rows(elsewhere, generate_init_sql(table))
    rows(ready_dsn, f"ALTER SCHEMA plain RENAME TO {quoted}; GRANT USAGE ON SCHEMA {quoted} TO {roles['writer']}")
    rows(ready_dsn, f'GRANT INSERT ON {quoted}."{table}" TO {roles["writer"]}')
    rows(ready_dsn, f"ALTER ROLE ALL SET search_path = {quoted}")
    try:
        assert [change.kind for change in plan_of(ready_dsn, table).changes] == ["function"]
        face(connection_string=ready_dsn, scopes={"default": table})
        assert plan_of(ready_dsn, table).done
        writer = make_conninfo(ready_dsn, user=roles["writer"])
        vault = face(connection_string=writer, scopes={"default": table})
        event = {**EVENT, "id": uuid4()}
        for _ in range(2):
            vault.emit(event)
        with pytest.raises(DuplicateIdError):
            vault.emit({**event, "event": "b"})
    finally:
        rows(ready_dsn, "ALTER ROLE ALL RESET search_path")
