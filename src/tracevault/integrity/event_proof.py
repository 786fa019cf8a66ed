"""The proof of one event in one file: what the event says, and that a signed log holds exactly that.

The file is a C2SP tlog-proof, so that tools of others read it. Its ``extra`` line is base64 of a JSON document::

    {"format": "tracevault/events/v1", "tree": "audit_logs", "event": {"id": "...", "event": "order.paid", ...}}

``event`` holds the values of `integrity.leaf.Statement`, from which the leaf is made anew: nothing else in the file
says what was sealed. Each value has one spelling, and no other is read, so that what a person sees is what was hashed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Self
from uuid import UUID

from tracevault.errors import ConfigError, ProofError
from tracevault.events.payload import iso_utc
from tracevault.events.record import PAYLOAD_SALT
from tracevault.integrity.checkpoint import Checkpoint, cosignature_time
from tracevault.integrity.leaf import FIELDS, PAYLOADS, Statement
from tracevault.integrity.merkle import leaf_hash
from tracevault.integrity.note import COSIGNATURE_V1, Note, Verifier
from tracevault.integrity.proof import TlogProof

FORMAT = "tracevault/events/v1"
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_DIGITS = re.compile("[0-9a-f]{64}")


class SignedBy(NamedTuple):
    """A key that signed a checkpoint; ``at`` is when, for the cosignature of a witness."""

    key: Verifier
    at: datetime | None


@dataclass(frozen=True)
class EventProof:
    """That a log holds an event. ``str()`` gives the file; nothing it says may be believed before `verify` returned."""

    statement: Statement
    proof: TlogProof

    @classmethod
    def make(cls, statement: Statement, index: int, hashes: Sequence[bytes], checkpoint: Note) -> Self:
        """Return the proof that leaf ``index`` of the log of ``checkpoint`` is ``statement``. Nothing is verified."""
        document = {"format": FORMAT, "tree": statement.tree, "event": statement.values}
        extra = json.dumps(document, ensure_ascii=False, indent=1).encode()
        return cls(statement, TlogProof(index, hashes, checkpoint, extra))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the proof in the text of a file, of at most 4,000,000 bytes. Raises `ProofError` where it is none.

        Nothing is verified but the form.
        """
        proof = TlogProof.parse(text)
        if proof.extra is None:
            raise ProofError("the proof has no `extra`: it does not say what the event is")
        document = _document(proof.extra)
        tree, values = document.get("tree"), document.get("event")
        if document.get("format") != FORMAT or not isinstance(tree, str) or not isinstance(values, dict):
            raise ProofError(f"the `extra` of the proof is no event of the format `{FORMAT}`")
        return cls(Statement(tree, values), proof)

    def __str__(self) -> str:
        return str(self.proof)

    @property
    def tree(self) -> str:
        """The name of the tree: that of the audit table when it was first sealed."""
        return self.statement.tree

    @property
    def index(self) -> int:
        """The place of the event in the log, counted from 0."""
        return self.proof.index

    @property
    def values(self) -> Mapping[str, Any]:
        """What the event says, as `integrity.leaf.Statement` has it."""
        return self.statement.values

    @property
    def checkpoint(self) -> Checkpoint:
        """What the log says of itself: origin, size and root. Raises `ProofError` where it is none."""
        return Checkpoint.parse(self.proof.checkpoint.text)

    def verify(self, keys: Iterable[Verifier]) -> Checkpoint:
        """Return the checkpoint that proves the event: signed by its log's key, one of ``keys``, and leading here.

        Signatures by any other of ``keys``, as those of witnesses, must be right where there are some. The origin must
        end with the tree's name, or with it and an epoch (``/2``), so that a log cannot hold the events of another.
        Raises `ProofError` for anything else, and without the package `cryptography` a `ConfigError`.
        """
        _check_spelling(self.values)
        checkpoint = self.proof.verify(leaf_hash(self.statement.leaf), keys)
        if not re.fullmatch(rf"(?s:.+)/{re.escape(self.tree)}(?:/[1-9][0-9]*)?", checkpoint.origin):
            raise ProofError(
                f"the event is one of the tree {self.tree[:64]!r}, and the log is {checkpoint.origin[:64]!r}"
            )
        return checkpoint

    def signed_by(self, keys: Iterable[Verifier]) -> list[SignedBy]:
        """Return which of ``keys`` signed the checkpoint; `ProofError` where one of their signatures is wrong."""
        note = self.proof.checkpoint
        values = {(signature.name, signature.key_id): signature for signature in note.signatures}
        found = []
        for key in note.verified_by(keys):
            at = None
            if key.algorithm == COSIGNATURE_V1:
                seconds = cosignature_time(values[key.name, key.key_id])
                try:
                    at = datetime.fromtimestamp(seconds, UTC)
                except (ValueError, OverflowError, OSError):
                    raise ProofError(f"the cosignature of {key.name} is of no year that a calendar has") from None
            found.append(SignedBy(key, at))
        return found


def verify_proof(text: str, keys: Sequence[str]) -> EventProof:
    """Verify the proof of an event, as ``tracevault prove`` writes it, and return it. It takes no database.

    ``keys`` are verifier keys: the log's own, and those of witnesses if you trust some. ``KEY@SIZE`` is one that was
    revoked: it is believed for logs of up to that size. Raises `ProofError` unless the event is proven, and
    `ConfigError` for a key that is none and where the extra ``seal`` is missing.
    """
    proof = EventProof.parse(text)
    proof.verify(trusted_keys(keys, proof.checkpoint.size))
    return proof


def trusted_keys(keys: Sequence[str], size: int) -> list[Verifier]:
    """Return the verifier keys among ``keys`` that are believed for a log of ``size``; see `verify_proof`."""
    if isinstance(keys, str) or not keys:
        raise ConfigError("to verify a proof takes a list with the log's verifier key", field="keys")
    trusted = []
    for text in keys:
        name, at, most = text.strip().rpartition("@")
        revoked = bool(at) and most.isdecimal()
        try:
            key = Verifier.parse(name if revoked else text.strip())
        except (ConfigError, ProofError) as error:
            raise ConfigError(f"{text[:64]!r} is no verifier key: {error}", field="keys") from None
        if not revoked or size <= int(most):
            trusted.append(key)
    return trusted


def _document(extra: bytes) -> dict[str, Any]:
    try:
        document = json.loads(extra.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ProofError("the `extra` of the proof is no JSON object in UTF-8, with each name once")
    return document


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers differ in which one they take
        raise ValueError
    return found


def _check_spelling(values: Mapping[str, Any]) -> None:
    """Raise `ProofError` for a value that is read as another one than it says, or that the leaf does not hold."""
    for stored in FIELDS:
        name = stored.name
        if name in values and not _is_exact(stored.column.sql_type, values[name]):
            raise ProofError(f"the event's `{name}` is not written as it would be proven")
    for name in PAYLOADS:
        committed = values.get(f"{name}_commitment", "0" * 64)
        if not isinstance(committed, str) or not _DIGITS.fullmatch(committed):
            raise ProofError(f"the event's `{name}_commitment` is not 64 hexadecimal digits")
    if PAYLOAD_SALT in values:
        salted = any(name in values for name in PAYLOADS)
        if not salted or not _is_exact("uuid", values[PAYLOAD_SALT]):
            raise ProofError(f"the event's `{PAYLOAD_SALT}` is not what a payload was sealed with")


def _is_exact(sql_type: str, value: Any) -> bool:
    try:
        if sql_type == "uuid":
            return isinstance(value, str) and str(UUID(value)) == value
        if sql_type == "timestamp with time zone":
            if isinstance(value, str):
                return iso_utc(datetime.fromisoformat(value)) == value
            return type(value) is int and not _has_a_date(value)
    except ValueError:
        return False
    return isinstance(value, str)


def _has_a_date(microseconds: int) -> bool:
    try:
        return bool(_EPOCH + timedelta(microseconds=microseconds))
    except OverflowError:
        return False
