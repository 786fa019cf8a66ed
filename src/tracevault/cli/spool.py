"""``tracevault spool``: what waits on this machine, and the dead letters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from tracevault import UndeliveredError
from tracevault.cli.connect import conninfo, write_dsn
from tracevault.cli.options import dsn_option, output_options
from tracevault.cli.output import Output, console, json_line, json_text, size, visible, write_lines
from tracevault.config import Config
from tracevault.event.payload import iso_utc
from tracevault.event.prepare import unstored_record
from tracevault.postgres.pool import writer_connect
from tracevault.writer import inspection
from tracevault.writer.background import BackgroundWriter
from tracevault.writer.dead import Letter

_spool = click.option(
    "--spool", "folder", metavar="DIR", required=True, type=click.Path(path_type=Path), help="the folder of the spool"
)
_all = click.option("--all", "every", is_flag=True, help="all dead letters of the spool")


@click.group()
def spool() -> None:
    """Look at the spool of async events, and deal with its dead letters."""


@spool.command()
@_spool
@output_options
def status(folder: Path, output: Output) -> None:
    """Print what is in each file of the spool."""
    found = inspection.statuses(folder)
    if output == "json":
        write_lines(json_text(file._asdict()) for file in found)
        return
    _print(
        ("file", "held by", "database", "waiting", "dead", "unreadable", "size", "oldest"),
        [
            (
                file.name,
                "a process" if file.held else "nobody (orphan)",
                file.target,
                f"{file.waiting:,}",
                f"{file.dead:,}",
                f"{file.unreadable:,}",
                size(file.bytes),
                "" if file.oldest_seconds is None else f"{file.oldest_seconds:,.0f} s",
            )
            for file in found
        ],
    )


@spool.command()
@_spool
@dsn_option("DATABASE_URL_WRITE")
@click.option("--timeout", metavar="S", type=float, default=30.0, help="seconds to wait at most; default: 30")
@click.pass_context
def flush(ctx: click.Context, folder: Path, dsn: str | None, timeout: float) -> None:
    """Deliver what orphans hold to a database, also what waited for another one.

    Exit 3 if records are left when time is up.
    """
    inspection.paths(folder)
    with conninfo(write_dsn(dsn)) as target:
        config = Config(connection_string=target, spool=folder)
        # Without a target of its own the writer adopts every orphan.
        writer = BackgroundWriter(config, writer_connect(config, target))
        assert writer.spool is not None
        deadline = time.monotonic() + timeout
        while (left := sum(file.depth for file in writer.spool.files())) and time.monotonic() < deadline:
            time.sleep(0.05)
        counts = writer.stats()
        with suppress(UndeliveredError):  # told below
            writer.close(1.0)
    click.echo(f"delivered: {counts.delivered}, dead letters: {counts.dead}, left: {left}", err=True)
    ctx.exit(3 if left else 0)


@spool.group()
def dead() -> None:
    """Show, repeat or discard the records that the database refused."""


@dead.command("list")
@_spool
@output_options
def list_(folder: Path, output: Output) -> None:
    """List the dead letters, the oldest first."""
    found = inspection.letters(folder)
    if output == "json":
        write_lines(json_text({"id": letter.id, "event": letter.event, **_why(letter)}) for letter in found)
        return
    _print(
        ("id", "scope", "table", "event", "SQLSTATE", "when (UTC)", "message"),
        [
            (
                letter.id,
                letter.scope,
                letter.table,
                letter.event,
                letter.sqlstate or "",
                f"{datetime.fromtimestamp(letter.died_at, UTC):%Y-%m-%d %H:%M:%S}",
                letter.message,
            )
            for letter in found
        ],
    )


@dead.command()
@click.argument("id")
@_spool
def show(id: str, folder: Path) -> None:  # noqa: A002
    """Print a dead letter in full as JSON, and why it is one."""
    for letter in _chosen(folder, [id], every=False):
        record = json_line(unstored_record(letter.prepared))
        # Put together as text: the numbers of the record are exact there.
        write_lines([f'{{"record": {record}, "why": {json_text(_why(letter))}}}'])


@dead.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@_all
@_spool
def requeue(ids: Sequence[str], every: bool, folder: Path) -> None:
    """Have dead letters wait for the database again.

    A living process with this spool delivers them, or the next one.
    """
    chosen = _chosen(folder, ids, every=every)
    inspection.requeue(folder, chosen)
    click.echo(f"requeued: {len(chosen)}", err=True)


@dead.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@_all
@click.option("--reason", metavar="TEXT", required=True, help="why; it is stored")
@_spool
def drop(ids: Sequence[str], every: bool, reason: str, folder: Path) -> None:
    """Discard dead letters.

    For each, the event `tracevault.dead_letter.dropped` is put in the spool first, for the same table.
    """
    chosen = _chosen(folder, ids, every=every)
    inspection.drop(folder, chosen, reason)
    click.echo(f"dropped: {len(chosen)}", err=True)


def _chosen(folder: Path, ids: Sequence[str], *, every: bool) -> list[Letter]:
    if every == bool(ids):
        raise click.UsageError("name the ids, or pass --all")
    found = inspection.letters(folder)
    missing = set(ids) - {letter.id for letter in found}
    if missing:
        raise click.ClickException(f"no such dead letter: {', '.join(sorted(missing))}")
    return [letter for letter in found if every or letter.id in ids]


def _why(letter: Letter) -> dict[str, Any]:
    return {
        "scope": letter.scope,
        "table": letter.table,
        "sqlstate": letter.sqlstate,
        "died_at": iso_utc(datetime.fromtimestamp(letter.died_at, UTC)),
        "message": letter.message,
    }


def _print(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table  # noqa: PLC0415 - JSON does without

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*map(visible, row))
    console().print(table)
