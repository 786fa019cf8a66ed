"""Archived rows back in their table, as they were stored: leaves and proofs of then are theirs again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from psycopg import Connection

from tracevault.archive.manifest import ArchivedFile, ArchiveManifest
from tracevault.archive.rows import RESTORED, Archived, restored
from tracevault.archive.store import Store
from tracevault.archive.verify import micros, read_rows
from tracevault.errors import ArchiveError
from tracevault.events.binary import HEADER, TRAILER
from tracevault.flows.archive import moment
from tracevault.flows.restore import make_stage, store_rows
from tracevault.flows.seal import sealed_tree
from tracevault.postgres.failures import Place
from tracevault.postgres.partitions import ensure_between
from tracevault.postgres.run import run

_RESTORING = Place("restoring")

Progress = Callable[[int, int], None]


def restore(
    connection: Connection[Any],
    table: str,
    store: Store,
    manifests: Sequence[ArchiveManifest],
    since: datetime | None = None,
    before: datetime | None = None,
    progress: Progress = lambda _done, _all: None,
) -> int:
    """Store what some runs archived, from ``since`` on and ``before`` a moment; return how many rows were not there.

    As the table's owner, on an autocommit connection; each file in one transaction. What is there already stays as it
    is, and what was erased since then comes without its payload. Of a partitioned table the partitions are made that
    the rows need. On another server than they came from, rows name no transaction. Nothing is verified here: see
    `verify_archive`. Raises `ArchiveError` for a row that cannot be stored, and then nothing of its file is.
    """
    bounds = None if since is None else micros(since), None if before is None else micros(before)
    system = run(connection, moment(), _RESTORING).system
    tree = run(connection, sealed_tree(table), _RESTORING)
    total, done, stored = sum(one.rows for one in manifests), 0, 0
    for manifest in manifests:
        files = [one for one in manifest.files if _concerns(one, since, before)]
        if files:
            ensure_between(connection, table, manifest.start, manifest.end)
        for file in files:
            with connection.transaction():
                run(connection, make_stage(table, RESTORED), _RESTORING)
                for rows in read_rows(store, file):
                    wanted = [row for row in rows if _within(row, bounds)]
                    stream = _stream(wanted, xid=manifest.system == system)
                    stored += run(connection, store_rows(table, tree, RESTORED, stream), _RESTORING)
                    done += len(rows)
                    progress(done, total)
    return stored


def _concerns(file: ArchivedFile, since: datetime | None, before: datetime | None) -> bool:
    return (since is None or file.last >= since) and (before is None or file.first < before)


def _within(row: Archived, bounds: tuple[int | None, int | None]) -> bool:
    since, before = bounds
    if row.fault is not None or row.occurred_at is None:
        raise ArchiveError(f"event {row.id} cannot be restored: {row.fault or 'it has no time'}")
    return (since is None or row.occurred_at >= since) and (before is None or row.occurred_at < before)


def _stream(rows: Sequence[Archived], *, xid: bool) -> Iterator[bytes]:
    yield HEADER
    yield b"".join([restored(row, xid=xid) for row in rows])
    yield TRAILER
