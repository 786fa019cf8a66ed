"""What a table is against what it should be: ours, an older one, or somebody else's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.conftest import rows
from tests.faces import OpenVault
from tests.test_ddl import fresh_database, in_schema
from tracevault import MigrationError, generate_init_sql
from tracevault.flows.migrate import Plan, start_up
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.postgres.schema import migration_plan
from tracevault.schema.indexes import INDEXES, PARTITIONED_INDEXES
from tracevault.schema.state import REWRITE_LIMIT

RECREATE_OUTCOME = "ALTER TABLE audit_logs DROP COLUMN outcome CASCADE; ALTER TABLE audit_logs ADD COLUMN outcome "
PARTITIONED = """
CREATE TABLE audit_logs (LIKE template INCLUDING DEFAULTS INCLUDING GENERATED, PRIMARY KEY ({key}))
PARTITION BY {by}
"""


@pytest.fixture(scope="module")
def database(server: str) -> Iterator[str]:
    """A database for all tests that roll back what they do."""
    with fresh_database(server, "states") as dsn:
        rows(dsn, generate_init_sql("audit_logs"))
        yield dsn


@pytest.fixture
def ours(database: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to a database with an audit table, inside a transaction that will be rolled back."""
    with psycopg.connect(database) as connection:
        yield connection
        connection.rollback()


def planned(connection: psycopg.Connection[Any]) -> Plan:
    (plan,) = migration_plan(connection, ["audit_logs"])
    return plan


def plan_of(dsn: str, table: str = "audit_logs") -> Plan:
    with psycopg.connect(dsn, autocommit=True) as connection:
        (plan,) = migration_plan(connection, [table])
    return plan


def test_the_limit_of_rewrites_at_start_up() -> None:
    assert REWRITE_LIMIT == 100_000


@pytest.mark.parametrize(
    ("change", "trait"),
    [
        ("ALTER TABLE audit_logs DROP COLUMN meta", "column meta is missing"),
        ("ALTER TABLE audit_logs ALTER COLUMN event TYPE text", "column event is text, not character varying"),
        ("ALTER TABLE audit_logs ALTER COLUMN tenant_id TYPE varchar(9)", "column tenant_id is character varying(9)"),
        (
            "ALTER TABLE audit_logs ALTER COLUMN occurred_at TYPE timestamp",
            "occurred_at is timestamp without time zone",
        ),
        ("ALTER TABLE audit_logs ALTER COLUMN actor_id SET NOT NULL", "column actor_id is NOT NULL"),
        (
            "ALTER TABLE audit_logs ALTER tenant_id SET DEFAULT '', ALTER tenant_id SET NOT NULL",
            "tenant_id is NOT NULL",
        ),
        ("ALTER TABLE audit_logs ALTER COLUMN severity SET NOT NULL", "column severity is NOT NULL"),
        ("ALTER TABLE audit_logs ALTER COLUMN event DROP NOT NULL", "column event is not NOT NULL"),
        ("ALTER TABLE audit_logs ALTER COLUMN created_at DROP DEFAULT", "column created_at has no default"),
        ("ALTER TABLE audit_logs ADD COLUMN shop int NOT NULL", "column shop is NOT NULL without a default"),
        ("ALTER TABLE audit_logs ALTER COLUMN severity DROP EXPRESSION", "column severity is not GENERATED ALWAYS"),
        (
            RECREATE_OUTCOME + "varchar(64) GENERATED ALWAYS AS (data->>'outcome') STORED",
            "column outcome is generated as (data ->> 'outcome'::text), not NULLIF(",
        ),
        (
            RECREATE_OUTCOME + "varchar(64) GENERATED ALWAYS AS (NULLIF(btrim(data->>'Outcome'), '')) STORED",
            "column outcome is generated as",
        ),
        (RECREATE_OUTCOME + "varchar(65)", "column outcome is character varying(65), not character varying(64)"),
        (
            "ALTER TABLE audit_logs DROP COLUMN span_id;"
            "ALTER TABLE audit_logs ADD COLUMN span_id varchar GENERATED ALWAYS AS (left(event, 2)) STORED",
            "column span_id is generated",
        ),
        ("ALTER TABLE audit_logs DROP CONSTRAINT audit_logs_pkey", "its primary key is none, not (id)"),
        (
            "ALTER TABLE audit_logs DROP CONSTRAINT audit_logs_pkey, ADD PRIMARY KEY (occurred_at, id)",
            "its primary key is (occurred_at, id), not (id)",
        ),
        (
            "ALTER TABLE audit_logs RENAME TO t; CREATE VIEW audit_logs AS SELECT * FROM t",
            "it is a view, not a table",
        ),
        (
            "ALTER TABLE audit_logs RENAME TO t; CREATE MATERIALIZED VIEW audit_logs AS SELECT * FROM t",
            "it is a materialized view, not a table",
        ),
        ("DROP TABLE audit_logs; CREATE SEQUENCE audit_logs", "it is a relation of another kind, not a table"),
        (
            "ALTER TABLE audit_logs RENAME TO template;" + PARTITIONED.format(key="id", by="HASH (id)"),
            "it is partitioned by HASH (id), not RANGE (occurred_at); its primary key is (id), not (occurred_at, id)",
        ),
    ],
)
def test_what_differs_is_named(ours: psycopg.Connection[Any], change: str, trait: str) -> None:
    ours.execute(change.encode())
    with pytest.raises(MigrationError, match=r"^table `audit_logs` is not an audit table of tracevault: ") as caught:
        planned(ours)
    assert trait in str(caught.value)


def test_a_table_of_something_else_is_refused_by_start_up_and_left_alone(dsn: str, face: OpenVault) -> None:
    rows(dsn, "CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL)")
    with pytest.raises(MigrationError, match=r"id is bigint, not uuid; column event is missing; .* name is NOT NULL"):
        face(connection_string=dsn, scopes={"default": "users"})
    assert rows(dsn, "SELECT count(*) FROM information_schema.columns WHERE table_name = 'users'") == [(2,)]


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE audit_logs ADD COLUMN note text",
        "ALTER TABLE audit_logs ADD COLUMN note text NOT NULL DEFAULT ''",
        "ALTER TABLE audit_logs ADD COLUMN number bigint GENERATED ALWAYS AS IDENTITY",
        "ALTER TABLE audit_logs ALTER COLUMN created_at SET DEFAULT clock_timestamp()",
        "ALTER TABLE audit_logs ALTER COLUMN payload_salt SET NOT NULL",
        "ALTER INDEX idx_audit_logs_event SET (fillfactor = 70)",
        "ALTER INDEX audit_logs_pkey SET (fillfactor = 70)",
        "CREATE INDEX mine ON audit_logs (environment)",
    ],
)
def test_what_an_administrator_may_change(ours: psycopg.Connection[Any], change: str) -> None:
    ours.execute(change.encode())
    assert planned(ours).done


@pytest.mark.parametrize(
    ("change", "summaries"),
    [
        (
            "ALTER TABLE audit_logs DROP COLUMN stored_xid",
            ["add columns stored_xid", "build index idx_audit_logs_stored"],
        ),
        ("ALTER TABLE audit_logs ALTER COLUMN stored_xid DROP DEFAULT", ["set the default of stored_xid"]),
        ("DROP INDEX idx_audit_logs_event", ["build index idx_audit_logs_event"]),
        (
            "DROP INDEX idx_audit_logs_event; CREATE INDEX idx_audit_logs_event ON audit_logs (event)",
            ["replace index idx_audit_logs_event"],
        ),
        (
            "DROP INDEX idx_audit_logs_stored; CREATE INDEX idx_audit_logs_stored ON audit_logs (stored_xid, id) "
            "WHERE stored_xid IS NOT NULL",
            ["replace index idx_audit_logs_stored"],
        ),
        (
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_audit_logs_event'::regclass",
            ["replace index idx_audit_logs_event"],
        ),
        ("DROP FUNCTION audit_logs_compare", ["make function audit_logs_compare"]),
        ("ALTER FUNCTION audit_logs_compare SECURITY INVOKER", ["replace function audit_logs_compare"]),
        ("ALTER FUNCTION audit_logs_compare SET search_path = public", ["replace function audit_logs_compare"]),
        ("ALTER FUNCTION audit_logs_compare OWNER TO pg_monitor", ["replace function audit_logs_compare"]),
        (
            "UPDATE pg_proc SET prosrc = 'BEGIN RETURN ''same''; END' WHERE proname = 'audit_logs_compare'",
            ["replace function audit_logs_compare"],
        ),
        (
            "CREATE INDEX idx_audit_logs_correlation_occurred ON audit_logs (correlation_id)",
            ["drop index idx_audit_logs_correlation_occurred"],
        ),
    ],
)
def test_what_is_to_do_is_said_and_done_by_start_up_while_it_is_empty(
    ours: psycopg.Connection[Any], change: str, summaries: list[str]
) -> None:
    ours.execute(change.encode())
    assert [to_do.summary for to_do in planned(ours).changes] == summaries
    run(ours, start_up("audit_logs"), Place("starting"))
    assert planned(ours).done


def test_rewriting_is_announced_with_the_size(ready_dsn: str) -> None:
    rows(
        ready_dsn,
        "INSERT INTO audit_logs (id, event, mode, occurred_at, data) SELECT gen_random_uuid(), 'e', 'sync', now(), "
        "jsonb_build_object('n', n) FROM generate_series(1, 5000) AS n",
    )
    rows(ready_dsn, "ALTER TABLE audit_logs DROP COLUMN severity, DROP COLUMN outcome")
    (size,) = rows(ready_dsn, "SELECT pg_table_size('audit_logs')")[0]
    (change,) = plan_of(ready_dsn).pending("rewrite")
    assert change.summary.endswith(f"outcome, severity, which writes the table anew ({size / 1e6:.1f} MB)")
    rows(ready_dsn, "ANALYZE audit_logs")
    (change,) = plan_of(ready_dsn).pending("rewrite")
    assert change.summary.endswith("MB, about 5,000 rows)")


def test_a_partitioned_table_is_one_table(ready_dsn: str, face: OpenVault) -> None:
    rows(ready_dsn, "ALTER TABLE audit_logs RENAME TO template")
    rows(ready_dsn, PARTITIONED.format(key="occurred_at, id", by="RANGE (occurred_at)"))
    rows(ready_dsn, "DROP TABLE template")
    rows(
        ready_dsn,
        "CREATE TABLE audit_2026 PARTITION OF audit_logs FOR VALUES FROM ('2026-01-01Z') TO ('2027-01-01Z');"
        "CREATE TABLE audit_rest PARTITION OF audit_logs DEFAULT PARTITION BY RANGE (occurred_at);"
        "CREATE TABLE audit_rest_all PARTITION OF audit_rest DEFAULT",
    )
    plan = plan_of(ready_dsn)
    assert (plan.state.partitioned, plan.filled, len(plan.changes)) == (True, False, len(PARTITIONED_INDEXES))
    vault = face(connection_string=ready_dsn)
    assert plan_of(ready_dsn).done
    for moment in ("2026-05-01T00:00Z", "2031-05-01T00:00Z"):
        receipt = vault.emit("a.b", actor={"id": "u", "type": "user"}, occurred_at=moment)
        assert vault.query.find_by_id(receipt.id).event == "a.b"
    assert vault.query.count(actor_id="u") == 2
    rows(ready_dsn, "ANALYZE audit_logs")
    state = plan_of(ready_dsn).state
    sizes = "SELECT pg_table_size('audit_2026') + pg_table_size('audit_rest_all')"
    assert (state.filled, state.rows, [(state.size_bytes,)]) == (True, 2, rows(ready_dsn, sizes))


@pytest.mark.parametrize("schema", ["audit", 'an "odd" Schema'])
def test_a_table_elsewhere_is_reached_by_search_path(ready_dsn: str, face: OpenVault, schema: str) -> None:
    elsewhere = in_schema(ready_dsn, schema)
    vault = face(connection_string=elsewhere)
    vault.emit("a.b")
    assert rows(ready_dsn, "SELECT count(*) FROM audit_logs") == [(0,)]
    assert rows(elsewhere, "SELECT count(*) FROM audit_logs") == [(1,)]
    # An index of the same name that comes first in the path is another table's, and left alone.
    quoted = '"' + schema.replace('"', '""') + '"'
    rows(ready_dsn, "DROP TABLE audit_logs; CREATE TABLE other (n int); CREATE INDEX idx_audit_logs_event ON other (n)")
    rows(ready_dsn, f"DROP INDEX {quoted}.idx_audit_logs_event; TRUNCATE {quoted}.audit_logs")
    rows(ready_dsn, f"CREATE INDEX idx_audit_logs_event ON {quoted}.audit_logs (event)")
    database = rows(ready_dsn, "SELECT current_database()")[0][0]
    rows(ready_dsn, f"ALTER DATABASE {database} SET search_path = public, {quoted}")
    assert [change.summary for change in plan_of(ready_dsn).changes] == ["replace index idx_audit_logs_event"]
    face(connection_string=ready_dsn)
    assert plan_of(ready_dsn).done
    assert rows(ready_dsn, "SELECT count(*) FROM pg_indexes WHERE tablename = 'other'") == [(1,)]


@pytest.mark.parametrize(
    "tables", [("a" * 63, "A" * 63), ("a" * 62 + "b", "a" * 62 + "c"), ("audit", "Audit"), ("x" * 36, "Select")]
)
def test_names_of_all_kinds_get_all_their_indexes(dsn: str, face: OpenVault, tables: tuple[str, str]) -> None:
    scopes = dict(zip(("one", "other"), tables, strict=True))
    vault = face(connection_string=dsn, scopes=scopes, default_scope="one")
    vault.emit("a.b")
    for table in tables:
        assert plan_of(dsn, table).done
        found = [name for (name,) in rows(dsn, "SELECT indexname FROM pg_indexes WHERE tablename = %s", table)]
        assert len(found) == len(INDEXES) + 1
        rows(dsn, generate_init_sql(table))
        assert len(plan_of(dsn, table).state.indexes) == len(INDEXES) + 1
