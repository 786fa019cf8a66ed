"""``tracevault partitions``: look at them, make them ahead, and make a plain table partitioned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import click

from tracevault.cli.connect import connection, read_dsn, write_dsn
from tracevault.cli.options import dsn_option, output_options, table_option
from tracevault.cli.output import Output, number, size, write_lines
from tracevault.config import INTERVALS, Interval, check_table_name
from tracevault.events.json_text import json_text
from tracevault.events.payload import iso_utc
from tracevault.events.rules import moment
from tracevault.flows.convert import Conversion, Stage
from tracevault.flows.partitions import Layout
from tracevault.postgres import partitions as work
from tracevault.postgres.schema import PATIENCE
from tracevault.schema.partitions import AHEAD, BEGINNING, END, MOST_AHEAD, Partition, Range

_by = click.option("--by", type=click.Choice(INTERVALS), help="how long a partition is; default: as those there are")
_ahead = click.option(
    "--ahead",
    type=click.IntRange(0, MOST_AHEAD),
    default=AHEAD,
    show_default=True,
    metavar="NUMBER",
    help="how many to make after the present one",
)
_dry = click.option("--dry-run", is_flag=True, help="only print what would be done")


@click.group()
def partitions() -> None:
    """Divide an audit table by time, so that old events can go as quickly as they came."""


@partitions.command("list")
@table_option
@output_options
@dsn_option("DATABASE_URL_READ, DATABASE_URL_WRITE")
def list_command(dsn: str | None, table: str, output: Output) -> None:
    """Print the partitions of a table, the newest first."""
    with connection(read_dsn(dsn), "looking at partitions") as link:
        layout = work.layout_of(link, check_table_name(table, "--table"))
    found = sorted(layout.partitions, key=lambda one: (one.default, one.start), reverse=True)
    if output == "json":
        write_lines(json_text(_as_json(one)) for one in found)
    else:
        write_lines(_listed(layout, found))


def _as_json(one: Partition) -> dict[str, Any]:
    ends = {"from": None, "until": None} if one.default else {"from": _end(one.start), "until": _end(one.end)}
    return {"name": one.name, **ends, "default": one.default, "rows": one.rows, "bytes": one.size_bytes}


def _end(time: datetime) -> str | None:
    return None if time in {BEGINNING, END} else iso_utc(time)


def _listed(layout: Layout, found: list[Partition]) -> Iterator[str]:
    if layout.kind != "p":
        yield f"{layout.table}: not partitioned"
        return
    width = max((len(one.name) for one in found), default=0)
    for one in found:
        yield f"{one.name:<{width}}  {_bounds(one):<26}  {_rows(one):>20}  {size(one.size_bytes):>9}"


def _bounds(one: Partition) -> str:
    if one.default:
        return "everything else"
    return _stretch(Range(one.start, one.end))


def _rows(one: Partition) -> str:
    if not one.filled:
        return "no rows"
    return f"~{one.rows:,} rows" if one.rows else "rows not counted yet"


def _stretch(wanted: Range) -> str:
    if wanted.start == BEGINNING:
        return f"before {wanted.end:%Y-%m-%d}"
    return f"{wanted.start:%Y-%m-%d} to {wanted.end:%Y-%m-%d}"


@partitions.command()
@table_option
@_by
@_ahead
@_dry
@dsn_option("DATABASE_URL_WRITE")
def ensure(dsn: str | None, table: str, by: Interval | None, ahead: int, dry_run: bool) -> None:
    """Make the partitions of the present time and those ahead, unless they are there.

    Events that went to the default partition get partitions as well, and move there; until that is done, writers of
    such events wait. All others go on. Run it by a timer, or let a vault do it whose role owns the table.
    """
    name = check_table_name(table, "--table")
    with connection(write_dsn(dsn), "making partitions") as link:
        if dry_run:
            length, ranges = work.wanted(link, work.layout_of(link, name), by, ahead, stray=True)
            write_lines(f"{name}: would make the {length} {_stretch(wanted)}" for wanted in ranges)
            return
        work.ensure(link, name, by, ahead, stray=True, patience=PATIENCE, announce=lambda made: _made(name, made))


def _made(table: str, made: work.Made) -> None:
    moved = f", and moved {number(made.moved, 'event')} there" if made.moved else ""
    click.echo(f"{table}: made {_stretch(made.wanted)}{moved}")


@partitions.command()
@table_option
@click.option("--by", type=click.Choice(INTERVALS), default="month", show_default=True, help="how long a partition is")
@click.option("--at", metavar="DATE", help="until when the old table has everything; default: a day away or more")
@_ahead
@click.option("--abort", is_flag=True, help="undo what an interrupted conversion has left")
@click.option("--dry-run", is_flag=True, help="only print the SQL")
@dsn_option("DATABASE_URL_WRITE")
def convert(dsn: str | None, table: str, by: Interval, at: str | None, ahead: int, abort: bool, dry_run: bool) -> None:
    """Make a plain table partitioned while it is read and written, without moving a row.

    It becomes the partition of everything until a date, and those from then on are made beside it. Two indexes are
    built first, and every row is looked at once, while writers go on; then they wait for a moment. Interrupted, run it
    again: what is done stays done.
    """
    name = check_table_name(table, "--table")
    until = None if at is None else moment(at, "--at")
    with connection(write_dsn(dsn), "converting") as link:
        if abort:
            work.abort(link, name)
            return
        planned = work.plan_conversion(link, name, by, until)
        if dry_run:
            write_lines(_script(planned))
        elif not planned.stages:
            click.echo(f"{name}: partitioned already", err=True)
        else:
            work.convert(link, planned, lambda text: click.echo(f"{name}: {text}", err=True), ahead)
            click.echo("done", err=True)


def _script(planned: Conversion) -> Iterator[str]:
    for stage in planned.stages:
        yield f"-- {stage.title}"
        yield from _statements(stage)
        yield ""
    if planned.stages:
        yield "-- then: tracevault partitions ensure"


def _statements(stage: Stage) -> Iterable[str]:
    statements = [f"{statement};" for statement in stage.statements]
    return ["BEGIN;", *statements, "COMMIT;"] if stage.together else statements
