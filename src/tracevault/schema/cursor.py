"""Places in the order ``(occurred_at, id)``, and the text that a reader keeps of one.

A cursor is base64url, without padding, of: version (1 byte), fingerprint of the filters (8), place of the last row
(8 and 16), place that nothing beyond is read of (the same, or absent), and a checksum (4). It says where to go on, and
nothing else: whoever changes it reads another page of what he may read anyway. The checksum finds what was mistyped.
"""

from __future__ import annotations

import binascii
import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from struct import Struct
from typing import NamedTuple
from uuid import UUID

from tracevault.errors import ValidationError
from tracevault.events import rules

_VERSION = 1
_HEAD = Struct("!B8s")
_PLACE = Struct("!q16s")
_CHECKSUM = 4
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
# The Gregorian calendar repeats itself after so many days and years.
_CYCLE_YEARS = 400
_CYCLE = timedelta(days=146_097) // timedelta(microseconds=1)
_INFINITE = {2**63 - 1: "infinity", -(2**63): "-infinity"}


class Place(NamedTuple):
    """Where a row stands. ``time`` is PostgreSQL's: microseconds since 2000, of which Python has not all."""

    time: int
    id: UUID


def timestamp(time: int) -> str:
    """Return the text of a ``timestamptz`` that PostgreSQL reads as ``time``, in any year that it knows."""
    if time in _INFINITE:
        return _INFINITE[time]
    cycles, rest = divmod(time, _CYCLE)
    moment = _EPOCH + timedelta(microseconds=rest)
    year = moment.year + cycles * _CYCLE_YEARS
    era = "" if year > 0 else " BC"
    return f"{year if year > 0 else 1 - year:04}-{moment:%m-%d %H:%M:%S.%f}+00{era}"


def write_cursor(filters: bytes, last: Place, bound: Place | None = None) -> str:
    """Return the cursor of the page after ``last``."""
    places = [last] if bound is None else [last, bound]
    content = _HEAD.pack(_VERSION, filters) + b"".join(_PLACE.pack(place.time, place.id.bytes) for place in places)
    return urlsafe_b64encode(content + _checksum(content)).rstrip(b"=").decode()


def read_cursor(text: str, filters: bytes) -> tuple[Place, Place | None]:
    """Return the place after which the page begins, and the last one to be read.

    Raises `ValidationError` for a text that `write_cursor` did not make, or made for other filters.
    """
    try:
        raw = urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except (ValueError, binascii.Error):
        raw = b""
    content, checksum = raw[:-_CHECKSUM], raw[-_CHECKSUM:]
    places = len(content) - _HEAD.size
    if places not in (_PLACE.size, 2 * _PLACE.size) or checksum != _checksum(content):
        raise ValidationError(
            f"`cursor` is not one that a page gave: it was cut or changed, got {rules.got(text)}", field="cursor"
        )
    version, made_for = _HEAD.unpack_from(content)
    if version != _VERSION:
        raise ValidationError(f"`cursor` is of version {version}, which this tracevault does not know", field="cursor")
    if made_for != filters:
        raise ValidationError(
            "`cursor` was made for other filters, or another order, table or view: pass those of its page again",
            field="cursor",
        )
    last, *bound = (Place(time, UUID(bytes=id_)) for time, id_ in _PLACE.iter_unpack(content[_HEAD.size :]))
    return last, bound[0] if bound else None


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(b"tracevault cursor\n" + content).digest()[:_CHECKSUM]
