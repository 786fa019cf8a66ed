"""How far a replica is behind its primary."""

from __future__ import annotations

from typing import NamedTuple

from tracevault.flows import Flow, Query


class Behind(NamedTuple):
    """Where a server stands. ``seconds`` is the age of the last transaction that it replayed; None if it has none."""

    replica: bool
    seconds: float | None
    lsn: str | None

    def within(self, seconds: float) -> bool:
        """Whether it is certainly no more than ``seconds`` behind; an idle primary's replica may be, and not show."""
        return not self.replica or (self.seconds is not None and self.seconds <= seconds)


def behind() -> Flow[Behind]:
    """Return where a server stands."""
    found = yield Query(
        "SELECT pg_is_in_recovery(), "
        "extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8, "
        "pg_last_wal_replay_lsn()::text"
    )
    return Behind(*found.rows[0])


def has_more(lsn: str) -> Flow[bool]:
    """Whether a primary has written more than what a replica has replayed."""
    found = yield Query(
        "SELECT CASE WHEN pg_is_in_recovery() THEN true ELSE pg_current_wal_flush_lsn() > $1::pg_lsn END", (lsn,)
    )
    return bool(found.rows[0][0])
