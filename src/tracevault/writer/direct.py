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

import psycopg
from psycopg import AsyncConnection, Connection
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from tracevault.errors import DriverError, OutcomeUnknownError
from tracevault.flows import Flow
from tracevault.postgres.failures import Place, from_psycopg, outcome_unknown
from tracevault.postgres.pool import LastError, borrow, borrow_async, lent, lent_async
from tracevault.postgres.run import run, run_async

T = TypeVar("T")

_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 0.1
# The server gives up on a statement at `timeout`; only if it does not answer at all do we, this much later.
_GRACE = 0.5


class Write(NamedTuple):
    """One write: how to say it (``replay`` after an attempt of unknown outcome), and whom it concerns."""

    flow: Callable[[bool], Flow[None]]
    needs_transaction: Callable[[bool], bool]
    id: UUID
    place: Place


class _Attempts:
    """The clock and the memory of one write: what happened, whether to go on, and how to report it."""

    def __init__(self, write: Write, timeout: float) -> None:
        self.write = write
        self.deadline = time.monotonic() + timeout
        self.unknown: OutcomeUnknownError | None = None
        self.pause = 0.0

    @property
    def replay(self) -> bool:
        return self.unknown is not None

    def left(self) -> float:
        return max(0.001, self.deadline - time.monotonic())

    def failed(self, error: DriverError, *, broken: bool) -> None:
        """Note a failed attempt; raise if it is the last one."""
        if broken:
            self.unknown = outcome_unknown(error, self.write.id, self.write.place)
        if not broken or time.monotonic() + self.pause >= self.deadline:
            raise self.unknown or error

    def next_pause(self) -> float:
        # Short, since a restarted server leaves a whole pool of dead connections, to be met one by one.
        pause, self.pause = self.pause, min(max(_FIRST_PAUSE, self.pause * 2), _LONGEST_PAUSE)
        return pause


# The blocks below are spelled out rather than wrapped in context managers: this is the path of every emit.


def store(pool: ConnectionPool[Any], last: LastError, write: Write, timeout: float) -> None:
    """Carry out ``write`` on a connection of ``pool`` within ``timeout`` seconds."""
    attempts = _Attempts(write, timeout)
    while True:
        connection = None
        try:
            connection = borrow(pool, last, write.place, attempts.left())
            flow = write.flow(attempts.replay)
            if connection.autocommit and not write.needs_transaction(attempts.replay):
                run(connection, flow, write.place)
            else:
                with _atomic(connection, write.place, needed=True):
                    run(connection, flow, write.place)
            return
        except DriverError as error:
            failure = error
            broken = connection is not None and connection.closed
        finally:
            if connection is not None:
                pool.putconn(connection)
        attempts.failed(failure, broken=broken)
        time.sleep(attempts.next_pause())


async def store_async(pool: AsyncConnectionPool[Any], last: LastError, write: Write, timeout: float) -> None:
    """Carry out ``write`` on a connection of ``pool`` within ``timeout`` seconds."""
    attempts = _Attempts(write, timeout)
    while True:
        connection = None
        try:
            async with asyncio.timeout(attempts.left() + _GRACE):
                connection = await borrow_async(pool, last, write.place, attempts.left())
                flow = write.flow(attempts.replay)
                if connection.autocommit and not write.needs_transaction(attempts.replay):
                    await run_async(connection, flow, write.place)
                else:
                    async with _atomic_async(connection, write.place, needed=True):
                        await run_async(connection, flow, write.place)
            return
        except TimeoutError:
            broken = True
            failure = DriverError(f"{write.place}: no answer from the server", transient=True)
        except DriverError as error:
            failure = error
            broken = connection is not None and connection.closed
        finally:
            if connection is not None:
                await pool.putconn(connection)
        attempts.failed(failure, broken=broken)
        await asyncio.sleep(attempts.next_pause())


@contextmanager
def _atomic(connection: Connection[Any], place: Place, *, needed: bool = False) -> Iterator[None]:
    """Wrap a transaction of ours around the block, if ``needed`` or if the pool's connections open one anyway."""
    if connection.autocommit and not needed:
        yield
        return
    try:
        with connection.transaction():
            yield
    except psycopg.Error as error:  # of BEGIN or COMMIT; those of a flow are ours already
        failure = from_psycopg(error, place)
    else:
        return
    raise failure


@asynccontextmanager
async def _atomic_async(connection: AsyncConnection[Any], place: Place, *, needed: bool = False) -> AsyncIterator[None]:
    """Wrap a transaction of ours around the block, if ``needed`` or if the pool's connections open one anyway."""
    if connection.autocommit and not needed:
        yield
        return
    try:
        async with connection.transaction():
            yield
    except psycopg.Error as error:
        failure = from_psycopg(error, place)
    else:
        return
    raise failure


def read(
    pool: ConnectionPool[Any], last: LastError, flow: Callable[[], Flow[T]], place: Place, timeout: float
) -> T:
    """Run a reading flow on a connection of ``pool``; again, within ``timeout``, if that connection had died."""
    deadline = time.monotonic() + timeout
    while True:
        started = flow()  # checks its arguments before anything is connected
        with lent(pool, last, place, max(0.001, deadline - time.monotonic())) as connection:
            try:
                with _atomic(connection, place):
                    return run(connection, started, place)
            except DriverError:
                if not connection.closed or time.monotonic() > deadline:
                    raise
        time.sleep(_FIRST_PAUSE)


async def read_async(
    pool: AsyncConnectionPool[Any], last: LastError, flow: Callable[[], Flow[T]], place: Place, timeout: float
) -> T:
    """Run a reading flow on a connection of ``pool``; again, within ``timeout``, if that connection had died."""
    deadline = time.monotonic() + timeout
    while True:
        started = flow()
        async with lent_async(pool, last, place, max(0.001, deadline - time.monotonic())) as connection:
            try:
                async with _atomic_async(connection, place):
                    return await run_async(connection, started, place)
            except DriverError:
                if not connection.closed or time.monotonic() > deadline:
                    raise
        await asyncio.sleep(_FIRST_PAUSE)
