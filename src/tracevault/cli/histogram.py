"""``tracevault histogram``: how many events there were when."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import click

from tracevault.cli.connect import read_dsn, vault
from tracevault.cli.options import dsn_option, filter_options, given_filters, limits, output_options, table_option
from tracevault.cli.output import Output, write_lines
from tracevault.events.json_text import json_text
from tracevault.events.payload import iso_utc
from tracevault.schema.filters import COUNT_FILTERS

_SPAN = re.compile(r"(\d{1,6})([smhd])", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


@click.command()
@click.argument("interval", metavar="INTERVAL")
@filter_options(COUNT_FILTERS)
@limits
@table_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
@output_options
def histogram(
    interval: str, dsn: str | None, table: str, timeout: float, at_most: int, output: Output, **filters: Any
) -> None:
    """Print how many events there were in each minute, hour, day, week or month, or in each 15m, 6h or 2d.

    Of a time window: --since is required. Times are UTC.
    """
    match = _SPAN.fullmatch(interval)
    width = interval if match is None else timedelta(**{_UNITS[match[2]]: int(match[1])})
    with vault(read_dsn(dsn), table) as audit:
        found = audit.query.histogram(width, timeout=timeout, at_most=at_most, **given_filters(filters))
    if output == "json":
        write_lines(
            json_text({"start": iso_utc(bucket.start), "end": iso_utc(bucket.end), "count": bucket.count})
            for bucket in found.buckets
        )
    else:
        from tracevault.cli.show import print_bars  # noqa: PLC0415 - it needs rich, which JSON does not

        print_bars([(f"{bucket.start:%Y-%m-%d %H:%M:%S}", bucket.count) for bucket in found.buckets])
    if not found.is_complete:
        click.echo(f"counted since {iso_utc(found.counted_since)}: more than {at_most} events", err=True)
