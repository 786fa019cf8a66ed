"""What an anchor is, and what it may ask of the log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from tracevault.errors import ProofError, SealError
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.note import Note, Verifier


class LogView(Protocol):
    """The log at the size of the checkpoint that is published, or later. It is asked on the anchor's own thread."""

    def tile(self, level: int, number: int, width: int) -> bytes:
        """Return the first ``width`` hashes of a tile (C2SP tlog-tiles), 32 bytes each, one after another."""
        ...

    def prove(self, old: int, new: int) -> Sequence[bytes]:
        """Return the hashes of the consistency proof between two sizes above 0 (RFC 9162 2.1.4)."""
        ...


class Anchor(Protocol):
    """Where checkpoints go. Methods raise `SealError`, and may take as long as the other side does."""

    @property
    def sink(self) -> str:
        """What names it in receipts and in the status: its text, without passwords."""
        ...

    def publish(self, note: Note, log: LogView) -> str:
        """Keep a signed checkpoint, durably, and return the receipt. Publishing the same one again is fine."""
        ...

    def newest(self, origin: str, verifiers: Sequence[Verifier] = ()) -> Note | None:
        """Return the newest checkpoint of ``origin`` that it holds, or None if there is none or it cannot tell.

        With ``verifiers``, only one that one of them verifies.
        """
        ...


def checkpoint_of(note: Note) -> Checkpoint:
    """Return the checkpoint in a note; `SealError` if there is none."""
    try:
        return Checkpoint.parse(note.text)
    except ProofError as error:
        raise SealError(f"only checkpoints are anchored: {error}") from None


def counts(note: Note, origin: str, verifiers: Iterable[Verifier] = ()) -> Checkpoint | None:
    """Return the checkpoint in ``note`` if it is one of ``origin``, verified if there are ``verifiers``."""
    known = list(verifiers)
    try:
        checkpoint = Checkpoint.parse(note.text)
        if checkpoint.origin != origin or (known and not note.verified_by(known)):
            return None
    except ProofError:
        return None
    return checkpoint
