"""Rows against the hashes of their leaves: which are as they were sealed, and which went rightly.

What is kept in memory does not grow with the log, nor with what is wrong with it: ranges that sealed events name, and
as many bad places as a report names.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from struct import Struct
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
from tracevault.integrity.leaf import READ, Encoder
from tracevault.integrity.merkle import inclusion_proof, verify_inclusion
from tracevault.integrity.tiles import WIDTH, tile_reader
from tracevault.postgres.failures import Place
from tracevault.postgres.run import copied_rows, run
from tracevault.schema.custody import ERASED, PRUNED
from tracevault.sealing.findings import Bad, Findings

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
# The usual row is there, and nothing of it was erased.
_USUAL = bytes((THERE,)) + _THREE_NULLS


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

    def check(self, start: int, end: int, hashes: bytes) -> Findings:
        """Hash the rows of leaves ``start`` to ``end``, compare them with ``hashes``, and return what was found."""
        self._found = Findings()
        expected, good = start, 0
        hash_of, unpack = self._encoder.hash, _INDEX.unpack_from
        for row in copied_rows(self._connection, rows_sql(self._tree, start, end), self._place):
            _, index = unpack(row, _COUNT)
            if index != expected:
                if index < expected:
                    self._found.add("doubled", "there is more than one row, or leaf, of this id", index, _id_of(row))
                    continue
                self._unlist(expected, index, start, hashes)
            expected = index + 1
            offset = (index - start) * HASH
            if row[_ROW:_PLAIN_ROW] == _USUAL:
                computed = hash_of(row, _PLAIN_ROW)
                if hashes[offset : offset + HASH] == computed:
                    good += 1
                else:
                    self._differs(index, row, computed, hashes[offset : offset + HASH])
            else:
                good += self._check_unusual(row, index, hashes[offset : offset + HASH])
        self._unlist(expected, end, start, hashes)
        self._found.checked = good
        return self._found

    def _check_unusual(self, row: bytes, index: int, stored: bytes) -> bool:
        """Look at a leaf whose row is gone or not the usual one, or was erased in part; True if the row is good."""
        if row[_ROW] == GONE:
            if index in self.allowed.pruned:
                self._found.pruned += 1
            else:
                self._found.add("deleted", "its row is gone, and no sealed event says so", index, _id_of(row))
                self._found.add_gone(_id_of(row), index)
            return False
        place, (data, meta, event) = read_fields(row, _ROW + 1, 3)
        computed = self._encoder.hash(row, place, (data, meta))
        if computed != stored:
            self._differs(index, row, computed, stored)
        elif row[_ROW] == OTHER_TIME:
            self._found.add(
                "leaf", "the list of leaves has another `occurred_at` for it than its row", index, _id_of(row)
            )
        elif row[_ROW] == NOT_DERIVED:
            names = ", ".join(f"`{stored.name}`" for stored in GENERATED_COLUMNS)
            self._found.add("changed", f"{names} do not all say what its data says", index, _id_of(row))
        elif (data, meta, event) == (None, None, None):
            return True
        elif self._has_payload(row, place):
            self._found.add("erased", "an erasure is noted of it, and its payload is still there", index, _id_of(row))
        elif index in self.allowed.erased:
            self._found.erased += 1
        else:
            self._found.add("erased", "its payload is gone, and no sealed event says so", index, _id_of(row))
        return False

    def _has_payload(self, row: bytes, place: int) -> bool:
        _, values = read_fields(row, place, len(READ))
        return any(value is not None for value in values[-3:])  # the salt and both payloads

    def _unlist(self, first: int, end: int, start: int, hashes: bytes) -> None:
        """Note that the leaves from ``first`` to ``end`` are in the tree and not in the list of leaves."""
        for index in range(first, end):
            offset = (index - start) * HASH
            self._found.add_unlisted(hashes[offset : offset + HASH], index)

    def _differs(self, index: int, row: bytes, computed: bytes, stored: bytes) -> None:
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


def leaf_row(row: bytes) -> tuple[int, UUID, int, int, tuple[bytes | None, ...]]:
    """Return of a row of `rows_sql`: the index, the id, what there is of the row, where it begins, and commitments."""
    _, index = _INDEX.unpack_from(row, _COUNT)
    place, (data, meta, _event) = read_fields(row, _ROW + 1, 3)
    return index, _id_of(row), row[_ROW], place, (data, meta)


def read_fields(row: bytes, place: int, count: int) -> tuple[int, list[bytes | None]]:
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
