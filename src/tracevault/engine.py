"""What stands behind a vault: its checked options, its connections, its writer, and whether it is open.

The two engines are twins; they differ in ``await``, and in that an async pool belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Literal, TypeVar

from psycopg_pool import AsyncConnectionPool, ConnectionPool

from tracevault.config import Config
from tracevault.errors import ConfigError, TracevaultError
from tracevault.event.mask import masked_names
from tracevault.event.payload import Encoder
from tracevault.event.prepare import Prepared, Settings
from tracevault.event.rules import nearest
from tracevault.flows import Flow, Query
from tracevault.flows.write import insert, insert_many, needs_transaction
from tracevault.postgres.embedded import Embedded, acquire, is_embedded
from tracevault.postgres.failures import Place
from tracevault.postgres.pool import (
    LastError,
    check_conninfo,
    check_pool,
    connect_once,
    connect_once_async,
    lent,
    lent_async,
    make_pool,
    pool_of,
    writer_connect,
)
from tracevault.postgres.schema import ensure_schema, ensure_schema_async
from tracevault.writer.background import BackgroundWriter
from tracevault.writer.direct import Write, read, read_async, store, store_async

T = TypeVar("T")

# Emits of an async vault from other event loops share this many blocking connections.
_OTHER_LOOPS = 4


class _Engine:
    """What both vaults know: the checked options, and whether the vault is open."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.settings = Settings(
            Encoder(masked_names(config.mask_fields), config.mask_value, config.max_event_bytes),
            config.environment,
            config.default_mode,
        )
        self.tables = config.tables
        self.state: Literal["new", "open", "closed"] = "new"
        self._embedded: dict[str, Embedded] = {}
        self.writer: BackgroundWriter

    def check_open(self) -> None:
        if self.state != "open":
            raise TracevaultError(
                "the vault is closed"
                if self.state == "closed"
                else "the vault is not started: `audit = await start_tracevault(...)`, or `async with` it"
            )

    def resolve(self) -> tuple[str | None, str | None]:
        """Return where to write and where to read, starting embedded databases; None stands for a pool."""
        config = self.config
        write = self._resolve_one(config.connection_string, "connection_string")
        read_string = config.read_connection_string
        if config.pool is not None:
            read_string = None
        elif read_string is None:
            return write, write
        return write, self._resolve_one(read_string, "read_connection_string")

    def _resolve_one(self, value: str | None, field: str) -> str | None:
        if value is None:
            return None
        if not is_embedded(value):
            return check_conninfo(value, field)
        if value not in self._embedded:
            self._embedded[value] = acquire(value)
        return self._embedded[value].conninfo

    def release(self) -> None:
        """Leave the embedded databases."""
        while self._embedded:
            self._embedded.popitem()[1].release()

    def table_of(self, scope: str) -> str:
        if scope not in self.tables:
            raise ConfigError(f"`{scope}` is not a scope of this vault; {nearest(scope, self.tables)}", field="scopes")
        return self.tables[scope]

    def write_one(self, table: str, prepared: Prepared, place: Place) -> Write:
        return Write(lambda _replay: insert(table, prepared), _never, prepared.id, place)

    def write_many(self, table: str, batch: Sequence[Prepared], place: Place) -> Write:
        return Write(
            lambda replay: insert_many(table, batch, replay=replay),
            lambda replay: needs_transaction(batch, replay=replay),
            batch[0].id,
            place,
        )

    def __repr__(self) -> str:
        """Show scopes and state; no connection string, which may hold a password."""
        return f"<{type(self).__name__} {self.state}, scopes: {', '.join(self.tables)}>"


class AsyncEngine(_Engine):
    """The connections of an async vault."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        check_pool(config.pool, AsyncConnectionPool, "pool")
        check_pool(config.read_pool, AsyncConnectionPool, "read_pool")
        self._closing: asyncio.Future[None] | None = None
        self._other_loops: tuple[ConnectionPool[Any], LastError] | None = None
        self._other_loops_lock = Lock()

    async def start(self) -> None:
        if self.state != "new":
            raise TracevaultError(f"the vault is {self.state} already; start a new one")
        config, timeout = self.config, self.config.timeout
        self._loop = asyncio.get_running_loop()
        try:
            write, read_from = await asyncio.to_thread(self.resolve)
            if config.pool is None:
                assert write is not None and read_from is not None  # noqa: PT018
                self._write = make_pool(AsyncConnectionPool, write, timeout, write=True)
                self._read = make_pool(AsyncConnectionPool, read_from, timeout, write=False)
            else:
                self._write = (config.pool, LastError())
                self._read = (config.read_pool or config.pool, LastError())
            self._connect = writer_connect(config, write)
            self.writer = BackgroundWriter(config, self._connect)
            if config.ensure_schema:
                await self._ensure_schema(write)
            if config.pool is None:
                await self._write[0].open()
                await self._read[0].open()
        except BaseException:
            await asyncio.to_thread(self.release)
            raise
        self.state = "open"

    async def _ensure_schema(self, conninfo: str | None) -> None:
        tables = list(dict.fromkeys(self.tables.values()))
        place = Place("starting")
        if self.config.pool is not None:
            async with lent_async(*self._write, place, self.config.timeout) as connection:
                await ensure_schema_async(connection, tables)
            return
        assert conninfo is not None
        connection = await connect_once_async(conninfo, self.config.timeout, place)
        async with connection:
            await ensure_schema_async(connection, tables)

    async def store(self, write: Write) -> None:
        if asyncio.get_running_loop() is self._loop:
            await store_async(*self._write, write, self.config.timeout)
            return
        # A pool belongs to its loop; other loops write on blocking connections, in threads.
        with self._other_loops_lock:
            if self._other_loops is None:
                self.check_open()
                self._other_loops = pool_of(self._connect, _OTHER_LOOPS, self.config.timeout)
                self._other_loops[0].open()
        await asyncio.to_thread(store, *self._other_loops, write, self.config.timeout)

    async def read(self, flow: Callable[[], Flow[T]], place: Place) -> T:
        self.check_open()
        if asyncio.get_running_loop() is not self._loop:
            raise TracevaultError(
                "reads belong to the event loop that started the vault: start another vault in this loop"
            )
        return await read_async(*self._read, flow, place, self.config.timeout)

    async def flush(self, timeout: float | None) -> None:
        self.check_open()
        await asyncio.to_thread(self.writer.flush, self.config.timeout if timeout is None else timeout)

    async def healthcheck(self) -> bool:
        if self.state != "open":
            return False
        try:
            for pool, last in (self._write, self._read):
                await read_async(pool, last, _ping, Place("healthcheck"), self.config.timeout)
        except TracevaultError:
            return False
        return True

    async def close(self, timeout: float | None) -> None:
        if self.state == "new":
            self.state = "closed"
        if self.state == "closed" and (self._closing is None or self._closing.done()):
            return
        if asyncio.get_running_loop() is not self._loop:
            if not self._loop.is_closed():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.close(timeout), self._loop))
                return
            self.state = "closed"  # its pools died with their loop; the rest can still be closed properly
            await asyncio.to_thread(self._close_blocking, self.config.timeout if timeout is None else timeout)
            return
        if self._closing is None:
            self.state = "closed"
            self._closing = asyncio.ensure_future(self._close(self.config.timeout if timeout is None else timeout))
        # Shielded: a caller who gives up waiting must not leave the vault half closed for the others.
        await asyncio.shield(self._closing)

    async def _close(self, timeout: float) -> None:
        try:
            await asyncio.to_thread(self.writer.close, timeout)
        finally:
            if self.config.pool is None:
                await self._write[0].close(timeout)
                await self._read[0].close(timeout)
            await asyncio.to_thread(self._close_blocking, timeout)

    def _close_blocking(self, timeout: float) -> None:
        try:
            self.writer.close(timeout)
        finally:
            if self._other_loops is not None:
                self._other_loops[0].close(timeout)
            self.release()


class BlockingEngine(_Engine):
    """The connections of a blocking vault."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        check_pool(config.pool, ConnectionPool, "pool")
        check_pool(config.read_pool, ConnectionPool, "read_pool")
        self._close_lock = Lock()

    def start(self) -> None:
        config, timeout = self.config, self.config.timeout
        try:
            write, read_from = self.resolve()
            if config.pool is None:
                assert write is not None and read_from is not None  # noqa: PT018
                self._write = make_pool(ConnectionPool, write, timeout, write=True)
                self._read = make_pool(ConnectionPool, read_from, timeout, write=False)
            else:
                self._write = (config.pool, LastError())
                self._read = (config.read_pool or config.pool, LastError())
            self.writer = BackgroundWriter(config, writer_connect(config, write))
            if config.ensure_schema:
                self._ensure_schema(write)
            if config.pool is None:
                self._write[0].open()
                self._read[0].open()
        except BaseException:
            self.release()
            raise
        self.state = "open"

    def _ensure_schema(self, conninfo: str | None) -> None:
        tables = list(dict.fromkeys(self.tables.values()))
        place = Place("starting")
        if self.config.pool is not None:
            with lent(*self._write, place, self.config.timeout) as connection:
                ensure_schema(connection, tables)
            return
        assert conninfo is not None
        with connect_once(conninfo, self.config.timeout, place) as connection:
            ensure_schema(connection, tables)

    def store(self, write: Write) -> None:
        store(*self._write, write, self.config.timeout)

    def read(self, flow: Callable[[], Flow[T]], place: Place) -> T:
        self.check_open()
        return read(*self._read, flow, place, self.config.timeout)

    def flush(self, timeout: float | None) -> None:
        self.check_open()
        self.writer.flush(self.config.timeout if timeout is None else timeout)

    def healthcheck(self) -> bool:
        if self.state != "open":
            return False
        try:
            for pool, last in (self._write, self._read):
                read(pool, last, _ping, Place("healthcheck"), self.config.timeout)
        except TracevaultError:
            return False
        return True

    def close(self, timeout: float | None) -> None:
        with self._close_lock:  # whoever comes second waits until the first is done
            if self.state == "closed":
                return
            self.state = "closed"
            seconds = self.config.timeout if timeout is None else timeout
            try:
                self.writer.close(seconds)
            finally:
                if self.config.pool is None:
                    self._write[0].close(seconds)
                    self._read[0].close(seconds)
                self.release()


def _never(_replay: bool) -> bool:
    return False


def _ping() -> Flow[None]:
    yield Query("SELECT 1")
