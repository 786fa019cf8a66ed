"""``tracevault archive`` and ``tracevault restore``: old events to where they cost little, and back."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from psycopg import Connection

from tracevault import ArchiveError, ValidationError
from tracevault.cli.connect import connection, vault, write_dsn
from tracevault.cli.custody import operator, state_events
from tracevault.cli.options import dsn_option, proof_timeout_option, reason_option, table_option, yes_option
from tracevault.cli.output import number, progress_bar
from tracevault.config import check_table_name
from tracevault.events.payload import iso_utc
from tracevault.events.rules import moment
from tracevault.flows.archive import (
    Seen,
    archived,
    archived_unsealed,
    delete_archived,
    emptied,
    hold_archive,
    oldest,
)
from tracevault.flows.custody import Affected
from tracevault.flows.retention import Retention
from tracevault.flows.seal import sealed_tree
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.schema.custody import PRUNED
from tracevault.schema.position import Snapshot
from tracevault.sealing.retention import apply_retention, delete_in_steps

if TYPE_CHECKING:
    from tracevault.archive.manifest import ArchiveManifest
    from tracevault.archive.store import Store

ARCHIVED = "tracevault.archived"
RESTORED = "tracevault.restored"
_WORKING = Place("archiving")
# What goes on with what an error ended.
_AGAIN = "archive --detach"

_location = click.option("--to", "location", metavar="PLACE", required=True, help="a folder, or `s3://BUCKET/PATH`")
_keys = click.option("--key", "keys", metavar="KEY", multiple=True, help="the log's verifier key; repeatable")


@click.command()
@table_option
@click.option("--before", metavar="TIME", required=True, help="archive what happened before: 2025-01-01")
@_location
@click.option("--verify", is_flag=True, help="read the whole archive back, and hash each row anew")
@click.option("--detach", is_flag=True, help="remove from the table what is archived, once that is verified")
@_keys
@reason_option
@yes_option
@proof_timeout_option
@dsn_option("DATABASE_URL_WRITE")
def archive(
    dsn: str | None,
    table: str,
    before: str,
    location: str,
    verify: bool,
    detach: bool,
    keys: tuple[str, ...],
    reason: str | None,
    yes: bool,
    timeout: float,
) -> None:
    """Write old events into Parquet files, with proof that they are those of the log.

    Each month is one run with a manifest, whose SHA-256 an event of the log tells. What is in the archive already is
    passed over, so it can be run again, every month or after an interruption. A sealed table's rows are compared with
    their leaves on the way. Nothing leaves the table but with --detach; held rows and events of tracevault itself stay
    even then. It takes the extra `archive`, and --detach the custodian's role.
    """
    from tracevault.archive.store import Store  # noqa: PLC0415 - they need an extra
    from tracevault.archive.write import archive as archive_rows  # noqa: PLC0415

    name, until, dsn = check_table_name(table, "--table"), moment(before, "--before"), write_dsn(dsn)
    store = Store(location, name)
    with connection(dsn, "archiving") as link:
        if not run(link, hold_archive(name), _WORKING):
            raise ArchiveError(f"table `{name}` is being archived by another run")
        if until > _now(link):
            raise ValidationError("`--before` is in the future: what happens until then could not be in it")
        with connection(dsn, "archiving") as reading, progress_bar("archived") as progress:
            written = archive_rows(reading, name, until, store, progress)
        _tell(dsn, store)
        if written.manifests:
            rows = sum(one.rows for one in written.manifests)
            click.echo(f"{number(rows, 'row')} of {number(len(written.manifests), 'month')} archived to {location}")
        else:
            click.echo(f"nothing to archive that is not in {location} already")
        if written.left_out:
            click.echo(f"{number(written.left_out, 'row')} left out, since no checkpoint covers them yet", err=True)
        if verify:
            _verify(store, keys)
        if detach:
            there = _still_there(link, store, until)
            if there and not verify:
                _verify(store, keys, there)
            _detach(link, dsn, store, there, until, reason, yes=yes, timeout=timeout)


@click.command()
@table_option
@click.option("--from", "location", metavar="PLACE", required=True, help="a folder, or `s3://BUCKET/PATH`")
@click.option("--since", metavar="TIME", help="only what happened from then on")
@click.option("--before", metavar="TIME", help="only what happened before")
@_keys
@dsn_option("DATABASE_URL_WRITE")
def restore(
    dsn: str | None, table: str, location: str, since: str | None, before: str | None, keys: tuple[str, ...]
) -> None:
    """Store archived events in their table again, as they were: their leaves and proofs are theirs again.

    What is restored is verified first. Events that are in the table already are passed over. It takes the role of the
    table's owner; `tracevault retention` removes them again where they are older than they are to be kept.
    """
    from tracevault.archive.restore import restore as restore_rows  # noqa: PLC0415 - they need an extra
    from tracevault.archive.store import Store  # noqa: PLC0415

    name, dsn = check_table_name(table, "--table"), write_dsn(dsn)
    first = None if since is None else moment(since, "--since")
    end = None if before is None else moment(before, "--before")
    store = Store(location, name)
    wanted = [
        one for one in store.manifests() if (first is None or one.end > first) and (end is None or one.start < end)
    ]
    if not wanted:
        raise ArchiveError(f"{location} has nothing of table `{name}` from that time")
    _verify(store, keys, wanted)
    with connection(dsn, "restoring") as link, progress_bar("restored") as progress:
        stored = restore_rows(link, name, store, wanted, first, end, progress)
    if stored:
        said = {"rows": stored, "location": location, "manifests": [one.sha256 for one in wanted]}
        with vault(dsn, name) as audit:
            audit.emit(RESTORED, data=said, meta=operator())
    click.echo(f"{number(stored, 'row')} restored")


def _now(link: Connection[Any]) -> datetime:
    found = link.execute("SELECT clock_timestamp()").fetchone()
    assert found is not None
    now: datetime = found[0]
    return now


def _tell(dsn: str, store: Store) -> None:
    """Emit an event for each manifest of which there is none: so the log itself says what is archived."""
    with vault(dsn, store.table) as audit:
        told = {(record.data or {}).get("sha256") for record in audit.query.iterate(event=ARCHIVED)}
        for one in store.manifests():
            if one.sha256 in told:
                continue
            said = {
                "from": iso_utc(one.start),
                "before": iso_utc(one.end),
                "rows": one.rows,
                "location": store.location,
                "manifest": one.path,
                "sha256": one.sha256,
            }
            audit.emit(ARCHIVED, data=said, meta=operator())


def _verify(store: Store, keys: Sequence[str], manifests: Sequence[ArchiveManifest] | None = None) -> None:
    from tracevault.archive.verify import verify_archive  # noqa: PLC0415 - it needs an extra

    with progress_bar("verified") as progress:
        report = verify_archive(store, keys=keys, manifests=manifests, progress=progress)
    if report.problems:
        first, count = report.problems[0], len(report.problems) + report.problems_left_out
        raise ArchiveError(
            f"the archive is not as it should be: {number(count, 'thing')}, the first: {first.detail}; "
            f"`tracevault verify --archive {store.location}` tells all"
        )
    sealed = report.checked + report.erased
    parts = [f"{number(sealed, 'row')} as sealed"] if sealed or not report.unsealed else []
    if report.unsealed:
        parts.append(f"{number(report.unsealed, 'row')} that nobody sealed")
    click.echo(f"verified: {', '.join(parts)}", err=True)


# -------------------------------------------------------------------------------------------------- detach


def _still_there(link: Connection[Any], store: Store, until: datetime) -> list[ArchiveManifest]:
    """Return the manifests of time before ``until`` of which the table has events."""
    return [
        one
        for one in store.manifests()
        if one.start < until and run(link, oldest(store.table, one.start, one.end), _WORKING) is not None
    ]


def _detach(
    link: Connection[Any],
    dsn: str,
    store: Store,
    manifests: Sequence[ArchiveManifest],
    until: datetime,
    reason: str | None,
    *,
    yes: bool,
    timeout: float,
) -> None:
    """Remove from the table what the archive has, and an event says so first."""
    table = store.table
    tree = run(link, sealed_tree(table), _WORKING)
    leaves = [
        stretch
        for one in manifests
        if one.proof and tree and (one.proof.tree, one.proof.origin) == (tree.name, tree.origin)
        for stretch in one.proof.leaves
    ]
    if tree is not None:
        affected = run(link, archived(tree, leaves, until), _WORKING)
        if _agreed(affected, affected.rows, yes=yes):
            said = _said(store, manifests, None)
            ids = state_events(dsn, table, tree, affected, PRUNED, said, reason)
            click.echo(f"event {ids[0]} says so; waiting until that is proven", err=True)
            with link.transaction():
                whole = run(link, emptied(tree, affected.ranges, until), _WORKING)
            with progress_bar("removed") as progress:
                gone = apply_retention(link, Retention(table, tree, (), whole), (), ids, timeout, progress, _AGAIN)
            click.echo(f"{number(gone, 'row')} removed from the table")
        return
    plain = [(one, Seen(min(one.end, until), Snapshot.parse(one.snapshot))) for one in manifests if one.proof is None]
    counts = [run(link, archived_unsealed(table, one.start, seen), _WORKING) for one, seen in plain]
    total = Affected([], sum(one.unsealed for one in counts), sum(one.held for one in counts))
    if not _agreed(total, total.unsealed, yes=yes):
        return
    data = {**_said(store, manifests, reason), "rows": total.unsealed}
    with vault(dsn, table) as audit:
        audit.emit(PRUNED, data=data, meta=operator())
    gone = 0
    with progress_bar("removed") as progress:
        for one, seen in plain:
            for count in delete_in_steps(link, table, partial(delete_archived, table, one.start, seen), _AGAIN):
                gone += count
                progress(gone, total.unsealed)
    click.echo(f"{number(gone, 'row')} removed from the table")


def _agreed(affected: Affected, rows: int, *, yes: bool) -> bool:
    if affected.held:
        click.echo(f"{number(affected.held, 'archived row')} held back by legal holds", err=True)
    if not rows:
        click.echo("nothing of the archive is in the table", err=True)
        return False
    click.echo(f"{number(rows, 'archived row')} of the table will be removed from it", err=True)
    return yes or click.confirm("Go on?", err=True)


def _said(store: Store, manifests: Sequence[ArchiveManifest], reason: str | None) -> dict[str, Any]:
    return {
        "archived_to": store.location,
        "manifests": [one.sha256 for one in manifests],
        **({"reason": reason} if reason else {}),
    }
