"""Alembic: real migrations of a small project, online and offline."""

from __future__ import annotations

import io
from pathlib import Path
from textwrap import dedent

import psycopg
import pytest
from alembic import command
from alembic.config import Config

from tests.conftest import rows
from tests.integrations.test_connections import _url
from tracevault import ConfigError, Tracevault, generate_init_sql
from tracevault.integrations.alembic import CreateAuditTable, leave_audit_tables
from tracevault.schema.trees import tree_statements

ENV = """
from alembic import context
from sqlalchemy import Column, Integer, MetaData, Table, create_engine
from sqlalchemy.pool import NullPool
from tracevault.integrations.alembic import leave_audit_tables

metadata = MetaData()
Table("things", metadata, Column("id", Integer, primary_key=True))
url = context.config.get_main_option("sqlalchemy.url")
options = {"target_metadata": metadata, "include_name": leave_audit_tables("audit_logs", "Users_Log")}

if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
"""
FIRST = """
from alembic import op

revision = "0001"
down_revision = None


def upgrade():
    op.create_audit_table("audit_logs")
    op.create_audit_table("Users_Log")


def downgrade():
    pass  # the log is kept
"""


@pytest.fixture(params=["psycopg", "psycopg2"])
def project(request: pytest.FixtureRequest, dsn: str, tmp_path: Path) -> Config:
    """A project with one migration."""
    (tmp_path / "versions").mkdir()
    (tmp_path / "env.py").write_text(ENV)
    (tmp_path / "script.py.mako").write_text(
        dedent('''
            """${message}"""
            from alembic import op
            import sqlalchemy as sa
            revision = ${repr(up_revision)}
            down_revision = ${repr(down_revision)}
            def upgrade():
                ${upgrades if upgrades else "pass"}
            def downgrade():
                ${downgrades if downgrades else "pass"}
        ''')
    )
    (tmp_path / "versions" / "0001_audit.py").write_text(FIRST)
    config = Config(output_buffer=io.StringIO(), stdout=io.StringIO())
    config.set_main_option("script_location", str(tmp_path))
    config.set_main_option("path_separator", "os")
    config.set_main_option("sqlalchemy.url", _url(dsn, request.param).replace("%", "%%"))
    return config


def shape(dsn: str, table: str) -> list[tuple[str, ...]]:
    """The columns and indexes of a table, as PostgreSQL has them."""
    return rows(
        dsn,
        """SELECT attname::text, format_type(atttypid, atttypmod), coalesce(pg_get_expr(adbin, adrelid), '')
           FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
           WHERE attrelid = to_regclass(quote_ident(%s)) AND attnum > 0
           UNION ALL SELECT indexname, indexdef, '' FROM pg_indexes WHERE tablename = %s ORDER BY 1""",
        table,
        table,
    )


def test_upgrade_makes_the_tables_and_downgrade_keeps_them(project: Config, dsn: str) -> None:
    command.upgrade(project, "head")
    made = {table: shape(dsn, table) for table in ("audit_logs", "Users_Log")}
    options = {"bootstrap": {"ensure_schema": False}, "scopes": {"default": "audit_logs", "users": "Users_Log"}}
    with Tracevault(connection_string=dsn, **options) as audit:  # type: ignore[arg-type]
        audit.emit("one")
        audit.get_scope("users").emit("two")
    command.downgrade(project, "base")
    assert rows(dsn, "SELECT event FROM audit_logs") == [("one",)]
    command.upgrade(project, "head")  # safe to run again
    for table, there in made.items():
        rows(dsn, f'DROP TABLE "{table}"')
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(generate_init_sql(table).encode())
        assert shape(dsn, table) == there


def test_offline_sql_is_what_runs_online(project: Config, dsn: str) -> None:
    command.upgrade(project, "head", sql=True)
    assert isinstance(project.output_buffer, io.StringIO)
    script = project.output_buffer.getvalue()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(script.encode())
    with Tracevault(connection_string=dsn, bootstrap={"ensure_schema": False}) as audit:
        audit.emit("one")


def test_autogenerate_leaves_our_tables_alone(project: Config, dsn: str, tmp_path: Path) -> None:
    command.upgrade(project, "head")
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in tree_statements():
            connection.execute(statement.encode())
        for name in ("audit_logs_2026_01", "audit_logs_default", "audit_logs_before_2027_01_01"):
            connection.execute(f"CREATE TABLE {name} (id int)".encode())
        connection.execute("CREATE TABLE strangers (id int)")
    command.revision(project, message="more", autogenerate=True)
    (made,) = (path for path in (tmp_path / "versions").glob("*.py") if not path.name.startswith("0001"))
    text = made.read_text()
    assert "create_table('things'" in text
    assert "drop_table('strangers')" in text
    assert "audit" not in text.lower()
    assert "Users_Log" not in text
    assert "tracevault" not in text


def test_your_own_include_name_is_asked_about_the_rest() -> None:
    included = leave_audit_tables("log", include_name=lambda name, type_, _parents: name != "private")
    assert [included(name, "table", {}) for name in ("log", "private", "things")] == [False, False, True]
    assert included("log", "column", {})
    assert not leave_audit_tables()("audit_logs", "table", {})


def test_a_name_that_cannot_be_a_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="table_name"):
        CreateAuditTable("no table")
