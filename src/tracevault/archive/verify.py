"""Verification of an archive, with no database: files as manifests name them, rows as their leaves, tiles as signed.

What a manifest says is not believed either: the log has an event ``tracevault.archived`` with its SHA-256.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Any
from uuid import UUID

import pyarrow
from pyarrow import parquet

from tracevault.archive.manifest import ArchivedFile, ArchiveManifest, Proof
from tracevault.archive.proof import TileArchive
from tracevault.archive.rows import INFINITY, SCHEMA, Archived, archived
from tracevault.archive.store import Store
from tracevault.errors import ArchiveError, ConfigError, ProofError
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.leaf import Encoder
from tracevault.integrity.note import Note
from tracevault.integrity.report import Outside, Problem, Report
from tracevault.sealing.trust import trust_of
from tracevault.sealing.verify import GRACE, Progress, Trust

# Rows that are in memory at once.
BATCH = 4096
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def verify_archive(
    store: Store,
    *,
    keys: Sequence[str] = (),
    anchors: Sequence[str] = (),
    manifests: Sequence[ArchiveManifest] | None = None,
    progress: Progress = lambda _done, _all: None,
) -> Report:
    """Verify all of an archive, or the runs of some ``manifests``; the report is as that of `verify`.

    ``keys`` are the log's verifier keys and ``anchors`` where checkpoints are kept, as for the database. OK takes that
    each run's checkpoint is in an anchor. Raises `ArchiveError` where there is no archive.
    """
    if anchors and not keys:
        raise ConfigError("to believe a checkpoint takes the log's verifier key: pass it as `keys`", field="keys")
    started = time.monotonic()
    runs = store.manifests() if manifests is None else list(manifests)
    if not runs:
        raise ArchiveError(f"there is no archive of table `{store.table}` in {store.location!r}")
    report = Report(store.table)
    report.signatures_checked = bool(keys)
    total, done = sum(one.rows for one in runs), 0
    anchored = []
    trusts: dict[str, Trust] = {}
    for manifest in runs:
        check = _RunCheck(store, manifest, report, trusts, (keys, anchors))
        for rows in check.rows():
            done += rows
            progress(done, total)
        anchored.append(check.anchor)
    if all(anchored):
        report.anchor = max((one for one in anchored if one), key=lambda one: one.size)
    report.conclude(GRACE)
    report.seconds = time.monotonic() - started
    return report


def read_rows(store: Store, file: ArchivedFile) -> Iterator[list[Archived]]:
    """Yield the rows of a file; `ProofError` where it is none of ours."""
    with closing(store.open(file.path)) as opened:
        try:
            found = parquet.ParquetFile(opened)
            if not found.schema_arrow.equals(SCHEMA):
                raise ProofError("its columns are not those of an archive")
            for batch in found.iter_batches(BATCH):
                yield list(archived(batch))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ProofError(f"it cannot be read: {error}") from None


class _RunCheck:
    """The verification of one run."""

    def __init__(
        self,
        store: Store,
        manifest: ArchiveManifest,
        report: Report,
        trusts: dict[str, Trust],
        given: tuple[Sequence[str], Sequence[str]],
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._report = report
        self._trusts = trusts
        self._given = given
        self._tiles: TileArchive | None = None
        self._leaves = _Leaves(() if manifest.proof is None else manifest.proof.leaves)
        self.anchor: Outside | None = None

    def rows(self) -> Iterator[int]:
        """Check files and rows, and yield how many rows were looked at."""
        proof, manifest = self._manifest.proof, self._manifest
        if proof is None:
            yield from self._files(None)
            return
        with ExitStack() as stack:
            try:
                zipped = stack.enter_context(closing(self._store.open(proof.path)))
                if self._store.digest(proof.path)[1] != proof.sha256:
                    self._add("file", f"{proof.path} is not what the manifest {manifest.path} names")
                self._tiles = TileArchive(zipped, proof.size)
                self._check_tree(proof, self._tiles)
            except (ArchiveError, ProofError) as error:
                self._tiles = None
                self._add("checkpoint", f"{proof.path}: {error}")
            yield from self._files(Encoder(proof.tree))
        if self._tiles is None:
            return  # nothing was looked at
        for leaf in self._leaves.missing():
            self._add("deleted", f"{manifest.path} says that it is archived, and it is not there", leaf)

    def _check_tree(self, proof: Proof, tiles: TileArchive) -> None:
        """Compare the checkpoint with the tiles, and with those that were kept outside."""
        report = self._report
        note = Note.parse(proof.checkpoint)
        if tiles.note != proof.checkpoint:
            raise ProofError("its checkpoint is not the manifest's")
        trust = self._trust(proof.origin)
        found = trust.opened(note, proof.origin) if report.signatures_checked else Checkpoint.parse(note.text)
        if found.origin != proof.origin or found.size != proof.size:
            raise ProofError("the checkpoint is not that of the manifest")
        if tiles.root() != found.root:
            raise ProofError("the tiles are not those of the checkpoint")
        if found.size >= report.size:
            report.size, report.root, report.origin = found.size, found.root, found.origin
        for witnessed in trust.outside:
            other = trust.opened(witnessed.note, proof.origin)
            if other.size != found.size:
                continue
            if other.root != found.root:
                raise ProofError(f"the checkpoint from {witnessed.source} of the same size has another root")
            self.anchor = Outside(witnessed.source, found.size, witnessed.at)

    def _trust(self, origin: str) -> Trust:
        if origin not in self._trusts:
            keys, anchors = self._given
            self._trusts[origin] = trust_of(keys, anchors, origin=origin)
        return self._trusts[origin]

    def _files(self, encoder: Encoder | None) -> Iterator[int]:
        for file in self._manifest.files:
            try:
                size, digest = self._store.digest(file.path)
            except ArchiveError as error:
                self._add("deleted", str(error))
                continue
            if (size, digest) != (file.bytes, file.sha256):
                self._add("file", f"{file.path} is not what the manifest {self._manifest.path} names")
            count = 0
            try:
                for rows in read_rows(self._store, file):
                    for row in rows:
                        self._check(row, file, encoder)
                    count += len(rows)
                    yield len(rows)
            except ProofError as error:
                self._add("file", f"{file.path}: {error}")
                continue
            if count != file.rows:
                self._add("file", f"{file.path} has {count:,} rows, and the manifest says {file.rows:,}")

    def _check(self, row: Archived, file: ArchivedFile, encoder: Encoder | None) -> None:
        id_ = _id(row.id)
        fault = None if row.fault is None else str(row.fault)
        if fault is None and not _belongs(row.occurred_at, self._manifest, file):
            fault = f"its `occurred_at` is not of the month of {file.path}"
        if encoder is None or self._tiles is None:
            if fault is not None:
                self._add("changed", fault, row.leaf, id_)
            elif encoder is None:
                self._report.unsealed += 1
            return
        leaf = row.leaf
        expected = None if leaf is None or leaf < 0 else self._tiles.hash(leaf)
        if fault is None and expected is None:
            fault = "it names no leaf of the checkpoint's tiles"
        if fault is None and encoder.hash(row.fields, row.commitments) != expected:
            fault = "it is not as it was sealed"
        if leaf is not None and not self._leaves.take(leaf):
            fault = fault or "its leaf is there twice, or not one that the manifest names"
        if fault is not None:
            self._add("changed", f"{fault} ({file.path})", leaf, id_)
        elif any(row.commitments):
            self._report.erased += 1
        else:
            self._report.checked += 1

    def _add(self, kind: str, detail: str, index: int | None = None, id_: UUID | None = None) -> None:
        self._report.add(Problem(kind, detail, index, id_))


class _Leaves:
    """Which leaves are still to come: a bit for each."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._ranges = sorted(ranges)
        self._firsts = [first for first, _ in self._ranges]
        counts = [max(0, end - first) for first, end in self._ranges]
        self._before = [0, *accumulate(counts)]
        self._taken = bytearray(-(-self._before[-1] // 8))

    def take(self, leaf: int) -> bool:
        """Note a leaf; False if it was there before, or is not one of these."""
        place = bisect_right(self._firsts, leaf) - 1
        if place < 0 or leaf >= self._ranges[place][1]:
            return False
        byte, bit = divmod(self._before[place] + leaf - self._firsts[place], 8)
        if self._taken[byte] >> bit & 1:
            return False
        self._taken[byte] |= 1 << bit
        return True

    def missing(self) -> Iterator[int]:
        """Yield the leaves that did not come."""
        for place, (first, end) in enumerate(self._ranges):
            for leaf in range(first, end):
                byte, bit = divmod(self._before[place] + leaf - first, 8)
                if not self._taken[byte] >> bit & 1:
                    yield leaf


def _belongs(microseconds: int | None, manifest: ArchiveManifest, file: ArchivedFile) -> bool:
    if microseconds is None or abs(microseconds) >= INFINITY:
        return False
    try:
        moment = _EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        return False
    return manifest.start <= moment < manifest.end and file.path.startswith(f"year={moment:%Y}/month={moment:%m}/")


def micros(moment: datetime) -> int:
    """Return microseconds since 1970."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _id(text: Any) -> UUID | None:
    try:
        return UUID(text)
    except (ValueError, TypeError, AttributeError):
        return None
