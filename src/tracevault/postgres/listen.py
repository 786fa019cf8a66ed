"""Waiting for NOTIFY, where somebody sends it; where it cannot be had, waiting all the same."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from threading import Event
from typing import Any
from weakref import finalize

import psycopg
from psycopg import AsyncConnection, Connection

from tracevault.errors import TracevaultError


class Listener:
    """Waits for something new in a table. A standby, a pooler, or a lost connection makes it wait without listening."""

    def __init__(self, connect: Callable[[], Connection[Any]] | None, channel: str, closed: Event) -> None:
        self._connect = connect
        self._channel = channel
        self._closed = closed
        self._connection: Connection[Any] | None = None

    def wait(self, seconds: float) -> None:
        """Wait until there may be something new, at most so long."""
        if self._connect is not None:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                    # Who stops following may not say so.
                    finalize(self, self._connection.pgconn.finish)
                    self._connection.execute(f'LISTEN "{self._channel}"'.encode())
                    return  # what came before it listened is looked for at once
                for _ in self._connection.notifies(timeout=seconds, stop_after=1):
                    pass
            except (TracevaultError, psycopg.Error, OSError):
                self.close()
                self._connect = None
            else:
                return
        self._closed.wait(seconds)

    def close(self) -> None:
        """Let go of the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error, OSError):
                connection.close()


class AsyncListener:
    """Like `Listener`, in an event loop."""

    def __init__(self, connect: Callable[[], Awaitable[AsyncConnection[Any]]] | None, channel: str) -> None:
        self._connect = connect
        self._channel = channel
        self._connection: AsyncConnection[Any] | None = None

    async def wait(self, seconds: float) -> None:
        """Wait until there may be something new, at most so long."""
        if self._connect is not None:
            try:
                if self._connection is None:
                    self._connection = await self._connect()
                    finalize(self, self._connection.pgconn.finish)
                    await self._connection.execute(f'LISTEN "{self._channel}"'.encode())
                    return
                async for _ in self._connection.notifies(timeout=seconds, stop_after=1):
                    pass
            except (TracevaultError, psycopg.Error, OSError):
                await self.close()
                self._connect = None
            else:
                return
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """Let go of the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error, OSError):
                await connection.close()
