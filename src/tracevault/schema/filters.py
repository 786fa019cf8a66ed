"""THE filter table: what `find_many` and `count` accept, how it is checked, and the SQL it becomes.

The command line and the documentation derive from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, get_args, get_type_hints

from tracevault.errors import ValidationError
from tracevault.event import rules
from tracevault.event.record import BY_NAME, MODES, limit_of
from tracevault.schema.indexes import ERRORS_ONLY

MAX_LIMIT = 500
DEFAULT_LIMIT = 50
MAX_SEVERITIES = 16
ORDERS = ("desc", "asc")
_MAX_OFFSET = 2**63 - 1

Kind = Literal["text", "event", "choice", "list", "flag", "time", "number"]


@dataclass(frozen=True)
class Filter:
    """One filter. ``sql`` has one ``{}`` for the placeholder; None means that it shapes the page instead."""

    kind: Kind
    help: str
    sql: str | None
    limit: int | None = None
    choices: tuple[str, ...] = ()


def _equals(column: str, kind: Kind = "text", choices: tuple[str, ...] = ()) -> Filter:
    stored = BY_NAME[column].column
    return Filter(kind, f"{column} is exactly this: {stored.help}", f"{column} = {{}}", stored.limit, choices)


class CountFilters(TypedDict, total=False):
    """The keyword arguments of `count`. All given filters must hold."""

    event: Annotated[str, _equals("event", "event")]
    actor_id: Annotated[str, _equals("actor_id")]
    actor_type: Annotated[str, _equals("actor_type")]
    target_id: Annotated[str, _equals("target_id")]
    target_type: Annotated[str, _equals("target_type")]
    correlation_id: Annotated[str, _equals("correlation_id")]
    request_id: Annotated[str, _equals("request_id")]
    environment: Annotated[str, _equals("environment")]
    mode: Annotated[Literal["sync", "async"], _equals("mode", "choice", MODES)]
    outcome: Annotated[str, _equals("outcome")]
    error_code: Annotated[str, _equals("error_code")]
    severity: Annotated[str, _equals("severity")]
    severities: Annotated[
        list[str] | tuple[str, ...],
        Filter(
            "list",
            "severity is one of these (1-16, all different)",
            "severity = ANY({})",
            limit_of("severity"),
        ),
    ]
    errors_only: Annotated[
        bool,
        Filter("flag", "outcome is `failure`, or severity is error, critical or fatal", f"({ERRORS_ONLY})"),
    ]
    since: Annotated[datetime | date | str, Filter("time", "occurred_at is this moment or later", "occurred_at >= {}")]
    until: Annotated[
        datetime | date | str, Filter("time", "occurred_at is this moment or earlier", "occurred_at <= {}")
    ]


class FindFilters(CountFilters, total=False):
    """The keyword arguments of `find_many`: filters, and which page of the result."""

    limit: Annotated[int, Filter("number", "most rows to return, 1-500 (default 50)", None)]
    offset: Annotated[int, Filter("number", "rows to skip (default 0)", None)]
    order: Annotated[
        Literal["desc", "asc"],
        Filter(
            "choice",
            "by (occurred_at, id): newest first (`desc`, the default) or oldest first",
            None,
            None,
            ORDERS,
        ),
    ]


def _table(kind: type[Any]) -> dict[str, Filter]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: get_args(hint)[1] for name, hint in hints.items()}


FIND_FILTERS = _table(FindFilters)
COUNT_FILTERS = _table(CountFilters)


class Condition(NamedTuple):
    """Checked filters as SQL. ``where`` is empty or starts with WHERE; placeholders are ``$1`` and up."""

    where: str
    params: tuple[Any, ...]


class Page(NamedTuple):
    """The checked shape of a page."""

    limit: int
    offset: int
    order: str


def find_condition(filters: Mapping[str, Any]) -> tuple[Condition, Page]:
    """Check the filters of `find_many`; raise `ValidationError` with the offender's path."""
    checked = _check(filters, FIND_FILTERS, "find_many")
    page = Page(checked.get("limit", DEFAULT_LIMIT), checked.get("offset", 0), checked.get("order", "desc"))
    return _condition(checked), page


def count_condition(filters: Mapping[str, Any]) -> Condition:
    """Check the filters of `count`; raise `ValidationError` with the offender's path."""
    return _condition(_check(filters, COUNT_FILTERS, "count"))


def _check(filters: Mapping[str, Any], known: dict[str, Filter], method: str) -> dict[str, Any]:
    checked = {}
    for name, value in filters.items():
        if name not in known:
            raise ValidationError(f"`{name}` is not a filter of {method}; {rules.nearest(name, known)}", field=name)
        if value is None:
            raise ValidationError(
                f"`{name}` is None: a forgotten value must not widen an audit query; leave the filter out instead",
                field=name,
            )
        checked[name] = _check_value(name, value, known[name])
    if "since" in checked and "until" in checked and checked["since"] > checked["until"]:
        since, until = checked["since"].isoformat(), checked["until"].isoformat()
        raise ValidationError(f"`since` must not be later than `until`, got {since} and {until}", field="since")
    return checked


def _check_value(name: str, value: Any, spec: Filter) -> Any:
    match spec.kind:
        case "event":
            return rules.event_name(value, name, spec.limit or 0)
        case "text":
            return rules.text(value, name, spec.limit or 0, blank=False)
        case "choice":
            return rules.choice(value, name, spec.choices)
        case "time":
            return rules.moment(value, name)
        case "list":
            return _check_list(name, value, spec)
        case "flag":
            if not isinstance(value, bool):
                raise ValidationError(f"`{name}` must be True or False, got {rules.got(value)}", field=name)
            return value
        case "number":
            least, most = (1, MAX_LIMIT) if name == "limit" else (0, _MAX_OFFSET)
            return rules.whole_number(value, name, least, most)


def _check_list(name: str, value: Any, spec: Filter) -> list[str]:
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_SEVERITIES:
        size = f" of {len(value)}" if isinstance(value, (list, tuple)) else ""
        raise ValidationError(
            f"`{name}` must be a list of 1 to {MAX_SEVERITIES} strings, got {rules.got(value)}{size}", field=name
        )
    items = [rules.text(item, f"{name}[{place}]", spec.limit or 0, blank=False) for place, item in enumerate(value)]
    if len(set(items)) < len(items):
        twice = next(item for place, item in enumerate(items) if item in items[:place])
        raise ValidationError(f"`{name}` must not name a value twice, got {rules.got(twice)} again", field=name)
    return items


def _condition(checked: dict[str, Any]) -> Condition:
    clauses: list[str] = []
    params: list[Any] = []
    for name, value in checked.items():
        sql = FIND_FILTERS[name].sql
        if sql is None or value is False:
            continue
        if value is not True:
            params.append(value)
        clauses.append(sql.format(f"${len(params)}"))
    return Condition("WHERE " + " AND ".join(clauses) if clauses else "", tuple(params))
