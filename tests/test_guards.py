"""The guards: who may change a row of an audit table, and how they come to be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.conftest import rows
from tests.servers import one_server
from tests.test_ddl import in_schema
from tracevault import generate_init_sql
from tracevault.schema.guards import BODY, FAULTS, install

INSERT = "INSERT INTO {} (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'a', 'sync', '2026-05-01Z')"
CHANGES = ("UPDATE {} SET event = 'b'", "DELETE FROM {}", "TRUNCATE {}")
PARTITIONED = """
    ALTER TABLE audit_logs RENAME TO template;
    CREATE TABLE audit_logs (LIKE template INCLUDING DEFAULTS INCLUDING GENERATED, PRIMARY KEY (occurred_at, id))
        PARTITION BY RANGE (occurred_at);
    CREATE TABLE audit_2026 PARTITION OF audit_logs FOR VALUES FROM ('2026-01-01Z') TO ('2027-01-01Z')
        PARTITION BY RANGE (occurred_at);
    CREATE TABLE audit_2026_05 PARTITION OF audit_2026 FOR VALUES FROM ('2026-05-01Z') TO ('2026-06-01Z');
"""


def faults(dsn: str, table: str = "audit_logs") -> list[tuple[str, str]]:
    """What is missing of a table's guards."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        return psycopg.RawCursor(connection).execute(FAULTS.encode(), (f'"{table}"', BODY)).fetchall()


def guard(dsn: str, table: str = "audit_logs") -> None:
    rows(dsn, install(table))
    assert faults(dsn, table) == []


def refused(dsn: str, statement: str) -> psycopg.Error:
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
        rows(dsn, statement)
    return caught.value


@pytest.fixture
def owner(server: str, ready_dsn: str) -> Iterator[str]:
    """A role that owns audit_logs and its schema, and is no superuser."""
    name = f"owner_{uuid4().hex[:8]}"
    rows(ready_dsn, f"CREATE ROLE {name} LOGIN")
    rows(ready_dsn, f"ALTER TABLE audit_logs OWNER TO {name}; ALTER SCHEMA public OWNER TO {name}")
    yield name
    rows(ready_dsn, f"DROP OWNED BY {name} CASCADE")
    rows(ready_dsn, f"DROP ROLE {name}")


def test_nothing_is_changed_and_rows_are_still_added(ready_dsn: str, owner: str) -> None:
    own = make_conninfo(ready_dsn, user=owner)
    rows(own, INSERT.format("audit_logs"))
    assert len(faults(own)) == 3
    guard(own)
    rows(own, INSERT.format("audit_logs"))
    changes = [change.format("audit_logs") for change in CHANGES]
    changes.append(
        f"{INSERT.format('audit_logs')} ON CONFLICT (id) DO UPDATE SET event = 'b'".replace(
            "gen_random_uuid()", "(SELECT id FROM audit_logs LIMIT 1)"
        )
    )
    for dsn in (own, ready_dsn):  # the owner and a superuser
        for change in changes:
            error = refused(dsn, change)
            assert error.sqlstate == "42501"
            assert str(error.diag.message_primary).startswith('audit table "audit_logs" is append-only, ')
            assert "`tracevault prune` and `tracevault erase`" in str(error.diag.message_hint)
            assert error.diag.table_name == "audit_logs"
    assert rows(own, "SELECT count(*), min(event) FROM audit_logs") == [(2, "a")]


def test_replica_sessions_and_cascades_are_guarded_too(ready_dsn: str, owner: str) -> None:
    guard(ready_dsn)
    rows(ready_dsn, INSERT.format("audit_logs"))
    refused(ready_dsn, "SET session_replication_role = replica; DELETE FROM audit_logs")
    rows(
        ready_dsn,
        f"CREATE TABLE tenants (name text PRIMARY KEY); ALTER TABLE tenants OWNER TO {owner};"
        "ALTER TABLE audit_logs ADD tenant text REFERENCES tenants ON DELETE CASCADE;"
        "INSERT INTO tenants VALUES ('t');"
        + INSERT.format("audit_logs").replace("occurred_at)", "occurred_at, tenant)").replace("Z')", "Z', 't')"),
    )
    # The cascade runs as the table's owner, in a session that anybody may have prepared.
    refused(ready_dsn, "SET tracevault.custody = 'on'; DELETE FROM tenants")
    assert rows(ready_dsn, "SELECT count(*) FROM audit_logs") == [(2,)]


CUSTODY = """
    CREATE FUNCTION drop_all() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = public, pg_temp {setting} AS $$ BEGIN
            UPDATE audit_logs SET data = NULL; DELETE FROM audit_logs WHERE event = 'a';
        END $$;
    ALTER FUNCTION drop_all OWNER TO {owner};
"""


def test_custody_functions_pass_and_the_setting_alone_does_not(ready_dsn: str, owner: str) -> None:
    guard(ready_dsn)
    rows(ready_dsn, INSERT.format("audit_logs"))
    for change in CHANGES:
        # A superuser is not the owner.
        refused(ready_dsn, f"SET tracevault.custody = 'on'; {change.format('audit_logs')}")
    rows(ready_dsn, CUSTODY.format(setting="", owner=owner))
    refused(ready_dsn, "SELECT drop_all()")
    rows(ready_dsn, "DROP FUNCTION drop_all")
    superuser = rows(ready_dsn, "SELECT quote_ident(current_user)")[0][0]
    rows(ready_dsn, CUSTODY.format(setting="SET tracevault.custody = 'on'", owner=superuser))
    refused(ready_dsn, "SELECT drop_all()")
    rows(ready_dsn, f"ALTER FUNCTION drop_all OWNER TO {owner}")
    rows(ready_dsn, INSERT.format("audit_logs").replace("'a'", "'kept'"))
    rows(ready_dsn, "SELECT drop_all()")
    assert rows(ready_dsn, "SELECT event FROM audit_logs") == [("kept",)]
    with psycopg.connect(ready_dsn, autocommit=True) as connection:
        connection.execute("SELECT drop_all()")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):  # the function's setting ends with it
            connection.execute("DELETE FROM audit_logs")


def test_partitions_old_and_new_are_guarded(ready_dsn: str) -> None:
    rows(ready_dsn, PARTITIONED)
    # A partition that was guarded as a table of its own must not be in the way.
    rows(ready_dsn, install("audit_2026_05"))
    assert len([part for part, _ in faults(ready_dsn) if part == "audit_2026"]) == 2
    guard(ready_dsn)
    guard(ready_dsn)
    rows(ready_dsn, INSERT.format("audit_logs"))
    tables = ["audit_logs", "audit_2026", "audit_2026_05"]
    for change in (change.format(table) for table in tables for change in CHANGES):
        refused(ready_dsn, change)
        refused(ready_dsn, f"SET session_replication_role = replica; {change}")
    rows(ready_dsn, "CREATE TABLE audit_rest PARTITION OF audit_logs DEFAULT")
    rows(ready_dsn, INSERT.format("audit_logs").replace("2026", "2031"))
    for change in CHANGES[:2]:
        refused(ready_dsn, f"SET session_replication_role = replica; {change.format('audit_rest')}")
    assert faults(ready_dsn) == [("audit_rest", "TRUNCATE is not guarded")]
    guard(ready_dsn)
    refused(ready_dsn, "TRUNCATE audit_rest")
    assert rows(ready_dsn, "SELECT count(*) FROM audit_logs") == [(2,)]


def test_custody_in_a_partition_of_another_owner(ready_dsn: str, owner: str) -> None:
    rows(ready_dsn, f"{PARTITIONED} ALTER TABLE audit_logs OWNER TO {owner}")
    guard(ready_dsn)
    rows(ready_dsn, INSERT.format("audit_logs"))
    rows(ready_dsn, CUSTODY.format(setting="SET tracevault.custody = 'on'", owner=owner) + "SELECT drop_all()")
    assert rows(ready_dsn, "SELECT count(*) FROM audit_logs") == [(0,)]


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (
            "ALTER TABLE audit_logs DISABLE TRIGGER tracevault_guard_rows",
            "UPDATE and DELETE are not guarded, since the trigger is disabled",
        ),
        (
            "ALTER TABLE audit_logs DISABLE TRIGGER ALL; ALTER TABLE audit_logs ENABLE TRIGGER ALL",
            "TRUNCATE is guarded in ordinary sessions alone, since the trigger is not ENABLE ALWAYS",
        ),
        ("DROP TRIGGER tracevault_guard_truncate ON audit_logs", "TRUNCATE is not guarded"),
        (
            "CREATE OR REPLACE TRIGGER tracevault_guard_rows BEFORE UPDATE OF event OR DELETE ON audit_logs"
            " FOR EACH ROW EXECUTE FUNCTION tracevault_guard()",
            "UPDATE and DELETE are guarded by another trigger than ours",
        ),
        (
            "CREATE OR REPLACE TRIGGER tracevault_guard_rows BEFORE UPDATE OR DELETE ON audit_logs FOR EACH ROW"
            " WHEN (false) EXECUTE FUNCTION tracevault_guard()",
            "UPDATE and DELETE are guarded by another trigger",
        ),
        (
            "CREATE OR REPLACE FUNCTION tracevault_guard() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
            "the function tracevault_guard is missing, or not as it should be",
        ),
        ("ALTER FUNCTION tracevault_guard() SECURITY DEFINER", "the function tracevault_guard is missing, or not"),
        ("ALTER FUNCTION tracevault_guard() OWNER TO {nobody}", "the function tracevault_guard is missing, or not"),
    ],
)
@one_server
def test_harm_is_found_and_mended(ready_dsn: str, owner: str, harm: str, found: str) -> None:
    nobody = f"nobody_{uuid4().hex[:8]}"
    guard(ready_dsn)
    rows(ready_dsn, f"CREATE ROLE {nobody}")
    try:
        rows(ready_dsn, harm.format(nobody=nobody))
        assert any(text.startswith(found) for _, text in faults(ready_dsn))
        guard(ready_dsn)
        rows(ready_dsn, INSERT.format("audit_logs"))
        for change in CHANGES:
            refused(ready_dsn, f"SET session_replication_role = replica; {change.format('audit_logs')}")
    finally:
        rows(ready_dsn, f"DROP OWNED BY {nobody} CASCADE; DROP ROLE {nobody}")


def test_nothing_is_locked_where_nothing_is_to_do(ready_dsn: str) -> None:
    guard(ready_dsn)
    with psycopg.connect(ready_dsn) as writer:
        writer.execute(INSERT.format("audit_logs").encode())
        rows(ready_dsn, f"SET lock_timeout = '100ms'; {install('audit_logs')}")


@pytest.mark.parametrize("table", ["Select", "a" * 63])
def test_odd_names(ready_dsn: str, table: str) -> None:
    elsewhere = in_schema(ready_dsn, 'it\'s an "odd" Schema')
    rows(elsewhere, generate_init_sql(table))
    guard(elsewhere, table)
    rows(elsewhere, INSERT.format(f'"{table}"'))
    for change in CHANGES:
        refused(elsewhere, change.format(f'"{table}"'))


def test_tables_of_one_schema_share_the_function(ready_dsn: str, owner: str) -> None:
    guard(ready_dsn, "audit_logs")
    rows(ready_dsn, "ALTER FUNCTION tracevault_guard() OWNER TO CURRENT_USER")  # a superuser
    assert faults(ready_dsn, "audit_logs") == []
    guard(ready_dsn, "audit_user_events")
    assert faults(ready_dsn, "audit_logs") == []
    query: Any = "SELECT count(*) FROM pg_proc WHERE proname = 'tracevault_guard'"
    assert rows(ready_dsn, query) == [(1,)]
