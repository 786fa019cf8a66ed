"""``tracevault count``: how many events there are."""

from __future__ import annotations

from typing import Any

import click

from tracevault.cli.connect import read_dsn, vault
from tracevault.cli.options import dsn_option, filter_options, given_filters, table_option
from tracevault.schema.filters import COUNT_FILTERS


@click.command()
@filter_options(COUNT_FILTERS)
@table_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
def count(dsn: str | None, table: str, **filters: Any) -> None:
    """Print how many events there are.

    Those for which every given filter holds. It counts exactly, so on a large table it may take long.
    """
    with vault(read_dsn(dsn), table) as audit:
        number = audit.query.count(**given_filters(filters))
    click.echo(number)
