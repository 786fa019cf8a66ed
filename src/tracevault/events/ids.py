"""Event ids: UUID version 7 (RFC 9562), so that rows arrive in index order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from os import urandom
from struct import Struct
from time import time_ns
from uuid import UUID, SafeUUID

from tracevault.forks import fork_mark

_VERSION_AND_VARIANT = 0x7 << 76 | 0b10 << 62
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_last = 0
# Random bits in stock, with version and variant among them, since each call for some gives other threads their turn;
# and whose they are.
_BITS = Struct("512Q")
_stock: list[int] = []
_mark = fork_mark()
_new = object.__new__
_set_int, _set_is_safe = UUID.__dict__["int"].__set__, UUID.__dict__["is_safe"].__set__
_UNKNOWN = SafeUUID.unknown  # an enum looks its members up slowly


def uuid7_time(id_: UUID) -> datetime | None:
    """Return when a UUIDv7 was made, to the millisecond; None for another UUID, or a time that Python has not."""
    if id_.version != 7:
        return None
    try:
        return _EPOCH + timedelta(milliseconds=id_.int >> 80)
    except OverflowError:
        return None


def uuid7() -> UUID:
    """Return a new UUIDv7: 48 bits of Unix milliseconds, 12 bits of the next fraction, 62 random bits.

    Ids of one process rise (RFC 9562, 6.2, method 3: the fraction of the millisecond, raised by one where
    the clock did not move or went back). Two threads that race for one stamp still differ in the random
    bits; those come from the operating system, and a forked process asks for its own.
    """
    global _last, _mark  # noqa: PLW0603 - the process's clock of ids
    stamp = time_ns() * 4096 // 1_000_000  # 48 bits of milliseconds, 12 bits of the next fraction
    if stamp <= _last:
        stamp = _last + 1
    _last = stamp
    if not _mark[0]:
        _stock.clear()
        _mark = fork_mark()
    try:
        random = _stock.pop()
    except IndexError:
        first, *more = (bits >> 2 | _VERSION_AND_VARIANT for bits in _BITS.unpack(urandom(_BITS.size)))
        _stock.extend(more)
        random = first
    made = _new(UUID)
    # As its constructor does after checks that take twice the time of all the rest.
    _set_int(made, stamp >> 12 << 80 | (stamp & 0xFFF) << 64 | random)
    _set_is_safe(made, _UNKNOWN)
    return made
