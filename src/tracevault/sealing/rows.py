"""Rows against the hashes of their leaves: which are as they were sealed, and which went rightly.

What is kept in memory does not grow with the log, nor with what is wrong with it: ranges that sealed events name, and
as many bad places as a report names.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from struct import pack
from typing import Any, NamedTuple
from uuid import UUID

from psycopg import Connection

from tracevault.errors import ProofError
from tracevault.events.record import GENERATED_COLUMNS
from tracevault.flows.seal import HASH, Tree, read_tiles
from tracevault.flows.verify import (
    GONE,
    NOT_DERIVED,
    OTHER_TIME,
    THERE,
    remarks,
    rows_sql,
    stored_tiles,
)
from tracevault.integrity.leaf import PAYLOADS, Encoder
from tracevault.integrity.merkle import inclusion_proof, verify_inclusion
from tracevault.integrity.tiles import WIDTH, tile_reader
from tracevault.postgres.failures import Place
from tracevault.postgres.run import RawRow, raw_rows, run
from tracevault.schema.custody import ERASED, PRUNED
from tracevault.sealing.findings import Bad, Findings

# Where things stand in a row of `rows_sql`: index, id; what there is of the row, three values of an erasure; the row.
_STATE = slice(2, 6)
_ROW = 6
# Rows that are hashed together.
_TOGETHER = 100
# The usual row is there, and nothing of it was erased.
_USUAL = (bytes((THERE,)), None, None, None)


class Ranges:
    """Which indexes lie in any of some ranges (first, end)."""

    def __init__(self, pairs: Iterable[Sequence[int]]) -> None:
        self._ranges: list[tuple[int, int]] = []
        for first, end in sorted(map(tuple, pairs)):
            if self._ranges and first <= self._ranges[-1][1]:
                self._ranges[-1] = (self._ranges[-1][0], max(end, self._ranges[-1][1]))
            else:
                self._ranges.append((first, end))
        self._firsts = [first for first, _ in self._ranges]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._ranges)

    def __contains__(self, index: int) -> bool:
        place = bisect_right(self._firsts, index) - 1
        return place >= 0 and index < self._ranges[place][1]


class Allowed(NamedTuple):
    """Leaves of which a sealed event says that the row was pruned, or the payload erased."""

    pruned: Ranges
    erased: Ranges


class RowCheck:
    """Compares the rows of a tree with the hashes of their leaves, one range after another.

    ``allowed`` is read from the database, unless another `RowCheck` has done that.
    """

    def __init__(self, connection: Connection[Any], tree: Tree, place: Place, allowed: Allowed | None = None) -> None:
        self._connection = connection
        self._tree = tree
        self._place = place
        self._encoder = Encoder(tree.name)
        self._found = Findings()
        self.allowed = self._read_allowed() if allowed is None else allowed

    def _read_allowed(self) -> Allowed:
        found = [one for one in run(self._connection, remarks(self._tree), self._place) if self._is_sealed(one.leaf)]
        return Allowed(
            *(Ranges(pair for one in found if one.event == event for pair in one.ranges) for event in (PRUNED, ERASED))
        )

    def _is_sealed(self, index: int) -> bool:
        """Whether the row of a leaf is in the tree: what it says of other rows is believed before the rows are read."""
        tree = self._tree
        rows = list(raw_rows(self._connection, rows_sql(tree, index, index + 1), self._place))
        if len(rows) != 1:
            return False
        row = rows[0]
        (state,), *erasure = row[_STATE]
        if state == GONE or erasure != [None, None, None]:
            return False
        read = tile_reader(lambda tiles: run(self._connection, read_tiles(tree.number, tiles), self._place), tree.size)
        try:
            proof = inclusion_proof(index, tree.size, read)
            verify_inclusion(index, tree.size, self._encoder.hash(row[_ROW:]), proof, tree.root)
        except ProofError:
            return False
        return True

    def check(self, start: int, end: int, hashes: bytes | None = None) -> Findings:
        """Hash the rows of leaves ``start`` to ``end``, compare them with ``hashes``, and return what was found.

        Hashes that are not given are read; that tiles lack some is told by who walks the tree.
        """
        if hashes is None:
            hashes = leaf_hashes(self._connection, self._tree, start, end, self._place, lambda _detail, _index: None)
        self._found = Findings()
        expected, good = start, 0
        rows = raw_rows(self._connection, rows_sql(self._tree, start, end), self._place)
        while batch := list(islice(rows, _TOGETHER)):
            offset = (expected - start) * HASH
            if self._all_good(batch, expected, hashes[offset : offset + len(batch) * HASH]):
                expected += len(batch)
                good += len(batch)
            else:
                expected, some = self._check_each(batch, expected, start, hashes)
                good += some
        self._unlist(expected, end, start, hashes)
        self._found.checked = good
        return self._found

    def _all_good(self, batch: Sequence[RawRow], first: int, stored: bytes) -> bool:
        """Whether these are the usual rows of the leaves from ``first`` on, as they were sealed."""
        columns = list(zip(*batch, strict=True))
        for values, usual in zip(columns[_STATE], _USUAL, strict=True):
            if values.count(usual) < len(batch):
                return False
        if b"".join(columns[0]) != pack(f"!{len(batch)}q", *range(first, first + len(batch))):
            return False
        return b"".join(self._encoder.hash_all(columns[_ROW:])) == stored

    def _check_each(self, batch: Sequence[RawRow], expected: int, start: int, hashes: bytes) -> tuple[int, int]:
        """Look at rows one by one, the first of which should be leaf ``expected``'s.

        Return which leaf's row should come after them, and how many are good.
        """
        good = 0
        for row in batch:
            index = int.from_bytes(row[0], signed=True)
            if index < expected:
                self._found.add("doubled", "there is more than one row, or leaf, of this id", index, _id_of(row))
                continue
            self._unlist(expected, index, start, hashes)
            expected = index + 1
            offset = (index - start) * HASH
            good += self._check_one(row, index, hashes[offset : offset + HASH])
        return expected, good

    def _check_one(self, row: RawRow, index: int, stored: bytes) -> bool:
        """Look at a leaf and its row, which may be gone, or erased in part; True if the row is good."""
        (state,), data, meta, event = row[_STATE]
        if state == GONE:
            if index in self.allowed.pruned:
                self._found.pruned += 1
            else:
                self._found.add("deleted", "its row is gone, and no sealed event says so", index, _id_of(row))
                self._found.add_gone(_id_of(row), index)
            return False
        computed = self._encoder.hash(row[_ROW:], (data, meta))
        if computed != stored:
            self._differs(index, row, computed, stored)
        elif state == OTHER_TIME:
            self._found.add(
                "leaf", "the list of leaves has another `occurred_at` for it than its row", index, _id_of(row)
            )
        elif state == NOT_DERIVED:
            names = ", ".join(f"`{stored.name}`" for stored in GENERATED_COLUMNS)
            self._found.add("changed", f"{names} do not all say what its data says", index, _id_of(row))
        elif (data, meta, event) == (None, None, None):
            return True
        elif any(value is not None for value in row[-1 - len(PAYLOADS) :]):  # the salt and the payloads
            self._found.add("erased", "an erasure is noted of it, and its payload is still there", index, _id_of(row))
        elif index in self.allowed.erased:
            self._found.erased += 1
        else:
            self._found.add("erased", "its payload is gone, and no sealed event says so", index, _id_of(row))
        return False

    def _unlist(self, first: int, end: int, start: int, hashes: bytes) -> None:
        """Note that the leaves from ``first`` to ``end`` are in the tree and not in the list of leaves."""
        for index in range(first, end):
            offset = (index - start) * HASH
            self._found.add_unlisted(hashes[offset : offset + HASH], index)

    def _differs(self, index: int, row: RawRow, computed: bytes, stored: bytes) -> None:
        self._found.add_changed(Bad(index, _id_of(row), computed, stored))


def leaf_hashes(
    connection: Connection[Any], tree: Tree, start: int, end: int, place: Place, complain: Callable[[str, int], None]
) -> bytes:
    """Return the hashes of leaves ``start`` to ``end`` from the lowest tiles, noughts where they lack."""
    begin = start - start % WIDTH
    numbers = range(begin // WIDTH, -(-end // WIDTH))
    tiles = run(connection, stored_tiles(tree, 0, numbers.start, numbers.stop), place)
    parts = []
    for number in numbers:
        width = min(WIDTH, end - number * WIDTH) * HASH
        found = tiles.get(number, b"")
        if len(found) > WIDTH * HASH:
            complain(f"tile {number:,} of level 0 is longer than a tile can be", number * WIDTH)
        found = found[:width]
        if len(found) < width:
            complain(f"tile {number:,} of level 0 lacks hashes", number * WIDTH + len(found) // HASH)
        parts.append(found.ljust(width, b"\0"))
    return b"".join(parts)[(start - begin) * HASH :]


def leaf_row(row: RawRow) -> tuple[int, UUID, int, Sequence[bytes | None], Sequence[bytes | None]]:
    """Return of a row of `rows_sql`: the index, the id, what there is of the row, the row, and commitments."""
    (state,), data, meta, _event = row[_STATE]
    return int.from_bytes(row[0], signed=True), _id_of(row), state, row[_ROW:], (data, meta)


def _id_of(row: RawRow) -> UUID:
    return UUID(bytes=row[1])
