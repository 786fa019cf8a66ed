"""How partitions are looked at, made ahead, and filled with what waits for them in the default partition."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from tracevault.config import Interval
from tracevault.errors import MigrationError
from tracevault.flows import Flow, Query
from tracevault.schema import guards
from tracevault.schema.partitions import (
    AHEAD,
    LOOK,
    Partition,
    Range,
    bounds,
    default_name,
    interval_of,
    missing,
    partition,
    partition_name,
    previous,
)

# Whoever waits for a lock makes writers wait: no longer than this.
LOCK_TIMEOUT = "500ms"
# Of the default partition no more months than this are made into partitions at once, or a wrong clock makes thousands.
MOST_STRAYED = 240

_LAYOUT = f"""
SELECT c.relkind::text, quote_ident(n.nspname::text), quote_ident(pg_get_userbyid(c.relowner)::text),
  pg_get_userbyid(c.relowner) = current_user,
  has_schema_privilege(n.oid, 'CREATE') AND pg_has_role(c.relowner, 'USAGE'), clock_timestamp(),
  EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgrelid = c.oid AND t.tgname = '{guards.ROWS}'),
  (SELECT string_agg(quote_ident(a.attname::text), ', ' ORDER BY a.attnum) FROM pg_attribute AS a
   WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '')
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass($1)
"""


@dataclass(frozen=True)
class Layout:
    """A table and its partitions; ``schema``, ``owner`` and ``columns`` are quoted, generated columns left out."""

    table: str
    kind: str
    schema: str
    owner: str
    owned: bool
    """Whether the present role itself is the owner."""
    may: bool
    """Whether the present role may make partitions."""
    now: datetime
    guarded: bool
    columns: str
    partitions: tuple[Partition, ...]

    @property
    def default(self) -> Partition | None:
        """The default partition."""
        return next((found for found in self.partitions if found.default), None)

    def beside(self, name: str) -> str:
        """Return a name in the table's schema as SQL."""
        return f'{self.schema}."{name}"'


def look(table: str) -> Flow[Layout | None]:
    """Return how a table is partitioned; None where there is none of that name. In a transaction of the caller's."""
    found = yield Query(_LAYOUT, (f'"{table}"',))
    if not found.rows:
        return None
    parts = yield Query(LOOK, (f'"{table}"',))
    kind, schema, owner, owned, may, now, guarded, columns = found.rows[0]
    return Layout(
        table, kind, schema, owner, owned, may, now, guarded, columns, tuple(partition(row) for row in parts.rows)
    )


def interval(layout: Layout, by: Interval | None) -> Interval:
    """Return the length of a table's partitions: as asked for, else as they are; refuse a table that has none."""
    if layout.kind != "p":
        raise MigrationError(
            f"table `{layout.table}` is not partitioned: `tracevault partitions convert` does that while it is written"
        )
    found = by or interval_of(layout.partitions)
    if found is None:
        raise MigrationError(
            f"the partitions of table `{layout.table}` are neither days nor weeks nor months: say which by --by"
        )
    return found


def ahead(layout: Layout, by: Interval, count: int = AHEAD) -> list[Range]:
    """Return the partitions that are missing of the present interval and the next ``count``."""
    return missing(layout.partitions, by, layout.now, count + 1)


def strayed(layout: Layout, by: Interval) -> Flow[list[Range]]:
    """Return the partitions that are missing for what the default partition holds, the oldest first, and not too many.

    What has no date that Python knows stays there.
    """
    default = layout.default
    if default is None or not default.filled:
        return []
    found = yield Query(
        "SELECT DISTINCT extract(year FROM month)::int, extract(month FROM month)::int, extract(day FROM month)::int "
        f"FROM (SELECT date_trunc($1, occurred_at AT TIME ZONE 'UTC') AS month FROM {default.sql} "
        "WHERE occurred_at >= '0002-01-01Z' AND occurred_at < '9990-01-01Z') AS months ORDER BY 1, 2, 3 LIMIT $2",
        (by, MOST_STRAYED),
    )
    ranges: list[Range] = []
    for year, month, day in found.rows:
        ranges += missing(layout.partitions, by, datetime(year, month, day, tzinfo=UTC), 1)
    return ranges


def make(layout: Layout, by: Interval, wanted: Range, most: int | None = None) -> Flow[int]:
    """Make one partition, in one transaction of the caller's; return how many rows came out of the default one.

    Writers go on, but those whose events go to the default partition: they wait while its rows move. Raises
    `MigrationError` where these are more than ``most``.
    """
    default = layout.default
    if default is not None and default.filled and most is not None:
        yield from _refuse_long_move(layout, default, wanted, most)
    new = yield from _make_table(layout, partition_name(layout.table, wanted.start, by))
    moved = 0 if default is None or not default.filled else (yield from _move(layout, default, new, wanted))
    yield from _attach(layout, new, bounds(wanted))
    return moved


def make_default(layout: Layout) -> Flow[None]:
    """Make the default partition, in one transaction of the caller's."""
    new = yield from _make_table(layout, default_name(layout.table))
    yield from _attach(layout, new, "DEFAULT")


def _make_table(layout: Layout, name: str) -> Flow[str]:
    """Make a table that can become a partition; return its name as SQL."""
    new = layout.beside(name)
    taken = yield Query("SELECT to_regclass($1) IS NOT NULL", (new,))
    if taken.rows[0][0]:
        raise MigrationError(
            f"table `{layout.table}` needs another partition, whose name {new} a relation has that is none: rename that"
        )
    yield Query(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
    like = "INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING CONSTRAINTS INCLUDING STORAGE"
    yield Query(f"CREATE TABLE {new} (LIKE {layout.beside(layout.table)} {like})")
    if not layout.owned:
        yield Query(f"ALTER TABLE {new} OWNER TO {layout.owner}")
    return new


def _attach(layout: Layout, new: str, bounds: str) -> Flow[None]:
    """Make a table a partition. Unlike CREATE TABLE ... PARTITION OF, this lets writers go on."""
    yield Query(f"ALTER TABLE {layout.beside(layout.table)} ATTACH PARTITION {new} {bounds}")
    if layout.guarded:
        yield Query(guards.install(layout.table))


def _refuse_long_move(layout: Layout, default: Partition, wanted: Range, most: int) -> Flow[None]:
    found = yield Query(
        "SELECT count(*) FROM "
        f"(SELECT FROM {default.sql} WHERE occurred_at >= $1 AND occurred_at < $2 LIMIT $3) AS moving",
        (wanted.start, wanted.end, most + 1),
    )
    if found.rows[0][0] > most:
        raise MigrationError(
            f"the default partition of table `{layout.table}` has more than {most:,} events from "
            f"{wanted.start:%Y-%m-%d} on: run `tracevault partitions ensure --table {layout.table}` at a quiet time, "
            "to move them"
        )


def _move(layout: Layout, default: Partition, new: str, wanted: Range) -> Flow[int]:
    """Move what belongs to a new partition out of the default one: the same rows, as they were stored and sealed."""
    yield Query(f"LOCK TABLE {default.sql} IN ACCESS EXCLUSIVE MODE")
    if not layout.owned:
        yield Query(f"SET LOCAL ROLE {layout.owner}")
    # The guards let the owner pass who says that he means it.
    yield Query(f"SELECT set_config('{guards.CUSTODY}', 'on', true)")
    done = yield Query(
        f"WITH moved AS (DELETE FROM {default.sql} WHERE occurred_at >= $1 AND occurred_at < $2 "
        f"RETURNING {layout.columns}), stored AS "
        f"(INSERT INTO {new} ({layout.columns}) SELECT * FROM moved RETURNING 1) SELECT count(*) FROM stored",
        (wanted.start, wanted.end),
    )
    yield Query(f"SELECT set_config('{guards.CUSTODY}', 'off', true)")
    if not layout.owned:
        yield Query("RESET ROLE")
    return int(done.rows[0][0])


def make_first(table: str, by: Interval) -> Flow[None]:
    """Make the partitions of a table that was made in this transaction, the previous interval's as well."""
    layout = yield from look(table)
    assert layout is not None
    for wanted in missing((), by, previous(layout.now, by), AHEAD + 2):
        yield from make(layout, by, wanted)
    yield from make_default(layout)
