"""A log in memory, for tests: it grows, makes checkpoints, and answers what anchors ask."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Self

from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.merkle import consistency_proof, leaf_hash, node_hash, tree_root
from tracevault.integrity.note import Note, Signer

NAME = "log.example.com/shop"
ORIGIN = f"{NAME}/audit_logs"


class Log:
    """Leaves that differ by ``history`` from leaf ``fork`` on."""

    def __init__(self, size: int = 0, history: str = "", fork: int = 0, origin: str = ORIGIN) -> None:
        self.size = size
        self.history = history
        self.fork = fork
        self.origin = origin
        self._hash = cache(self._subtree)

    def grow(self, count: int = 1) -> Self:
        self.size += count
        return self

    def checkpoint(self, size: int | None = None) -> Checkpoint:
        size = self.size if size is None else size
        return Checkpoint(self.origin, size, tree_root(size, self._read))

    def note(self, signer: Signer, size: int | None = None) -> Note:
        text = str(self.checkpoint(size))
        return Note(text, [signer.renamed(self.origin).sign(text)])

    def prove(self, old: int, new: int) -> list[bytes]:
        return consistency_proof(old, new, self._read)

    def tile(self, level: int, number: int, width: int) -> bytes:
        first = number * 256
        return b"".join(self._hash(8 * level, index) for index in range(first, first + width))

    def _subtree(self, level: int, index: int) -> bytes:
        if level == 0:
            return leaf_hash(f"{index}{self.history if index >= self.fork else ''}".encode())
        return node_hash(self._hash(level - 1, 2 * index), self._hash(level - 1, 2 * index + 1))

    def _read(self, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self._hash(level, index) for level, index in wanted]
