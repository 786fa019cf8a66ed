"""What a verification is given from outside the database: the log's keys, and checkpoints that were kept elsewhere."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tracevault.errors import ConfigError, ProofError, SealError
from tracevault.integrity.note import Note, Verifier
from tracevault.sealing.anchors import read_checkpoints
from tracevault.sealing.verify import Trust, Witnessed

_MOST_BYTES = 65_536
_SECONDS = 10.0


def trust_of(keys: Sequence[str], anchors: Sequence[str] = (), *, origin: str) -> Trust:
    """Return the trust in ``keys`` and in the checkpoints of ``origin`` that ``anchors`` hold.

    A key is a verifier key as ``tracevault keygen`` prints it; ``KEY@SIZE`` is one that was revoked: checkpoints of
    larger logs are not believed to be by its owner. An anchor is the path of an anchor file, of a file with one
    checkpoint, or of an anchor directory, or the address (https) of one that is served; ``file:`` and ``dir:``
    may stand before a path. Raises `ConfigError` for a key that is none, and `SealError` where an anchor cannot be
    read or holds no checkpoint of the log.
    """
    known, revoked = [], []
    for text in keys:
        name, at, size = text.strip().rpartition("@")
        if at and size.isdecimal():
            revoked.append((_key(name), int(size)))
        else:
            known.append(_key(text.strip()))
    return Trust(known, tuple(revoked), [found for anchor in anchors for found in _checkpoints(anchor, origin)])


def _key(text: str) -> Verifier:
    try:
        return Verifier.parse(text)
    except ProofError as error:
        raise ConfigError(f"{text[:64]!r} is no verifier key: {error}", field="keys") from None


def _checkpoints(anchor: str, origin: str) -> list[Witnessed]:
    """Return the checkpoints of ``origin`` in an anchor; others there are of no interest."""
    try:
        found = list(
            _from_url(anchor, origin) if anchor.startswith(("https://", "http://")) else _from_path(anchor, origin)
        )
    except (OSError, ProofError, ValueError) as error:
        raise SealError(f"the anchor {anchor!r} cannot be read: {error}") from None
    of_log = [one for one in found if one.note.text.partition("\n")[0] == origin]
    if not of_log:
        raise SealError(f"the anchor {anchor!r} holds no checkpoint of {origin!r}")
    return of_log


def folder_of(anchor: str, origin: str) -> Path | None:
    """Return the folder of a log in an anchor's directory; None if the anchor is no directory."""
    path = _path(anchor)
    return path / origin if path.is_dir() else None


def _path(anchor: str) -> Path:
    kind, colon, rest = anchor.partition(":")
    return Path(rest if colon and kind in ("file", "dir") else anchor).expanduser()


def _from_path(anchor: str, origin: str) -> Iterator[Witnessed]:
    path, folder = _path(anchor), folder_of(anchor, origin)
    if folder is not None:
        for file in [folder / "checkpoint", *(folder / "checkpoints").glob("*")]:
            at = datetime.fromtimestamp(file.stat().st_mtime, UTC)
            yield Witnessed(anchor, Note.parse(file.read_text(encoding="utf-8")), at)
        return
    dated = [Witnessed(anchor, note, at) for at, note in read_checkpoints(path)]
    if dated:
        yield from dated
    else:
        yield Witnessed(anchor, Note.parse(path.read_text(encoding="utf-8")))


def _from_url(anchor: str, origin: str) -> Iterator[Witnessed]:
    base = anchor.rstrip("/")
    # The log's own folder, or the anchor directory above it.
    addresses = [base] if base.endswith("/checkpoint") else [f"{base}/checkpoint", f"{base}/{origin}/checkpoint"]
    failure = ""
    for address in addresses:
        try:
            with urllib.request.urlopen(address, timeout=_SECONDS) as response:  # noqa: S310 - http or https, see above
                yield Witnessed(anchor, Note.parse(response.read(_MOST_BYTES).decode()))
                return
        except urllib.error.HTTPError as error:
            error.close()
            failure = f"{address} answers {error.code} {error.reason}"
    raise ProofError(failure)
