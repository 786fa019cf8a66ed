"""``tracevault trace``: the events of one operation."""

from __future__ import annotations

from pathlib import Path

import click

from tracevault.cli.connect import read_dsn, vault
from tracevault.cli.options import dsn_option, key_store_option, output_options, table_option
from tracevault.cli.output import Output, json_line, write_lines


@click.command()
@click.argument("correlation_id")
@click.option("--limit", type=int, default=500, show_default=True, metavar="NUMBER", help="most events to print")
@table_option
@key_store_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
@output_options
def trace(correlation_id: str, limit: int, dsn: str | None, table: str, key_store: Path | None, output: Output) -> None:
    """Print the events with this correlation id, oldest first.

    Exit 1 if there is none.
    """
    with vault(read_dsn(dsn), table, key_store=key_store) as audit:
        records = audit.query.trace(correlation_id, limit=limit)
    if output == "json":
        write_lines(map(json_line, records))
    else:
        from tracevault.cli.show import print_records  # noqa: PLC0415 - it needs rich, which JSON does not

        print_records(records)
    if len(records) == limit:
        click.echo(f"perhaps more: --limit {limit}", err=True)
    if not records:
        click.echo("no events", err=True)
        click.get_current_context().exit(1)
