"""Where data keys are kept: a directory, or a function of the caller's. Never the database: backups would keep them."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tracevault.errors import ConfigError, KeyStoreError
from tracevault.events.data_key import KEY_BYTES, DataKey, KeyStore, aes_gcm

_DIGITS = 32
_KEY_ID = re.compile(rf"[0-9a-f]{{{_DIGITS}}}\.[0-9a-f]{{8}}", re.ASCII)
_SUFFIX = ".key"
_TOMBSTONES = ".destroyed"
_LOCK = "lock"
_END = b"}\n"


class DirectoryKeyStore:
    """Data keys in a directory, one file a subject, for the owner alone: mode 0700, files 0600.

    A file is named by the first 128 bits of the SHA-256 of its subject, and holds JSON: ``id``, ``subject``, ``key``
    (base64), ``created``. Several processes may use the directory at once, if it is on a disk that can lock: of two
    that make the key of one subject one makes it, and both use it.

    ``destroy`` unlinks the file, syncs the directory, and leaves the key's id in a second file, so that a key that
    comes back with a backup is not used again; later events of the subject get a new key, with another id. What the
    disk itself keeps of an unlinked file, on an SSD or in snapshots, and copies of the directory that you made, are
    beyond it: encrypt that disk, and let backups of the directory expire.

    ``create=False``: a directory that is not there is a `ConfigError`, as one that is open to others always is.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        self.path = Path(os.path.abspath(os.path.expanduser(os.fspath(path))))
        try:
            if create:
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = self.path.stat().st_mode
        except OSError as error:
            reason = f"`key_store` {str(self.path)!r} cannot be used: {error.strerror}"
            raise ConfigError(reason, field="key_store") from None
        if mode & 0o077:
            raise ConfigError(
                f"`key_store` {str(self.path)!r} is open to other users: chmod 700 {self.path}", field="key_store"
            )

    def get(self, subject: str) -> DataKey | None:
        """Return the subject's key, or None if there is none. Raises `KeyStoreError`, as the other methods do."""
        return self._read(_digest(subject))

    def find(self, key_id: str) -> DataKey | None:
        """Return the key with this id, or None if it was destroyed, or never was here."""
        if not _KEY_ID.fullmatch(key_id):
            return None
        key = self._read(key_id[:_DIGITS])
        return key if key is not None and key.id == key_id else None

    def create(self, subject: str) -> DataKey:
        """Return the subject's key, made first if there is none. A key is on the disk when this returns."""
        digest = _digest(subject)
        with self._locked():
            key = self._read(digest)
            if key is not None:
                return key
            # What is there now is cut off, and was never used; or destroyed, and came back.
            self._file(digest).unlink(missing_ok=True)
            key_id, secret = f"{digest}.{secrets.token_hex(4)}", secrets.token_bytes(KEY_BYTES)
            about = {
                "id": key_id,
                "subject": subject,
                "key": base64.b64encode(secret).decode(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            self._write(self._file(digest), json.dumps(about).encode() + b"\n", os.O_EXCL)
            return DataKey(key_id, secret)

    def destroy(self, subject: str) -> list[str]:
        """Destroy the subject's key for good, and return its id; an empty list if there is none.

        A vault that has the key in memory forgets it within 5 seconds.
        """
        digest = _digest(subject)
        with self._locked():
            try:
                about = self._parse(digest)
            except KeyStoreError:  # damaged, and perhaps not beyond reading
                about = None
            destroyed = [] if about is None or about["id"] in self._tombstones(digest) else [str(about["id"])]
            for key_id in destroyed:  # written down first: a file that is still there after a crash is dead already
                # A line of its own, also after one that a crash has cut off.
                line = f"\n{key_id} {datetime.now(UTC).isoformat(timespec='seconds')}\n".encode()
                self._write(self._file(digest, _TOMBSTONES), line, os.O_APPEND)
            self._file(digest).unlink(missing_ok=True)
            self._sync()
        return destroyed

    def _file(self, digest: str, suffix: str = _SUFFIX) -> Path:
        return self.path / (digest + suffix)

    def _read(self, digest: str) -> DataKey | None:
        with _reported(self.path):
            about = self._parse(digest)
            if about is None or about["id"] in self._tombstones(digest):
                return None
            return DataKey(about["id"], base64.b64decode(about["key"]))

    def _parse(self, digest: str) -> dict[str, Any] | None:
        """Return what a key's file says; None if there is none, or one that is not written to its end."""
        path = self._file(digest)
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        if not text.endswith(_END):
            return None
        try:
            about = json.loads(text)
            intact = (
                _digest(about["subject"]) == digest
                and _KEY_ID.fullmatch(about["id"])
                and about["id"].startswith(digest)
                and len(base64.b64decode(about["key"], validate=True)) == KEY_BYTES
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise KeyStoreError(f"the key file {str(path)!r} is damaged: put it back from a copy")
        return dict(about)

    def _tombstones(self, digest: str) -> set[str]:
        try:
            lines = self._file(digest, _TOMBSTONES).read_text().splitlines()
        except FileNotFoundError:
            return set()
        return {line.partition(" ")[0] for line in lines}

    def _write(self, path: Path, text: bytes, flags: int) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
        try:
            while text:
                text = text[os.write(descriptor, text) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._sync()

    def _sync(self) -> None:
        """Have the directory itself on the disk: which files there are."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with _reported(self.path):
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)

    def __repr__(self) -> str:
        """Show the directory."""
        return f"<DirectoryKeyStore {str(self.path)!r}>"


class FunctionKeyStore:
    """A function of the caller's as a key store: ``key_store(subject, create) -> bytes | None``.

    The subject itself is the key's id. A key that was destroyed is told from a later one by its hash.
    """

    def __init__(self, function: Callable[[str, bool], bytes | None]) -> None:
        self._function = function

    def get(self, subject: str) -> DataKey | None:
        return self._asked(subject, create=False)

    def find(self, key_id: str) -> DataKey | None:
        return self._asked(key_id, create=False)

    def create(self, subject: str) -> DataKey:
        key = self._asked(subject, create=True)
        if key is None:
            raise KeyStoreError("`key_store(subject, True)` returned None: it is to make the subject's key")
        return key

    def destroy(self, subject: str) -> list[str]:
        raise KeyStoreError("`key_store` is a function: destroy the key where it keeps it")

    def _asked(self, subject: str, *, create: bool) -> DataKey | None:
        key = self._function(subject, create)
        return None if key is None else DataKey(subject, key)


def open_key_store(given: Any, *, create: bool) -> KeyStore:
    """Return the store that the option `key_store` means; ``create``: a directory is made if it is not there."""
    aes_gcm()
    if isinstance(given, (str, os.PathLike)):
        return DirectoryKeyStore(given, create=create)
    return given if isinstance(given, KeyStore) else FunctionKeyStore(given)


def _digest(subject: str) -> str:
    return hashlib.sha256(subject.encode()).hexdigest()[:_DIGITS]


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KeyStoreError(f"the key store {str(path)!r} cannot be used: {error.strerror}") from None
