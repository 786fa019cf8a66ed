"""DDL for an audit table, in numbered steps. `generate_init_sql`, the start-up, the SQL files and the CLI use it.

Steps 1-3 are those of Tracevault 1.0.1 for Node.js, whose tables are upgraded in place; steps from 4 on are ours.
Every step may run again: it does nothing where its work is done.
"""

from __future__ import annotations

from dataclasses import dataclass

from tracevault.config import DEFAULT_TABLE, check_table_name
from tracevault.event.record import COLUMNS, StoredColumn
from tracevault.schema.indexes import INDEXES, OBSOLETE, index_name


@dataclass(frozen=True)
class Step:
    """One numbered migration; ``file`` is the name of its SQL file without the ending."""

    number: int
    file: str
    title: str


STEPS = (
    Step(1, "001_init_audit_logs", "the table"),
    Step(2, "002_audit_logs_outcome_error_code", "generated columns outcome and error_code"),
    Step(3, "003_audit_logs_severity", "generated column severity"),
    Step(4, "004_audit_logs_tracevault_columns", "columns beyond Tracevault 1.0.1"),
    Step(5, "005_audit_logs_indexes", "indexes that serve filter and order"),
)


def generation_expression(path: tuple[str, ...]) -> str:
    """Return the SQL that extracts ``path`` from ``data`` as trimmed text, or NULL."""
    *parents, last = path
    return "NULLIF(BTRIM(data{}->>'{}'), '')".format("".join(f"->'{parent}'" for parent in parents), last)


def column_definition(stored: StoredColumn) -> str:
    """Return a column's name, type and constraints; a default is set apart, so that adding rewrites nothing."""
    sql_type = stored.column.sql_type.upper().replace("CHARACTER VARYING", "VARCHAR")
    sql_type = sql_type.replace("TIMESTAMP WITH TIME ZONE", "TIMESTAMPTZ")
    if stored.column.generated is not None:
        expression = generation_expression(stored.column.generated)
        return f"{stored.name} {sql_type} GENERATED ALWAYS AS ({expression}) STORED"
    if stored.name == "id":
        return f"{stored.name} {sql_type} PRIMARY KEY"
    null = "" if stored.nullable else " NOT NULL"
    default = f" DEFAULT {stored.column.default}" if stored.column.default and stored.column.since == 1 else ""
    return f"{stored.name} {sql_type}{null}{default}"


def step_statements(number: int, table: str) -> list[str]:
    """Return the statements of step ``number`` for ``table``, without semicolons."""
    if number == len(STEPS):
        return [_drop_unlike(table), *create_index_statements(table)]
    added = [stored for stored in COLUMNS if stored.column.since == number]
    if number == 1:
        lines = ",\n  ".join(column_definition(stored) for stored in added)
        return [f'CREATE TABLE IF NOT EXISTS "{table}" (\n  {lines}\n)']
    return add_column_statements(table, added)


def add_column_statements(table: str, added: list[StoredColumn]) -> list[str]:
    """Return the statements that add columns: all in one ALTER, then defaults, which concern new rows alone."""
    clauses = ",\n  ".join(f"ADD COLUMN IF NOT EXISTS {column_definition(stored)}" for stored in added)
    statements = [f'ALTER TABLE "{table}"\n  {clauses}']
    statements += set_default_statements(table, added)
    return statements


def set_default_statements(table: str, columns: list[StoredColumn]) -> list[str]:
    """Return the statement that sets the defaults of those ``columns`` that have one."""
    clauses = [
        f"ALTER COLUMN {stored.name} SET DEFAULT {stored.column.default}"
        for stored in columns
        if stored.column.default is not None
    ]
    return [f'ALTER TABLE "{table}"\n  ' + ",\n  ".join(clauses)] if clauses else []


def create_index_statements(table: str) -> list[str]:
    """Return one CREATE INDEX IF NOT EXISTS per index, in the foreground."""
    return [f'CREATE INDEX IF NOT EXISTS "{index.name(table)}" ON {index.definition(table)}' for index in INDEXES]


def _drop_unlike(table: str) -> str:
    """Return a block that drops indexes of our names whose keys are not ours: the reference's."""
    ours = ",\n    ".join(f"('{index.name(table)}', {len(index.columns)})" for index in INDEXES)
    obsolete = "\n".join(f'  DROP INDEX IF EXISTS "{index_name(table, suffix)}";' for suffix in OBSOLETE)
    return f"""DO $tracevault$
DECLARE
  unlike text;
BEGIN
  FOR unlike IN SELECT ours.name FROM (VALUES
    {ours}
  ) AS ours (name, keys)
    JOIN pg_catalog.pg_index AS found ON found.indexrelid = to_regclass(quote_ident(ours.name))
    WHERE found.indrelid = to_regclass('"{table}"') AND found.indnatts <> ours.keys
  LOOP
    EXECUTE 'DROP INDEX ' || quote_ident(unlike);
  END LOOP;
{obsolete}
END
$tracevault$"""


def step_sql(number: int, table: str) -> str:
    """Return step ``number`` as a script."""
    step = STEPS[number - 1]
    return f"-- {step.number:03}: {step.title}\n" + "".join(
        statement + ";\n\n" for statement in step_statements(number, table)
    )


def generate_init_sql(table_name: str) -> str:
    """Return the SQL that makes ``table_name`` an audit table: all steps, safe to run again. Runs nothing.

    On a filled table of Tracevault 1.0.1 it rewrites and indexes in the foreground; ``tracevault migrate``
    does the same work without stopping writers. Raises `ConfigError` for a name that is not 1-63 ASCII
    letters, digits and underscores without a leading digit.
    """
    table = check_table_name(table_name)
    return "".join(step_sql(step.number, table) for step in STEPS).rstrip() + "\n"


def sql_files() -> dict[str, str]:
    """Return the SQL files shipped with the package, by file name: one per step, for ``audit_logs``."""
    return {
        f"{step.file}.sql": (
            f"-- tracevault {step.number:03}: {step.title}. Generated from tracevault.schema.ddl; do not edit.\n"
            f'-- Usage: psql "$DATABASE_URL" -f {step.file}.sql   Safe to run again.\n\n'
        )
        + "".join(statement + ";\n\n" for statement in step_statements(step.number, DEFAULT_TABLE)).rstrip()
        + "\n"
        for step in STEPS
    }
