"""Native range partitions of an audit table by `occurred_at`: which there should be, and the SQL that makes them.

Bounds are in UTC. A partition goes from its first moment to before its end. One more, the default partition, takes
what no other does, so that an event from a wrong clock, or a partition that nobody made, loses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import cast

from tracevault.config import INTERVALS, Interval
from tracevault.schema.comparison import companion

# What stands for MINVALUE and MAXVALUE. PostgreSQL's times begin earlier and end later than Python's, so that a bound
# out there is one of these as well.
BEGINNING = datetime.min.replace(tzinfo=UTC)
END = datetime.max.replace(tzinfo=UTC)

# Partitions that are made ahead, and may be asked for.
AHEAD = 3
MOST_AHEAD = 1000

# For $1, a table's quoted name: its partitions, their bounds as text in UTC, and whether they may hold rows.
LOOK = """
SELECT c.relname::text, quote_ident(n.nspname::text), pg_get_expr(c.relpartbound, c.oid),
  (SELECT coalesce(sum(pg_relation_size(t.relid)), 0) > 0 FROM pg_partition_tree(c.oid) AS t WHERE t.isleaf),
  (SELECT coalesce(sum(nullif(l.reltuples, -1)), 0)::bigint FROM pg_partition_tree(c.oid) AS t
   JOIN pg_class AS l ON l.oid = t.relid WHERE t.isleaf),
  (SELECT coalesce(sum(pg_total_relation_size(t.relid)), 0)::bigint FROM pg_partition_tree(c.oid) AS t WHERE t.isleaf)
FROM set_config('TimeZone', 'UTC', true) AS zone, set_config('DateStyle', 'ISO, YMD', true) AS style,
  pg_inherits AS i
JOIN pg_class AS c ON c.oid = i.inhrelid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE i.inhparent = to_regclass($1) AND NOT i.inhdetachpending
ORDER BY c.relname
"""

_BOUNDS = re.compile(r"FOR VALUES FROM \((.*)\) TO \((.*)\)")
_SUFFIX = re.compile(r"_(?:\d{4}_\d\d(?:_\d\d)?|default|before_\d{4}_\d\d_\d\d)$", re.ASCII)
_LENGTH = {"day": timedelta(days=1), "week": timedelta(days=7)}


@dataclass(frozen=True)
class Partition:
    """One partition as the catalog shows it; the default one has all of time, and takes what the others do not.

    ``schema`` is quoted: that of the table, unless somebody else made the partition.
    """

    name: str
    schema: str
    start: datetime
    end: datetime
    default: bool
    filled: bool
    """It occupies space, so that it may hold rows."""
    rows: int
    """The planner's estimate."""
    size_bytes: int

    @property
    def sql(self) -> str:
        """Its name as SQL."""
        return f'{self.schema}."{self.name.replace(chr(34), chr(34) * 2)}"'


@dataclass(frozen=True)
class Range:
    """A stretch of time that a partition is to be made for."""

    start: datetime
    end: datetime


def partition(row: Sequence[object]) -> Partition:
    """Return the partition in one row of `LOOK`."""
    name, schema, bounds, filled, rows, size = cast("tuple[str, str, str, bool, int, int]", tuple(row))
    found = _BOUNDS.fullmatch(bounds)
    if found is None:
        return Partition(name, schema, BEGINNING, END, True, filled, rows, size)
    start, end = map(_bound, found.groups())
    return Partition(name, schema, start, end, False, filled, rows, size)


def _bound(text: str) -> datetime:
    text = text.strip("'")
    if text in {"MINVALUE", "-infinity"} or text.endswith(" BC"):
        return BEGINNING
    if text in {"MAXVALUE", "infinity"} or not re.match(r"\d{4}-", text):
        return END
    return datetime.fromisoformat(text).astimezone(UTC)


def floor(moment: datetime, by: Interval) -> datetime:
    """Return the first moment of the interval that ``moment`` lies in: midnight UTC, of a Monday, of a first."""
    day = moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if by == "week":
        return day - timedelta(days=day.weekday())
    return day.replace(day=1) if by == "month" else day


def following(start: datetime, by: Interval, count: int = 1) -> datetime:
    """Return the first moment of the interval that is ``count`` after the one that begins at ``start``."""
    if by != "month":
        return start + _LENGTH[by] * count
    years, month = divmod(start.month - 1 + count, 12)
    return start.replace(year=start.year + years, month=month + 1)


def previous(moment: datetime, by: Interval) -> datetime:
    """Return the first moment of the interval before the one that ``moment`` lies in."""
    return floor(floor(moment, by) - timedelta(days=1), by)


def interval_of(partitions: Iterable[Partition]) -> Interval | None:
    """Return the interval of the newest partition that has one; None if none has."""
    for found in sorted(partitions, key=lambda one: one.start, reverse=True):
        if not found.default and found.start != BEGINNING:
            for by in INTERVALS:
                if floor(found.start, by) == found.start and following(found.start, by) == found.end:
                    return by
    return None


def missing(partitions: Iterable[Partition], by: Interval, first: datetime, count: int) -> list[Range]:
    """Return what is not covered of ``count`` intervals from the one of ``first`` on, cut at their bounds."""
    covered = sorted((found.start, found.end) for found in partitions if not found.default)
    ranges = []
    start = floor(first, by)
    for _ in range(count):
        end = following(start, by)
        at = start
        for taken, until in covered:
            if until <= at or taken >= end:
                continue
            if taken > at:
                ranges.append(Range(at, taken))
            at = until
        if at < end:
            ranges.append(Range(at, end))
        start = end
    return ranges


def partition_name(table: str, start: datetime, by: Interval) -> str:
    """Return the name of the partition that begins at ``start``: ``audit_logs_2026_01``, or with the day."""
    if by == "month" and start.day == 1:
        return companion(table, f"_{start:%Y_%m}")
    return companion(table, f"_{start:%Y_%m_%d}")


def default_name(table: str) -> str:
    """Return the name of the default partition."""
    return companion(table, "_default")


def old_name(table: str, cutoff: datetime) -> str:
    """Return the name that a plain table has as the partition of everything before ``cutoff``."""
    return companion(table, f"_before_{cutoff:%Y_%m_%d}")


def is_partition_name(table: str, name: str) -> bool:
    """Whether ``name`` is one that a partition of ``table`` gets here."""
    found = _SUFFIX.search(name)
    return found is not None and companion(table, found[0]) == name


def literal(moment: datetime) -> str:
    """Return a bound as SQL."""
    if moment == BEGINNING:
        return "MINVALUE"
    if moment == END:
        return "MAXVALUE"
    return f"'{moment.astimezone(UTC).isoformat(' ')}'"


def bounds(wanted: Range) -> str:
    """Return what follows the name in ATTACH PARTITION."""
    return f"FOR VALUES FROM ({literal(wanted.start)}) TO ({literal(wanted.end)})"
