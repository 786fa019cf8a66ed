"""The sync emits of an event loop, which come to the writers turn by turn.

A loop resumes the callers whose batch was stored one after another, and most of them emit again. A writer that is idle
would take the first one of them alone, and then what came meanwhile: small batches, for each of which both sides pay as
for a large one. So what is emitted while callers are being resumed is offered together, once all of them had their
turn, or when it is many. An emit at any other time waits for nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tracevault.writer.queue import Item, Lane
from tracevault.writer.waiter import LoopWaiter

# Callers who are so few are resumed quickly; each of their emits is offered at once.
_FEW = 4
# At least so many are a batch of their own while others are resumed. Were there fewer of them, each would cost more;
# were there more, the server would wait for them, and then they for the server.
_ENOUGH = 16


class Turn:
    """The emits of a loop that no writer can see yet.

    ``offer`` is called in the loop, with this and them; ``landed`` with the number of those that were stored.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        offer: Callable[[Turn, list[tuple[Lane, Item]]], None],
        landed: Callable[[int], None],
    ) -> None:
        self.loop = loop
        self.watched = False
        """Whether somebody looks at the deadlines of the loop's emits."""
        self._offer = offer
        self._landed = landed
        self._emits: list[tuple[Lane, Item]] = []
        self._groups = 0
        self._enough = _ENOUGH

    @property
    def goes_on(self) -> bool:
        """Whether callers are being resumed, of whom many will emit again."""
        return self._groups > 0

    def resume(self, group: Sequence[LoopWaiter]) -> None:
        """Wake callers of this loop; to be called in it."""
        for waiter in group:
            waiter.finish()
        self._landed(sum([waiter.has_landed for waiter in group]))
        if len(group) > _FEW:
            self._groups += 1
            self._enough = -(-len(group) // max(1, len(group) // _ENOUGH))
            self.loop.call_soon(self._end)  # which comes after them

    def add(self, lane: Lane, item: Item) -> None:
        """Have an emit of this loop offered, at once or soon."""
        self._emits.append((lane, item))
        if not self._groups or len(self._emits) >= self._enough:
            self._flush()

    def _end(self) -> None:
        self._groups -= 1
        if self._emits:
            self._flush()

    def _flush(self) -> None:
        emits, self._emits = self._emits, []
        self._offer(self, emits)
