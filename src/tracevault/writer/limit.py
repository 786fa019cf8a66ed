"""A limit of time for statements. PostgreSQL's own limits do not help when the server no longer answers.

psycopg drives every operation by a generator that its connection's ``wait`` resumes each 0.1 seconds, whether
the server answered or not. There we look at the clock: first the server is asked to cancel the statement, so
that its outcome is certain; if it does not even answer that, the connection is given up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import psycopg
from psycopg import AsyncConnection, Connection

# Seconds that a server may take to cancel a statement.
_PATIENCE = 0.5


class OverdueError(psycopg.OperationalError):
    """The server did not answer in time, and the connection was given up."""


class Watch:
    """Ends what is waited for on a connection soon after ``overdue()`` became true. Until `end` is called."""

    def __init__(self, connection: Connection[Any] | AsyncConnection[Any], overdue: Callable[[], bool]) -> None:
        self._connection = connection
        self._overdue = overdue
        self._wait = connection.wait
        self._give_up_at: float | None = None
        self._cancelling: asyncio.Task[None] | None = None
        vars(connection)["wait"] = self._watched

    def _watched(self, steps: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        return self._wait(self._over(steps), *args, **kwargs)

    def _over(self, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Pass ``steps`` through, and look at the clock whenever the socket stayed silent."""
        ready: Any = None
        while True:
            try:
                wanted = steps.send(ready)
            except StopIteration as done:
                return done.value
            ready = yield wanted
            if ready == 0 and self._overdue():
                self._press()

    def _press(self) -> None:
        if self._give_up_at is None:
            self._give_up_at = time.monotonic() + _PATIENCE
            if isinstance(self._connection, Connection):
                with suppress(psycopg.Error):
                    self._connection.cancel_safe(timeout=_PATIENCE)
            else:
                self._cancelling = asyncio.ensure_future(_cancel(self._connection))
        elif time.monotonic() >= self._give_up_at:
            self._connection.pgconn.finish()
            raise OverdueError("the server did not answer in time")

    def end(self) -> None:
        """Let the connection be as it was."""
        del vars(self._connection)["wait"]

    async def end_async(self) -> None:
        """Like `end`, for an async connection."""
        self.end()
        if self._cancelling is not None:
            await asyncio.wait([self._cancelling])  # or it would hit the connection's next statement


async def _cancel(connection: AsyncConnection[Any]) -> None:
    with suppress(psycopg.Error):
        await connection.cancel_safe(timeout=_PATIENCE)
