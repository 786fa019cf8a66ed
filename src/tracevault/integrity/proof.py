"""A proof in one file that a leaf is in a log: index, Merkle proof and checkpoint (C2SP tlog-proof)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tracevault.errors import ProofError
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.encoding import MAX_NUMBER, check_text, from_base64, from_decimal, to_base64
from tracevault.integrity.merkle import HASH_SIZE, verify_inclusion
from tracevault.integrity.note import ED25519, MAX_NOTE, Note, Verifier

_HEADER = "c2sp.org/tlog-proof@v1"
# A tree of at most 2**63 - 1 leaves has no leaf further from its root.
_MAX_HASHES = 63
# Bytes of a proof: the checkpoint's note, as much again, and an event of a megabyte as base64.
_MAX_PROOF = 4 * MAX_NOTE


@dataclass(frozen=True)
class TlogProof:
    """That leaf ``index`` is in the tree of ``checkpoint``, by ``hashes`` from its sibling upwards.

    ``extra`` is for whoever reads the proof, and nothing vouches for it. ``str()`` gives the file, whose name ends
    with ``.tlog-proof``. Raises `ProofError` for one that cannot be written.
    """

    index: int
    hashes: Sequence[bytes]
    checkpoint: Note
    extra: bytes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "hashes", tuple(self.hashes))
        if not 0 <= self.index <= MAX_NUMBER:
            raise ProofError("the index of a leaf is from 0 to 2**63 - 1")
        if len(self.hashes) > _MAX_HASHES:
            raise ProofError(f"an inclusion proof has at most {_MAX_HASHES} hashes")
        if any(len(value) != HASH_SIZE for value in self.hashes):
            raise ProofError(f"a hash of the proof is not of {HASH_SIZE} bytes")
        if self.extra == b"":
            raise ProofError("the extra data is empty: leave it out")
        Checkpoint.parse(self.checkpoint.text)

    @classmethod
    def parse(cls, proof: str) -> TlogProof:
        """Return the parts of ``proof``, at most 4,000,000 bytes. Raises `ProofError` where it is none.

        Nothing is verified but the form.
        """
        check_text(proof, "the proof", _MAX_PROOF)
        head, blank, note = proof.partition("\n\n")
        lines = head.split("\n")
        if not blank or lines.pop(0) != _HEADER:
            raise ProofError(f"a proof begins with `{_HEADER}`, and has a checkpoint after a blank line")
        extra = None
        if lines and lines[0].startswith("extra "):
            extra = from_base64(lines.pop(0).removeprefix("extra "), "the extra data of the proof")
        if not lines or not lines[0].startswith("index "):
            raise ProofError("the proof has no line `index`")
        index = from_decimal(lines.pop(0).removeprefix("index "), "the index of the proof")
        hashes = tuple(from_base64(line, "a hash of the proof") for line in lines)
        return cls(index, hashes, Note.parse(note), extra)

    def __str__(self) -> str:
        lines = [_HEADER]
        if self.extra is not None:
            lines.append(f"extra {to_base64(self.extra)}")
        lines += [f"index {self.index}", *map(to_base64, self.hashes), "", str(self.checkpoint)]
        proof = "\n".join(lines)
        check_text(proof, "the proof", _MAX_PROOF)
        return proof

    def verify(self, leaf_hash: bytes, verifiers: Iterable[Verifier]) -> Checkpoint:
        """Return the checkpoint, where the leaf with ``leaf_hash`` is in its tree and the log itself signed it.

        The log itself is a key of ``verifiers`` whose name is the checkpoint's origin; cosignatures of witnesses
        must be right where they are by one of ``verifiers``, and are not enough alone. Raises `ProofError`.
        """
        signed = self.checkpoint.verified_by(verifiers)
        checkpoint = Checkpoint.parse(self.checkpoint.text)
        if not any(key.algorithm == ED25519 and key.name == checkpoint.origin for key in signed):
            raise ProofError(f"the checkpoint is not signed by a known key of its log, {checkpoint.origin[:64]}")
        verify_inclusion(self.index, checkpoint.size, leaf_hash, self.hashes, checkpoint.root)
        return checkpoint
