"""Events counted by time and by value: the newest of a window, so many at most and for so long at most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from tracevault.errors import DriverError, ValidationError
from tracevault.events.rules import got, nearest, whole_number
from tracevault.flows import Flow, Query
from tracevault.flows.read import MAX_COUNT
from tracevault.schema.filters import COUNT_FILTERS, Condition, check, condition
from tracevault.schema.restriction import Restriction

MAX_BUCKETS = 2000
MAX_TOP = 1000
DEFAULT_AT_MOST = 1_000_000
DEFAULT_SECONDS = 5.0
FACETS = (
    "event",
    "actor_id",
    "actor_type",
    "target_id",
    "target_type",
    "tenant_id",
    "environment",
    "mode",
    "outcome",
    "error_code",
    "severity",
)
INTERVALS = {
    "minute": timedelta(minutes=1),
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(weeks=1),
    "month": None,
}
# A Monday, so that weeks begin as in ISO 8601.
_ORIGIN = datetime(2001, 1, 1, tzinfo=UTC)
_CANCELED = "57014"


@dataclass(frozen=True, slots=True)
class Bucket:
    """How many events there were from ``start`` on, before ``end``."""

    start: datetime
    end: datetime
    count: int


class Histogram(NamedTuple):
    """Buckets, oldest first, empty ones included. Times are UTC's.

    Where not ``is_complete``, there are more events than were to be counted: those since ``counted_since`` were, the
    newest ones.
    """

    buckets: list[Bucket]
    is_complete: bool
    counted_since: datetime


@dataclass(frozen=True, slots=True)
class Facet:
    """How many events have a value; None stands for those that have none."""

    value: str | None
    count: int


class Facets(NamedTuple):
    """The most frequent values of a field, most frequent first, and how many events have ``others``.

    Where not ``is_complete``, there are more events than were to be counted: those since ``counted_since`` were, the
    newest ones.
    """

    values: list[Facet]
    others: int
    is_complete: bool
    counted_since: datetime


@dataclass(frozen=True)
class _Window:
    """Checked arguments that both share."""

    since: datetime
    until: datetime
    condition: Condition
    seconds: float
    at_most: int


def histogram(
    table: str, interval: Any, filters: Mapping[str, Any], timeout: Any, at_most: Any, seen: Restriction
) -> Flow[Histogram]:
    """Check the arguments of `histogram`, and return its flow, which is to run in a transaction."""
    width = _width(interval)
    window = _window("histogram", filters, timeout, at_most, seen)
    starts = list(_starts(window, width))
    if width is None:
        start, params = "date_trunc('month', occurred_at, 'UTC')", window.condition.params
    else:
        places = len(window.condition.params)
        start = f"date_bin(${places + 1}, occurred_at, ${places + 2})"
        params = (*window.condition.params, width, _ORIGIN)
    return _histogram(table, window, starts, width, start, params)


def _histogram(
    table: str, window: _Window, starts: list[datetime], width: timedelta | None, start: str, params: tuple[Any, ...]
) -> Flow[Histogram]:
    found = yield from _counted(table, window, "occurred_at", start, "", params)
    counts = {row[0]: row[1] for row in found}
    buckets = [Bucket(begin, _after(begin, width), counts.get(begin, 0)) for begin in starts]
    return Histogram(buckets, *_counted_since(window, found))


def facets(
    table: str, field: Any, filters: Mapping[str, Any], top: Any, timeout: Any, at_most: Any, seen: Restriction
) -> Flow[Facets]:
    """Check the arguments of `facets`, and return its flow, which is to run in a transaction."""
    if not isinstance(field, str) or field not in FACETS:
        raise ValidationError(
            f"`field` must be a column that repeats, got {got(field)}; {nearest(field, FACETS)}", field="field"
        )
    top = whole_number(top, "top", 1, MAX_TOP)
    window = _window("facets", filters, timeout, at_most, seen)
    seen.check("field", field)
    return _facets(table, window, str.__str__(field), top)


def _facets(table: str, window: _Window, field: str, top: int) -> Flow[Facets]:
    limit = f"ORDER BY 2 DESC, 1 LIMIT {top}"
    found = yield from _counted(table, window, f"{field}, occurred_at", field, limit, window.condition.params)
    values = [Facet(row[0], row[1]) for row in found]
    total = found[0][3] if found else 0
    return Facets(values, total - sum(value.count for value in values), *_counted_since(window, found))


def _counted(
    table: str, window: _Window, columns: str, key: str, limit: str, params: tuple[Any, ...]
) -> Flow[list[tuple[Any, ...]]]:
    """Count the newest events by ``key``: rows of key, count, and of all: the oldest time, and how many."""
    yield Query("SELECT set_config('statement_timeout', $1, true)", (str(round(window.seconds * 1000)),))
    places = len(params)
    sql = f"""SELECT {key} AS key, count(*), min(min(occurred_at)) OVER (), sum(count(*)) OVER ()::bigint
FROM (
  SELECT {columns} FROM "{table}" {window.condition.where} ORDER BY occurred_at DESC, id DESC LIMIT ${places + 1}
) AS newest GROUP BY 1 {limit}"""
    try:
        found = yield Query(sql, (*params, window.at_most))
    except DriverError as error:
        if error.sqlstate != _CANCELED:
            raise
        message = (
            f"counting took longer than the {window.seconds:g} seconds of `timeout`: narrow the time window or the "
            "filters, or lower `at_most`"
        )
    else:
        return found.rows
    raise DriverError(message, sqlstate=_CANCELED, transient=True)


def _counted_since(window: _Window, found: list[tuple[Any, ...]]) -> tuple[bool, datetime]:
    # As many as were asked for are taken for a cut, since nothing tells whether there are more.
    if not found or found[0][3] < window.at_most:
        return True, window.since
    return False, found[0][2]


def _window(method: str, filters: Mapping[str, Any], timeout: Any, at_most: Any, seen: Restriction) -> _Window:
    checked = check(filters, COUNT_FILTERS, method)
    if "since" not in checked:
        raise ValidationError(f"{method} counts events of a time window, so it needs `since`", field="since")
    until = checked.setdefault("until", max(datetime.now(UTC), checked["since"]))
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0.001 <= timeout <= 3600:
        raise ValidationError(f"`timeout` must be 0.001 to 3600 seconds, got {got(timeout)}", field="timeout")
    at_most = whole_number(at_most, "at_most", 1, MAX_COUNT)
    return _Window(checked["since"], until, condition(checked, seen), timeout, at_most)


def _width(interval: Any) -> timedelta | None:
    """Return the width of buckets; None stands for months."""
    if isinstance(interval, str) and interval in INTERVALS:
        return INTERVALS[interval]
    if not isinstance(interval, timedelta) or interval < timedelta(seconds=1):
        raise ValidationError(
            f"`interval` must be {', '.join(INTERVALS)}, or a timedelta of a second or more, got {got(interval)}",
            field="interval",
        )
    return interval


def _starts(window: _Window, width: timedelta | None) -> Iterator[datetime]:
    since = window.since
    try:
        start = (
            since.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
            if width is None
            else _ORIGIN + (since - _ORIGIN) // width * width
        )
        for number in range(MAX_BUCKETS + 1):
            if start > window.until:
                return
            if number == MAX_BUCKETS:
                break
            yield start
            start = _after(start, width)
    except OverflowError:  # the years 1 to 9999 are over
        return
    raise ValidationError(
        f"`interval` makes more than {MAX_BUCKETS:,} buckets of this time window: take a longer one", field="interval"
    )


def _after(start: datetime, width: timedelta | None) -> datetime:
    return (start + timedelta(days=32)).replace(day=1) if width is None else start + width
