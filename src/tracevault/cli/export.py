"""``tracevault export``: the sealed log as a file that can be verified without its database."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, BinaryIO

import click
from psycopg import Connection

from tracevault.cli.connect import connection, read_dsn
from tracevault.cli.options import dsn_option, table_option
from tracevault.cli.output import number, progress_bar
from tracevault.config import check_table_name
from tracevault.sealing import durable
from tracevault.sealing.export import export as export_log


@click.command()
@click.option("--verifiable", is_flag=True, help="all sealed events, with what their leaves are made of")
@table_option
@click.option(
    "-o", "--output", "path", metavar="FILE", type=click.Path(path_type=Path), help="where to; default: standard output"
)
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
def export(dsn: str | None, table: str, verifiable: bool, path: Path | None) -> None:
    """Write the sealed log to a file, as JSON Lines.

    `tracevault verify --export FILE` verifies it, without a database, against checkpoints that were kept elsewhere.
    Events that are not sealed and signed yet are not in it.
    """
    name = check_table_name(table, "--table")
    if not verifiable:
        raise click.UsageError("give --verifiable: there is no other kind of export yet")
    with connection(read_dsn(dsn), "exporting") as link:
        if path is None:
            _export(link, name, sys.stdout.buffer)  # UTF-8, whatever the terminal's encoding is
            return
        try:
            with durable.growing(path) as file:
                count = _export(link, name, file)
        except OSError as error:
            raise click.ClickException(f"{str(path)!r} cannot be written: {error.strerror or error}") from None
    click.echo(f"{path}: {number(count, 'leaf', 'leaves')}", err=True)


def _export(link: Connection[Any], table: str, file: BinaryIO) -> int:
    with progress_bar(f"exporting {table}") as progress:
        return export_log(link, table, lambda line: file.write(line.encode()), progress)
