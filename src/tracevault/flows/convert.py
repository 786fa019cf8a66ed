"""How a plain audit table becomes a partitioned one while it is written, without moving a row.

The old table becomes the first partition, of all that happened before a cutoff; events go on in partitions made from
there on. What takes long is done before, while writers go on: two indexes, and a CHECK of the cutoff, which later
spares PostgreSQL to look at every row. Then one transaction renames the old table, makes the partitioned one under its
name, with the same indexes, rights and guards, and attaches the old one. Interrupted before that, all of it can be
done again, or undone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from tracevault.config import Interval
from tracevault.errors import MigrationError
from tracevault.events.payload import iso_utc
from tracevault.flows import Flow, Query
from tracevault.flows.migrate import Plan, plan
from tracevault.flows.partitions import LOCK_TIMEOUT, Layout, look
from tracevault.schema import guards
from tracevault.schema.comparison import companion
from tracevault.schema.ddl import create_index
from tracevault.schema.grants import define_view
from tracevault.schema.indexes import PARTITIONED_INDEXES, PAYLOAD_INDEXES, Index
from tracevault.schema.partitions import BEGINNING, Range, bounds, default_name, floor, following, old_name
from tracevault.schema.rights import tenant_view

# The cutoff must not be reached while the conversion is under way: from then on events would be refused.
_MARGIN = timedelta(days=1)
# An event that claims to happen later than this is a mistake, and no cutoff is put behind it.
_LATEST = timedelta(days=400)

# For $1, the table's quoted name, $2, the name of our view: what cannot be taken along, and would be lost silently.
_OBSTACLES = f"""
SELECT 'foreign key ' || k.conname || ' refers to it' FROM pg_constraint AS k
WHERE k.confrelid = to_regclass($1) AND k.contype = 'f'
UNION ALL
SELECT 'it has the ' || CASE k.contype WHEN 'f' THEN 'foreign key ' ELSE 'constraint ' END || k.conname
FROM pg_constraint AS k WHERE k.conrelid = to_regclass($1) AND k.contype IN ('f', 'u', 'x')
UNION ALL
SELECT 'it has the trigger ' || t.tgname FROM pg_trigger AS t
WHERE t.tgrelid = to_regclass($1) AND NOT t.tgisinternal AND t.tgname NOT IN ('{guards.ROWS}', '{guards.TRUNCATE}')
UNION ALL
SELECT 'it has the rule ' || r.rulename FROM pg_rewrite AS r WHERE r.ev_class = to_regclass($1)
UNION ALL
SELECT DISTINCT 'the view ' || v.oid::regclass || ' reads it' FROM pg_depend AS d
JOIN pg_rewrite AS r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
JOIN pg_class AS v ON v.oid = r.ev_class
WHERE d.refobjid = to_regclass($1) AND d.refclassid = 'pg_class'::regclass AND v.oid <> d.refobjid
  AND v.relname <> $2
UNION ALL
SELECT 'table ' || i.inhrelid::regclass || ' inherits from it' FROM pg_inherits AS i WHERE i.inhparent = to_regclass($1)
UNION ALL
SELECT 'it is itself a partition, or inherits' FROM pg_inherits AS i WHERE i.inhrelid = to_regclass($1)
UNION ALL
SELECT 'the publication ' || p.pubname || ' has it' FROM pg_publication_rel AS m
JOIN pg_publication AS p ON p.oid = m.prpubid WHERE m.prrelid = to_regclass($1)
UNION ALL
SELECT 'the publication ' || p.pubname || ' has all tables, and would publish partitions by their own names'
FROM pg_publication AS p WHERE p.puballtables AND NOT p.pubviaroot
UNION ALL
SELECT what FROM pg_class AS c CROSS JOIN LATERAL (VALUES
  (c.relrowsecurity, 'it has row level security'),
  (c.relpersistence <> 'p', 'it is not a permanent table'),
  (c.relreplident <> 'd', 'its replica identity is not the default')
) AS asked (is_so, what) WHERE c.oid = to_regclass($1) AND is_so
UNION ALL
SELECT 'it has the identity column ' || a.attname FROM pg_attribute AS a
WHERE a.attrelid = to_regclass($1) AND a.attidentity <> '' AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY 1
"""

# What was granted on a table and its columns, as the words that grant it again.
_GRANTS = """
SELECT format('GRANT %s ON %%s TO %s%s', string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type),
  CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END,
  CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
FROM pg_class AS c CROSS JOIN LATERAL aclexplode(c.relacl) AS a
WHERE c.oid = to_regclass($1) AND a.grantee <> c.relowner GROUP BY a.grantee, a.is_grantable
UNION ALL
SELECT format('GRANT %s (%s) ON %%s TO %s%s', a.privilege_type,
  string_agg(quote_ident(t.attname), ', ' ORDER BY t.attnum),
  CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END,
  CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
FROM pg_class AS c JOIN pg_attribute AS t ON t.attrelid = c.oid CROSS JOIN LATERAL aclexplode(t.attacl) AS a
WHERE c.oid = to_regclass($1) AND a.grantee <> c.relowner AND NOT t.attisdropped
GROUP BY a.privilege_type, a.grantee, a.is_grantable
ORDER BY 1
"""

_DETAILS = """
SELECT (SELECT least(greatest(occurred_at, '0002-01-01Z'), '9990-01-01Z') FROM {table}
    ORDER BY occurred_at DESC LIMIT 1),
  pg_get_expr(cutoff.conbin, cutoff.conrelid), coalesce(cutoff.convalidated, false), quote_ident(key.conname),
  EXISTS (SELECT FROM pg_class AS v WHERE v.relnamespace = c.relnamespace AND v.relname = $3 AND v.relkind = 'v')
FROM set_config('TimeZone', 'UTC', true) AS zone, set_config('DateStyle', 'ISO, YMD', true) AS style, pg_class AS c
JOIN pg_constraint AS key ON key.conrelid = c.oid AND key.contype = 'p'
LEFT JOIN pg_constraint AS cutoff ON cutoff.conrelid = c.oid AND cutoff.conname = $2
WHERE c.oid = to_regclass($1)
"""


@dataclass(frozen=True)
class Stage:
    """One part of a conversion: statements that are run one by one, or in one transaction for which writers wait."""

    title: str
    statements: tuple[str, ...]
    together: bool = False


@dataclass(frozen=True)
class Conversion:
    """What is to be done, in this order; nothing where the table is partitioned already."""

    table: str
    by: Interval
    stages: tuple[Stage, ...]


def conversion(table: str, by: Interval, at: datetime | None = None) -> Flow[Conversion]:
    """Return what makes a table partitioned; refuse one with something that would be lost.

    ``at`` is the cutoff, which must be the beginning of an interval; by default the first one that is a day away and
    behind everything that is stored. In a transaction of the caller's.
    """
    layout = yield from look(table)
    (table_plan,) = yield from plan([table])
    if layout is None or not table_plan.state.exists:
        raise MigrationError(f"table `{table}` does not exist: `tracevault migrate --partition {by}` makes it")
    if layout.kind == "p":
        return Conversion(table, by, ())
    if table_plan.changes:
        raise MigrationError(f"table `{table}` is not up to date: run `tracevault migrate --table {table}` first")
    yield from _check_obstacles(layout)
    quoted, cutoff_name = f'"{table}"', companion(table, "_cutoff")
    found = yield Query(_DETAILS.replace("{table}", layout.beside(table)), (quoted, cutoff_name, tenant_view(table)))
    newest, check, checked, key, has_view = found.rows[0]
    cutoff = _cutoff(layout, by, newest, at)
    condition = f"(occurred_at < '{cutoff:%Y-%m-%d %H:%M:%S}+00'::timestamp with time zone)"
    granted = yield Query(_GRANTS, (quoted,))
    indexes = table_plan.state.indexes
    stages = [
        _unique_index(layout, indexes),
        _id_index(layout, indexes),
        *_check_stages(layout, cutoff_name, condition, None if check is None else str(check), checked=bool(checked)),
        Stage(
            "make the partitioned table under its name, and the old one its first partition",
            tuple(_swap(layout, table_plan, cutoff, cutoff_name, key, [row[0] for row in granted.rows], view=has_view)),
            together=True,
        ),
    ]
    return Conversion(table, by, tuple(stage for stage in stages if stage.statements))


def drop_cutoff(table: str) -> Flow[None]:
    """Let a table take events again that happen after the cutoff."""
    layout = yield from look(table)
    if layout is not None:
        name = companion(table, "_cutoff")
        yield Query(f'ALTER TABLE {layout.beside(table)} DROP CONSTRAINT IF EXISTS "{name}"', reads=False)


def drop_preparations(table: str) -> Flow[None]:
    """Drop what an interrupted conversion has built; outside a transaction."""
    layout = yield from look(table)
    if layout is not None and layout.kind == "r":
        for name in (_unique_name(table), _ID_INDEX.name(table)):
            yield Query(f"DROP INDEX CONCURRENTLY IF EXISTS {layout.beside(name)}", reads=False)


def unfinished(table: str) -> Flow[str | None]:
    """Return the condition that an interrupted conversion has left on a table; None if none has."""
    found = yield Query(
        "SELECT pg_get_expr(conbin, conrelid) FROM pg_constraint WHERE conrelid = to_regclass($1) AND conname = $2",
        (f'"{table}"', companion(table, "_cutoff")),
    )
    return str(found.rows[0][0]) if found.rows else None


_ID_INDEX = next(index for index in PARTITIONED_INDEXES if index.suffix == "id")


def _unique_name(table: str) -> str:
    return companion(table, "_time_key")


def _check_obstacles(layout: Layout) -> Flow[None]:
    found = yield Query(_OBSTACLES, (f'"{layout.table}"', tenant_view(layout.table)))
    if found.rows:
        raise MigrationError(
            f"table `{layout.table}` cannot be converted: {'; '.join(row[0] for row in found.rows)}. Remove that, and "
            "make it anew afterwards"
        )
    if not layout.may:
        raise MigrationError(f"this role may not convert table `{layout.table}`: do it as its owner")


def _cutoff(layout: Layout, by: Interval, newest: datetime | None, at: datetime | None) -> datetime:
    soonest = layout.now + _MARGIN
    least = max(soonest, newest or soonest)
    if least > layout.now + _LATEST and at is None:
        raise MigrationError(
            f"table `{layout.table}` has an event of the time {iso_utc(least)} or later, until which everything would "
            "go into one partition: say by --at from when on there should be others, later than that"
        )
    if at is None:
        return following(floor(least, by), by)
    if floor(at, by) != at:
        raise MigrationError(f"{iso_utc(at)} is not the beginning of a {by} in UTC")
    if at <= least:
        raise MigrationError(f"{iso_utc(at)} is too early: it has to be later than {iso_utc(least)}")
    return at


def _unique_index(layout: Layout, indexes: dict[str, dict[str, Any]]) -> Stage:
    name = _unique_name(layout.table)
    create = f'CREATE UNIQUE INDEX CONCURRENTLY "{name}" ON {layout.beside(layout.table)} (occurred_at, id)'
    return Stage(f"build the unique index {name}", tuple(_build(layout, name, create, indexes)))


def _id_index(layout: Layout, indexes: dict[str, dict[str, Any]]) -> Stage:
    name = _ID_INDEX.name(layout.table)
    create = create_index(_ID_INDEX, name, layout.table, "CONCURRENTLY ")
    return Stage(f"build the index {name}", tuple(_build(layout, name, create, indexes)))


def _build(layout: Layout, name: str, create: str, indexes: dict[str, dict[str, Any]]) -> Iterable[str]:
    found = indexes.get(name)
    if found is not None and found["valid"]:
        return
    if found is not None:  # an interrupted build left it
        yield f"DROP INDEX CONCURRENTLY {layout.beside(name)}"
    yield create


def _check_stages(layout: Layout, name: str, condition: str, found: str | None, *, checked: bool) -> Iterable[Stage]:
    table = layout.beside(layout.table)
    if found != condition:
        statements = [f'ALTER TABLE {table} DROP CONSTRAINT "{name}"'] if found is not None else []
        statements.append(f'ALTER TABLE {table} ADD CONSTRAINT "{name}" CHECK {condition} NOT VALID')
        yield Stage(
            "say that the old table has what is before the cutoff",
            (f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'", *statements),
            together=True,
        )
    if found != condition or not checked:
        yield Stage("check that", (f'ALTER TABLE {table} VALIDATE CONSTRAINT "{name}"',))


def _swap(
    layout: Layout, table_plan: Plan, cutoff: datetime, cutoff_name: str, key: str, grants: list[str], *, view: bool
) -> Iterable[str]:
    table = layout.table
    old_table = old_name(table, cutoff)
    new, old = layout.beside(table), layout.beside(old_table)
    present: list[Index] = [
        index
        for index in (*PARTITIONED_INDEXES, *PAYLOAD_INDEXES)
        if index is _ID_INDEX or index.name(table) in table_plan.state.indexes
    ]
    yield f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"
    # The view first: whoever reads it holds it while he waits for the table.
    if view:
        yield f"LOCK TABLE {layout.beside(tenant_view(table))} IN ACCESS EXCLUSIVE MODE"
    yield f"LOCK TABLE {new} IN ACCESS EXCLUSIVE MODE"
    yield f'ALTER TABLE {new} RENAME TO "{old_table}"'
    for index in present:
        yield f'ALTER INDEX {layout.beside(index.name(table))} RENAME TO "{index.name(old_table)}"'
    yield f"ALTER TABLE {old} DROP CONSTRAINT {key}"
    unique, key_name = _unique_name(table), companion(old_table, "_pkey")
    yield f'ALTER TABLE {old} ADD CONSTRAINT "{key_name}" PRIMARY KEY USING INDEX "{unique}"'
    like = "INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING CONSTRAINTS INCLUDING STORAGE INCLUDING COMMENTS"
    yield f"CREATE TABLE {new} (LIKE {old} {like}, PRIMARY KEY (occurred_at, id)) PARTITION BY RANGE (occurred_at)"
    yield f'ALTER TABLE {new} DROP CONSTRAINT "{cutoff_name}"'
    if not layout.owned:
        yield f"ALTER TABLE {new} OWNER TO {layout.owner}"
    for index in present:
        yield f'CREATE INDEX "{index.name(table)}" ON {layout.schema}.{index.definition(table)}'
    for grant in grants:
        yield grant.replace("%s", new)
    yield f"ALTER TABLE {new} ATTACH PARTITION {old} {bounds(Range(BEGINNING, cutoff))}"
    yield f'ALTER TABLE {old} DROP CONSTRAINT "{cutoff_name}"'
    yield f"CREATE TABLE {layout.beside(default_name(table))} PARTITION OF {new} DEFAULT"
    if not layout.owned:
        yield f"ALTER TABLE {layout.beside(default_name(table))} OWNER TO {layout.owner}"
    for grantee in sorted({grant.split(" TO ", 1)[1].removesuffix(" WITH GRANT OPTION") for grant in grants}):
        yield f"REVOKE ALL ON {old} FROM {grantee} CASCADE"
    if layout.guarded:
        yield guards.install(table)
    if view:
        yield define_view(table)
