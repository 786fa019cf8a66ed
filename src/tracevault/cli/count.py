"""``tracevault count``: how many events there are."""

from __future__ import annotations

from typing import Any

import click

from tracevault.cli.connect import read_dsn, vault
from tracevault.cli.options import dsn_option, filter_options, given_filters, table_option
from tracevault.schema.filters import COUNT_FILTERS


@click.command()
@filter_options(COUNT_FILTERS)
@click.option("--at-most", type=int, metavar="NUMBER", help='stop there, and print "NUMBER or more"')
@click.option("--estimate", is_flag=True, help="print what PostgreSQL's planner believes, and read no event")
@table_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
def count(dsn: str | None, table: str, at_most: int | None, estimate: bool, **filters: Any) -> None:
    """Print how many events there are.

    Those for which every given filter holds. It counts exactly, so on a large table it may take long.
    """
    if estimate and at_most is not None:
        raise click.UsageError("--estimate reads no event, so --at-most means nothing with it")
    asked = given_filters(filters)
    with vault(read_dsn(dsn), table) as audit:
        number = audit.query.estimate(**asked) if estimate else audit.query.count(at_most=at_most, **asked)
    click.echo(f"about {number}" if estimate else number)
