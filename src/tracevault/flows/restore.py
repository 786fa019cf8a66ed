"""Archived rows on their way back into the table: as they were stored, beside those that are there."""

from __future__ import annotations

from collections.abc import Iterable

from tracevault.flows import Copy, Flow, Query

_STAGE = "tracevault_restore"


def make_stage(table: str, columns: Iterable[str]) -> Flow[None]:
    """Make the temporary table that rows are copied to."""
    names = ", ".join(columns)
    yield Query(f'CREATE TEMPORARY TABLE {_STAGE} ON COMMIT DROP AS SELECT {names} FROM "{table}" WITH NO DATA')


def store_rows(table: str, columns: Iterable[str], stream: Iterable[bytes]) -> Flow[int]:
    """Store rows that are not there; return how many. ``stream`` is that of a binary COPY."""
    names = ", ".join(columns)
    yield Copy(f"COPY {_STAGE} ({names}) FROM STDIN (FORMAT binary)", stream)
    done = yield Query(
        f'INSERT INTO "{table}" ({names}) SELECT {names} FROM {_STAGE} ON CONFLICT DO NOTHING', reads=False
    )
    yield Query(f"TRUNCATE {_STAGE}")
    return done.touched
