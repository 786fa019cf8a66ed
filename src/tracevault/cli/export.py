"""``tracevault export``: the sealed log as a file that can be verified without its database."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tracevault.cli.connect import connection, read_dsn
from tracevault.cli.options import dsn_option, table_option
from tracevault.cli.output import number, progress_bar
from tracevault.config import check_table_name
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
    Events that are not sealed yet are not in it.
    """
    name = check_table_name(table, "--table")
    if not verifiable:
        raise click.UsageError("give --verifiable: there is no other kind of export yet")
    with connection(read_dsn(dsn), "exporting") as link, progress_bar(f"exporting {name}") as progress:
        if path is None:
            export_log(link, name, sys.stdout.write, progress)
            return
        # Under another name until it is whole.
        partial = path.with_name(f"{path.name}.partial")
        try:
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                count = export_log(link, name, file.write, progress)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    click.echo(f"{path}: {number(count, 'leaf', 'leaves')}", err=True)
