"""What pages show, as values that templates print: stored text made harmless, JSON as a tree, changes side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from tracevault import AuditRecord, FieldChange, Histogram, History, format_query
from tracevault.events.json_text import json_text
from tracevault.events.payload import iso_utc

# What is shown of a payload; the rest is in the raw JSON.
MAX_NODES = 2000
MAX_TEXT = 5000
FOLDED = 200
OPEN_DEPTH = 2
MAX_LINES = 400
MAX_HISTORY_LINES = 1500
# Filters that a click on a value makes.
VALUES = ("event", "tenant_id", "environment", "outcome", "severity", "error_code", "request_id", "mode", "trace_id")
_WIDTHS = [
    *(timedelta(minutes=minutes) for minutes in (1, 5, 15)),
    *(timedelta(hours=hours) for hours in (1, 6)),
    *(timedelta(days=days) for days in (1, 7, 30)),
]
_MOST_BARS = 48
_BAR, _HEIGHT = 16, 56


def visible(text: object) -> str:
    r"""Return text with whatever does not print written as an escape: ``\x1b``, ``\u202e``."""
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(text: object, length: int = 80) -> str:
    """Return visible text of at most so many characters, cut in the middle."""
    shown = visible(str(text)[: length * 8])
    return shown if len(shown) <= length else f"{shown[: length // 2]}…{shown[-(length // 2 - 1) :]}"


def iso(moment: datetime) -> str:
    """Return a time as ISO 8601 in UTC."""
    return iso_utc(moment)


def clock(moment: datetime) -> str:
    """Return a time for a column: seconds, in UTC."""
    return f"{moment:%Y-%m-%d %H:%M:%S}"


def ago(moment: datetime) -> str:
    """Return how long ago a time is: ``3 minutes ago``."""
    seconds = (datetime.now(UTC) - moment).total_seconds()
    ahead, seconds = seconds < 0, abs(seconds)
    for length, unit in ((31_557_600, "year"), (86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        number = int(seconds // length)
        if number:
            span = f"{number:,} {unit}{'s' if number != 1 else ''}"
            return f"in {span}" if ahead else f"{span} ago"
    return "just now"


# -------------------------------------------------------------------------------------------- JSON


_NODE = Markup('<details class="node"><summary>{} <span class="size">{}</span></summary><ul>')
_OPEN_NODE = Markup('<details class="node" open><summary>{} <span class="size">{}</span></summary><ul>')


class _Budget:
    def __init__(self) -> None:
        self.nodes = MAX_NODES
        self.text = 100_000


def tree(value: Any) -> Markup:
    """Return JSON as a tree that can be folded, of at most `MAX_NODES` values."""
    return Markup("").join(_tree(value, _Budget(), 0))


def _tree(value: Any, budget: _Budget, depth: int) -> Iterator[Markup]:
    budget.nodes -= 1
    if isinstance(value, (dict, list)) and value:
        if depth > 40:
            yield Markup('<span class="cut">… deeper in the raw JSON</span>')
            return
        size = f"{len(value):,} {'key' if isinstance(value, dict) else 'item'}{'s' if len(value) != 1 else ''}"
        begin = _OPEN_NODE if depth < OPEN_DEPTH and len(value) <= 50 else _NODE
        yield begin.format("{…}" if isinstance(value, dict) else "[…]", size)
        pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            if budget.nodes <= 0 or budget.text <= 0:
                yield Markup('<li class="cut">… the rest is in the raw JSON</li>')
                break
            yield Markup('<li><span class="key">{}</span> ').format(shortened(key, 120))
            yield from _tree(item, budget, depth + 1)
            yield Markup("</li>")
        yield Markup("</ul></details>")
        return
    yield _leaf(value, budget)


def _leaf(value: Any, budget: _Budget) -> Markup:
    kind = "string" if isinstance(value, str) else "null" if value is None else "atom"
    text = json_text(value[: MAX_TEXT + 1] if isinstance(value, str) else value)
    budget.text -= len(text)
    if len(text) <= FOLDED:
        return Markup('<code class="{}">{}</code>').format(kind, text)
    more = "" if not isinstance(value, str) or len(value) <= MAX_TEXT else f" … of {len(value):,} characters"
    return Markup(
        '<details class="long"><summary><code class="{}">{}…</code></summary><code class="{}">{}</code>{}</details>'
    ).format(kind, text[:FOLDED], kind, text[:MAX_TEXT], more)


# ------------------------------------------------------------------------------------- differences


class DiffLine(NamedTuple):
    """A line of both sides; ``changed`` where they differ. An empty side is None."""

    before: str | None
    after: str | None
    changed: bool


class DiffField(NamedTuple):
    """A field that changed, side by side."""

    name: str
    kind: str
    lines: list[DiffLine]


def side_by_side(changes: Sequence[FieldChange]) -> list[DiffField]:
    """Return changes as aligned lines."""
    return [DiffField(shortened(change.name, 120), change.kind, _lines(change)) for change in changes]


def changes(history: History) -> list[tuple[AuditRecord, list[DiffField] | None]]:
    """Return a history, newest first, with what changed side by side; None where a page could not hold it."""
    shown: list[tuple[AuditRecord, list[DiffField] | None]] = []
    lines = 0
    for change in reversed(history.changes):
        fields = side_by_side(change.fields) if lines < MAX_HISTORY_LINES else None
        lines += sum(1 + len(field.lines) for field in fields or ())
        shown.append((change.record, fields if fields is None or lines < 2 * MAX_HISTORY_LINES else None))
    return shown


def _lines(change: FieldChange) -> list[DiffLine]:
    before = [] if change.kind == "added" else _printed(change.before)
    after = [] if change.kind == "removed" else _printed(change.after)
    lines: list[DiffLine] = []
    for kind, first, last, begin, end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        left, right = before[first:last], after[begin:end]
        lines += [DiffLine(one, other, kind != "equal") for one, other in zip_longest(left, right)]
    return lines


def _printed(value: Any) -> list[str]:
    lines = list(_pretty(value, "", ""))
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"… {len(lines) - MAX_LINES:,} lines more in the raw JSON"]
    return [line if len(line) <= MAX_TEXT else f"{line[:MAX_TEXT]}…" for line in lines]


def _pretty(value: Any, indent: str, key: str) -> Iterator[str]:
    if not isinstance(value, (dict, list)) or not value or len(indent) > 40:
        yield f"{indent}{key}{json_text(value)}"
        return
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    yield f"{indent}{key}{opening}"
    pairs: Iterable[tuple[str, Any]] = (
        ((f"{json_text(name)}: ", item) for name, item in value.items())
        if isinstance(value, dict)
        else (("", item) for item in value)
    )
    for name, item in pairs:
        yield from _pretty(item, f"{indent}  ", name)
    yield f"{indent}{closing}"


# ----------------------------------------------------------------------------------------- filters


class Chip(NamedTuple):
    """A term of a query, and the query without it."""

    text: str
    without: str


def chips(filters: Mapping[str, Any]) -> list[Chip]:
    """Return the terms of a query, each with the query that is left when it goes."""
    made, seen = [], set()
    for name, value in filters.items():
        if name in seen:
            continue
        if name in ("data", "meta"):
            for path, item in value.items():
                rest = {key: other for key, other in value.items() if key != path}
                without = {**filters, name: rest} if rest else _without(filters, name)
                made.append(Chip(format_query({name: {path: item}}), format_query(without)))
            continue
        group = [name]
        for identity in ("actor", "target"):
            if name in (f"{identity}_id", f"{identity}_type"):
                group = [part for part in (f"{identity}_type", f"{identity}_id") if part in filters]
        seen.update(group)
        # A word is searched for in a window, without which it stands alone for the moment of making the chip.
        part = {key: filters[key] for key in group}
        if isinstance(value, datetime):
            text = f"{name}:{value:%Y-%m-%d %H:%M}"
        else:
            text = f"“{value}”" if name == "text" else format_query(part)
        rest = _without(filters, *group)
        if name == "since" and "text" in rest:
            rest = _without(rest, "text")
        made.append(Chip(text, format_query(rest)))
    return made


def _without(filters: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in filters.items() if key not in names}


def also(filters: Mapping[str, Any], **more: Any) -> str:
    """Return the query text of these filters and others, which take the place of those of their name."""
    names = set(more)
    for identity in ("actor", "target"):
        if f"{identity}_id" in names:
            names |= {f"{identity}_ids", f"{identity}_type"}
    if "event" in names:
        names |= {"events", "event_prefix"}
    if "severity" in names:
        names.add("severities")
    return format_query(
        {**_without(filters, *names), **{key: value for key, value in more.items() if value is not None}}
    )


def within(filters: Mapping[str, Any], span: str | None) -> str:
    """Return the query text of these filters in another window: a span back from now, or all time."""
    rest = format_query(_without(filters, "since", "until", "text"))
    if span is None:
        return rest
    parts = [rest, f"since:{span}"]
    if "text" in filters:  # which is nothing without a window
        parts.append(format_query({"since": "2000-01-01", "text": filters["text"]}).partition(" ")[2])
    return " ".join(filter(None, parts))


def identity_query(record: AuditRecord, role: str, filters: Mapping[str, Any]) -> str:
    """Return the query that asks for events of this record's actor or target as well."""
    return also(
        filters, **{f"{role}_type": getattr(record, f"{role}_type"), f"{role}_id": getattr(record, f"{role}_id")}
    )


# --------------------------------------------------------------------------------------- histogram


class Bar(NamedTuple):
    """A bar of a histogram, in units of its drawing."""

    x: int
    y: int
    width: int
    height: int
    label: str
    query: str
    estimated: bool


class Drawing(NamedTuple):
    """A histogram to draw. Where not all was counted, the planner's belief stands for it."""

    bars: list[Bar]
    width: int
    height: int
    first: datetime
    last: datetime
    total: int
    estimated: bool


def bar_width(since: datetime, until: datetime) -> timedelta:
    """Return how long a bar stands for, so that there are not too many."""
    return next(
        (width for width in _WIDTHS if (until - since) / width <= _MOST_BARS), (until - since) / (_MOST_BARS - 2)
    )


def drawing(
    found: Histogram, filters: Mapping[str, Any], estimates: Mapping[datetime, int], *, linked: bool = True
) -> Drawing:
    """Return a histogram as bars, of which each leads to its events; ``estimates`` take the place of counts."""
    counts = [estimates.get(bucket.start, bucket.count) for bucket in found.buckets]
    most = max(counts, default=0) or 1
    bars = []
    for place, (bucket, count) in enumerate(zip(found.buckets, counts, strict=True)):
        height = 0 if not count else max(2, round(count / most * _HEIGHT))
        estimated = bucket.start in estimates
        label = f"{clock(bucket.start)}: {'about ' if estimated else ''}{count:,} event{'s' if count != 1 else ''}"
        query = also(filters, since=bucket.start, until=bucket.end - timedelta(microseconds=1)) if linked else ""
        bars.append(Bar(place * _BAR, _HEIGHT - height, _BAR - 2, height, label, query, estimated))
    return Drawing(
        bars,
        max(1, len(bars)) * _BAR,
        _HEIGHT,
        found.buckets[0].start,
        found.buckets[-1].end,
        sum(counts),
        bool(estimates),
    )


def harmless(text: object) -> Markup:
    """Return stored text as HTML."""
    return escape(visible(text))
