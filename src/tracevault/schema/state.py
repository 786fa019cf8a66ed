"""What a table is, against what it should be: the differences, and the steps that remove them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from tracevault.events.record import COLUMNS, INSERT_COLUMNS, StoredColumn
from tracevault.schema.comparison import define, function_name, is_ours
from tracevault.schema.ddl import add_columns, generation_expression, set_defaults
from tracevault.schema.indexes import (
    INDEXES,
    OBSOLETE,
    PARTITIONED_INDEXES,
    PAYLOAD_INDEXES,
    Index,
    index_name,
    temporary_name,
)

# Above this many rows start-up refuses to rewrite a table; `tracevault migrate` announces it and does it.
REWRITE_LIMIT = 100_000

_IS_OURS = is_ours("$4", """(quote_ident(n.nspname::text) || '."' || t.name || '"')""")

# One round trip for all tables. Names resolve by search_path, as they do in every other statement. Sizes and
# expressions need a brief lock on each table, for which the query waits no longer than $2. Indexes are read from
# the catalog alone: pg_get_indexdef fails on one that another process drops at this moment.
INSPECT = f"""
SELECT t.name, c.relkind::text, stored.rows, stored.bytes, stored.filled,
  (SELECT json_agg(json_build_object(
      'name', a.attname, 'type', format_type(a.atttypid, a.atttypmod), 'not_null', a.attnotnull,
      'identity', a.attidentity::text, 'generated', a.attgenerated::text,
      'expression', pg_get_expr(d.adbin, d.adrelid)) ORDER BY a.attnum)
   FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
   WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)::text,
  (SELECT json_agg(json_build_object('name', i.relname, 'primary', x.indisprimary, 'valid', x.indisvalid,
      'partial', x.indpred IS NOT NULL, 'keys', (
        SELECT string_agg(coalesce(a.attname, '(expression)')
          || CASE WHEN o.opcdefault THEN '' ELSE ' ' || o.opcname END
          || CASE k.option WHEN 0 THEN '' WHEN 3 THEN ' DESC' ELSE ' (other order)' END, ', ' ORDER BY k.place)
        FROM ROWS FROM (unnest(x.indkey::int2[]), unnest(x.indclass::oid[]), unnest(x.indoption::int2[]))
          WITH ORDINALITY AS k (attnum, opclass, option, place)
        LEFT JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = k.attnum
        JOIN pg_opclass o ON o.oid = k.opclass)))
   FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid WHERE x.indrelid = c.oid)::text,
  CASE WHEN c.relkind = 'p' THEN pg_get_partkeydef(c.oid) END,
  n.nspname::text,
  (SELECT {_IS_OURS}
   FROM pg_proc p WHERE p.oid = to_regprocedure(quote_ident(n.nspname::text) || '.' || t.signature)),
  coalesce(has_schema_privilege(n.oid, 'CREATE') AND pg_has_role(c.relowner, 'USAGE'), false)
FROM set_config('lock_timeout', $2, true)
CROSS JOIN ROWS FROM (unnest($1::text[]), unnest($3::text[])) WITH ORDINALITY AS t (name, signature, place)
LEFT JOIN pg_class c ON c.oid = to_regclass(quote_ident(t.name))
LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
  SELECT sum(nullif(p.reltuples, -1))::bigint AS rows, sum(pg_table_size(p.oid))::bigint AS bytes,
    coalesce(sum(pg_relation_size(p.oid)) > 0, false) AS filled
  FROM unnest(CASE c.relkind WHEN 'p' THEN ARRAY(SELECT relid FROM pg_partition_tree(c.oid)) ELSE ARRAY[c.oid] END)
    AS part (oid)
  JOIN pg_class p ON p.oid = part.oid AND p.relkind = 'r'
) AS stored
ORDER BY t.place
"""

_EVERY = (*PARTITIONED_INDEXES, *PAYLOAD_INDEXES)
_KINDS = {"r": "table", "p": "partitioned table", "v": "view", "m": "materialized view", "f": "foreign table"}


@dataclass(frozen=True)
class TableState:
    """One table as the catalog shows it.

    ``rows`` is the planner's estimate, None where it never counted; ``filled``: it occupies space, so that it
    may hold rows; ``schema`` is where it was found. ``function`` is None where the table lacks its function, and
    False where that is not as it should be; ``may_define``: this role may probably make it.
    """

    name: str
    kind: str | None
    rows: int | None
    size_bytes: int
    filled: bool
    columns: dict[str, dict[str, Any]]
    indexes: dict[str, dict[str, Any]]
    partition_key: str | None
    schema: str | None
    function: bool | None
    may_define: bool

    @property
    def exists(self) -> bool:
        """Whether there is anything of that name."""
        return self.kind is not None

    @property
    def partitioned(self) -> bool:
        """Whether it is a partitioned table."""
        return self.kind == "p"

    def beside(self, name: str) -> str:
        """Return ``name``, of an index of this table, quoted and with its schema."""
        return f'"{(self.schema or "").replace(chr(34), chr(34) * 2)}"."{name}"'


def table_state(row: tuple[Any, ...]) -> TableState:
    """Return the state in one row of `INSPECT`."""
    name, kind, rows, size, filled, columns, indexes, partition_key, schema, function, may_define = row
    return TableState(
        name,
        kind,
        rows,
        size or 0,
        filled,
        {column["name"]: column for column in json.loads(columns or "[]")},
        {index["name"]: index for index in json.loads(indexes or "[]")},
        partition_key,
        schema,
        function,
        may_define,
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
        if name not in known and column["not_null"] and column["expression"] is None and not column["identity"]
    ]
    return traits + _key_traits(state)


def _column_traits(stored: StoredColumn, found: dict[str, Any] | None) -> list[str]:
    name, column, nullable = stored
    if found is None:
        return [f"column {name} is missing"] if column.since == 1 else []
    traits = []
    if found["type"] != column.sql_type:
        traits.append(f"column {name} is {found['type']}, not {column.sql_type}")
    if nullable and found["not_null"] and (name in INSERT_COLUMNS or column.generated is not None):
        traits.append(f"column {name} is NOT NULL")
    if not nullable and not found["not_null"]:
        traits.append(f"column {name} is not NOT NULL")
    if column.generated is not None:
        wanted = generation_expression(column.generated)
        if found["generated"] != "s":
            traits.append(f"column {name} is not GENERATED ALWAYS ... STORED")
        elif _normal(found["expression"] or "") != _normal(wanted):
            traits.append(f"column {name} is generated as {found['expression']}, not {wanted}")
    elif found["generated"]:
        traits.append(f"column {name} is generated")
    elif name == "created_at" and found["expression"] is None:
        traits.append(f"column {name} has no default")
    return traits


def _normal(expression: str) -> str:
    """Strip what PostgreSQL adds when it prints an expression: casts, brackets, blanks."""
    return re.sub(r"::[a-z ]+|[()\s]", "", expression)


def _key_traits(state: TableState) -> list[str]:
    keys = [index["keys"] for index in state.indexes.values() if index["primary"]]
    found = f"({keys[0]})" if keys else "none"
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
    """One thing to do to a table: what it is, in words, and what it takes.

    ``kind``: ``columns`` is instant; ``rewrite`` writes the whole table anew under an exclusive lock; ``index``
    builds ``index``, unless it is ``built`` under its temporary name, and drops the indexes ``drops``; ``function``
    is instant, and waits for nobody.
    """

    kind: Literal["columns", "rewrite", "index", "function"]
    summary: str
    statement: str = ""
    index: Index | None = None
    built: bool = False
    drops: tuple[str, ...] = ()


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
        summary = f"add generated columns {_names(generated)}, which writes the table anew ({_size(state)})"
        changes.append(Change("rewrite", summary, add_columns(state.name, generated)))
    if plain:
        changes.append(Change("columns", f"add columns {_names(plain)}", add_columns(state.name, plain)))
    if undefaulted:
        statement = set_defaults(state.name, undefaulted)
        changes.append(Change("columns", f"set the default of {_names(undefaulted)}", statement))
    return changes


def _names(columns: list[StoredColumn]) -> str:
    return ", ".join(stored.name for stored in columns)


def _size(state: TableState) -> str:
    size = f"{state.size_bytes / 1e6:,.1f} MB"
    return size if state.rows is None else f"{size}, about {state.rows:,} rows"


def index_changes(state: TableState, *, payloads: bool = False) -> list[Change]:
    """Return what is to do: drop what an interrupted run left, build or replace our indexes, drop obsolete ones.

    Indexes of payloads are built only with ``payloads``; those that are there stay.
    """
    found = state.indexes
    leftovers = {temporary_name(kind, index.name(state.name)) for kind in ("new", "old") for index in _EVERY}
    changes = []
    wanted = PARTITIONED_INDEXES if state.partitioned else INDEXES
    for index in (*wanted, *PAYLOAD_INDEXES) if payloads else wanted:
        name = index.name(state.name)
        if name in found and _is(found[name], index):
            continue
        temporary = temporary_name("new", name)
        built = temporary in found and _is(found[temporary], index)
        if built:
            leftovers.remove(temporary)
        drops = (name,) if name in found else ()
        verb = "replace" if drops else "build"
        changes.append(Change("index", f"{verb} index {name}", index=index, built=built, drops=drops))
    obsolete = [index_name(state.name, suffix) for suffix in OBSOLETE]
    return [
        *(Change("index", f"drop index {name}", drops=(name,)) for name in sorted(leftovers) if name in found),
        *changes,
        *(Change("index", f"drop index {name}", drops=(name,)) for name in obsolete if name in found),
    ]


def function_changes(state: TableState) -> list[Change]:
    """Return what is to do about the function that compares."""
    if state.function:
        return []
    verb = "make" if state.function is None else "replace"
    return [Change("function", f"{verb} function {function_name(state.name)}", define(state.name))]


def _is(found: dict[str, Any], index: Index) -> bool:
    """Whether an index is usable and ours. A predicate can be printed in many ways, so it only has to be there."""
    keys = ", ".join("(expression)" if column.startswith("(") else column for column in index.columns)
    return bool(found["valid"]) and found["keys"] == keys and found["partial"] == (index.where is not None)
