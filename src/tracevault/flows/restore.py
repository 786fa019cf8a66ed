"""Archived rows on their way back into the table: as they were stored, beside those that are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tracevault.events.record import PAYLOAD_SALT
from tracevault.flows import Copy, Flow, Query
from tracevault.flows.seal import Tree
from tracevault.integrity.leaf import PAYLOADS
from tracevault.schema.trees import ERASURES, LEAVES

_STAGE = "tracevault_restore"
_ERASED = (*PAYLOADS, PAYLOAD_SALT)


def make_stage(table: str, columns: Iterable[str]) -> Flow[None]:
    """Make the temporary table that rows are copied to."""
    names = ", ".join(columns)
    yield Query(f'CREATE TEMPORARY TABLE {_STAGE} ON COMMIT DROP AS SELECT {names} FROM "{table}" WITH NO DATA')


def store_rows(table: str, tree: Tree | None, columns: Sequence[str], stream: Iterable[bytes]) -> Flow[int]:
    """Store rows that are not there; return how many. ``stream`` is that of a binary COPY.

    What was erased since they were archived stays erased.
    """
    names = ", ".join(columns)
    yield Copy(f"COPY {_STAGE} ({names}) FROM STDIN (FORMAT binary)", stream)
    values, erasures = ", ".join(f"s.{name}" for name in columns), ""
    if tree is not None:
        values = ", ".join(
            f"CASE WHEN e.index IS NULL THEN s.{name} END" if name in _ERASED else f"s.{name}" for name in columns
        )
        erasures = (
            f" LEFT JOIN {LEAVES} AS l ON l.tree = {tree.number} AND l.id = s.id AND l.occurred_at = s.occurred_at"
            f" LEFT JOIN {ERASURES} AS e ON e.tree = l.tree AND e.index = l.index"
        )
    done = yield Query(
        f'INSERT INTO "{table}" ({names}) SELECT {values} FROM {_STAGE} AS s{erasures} ON CONFLICT DO NOTHING',
        reads=False,
    )
    yield Query(f"TRUNCATE {_STAGE}")
    return done.touched
