"""Pruning and erasing, in the only order that can be proven: said, sealed, anchored, then done.

An event says which leaves lose their rows or payloads. Once it is sealed, and for a pruning anchored, the functions of
`schema.custody` do that, and nothing else. Interrupted, the same event is carried out to its end another time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

from psycopg import Connection

from tracevault.errors import SealError
from tracevault.flows.custody import Ranges, anchored, carry_out, stated
from tracevault.flows.seal import Tree, sealed_as, sealed_tree
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.schema.custody import PRUNED

_WORKING = Place("pruning")
# Ranges that one event states: about 100 kB of its data.
RANGES = 5000
# Leaves that are done in one transaction.
STEP = 5000
_LOOK = 0.1


def tree_of(connection: Connection[Any], table: str) -> Tree:
    """Return the tree of a table; `SealError` if it was never sealed."""
    tree = run(connection, sealed_tree(table), _WORKING)
    if tree is None:
        raise SealError(
            f"table `{table}` was never sealed, so nobody could tell later what is gone: run `tracevault seal`"
        )
    return tree


def parts(ranges: Ranges) -> Iterator[Ranges]:
    """Yield ranges in parts, one for each event."""
    for start in range(0, len(ranges), RANGES):
        yield ranges[start : start + RANGES]


def wait_until_proven(connection: Connection[Any], tree: Tree, event: str, event_id: UUID, timeout: float) -> None:
    """Wait until a checkpoint covers the event, and for a pruning until an anchor has it; `SealError` after a while."""
    deadline = time.monotonic() + timeout
    while True:
        index = run(connection, sealed_as(tree.table, event_id), _WORKING)
        if index is not None and (event != PRUNED or run(connection, anchored(tree, index), _WORKING)):
            return
        if time.monotonic() > deadline:
            missing = "sealed" if index is None else "anchored"
            raise SealError(
                f"event {event_id}, which says what is to go, is not {missing} after {timeout:g} seconds: let "
                f"`tracevault seal` with an anchor run, then go on with `--resume {event_id}`. Nothing was removed"
            )
        time.sleep(_LOOK)


def carry_out_all(
    connection: Connection[Any], table: str, event_id: UUID, timeout: float, progress: Callable[[int, int], None]
) -> int:
    """Do what a sealed event states, in transactions of at most `STEP` rows; return how many rows were touched.

    May be repeated: what is done already is passed over. ``progress`` is told leaves done and all leaves.
    """
    tree = tree_of(connection, table)
    found = run(connection, stated(tree, event_id), _WORKING)
    if found is None:
        raise SealError(f"{event_id} is not the id of an event that says what is to go")
    event, ranges = found
    wait_until_proven(connection, tree, event, event_id, timeout)
    every, done, touched = sum(end - first for first, end in ranges), 0, 0
    for first, end in ranges:
        for start in range(first, end, STEP):
            stop = min(start + STEP, end)
            with connection.transaction():
                touched += run(connection, carry_out(table, event, event_id, start, stop), _WORKING)
            done += stop - start
            progress(done, every)
    return touched
