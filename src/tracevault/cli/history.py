"""``tracevault history``: what became of one thing."""

from __future__ import annotations

from pathlib import Path

import click

from tracevault.cli.connect import read_dsn, vault
from tracevault.cli.options import dsn_option, key_store_option, output_options, table_option
from tracevault.cli.output import Output, write_lines
from tracevault.events.json_text import json_record, json_text


@click.command()
@click.argument("target_type", metavar="TYPE")
@click.argument("target_id", metavar="ID")
@click.option("--at", metavar="TIME", help="what it was like then; default: now")
@click.option("--limit", type=int, default=1000, show_default=True, metavar="NUMBER", help="newest changes to read")
@table_option
@key_store_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
@output_options
def history(
    target_type: str,
    target_id: str,
    at: str | None,
    limit: int,
    dsn: str | None,
    table: str,
    key_store: Path | None,
    output: Output,
) -> None:
    """Print the changes of one target, oldest first, and what it was like after them.

    That is put together from the events that `emit_diff` made. Exit 1 if there is no event of this target.
    """
    with vault(read_dsn(dsn), table, key_store=key_store) as audit:
        found = audit.query.history(target_type, target_id, at=at, limit=limit)
    if output == "json":
        write_lines(
            json_text({"record": json_record(change.record), "fields": [field._asdict() for field in change.fields]})
            for change in found.changes
        )
        write_lines([json_text({"state": found.state, "is_complete": found.is_complete})])
    else:
        from tracevault.cli.show import print_history  # noqa: PLC0415 - it needs rich, which JSON does not

        print_history(found)
    if not found.is_complete:
        click.echo(f"older changes were not read: --limit {limit}", err=True)
    if not found.changes:
        click.echo("no events", err=True)
        click.get_current_context().exit(1)
