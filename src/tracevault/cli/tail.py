"""``tracevault tail``: events as they are stored."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from tracevault import AuditRecord, DriverError, Tail
from tracevault.cli.connect import read_dsn, vault
from tracevault.cli.options import (
    dsn_option,
    filter_options,
    given_filters,
    key_store_option,
    output_options,
    table_option,
)
from tracevault.cli.output import Output, json_line, visible
from tracevault.schema.filters import COUNT_FILTERS
from tracevault.sealing.durable import replace

# Seconds: between looks at the log, and at a database that is away; and that a kept place may be old.
_LOOK = 0.5
_PATIENCE = 2.0
_KEEP = 1.0


@click.command()
@filter_options(COUNT_FILTERS)
@click.option("--from-beginning", is_flag=True, help="first all that is stored; default: from now on")
@click.option(
    "--state",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="go on where the last run with this file ended, and keep the place in it",
)
@click.option("--once", is_flag=True, help="end where there is nothing more for the present")
@table_option
@key_store_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
@output_options
def tail(
    dsn: str | None,
    table: str,
    from_beginning: bool,
    state: Path | None,
    once: bool,
    key_store: Path | None,
    output: Output,
    **filters: Any,
) -> None:
    """Print events as they are stored, in an order in which none is skipped, however late it commits.

    Those for which every given filter holds. With --state a run goes on where the last one ended; if that was killed,
    it prints the events of its last second again. A database that is away is waited for.
    """
    asked = given_filters(filters)
    after = _kept(state)
    if after is None and from_beginning:
        after = "beginning"
    with vault(read_dsn(dsn), table, key_store=key_store) as audit:
        rows = audit.query.tail(after=after, follow=False, **asked).start()
        _keep(state, rows)
        try:
            _follow(rows, output, state, once=once)
        finally:  # also where an interruption came between printing and keeping
            _keep(state, rows)


def _follow(rows: Tail, output: Output, state: Path | None, *, once: bool) -> None:
    away = False
    while True:
        try:
            _print_all(rows, output, state)
            away = _said(away, None)
        except DriverError as error:
            if once or not error.transient:
                raise
            away = _said(away, error)
        if once:
            return
        time.sleep(_PATIENCE if away else _LOOK)


def _print_all(rows: Tail, output: Output, state: Path | None) -> None:
    if output == "table":
        from tracevault.cli.show import print_line as write  # noqa: PLC0415 - it needs rich, which JSON does not
    else:
        write = _write_json
    kept = time.monotonic()
    try:
        for record in rows:
            write(record)
            if time.monotonic() > kept + _KEEP:
                sys.stdout.flush()
                _keep(state, rows)
                kept = time.monotonic()
    finally:
        sys.stdout.flush()  # what was not printed was not had
        _keep(state, rows)


def _write_json(record: AuditRecord) -> None:
    sys.stdout.write(json_line(record) + "\n")


def _said(away: bool, error: DriverError | None) -> bool:
    """Say once that the database is away, and once that it is back."""
    if error is not None and not away:
        click.echo(f"waiting: {visible(str(error))}", err=True)
    elif error is None and away:
        click.echo("following again", err=True)
    return error is not None


def _kept(state: Path | None) -> str | None:
    return None if state is None or not state.exists() else state.read_text(encoding="ascii", errors="replace").strip()


def _keep(state: Path | None, rows: Tail) -> None:
    if state is not None and rows.position is not None:
        replace(state, f"{rows.position}\n".encode(), 0o600)
