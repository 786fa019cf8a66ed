"""Sync emits: written on a pooled connection while the caller waits.

A connection that breaks is replaced and the write repeated until ``timeout`` has passed: the id is the same,
so the event is stored once. Only when time runs out is the caller told, and told whether it can be certain.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from psycopg import AsyncConnection, Connection
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from tracevault.errors import DriverError, DuplicateIdError, OutcomeUnknownError, TracevaultError
from tracevault.flows import Flow
from tracevault.postgres.failures import Place, is_broken, outcome_unknown, translated
from tracevault.postgres.pool import LastError, borrow, borrow_async, lent, lent_async
from tracevault.postgres.run import run, run_async
from tracevault.writer.limit import Watch

T = TypeVar("T")

_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 0.1
# The server gives up on a statement at `timeout`, and says so; only if it does not do we, this much later.
_GRACE = 0.25


class Write(NamedTuple):
    """One write: how to say it (``replay`` after an attempt of unknown outcome), and whom it concerns."""

    flow: Callable[[bool], Flow[Any]]
    needs_transaction: Callable[[bool], bool]
    id: UUID
    place: Place


class _Attempts:
    """The clock of one write or read, and whether there is time for another attempt."""

    def __init__(self, timeout: float) -> None:
        self._deadline = time.monotonic() + timeout
        self._pause = 0.0

    def left(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def overdue(self) -> bool:
        return time.monotonic() >= self._deadline + _GRACE

    def next_pause(self) -> float | None:
        """Seconds to wait before another attempt, or None if time is up."""
        # Short, since a restarted server leaves a whole pool of dead connections, to be met one by one.
        pause, self._pause = self._pause, min(max(_FIRST_PAUSE, self._pause * 2), _LONGEST_PAUSE)
        return pause if time.monotonic() + pause < self._deadline else None


class _WriteAttempts(_Attempts):
    """And its memory: whether an earlier attempt may have stored the event."""

    def __init__(self, write: Write, timeout: float) -> None:
        super().__init__(timeout)
        self._write = write
        self._unknown: OutcomeUnknownError | None = None

    @property
    def replay(self) -> bool:
        return self._unknown is not None

    def pause_after(self, error: TracevaultError, *, broken: bool) -> float:
        """Note a failed attempt; raise what the caller is to know if it was the last one."""
        if isinstance(error, DuplicateIdError):
            raise error
        pause = None
        if broken and isinstance(error, DriverError):
            self._unknown = outcome_unknown(error, self._write.id, self._write.place)
            pause = self.next_pause()
        if pause is None:
            raise self._unknown or error
        return pause


# The blocks below are spelled out rather than wrapped in context managers: this is the path of every emit.


def store(pool: ConnectionPool[Any], last: LastError, write: Write, timeout: float) -> None:
    """Carry out ``write`` on a connection of ``pool`` within ``timeout`` seconds."""
    attempts = _WriteAttempts(write, timeout)
    while True:
        connection = None
        try:
            connection = borrow(pool, last, write.place, attempts.left())
            watch = Watch(connection, attempts.overdue)
            flow = write.flow(attempts.replay)
            if connection.autocommit and not write.needs_transaction(attempts.replay):
                run(connection, flow, write.place)
            else:
                with atomic(connection, write.place, needed=True):
                    run(connection, flow, write.place)
            return
        except TracevaultError as error:
            failure = error
            broken = connection is not None and is_broken(connection, error)
        finally:
            if connection is not None:
                watch.end()
                pool.putconn(connection)
        time.sleep(attempts.pause_after(failure, broken=broken))


async def store_async(pool: AsyncConnectionPool[Any], last: LastError, write: Write, timeout: float) -> None:
    """Carry out ``write`` on a connection of ``pool`` within ``timeout`` seconds.

    To be run in a task of its own: a pool that is cancelled while it takes a connection back forgets it.
    """
    attempts = _WriteAttempts(write, timeout)
    while True:
        connection = None
        try:
            connection = await borrow_async(pool, last, write.place, attempts.left())
            watch = Watch(connection, attempts.overdue)
            flow = write.flow(attempts.replay)
            if connection.autocommit and not write.needs_transaction(attempts.replay):
                await run_async(connection, flow, write.place)
            else:
                async with atomic_async(connection, write.place, needed=True):
                    await run_async(connection, flow, write.place)
            return
        except TracevaultError as error:
            failure = error
            broken = connection is not None and is_broken(connection, error)
        finally:
            if connection is not None:
                await watch.end_async()
                await pool.putconn(connection)
        await asyncio.sleep(attempts.pause_after(failure, broken=broken))


@contextmanager
def atomic(connection: Connection[Any], place: Place, *, needed: bool = False) -> Iterator[None]:
    """Wrap a transaction of ours around the block, if ``needed`` or if the pool's connections open one anyway."""
    if connection.autocommit and not needed:
        yield
        return
    with translated(place), connection.transaction():
        yield


@asynccontextmanager
async def atomic_async(connection: AsyncConnection[Any], place: Place, *, needed: bool = False) -> AsyncIterator[None]:
    """Wrap a transaction of ours around the block, if ``needed`` or if the pool's connections open one anyway."""
    if connection.autocommit and not needed:
        yield
        return
    with translated(place):
        async with connection.transaction():
            yield


def read(
    pool: ConnectionPool[Any],
    last: LastError,
    flow: Callable[[], Flow[T]],
    place: Place,
    timeout: float,
    *,
    bounded: bool = False,
    transaction: bool = False,
) -> T:
    """Run a reading flow on a connection of ``pool``; again, within ``timeout``, if that connection had died.

    The wait for the answer is limited only if ``bounded``; with ``transaction`` it runs in one.
    """
    attempts = _Attempts(timeout)
    while True:
        started = flow()  # checks its arguments before anything is connected
        with lent(pool, last, place, attempts.left()) as connection:
            watch = Watch(connection, attempts.overdue) if bounded else None
            try:
                with atomic(connection, place, needed=transaction):
                    return run(connection, started, place)
            except DriverError as error:
                pause = attempts.next_pause() if is_broken(connection, error) else None
                if pause is None:
                    raise
            finally:
                if watch is not None:
                    watch.end()
        time.sleep(pause)


async def read_async(
    pool: AsyncConnectionPool[Any],
    last: LastError,
    flow: Callable[[], Flow[T]],
    place: Place,
    timeout: float,
    *,
    bounded: bool = False,
    transaction: bool = False,
) -> T:
    """Like `read`, on an async pool."""
    attempts = _Attempts(timeout)
    while True:
        started = flow()
        async with lent_async(pool, last, place, attempts.left()) as connection:
            watch = Watch(connection, attempts.overdue) if bounded else None
            try:
                async with atomic_async(connection, place, needed=transaction):
                    return await run_async(connection, started, place)
            except DriverError as error:
                pause = attempts.next_pause() if is_broken(connection, error) else None
                if pause is None:
                    raise
            finally:
                if watch is not None:
                    await watch.end_async()
        await asyncio.sleep(pause)
