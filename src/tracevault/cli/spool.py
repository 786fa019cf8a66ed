"""``tracevault spool``: what waits on this machine, and the dead letters."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from tracevault import UndeliveredError
from tracevault.cli.connect import TIMEOUT, conninfo, write_dsn
from tracevault.cli.options import dsn_option, output_options
from tracevault.cli.output import Output, console, json_line, number, size, visible, write_lines
from tracevault.config import Config
from tracevault.events.json_text import json_text
from tracevault.events.payload import iso_utc
from tracevault.events.prepare import unstored_record
from tracevault.postgres.failures import Place
from tracevault.postgres.pool import connect_once, target_of, writer_connect
from tracevault.writer import inspection
from tracevault.writer.background import BackgroundWriter
from tracevault.writer.dead import FILE_NAME, Letter
from tracevault.writer.inspection import BrokenFile, FileStatus
from tracevault.writer.stats import Stats

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
@click.pass_context
def status(ctx: click.Context, folder: Path, output: Output) -> None:
    """Print what is in each file of the spool.

    Exit 1 if a file is broken, or records in it are; all that can be read is shown.
    """
    found, broken = inspection.statuses(folder)
    if output == "json":
        write_lines(json_text(file) for file in [*_readable(found), *_unreadable(broken)])
    else:
        _print_files([file for file in found if file.name != FILE_NAME], broken)
        letters = sum(file.dead for file in found)
        if letters:
            write_lines([f"{number(letters, 'dead letter')}: see `tracevault spool dead list`"])
    ctx.exit(1 if broken or any(file.unreadable for file in found) else 0)


@spool.command()
@_spool
@dsn_option("DATABASE_URL_WRITE")
@click.option("--any-database", is_flag=True, help="also what waits for another database, as after a move")
@click.option("--timeout", metavar="S", type=float, default=30.0, help="seconds to wait at most; default: 30")
@click.pass_context
def flush(ctx: click.Context, folder: Path, dsn: str | None, any_database: bool, timeout: float) -> None:
    """Deliver what orphans hold for a database.

    Files of living processes are left to them. Exit 1 if a record became a dead letter, or a file is broken; 3 if the
    database cannot be reached, or records are left when time is up.
    """
    with conninfo(write_dsn(dsn)) as target:
        connect_once(target, TIMEOUT, Place("connecting")).close()
        # Without a target of its own the writer takes over every orphan.
        here = None if any_database else target_of(target)
        files = {file.name for file in _orphans(inspection.statuses(folder)[0]) if here in (None, file.target)}
        stats = _deliver(folder, target, here, timeout, files)
    found, broken = inspection.statuses(folder)
    left = [file for file in _orphans(found) if here in (None, file.target)]
    others = [file for file in _orphans(found) if file not in left]
    if stats.delivered:
        _tell([f"delivered {number(stats.delivered, 'event')} of {number(len(files), 'file')}"])
    elif not files:
        _tell(["nothing to deliver"])
    if stats.dead:
        _tell([f"refused {number(stats.dead, 'event')}: see `tracevault spool dead list`"])
    _tell_files("left, as time is up", left)
    _tell_files("held by living processes, which deliver it", [file for file in found if file.held])
    for database in sorted({_database(file) for file in others}):
        what = f"for another database, {database} (--any-database delivers it here)"
        _tell_files(what, [file for file in others if _database(file) == database])
    _tell_broken(broken)
    ctx.exit(3 if left else 1 if stats.dead or broken else 0)


def _orphans(found: Iterable[FileStatus]) -> list[FileStatus]:
    return [file for file in found if file.waiting and not file.held]


def _deliver(folder: Path, dsn: str, target: str | None, seconds: float, files: set[str]) -> Stats:
    """Deliver what orphans hold, and return what was done; files that become orphans meanwhile are added."""
    config = Config(connection_string=dsn, spool=folder)
    with _errors_only():
        writer = BackgroundWriter(config, writer_connect(config, dsn), target)
        assert writer.spool is not None
        deadline = time.monotonic() + seconds
        while True:
            held = writer.spool.files()
            files.update(file.path.name for file in held)
            if not any(file.depth for file in held) or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        with suppress(UndeliveredError):  # who calls finds what is left
            writer.close(1.0)
    return writer.stats()


@contextmanager
def _errors_only() -> Iterator[None]:
    """Have the library log no warnings: about files of other databases the command has its own say."""
    log = logging.getLogger("tracevault")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


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
    _print_letters(found)


@dead.command()
@click.argument("id")
@_spool
def show(id: str, folder: Path) -> None:  # noqa: A002
    """Print a dead letter in full as JSON, and why it is one.

    Exit 1 if there is none with this ID.
    """
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

    A living process with this spool delivers them, or the next one. Exit 1, with nothing done, if there is none with
    an ID.
    """
    chosen = _chosen(folder, ids, every=every)
    inspection.requeue(folder, chosen)
    _tell([f"requeued: {number(len(chosen), 'dead letter')}"])


@dead.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@_all
@click.option("--reason", metavar="TEXT", required=True, help="why; it is stored")
@_spool
def drop(ids: Sequence[str], every: bool, reason: str, folder: Path) -> None:
    """Discard dead letters.

    For each, the event `tracevault.dead_letter.dropped` is put in the spool first, for the same table. Exit 1, with
    nothing done, if there is none with an ID.
    """
    chosen = _chosen(folder, ids, every=every)
    inspection.drop(folder, chosen, reason)
    _tell([f"dropped: {number(len(chosen), 'dead letter')}"])


def _chosen(folder: Path, ids: Sequence[str], *, every: bool) -> list[Letter]:
    if every == bool(ids):
        raise click.UsageError("name the ids, or pass --all")
    found = inspection.letters(folder)
    missing = sorted(set(ids) - {letter.id for letter in found})
    if missing:
        _tell(f"no such dead letter: {id_}" for id_ in missing)
        click.get_current_context().exit(1)
    return [letter for letter in found if every or letter.id in ids]


def _why(letter: Letter) -> dict[str, Any]:
    return {
        "scope": letter.scope,
        "table": letter.table,
        "sqlstate": letter.sqlstate,
        "died_at": iso_utc(datetime.fromtimestamp(letter.died_at, UTC)),
        "message": letter.message,
    }


# -- words -------------------------------------------------------------------------------------------------


def _holder(file: FileStatus | BrokenFile) -> str:
    return "nobody" if not file.held else "a process" if file.pid is None else f"process {file.pid}"


def _database(file: FileStatus) -> str:
    return file.target or "only its writer knows which"


def _age(seconds: float) -> str:
    for size_, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size_:
            return f"{seconds / size_:,.0f} {unit}"
    return f"{seconds:.0f} s"


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(visible(line), err=True)


def _tell_files(what: str, files: Sequence[FileStatus]) -> None:
    if files:
        _tell([f"{what}:"])
        for file in files:
            by = f" ({_holder(file)})" if file.held else ""
            _tell([f"  {file.name}{by}: {number(file.waiting, 'event')}"])


def _tell_broken(broken: Sequence[BrokenFile]) -> None:
    if broken:
        _tell(["broken:", *(f"  {file.name}: {file.reason}" for file in broken)])


# -- status as JSON, and for a person ----------------------------------------------------------------------


def _readable(found: Iterable[FileStatus]) -> Iterator[dict[str, Any]]:
    for file in found:
        yield {**file._asdict(), "broken": None}


def _unreadable(broken: Iterable[BrokenFile]) -> Iterator[dict[str, Any]]:
    for file in broken:
        known = {"name": file.name, "held": file.held, "pid": file.pid, "bytes": file.bytes, "broken": file.reason}
        yield {**dict.fromkeys(FileStatus._fields), **known}


def _print_files(found: Sequence[FileStatus], broken: Sequence[BrokenFile]) -> None:
    """Print a table for each database, whose name may be as wide as the terminal."""
    from rich.padding import Padding  # noqa: PLC0415 - JSON does without
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    if not found and not broken:
        _tell(["no events wait"])
    damaged = any(file.unreadable for file in found)
    headers = ("file", "held by", "waiting", *(["damaged"] if damaged else []), "size", "oldest")
    cells = {
        file: (
            visible(file.name),
            _holder(file),
            f"{file.waiting:,}",
            *([f"{file.unreadable:,}"] if damaged else []),
            size(file.bytes),
            "" if file.oldest_seconds is None else _age(file.oldest_seconds),
        )
        for file in found
    }
    widths = [max(map(len, column)) for column in zip(headers, *cells.values(), strict=True)]
    out = console()
    for database in sorted({_database(file) for file in found}):
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for place, (header, width) in enumerate(zip(headers, widths, strict=True)):
            table.add_column(header, min_width=width, overflow="fold", justify="left" if place < 2 else "right")
        for file in found:
            if _database(file) == database:
                table.add_row(*cells[file])
        out.print(Text(visible(database), style="bold", overflow="fold"))
        out.print(Padding(table, (0, 0, 0, 2)))
    if broken:
        out.print(Text("broken", style="bold red"))
        for unreadable in broken:
            by = f", held by {_holder(unreadable)}" if unreadable.held else ""
            line = f"{visible(unreadable.name)}, {size(unreadable.bytes)}{by}: {visible(unreadable.reason)}"
            out.print(Padding(Text(line, overflow="fold"), (0, 0, 0, 2)))


def _print_letters(found: Sequence[Letter]) -> None:
    from rich.padding import Padding  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    if not found:
        _tell(["no dead letters"])
    out = console()
    for letter in found:
        when = f"{datetime.fromtimestamp(letter.died_at, UTC):%Y-%m-%d %H:%M:%S} UTC"
        where = f"table {letter.table}, scope {letter.scope}"
        out.print(Text.assemble((visible(letter.event), "bold"), f"  {letter.id}", overflow="fold"))
        lines = Text(f"{when}, {visible(where)}\n{visible(letter.message)}", overflow="fold")
        out.print(Padding(lines, (0, 0, 0, 2)))
