"""The few encodings that notes, checkpoints and proofs share; each value has one spelling, and no other is read."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error

from tracevault.errors import ProofError

#: The largest size of a tree, and index: what a bigint, and Go's int64, can hold.
MAX_NUMBER = 2**63 - 1

_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
# Below U+0020, but for the newline; and halves of surrogate pairs, which are not UTF-8.
_FORBIDDEN = re.compile(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]")


def to_base64(data: bytes) -> str:
    """Return ``data`` as standard Base 64 with padding (RFC 4648, section 4)."""
    return b64encode(data).decode("ascii")


def from_base64(text: str, what: str) -> bytes:
    """Return the bytes that ``text`` stands for. Raises `ProofError` unless it is as `to_base64` writes it."""
    try:
        data = b64decode(text, validate=True)
    except (Error, ValueError):
        data = b""
    if to_base64(data) != text:
        raise ProofError(f"{what} is not in canonical base64")
    return data


def from_decimal(text: str, what: str) -> int:
    """Return the number that ``text`` has in decimal, without leading zeros, at most 2**63 - 1; or `ProofError`."""
    if not _DECIMAL.fullmatch(text) or int(text) > MAX_NUMBER:
        raise ProofError(f"{what} is no decimal number from 0 to 2**63 - 1: {text[:64]!r}")
    return int(text)


def check_text(text: str, what: str, limit: int) -> None:
    """Raise `ProofError` for more than ``limit`` bytes of UTF-8, and for control characters other than newlines."""
    if _FORBIDDEN.search(text):
        raise ProofError(f"{what} has a control character, or is not UTF-8")
    if len(text) > limit or len(text.encode()) > limit:
        raise ProofError(f"{what} has more than {limit} bytes")
