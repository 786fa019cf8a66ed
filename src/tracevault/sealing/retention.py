"""Retention carried out: what is to go is said first, then proven where the table is sealed, then removed.

Every step may be the last one of a process: what is left of it is planned again by the next run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from psycopg import Connection

from tracevault.flows import Flow, Query
from tracevault.flows.custody import drop_partition
from tracevault.flows.migrate import LOCK_NOT_AVAILABLE
from tracevault.flows.partitions import LOCK_TIMEOUT
from tracevault.flows.retention import Retention, delete_unsealed, drop_unsealed, retention
from tracevault.flows.seal import sealed_tree
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.postgres.schema import patiently
from tracevault.schema.custody import PRUNED
from tracevault.schema.retention import Rule
from tracevault.sealing.custody import carry_out_all, wait_until_proven

_WORKING = Place("retention")
# Rows of a table that is not sealed that are deleted in one transaction.
STEP = 5000
_AGAIN = frozenset({LOCK_NOT_AVAILABLE, "40P01"})

Progress = Callable[[int, int], None]


def plan_retention(connection: Connection[Any], table: str, known: Sequence[Rule]) -> Retention:
    """Return what rules let go of a table."""
    with connection.transaction():
        tree = run(connection, sealed_tree(table), _WORKING)
        return run(connection, retention(table, tree, known), _WORKING)


def apply_retention(
    connection: Connection[Any],
    planned: Retention,
    known: Sequence[Rule],
    ids: Sequence[UUID],
    timeout: float,
    progress: Progress = lambda _done, _all: None,
    command: str = "retention apply",
) -> int:
    """Remove what was planned, and what the events ``ids`` state of it; return how many rows went.

    Partitions go first, each in one transaction. Of a sealed table nothing goes before the events are sealed and
    anchored, which is waited for. ``command`` is what goes on with it another time, for the message of an error.
    """
    gone = 0
    if planned.tree is not None:
        for id_ in ids:
            wait_until_proven(connection, planned.tree, PRUNED, id_, timeout)
    for name in planned.drops:
        flow: Callable[[], Flow[int]] = (
            partial(drop_unsealed, planned.table, name, planned, known)
            if planned.tree is None
            else partial(drop_partition, planned.table, ids, name)
        )
        gone += _removed(connection, planned.table, flow, command)
    if planned.tree is not None:
        for id_ in ids:
            gone += carry_out_all(connection, planned.table, id_, timeout, progress)
        return gone
    for due in planned.due:
        for count in delete_in_steps(
            connection, planned.table, partial(delete_unsealed, planned.table, due, known), command
        ):
            gone += count
            progress(min(gone, planned.rows), planned.rows)
    return gone


def delete_in_steps(
    connection: Connection[Any], table: str, delete: Callable[[int], Flow[int]], command: str
) -> Iterator[int]:
    """Delete rows of a table that is not sealed, some in each transaction; yield how many went with each.

    ``delete`` gets the most rows that may go at once, and returns how many went; with fewer, it is done.
    """
    count = STEP
    while count == STEP:
        count = _removed(connection, table, partial(delete, STEP), command)
        yield count


def _removed(connection: Connection[Any], table: str, flow: Callable[[], Flow[int]], command: str) -> int:
    return patiently(connection, lambda: _hurried(flow), table, command, _WORKING, states=_AGAIN)


def _hurried(flow: Callable[[], Flow[int]]) -> Flow[int]:
    """Whoever waits for a lock makes writers wait: no longer than this."""
    yield Query(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
    return (yield from flow())
