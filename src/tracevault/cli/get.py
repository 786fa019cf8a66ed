"""``tracevault get``: one event in full."""

from __future__ import annotations

from pathlib import Path

import click

from tracevault.cli.connect import read_dsn, vault
from tracevault.cli.options import dsn_option, key_store_option, output_options, table_option
from tracevault.cli.output import Output, json_line, write_lines


@click.command()
@click.argument("id")
@table_option
@key_store_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
@output_options
@click.pass_context
def get(
    ctx: click.Context,
    id: str,  # noqa: A002
    dsn: str | None,
    table: str,
    key_store: Path | None,
    output: Output,
) -> None:
    """Print one event in full.

    Exit 1 if there is none with this ID.
    """
    with vault(read_dsn(dsn), table, key_store=key_store) as audit:
        record = audit.query.find_by_id(id)
    if record is None:
        click.echo(f"not found: {id} in table {table}", err=True)
        ctx.exit(1)
    if output == "json":
        write_lines([json_line(record)])
        return
    from tracevault.cli.show import print_record  # noqa: PLC0415 - it needs rich, which JSON does not

    print_record(record)
