"""Event ids: UUID version 7 (RFC 9562), so that rows arrive in index order."""

from __future__ import annotations

from os import urandom
from time import time_ns
from uuid import UUID

_VERSION_AND_VARIANT = 0x7 << 76 | 0b10 << 62
_last = 0


def uuid7() -> UUID:
    """Return a new UUIDv7: 48 bits of Unix milliseconds, 12 bits of the next fraction, 62 random bits.

    Ids of one process rise (RFC 9562, 6.2, method 3: the fraction of the millisecond, raised by one where
    the clock did not move or went back). Two threads that race for one stamp still differ in the random
    bits; those come from the operating system, so forked processes do not repeat each other's.
    """
    global _last  # noqa: PLW0603 - the process's clock of ids
    now = time_ns()
    stamp = (now // 1_000_000) << 12 | (now % 1_000_000) * 4096 // 1_000_000
    if stamp <= _last:
        stamp = _last + 1
    _last = stamp
    random = int.from_bytes(urandom(8)) >> 2
    return UUID(int=(stamp >> 12) << 80 | (stamp & 0xFFF) << 64 | _VERSION_AND_VARIANT | random)
