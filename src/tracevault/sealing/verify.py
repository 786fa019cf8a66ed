"""Verification: every row against its leaf, every hash against the tree, the tree against what was signed.

Nothing in the database is believed. Rows are hashed anew, in Python, and compared with the hashes of the lowest tiles;
from those the tree grows again, and its root at each size is compared with signed checkpoints: those in the database,
which show that nobody without the key made them, and those from outside, which alone show that the log was not cut or
made anew by somebody with it.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from struct import Struct
from typing import Any, TypeVar
from uuid import UUID

from psycopg import Connection, IsolationLevel

from tracevault.errors import ConfigError, ProofError, SealError
from tracevault.flows import Flow
from tracevault.flows.seal import HASH, find_tree, read_edge, tables_exist
from tracevault.flows.verify import (
    leafless,
    remarks,
    rows_sql,
    stored_checkpoints,
    stored_tiles,
)
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.leaf import Encoder
from tracevault.integrity.note import Note, Verifier
from tracevault.integrity.report import MOST_PROBLEMS, Outside, Problem, Report
from tracevault.integrity.tiles import WIDTH, Growth
from tracevault.postgres.failures import Place
from tracevault.postgres.run import copied_rows, run
from tracevault.schema.custody import ERASED, PRUNED

_VERIFYING = Place("verifying")
# Leaves that are read at once: a second or so of work, and as many whole tiles.
CHUNK = 256 * WIDTH
# Seconds that a row may wait for its seal before the log counts as incomplete.
GRACE = 60.0
_SUSPECTS = 1000

_INDEX = Struct("!iq")
_SIZE = Struct("!i")
_COUNT = 2

T = TypeVar("T")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Witnessed:
    """A checkpoint from outside the database: where it was found, and when it was put there, if that is known."""

    source: str
    note: Note
    at: datetime | None = None


@dataclass(frozen=True)
class Trust:
    """Whom a verification believes: keys, each perhaps only up to a size of the log, and checkpoints from outside."""

    keys: Sequence[Verifier] = ()
    revoked: tuple[tuple[Verifier, int], ...] = ()
    """Keys that are believed for checkpoints up to a size, and for none beyond."""
    outside: Sequence[Witnessed] = ()

    def opened(self, note: Note, origin: str) -> Checkpoint:
        """Return the checkpoint of a note; `ProofError` if no key that is trusted for its size signed it."""
        checkpoint = Checkpoint.parse(note.text)
        if checkpoint.origin != origin:
            raise ProofError(f"it is a checkpoint of {checkpoint.origin!r}, and the log is {origin!r}")
        trusted = [*self.keys, *(key for key, size in self.revoked if checkpoint.size <= size)]
        if not note.verified_by(trusted):
            raise ProofError("no key that is trusted signed it")
        return checkpoint


def origin_of(connection: Connection[Any], table: str) -> str:
    """Return the origin that the database says the log of ``table`` has; `SealError` if it was never sealed."""
    tree = run(connection, find_tree(table), _VERIFYING) if run(connection, tables_exist(), _VERIFYING) else None
    if tree is None:
        raise SealError(f"table `{table}` was never sealed: `tracevault seal --table {table}` begins that")
    return tree.origin


def verify(
    connection: Connection[Any],
    table: str,
    trust: Trust,
    *,
    first: Checkpoint | None = None,
    grace: float = GRACE,
    progress: Progress = lambda _done, _all: None,
) -> Report:
    """Verify the log of ``table`` in one read-only transaction, and say what was found.

    With ``first``, a checkpoint that an earlier verification found good, only what came after it is looked at.
    ``progress`` is called with leaves done and all leaves. Raises `SealError` where there is nothing to verify.
    """
    if trust.outside and not (trust.keys or trust.revoked):
        raise ConfigError("to believe a checkpoint takes the log's verifier key: pass it as `keys`", field="keys")
    started = time.monotonic()
    connection.isolation_level = IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    with connection.transaction():
        report = _Verification(connection, table, trust, first, progress).report()
    report.conclude(grace)
    report.seconds = time.monotonic() - started
    return report


class _Verification:
    """One verification, from reading the tree to the last comparison."""

    def __init__(
        self, connection: Connection[Any], table: str, trust: Trust, first: Checkpoint | None, progress: Progress
    ) -> None:
        self._connection = connection
        self._trust = trust
        self._progress = progress
        tree = self._run(find_tree(table)) if self._run(tables_exist()) else None
        if tree is None:
            raise SealError(f"table `{table}` was never sealed: `tracevault seal --table {table}` begins that")
        self._tree = tree
        self._report = Report(table, origin=tree.origin, size=tree.size, root=tree.root)
        self._report.first = first.size if first else 0
        self._first = first
        self._missing = _Growing()
        self._missing_ids: dict[int, UUID] = {}
        self._erased: list[tuple[int, UUID, UUID | None]] = []
        self._changed: list[_Bad] = []
        self._marks: dict[int, list[tuple[bytes, str, Witnessed | None]]] = {}

    def report(self) -> Report:
        self._collect_checkpoints()
        first = self._report.first
        if first > self._tree.size:
            self._add("rolled back", f"the log has {self._tree.size:,} leaves, and had {first:,} when it was verified")
        else:
            self._walk(first)
        self._explain()
        self._look_for_leafless()
        return self._report

    # ------------------------------------------------------------------------------------------ checkpoints

    def _collect_checkpoints(self) -> None:
        tree, trusted = self._tree, bool(self._trust.keys or self._trust.revoked)
        newest = 0
        for size, text in self._run(stored_checkpoints(tree)):
            try:
                note = Note.parse(text)
                checkpoint = self._trust.opened(note, tree.origin) if trusted else Checkpoint.parse(note.text)
            except ProofError as error:
                self._add("checkpoint", f"the stored checkpoint of size {size:,} is not the log's: {error}")
                continue
            newest = max(newest, checkpoint.size)
            self._mark(checkpoint, "a stored checkpoint", None)
        self._report.signatures_checked = trusted
        self._report.unsigned = max(0, tree.size - newest)
        for witnessed in self._trust.outside:
            try:
                checkpoint = self._trust.opened(witnessed.note, tree.origin)
            except ProofError as error:
                self._add("checkpoint", f"a checkpoint from {witnessed.source} is not the log's: {error}")
                continue
            self._mark(checkpoint, f"the checkpoint from {witnessed.source}", witnessed)
        if self._first is not None:
            self._mark(self._first, "what was verified before", None)
        self._mark(Checkpoint(tree.origin, tree.size, tree.root), "the tree's own root", None)

    def _mark(self, checkpoint: Checkpoint, what: str, witnessed: Witnessed | None) -> None:
        if checkpoint.size > self._tree.size:
            self._add(
                "rolled back",
                f"{what} says that the log had {checkpoint.size:,} leaves, and it has {self._tree.size:,}: its end was "
                "cut off, or it is an older copy",
            )
            return
        self._marks.setdefault(checkpoint.size, []).append((checkpoint.root, what, witnessed))

    def _compare(self, growth: Growth) -> None:
        """Compare the root at this size with the checkpoints of this size."""
        for root, what, witnessed in self._marks.pop(growth.size, ()):
            if root != growth.root:
                self._add("root", f"{what} of size {growth.size:,} has another root than the log has at that size")
            elif witnessed is not None:
                best = self._report.anchor
                if best is None or growth.size >= best.size:
                    self._report.anchor = Outside(witnessed.source, growth.size, witnessed.at)

    # ------------------------------------------------------------------------------------------------- rows

    def _walk(self, first: int) -> None:
        tree = self._tree
        # What comes before `first` is compared by the hashes that were verified with it.
        for size in sorted(size for size in self._marks if size < first):
            self._compare(Growth(size, self._edge(size)))
        growth = Growth(first, self._edge(first))
        self._compare(growth)
        for begin in range(first - first % WIDTH, tree.size, CHUNK):
            start, end = max(begin, first), min(begin + CHUNK, tree.size)
            hashes = self._stored_hashes(begin, end)
            self._check_rows(start, end, hashes[(start - begin) * HASH :])
            self._grow(growth, start, end, hashes[(start - begin) * HASH :])
            self._progress(end - first, tree.size - first)

    def _edge(self, size: int) -> dict[int, bytes]:
        return self._run(read_edge(replace(self._tree, size=size)))

    def _stored_hashes(self, begin: int, end: int) -> bytes:
        """Return the leaf hashes in the lowest tiles, noughts where they lack; with ``begin`` a tile begins."""
        numbers = range(begin // WIDTH, -(-end // WIDTH))
        tiles = self._run(stored_tiles(self._tree, 0, numbers.start, numbers.stop))
        parts = []
        for number in numbers:
            width = min(WIDTH, end - number * WIDTH) * HASH
            found = tiles.get(number, b"")[:width]
            if len(found) < width:
                self._add("tile", f"tile {number:,} of level 0 lacks hashes", number * WIDTH)
            parts.append(found.ljust(width, b"\0"))
        return b"".join(parts)

    def _check_rows(self, start: int, end: int, hashes: bytes) -> None:
        """Hash the rows of leaves ``start`` to ``end`` and compare them with ``hashes``."""
        encoder, expected, good = Encoder(self._tree.name), start, 0
        hash_of, unpack = encoder.hash, _INDEX.unpack_from
        for row in copied_rows(self._connection, rows_sql(self._tree, start, end), _VERIFYING):
            _, index = unpack(row, _COUNT)
            if index != expected:
                self._lacking(expected, index)
            expected = index + 1
            offset = (index - start) * HASH
            # The usual row is there, and nothing of it was erased.
            if row[_ROW_THERE] and row[_NO_ERASURE] == _THREE_NULLS:
                computed = hash_of(row, _PLAIN_ROW)
                if hashes[offset : offset + HASH] == computed:
                    good += 1
                    continue
                self._changed.append(_Bad(index, _id_of(row), computed, hashes[offset : offset + HASH]))
            else:
                self._check_unusual(row, index, hashes[offset : offset + HASH])
        if expected < end:
            self._lacking(expected, end)
        self._report.checked += good

    def _check_unusual(self, row: bytes, index: int, stored: bytes) -> None:
        """Look at a leaf whose row is gone, or whose payload was erased."""
        if not row[_ROW_THERE]:
            self._missing.add(index)
            if len(self._missing_ids) < MOST_PROBLEMS:
                self._missing_ids[index] = _id_of(row)
            return
        place, commitments = _ROW_THERE + 1, []
        for _ in range(3):
            (size,) = _SIZE.unpack_from(row, place)
            place += 4
            commitments.append(row[place : place + size] if size >= 0 else None)
            place += max(size, 0)
        *committed, event = commitments
        computed = Encoder(self._tree.name).hash(row, place, tuple(committed))
        if computed != stored:
            self._changed.append(_Bad(index, _id_of(row), computed, stored))
        else:
            self._erased.append((index, _id_of(row), UUID(bytes=event) if event else None))

    def _lacking(self, first: int, end: int) -> None:
        for index in range(first, min(end, first + MOST_PROBLEMS)):
            self._add("leaf", "its leaf is gone from the list of leaves", index)

    def _grow(self, growth: Growth, start: int, end: int, hashes: bytes) -> None:
        """Grow the tree by the hashes of leaves ``start`` to ``end``, stopping at each size that a checkpoint is of."""
        place = start
        for size in sorted(size for size in self._marks if start < size <= end):
            growth.add(_split(hashes, place - start, size - start))
            place = size
            self._compare(growth)
        growth.add(_split(hashes, place - start, end - start))
        self._check_tiles(growth)

    def _check_tiles(self, growth: Growth) -> None:
        """Compare the stored tiles above the lowest level with those that grew meanwhile."""
        for level, number, content in growth.changes():
            if level:
                found = self._run(stored_tiles(self._tree, level, number, number + 1)).get(number, b"")
                if found[: len(content)] != content:
                    self._add("tile", f"tile {number:,} of level {level} is not what the hashes below it make")
        growth.settle()

    # ------------------------------------------------------------------------------------------ explanations

    def _explain(self) -> None:
        """Say what is wrong with the rows that are not as they were sealed, and what was taken away rightly."""
        bad = {problem.index for problem in self._changed}
        by_hash = {problem.stored: problem for problem in self._changed}
        for problem in self._changed:
            other = by_hash.get(problem.computed)
            if other is not None:
                detail = f"its row was sealed as leaf {other.index:,}: leaves were exchanged"
                self._add("moved", detail, problem.index, problem.id)
            else:
                self._add("changed", "its row is not what was sealed", problem.index, problem.id)
        good = [
            remark
            for remark in self._run(remarks(self._tree))
            if remark.leaf is not None and remark.leaf not in bad and remark.leaf not in self._missing
        ]
        pruned = _Ranges(remark.ranges for remark in good if remark.event == PRUNED)
        erased = _Ranges(remark.ranges for remark in good if remark.event == ERASED)
        for first, end in self._missing.ranges():
            for index in range(first, end):
                if index in pruned:
                    self._report.pruned += 1
                else:
                    self._add("deleted", "its row is gone", index, self._missing_ids.get(index))
        for index, id_, _event in self._erased:
            if index in erased:
                self._report.erased += 1
            else:
                self._add("erased", "its payload is gone, and no sealed event says so", index, id_)

    def _look_for_leafless(self) -> None:
        count, oldest, suspects = self._run(leafless(self._tree, _SUSPECTS, everywhere=self._report.first == 0))
        self._report.unsealed, self._report.oldest_unsealed_seconds = count, round(oldest, 3)
        for id_, _age, state in suspects:
            self._add("inserted", f"a row without a leaf {state}: it was put in behind the log's back", None, id_)

    def _add(self, kind: str, detail: str, index: int | None = None, id_: UUID | None = None) -> None:
        self._report.add(Problem(kind, detail, index, id_))

    def _run(self, flow: Flow[T]) -> T:
        return run(self._connection, flow, _VERIFYING)


# Where things stand in a row of `rows_sql`: 2 bytes count; index 4+8; id 4+16; whether the row is there 4+1; then, if
# nothing was erased, three NULLs of 4 bytes each, and the row itself.
_ID = 2 + 12 + 4
_ROW_THERE = _ID + 16 + 4
_NO_ERASURE = slice(_ROW_THERE + 1, _ROW_THERE + 13)
_THREE_NULLS = b"\xff" * 12
_PLAIN_ROW = _ROW_THERE + 13


@dataclass(frozen=True)
class _Bad:
    """A leaf whose row has another hash than was stored."""

    index: int
    id: UUID
    computed: bytes
    stored: bytes


class _Ranges:
    """Which indexes lie in any of some ranges (first, end)."""

    def __init__(self, ranges: Iterable[Iterable[tuple[int, int]]]) -> None:
        self._ranges: list[tuple[int, int]] = []
        for first, end in sorted(pair for pairs in ranges for pair in pairs):
            if self._ranges and first <= self._ranges[-1][1]:
                self._ranges[-1] = (self._ranges[-1][0], max(end, self._ranges[-1][1]))
            else:
                self._ranges.append((first, end))
        self._firsts = [first for first, _ in self._ranges]

    def __contains__(self, index: int) -> bool:
        place = bisect_right(self._firsts, index) - 1
        return place >= 0 and index < self._ranges[place][1]


class _Growing:
    """A set of indexes that come in order, kept as ranges."""

    def __init__(self) -> None:
        self._ranges: list[list[int]] = []

    def add(self, index: int) -> None:
        if self._ranges and self._ranges[-1][1] == index:
            self._ranges[-1][1] += 1
        else:
            self._ranges.append([index, index + 1])

    def ranges(self) -> list[tuple[int, int]]:
        return [(first, end) for first, end in self._ranges]

    def __contains__(self, index: int) -> bool:
        place = bisect_right(self._ranges, [index, 1 << 63]) - 1
        return place >= 0 and index < self._ranges[place][1]


def _split(hashes: bytes, first: int, end: int) -> Iterator[bytes]:
    return (hashes[place : place + HASH] for place in range(first * HASH, end * HASH, HASH))


def _id_of(row: bytes) -> UUID:
    return UUID(bytes=row[_ID : _ID + 16])
