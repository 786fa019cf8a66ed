"""The interpreter's lock, between callers who are always busy and the writers that store what these emit.

A thread that computes keeps the lock until it waits for something, or until another one has asked for it for
`sys.getswitchinterval()`, which is 5 ms. A loop with hundreds of callers waits for nothing, nor does one caller who
emits async records one after another: a writer whose answer has come could not send the next batch for so long, and the
server would be idle. So who emits looks now and again whether there is an answer that nobody has read, and if so lets
its reader have the lock.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from psycopg import Connection

# Seconds between looks. Were there more of them, batches would be smaller, and cost more each.
_INTERVAL = 0.0006
# The operating system makes 50 µs or so of it, which is enough for another thread to wake.
_MOMENT = 1e-6


class Handover:
    """Which writers wait for an answer of the server, and who lets them have the lock for it."""

    def __init__(self) -> None:
        self._sockets: set[int] = set()
        self._looked = 0.0

    @contextmanager
    def awaiting(self, connection: Connection[Any]) -> Iterator[None]:
        """Say that this thread waits for answers on ``connection`` until the block ends."""
        socket = connection.fileno()
        self._sockets.add(socket)
        try:
            yield
        finally:
            self._sockets.discard(socket)

    def give_way(self, now: float, *, wanted: bool = False) -> None:
        """Let a writer go on whose answer has come, or who is known to want the lock.

        ``now`` is `time.monotonic`'s; to be called however often.
        """
        if now - self._looked < _INTERVAL or not (wanted or self._sockets):
            return
        self._looked = now
        if wanted or _any_readable(list(self._sockets)):
            self.pause()

    def pause(self) -> None:
        """Let a writer that is ready have the lock."""
        time.sleep(_MOMENT)
        self._looked = time.monotonic()  # the writer's turn is none of the loop's


def _any_readable(sockets: list[int]) -> bool:
    if not hasattr(select, "poll"):  # Windows
        try:
            return bool(select.select(sockets, (), (), 0)[0])
        except OSError:  # one was closed just now
            return False
    poll = select.poll()
    for socket in sockets:
        poll.register(socket, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll(0))
