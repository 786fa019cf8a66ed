"""A sealed log as it stands in the database, for whoever needs its hashes: signers and anchors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

from psycopg import Connection

from tracevault.errors import SealError
from tracevault.flows.seal import HASH, read_tiles
from tracevault.integrity.merkle import consistency_proof
from tracevault.integrity.tiles import TileFetcher, tile_reader
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run

_READING = Place("reading the log")


class LogConnection:
    """One connection for the anchors' threads, made when it is first needed and after it broke."""

    def __init__(self, connect: Callable[[], Connection[Any]]) -> None:
        self._connect = connect
        self._lock = Lock()
        self._connection: Connection[Any] | None = None
        self._closed = False

    def tiles(self, tree: int) -> TileFetcher:
        """Return what reads tiles of a tree, by (level, number)."""

        def fetch(wanted: Sequence[tuple[int, int]]) -> Mapping[tuple[int, int], bytes]:
            with self._lock:
                if self._closed:
                    raise SealError("the sealer was closed")
                if self._connection is None or self._connection.closed:
                    self._connection = self._connect()
                return run(self._connection, read_tiles(tree, wanted), _READING)

        return fetch

    def close(self) -> None:
        """Let go of the connection, for good: an anchor that is still at work gets no other one."""
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class StoredLog:
    """The tree of one audit table at a size, as anchors see it (`anchors.LogView`)."""

    def __init__(self, fetch: TileFetcher, size: int) -> None:
        self._fetch = fetch
        self._size = size

    def tile(self, level: int, number: int, width: int) -> bytes:
        """Return the first ``width`` hashes of a tile, one after another."""
        return self._fetch([(level, number)]).get((level, number), b"")[: width * HASH]

    def prove(self, old: int, new: int) -> list[bytes]:
        """Return the hashes of the consistency proof between two sizes above 0."""
        return consistency_proof(old, new, tile_reader(self._fetch, self._size))
