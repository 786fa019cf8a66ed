"""What signs checkpoints, and remembers outside the database what it signed, so that it signs nothing else.

The state stands in a JSON file beside the key: for each origin and key the size and root it signed last, and when. A
new checkpoint must extend all of them, and the newest that anchors hold; a database that was restored from a backup,
or changed, cannot. Who loses the state could be made to sign another history, so a missing or a broken one stops the
sealing until an operator has looked.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tracevault.errors import ProofError, RollbackError, SealError
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.merkle import verify_consistency
from tracevault.integrity.note import Note, Signer
from tracevault.sealing import durable
from tracevault.sealing.keys import check_signers, verifiers

Prove = Callable[[int, int], Sequence[bytes]]
"""Returns the hashes of the consistency proof from an old to a new size (RFC 9162 2.1.4), both above 0."""

FORMAT = 1
LOCK_TIMEOUT = 30.0
"""Seconds that a signer waits for another one with the same state."""
_POLL = 0.01
_HASH = 32
_ADOPT = "compare the log with an anchor, then run `tracevault seal --adopt-state`"


class Signed(NamedTuple):
    """What a key signed last of one origin; ``at`` is the signer's clock."""

    size: int
    root: bytes
    at: datetime


class SigningState:
    """The state file. Safe for any number of processes and threads: whoever reads to write holds its `lock`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"SigningState({str(self.path)!r})"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the state: no other process or thread reads it to write it. `SealError` after `LOCK_TIMEOUT`."""
        # Beside the file, which is replaced at each writing. It stays, since removing it would let two hold it.
        try:
            descriptor = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._unusable("locked", error) from None
        try:
            deadline = time.monotonic() + LOCK_TIMEOUT
            while not _locked(descriptor):
                if time.monotonic() > deadline:
                    raise SealError(
                        f"the signing state {str(self.path)!r} is held by another signer for {LOCK_TIMEOUT:g} seconds"
                    )
                time.sleep(_POLL)
            yield
        finally:
            os.close(descriptor)

    def read(self) -> dict[str, dict[str, Signed]] | None:
        """Return what was signed last by origin and key id (hex); None if there is no file.

        Raises `SealError` for one that is broken, or that others may write.
        """
        try:
            with self.path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable("read", error) from None
        if mode & 0o022:
            raise SealError(
                f"others may write the signing state {str(self.path)!r} (mode {mode & 0o777:04o}): run `chmod 600` on "
                "it, after comparing it with an anchor"
            )
        try:
            return _decoded(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise SealError(
                f"the signing state {str(self.path)!r} is broken: restore it, and if you cannot, move it away, {_ADOPT}"
            ) from None

    def write(self, signed: dict[str, dict[str, Signed]]) -> None:
        """Put ``signed`` in place of the state; it is on the disk when this returns."""
        data = json.dumps({"format": FORMAT, "signed": _encoded(signed)}, indent=1).encode() + b"\n"
        try:
            durable.replace(self.path, data, 0o600)
        except OSError as error:
            raise self._unusable("written", error) from None

    def _unusable(self, what: str, error: OSError) -> SealError:
        return SealError(f"the signing state {str(self.path)!r} cannot be {what}: {error.strerror}; nothing was signed")


def state_path(key_file: Path) -> Path:
    """Return where the state of a key file stands unless another place is chosen: ``FILE.state``."""
    return key_file.with_name(key_file.name + ".state")


class CheckpointSigner:
    """Signs checkpoints that extend all that was signed before, with every key that it has."""

    def __init__(self, signers: Iterable[Signer], state: SigningState) -> None:
        """Check the keys as `check_signers` does; the state is read at each signature."""
        self.signers = check_signers(signers)
        self.state = state

    @property
    def name(self) -> str:
        """The name of the keys, which begins every origin that they may sign."""
        return self.signers[0].verifier.name

    def sign(
        self,
        checkpoint: Checkpoint | Callable[[], Checkpoint],
        prove: Prove,
        newest: Iterable[Note] = (),
        *,
        expect_state: bool = False,
    ) -> Note:
        """Return the checkpoint as a note with a signature of each key.

        Where several sealers share a state, give a function that reads the newest checkpoint: it is called when no
        other can sign, or one that was faster would look like a rollback to the slower.

        ``newest`` are notes that anchors hold; those of another origin, or that none of these keys signed, say nothing
        and are passed over. With ``expect_state``, as where the database holds checkpoints of this origin already, a
        state without the origin is refused. What is signed is in the state, on the disk, before it is returned. To
        sign the same size and root again is allowed.

        Raises `RollbackError` where the checkpoint does not extend what was signed or anchored, `SealError` where the
        state cannot be used; then nothing is signed. What ``prove`` raises passes through.
        """
        signed = self._advance(checkpoint, prove, newest, expect_state=expect_state)
        text = str(signed)
        return Note(text, [signer.renamed(signed.origin).sign(text) for signer in self.signers])

    def adopt(self, checkpoint: Checkpoint, prove: Prove | None = None, newest: Iterable[Note] = ()) -> None:
        """Begin a state that was lost with a checkpoint that an operator vouches for; nothing is signed.

        What the state and the anchors do hold of the origin is checked as by `sign`: a rollback is not undone so, for
        that a new epoch is opened.
        """
        self._advance(checkpoint, prove, newest, expect_state=False)

    def last_signed(self, origin: str) -> Signed | None:
        """Return the largest that was signed of ``origin``, by any key; None if nothing was."""
        of_origin = (self.state.read() or {}).get(origin, {})
        return max(of_origin.values(), key=lambda signed: signed.size, default=None)

    def _advance(
        self,
        given: Checkpoint | Callable[[], Checkpoint],
        prove: Prove | None,
        newest: Iterable[Note],
        *,
        expect_state: bool,
    ) -> Checkpoint:
        # Before the checkpoint is read, which another sealer may move on in the meantime.
        held = list(newest)
        with self.state.lock():
            checkpoint = given if isinstance(given, Checkpoint) else given()
            origin = checkpoint.origin
            if not origin.startswith(self.name + "/"):
                raise SealError(f"the key {self.name!r} signs for origins that begin with it, not for {origin!r}")
            state = self.state.read()
            before = (state or {}).get(origin, {})
            if expect_state and not before:
                raise SealError(
                    f"the signing state {str(self.state.path)!r} "
                    f"{'is missing' if state is None else f'knows nothing of {origin!r}'}, though the database holds "
                    f"signed checkpoints: restore it, and if you cannot, {_ADOPT}"
                )
            points = {(old.size, old.root): "an anchor holds" for old in self._trusted(held, origin)}
            points |= {(old.size, old.root): "this key has signed" for old in before.values()}
            for (size, root), who in points.items():
                _check_extends(checkpoint, size, root, who, prove)
            now = Signed(checkpoint.size, checkpoint.root, datetime.now(UTC).replace(microsecond=0))
            # Keys that sign no more are left out: what they signed is the beginning of this.
            keys = (signer.renamed(origin).verifier.key_id.hex() for signer in self.signers)
            self.state.write({**(state or {}), origin: dict.fromkeys(keys, now)})
            return checkpoint

    def _trusted(self, notes: Iterable[Note], origin: str) -> Iterator[Checkpoint]:
        known = verifiers(self.signers, origin)
        for note in notes:
            # A note that somebody else put there must not stop the log.
            with contextlib.suppress(ProofError):
                if note.verified_by(known):
                    checkpoint = Checkpoint.parse(note.text)
                    if checkpoint.origin == origin:
                        yield checkpoint


def _check_extends(new: Checkpoint, size: int, root: bytes, who: str, prove: Prove | None) -> None:
    """Raise `RollbackError` unless the log of ``new`` has that of ``size`` and ``root`` as its beginning."""
    told = f"ROLLBACK DETECTED in {new.origin!r}: {who} size {size:,}"
    advice = "nothing was signed. Repair the database, or open a new epoch"
    if new.size < size:
        raise RollbackError(f"{told}, and the log has size {new.size:,}; {advice}")
    if new.size == size:
        if new.root != root:
            raise RollbackError(f"{told}, and the log of the same size has another root; {advice}")
        return
    if size == 0:
        return
    if prove is None:
        raise SealError(f"whether size {new.size:,} of {new.origin!r} extends size {size:,} takes a proof")
    try:
        verify_consistency(size, new.size, root, new.root, list(prove(size, new.size)))
    except ProofError:
        raise RollbackError(
            f"{told}, and the log of size {new.size:,} does not begin with what was signed then; {advice}"
        ) from None


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _encoded(signed: dict[str, dict[str, Signed]]) -> dict[str, Any]:
    return {
        origin: {
            key: {"size": one.size, "root": base64.b64encode(one.root).decode(), "at": one.at.isoformat()}
            for key, one in of_origin.items()
        }
        for origin, of_origin in signed.items()
    }


def _decoded(document: Any) -> dict[str, dict[str, Signed]]:
    if document["format"] != FORMAT:
        raise ValueError("a state of another version")
    return {
        origin: {key: _one(entry) for key, entry in of_origin.items()}
        for origin, of_origin in document["signed"].items()
    }


def _one(entry: Any) -> Signed:
    size, root, at = entry["size"], base64.b64decode(entry["root"], validate=True), datetime.fromisoformat(entry["at"])
    if type(size) is not int or size < 0 or len(root) != _HASH or at.tzinfo is None:
        raise ValueError("no size, root and time")
    return Signed(size, root, at)
