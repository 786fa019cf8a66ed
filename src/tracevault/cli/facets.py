"""``tracevault facets``: which values a column has, and how often."""

from __future__ import annotations

from typing import Any

import click

from tracevault.cli.connect import read_dsn, vault
from tracevault.cli.options import dsn_option, filter_options, given_filters, limits, output_options, table_option
from tracevault.cli.output import Output, visible, write_lines
from tracevault.events.json_text import json_text
from tracevault.events.payload import iso_utc
from tracevault.flows.aggregate import FACETS
from tracevault.schema.filters import COUNT_FILTERS


@click.command()
@click.argument("column", type=click.Choice(FACETS), metavar="COLUMN")
@click.option(
    "--top", type=int, default=20, show_default=True, metavar="NUMBER", help="most values to print, up to 1000"
)
@filter_options(COUNT_FILTERS)
@limits
@table_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
@output_options
def facets(
    column: str, top: int, dsn: str | None, table: str, timeout: float, at_most: int, output: Output, **filters: Any
) -> None:
    """Print the most frequent values of COLUMN, and how many events have each.

    Of a time window: --since is required. COLUMN is event, actor_id, actor_type, target_id, target_type, tenant_id,
    environment, mode, outcome, error_code or severity.
    """
    with vault(read_dsn(dsn), table) as audit:
        found = audit.query.facets(column, top=top, timeout=timeout, at_most=at_most, **given_filters(filters))
    if output == "json":
        write_lines(json_text({"value": facet.value, "count": facet.count}) for facet in found.values)
    else:
        from tracevault.cli.show import print_bars  # noqa: PLC0415 - it needs rich, which JSON does not

        print_bars([("(none)" if facet.value is None else visible(facet.value), facet.count) for facet in found.values])
    if found.others:
        click.echo(f"{found.others} events have other values: --top {top}", err=True)
    if not found.is_complete:
        click.echo(f"counted since {iso_utc(found.counted_since)}: more than {at_most} events", err=True)
