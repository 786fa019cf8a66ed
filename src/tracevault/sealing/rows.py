"""Rows against the hashes of their leaves: which are as they were sealed, which went rightly, what became of others.

What is kept in memory does not grow with the log, nor with what is wrong with it: ranges that sealed events name, and
as many bad places as a report names.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any
from uuid import UUID

from psycopg import Connection

from tracevault.errors import ProofError
from tracevault.event.record import GENERATED_COLUMNS
from tracevault.flows.seal import HASH, Tree, read_tiles
from tracevault.flows.verify import (
    GONE,
    NOT_DERIVED,
    OTHER_TIME,
    THERE,
    Leafless,
    leafless,
    remarks,
    rows_by_id_sql,
    rows_sql,
)
from tracevault.integrity.leaf import READ, Encoder
from tracevault.integrity.merkle import inclusion_proof, verify_inclusion
from tracevault.integrity.report import MOST_PROBLEMS, Problem, Report
from tracevault.integrity.tiles import tile_reader
from tracevault.postgres.failures import Place
from tracevault.postgres.run import copied_rows, run
from tracevault.schema.custody import ERASED, PRUNED

_INDEX = Struct("!iq")
_SIZE = Struct("!i")
_COUNT = 2
# Where things stand in a row of `rows_sql`: 2 bytes count; index 4+8; id 4+16; what there is of the row 4+1; then, if
# nothing was erased, three NULLs of 4 bytes each, and the row itself.
_ID = _COUNT + 12 + 4
_ROW = _ID + 16 + 4
_NO_ERASURE = slice(_ROW + 1, _ROW + 13)
_THREE_NULLS = b"\xff" * 12
_PLAIN_ROW = _ROW + 13
# And in one of `rows_by_id_sql`.
_FOUND_ID = _COUNT + 4
_FOUND_ROW = _FOUND_ID + 16


@dataclass(frozen=True)
class _Bad:
    """A leaf whose row has another hash than was stored."""

    index: int
    id: UUID
    computed: bytes
    stored: bytes


class RowCheck:
    """Compares the rows of a tree with the hashes of their leaves, and tells a report what is wrong."""

    def __init__(self, connection: Connection[Any], tree: Tree, report: Report, place: Place) -> None:
        self._connection = connection
        self._tree = tree
        self._report = report
        self._place = place
        self._encoder = Encoder(tree.name)
        self._changed: list[_Bad] = []
        self._changed_left_out = 0
        # Of leaves that have no row, and of those that are listed no more: to recognise the row that was theirs.
        self._gone: dict[UUID, int] = {}
        self._unlisted: dict[bytes, int] = {}
        found = [remark for remark in run(connection, remarks(tree), place) if self._is_sealed(remark.leaf)]
        self._pruned = Ranges(remark.ranges for remark in found if remark.event == PRUNED)
        self._erased = Ranges(remark.ranges for remark in found if remark.event == ERASED)

    def _is_sealed(self, index: int) -> bool:
        """Whether the row of a leaf is in the tree: what it says of other rows is believed before the rows are read."""
        tree = self._tree
        rows = list(copied_rows(self._connection, rows_sql(tree, index, index + 1), self._place))
        if len(rows) != 1 or rows[0][_ROW] == GONE or rows[0][_NO_ERASURE] != _THREE_NULLS:
            return False
        read = tile_reader(lambda tiles: run(self._connection, read_tiles(tree.number, tiles), self._place), tree.size)
        try:
            proof = inclusion_proof(index, tree.size, read)
            verify_inclusion(index, tree.size, self._encoder.hash(rows[0], _PLAIN_ROW), proof, tree.root)
        except ProofError:
            return False
        return True

    # ------------------------------------------------------------------------------------------------- leaves

    def check(self, start: int, end: int, hashes: bytes) -> None:
        """Hash the rows of leaves ``start`` to ``end`` and compare them with ``hashes``."""
        expected, good = start, 0
        hash_of, unpack = self._encoder.hash, _INDEX.unpack_from
        for row in copied_rows(self._connection, rows_sql(self._tree, start, end), self._place):
            _, index = unpack(row, _COUNT)
            if index != expected:
                if index < expected:
                    self._add("doubled", "there is more than one row, or leaf, of this id", index, _id_of(row))
                    continue
                self._unlist(expected, index, start, hashes)
            expected = index + 1
            offset = (index - start) * HASH
            # The usual row is there, and nothing of it was erased.
            if row[_ROW] == THERE and row[_NO_ERASURE] == _THREE_NULLS:
                computed = hash_of(row, _PLAIN_ROW)
                if hashes[offset : offset + HASH] == computed:
                    good += 1
                else:
                    self._differs(index, row, computed, hashes[offset : offset + HASH])
            else:
                good += self._check_unusual(row, index, hashes[offset : offset + HASH])
        self._unlist(expected, end, start, hashes)
        self._report.checked += good

    def _check_unusual(self, row: bytes, index: int, stored: bytes) -> bool:
        """Look at a leaf whose row is gone or not the usual one, or was erased in part; True if the row is good."""
        if row[_ROW] == GONE:
            if index in self._pruned:
                self._report.pruned += 1
            else:
                self._add("deleted", "its row is gone, and no sealed event says so", index, _id_of(row))
                if len(self._gone) < MOST_PROBLEMS:
                    self._gone[_id_of(row)] = index
            return False
        place, (data, meta, event) = _fields(row, _ROW + 1, 3)
        computed = self._encoder.hash(row, place, (data, meta))
        if computed != stored:
            self._differs(index, row, computed, stored)
        elif row[_ROW] == OTHER_TIME:
            self._add("leaf", "the list of leaves has another `occurred_at` for it than its row", index, _id_of(row))
        elif row[_ROW] == NOT_DERIVED:
            names = ", ".join(f"`{stored.name}`" for stored in GENERATED_COLUMNS)
            self._add("changed", f"{names} do not all say what its data says", index, _id_of(row))
        elif (data, meta, event) == (None, None, None):
            return True
        elif self._has_payload(row, place):
            self._add("erased", "an erasure is noted of it, and its payload is still there", index, _id_of(row))
        elif index in self._erased:
            self._report.erased += 1
        else:
            self._add("erased", "its payload is gone, and no sealed event says so", index, _id_of(row))
        return False

    def _has_payload(self, row: bytes, place: int) -> bool:
        _, values = _fields(row, place, len(READ))
        return any(value is not None for value in values[-3:])  # the salt and both payloads

    def _differs(self, index: int, row: bytes, computed: bytes, stored: bytes) -> None:
        if len(self._changed) < MOST_PROBLEMS:
            self._changed.append(_Bad(index, _id_of(row), computed, stored))
        else:
            self._changed_left_out += 1

    def _unlist(self, first: int, end: int, start: int, hashes: bytes) -> None:
        """Note that the leaves from ``first`` to ``end`` are in the tree and not in the list of leaves."""
        for index in range(first, end):
            if len(self._unlisted) < MOST_PROBLEMS:
                offset = (index - start) * HASH
                self._unlisted[hashes[offset : offset + HASH]] = index
            else:
                self._report.problems_left_out += 1

    # ------------------------------------------------------------------------------------------ explanations

    def explain(self, *, everywhere: bool) -> None:
        """Say what became of the rows that are not as they were sealed, and look for rows without a leaf."""
        by_hash = {bad.stored: bad for bad in self._changed}
        for bad in self._changed:
            other = by_hash.get(bad.computed)
            if other is not None:
                detail = f"its row was sealed as leaf {other.index:,}: leaves were exchanged"
                self._add("moved", detail, bad.index, bad.id)
            else:
                self._add("changed", "its row is not what was sealed", bad.index, bad.id)
        self._report.problems_left_out += self._changed_left_out
        flow = leafless(self._tree, MOST_PROBLEMS, everywhere=everywhere)
        self._report.unsealed, oldest, count, suspects = run(self._connection, flow, self._place)
        self._report.oldest_unsealed_seconds = round(oldest, 3)
        self._tell_of(suspects)
        self._report.problems_left_out += count - len(suspects)
        for index in self._unlisted.values():
            detail = "its leaf is gone from the list of leaves, and no row that was sealed as it is left"
            self._add("leaf", detail, index)

    def _tell_of(self, suspects: Sequence[Leafless]) -> None:
        hashes = self._hashes_of([suspect.id for suspect in suspects])
        for id_, state in suspects:
            unlisted = self._unlisted.pop(hashes.get(id_, b""), None)
            if unlisted is not None:
                self._add(
                    "leaf", "its leaf is gone from the list of leaves; its row is as it was sealed", unlisted, id_
                )
            elif id_ in self._gone:
                self._add("changed", "its row has another `occurred_at` than was sealed", self._gone[id_], id_)
            else:
                self._add("inserted", f"a row without a leaf {state}: it was put in behind the log's back", None, id_)

    def _hashes_of(self, ids: Sequence[UUID]) -> Mapping[UUID, bytes]:
        if not ids or not self._unlisted:
            return {}
        rows = copied_rows(self._connection, rows_by_id_sql(self._tree, ids), self._place)
        return {UUID(bytes=row[_FOUND_ID : _FOUND_ID + 16]): self._encoder.hash(row, _FOUND_ROW) for row in rows}

    def _add(self, kind: str, detail: str, index: int | None = None, id_: UUID | None = None) -> None:
        self._report.add(Problem(kind, detail, index, id_))


class Ranges:
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


def leaf_row(row: bytes) -> tuple[int, UUID, int, int, tuple[bytes | None, ...]]:
    """Return of a row of `rows_sql`: the index, the id, what there is of the row, where it begins, and commitments."""
    _, index = _INDEX.unpack_from(row, _COUNT)
    place, (data, meta, _event) = _fields(row, _ROW + 1, 3)
    return index, _id_of(row), row[_ROW], place, (data, meta)


def _fields(row: bytes, place: int, count: int) -> tuple[int, list[bytes | None]]:
    """Return ``count`` fields of a tuple of binary COPY, and the place after them."""
    fields: list[bytes | None] = []
    for _ in range(count):
        (size,) = _SIZE.unpack_from(row, place)
        place += 4
        fields.append(row[place : place + size] if size >= 0 else None)
        place += max(size, 0)
    return place, fields


def _id_of(row: bytes) -> UUID:
    return UUID(bytes=row[_ID : _ID + 16])
