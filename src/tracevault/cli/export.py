"""``tracevault export``: events as a file, or the sealed log as one that can be verified without its database."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, BinaryIO

import click
from psycopg import Connection

from tracevault import Manifest, Tracevault
from tracevault.cli.connect import connection, read_dsn, vault
from tracevault.cli.options import dsn_option, filter_options, given_filters, key_store_option, table_option
from tracevault.cli.output import number, progress_bar
from tracevault.config import check_table_name
from tracevault.events.json_text import json_text
from tracevault.schema.filters import COUNT_FILTERS, ORDERS
from tracevault.sealing import durable
from tracevault.sealing.export import export as export_log
from tracevault.transfer.formats import FORMATS


@click.command()
@click.option("--format", "kind", type=click.Choice(FORMATS), default="jsonl", show_default=True, help="of the file")
@click.option("--raw", is_flag=True, help="csv for machines: leave cells that a spreadsheet could take for formulas")
@click.option(
    "--order", type=click.Choice(ORDERS), default="asc", show_default=True, help="oldest first, or newest first"
)
@click.option(
    "--manifest",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="write rows, first and last id, size and SHA-256 there, as JSON",
)
@click.option("--resume", is_flag=True, help="go on where an export into the same file was interrupted")
@click.option("--verifiable", is_flag=True, help="all sealed events, with what their leaves are made of")
@click.option(
    "-o", "--output", "path", metavar="FILE", type=click.Path(path_type=Path), help="where to; default: standard output"
)
@filter_options(COUNT_FILTERS)
@table_option
@key_store_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
def export(
    dsn: str | None,
    table: str,
    key_store: Path | None,
    path: Path | None,
    verifiable: bool,
    kind: str,
    raw: bool,
    order: str,
    manifest: Path | None,
    resume: bool,
    **filters: Any,
) -> None:
    """Write events to a file: all for which every given filter holds.

    jsonl has every column, payloads nested, numbers exact; csv has payloads as JSON text; ocsf is OCSF 1.3 as JSON
    Lines; parquet needs the extra of that name. The file takes its place when it is whole; a name that ends with .gz
    is compressed.

    With --verifiable: the sealed log as JSON Lines that `tracevault verify --export FILE` verifies without a database,
    against checkpoints that were kept elsewhere. Events that are not sealed and signed yet are not in it.
    """
    asked = given_filters(filters)
    if verifiable:
        if asked or raw or manifest or resume or key_store or kind != "jsonl" or order != "asc":
            raise click.UsageError("--verifiable exports the whole log, in its own order and form")
        _export_log(dsn, check_table_name(table, "--table"), path)
        return
    if path is None and resume:
        raise click.UsageError("--resume needs --output: standard output cannot be gone on with")
    with vault(read_dsn(dsn), table, key_store=key_store) as audit:
        try:
            made = _export(audit, table, path or sys.stdout.buffer, kind, asked, order=order, raw=raw, resume=resume)
        except OSError as error:
            if path is None:
                raise
            raise click.ClickException(f"{str(path)!r} cannot be written: {error.strerror or error}") from None
    if manifest is not None:
        durable.replace(manifest, f"{json_text(made.as_dict())}\n".encode(), 0o644)
    if path is not None:
        click.echo(f"{path}: {number(made.rows, 'event')}, sha256 {made.sha256}", err=True)


def _export(audit: Tracevault, table: str, target: Any, kind: Any, asked: dict[str, Any], **how: Any) -> Manifest:
    every = audit.query.estimate(**asked) if sys.stderr.isatty() else 0
    with progress_bar(f"exporting {table}") as progress:
        return audit.query.export(target, kind, progress=lambda rows: progress(rows, max(rows, every)), **how, **asked)


def _export_log(dsn: str | None, table: str, path: Path | None) -> None:
    with connection(read_dsn(dsn), "exporting") as link:
        if path is None:
            _write_log(link, table, sys.stdout.buffer)  # UTF-8, whatever the terminal's encoding is
            return
        try:
            with durable.growing(path) as file:
                count = _write_log(link, table, file)
        except OSError as error:
            raise click.ClickException(f"{str(path)!r} cannot be written: {error.strerror or error}") from None
    click.echo(f"{path}: {number(count, 'leaf', 'leaves')}", err=True)


def _write_log(link: Connection[Any], table: str, file: BinaryIO) -> int:
    with progress_bar(f"exporting {table}") as progress:
        return export_log(link, table, lambda line: file.write(line.encode()), progress)
