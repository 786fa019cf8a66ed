"""``tracevault find``: events, newest first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracevault.cli.connect import read_dsn, vault
from tracevault.cli.options import (
    dsn_option,
    filter_options,
    given_filters,
    key_store_option,
    output_options,
    table_option,
)
from tracevault.cli.output import Output, json_line, write_lines
from tracevault.schema.filters import DEFAULT_LIMIT, FIND_FILTERS


@click.command()
@filter_options(FIND_FILTERS)
@table_option
@key_store_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
@output_options
def find(dsn: str | None, table: str, key_store: Path | None, output: Output, **filters: Any) -> None:
    """Print events, newest first.

    Those for which every given filter holds; without one, the newest 50. TIME is a date (2026-01-02, midnight
    UTC) or has an offset (2026-01-02T03:04:05+02:00).
    """
    asked = given_filters(filters)
    with vault(read_dsn(dsn), table, key_store=key_store) as audit:
        records = audit.query.find_many(**asked)
    if output == "json":
        write_lines(map(json_line, records))
        return
    from tracevault.cli.show import print_records  # noqa: PLC0415 - it needs rich, which JSON does not

    print_records(records)
    if not records:
        click.echo("no events", err=True)
    elif len(records) == asked.get("limit", DEFAULT_LIMIT):
        click.echo(f"perhaps more: --offset {asked.get('offset', 0) + len(records)}", err=True)
