"""What a vault has done and has to do, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from threading import RLock


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counters of one vault in one process since it started, and what waits now, or did when it was closed.

    Always: emitted + adopted = delivered + dead + dropped + spooled + queued + in_flight + refused + raised +
    unknown, but for what moves from one to the next while they are read.
    """

    emitted: int = 0
    """Events that passed validation."""
    adopted: int = 0
    """Records found in spool files that other processes left."""
    delivered: int = 0
    """Confirmed by PostgreSQL, or in a caller's transaction."""
    dead: int = 0
    """Async records given up: dead letters in the spool, or unreadable there; without one, each was given to
    ``on_error``."""
    dropped: int = 0
    """Async events lost because the queue was full, as ``on_full="drop_newest"`` asked."""
    spooled: int = 0
    """Records that wait in the spool, those that are in memory as well included."""
    queued: int = 0
    """Async records that wait in memory alone."""
    in_flight: int = 0
    """Emits that wait for PostgreSQL's answer, and async records without a spool that are being written."""
    refused: int = 0
    """Async events refused with `QueueFullError` or `SpoolError`."""
    raised: int = 0
    """Sync events for which `DriverError` or `DuplicateIdError` was raised: not written."""
    unknown: int = 0
    """Sync events for which `OutcomeUnknownError` was raised: perhaps written."""
    replayed: int = 0
    """Records sent again after an attempt of unknown outcome, by this process or another."""
    found: int = 0
    """Those of them that were stored already."""
    transient: int = 0
    """Failed attempts that were, or will be, repeated."""
    poison: int = 0
    """Records that the database refused for what they are."""
    batches: int = 0
    """Statements by which background writers stored records."""
    batch_rows: int = 0
    """Records stored by them."""
    write_seconds: float = 0.0
    """Time they took."""
    fsync_seconds: float = 0.0
    """Time that syncing the spool took."""
    spool_bytes: int = 0
    """Size of the spool's files that this process holds."""
    oldest_seconds: float = 0.0
    """How long ago the oldest record that waits occurred; 0 once the vault is closed."""
    writers: int = 0
    """Background writers that run."""
    lanes: Mapping[str, str] = field(default_factory=dict)
    """By scope: ``ok``; ``waiting`` for the database to come back; ``paused`` until somebody mends something."""


class Counters:
    """The counters behind `Stats`. Reentrant, since a signal handler may emit."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._counts: dict[str, float] = {option.name: 0 for option in fields(Stats) if option.default == 0}

    def add(self, **changes: float) -> None:
        """Add to counters."""
        with self._lock:
            for name, change in changes.items():
                self._counts[name] += change

    def add_emitted(self) -> None:
        """Count one event, quickly."""
        with self._lock:
            self._counts["emitted"] += 1

    def add_flying(self) -> None:
        """Count one sync event that is to be stored, quickly."""
        counts = self._counts
        with self._lock:
            counts["emitted"] += 1
            counts["in_flight"] += 1

    def add_landed(self) -> None:
        """Count one sync event that was stored, quickly."""
        counts = self._counts
        with self._lock:
            counts["in_flight"] -= 1
            counts["delivered"] += 1

    def count(self, name: str) -> int:
        """Return one counter."""
        return int(self._counts[name])

    def snapshot(self) -> dict[str, float]:
        """Return all counters at one moment."""
        with self._lock:
            return dict(self._counts)
