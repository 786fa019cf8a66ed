"""``tracevault import``: events of an export, stored again."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast
from uuid import UUID

import click
from psycopg import Connection

from tracevault import DuplicateIdError, Tracevault, ValidationError
from tracevault.cli.connect import connection, vault, write_dsn
from tracevault.cli.options import dsn_option, table_option
from tracevault.cli.output import number, progress_bar, visible
from tracevault.events.json_text import json_text
from tracevault.transfer.reading import Line, read_lines

_BATCH = 1000


class _Counts(NamedTuple):
    stored: int = 0
    there: int = 0
    refused: int = 0

    def plus(self, *, stored: int = 0, there: int = 0, refused: int = 0) -> _Counts:
        return _Counts(self.stored + stored, self.there + there, self.refused + refused)


@click.command("import")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--rejects",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="write lines that cannot be stored there, with the reason; default: they are only named",
)
@table_option
@dsn_option("DATABASE_URL_WRITE")
@click.pass_context
def import_events(
    ctx: click.Context, files: tuple[str, ...], rejects: Path | None, table: str, dsn: str | None
) -> None:
    """Store the events of exported JSON Lines (FILE, FILE.gz, or - for standard input).

    Ids and times are kept; created_at, leaves and stored_xid are new, and `mode` is sync. An event that is stored
    already with the same content is passed over, so an import can be run again. Exit 1 if a line was refused.
    """
    counts = _Counts()
    with ExitStack() as stack:
        aside = None if rejects is None else stack.enter_context(rejects.open("w", encoding="utf-8"))
        dsn = write_dsn(dsn)
        audit = stack.enter_context(vault(dsn, table))
        link = stack.enter_context(connection(dsn, "importing"))
        progress = stack.enter_context(progress_bar(f"importing into {table}"))
        for name in files:
            lines = _lines(stack, name)
            while batch := list(islice(lines, _BATCH)):
                found, refused = _store(audit, link, batch)
                counts = counts.plus(**found, refused=len(refused))
                for line, why in refused:
                    if aside is None:
                        click.echo(f"{visible(name)}:{line.number}: {visible(why)}", err=True)
                    else:
                        text = line.text.decode(errors="replace")
                        aside.write(json_text({"file": name, "line": line.number, "why": why, "text": text}) + "\n")
                progress(sum(counts), None)
    click.echo(
        f"{number(counts.stored, 'event')} stored, {counts.there:,} there already, {counts.refused:,} refused", err=True
    )
    if counts.refused:
        ctx.exit(1)


def _lines(stack: ExitStack, name: str) -> Iterator[Line]:
    if name == "-":
        return read_lines(sys.stdin.buffer)
    try:
        file = stack.enter_context(Path(name).open("rb"))  # noqa: SIM115 - the stack closes it
    except OSError as error:
        raise click.ClickException(f"{name!r} cannot be read: {error.strerror or error}") from None
    return read_lines(cast("BinaryIO", stack.enter_context(gzip.open(file))) if name.endswith(".gz") else file)


def _store(
    audit: Tracevault, link: Connection[Any], batch: Sequence[Line]
) -> tuple[dict[str, int], list[tuple[Line, str]]]:
    """Store what can be stored of a batch: all at once, or one by one where one of them cannot be."""
    refused = [(line, line.refusal) for line in batch if line.refusal is not None]
    good = [(line, line.event) for line in batch if line.event is not None]
    there = _present(link, audit.table, [event for _, event in good])
    try:
        audit.emit_many([event for _, event in good])
    except (ValidationError, DuplicateIdError):
        stored = there = 0
    else:
        return {"stored": len(good) - there, "there": there}, refused
    for line, event in good:
        try:
            known = _present(link, audit.table, [event])
            audit.emit_many([event])
        except (ValidationError, DuplicateIdError) as error:
            refused.append((line, str(error)))
        else:
            stored, there = stored + 1 - known, there + known
    return {"stored": stored, "there": there}, sorted(refused, key=lambda pair: pair[0].number)


def _present(link: Connection[Any], table: str, events: Sequence[dict[str, Any]]) -> int:
    """Return how many of these events are stored already."""
    ids = []
    for event in events:
        with suppress(ValueError, TypeError, AttributeError):  # one that is no UUID is refused when it is stored
            ids.append(UUID(event["id"]))
    found = link.execute(f'SELECT count(*) FROM "{table}" WHERE id = ANY(%s)'.encode(), (ids,)).fetchone()
    assert found is not None
    return int(found[0])
