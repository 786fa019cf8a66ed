"""Signed notes: a text, and the signatures of those who vouch for it (C2SP signed-note, Go's ``sumdb/note``).

A key is a name, an algorithm and an Ed25519 key. As text, one that verifies is a ``vkey``,
``<name>+<key id>+<base64>``; one that signs is the same behind ``PRIVATE+KEY+``. Signing and verifying need the
extra ``seal``; reading and writing do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from importlib import import_module
from typing import Any, NamedTuple

from tracevault.errors import ConfigError, ProofError
from tracevault.integrity.encoding import MAX_NUMBER, check_text, from_base64, to_base64

#: Plain signatures, of a log's own key.
ED25519 = 0x01
#: Signatures with a time, of a witness (C2SP tlog-cosignature, v1).
COSIGNATURE_V1 = 0x04

#: Signatures in a note, as Go's reader allows.
MAX_SIGNATURES = 100
#: Bytes of a note, as Go's reader allows.
MAX_NOTE = 1_000_000

_PRIVATE = "PRIVATE+KEY+"
_KEY_ID_SIZE = 4
_KEY_SIZE = 32
_SIGNATURE_SIZE = 64
_TIME_SIZE = 8
_MISSING = 'Ed25519 needs the package `cryptography`: pip install "tracevault[seal]"'


class Signature(NamedTuple):
    """One signature of a note: the key's name and id (4 bytes), and what the key made of the text."""

    name: str
    key_id: bytes
    value: bytes

    def __str__(self) -> str:
        return f"— {self.name} {to_base64(self.key_id + self.value)}\n"

    @classmethod
    def parse(cls, line: str) -> Signature:
        """Return the signature of one line, without its newline. Raises `ProofError` for what is none."""
        dash, _, rest = line.partition(" ")
        name, space, encoded = rest.partition(" ")
        if dash != "—" or not space or not _is_name(name):
            raise ProofError(f"no line of a signature, which is `— name base64`: {line[:64]!r}")
        data = from_base64(encoded, f"the signature of {name[:64]}")
        if len(data) <= _KEY_ID_SIZE:
            raise ProofError(f"the signature of {name[:64]} is too short")
        return cls(name, data[:_KEY_ID_SIZE], data[_KEY_ID_SIZE:])


@dataclass(frozen=True)
class Verifier:
    """A public key, and the name it goes by. ``str()`` gives its ``vkey``. Raises `ConfigError` for a wrong one.

    A name has neither spaces nor ``+``; ``algorithm`` is `ED25519` or `COSIGNATURE_V1`; the key has 32 bytes.
    """

    name: str
    algorithm: int
    public_key: bytes

    def __post_init__(self) -> None:
        _check_key(self.name, self.algorithm, self.public_key)

    @property
    def key_id(self) -> bytes:
        """Four bytes that tell the keys of one name apart. They prove nothing."""
        return sha256(self.name.encode() + b"\n" + bytes([self.algorithm]) + self.public_key).digest()[:_KEY_ID_SIZE]

    @classmethod
    def parse(cls, vkey: str) -> Verifier:
        """Return the key of ``<name>+<key id>+<base64>``. Raises `ConfigError` where a part is wrong."""
        name, key_id, algorithm, key = _split_key(vkey, "verifier key")
        verifier = cls(name, algorithm, key)
        if verifier.key_id.hex() != key_id:
            raise ConfigError("the verifier key does not match its own key id: it was changed", field="vkey")
        return verifier

    def __str__(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{to_base64(bytes([self.algorithm]) + self.public_key)}"

    def verify(self, text: str, signature: bytes) -> bool:
        """Say whether ``signature`` (a `Signature.value`) is this key's signature of ``text``."""
        message = text.encode()
        if self.algorithm == COSIGNATURE_V1:
            if len(signature) != _TIME_SIZE + _SIGNATURE_SIZE:
                return False
            time = int.from_bytes(signature[:_TIME_SIZE])
            if time > MAX_NUMBER:
                return False
            message, signature = _cosigned(text, time), signature[_TIME_SIZE:]
        if len(signature) != _SIGNATURE_SIZE:
            return False
        invalid: type[Exception] = _library("cryptography.exceptions").InvalidSignature
        try:
            _public_key(self.public_key).verify(signature, message)
        except invalid:
            return False
        return True


@dataclass(frozen=True)
class Signer:
    """A private key: 32 bytes of seed, and the name it signs by. The seed is in no ``repr`` and in no message."""

    name: str
    seed: bytes = field(repr=False)
    algorithm: int = ED25519

    def __post_init__(self) -> None:
        _check_key(self.name, self.algorithm, self.seed)

    @classmethod
    def generate(cls, name: str, algorithm: int = ED25519) -> Signer:
        """Return a new key, from the operating system's randomness."""
        return cls(name, _ed25519().Ed25519PrivateKey.generate().private_bytes_raw(), algorithm)

    @classmethod
    def parse(cls, skey: str) -> Signer:
        """Return the key of ``PRIVATE+KEY+<name>+<key id>+<base64>``. Raises `ConfigError` where a part is wrong."""
        if not skey.startswith(_PRIVATE):
            raise ConfigError(f"a signer key begins with `{_PRIVATE}`, and this one does not", field="key")
        name, key_id, algorithm, seed = _split_key(skey.removeprefix(_PRIVATE), "signer key")
        signer = cls(name, seed, algorithm)
        if signer.verifier.key_id.hex() != key_id:
            raise ConfigError("the signer key does not match its own key id: it was changed", field="key")
        return signer

    def encode(self) -> str:
        """Return the key as `parse` reads it. It is the secret itself: for a file that nobody else can read."""
        key_id = self.verifier.key_id.hex()
        return f"{_PRIVATE}{self.name}+{key_id}+{to_base64(bytes([self.algorithm]) + self.seed)}"

    @property
    def verifier(self) -> Verifier:
        """The public half."""
        return Verifier(self.name, self.algorithm, _private_key(self.seed).public_key().public_bytes_raw())

    def renamed(self, name: str) -> Signer:
        """Return the same key under another name, which gives it another key id."""
        return Signer(name, self.seed, self.algorithm)

    def sign(self, text: str, *, time: int | None = None) -> Signature:
        """Return the signature of ``text``. A cosignature, and nothing else, has a ``time`` in seconds since 1970."""
        if (time is not None) != (self.algorithm == COSIGNATURE_V1):
            raise ConfigError("a cosignature, and nothing else, needs a time", field="time")
        key = _private_key(self.seed)
        if time is None:
            value = key.sign(text.encode())
        elif 0 <= time <= MAX_NUMBER:
            value = time.to_bytes(_TIME_SIZE) + key.sign(_cosigned(text, time))
        else:
            raise ConfigError("the time of a cosignature is from 0 to 2**63 - 1 seconds", field="time")
        return Signature(self.name, self.verifier.key_id, value)


@dataclass(frozen=True)
class Note:
    """A text that ends with a newline, and its signatures. Raises `ProofError` for one that cannot be written."""

    text: str
    signatures: Sequence[Signature] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "signatures", tuple(self.signatures))
        if not self.text.endswith("\n"):
            raise ProofError("the text of a note ends with a newline")
        if len(self.signatures) > MAX_SIGNATURES:
            raise ProofError(f"a note has at most {MAX_SIGNATURES} signatures")
        for name, key_id, value in self.signatures:
            if not _is_name(name) or len(key_id) != _KEY_ID_SIZE or not value:
                raise ProofError(f"no signature that a note can have, by {name[:64]!r}")
        check_text(self.text, "the note", MAX_NOTE)

    @classmethod
    def parse(cls, note: str) -> Note:
        """Return the parts of ``note``; none of its signatures is verified. Raises `ProofError` where it is none.

        At most 1,000,000 bytes and 100 signatures, as in Go.
        """
        check_text(note, "the note", MAX_NOTE)
        # The last blank line ends the text, which may have others.
        text, blank, lines = note.rpartition("\n\n")
        if not blank or not lines.endswith("\n"):
            raise ProofError("a note is a text, a blank line and signatures, each with a newline at its end")
        parts = lines[:-1].split("\n")
        if len(parts) > MAX_SIGNATURES:
            raise ProofError(f"a note has at most {MAX_SIGNATURES} signatures")
        return cls(text + "\n", tuple(map(Signature.parse, parts)))

    def __str__(self) -> str:
        if not self.signatures:
            raise ProofError("a note has at least one signature")
        note = f"{self.text}\n{''.join(map(str, self.signatures))}"
        check_text(note, "the note", MAX_NOTE)
        return note

    def verified_by(self, verifiers: Iterable[Verifier]) -> list[Verifier]:
        """Return those of ``verifiers`` that have signed, in the order of their signatures; others are passed over.

        Raises `ProofError` where a signature of one of them is wrong, wherever it stands, and where two of them
        share name and key id. Nobody at all is an empty list: whoever asks decides what is enough.
        """
        known: dict[tuple[str, bytes], Verifier] = {}
        for verifier in verifiers:
            if known.setdefault((verifier.name, verifier.key_id), verifier) != verifier:
                raise ProofError(f"two keys of {verifier.name} have one key id: only one can be asked for")
        signed: dict[Verifier, None] = {}
        for signature in self.signatures:
            found = known.get((signature.name, signature.key_id))
            if found is None:
                continue
            if not found.verify(self.text, signature.value):
                raise ProofError(f"the signature of {signature.name} is wrong")
            signed[found] = None
        return list(signed)

    def with_signatures(self, more: Iterable[Signature]) -> Note:
        """Return this note with ``more`` signatures; one of a key that has signed already replaces the older."""
        merged = {(signature.name, signature.key_id): signature for signature in self.signatures}
        merged.update({(signature.name, signature.key_id): signature for signature in more})
        return Note(self.text, tuple(merged.values()))


def _cosigned(text: str, time: int) -> bytes:
    return f"cosignature/v1\ntime {time}\n{text}".encode()


def _is_name(name: str) -> bool:
    if not name or "+" in name or any(character.isspace() or character < " " for character in name):
        return False
    return not re.search(r"[\ud800-\udfff]", name)


def _check_key(name: str, algorithm: int, key: bytes) -> None:
    if not _is_name(name):
        raise ConfigError(
            f"the name of a key is not empty, and has neither spaces nor `+`: {name[:64]!r}", field="name"
        )
    if algorithm not in (ED25519, COSIGNATURE_V1):
        raise ConfigError(f"keys of type {algorithm:#04x} are unknown: 0x01 and 0x04 are known", field="algorithm")
    if len(key) != _KEY_SIZE:
        raise ConfigError(f"an Ed25519 key has {_KEY_SIZE} bytes", field="key")


def _split_key(text: str, what: str) -> tuple[str, str, int, bytes]:
    """Return name, key id, algorithm and key. No message has more than the name: the rest can be a secret."""
    name, _, rest = text.partition("+")
    key_id, _, encoded = rest.partition("+")
    if not _is_name(name) or not re.fullmatch("[0-9a-f]{8}", key_id):
        raise ConfigError(f"a {what} is a name, 8 hexadecimal digits and base64, with `+` between them", field="key")
    try:
        data = from_base64(encoded, f"the {what}")
    except ProofError as error:
        raise ConfigError(str(error), field="key") from None
    if not data:
        raise ConfigError(f"the {what} ends too early", field="key")
    return name, key_id, data[0], data[1:]


def _library(module: str) -> Any:
    """Import a part of ``cryptography``, which only the extra ``seal`` brings."""
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(_MISSING, field="seal") from None


def _ed25519() -> Any:
    return _library("cryptography.hazmat.primitives.asymmetric.ed25519")


@lru_cache(maxsize=256)
def _public_key(key: bytes) -> Any:
    return _ed25519().Ed25519PublicKey.from_public_bytes(key)


def _private_key(seed: bytes) -> Any:
    return _ed25519().Ed25519PrivateKey.from_private_bytes(seed)
