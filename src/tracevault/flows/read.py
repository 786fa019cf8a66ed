"""How events are found, page by page, and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from struct import Struct
from typing import Any, NamedTuple

from tracevault.events.ids import uuid7_time
from tracevault.events.payload import decode
from tracevault.events.record import BY_NAME, RECORD_COLUMNS, AuditRecord
from tracevault.events.rules import choice, uuid, whole_number
from tracevault.flows import Flow, Query
from tracevault.schema.cursor import Place, read_cursor, timestamp, write_cursor
from tracevault.schema.filters import (
    DEFAULT_LIMIT,
    ORDERS,
    PAGE_FILTERS,
    Condition,
    check,
    condition,
    count_condition,
    find_condition,
    fingerprint,
)
from tracevault.schema.restriction import EVERYTHING, PAYLOADS, Restriction

MAX_PAGE = 10_000
MAX_COUNT = 1_000_000_000
_TIME = Struct("!q")
# What emit takes between the two looks at its clock, one for the time and one for the id, with room for a slow machine.
_NEAR = timedelta(minutes=1)
_PLACE = "timestamptz_send(occurred_at), id"
# `iso_utc` of what Python would read: three digits, or six where it needs them; nothing outside the years 1 to 9999.
_ISO_TIME = """CASE
  WHEN {0} < '0001-01-01 00:00:00+00' THEN '0001-01-01T00:00:00.000Z'
  WHEN {0} >= '10000-01-01 00:00:00+00' THEN '9999-12-31T23:59:59.999999Z'
  ELSE to_char({0} AT TIME ZONE 'UTC', CASE WHEN extract(microseconds FROM {0})::int % 1000 = 0
    THEN 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"' ELSE 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"' END)
END"""
_new = object.__new__
_PLAIN_FIELDS = [getattr(AuditRecord, name).__set__ for name in RECORD_COLUMNS]
_PAYLOAD_FIELDS = [(RECORD_COLUMNS.index(name), getattr(AuditRecord, name).__set__) for name in PAYLOADS]


class Page(NamedTuple):
    """Some events, and the cursor of the page after them; None where they are the last."""

    rows: list[AuditRecord]
    next_cursor: str | None


class Count(int):
    """How many events there are: an int that knows whether it is all; where not, it prints as "10,000 or more"."""

    is_exact: bool

    def __new__(cls, number: int, *, is_exact: bool = True) -> Count:
        """Return ``number``; with ``is_exact=False`` there may be more."""
        count = super().__new__(cls, number)
        count.is_exact = is_exact
        return count

    def __str__(self) -> str:
        """Return ``12345``, as any int, or ``10,000 or more``."""
        return int.__repr__(self) if self.is_exact else f"{int(self):,} or more"


@dataclass(frozen=True)
class Walk:
    """A checked walk over pages: which events, in what order, how many a page, and where it goes on."""

    table: str
    condition: Condition
    seen: Restriction
    filters: bytes
    order: str
    limit: int
    last: Place | None = None
    bound: Place | None = None


@lru_cache(256)
def select(seen: Restriction = EVERYTHING) -> str:
    """Return the columns of a record, as `record` takes them. Payloads come as text: only so are numbers exact."""
    columns = [
        f"{seen.expression(name)}::text" if name in PAYLOADS else seen.expression(name) for name in RECORD_COLUMNS
    ]
    return ", ".join(columns)


@lru_cache(256)
def select_line(seen: Restriction = EVERYTHING) -> str:
    """Return SQL for a record as a line of JSON: what `json_text` makes of it, but that nothing is escaped there."""
    parts = []
    before = "{"
    for name in RECORD_COLUMNS:
        quote, value = _json(name, seen)
        parts += [f"'{before}\"{name}\": {quote}'", value]
        before = f"{quote}, "
    return f"concat({', '.join(parts)}, '{before.removesuffix(', ')}}}')"


def _json(name: str, seen: Restriction) -> tuple[str, str]:
    """Return the quote that stands around a value, and SQL for it."""
    value = seen.expression(name)
    match BY_NAME[name].column.sql_type:
        case "jsonb":
            return "", f"coalesce({value}::text, 'null')"
        case "uuid":
            return '"', value
        case "timestamp with time zone":
            return '"', _ISO_TIME.format(value)
        case _:
            return "", f"coalesce(to_json({value})::text, 'null')"


def record(row: Sequence[Any]) -> AuditRecord:
    """Return the record in a row whose first columns are `select`'s."""
    # Not by its own __init__, which is most of the cost: a frozen class sets each field through the object.
    made = _new(AuditRecord)
    for set_field, value in zip(_PLAIN_FIELDS, row, strict=False):
        set_field(made, value)
    for place, set_field in _PAYLOAD_FIELDS:
        text = row[place]
        if text is not None:
            set_field(made, decode(text))
    return made


def find_many(table: str, filters: Mapping[str, Any], seen: Restriction = EVERYTHING) -> Flow[list[AuditRecord]]:
    """Check ``filters``, and return the flow that finds the page of events for which all of them hold."""
    found, page = find_condition(filters, seen)
    order = page.order.upper()
    places = len(found.params)
    return _find(
        f'SELECT {select(seen)} FROM "{table}" {found.where} ORDER BY occurred_at {order}, id {order} '
        f"LIMIT ${places + 1} OFFSET ${places + 2}",
        (*found.params, page.limit, page.offset),
    )


def find_by_id(table: str, id_: Any, seen: Restriction = EVERYTHING) -> Flow[AuditRecord | None]:
    """Check the id, and return the flow that finds its event, or None.

    An id that emit has made says when that was, which leads to one partition of a partitioned table. Only where there
    is nothing, since the caller gave another time, are all of them asked.
    """
    wanted = uuid(id_, "id")
    found = condition({}, seen).also("id = {}", wanted)
    conditions = [found]
    made = uuid7_time(wanted)
    if made is not None:
        conditions.insert(0, found.also("occurred_at >= {} AND occurred_at < {}", made - _NEAR, made + _NEAR))
    return _find_one(*((f'SELECT {select(seen)} FROM "{table}" {one.where}', one.params) for one in conditions))


def walk(table: str, filters: Mapping[str, Any], seen: Restriction = EVERYTHING) -> Walk:
    """Check the filters of `find_page`."""
    return _walk(table, check(filters, PAGE_FILTERS, "find_page"), seen)


def long_walk(table: str, filters: Mapping[str, Any], page_size: Any, order: Any, seen: Restriction) -> Walk:
    """Check the arguments of `pages` and `iterate`, whose pages are larger and which keep the cursor themselves."""
    known = {name: spec for name, spec in PAGE_FILTERS.items() if spec.sql is not None}
    checked = check(filters, known, "pages")
    checked["limit"] = whole_number(page_size, "page_size", 1, MAX_PAGE)
    checked["order"] = choice(order, "order", ORDERS)
    return _walk(table, checked, seen)


def _walk(table: str, checked: dict[str, Any], seen: Restriction) -> Walk:
    order = checked.get("order", "desc")
    filters = fingerprint(checked, order, table, repr(seen))
    last, bound = read_cursor(checked["cursor"], filters) if "cursor" in checked else (None, None)
    limit = checked.get("limit", DEFAULT_LIMIT)
    return Walk(table, condition(checked, seen), seen, filters, order, limit, last, bound)


def find_page(walk: Walk) -> Flow[Page]:
    """Return the flow that finds the next page of a walk."""
    bounded = yield from begin_walk(walk)
    if bounded is None:
        return Page([], None)
    found = yield page_query(bounded, select(walk.seen), walk.limit + 1)  # by one more it is known that there is one
    rows = found.rows[: walk.limit]
    more = len(found.rows) > walk.limit
    return Page([record(row) for row in rows], write_walk(walk_after(bounded, rows[-1])) if more else None)


def begin_walk(walk: Walk) -> Flow[Walk | None]:
    """Return the flow that bounds a walk; None where there is nothing to walk over.

    Newest first, a walk ends at the oldest event, however many come meanwhile. Oldest first it would follow new ones
    for ever, so it ends at what was the newest one when it began.
    """
    if walk.order == "desc" or walk.bound is not None:
        return walk
    newest = yield Query(
        f'SELECT {_PLACE} FROM "{walk.table}" {walk.condition.where} ORDER BY occurred_at DESC, id DESC LIMIT 1',
        walk.condition.params,
    )
    return replace(walk, bound=_place(*newest.rows[0])) if newest.rows else None


def page_query(walk: Walk, columns: str, limit: int) -> Query:
    """Return the statement for the next rows of a walk, which have their place at their end."""
    where, order = walk.condition, walk.order.upper()
    if walk.last is not None:
        after = ">" if walk.order == "asc" else "<"
        place = timestamp(walk.last.time), walk.last.id
        where = where.also(f"(occurred_at, id) {after} ({{}}::timestamptz, {{}})", *place)
    if walk.bound is not None:
        where = where.also("(occurred_at, id) <= ({}::timestamptz, {})", timestamp(walk.bound.time), walk.bound.id)
    return Query(
        f'SELECT {columns}, {_PLACE} FROM "{walk.table}" {where.where} '
        f"ORDER BY occurred_at {order}, id {order} LIMIT ${len(where.params) + 1}",
        (*where.params, limit),
    )


def walk_after(walk: Walk, row: Sequence[Any]) -> Walk:
    """Return the walk that goes on after a row of `page_query`."""
    return replace(walk, last=_place(*row[-2:]))


def write_walk(walk: Walk) -> str:
    """Return the cursor with which a walk goes on where it stands."""
    assert walk.last is not None
    return write_cursor(walk.filters, walk.last, walk.bound)


def next_walk(walk: Walk, cursor: str) -> Walk:
    """Return the walk that goes on at ``cursor``, which its last page gave."""
    last, bound = read_cursor(cursor, walk.filters)
    return replace(walk, last=last, bound=bound)


def count(
    table: str, filters: Mapping[str, Any], at_most: int | None = None, seen: Restriction = EVERYTHING
) -> Flow[Count]:
    """Check ``filters``, and return the flow that counts the events for which all of them hold."""
    found = count_condition(filters, seen=seen)
    if at_most is None:
        return _count(f'SELECT count(*) FROM "{table}" {found.where}', found.params, None)
    at_most = whole_number(at_most, "at_most", 1, MAX_COUNT)
    sql = f'SELECT count(*) FROM (SELECT FROM "{table}" {found.where} LIMIT ${len(found.params) + 1}) AS counted'
    return _count(sql, (*found.params, at_most + 1), at_most)


def estimate(table: str, filters: Mapping[str, Any], seen: Restriction = EVERYTHING) -> Flow[int]:
    """Check ``filters``, and return the flow that asks the planner about how many events there are."""
    found = count_condition(filters, "estimate", seen)
    return _estimate(f'EXPLAIN (FORMAT JSON) SELECT FROM "{table}" {found.where}', found.params)


def history(
    table: str, type_: Any, id_: Any, at: Any, limit: Any, seen: Restriction = EVERYTHING
) -> Flow[list[AuditRecord]]:
    """Check the arguments of `history`, and return the flow that finds the events of a target, newest first.

    It finds one more than ``limit`` where there are more.
    """
    filters = {"target_type": type_, "target_id": id_} | ({} if at is None else {"until": at})
    return _ordered(table, filters, "history", "DESC", whole_number(limit, "limit", 1, MAX_PAGE) + 1, seen)


def trace(table: str, correlation_id: Any, limit: Any, seen: Restriction = EVERYTHING) -> Flow[list[AuditRecord]]:
    """Check the arguments of `trace`, and return the flow that finds the events of an operation, oldest first."""
    limit = whole_number(limit, "limit", 1, MAX_PAGE)
    return _ordered(table, {"correlation_id": correlation_id}, "trace", "ASC", limit, seen)


def _ordered(
    table: str, filters: Mapping[str, Any], method: str, order: str, limit: int, seen: Restriction
) -> Flow[list[AuditRecord]]:
    found = count_condition(filters, method, seen)
    return _find(
        f'SELECT {select(seen)} FROM "{table}" {found.where} '
        f"ORDER BY occurred_at {order}, id {order} LIMIT ${len(found.params) + 1}",
        (*found.params, limit),
    )


def _find(sql: str, params: tuple[Any, ...]) -> Flow[list[AuditRecord]]:
    result = yield Query(sql, params)
    return [record(row) for row in result.rows]


def _find_one(*queries: tuple[str, tuple[Any, ...]]) -> Flow[AuditRecord | None]:
    """Return the record of the first of the queries that finds one."""
    for sql, params in queries:
        result = yield Query(sql, params)
        if result.rows:
            return record(result.rows[0])
    return None


def _count(sql: str, params: tuple[Any, ...], at_most: int | None) -> Flow[Count]:
    result = yield Query(sql, params)
    number = int(result.rows[0][0])
    return Count(number) if at_most is None or number <= at_most else Count(at_most, is_exact=False)


def _estimate(sql: str, params: tuple[Any, ...]) -> Flow[int]:
    result = yield Query(sql, params)
    return int(result.rows[0][0][0]["Plan"]["Plan Rows"])


def _place(time: bytes, id_: Any) -> Place:
    return Place(_TIME.unpack(time)[0], id_)
