"""THE filter table: what the methods that read accept, how it is checked, and the SQL it becomes.

The command line, the query text and the documentation derive from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, get_args, get_type_hints

from tracevault.errors import ValidationError
from tracevault.events import rules
from tracevault.events.payload import jsonb_text
from tracevault.events.record import BY_NAME, MODES, RECORD_COLUMNS, limit_of
from tracevault.schema.indexes import ERRORS_ONLY
from tracevault.schema.restriction import EVERYTHING, Restriction

MAX_LIMIT = 500
DEFAULT_LIMIT = 50
MAX_SEVERITIES = 16
MAX_ITEMS = 100
MAX_PATHS = 16
MAX_WORDS = 16
ORDERS = ("desc", "asc")
NULLABLE = tuple(name for name in RECORD_COLUMNS if BY_NAME[name].nullable)
_MAX_OFFSET = 2**63 - 1
_WORD = re.compile(r'"([^"]*)"|(\S+)')

Kind = Literal[
    "text",
    "event",
    "hex",
    "choice",
    "list",
    "columns",
    "flag",
    "time",
    "number",
    "prefix",
    "paths",
    "key",
    "words",
    "cursor",
]


@dataclass(frozen=True)
class Filter:
    """One filter. ``sql`` has one ``{}`` for each placeholder; None means that it shapes the page instead."""

    kind: Kind
    help: str
    sql: str | None
    limit: int | None = None
    choices: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    """The columns that it looks at."""
    most: int = MAX_ITEMS
    """Most items of a list."""


def _equals(column: str, kind: Kind = "text", choices: tuple[str, ...] = ()) -> Filter:
    stored = BY_NAME[column].column
    return Filter(
        kind, f"{column} is exactly this: {stored.help}", f"{column} = {{}}", stored.limit, choices, (column,)
    )


def _one_of(column: str, most: int = MAX_ITEMS) -> Filter:
    return Filter(
        "list",
        f"{column} is one of these (1-{most}, all different)",
        f"{column} = ANY({{}})",
        limit_of(column),
        columns=(column,),
        most=most,
    )


def _paths(column: str) -> Filter:
    return Filter(
        "paths",
        f"{column} has these values at these paths, as JSON: `payment.currency` and `EUR` (1-{MAX_PATHS})",
        f"{column} @> {{}}::jsonb",
        columns=(column,),
    )


class CountFilters(TypedDict, total=False):
    """The keyword arguments of `count`. All given filters must hold."""

    event: Annotated[str, _equals("event", "event")]
    events: Annotated[Sequence[str], _one_of("event")]
    event_prefix: Annotated[
        str,
        Filter(
            "prefix",
            "event begins with this: `auth.`",
            "(event ~>=~ {} AND event ~<~ {})",
            limit_of("event"),
            columns=("event",),
        ),
    ]
    actor_id: Annotated[str, _equals("actor_id")]
    actor_ids: Annotated[Sequence[str], _one_of("actor_id")]
    actor_type: Annotated[str, _equals("actor_type")]
    target_id: Annotated[str, _equals("target_id")]
    target_ids: Annotated[Sequence[str], _one_of("target_id")]
    target_type: Annotated[str, _equals("target_type")]
    correlation_id: Annotated[str, _equals("correlation_id")]
    request_id: Annotated[str, _equals("request_id")]
    tenant_id: Annotated[str, _equals("tenant_id")]
    tenant_ids: Annotated[Sequence[str], _one_of("tenant_id")]
    trace_id: Annotated[str, _equals("trace_id", "hex")]
    environment: Annotated[str, _equals("environment")]
    mode: Annotated[Literal["sync", "async"], _equals("mode", "choice", MODES)]
    outcome: Annotated[str, _equals("outcome")]
    error_code: Annotated[str, _equals("error_code")]
    severity: Annotated[str, _equals("severity")]
    severities: Annotated[Sequence[str], _one_of("severity", MAX_SEVERITIES)]
    errors_only: Annotated[
        bool,
        Filter(
            "flag",
            "outcome is `failure`, or severity is error, critical or fatal",
            f"({ERRORS_ONLY})",
            columns=("outcome", "severity"),
        ),
    ]
    data: Annotated[Mapping[str, Any], _paths("data")]
    meta: Annotated[Mapping[str, Any], _paths("meta")]
    changed: Annotated[
        str,
        Filter("key", "`emit_diff` saw this top-level key change", "data->'diff' ? {}", 512, columns=("data",)),
    ]
    text: Annotated[
        str,
        Filter(
            "words",
            "event, ids and payloads hold all these words, in either case; needs `since`. "
            f'`"two words"` is one phrase (1-{MAX_WORDS} words)',
            "",
            512,
        ),
    ]
    is_null: Annotated[
        Sequence[str],
        Filter("columns", "these columns are empty", "{} IS NULL", choices=NULLABLE, most=len(NULLABLE)),
    ]
    since: Annotated[
        datetime | date | str,
        Filter("time", "occurred_at is this moment or later", "occurred_at >= {}", columns=("occurred_at",)),
    ]
    until: Annotated[
        datetime | date | str,
        Filter("time", "occurred_at is this moment or earlier", "occurred_at <= {}", columns=("occurred_at",)),
    ]


class PageFilters(CountFilters, total=False):
    """The keyword arguments of `find_page`: filters, and which page of the result."""

    limit: Annotated[int, Filter("number", "most rows to return, 1-500 (default 50)", None)]
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
    cursor: Annotated[str, Filter("cursor", "where the page begins: `next_cursor` of the one before", None)]


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
PAGE_FILTERS = _table(PageFilters)
COUNT_FILTERS = _table(CountFilters)


class Condition(NamedTuple):
    """Checked filters as SQL. ``where`` is empty or starts with WHERE; placeholders are ``$1`` and up."""

    where: str
    params: tuple[Any, ...]

    def also(self, sql: str, *params: Any) -> Condition:
        """Return this condition and another one, whose ``{}`` stand for ``params``."""
        first = len(self.params) + 1
        more = sql.format(*(f"${first + place}" for place in range(len(params))))
        return Condition(f"{self.where} AND {more}" if self.where else f"WHERE {more}", (*self.params, *params))


class Page(NamedTuple):
    """The checked shape of a page."""

    limit: int
    offset: int
    order: str


def find_condition(filters: Mapping[str, Any], seen: Restriction = EVERYTHING) -> tuple[Condition, Page]:
    """Check the filters of `find_many`; raise `ValidationError` with the offender's path."""
    checked = check(filters, FIND_FILTERS, "find_many")
    page = Page(checked.get("limit", DEFAULT_LIMIT), checked.get("offset", 0), checked.get("order", "desc"))
    return condition(checked, seen), page


def count_condition(filters: Mapping[str, Any], method: str = "count", seen: Restriction = EVERYTHING) -> Condition:
    """Check the filters of `count`; raise `ValidationError` with the offender's path."""
    return condition(check(filters, COUNT_FILTERS, method), seen)


def fingerprint(checked: Mapping[str, Any], *more: str) -> bytes:
    """Return 8 bytes that tell these checked filters from others."""
    plain = {name: value for name, value in checked.items() if name in COUNT_FILTERS}
    return hashlib.sha256(json.dumps([plain, *more], sort_keys=True, default=str).encode()).digest()[:8]


def check(filters: Mapping[str, Any], known: dict[str, Filter], method: str) -> dict[str, Any]:
    """Return checked filters; raise `ValidationError` with the offender's path."""
    checked = {}
    for name, value in filters.items():
        if name not in known:
            raise ValidationError(f"`{name}` is not a filter of {method}; {rules.nearest(name, known)}", field=name)
        if value is None:
            raise ValidationError(
                f"`{name}` is None: a forgotten value must not widen an audit query; leave the filter out instead"
                + (f', or ask for is_null=["{name}"]' if name in NULLABLE else ""),
                field=name,
            )
        checked[name] = _check_value(name, value, known[name])
    if "since" in checked and "until" in checked and checked["since"] > checked["until"]:
        since, until = checked["since"].isoformat(), checked["until"].isoformat()
        raise ValidationError(f"`since` must not be later than `until`, got {since} and {until}", field="since")
    if "text" in checked and "since" not in checked:
        raise ValidationError("`text` reads every event of its time window, so it needs `since`", field="text")
    return checked


def _check_value(name: str, value: Any, spec: Filter) -> Any:
    match spec.kind:
        case "event":
            return rules.event_name(value, name, spec.limit or 0)
        case "text" | "prefix" | "key":
            return rules.text(value, name, spec.limit or 0, blank=False)
        case "hex":
            return rules.hex_id(value, name, spec.limit or 0)
        case "choice":
            return rules.choice(value, name, spec.choices)
        case "time":
            return rules.moment(value, name)
        case "list" | "columns":
            return _check_list(name, value, spec)
        case "flag":
            if not isinstance(value, bool):
                raise ValidationError(f"`{name}` must be True or False, got {rules.got(value)}", field=name)
            return value
        case "number":
            least, most = (1, MAX_LIMIT) if name == "limit" else (0, _MAX_OFFSET)
            return rules.whole_number(value, name, least, most)
        case "paths":
            return _check_paths(name, value)
        case "words":
            return _check_words(name, rules.text(value, name, spec.limit or 0, blank=False))
        case "cursor":
            return rules.text(value, name, 512, blank=False)


def _check_list(name: str, value: Any, spec: Filter) -> list[str]:
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= spec.most:
        size = f" of {len(value)}" if isinstance(value, (list, tuple)) else ""
        raise ValidationError(
            f"`{name}` must be a list of 1 to {spec.most} strings, got {rules.got(value)}{size}", field=name
        )
    places = [f"{name}[{place}]" for place in range(len(value))]
    if spec.kind == "columns":
        items = [_check_column(item, place) for item, place in zip(value, places, strict=True)]
    else:
        items = [
            rules.text(item, place, spec.limit or 0, blank=False) for item, place in zip(value, places, strict=True)
        ]
    if len(set(items)) < len(items):
        twice = next(item for place, item in enumerate(items) if item in items[:place])
        raise ValidationError(f"`{name}` must not name a value twice, got {rules.got(twice)} again", field=name)
    return items


def _check_column(value: Any, place: str) -> str:
    if not isinstance(value, str) or value not in NULLABLE:
        raise ValidationError(
            f"`{place}` must be a column that may be empty, got {rules.got(value)}; {rules.nearest(value, NULLABLE)}",
            field=place,
        )
    return str.__str__(value)


def _check_paths(name: str, value: Any) -> list[tuple[tuple[str, ...], str]]:
    """Return the paths as their keys, with each value as JSON, in order of the paths."""
    if not isinstance(value, Mapping) or not 1 <= len(value) <= MAX_PATHS:
        size = f" of {len(value)}" if isinstance(value, Mapping) else ""
        raise ValidationError(
            f"`{name}` must map 1 to {MAX_PATHS} paths to values, got {rules.got(value)}{size}", field=name
        )
    checked = [(rules.path_keys(path, name), _check_scalar(item, f"{name}.{path}")) for path, item in value.items()]
    return sorted(checked)


def _check_scalar(value: Any, field: str) -> str:
    if value is not None and not isinstance(value, (str, bool, int, float, Decimal)):
        raise ValidationError(
            f"`{field}` must be compared with text, a number, True, False or None, got {rules.got(value)}", field=field
        )
    if isinstance(value, str):
        value = rules.text(value, field, 65_536) if value else ""
    elif isinstance(value, (int, float, Decimal)):
        number = Decimal(value)
        if not number.is_finite() or len(number.as_tuple().digits) > 1000 or abs(number.adjusted()) > 1000:
            raise ValidationError(
                f"`{field}` must be a finite number of at most 1,000 digits, got {rules.got(value)}", field=field
            )
    return jsonb_text(value)


def _check_words(name: str, value: str) -> list[str]:
    words = [phrase or word for phrase, word in _WORD.findall(value)]
    words = list(dict.fromkeys(word for word in words if word.strip()))
    if not 1 <= len(words) <= MAX_WORDS:
        raise ValidationError(f"`{name}` must have 1 to {MAX_WORDS} words, got {len(words)}", field=name)
    return words


def condition(checked: Mapping[str, Any], seen: Restriction = EVERYTHING) -> Condition:
    """Return checked filters as SQL; raise `ValidationError` for one that looks at what is hidden."""
    found = Condition("", ())
    for sql, params in seen.conditions():
        found = found.also(sql, *params)
    for name, value in checked.items():
        spec = COUNT_FILTERS.get(name)
        if spec is None or value is False:  # it shapes the page
            continue
        for column in value if spec.kind == "columns" else spec.columns:
            seen.check(name, column, [keys for keys, _ in value] if spec.kind == "paths" else None)
        for sql, params in _clauses(spec, value, seen):
            found = found.also(sql, *params)
    return found


def _clauses(spec: Filter, value: Any, seen: Restriction) -> Iterator[tuple[str, tuple[Any, ...]]]:
    assert spec.sql is not None
    match spec.kind:
        case "flag":
            yield spec.sql, ()
        case "prefix":
            yield spec.sql, (value, _after_all(value))
        case "columns":
            for column in value:
                yield spec.sql.format(column), ()
        case "paths":
            for keys, text in value:
                for key in reversed(keys):
                    text = f"{{{jsonb_text(key)}: {text}}}"  # noqa: PLW2901 - from the inside out
                yield spec.sql, (text,)
        case "words":
            for word in value:
                yield _holds(word, seen)
        case _:
            yield spec.sql, (value,)


def _after_all(prefix: str) -> str:
    """Return the least text, by code points, that comes after all that begin with ``prefix``."""
    while prefix:
        last = ord(prefix[-1]) + 1
        if last == 0xD800:  # surrogates are no text
            last = 0xE000
        if last <= 0x10FFFF:
            return prefix[:-1] + chr(last)
        prefix = prefix[:-1]
    return "\U0010ffff" * (limit_of("event") + 1)


def _holds(word: str, seen: Restriction) -> tuple[str, tuple[Any, ...]]:
    """Return SQL that looks for a word in columns of text, and as JSON writes it in payloads."""
    plain, payloads = seen.searched()
    clauses, params = [], []
    for searched, text in ((plain, word), (payloads, jsonb_text(word)[1:-1])):
        if searched:
            among = ", ".join(searched).replace("{", "{{").replace("}", "}}")
            clauses.append(f"concat_ws(E'\\n', {among}) ILIKE {{}}")
            params.append("%" + re.sub(r"([\\%_])", r"\\\1", text) + "%")
    return f"({' OR '.join(clauses) or 'false'})", tuple(params)
