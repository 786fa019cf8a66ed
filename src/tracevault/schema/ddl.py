"""DDL for an audit table, in numbered steps. `generate_init_sql`, the start-up, the SQL files and the CLI use it.

Steps 1-3 are those of Tracevault 1.0.1 for Node.js, whose tables are upgraded in place; steps from 4 on are ours.
Every step may run again: it does nothing where its work is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tracevault.config import DEFAULT_TABLE, check_table_name
from tracevault.errors import ConfigError
from tracevault.events.record import COLUMNS, INSERT_COLUMNS, StoredColumn
from tracevault.events.rules import got
from tracevault.schema.comparison import define
from tracevault.schema.indexes import INDEXES, OBSOLETE, Index, index_name

# The SQL files that the package ships, made by `write_sql_files`.
MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(frozen=True)
class Step:
    """One numbered migration; ``file`` is the name of its SQL file without the ending."""

    number: int
    file: str
    title: str
    caution: str = "quick, also on a filled table"
    indexes: bool = False
    function: bool = False


# What a writer gives with each event, and two of which can be compared.
DISTRIBUTABLE = tuple(
    stored.name
    for stored in COLUMNS
    if stored.name in INSERT_COLUMNS and stored.column.sql_type in ("uuid", "character varying")
)

_REWRITES = "rewrites a filled table that lacks them: its writers and readers wait meanwhile"

STEPS = (
    Step(1, "001_init_audit_logs", "the table", "does nothing where it exists"),
    Step(2, "002_audit_logs_outcome_error_code", "generated columns outcome and error_code", _REWRITES),
    Step(3, "003_audit_logs_severity", "generated column severity", _REWRITES),
    Step(4, "004_audit_logs_tracevault_columns", "columns beyond Tracevault 1.0.1"),
    Step(
        5,
        "005_audit_logs_indexes",
        "indexes that serve filter and order",
        "writers wait while they are built; on a filled table `tracevault migrate` builds them without that",
        indexes=True,
    ),
    Step(6, "006_audit_logs_compare", "function that confirms retries of roles that may not read", function=True),
)


def generation_expression(path: tuple[str, ...]) -> str:
    """Return the SQL that extracts ``path`` from ``data`` as trimmed text, or NULL."""
    *parents, last = path
    return "NULLIF(btrim(data{}->>'{}'), '')".format("".join(f"->'{parent}'" for parent in parents), last)


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


def step_statements(number: int, table: str, *, partitioned: bool = False) -> list[str]:
    """Return the statements of step ``number`` for ``table``, without semicolons."""
    if STEPS[number - 1].indexes:
        builds = (create_index(index, index.name(table), table, "IF NOT EXISTS ") for index in INDEXES)
        return [_drop_unlike(table), *builds]
    if STEPS[number - 1].function:
        return [define(table)]
    added = [stored for stored in COLUMNS if stored.column.since == number]
    if number == 1:
        return [create_table(table, added, partitioned=partitioned)]
    return [add_columns(table, added)]


def create_table(table: str, columns: list[StoredColumn], *, partitioned: bool = False) -> str:
    """Return the statement that makes ``table`` with ``columns``; steps from 2 on add to them."""
    lines = [column_definition(stored) for stored in columns]
    if partitioned:  # by a column that has to be part of the key
        lines = [*(line.replace(" PRIMARY KEY", " NOT NULL") for line in lines), "PRIMARY KEY (occurred_at, id)"]
    listed = ",\n  ".join(lines)
    return f'CREATE TABLE IF NOT EXISTS "{table}" (\n  {listed}\n)' + (
        " PARTITION BY RANGE (occurred_at)" if partitioned else ""
    )


def add_columns(table: str, added: list[StoredColumn]) -> str:
    """Return the statement that adds columns, then sets their defaults, which so concern new rows alone."""
    clauses = [f"ADD COLUMN IF NOT EXISTS {column_definition(stored)}" for stored in added]
    return _alter(table, clauses + _default_clauses(added))


def set_defaults(table: str, columns: list[StoredColumn]) -> str:
    """Return the statement that sets the defaults of ``columns``."""
    return _alter(table, _default_clauses(columns))


def _default_clauses(columns: list[StoredColumn]) -> list[str]:
    return [
        f"ALTER COLUMN {stored.name} SET DEFAULT {stored.column.default}"
        for stored in columns
        if stored.column.default is not None
    ]


def _alter(table: str, clauses: list[str]) -> str:
    return f'ALTER TABLE "{table}"\n  ' + ",\n  ".join(clauses)


def create_index(index: Index, name: str, table: str, how: str = "") -> str:
    """Return the statement that builds ``index`` as ``name``; ``how`` is CONCURRENTLY or IF NOT EXISTS."""
    return f'CREATE INDEX {how}"{name}" ON {index.definition(table)}'


def _drop_unlike(table: str) -> str:
    """Return a block that drops indexes of our names that are not ours: the reference's, and invalid ones."""
    keys = [(index.name(table), f"'{index.access}'") for index in INDEXES]
    keys += [(index_name(table, suffix), "NULL") for suffix in OBSOLETE]
    ours = ",\n      ".join(f"('{name}', {access})" for name, access in keys)
    return f"""DO $tracevault$
DECLARE
  unlike regclass;
BEGIN
  FOR unlike IN
    SELECT x.indexrelid
    FROM pg_catalog.pg_index AS x
    JOIN pg_catalog.pg_class AS i ON i.oid = x.indexrelid
    JOIN (VALUES
      {ours}
    ) AS ours (name, keys) ON ours.name = i.relname
    WHERE x.indrelid = to_regclass('"{table}"')
      AND (ours.keys IS NULL OR strpos(pg_get_indexdef(i.oid), ours.keys) = 0 OR NOT x.indisvalid)
  LOOP
    EXECUTE 'DROP INDEX ' || unlike;
  END LOOP;
END
$tracevault$"""


def step_sql(step: Step, table: str) -> str:
    """Return a step's statements as a script."""
    return "".join(f"{statement};\n\n" for statement in step_statements(step.number, table))


def generate_init_sql(table_name: str, *, distribution_column: str | None = None) -> str:
    """Return the SQL that makes ``table_name`` an audit table: all steps, safe to run again. Runs nothing.

    On a filled table of Tracevault 1.0.1 it adds columns and builds indexes while writers wait;
    ``tracevault migrate`` builds the indexes without that. With ``distribution_column``, such as ``tenant_id``, the
    table is then distributed over the nodes of a Citus cluster by it: every event has to have one, and it is part of
    the primary key, as Citus's rules ask. Raises `ConfigError` for a name that is not 1-63 ASCII letters, digits and
    underscores without a leading digit, and for a column that tables cannot be distributed by.
    """
    table = check_table_name(table_name)
    steps = [f"-- {step.number:03}: {step.title}\n{step_sql(step, table)}" for step in STEPS]
    if distribution_column is not None:
        steps.append(f"-- distribution over a Citus cluster\n{_distribution(table, distribution_column)}")
    return "".join(steps).rstrip() + "\n"


def _distribution(table: str, column: str) -> str:
    """Return what distributes a table, unless it is: no unique index may be without the column, which is never NULL."""
    if column not in DISTRIBUTABLE:
        raise ConfigError(
            f"`distribution_column` must be one of {', '.join(DISTRIBUTABLE)}, got {got(column)}",
            field="distribution_column",
        )
    key = "id" if column == "id" else f"{column}, id"
    return f"""DO $tracevault$
DECLARE
  key name;
BEGIN
  SELECT conname INTO STRICT key FROM pg_constraint WHERE conrelid = '"{table}"'::regclass AND contype = 'p';
  IF NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = '"{table}"'::regclass) THEN
    EXECUTE format('ALTER TABLE "{table}" DROP CONSTRAINT %I, ADD CONSTRAINT %I PRIMARY KEY ({key})', key, key);
  END IF;
END
$tracevault$;

SELECT create_distributed_table('"{table}"', '{column}')
WHERE NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = '"{table}"'::regclass);
"""


def sql_files() -> dict[str, str]:
    """Return the SQL files shipped with the package, by file name: one per step, for ``audit_logs``."""
    return {
        f"{step.file}.sql": (
            f"-- tracevault {step.number:03}: {step.title}\n"
            f"-- {step.caution[0].upper()}{step.caution[1:]}.\n"
            f'-- Safe to run again: psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f {step.file}.sql\n'
            "-- Made from tracevault.schema.ddl by `make sql`; do not edit.\n\n"
        )
        + step_sql(step, DEFAULT_TABLE).rstrip()
        + "\n"
        for step in STEPS
    }


def write_sql_files() -> None:
    """Write `sql_files` into the package, in place of those that are there."""
    MIGRATIONS.mkdir(exist_ok=True)
    for old in MIGRATIONS.glob("*.sql"):
        old.unlink()
    for name, text in sql_files().items():
        (MIGRATIONS / name).write_text(text, encoding="utf-8")
