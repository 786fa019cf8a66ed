"""A Merkle tree as RFC 9162 section 2.1.1 defines it: slow, recursive, and with nothing of ours."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).parent / "conformance" / "tlog"


def vectors(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_text())


def hashes_of(encoded: Sequence[str] | None) -> list[bytes]:
    """The hashes of a vector, which writes no proof at all as null."""
    return [b64decode(text, validate=True) for text in encoded or ()]


def naive_root(leaf_hashes: Sequence[bytes]) -> bytes:
    if not leaf_hashes:
        return sha256(b"").digest()
    if len(leaf_hashes) == 1:
        return leaf_hashes[0]
    half = 1
    while half * 2 < len(leaf_hashes):
        half *= 2
    return sha256(b"\x01" + naive_root(leaf_hashes[:half]) + naive_root(leaf_hashes[half:])).digest()


def leaves(count: int) -> list[bytes]:
    """The hashes of ``count`` different leaves."""
    return [sha256(b"\x00event-%d" % number).digest() for number in range(count)]


def fetcher(
    tiles: Mapping[tuple[int, int], bytes], log: list[Sequence[tuple[int, int]]] | None = None
) -> Callable[[Sequence[tuple[int, int]]], dict[tuple[int, int], bytes]]:
    """Gives stored tiles as a table does: those that there are. ``log`` gets each request."""

    def fetch(wanted: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        if log is not None:
            log.append(tuple(wanted))
        return {place: tiles[place] for place in wanted if place in tiles}

    return fetch
