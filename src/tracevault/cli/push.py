"""``tracevault push``: events as they are stored, to somebody's HTTP endpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tracevault import AuditRecord, DriverError, Tail
from tracevault.cli.connect import read_dsn, vault
from tracevault.cli.options import dsn_option, filter_options, given_filters, key_store_option, table_option
from tracevault.cli.output import number, visible
from tracevault.schema.filters import COUNT_FILTERS
from tracevault.sealing.durable import replace
from tracevault.transfer.push import Endpoint, endpoint, pause_after

# Seconds between looks at the log. A batch is as much as there is, up to its size.
_LOOK = 1.0


@click.command()
@click.option("--to", "url", metavar="URL", required=True, help="where to: https://, or http:// on this machine")
@click.option(
    "--state",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="keeps the place of the last event that was taken; made where it does not exist",
)
@click.option(
    "--from-beginning", is_flag=True, help="where there is no place yet, all that is stored; default: from now on"
)
@click.option(
    "--secret-file",
    "secret_files",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="a key that signs, as whsec_...; two of them while one takes the other's place",
)
@click.option("--batch", type=click.IntRange(1, 10_000), default=500, show_default=True, help="most events at once")
@click.option(
    "--timeout", type=float, default=30.0, show_default=True, metavar="SECONDS", help="for the receiver's answer"
)
@click.option("--once", is_flag=True, help="end where there is nothing more for the present")
@filter_options(COUNT_FILTERS)
@table_option
@key_store_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
def push(
    dsn: str | None,
    table: str,
    url: str,
    state: Path,
    from_beginning: bool,
    secret_files: tuple[Path, ...],
    batch: int,
    timeout: float,
    once: bool,
    key_store: Path | None,
    **filters: Any,
) -> None:
    """Push events to an HTTP endpoint as they are stored, each at least once.

    A batch is NDJSON, gzipped, with the headers of Standard Webhooks. What the receiver does not take (2xx) is tried
    again, for ever where that can help. `webhook-id` is the same then, so that a receiver can tell what came twice.
    """
    where = endpoint(url, [_secret(path) for path in secret_files], timeout)
    asked = given_filters(filters)
    with vault(read_dsn(dsn), table, key_store=key_store) as audit:
        place = _Place(state)
        after = place.after or ("beginning" if from_beginning else None)
        rows = audit.query.tail(after=after, follow=False, **asked).start()
        if place.after is None:
            place.keep(rows)
        count = 0
        try:
            while True:
                for records in _batches(rows, batch, place):
                    place.begin(records[-1])
                    _push(where, records)
                    place.keep(rows)
                    count += len(records)
                if once:
                    return
                time.sleep(_LOOK)
        finally:
            click.echo(f"{number(count, 'event')} pushed", err=True)


class _Place:
    """The file that keeps how far the receiver has taken the log, and with which event the batch under way ends.

    A batch that was under way when the program ended so comes again as it was, not joined with what came since.
    """

    def __init__(self, path: Path) -> None:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines() if path.exists() else []
        self._path = path
        self.after = lines[0].strip() if lines else None
        self.under_way = lines[1].strip() if len(lines) > 1 else None

    def begin(self, last: AuditRecord) -> None:
        """Note the batch that is about to be pushed."""
        self.under_way = str(last.id)
        self._write()

    def keep(self, rows: Tail) -> None:
        """Note that everything up to here was taken."""
        self.after, self.under_way = rows.position, None
        self._write()

    def _write(self) -> None:
        lines = [line for line in (self.after, self.under_way) if line is not None]
        replace(self._path, "".join(f"{line}\n" for line in lines).encode(), 0o600)


def _batches(rows: Tail, size: int, place: _Place) -> Iterator[list[AuditRecord]]:
    """Yield what there is for the present."""
    records: list[AuditRecord] = []
    for record in rows:
        records.append(record)
        if len(records) == size or str(record.id) == place.under_way:
            yield records
            records = []
    if records:
        yield records


def _push(where: Endpoint, records: list[AuditRecord]) -> None:
    failures = 0
    while True:
        try:
            where.push(records)
        except DriverError as error:
            if not error.transient:
                raise
            if failures == 0:
                click.echo(f"waiting: {visible(str(error))}", err=True)
            time.sleep(pause_after(failures, error))
            failures += 1
        else:
            if failures:
                click.echo("pushing again", err=True)
            return


def _secret(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(
            f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
