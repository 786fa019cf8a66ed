"""Checkpoints: what a log says of itself, as the text of a note (C2SP tlog-checkpoint and tlog-cosignature)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracevault.errors import ProofError
from tracevault.integrity.encoding import MAX_NUMBER, check_text, from_base64, from_decimal, to_base64
from tracevault.integrity.merkle import EMPTY_ROOT, HASH_SIZE
from tracevault.integrity.note import MAX_NOTE, Signature

_COSIGNATURE_SIZE = 8 + 64


@dataclass(frozen=True)
class Checkpoint:
    """A tree of ``size`` leaves with ``root``, in the log called ``origin``. ``str()`` gives the text of its note.

    Size from 0 to 2**63 - 1, a root of 32 bytes, and lines of extension that nobody has to understand. Raises
    `ProofError` for one that cannot be written, and for an empty tree with another root than that of RFC 9162.
    """

    origin: str
    size: int
    root: bytes
    extension: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "extension", tuple(self.extension))
        for line in (self.origin, *self.extension):
            check_text(line, "the checkpoint", MAX_NOTE)
            if not line or "\n" in line:
                raise ProofError("the origin and each line of extension are one line, and not empty")
        if not 0 <= self.size <= MAX_NUMBER:
            raise ProofError("the size of a tree is from 0 to 2**63 - 1")
        if len(self.root) != HASH_SIZE:
            raise ProofError(f"a root has {HASH_SIZE} bytes")
        if not self.size and self.root != EMPTY_ROOT:
            raise ProofError("the root of an empty tree is the hash of nothing")

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Return the checkpoint in the text of a note. Raises `ProofError` where it is none. Nothing is verified."""
        lines = text.split("\n")
        if len(lines) < 4 or lines.pop():
            raise ProofError("a checkpoint has at least three lines: origin, size and root")
        origin, size, root, *extension = lines
        return cls(
            origin,
            from_decimal(size, "the size of the checkpoint"),
            from_base64(root, "the root of the checkpoint"),
            tuple(extension),
        )

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in (self.origin, self.size, to_base64(self.root), *self.extension))


def cosignature_time(signature: Signature) -> int:
    """Return when a witness cosigned, in seconds since 1970. The key must have been verified before."""
    if len(signature.value) != _COSIGNATURE_SIZE:
        raise ProofError(f"the signature of {signature.name} is no cosignature: it has no time")
    time = int.from_bytes(signature.value[:8])
    if time > MAX_NUMBER:
        raise ProofError(f"the cosignature of {signature.name} has a time beyond 2**63 - 1")
    return time
