"""Records for a person: a table of many, or one in full. Stored text goes through `visible`, never as markup."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tracevault import SEVERITIES_FOR_ERRORS_ONLY_FILTER, AuditRecord, FieldChange, History
from tracevault.cli.output import console, fits, identity, json_lines, visible
from tracevault.events.history import field_changes
from tracevault.events.json_text import json_text
from tracevault.events.payload import iso_utc
from tracevault.events.record import RECORD_COLUMNS

# What the first lines of a record say, or its sections; the other columns are listed between them by name.
_SHOWN_APART = frozenset({"id", "event", "actor_id", "actor_type", "target_id", "target_type", "data", "meta"})
_ID_WIDTH = 36
_BAR = 40


def print_records(records: Sequence[AuditRecord]) -> None:
    """Print a table of records: a line for each where that fits the terminal, else two."""
    if not records:
        return
    out = console()
    table = _one_line_each(records)
    out.print(table if fits(out, table) else _two_lines_each(records))


def print_record(record: AuditRecord) -> None:
    """Print one record in full: its columns, what changed, and its payloads."""
    payloads = (("data", record.data), ("meta", record.meta))
    console().print(Group(*record_parts(record.event, str(record.id), _fields(record), payloads)))


def record_parts(
    event: str, id_: str, fields: Iterable[tuple[str, Text]], payloads: Iterable[tuple[str, Any]]
) -> Iterator[RenderableType]:
    """Yield what is shown of one event: its name and id, its fields, what changed, and payloads that are not None."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(name, value)
    yield Text(visible(event), style="bold", overflow="fold")
    yield Text(visible(id_), style="dim")
    yield Padding(table, (1, 0, 0, 2))
    for name, payload in payloads:
        changes = field_changes(payload) if name == "data" else []
        if changes:
            yield Text("\nwhat changed", style="dim")
            yield Padding(changes_table(changes), (0, 0, 0, 2))
        if payload is not None:
            text = Text("\n".join(json_lines(payload)), overflow="fold")
            yield Text(f"\n{name}", style="dim")
            yield Padding(text, (0, 0, 0, 2))


def changes_table(changes: Iterable[FieldChange]) -> Table:
    """Return one line per changed key: ``price  120 → 150``."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for change in changes:
        table.add_row(Text(visible(change.name)), change_text(change))
    return table


def change_text(change: FieldChange) -> Text:
    """Return ``120 → 150``; a side on which the key is missing reads "none", which is no JSON value."""
    before = Text("none", style="dim") if change.kind == "added" else Text(json_text(change.before), style="red")
    after = Text("none", style="dim") if change.kind == "removed" else Text(json_text(change.after), style="green")
    return Text(" → ").join([before, after])


def print_changes(changes: Sequence[FieldChange]) -> None:
    """Print what changed, a line for each key."""
    if changes:
        console().print(changes_table(changes))


def print_history(history: History) -> None:
    """Print each change under the line of its event, and the state after all."""
    out = console()
    for change in history.changes:
        out.print(_line(change.record))
        if change.fields:
            out.print(Padding(changes_table(change.fields), (0, 0, 0, 2)))
    if history.state is not None:
        last = history.changes[-1].record.occurred_at
        out.print(Text(f"\nafter {last:%Y-%m-%d %H:%M:%S}", style="dim"))
        out.print(Padding(Text("\n".join(json_lines(history.state)), overflow="fold"), (0, 0, 0, 2)))


def print_line(record: AuditRecord) -> None:
    """Print one record in one line, however wide the terminal is."""
    console().print(_line(record), soft_wrap=True)


def print_rates(measured: Sequence[tuple[str, int, float]]) -> None:
    """Print what was measured, and how often it can be done in a second."""
    table = _table("what", "count", "per second")
    for column in table.columns[1:]:
        column.justify = "right"
    for what, count, rate in measured:
        table.add_row(what, f"{count:,}", f"{rate:,.0f}")
    console().print(table)


def print_bars(counts: Sequence[tuple[str, int]]) -> None:
    """Print numbers with bars, of which the longest is for the greatest."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_column(justify="right")
    table.add_column(style="cyan", no_wrap=True)
    most = max((count for _, count in counts), default=0) or 1
    for name, count in counts:
        eighths = round(count / most * _BAR * 8)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        table.add_row(Text(name), f"{count:,}", bar or ("▏" if count else ""))
    if counts:
        console().print(table)


def _line(record: AuditRecord) -> Text:
    parts = [
        _time(record),
        Text(visible(record.event), style="bold"),
        Text(identity(record.actor_id, record.actor_type)),
        Text(identity(record.target_id, record.target_type)),
        outcome_text(record),
        Text(str(record.id), style="dim"),
    ]
    return Text("  ").join(part for part in parts if part)


def outcome_text(record: AuditRecord) -> Text:
    """Return outcome and severity, in the colour of their weight."""
    text = Text()
    if record.outcome is not None:
        text.append(visible(record.outcome), style="red" if record.outcome == "failure" else "")
    if record.severity is not None:
        errors = record.severity in SEVERITIES_FOR_ERRORS_ONLY_FILTER
        style = "red" if errors else "yellow" if record.severity == "warning" else ""
        text.append(" " if text else "").append(visible(record.severity), style=style)
    return text


def _one_line_each(records: Sequence[AuditRecord]) -> Table:
    table = _table("time (UTC)", "event", "actor", "target", "outcome", "id")
    for record in records:
        table.add_row(
            _time(record),
            Text(visible(record.event), style="bold"),
            Text(identity(record.actor_id, record.actor_type)),
            Text(identity(record.target_id, record.target_type)),
            outcome_text(record),
            Text(str(record.id), style="dim"),
        )
    return table


def _two_lines_each(records: Sequence[AuditRecord]) -> Table:
    table = _table("time (UTC)", "event, id", "actor, target")
    table.columns[1].min_width = _ID_WIDTH  # half an id finds nothing
    for record in records:
        table.add_row(
            Text("\n").join([_time(record), outcome_text(record)]),
            Text("\n").join([Text(visible(record.event), style="bold"), Text(str(record.id), style="dim")]),
            Text("\n").join(
                [
                    Text(identity(record.actor_id, record.actor_type)),
                    Text(identity(record.target_id, record.target_type)),
                ]
            ),
        )
    return table


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for header in headers:
        table.add_column(header, no_wrap=True, overflow="ellipsis")
    return table


def _time(record: AuditRecord) -> Text:
    return Text(f"{record.occurred_at:%Y-%m-%d %H:%M:%S}", style="dim")


def _fields(record: AuditRecord) -> Iterator[tuple[str, Text]]:
    for role, id_, type_ in (
        ("actor", record.actor_id, record.actor_type),
        ("target", record.target_id, record.target_type),
    ):
        if id_ is not None or type_ is not None:
            yield role, Text(identity(id_, type_))
    for name in RECORD_COLUMNS:
        value = getattr(record, name)
        if name in _SHOWN_APART or value is None:
            continue
        yield name, Text(iso_utc(value) if name in {"occurred_at", "created_at"} else visible(str(value)))
