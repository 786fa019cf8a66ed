"""The zip of a run's checkpoint and tiles, which show that its rows are those of the log.

Names are those of C2SP tlog-tiles: ``checkpoint``, ``tile/0/x001/067``. Of the lowest level there are the tiles of the
rows alone, of those above all: so the root can be made of them, whatever else the log holds.
"""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

from tracevault.errors import ArchiveError, ProofError
from tracevault.integrity.tiles import WIDTH, Growth, Tile, right_edge, subtree_root

_HASH = 32
_KEPT = 256
_AT_ONCE = 64
_BORN = (1980, 1, 1, 0, 0, 0)

Fetch = Callable[[list[tuple[int, int]]], Mapping[tuple[int, int], bytes]]


def tiles_for(size: int, leaves: Iterable[tuple[int, int]]) -> Iterator[Tile]:
    """Yield the tiles that a proof of some leaves has, of a tree of ``size`` leaves."""
    last = -1
    for first, end in sorted(leaves):
        for number in range(max(first // WIDTH, last + 1), -(-end // WIDTH)):
            last = number
            yield Tile(0, number, min(WIDTH, size - number * WIDTH))
    if size % WIDTH and last != size // WIDTH:
        yield Tile(0, size // WIDTH, size % WIDTH)
    level, count = 1, size // WIDTH
    while count:
        for number in range(-(-count // WIDTH)):
            yield Tile(level, number, min(WIDTH, count - number * WIDTH))
        level, count = level + 1, count // WIDTH


def write_proof(file: Any, note: str, tiles: Iterable[Tile], fetch: Fetch) -> None:
    """Write the zip; ``fetch`` returns tiles by level and number. Raises `ArchiveError` where one is missing."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as made:
        made.writestr(zipfile.ZipInfo("checkpoint", _BORN), note.encode())
        waiting: list[Tile] = []
        for tile in tiles:
            waiting.append(tile)
            if len(waiting) == _AT_ONCE:
                _write(made, waiting, fetch)
                waiting = []
        _write(made, waiting, fetch)


def _write(made: zipfile.ZipFile, tiles: list[Tile], fetch: Fetch) -> None:
    found = fetch([(tile.level, tile.number) for tile in tiles]) if tiles else {}
    for tile in tiles:
        hashes = found.get((tile.level, tile.number), b"")[: tile.width * _HASH]
        if len(hashes) < tile.width * _HASH:
            raise ArchiveError(f"the database lacks {tile.path} of the log, without which nothing can be proven")
        made.writestr(zipfile.ZipInfo(tile.path, _BORN), hashes)


class TileArchive:
    """The tiles of a zip, for a tree of ``size`` leaves. Nothing of it is believed before `root` was compared."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._size = size
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        try:
            self._zip = zipfile.ZipFile(file)
            self._names = set(self._zip.namelist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise ProofError(f"the zip of tiles cannot be read: {error}") from None

    @property
    def note(self) -> str:
        """The checkpoint's note."""
        try:
            return self._zip.read("checkpoint").decode()
        except (KeyError, ValueError, zipfile.BadZipFile, NotImplementedError):
            raise ProofError("the zip of tiles has no checkpoint") from None

    def root(self) -> bytes:
        """Return the root of the tree. Every tile that is there was found to lie below it, or `ProofError`."""
        for tile in tiles_for(self._size, ()):
            if tile.level:
                self._compare_below(tile, self._read(tile))
        edge = {tile.level: self._read(tile) for tile in right_edge(self._size)}
        return Growth(self._size, edge).root

    def _compare_below(self, tile: Tile, hashes: bytes) -> None:
        for place in range(tile.width):
            below = Tile(tile.level - 1, tile.number * WIDTH + place, WIDTH)
            if below.level == 0 and below.path not in self._names:
                continue
            if subtree_root(self._read(below)) != hashes[place * _HASH : (place + 1) * _HASH]:
                raise ProofError(f"{below.path} is not what the tile above it says")

    def hash(self, index: int) -> bytes | None:
        """Return the hash of a leaf, if it is there."""
        number, place = divmod(index, WIDTH)
        tile = Tile(0, number, min(WIDTH, self._size - number * WIDTH)) if index < self._size else None
        if tile is None or tile.path not in self._names:
            return None
        if number in self._kept:
            self._kept.move_to_end(number)
        else:
            self._kept[number] = self._read(tile)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[number][place * _HASH : (place + 1) * _HASH]

    def _read(self, tile: Tile) -> bytes:
        try:
            # Before it is read: it may say that it is of any size.
            if self._zip.getinfo(tile.path).file_size != tile.width * _HASH:
                raise ProofError(f"{tile.path} in the zip of tiles is not of {tile.width} hashes")
            return self._zip.read(tile.path)
        except KeyError:
            raise ProofError(f"the zip of tiles lacks {tile.path}") from None
        except (ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            raise ProofError(f"{tile.path} in the zip of tiles cannot be read: {error}") from None
