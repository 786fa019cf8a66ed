"""What a table is, against what it should be: the differences, and the steps that remove them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from tracevault.event.record import COLUMNS, StoredColumn
from tracevault.schema.ddl import add_column_statements, generation_expression, set_default_statements
from tracevault.schema.indexes import INDEXES, OBSOLETE, Index, index_name

# Above this many rows start-up refuses to rewrite a table; `tracevault migrate` announces it and does it.
REWRITE_LIMIT = 100_000

# One round trip for all tables. Names resolve by search_path, as they do in every other statement.
INSPECT = """
SELECT t.name, c.relkind::text, c.reltuples::bigint, pg_table_size(c.oid),
  (SELECT json_agg(json_build_object(
      'name', a.attname, 'type', format_type(a.atttypid, a.atttypmod), 'not_null', a.attnotnull,
      'generated', a.attgenerated::text, 'expression', pg_get_expr(d.adbin, d.adrelid)) ORDER BY a.attnum)
   FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
   WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)::text,
  (SELECT json_agg(json_build_object(
      'name', i.relname, 'primary', x.indisprimary, 'valid', x.indisvalid, 'definition', pg_get_indexdef(i.oid)))
   FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid WHERE x.indrelid = c.oid)::text,
  CASE WHEN c.relkind = 'p' THEN pg_get_partkeydef(c.oid) END,
  n.nspname::text
FROM unnest($1::text[]) WITH ORDINALITY AS t (name, place)
LEFT JOIN pg_class c ON c.oid = to_regclass(quote_ident(t.name))
LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
ORDER BY t.place
"""

_KINDS = {"r": "table", "p": "partitioned table", "v": "view", "m": "materialized view", "f": "foreign table"}


@dataclass(frozen=True)
class TableState:
    """One table as the catalog shows it. ``rows`` is the planner's estimate, None where it never counted."""

    name: str
    kind: str | None
    rows: int | None
    size_bytes: int
    columns: dict[str, dict[str, Any]]
    indexes: dict[str, dict[str, Any]]
    partition_key: str | None
    schema: str | None

    @property
    def exists(self) -> bool:
        """Whether there is anything of that name."""
        return self.kind is not None

    @property
    def partitioned(self) -> bool:
        """Whether it is a partitioned table."""
        return self.kind == "p"


def table_state(row: tuple[Any, ...]) -> TableState:
    """Return the state in one row of `INSPECT`."""
    name, kind, rows, size, columns, indexes, partition_key, schema = row
    return TableState(
        name,
        kind,
        None if rows is None or rows < 0 else rows,
        size or 0,
        {column["name"]: column for column in json.loads(columns or "[]")},
        {index["name"]: index for index in json.loads(indexes or "[]")},
        partition_key,
        schema,
    )


def foreign_traits(state: TableState) -> list[str]:
    """Return why an existing table is not an audit table of ours; empty if it is, perhaps an older one."""
    if state.kind not in {"r", "p"}:
        return [f"it is a {_KINDS.get(state.kind or '', 'relation of another kind')}, not a table"]
    traits = []
    for stored in COLUMNS:
        traits += _column_traits(stored, state.columns.get(stored.name))
    known = {stored.name for stored in COLUMNS}
    traits += [
        f"column {name} is NOT NULL without a default and not ours, so no event could be stored"
        for name, column in state.columns.items()
        if name not in known and column["not_null"] and column["expression"] is None
    ]
    return traits + _key_traits(state)


def _column_traits(stored: StoredColumn, found: dict[str, Any] | None) -> list[str]:
    name, column, nullable = stored
    if found is None:
        return [f"column {name} is missing"] if column.since == 1 else []
    traits = []
    if found["type"] != column.sql_type:
        traits.append(f"column {name} is {found['type']}, not {column.sql_type}")
    if nullable and found["not_null"] and found["expression"] is None:
        traits.append(f"column {name} is NOT NULL")
    if column.generated is not None:
        wanted = generation_expression(column.generated)
        if not found["generated"]:
            traits.append(f"column {name} is not generated")
        elif _normal(found["expression"] or "") != _normal(wanted):
            traits.append(f"column {name} is generated as {found['expression']}, not {wanted}")
    elif found["generated"]:
        traits.append(f"column {name} is generated")
    elif name == "created_at" and found["expression"] is None:
        traits.append(f"column {name} has no default")
    return traits


def _normal(expression: str) -> str:
    """Strip what PostgreSQL adds when it prints an expression: casts, brackets, blanks."""
    return re.sub(r"::[a-z ]+|[()\s]", "", expression.lower())


def _key_traits(state: TableState) -> list[str]:
    keys = [index["definition"] for index in state.indexes.values() if index["primary"]]
    found = keys[0][keys[0].rindex("(") :] if keys else "none"
    if not state.partitioned:
        return [] if found == "(id)" else [f"its primary key is {found}, not (id)"]
    traits = []
    if state.partition_key != "RANGE (occurred_at)":
        traits.append(f"it is partitioned by {state.partition_key}, not RANGE (occurred_at)")
    if found != "(occurred_at, id)":
        traits.append(f"its primary key is {found}, not (occurred_at, id)")
    return traits


@dataclass(frozen=True)
class Change:
    """One thing to do to a table: what it is, in words, and its statements.

    ``kind``: ``columns`` is instant; ``rewrite`` writes the whole table anew under an exclusive lock;
    ``index`` is built, CONCURRENTLY where the table is filled.
    """

    kind: Literal["columns", "rewrite", "index"]
    summary: str
    statements: tuple[str, ...] = ()
    index: Index | None = None


def column_changes(state: TableState) -> list[Change]:
    """Return what is missing in the columns of an existing table."""
    missing = [stored for stored in COLUMNS if stored.name not in state.columns]
    generated = [stored for stored in missing if stored.column.generated is not None]
    plain = [stored for stored in missing if stored.column.generated is None]
    undefaulted = [
        stored
        for stored in COLUMNS
        if stored.column.default and stored.name in state.columns and state.columns[stored.name]["expression"] is None
    ]
    changes = []
    if generated:
        names = ", ".join(stored.name for stored in generated)
        summary = f"add generated columns {names} (rewrites the table)"
        changes.append(Change("rewrite", summary, tuple(add_column_statements(state.name, generated))))
    if plain:
        names = ", ".join(stored.name for stored in plain)
        changes.append(Change("columns", f"add columns {names}", tuple(add_column_statements(state.name, plain))))
    if undefaulted:
        names = ", ".join(stored.name for stored in undefaulted)
        statements = tuple(set_default_statements(state.name, undefaulted))
        changes.append(Change("columns", f"set the default of {names}", statements))
    return changes


def index_changes(state: TableState) -> list[Change]:
    """Return the indexes that are missing, invalid, or the reference's under our name; and obsolete ones."""
    changes = []
    for index in INDEXES:
        name = index.name(state.name)
        found = state.indexes.get(name)
        if found is None:
            changes.append(Change("index", f"build index {name}", index=index))
        elif not found["valid"] or not _same_index(found["definition"], index):
            changes.append(Change("index", f"replace index {name}", index=index))
    for suffix in OBSOLETE:
        name = index_name(state.name, suffix)
        if name in state.indexes:
            changes.append(Change("index", f"drop index {name}", (f'DROP INDEX IF EXISTS "{name}"',)))
    return changes


def _same_index(definition: str, index: Index) -> bool:
    """Compare keys only: a predicate can be printed in many ways, and none of ours was ever another."""
    keys, _, _where = definition.partition(" WHERE ")
    found = keys[keys.index("USING btree (") + len("USING btree (") : -1] if "USING btree (" in keys else ""
    return found == ", ".join(index.columns)


def temporary_index_name(index: Index, table: str) -> str:
    """Return the name under which an index is built before it takes its place."""
    return index_name(table, f"tmp_{index.suffix}")[:63]
