"""``tracevault find``: events, newest first."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from tracevault import AuditRecord, format_query, parse_query
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
from tracevault.schema.filters import DEFAULT_LIMIT, FIND_FILTERS, PAGE_FILTERS


@click.command()
@filter_options(FIND_FILTERS | PAGE_FILTERS)
@table_option
@key_store_option
@click.option("--archive", metavar="PLACE", help="look into an archive, and not into the table")
@click.option("--live", is_flag=True, help="with --archive: into both")
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
@output_options
def find(
    dsn: str | None,
    table: str,
    key_store: Path | None,
    archive: str | None,
    live: bool,
    output: Output,
    **filters: Any,
) -> None:
    """Print events, newest first.

    Those for which every given filter holds; without one, the newest 50. TIME is a date (2026-01-02, midnight
    UTC) or has an offset (2026-01-02T03:04:05+02:00). `tracevault export` prints all of them.
    """
    asked = given_filters(filters)
    if "offset" in asked and "cursor" in asked:
        raise click.UsageError("--cursor says where the page begins, so --offset means nothing with it")
    if archive is not None:
        if "offset" in asked:
            raise click.UsageError("--archive goes on by --cursor, so it takes no --offset")
        records, cursor = _archived(archive, table, asked, read_dsn(dsn) if live else None, key_store)
        more = None if cursor is None else f"more: {_where(filters, asked)}--cursor {cursor}"
        _print(records, more, output)
        return
    if live:
        raise click.UsageError("--live goes with --archive")
    with vault(read_dsn(dsn), table, key_store=key_store) as audit:
        if "offset" in asked:
            records = audit.query.find_many(**asked)
            full = len(records) == asked.get("limit", DEFAULT_LIMIT)
            more = f"perhaps more: --offset {asked['offset'] + len(records)}" if full else None
        else:
            records, cursor = audit.query.find_page(**asked)
            more = None if cursor is None else f"more: {_where(filters, asked)}--cursor {cursor}"
    _print(records, more, output)


def _archived(
    location: str, table: str, asked: dict[str, Any], dsn: str | None, key_store: Path | None
) -> tuple[list[AuditRecord], str | None]:
    """Return a page of an archive, and with ``dsn`` of the table as well; what is in both comes once."""
    from tracevault.archive.search import Archive, merged  # noqa: PLC0415 - it needs an extra

    with Archive(location, table, key_store=key_store) as archive:
        page = archive.find_page(**asked)
    if dsn is None:
        return page
    with vault(dsn, table, key_store=key_store) as audit:
        return merged(table, asked, page, audit.query.find_page(**asked))


def _print(records: list[AuditRecord], more: str | None, output: Output) -> None:
    if output == "json":
        write_lines(map(json_line, records))
    else:
        from tracevault.cli.show import print_records  # noqa: PLC0415 - it needs rich, which JSON does not

        print_records(records)
        if not records:
            click.echo("no events", err=True)
    if more is not None:
        click.echo(more, err=True)


def _where(given: dict[str, Any], asked: dict[str, Any]) -> str:
    """Return the option for the next page in place of ``--where``: a span back from now would be another one then."""
    if given.get("where") is None:
        return ""
    inside = parse_query(given["where"])
    return f"--where {shlex.quote(format_query({name: asked[name] for name in inside}))} "
