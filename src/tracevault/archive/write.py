"""Rows on their way into the archive: month by month, each in one transaction, as the server sends them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

from psycopg import Connection, IsolationLevel
from pyarrow import PythonFile, parquet

from tracevault.archive.manifest import ArchivedFile, ArchiveManifest, Proof
from tracevault.archive.proof import tiles_for, write_proof
from tracevault.archive.rows import SCHEMA, Sent, batch_of, sent_row
from tracevault.archive.store import NewFile, Store
from tracevault.errors import ArchiveError, ProofError
from tracevault.flows.archive import Moment, Seen, Slice, checkpoint, left_out, moment, oldest, ranges, rows_sql
from tracevault.flows.seal import Tree, read_tiles, sealed_tree
from tracevault.flows.verify import prepare, stored_checkpoints, stream
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.leaf import Encoder
from tracevault.integrity.note import Note
from tracevault.postgres.failures import Place
from tracevault.postgres.run import raw_rows, run
from tracevault.schema.partitions import BEGINNING, floor, following
from tracevault.schema.position import Snapshot

_ARCHIVING = Place("archiving")
# What is in memory at once, and in one file: a row group's rows, their bytes, and the rows of all of them.
GROUP_ROWS = 20_000
GROUP_BYTES = 16 << 20
FILE_ROWS = 250_000
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)

Progress = Callable[[int, int | None], None]


class Written(NamedTuple):
    """What a run of `archive` has done. ``left_out`` is how many rows no checkpoint covers yet."""

    manifests: list[ArchiveManifest]
    left_out: int


def archive(
    connection: Connection[Any],
    table: str,
    before: datetime,
    store: Store,
    progress: Progress = lambda _done, _all: None,
) -> Written:
    """Write what happened before a moment, and is not in the archive yet, into it; nothing leaves the table.

    Of a sealed table that is what a checkpoint covers, the newest that an anchor has; each row is hashed and compared
    with its leaf, and one that is not as it was sealed stops it: `ArchiveError`, as does an archive of another log that
    has this one's name. Interrupted, it leaves out the months that are done when it is run again.
    """
    known = store.manifests()
    _check_same_log(connection, table, known)
    connection.isolation_level = IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    made: list[ArchiveManifest] = []
    waiting, rows, since = 0, 0, BEGINNING
    while True:
        with connection.transaction():
            run(connection, prepare(), _ARCHIVING)
            first = run(connection, oldest(table, since, before), _ARCHIVING)
            if first is None:
                return Written(made, waiting)
            month = floor(first, "month")
            since = following(month, "month")
            work = _Month(connection, table, max(month, BEGINNING), min(since, before), store, known)
            waiting += run(connection, left_out(work.part), _ARCHIVING)
            manifest = work.write(partial(_more, progress, rows))
        if manifest is not None:
            made.append(manifest)
            rows += manifest.rows


def _more(progress: Progress, rows: int, done: int) -> None:
    progress(rows + done, None)


class _Month:
    """One run: what one transaction sees of one month."""

    def __init__(
        self,
        connection: Connection[Any],
        table: str,
        start: datetime,
        end: datetime,
        store: Store,
        known: Sequence[ArchiveManifest],
    ) -> None:
        self._connection = connection
        self._store = store
        self._tree = run(connection, sealed_tree(table), _ARCHIVING)
        self._now: Moment = run(connection, moment(), _ARCHIVING)
        self._note, size = self._checkpoint()
        self.part = Slice(table, self._tree, size, start, end, *_known(known, self._tree, self._now.system, start))
        created = datetime.now(UTC)
        self._run = f"{start:%Y-%m}-{created:%Y%m%dt%H%M%S}-{os.urandom(4).hex()}"
        self._created = created

    def _checkpoint(self) -> tuple[str, int]:
        if self._tree is None:
            return "", 0
        note = run(self._connection, checkpoint(self._tree), _ARCHIVING)
        if note is None:
            raise ArchiveError(
                f"no checkpoint of table `{self._tree.table}` is signed yet, so the archive could prove nothing: run "
                "`tracevault seal`, then this"
            )
        return note, Checkpoint.parse(Note.parse(note).text).size

    def write(self, progress: Callable[[int], None]) -> ArchiveManifest | None:
        """Write the month; None where there is nothing of it that is not archived already."""
        files = _Files(self._store, self._run, self.part.start)
        run(self._connection, stream(self._tree is not None), _ARCHIVING)
        try:
            for group in self._groups():
                files.add(group)
                progress(files.rows)
            files.end()
        except BaseException:
            files.abandon()
            raise
        run(self._connection, stream(False), _ARCHIVING)
        if not files.done:
            return None
        manifest = ArchiveManifest(
            run=self._run,
            table=self.part.table,
            start=self.part.start,
            end=self.part.end,
            rows=files.rows,
            files=tuple(files.done),
            proof=self._proof(files.rows),
            system=self._now.system,
            snapshot=self._now.snapshot,
            created_at=self._created,
        )
        return self._store.add(manifest)

    def _groups(self) -> Iterator[list[Sent]]:
        """Yield rows as they come, so many as are in memory at once, each compared with its leaf."""
        group: list[Sent] = []
        size = 0
        hash_of = None if self._tree is None else Encoder(self._tree.name).hash
        for sent in raw_rows(self._connection, rows_sql(self.part), _ARCHIVING):
            row = sent_row(sent)
            if hash_of is not None and hash_of(row.fields, row.commitments) != row.hash:
                raise ArchiveError(
                    f"event {row.id} is not as it was sealed as leaf {row.leaf:,}: `tracevault verify` says more. "
                    "Nothing more was archived"
                )
            group.append(row)
            size += sum(len(field) for field in row.fields if field is not None)
            if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _proof(self, rows: int) -> Proof | None:
        tree, part = self._tree, self.part
        if tree is None:
            return None
        leaves = run(self._connection, ranges(part), _ARCHIVING)
        if sum(end - first for first, end in leaves) != rows:
            raise ArchiveError(f"table `{part.table}` has more than one row, or leaf, of some events: verify it")
        path = f"_proofs/{self._run}.zip"
        fetch = partial(self._tiles, tree.number)
        with self._store.create(path) as file:
            write_proof(file, self._note, tiles_for(part.size, leaves), fetch)
        return Proof(tree.name, tree.origin, part.size, self._note, path, file.sha256, tuple(leaves))

    def _tiles(self, number: int, wanted: list[tuple[int, int]]) -> Any:
        return run(self._connection, read_tiles(number, wanted), _ARCHIVING)


class _Files:
    """The files of one run, each begun where the one before has enough rows."""

    def __init__(self, store: Store, run_: str, month: datetime) -> None:
        self._store = store
        self._name = f"year={month:%Y}/month={month:%m}/{run_}"
        self._open: ExitStack | None = None
        self._file: NewFile | None = None
        self._writer: Any = None
        self._rows = 0
        self._first: Sent | None = None
        self._last: Sent | None = None
        self.done: list[ArchivedFile] = []
        self.rows = 0

    def add(self, group: Sequence[Sent]) -> None:
        """Write a row group."""
        batch = batch_of(group)
        if self._open is None:
            self._begin()
            self._first = group[0]
        self._writer.write_batch(batch)
        self._last = group[-1]
        self._rows += len(group)
        self.rows += len(group)
        if self._rows >= FILE_ROWS:
            self.end()

    def _begin(self) -> None:
        self._open = ExitStack()
        self._file = self._open.enter_context(self._store.create(self._path))
        self._writer = self._open.enter_context(_writer(self._file))
        self._rows = 0

    @property
    def _path(self) -> str:
        return f"{self._name}-{len(self.done) + 1:04}.parquet"

    def end(self) -> None:
        """Have the open file on the disk."""
        if self._open is None:
            return
        opened, self._open = self._open, None
        opened.close()
        assert self._file is not None
        assert self._first is not None
        assert self._last is not None
        self.done.append(
            ArchivedFile(
                self._path,
                self._rows,
                self._file.tell(),
                self._file.sha256,
                _time(self._first.occurred_at),
                _time(self._last.occurred_at),
            )
        )

    def abandon(self) -> None:
        """Leave nothing of the open file."""
        if self._open is not None:
            opened, self._open = self._open, None
            error = ArchiveError("given up")
            opened.__exit__(type(error), error, None)


@contextmanager
def _writer(file: NewFile) -> Iterator[Any]:
    with parquet.ParquetWriter(PythonFile(file, "w"), SCHEMA, compression="zstd") as writer:
        yield writer


def _time(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)


def _check_same_log(connection: Connection[Any], table: str, manifests: Sequence[ArchiveManifest]) -> None:
    """Make sure that what is archived of a log of this name is of this one: such rows are left out, and may go."""
    tree = run(connection, sealed_tree(table), _ARCHIVING)
    if tree is None:
        return
    for one in manifests:
        proof = one.proof
        if proof is None or (proof.tree, proof.origin) != (tree.name, tree.origin):
            continue
        stored = run(connection, stored_checkpoints(tree, proof.size, proof.size, 1), _ARCHIVING)
        try:
            known, said = (Checkpoint.parse(Note.parse(note).text) for note in (stored[0][1], proof.checkpoint))
            same = known == said
        except (IndexError, ProofError):
            same = False
        if not same:
            raise ArchiveError(f"{one.path} has a checkpoint of another log than table `{table}`")


def _known(
    manifests: Sequence[ArchiveManifest], tree: Tree | None, system: str, month: datetime
) -> tuple[tuple[tuple[int, int], ...], tuple[Seen, ...]]:
    """Return what earlier runs archived of a month: leaves of this tree, and what was not sealed then."""
    leaves: list[tuple[int, int]] = []
    seen: list[Seen] = []
    for manifest in manifests:
        if manifest.start != month:
            continue
        proof = manifest.proof
        if proof is not None:
            if tree is not None and (proof.tree, proof.origin) == (tree.name, tree.origin):
                leaves += proof.leaves
        elif manifest.system == system:
            seen.append(Seen(manifest.end, Snapshot.parse(manifest.snapshot)))
        else:
            raise ArchiveError(
                f"the archive has {manifest.start:%Y-%m} of table `{manifest.table}` from another server, and nothing "
                "tells which rows these were: archive this one to another place"
            )
    return tuple(leaves), tuple(seen)
