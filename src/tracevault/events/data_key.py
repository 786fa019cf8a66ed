"""Data keys: what encrypts the values of one subject, and where such keys come from.

What is stored in place of a value is an *envelope*::

    {"$enc": {"key": <id of the key>, "hash": <hex SHA-256 of the key>, "nonce": <base64>, "ciphertext": <base64>}}

AES-256-GCM (NIST SP 800-38D) of the value's JSON text, in the canonical form of `payload.jsonb_text`. The associated
data are the event's id and the value's path, so that an envelope proves nothing when it is moved to another event or
place.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable
from uuid import UUID

from tracevault.errors import ConfigError, KeyStoreError, TracevaultError
from tracevault.events.payload import has_surrogate
from tracevault.events.rules import got

T = TypeVar("T")
Path = tuple[str | int, ...]

ENVELOPE = "$enc"
KEY_BYTES = 32
# Seconds after which a vault asks its key store again, so that it lets go of a key that was destroyed.
EXPIRY = 5.0

_PARTS = frozenset({"key", "hash", "nonce", "ciphertext"})
_NONCE_BYTES = 12
_MOST_KEYS = 10_000


class DataKey:
    """A key of 32 random bytes, by its id. One that is destroyed and made anew has another id.

    The nonce is not random but the first 96 bits of HMAC-SHA-256 over event id, path and text, by a key that is
    derived from this one. So an event that is emitted again with the same content has the same ciphertext, and is
    found to be the same. Why that is safe: HMAC-SHA-256 is a pseudorandom function, so to all others these nonces are
    as good as random ones, and GCM allows 2**32 random nonces under one key (SP 800-38D, 8.3); a key belongs to one
    subject. Two texts, two paths or two events share a nonce no more often than chance has it. The same nonce is
    meant to come back only with the same text and the same associated data, whose ciphertext is then the same too:
    it says that this value of this event was encrypted twice, and nothing else. That is the construction of synthetic
    nonces (SIV, RFC 5297; RFC 8452), with GCM's own tag on top.
    """

    __slots__ = ("_aead", "_head", "_key", "_nonce_key", "hash", "id")

    def __init__(self, id: str, key: bytes) -> None:  # noqa: A002
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            shown = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
            raise KeyStoreError(f"a data key must have {KEY_BYTES} bytes, got {shown}")
        if not isinstance(id, str) or not id or "\0" in id or has_surrogate(id):
            raise KeyStoreError("the id of a data key must be text that PostgreSQL can store")
        self.id = id
        self.hash = hashlib.sha256(key).hexdigest()
        self._head = f'{{"{ENVELOPE}": {{"key": {json.dumps(id)}, "hash": "{self.hash}", "nonce": "'
        self._key = key
        self._aead = aes_gcm()(key)
        self._nonce_key = hmac.digest(key, b"tracevault/enc/nonce/v1", "sha256")

    def seal(self, text: str, place: bytes) -> str:
        """Return the envelope, as JSON text, of a value whose canonical JSON text is ``text``."""
        plain = text.encode()
        # The length keeps place and text apart.
        message = len(place).to_bytes(8) + place + plain
        nonce = hmac.digest(self._nonce_key, message, "sha256")[:_NONCE_BYTES]
        ciphertext = self._aead.encrypt(nonce, plain, place)
        return f'{self._head}{_base64(nonce)}", "ciphertext": "{_base64(ciphertext)}"}}}}'

    def open(self, envelope: dict[str, str], place: bytes) -> str | None:
        """Return the JSON text in ``envelope``; None if it does not authenticate at this place by this key."""
        try:
            nonce = base64.b64decode(envelope["nonce"], validate=True)
            ciphertext = base64.b64decode(envelope["ciphertext"], validate=True)
            plain: bytes = self._aead.decrypt(nonce, ciphertext, place)
        except (binascii.Error, ValueError):
            return None
        except Exception as error:
            if type(error).__name__ == "InvalidTag":  # of an optional package
                return None
            raise
        return plain.decode()

    def export(self) -> bytes:
        """Return the key itself, for whoever keeps it."""
        return self._key

    def __repr__(self) -> str:
        """Show which key it is, and not the key."""
        return f"<DataKey {self.id}>"


@runtime_checkable
class KeyStore(Protocol):
    """Where the data keys are. `DirectoryKeyStore` is one; a function can stand for one: see the option `key_store`.

    A subject is text: ``user/42``. Methods may be called from any thread, and raise `KeyStoreError` where the store
    cannot be used.
    """

    def get(self, subject: str) -> DataKey | None:
        """Return the subject's key, or None if there is none."""

    def create(self, subject: str) -> DataKey:
        """Return the subject's key, making it first if there is none. Of several at once one makes it."""

    def find(self, key_id: str) -> DataKey | None:
        """Return the key with this id, or None if it was destroyed, or never was here."""

    def destroy(self, subject: str) -> list[str]:
        """Destroy the subject's key for good, and return the ids of the keys destroyed."""


class KeyCache:
    """A key store as a vault uses it: what it answers is remembered, for `EXPIRY` seconds at most."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        # Replaced as a whole, and without a lock, which a fork could inherit locked for ever.
        self._known: dict[tuple[str, str], DataKey | None] = {}
        self._until = 0.0

    def has(self, subject: str) -> bool:
        """Whether the subject's key is at hand, so that `for_subject` asks nobody."""
        return ("subject", subject) in self._fresh()

    def for_subject(self, subject: str) -> DataKey:
        """Return the subject's key, made now if there is none."""
        place = ("subject", subject)
        key = self._fresh().get(place)
        if key is None:
            key = _asked(lambda: self._store.get(subject) or self._store.create(subject))
            if not isinstance(key, DataKey):
                raise KeyStoreError(f"the key store made no key, it returned {got(key)}")
            self._fresh()[place] = key
        return key

    def find(self, key_id: str) -> DataKey | None:
        """Return the key with this id, or None if there is no such key (any more)."""
        place = ("id", key_id)
        known = self._fresh()
        if place not in known:
            known[place] = _asked(lambda: self._store.find(key_id))
        return known[place]

    def _fresh(self) -> dict[tuple[str, str], DataKey | None]:
        now = time.monotonic()
        if now >= self._until or len(self._known) >= _MOST_KEYS:
            self._known = {}
            self._until = now + EXPIRY
        return self._known


def _asked(ask: Callable[[], T]) -> T:
    try:
        return ask()
    except TracevaultError:
        raise
    except Exception as error:
        raise KeyStoreError(f"the key store failed with {type(error).__name__}") from error


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def place_of(id_: UUID, path: Path) -> bytes:
    """Return the associated data of a value: of which event, and where in it, ``("data", "items", 0, "name")``."""
    return b"tracevault/enc/v1\n" + id_.bytes + json.dumps(path, separators=(",", ":")).encode()


def is_envelope(value: Any) -> bool:
    """Whether a decoded value has the shape of an envelope."""
    if type(value) is not dict or len(value) != 1:
        return False
    parts = value.get(ENVELOPE)
    return type(parts) is dict and parts.keys() == _PARTS and all(type(part) is str for part in parts.values())


def subject_of(type_: str, id_: str) -> str:
    """Return the subject that a target or an actor is: ``user/42``. A ``/`` in the type is written ``%2F``."""
    return type_.replace("%", "%25").replace("/", "%2F") + "/" + id_


def aes_gcm() -> Any:
    """Return the class of AES-GCM ciphers; `ConfigError` where the extra is not installed."""
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ConfigError(
            '`encrypt_fields` and `key_store` need the package cryptography: pip install "tracevault[seal]"',
            field="key_store",
        ) from error
    return AESGCM
