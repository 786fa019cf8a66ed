"""A tree's hashes in tiles of 256: what is stored, exported and read (C2SP tlog-tiles).

A tile of level ``L`` and number ``N`` holds the roots of up to 256 neighbouring complete subtrees of ``256**L``
leaves each, concatenated. Tiles only grow: the last one of a level is partial until it is 256 wide. Every hash in
between is computed from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple

from tracevault.errors import ProofError
from tracevault.integrity.merkle import EMPTY_ROOT, HASH_SIZE, HashReader, node_hash

#: Hashes in a full tile.
WIDTH = 256
_HEIGHT = 8
_FULL = WIDTH * HASH_SIZE
_PAIR = 2 * HASH_SIZE
# tlog-tiles: "<L> is the level of the tile, between 0 and 63"; though 8 levels are enough for 2**64 leaves.
_MAX_LEVEL = 63
_PATH = re.compile(
    r"tile/(?P<level>0|[1-9][0-9]?)/(?P<number>(?:x[0-9]{3}/)*[0-9]{3})(?:\.p/(?P<width>[1-9][0-9]{0,2}))?", re.ASCII
)

#: Gives the hashes of tiles by ``(level, number)``; each as wide as it is stored.
TileFetcher = Callable[[Sequence[tuple[int, int]]], Mapping[tuple[int, int], bytes]]


class Tile(NamedTuple):
    """The name of a tile: its level, its number in the level, and its width, 1 to 256 hashes."""

    level: int
    number: int
    width: int = WIDTH

    @property
    def path(self) -> str:
        """The path in a static log: ``tile/0/x001/067`` or, where it is partial, ``tile/0/x001/067.p/3``."""
        first, digits = True, ""
        number = self.number
        while first or number:
            number, part = divmod(number, 1000)
            digits = f"{part:03}" if first else f"x{part:03}/{digits}"
            first = False
        return f"tile/{self.level}/{digits}" + (f".p/{self.width}" if self.width < WIDTH else "")

    @classmethod
    def parse(cls, path: str) -> Tile:
        """Return the tile with this path. Raises `ProofError` for one that is not exactly as we would write it."""
        match = _PATH.fullmatch(path)
        if match:
            number = int(match["number"].replace("x", "").replace("/", ""))
            tile = cls(int(match["level"]), number, int(match["width"] or WIDTH))
            if tile.path == path and tile.level <= _MAX_LEVEL:
                return tile
        raise ProofError(f"no path of a tile: {path[:64]!r}")


def tiles_of(size: int) -> Iterator[Tile]:
    """Yield the tiles of a tree with ``size`` leaves, level by level; the last of a level may be partial."""
    level, count = 0, size
    while count:
        full, rest = divmod(count, WIDTH)
        for number in range(full):
            yield Tile(level, number)
        if rest:
            yield Tile(level, full, rest)
        level, count = level + 1, full


def right_edge(size: int) -> list[Tile]:
    """Return the partial tiles of a tree with ``size`` leaves, lowest level first: what it takes to let it grow."""
    edge, level, count = [], 0, size
    while count:
        full, rest = divmod(count, WIDTH)
        if rest:
            edge.append(Tile(level, full, rest))
        level, count = level + 1, full
    return edge


class Growth:
    """A tree that leaves are added to, from its partial tiles alone: what is full already is not read again.

    ``edge`` has the hashes of the partial tile of each level, concatenated, as `right_edge` names them; longer ones
    are cut to ``size``. Raises `ProofError` where one is missing or short.
    """

    def __init__(self, size: int = 0, edge: Mapping[int, bytes] | None = None) -> None:
        self.size = size
        self._start = size
        self._edge: dict[int, bytes] = {}
        self._full: dict[tuple[int, int], bytes] = {}
        given = edge or {}
        for tile in right_edge(size):
            self._edge[tile.level] = _cut(given.get(tile.level), tile)

    def add(self, leaf_hashes: Iterable[bytes]) -> None:
        """Add leaves by their hashes. A wrong one (not of 32 bytes) raises `ProofError`, and none is added."""
        added = leaf_hashes if isinstance(leaf_hashes, list) else list(leaf_hashes)
        if not set(map(len, added)) <= {HASH_SIZE}:
            raise ProofError(f"a leaf's hash is not of {HASH_SIZE} bytes")
        data, level, count = b"".join(added), 0, self.size
        self.size += len(added)
        # Level by level, all new tiles at once: that takes one call of SHA-256 for each node and little else.
        while data:
            data = self._edge.get(level, b"") + data
            full = len(data) // _FULL * _FULL
            for start in range(0, full, _FULL):
                self._full[level, count // WIDTH + start // _FULL] = data[start : start + _FULL]
            self._edge[level] = data[full:]
            data, level, count = _parents(data[:full], _HEIGHT), level + 1, count // WIDTH

    @property
    def root(self) -> bytes:
        """The root of the tree as it has grown."""
        root = b""
        for level in sorted(self._edge):
            end = len(self._edge[level])
            for height in range(_HEIGHT):
                length = HASH_SIZE << height
                if end & length:
                    subtree = _parents(self._edge[level][end - length : end], height)
                    root = node_hash(subtree, root) if root else subtree
                    end -= length
        return root or EMPTY_ROOT

    def changes(self) -> list[tuple[int, int, bytes]]:
        """Return ``(level, number, hashes)`` of each tile that is new, or longer than when this was made."""
        changed = [(level, number, hashes) for (level, number), hashes in self._full.items()]
        for level, hashes in self._edge.items():
            count = self.size >> _HEIGHT * level
            if hashes and count > self._start >> _HEIGHT * level:
                changed.append((level, count // WIDTH, hashes))
        return sorted(changed)

    def settle(self) -> None:
        """Forget the tiles that are full: `changes` then returns what is new or longer from here on."""
        self._full.clear()
        self._start = self.size


def subtree_root(hashes: bytes) -> bytes:
    """Return the root of a full tile, which stands in the tile above it."""
    return _parents(hashes, _HEIGHT)


def tile_reader(fetch: TileFetcher, size: int) -> HashReader:
    """Return a reader of the tree of ``size`` leaves for the functions of `merkle`.

    ``fetch`` is called once for all tiles that a read lacks; they are kept for as long as the reader is, so one
    made for many proofs holds up to 32 bytes a leaf. Stored tiles may be of a larger tree. Reading raises `ProofError`
    for a tile that is missing or short, and for a subtree that is not complete.
    """
    kept: dict[tuple[int, int], bytes] = {}

    def read(subtrees: Sequence[tuple[int, int]]) -> list[bytes]:
        places = [_place(level, index, size) for level, index in subtrees]
        missing = list(dict.fromkeys(tile for tile, _, _ in places if tile not in kept))
        if missing:
            found = fetch(missing)
            for level, number in missing:
                width = min(WIDTH, (size >> _HEIGHT * level) - number * WIDTH)
                kept[level, number] = _cut(found.get((level, number)), Tile(level, number, width))
        return [
            _parents(kept[tile][start * HASH_SIZE : (start + (1 << height)) * HASH_SIZE], height)
            for tile, start, height in places
        ]

    return read


def _place(level: int, index: int, size: int) -> tuple[tuple[int, int], int, int]:
    """Return the tile that a subtree is computed from, its first hash there, and the levels in between."""
    if level < 0 or index < 0 or (index + 1) << level > size:
        raise ProofError(f"a tree of {size} leaves has no complete subtree {index} of level {level}")
    tile_level, height = divmod(level, _HEIGHT)
    number, start = divmod(index << height, WIDTH)
    return (tile_level, number), start, height


def _cut(hashes: bytes | None, tile: Tile) -> bytes:
    length = tile.width * HASH_SIZE
    if hashes is None:
        raise ProofError(f"the tile {tile.path} is missing")
    if len(hashes) < length or len(hashes) > _FULL or len(hashes) % HASH_SIZE:
        raise ProofError(f"the tile {tile.path} has {len(hashes)} bytes, and not {length}")
    return bytes(hashes[:length])


def _parents(hashes: bytes, height: int) -> bytes:
    """Return the nodes that are ``height`` levels above neighbouring ``hashes``, concatenated as those are."""
    hashed = sha256
    for _ in range(height):
        hashes = b"".join(
            [hashed(b"\x01" + hashes[place : place + _PAIR]).digest() for place in range(0, len(hashes), _PAIR)]
        )
    return hashes
