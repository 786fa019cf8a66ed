"""Signing keys: made, kept in a file that nobody else reads, or given by the environment.

A key file holds one key a line, as ``PRIVATE+KEY+<name>+<hash>+<key>``, the form of Go's ``sumdb/note``; blank lines
and those that begin with ``#`` are passed over. More than one key is for rotation: all of them sign, until those who
verify know the new one and the old one's line goes. All have one name, from which the origin of each log derives:
``<key name>/<tree name>``. No message quotes a line, and a `Signer` shows no secret in its repr.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from tracevault.config import SIGNING_KEY, signing_key
from tracevault.errors import ConfigError
from tracevault.integrity.note import ED25519, Signer, Verifier
from tracevault.sealing import durable

MAX_NAME = 200
_MAX_FILE = 65_536
_HOW_TO_MAKE = "`tracevault keygen NAME -o FILE` makes one"
_DOMAIN = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)+", re.IGNORECASE | re.ASCII)


def check_key_name(name: object) -> str:
    """Return ``name`` if it can name a key: ``log.example.com/shop``, 1 to 200 characters.

    It becomes the beginning of the log's origin, and a key's name in signed notes, which hold no whitespace and no
    ``+`` (C2SP signed-note). It is a path as well, so no part of it is empty, ``.`` or ``..``.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(
            "a key needs a name: a domain of yours and the deployment, `log.example.com/shop`", field="name"
        )
    if len(name) > MAX_NAME:
        raise ConfigError(f"the key's name must have at most {MAX_NAME} characters, got {len(name)}", field="name")
    shown = ascii(name if len(name) <= 64 else name[:63] + "…") if not name.isprintable() else repr(name[:64])
    if not name.isprintable() or "+" in name or any(map(str.isspace, name)):
        raise ConfigError(
            f"the key's name must hold no whitespace, no `+` and only what prints, got {shown}", field="name"
        )
    if "://" in name:
        raise ConfigError(
            f"the key's name is a URL without its scheme: `log.example.com/shop`, got {shown}", field="name"
        )
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ConfigError(
            f"the key's name must not begin or end with `/`, nor hold `//` or parts of dots alone, got {shown}",
            field="name",
        )
    return str.__str__(name)


def name_advice(name: str) -> str | None:
    """Return what to say about a name that is allowed but not wise, or None."""
    domain, _, deployment = name.partition("/")
    if not _DOMAIN.fullmatch(domain):
        return f"{domain!r} is no domain: begin the name with one of yours, so that no other log has the same name"
    if not deployment:
        return "name the deployment after the domain, as in `log.example.com/shop`: another one needs another key"
    return None


def generate(name: str) -> Signer:
    """Return a new Ed25519 key; its name is checked by `check_key_name`."""
    return Signer.generate(check_key_name(name))


def write_key(path: Path, signer: Signer) -> None:
    """Write a key to a new file with mode 0600. A file that exists is never touched: `ConfigError`."""
    try:
        durable.create(path, f"{signer.encode()}\n".encode(), 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{str(path)!r} exists already, and a key file is never overwritten: choose another name", field="key"
        ) from None
    except OSError as error:
        raise ConfigError(f"the key file {str(path)!r} cannot be made: {error.strerror}", field="key") from None


def read_keys(path: Path) -> list[Signer]:
    """Return the keys of a file; `ConfigError` if others can read it, or anybody else but root owns it."""
    return _parse(_read(path), f"the key file {str(path)!r}")


def environment_keys() -> list[Signer]:
    """Return the keys in ``TRACEVAULT_SIGNING_KEY``, one a line as in a key file; none if it is unset or blank."""
    text = signing_key()
    return [] if text is None else _parse(text, SIGNING_KEY)


def check_signers(signers: Iterable[Signer]) -> list[Signer]:
    """Return the keys of one sealer, in order, if they can sign together: of one name, and none twice."""
    found = list(signers)
    if not found:
        raise ConfigError(f"there is no signing key; {_HOW_TO_MAKE}, or set {SIGNING_KEY}", field="key")
    names = sorted({signer.verifier.name for signer in found})
    if len(names) > 1:
        raise ConfigError(
            f"keys that sign together have one name, got {', '.join(map(repr, names))}: "
            "make the new key with the name of the old one",
            field="key",
        )
    if len({signer.verifier.key_id for signer in found}) < len(found):
        raise ConfigError("the same signing key is given twice", field="key")
    return found


def verifiers(signers: Sequence[Signer], origin: str) -> list[Verifier]:
    """Return what verifies checkpoints of ``origin`` that these keys sign."""
    return [signer.renamed(origin).verifier for signer in signers]


def _parse(text: str, where: str) -> list[Signer]:
    signers = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            signer = Signer.parse(line.strip())
        except ConfigError as error:
            if error.field == "seal":  # it is the library that is missing
                raise
            # Without the cause: nothing of the line may come to light.
            raise ConfigError(f"line {number} of {where} is no signing key; {_HOW_TO_MAKE}", field="key") from None
        if signer.verifier.algorithm != ED25519:
            raise ConfigError(f"line {number} of {where} is no Ed25519 key for notes; {_HOW_TO_MAKE}", field="key")
        check_key_name(signer.verifier.name)
        signers.append(signer)
    if not signers:
        raise ConfigError(f"{where} holds no signing key; {_HOW_TO_MAKE}", field="key")
    return check_signers(signers)


def _read(path: Path) -> str:
    try:
        # A FIFO is refused below; opening one must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = f"; {_HOW_TO_MAKE}" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"the key file {str(path)!r} cannot be read: {error.strerror}{hint}", field="key") from None
    try:
        # Of the open file: what the path means may have changed.
        _check_access(path, os.fstat(descriptor))
        data = os.read(descriptor, _MAX_FILE + 1)
    finally:
        os.close(descriptor)
    try:
        if len(data) > _MAX_FILE:
            raise ValueError
        return data.decode()
    except ValueError:
        raise ConfigError(f"{str(path)!r} is no key file; {_HOW_TO_MAKE}", field="key") from None


def _check_access(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"the key file {str(path)!r} is no regular file", field="key")
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"the key file {str(path)!r} belongs to {_user(status.st_uid)}, who could put another key there: "
            f"it must belong to {_user(os.geteuid())} or root",
            field="key",
        )
    if status.st_mode & 0o077:
        raise ConfigError(
            f"the key file {str(path)!r} is open to others (mode {stat.S_IMODE(status.st_mode):04o}): "
            f"run `chmod 600 {shlex.quote(str(path))}`; if they could read it, make a new key",
            field="key",
        )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
