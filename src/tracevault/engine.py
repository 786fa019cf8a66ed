"""What stands behind a vault: its checked options, its connections, its writer, and whether it is open.

The two engines are twins; they differ in ``await``, and in that an async pool belongs to one event loop.
A forked child inherits a vault that is open, but can use neither the threads nor the connections of its
parent: it makes its own when it first needs them.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from functools import partial
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from uuid import UUID

from psycopg import AsyncConnection, Connection
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from tracevault.config import Config
from tracevault.errors import (
    ConfigError,
    DriverError,
    OutcomeUnknownError,
    SealError,
    TracevaultError,
    UndeliveredError,
    ValidationError,
)
from tracevault.events.data_key import KeyCache
from tracevault.events.encrypt import Decryption, Encryption
from tracevault.events.mask import masked_names
from tracevault.events.payload import Encoder
from tracevault.events.prepare import Prepared, Settings
from tracevault.events.record import AuditRecord
from tracevault.events.rules import got, nearest, uuid
from tracevault.flows import Flow, Query
from tracevault.flows.staleness import behind, has_more
from tracevault.flows.tail import channel
from tracevault.flows.write import insert, insert_many, needs_transaction
from tracevault.forks import fork_mark
from tracevault.postgres.embedded import Embedded, acquire, is_embedded
from tracevault.postgres.failures import Place
from tracevault.postgres.listen import AsyncListener, Listener
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
    target_of,
    writer_connect,
)
from tracevault.postgres.replica import Freshness
from tracevault.postgres.run import streamed, streamed_async
from tracevault.postgres.schema import ensure_schema, ensure_schema_async
from tracevault.writer.background import BackgroundWriter
from tracevault.writer.direct import Write, atomic, atomic_async, read, read_async, store, store_async
from tracevault.writer.lent import write_on, write_on_async
from tracevault.writer.stats import Stats
from tracevault.writer.told import Kept, tell

if TYPE_CHECKING:
    from tracevault.integrity.report import Report
    from tracevault.postgres.partitions import Keeper
    from tracevault.sealing.service import SealingThread
    from tracevault.sealing.verify import Progress

_log = logging.getLogger("tracevault")

T = TypeVar("T")
Stored = Literal["database", "transaction", "spool", "memory", "dropped"]
Pool = tuple[ConnectionPool[Any], LastError]
AsyncPool = tuple[AsyncConnectionPool[Any], LastError]

# Emits of an async vault from other event loops share this many blocking connections.
_OTHER_LOOPS = 4
# `flush(timeout=math.inf)` is allowed; the operating system's clocks want a number.
_LONGEST = 366 * 86_400.0
# Seconds that a pool's idle helpers may take to end, when nothing else is left of close()'s time.
_PATIENCE = 0.2
# Seconds between looks whether an event is sealed.
_SEAL_LOOK = 0.05
_START = Place("starting")
_LENDING = Place("lending a connection")
_ASKING = Place("asking how far a replica is behind")


class _PerProcess(Generic[T]):
    """One object for each process, made when it is first asked for."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        # Those of a parent are kept too: to drop one would close its connections under the parent.
        self._by_pid: dict[int, T] = {}
        self._here: tuple[Sequence[int], T] | None = None

    def get(self) -> T:
        here = self._here
        if here is not None and here[0][0]:
            return here[1]
        pid = os.getpid()
        found = self._by_pid.get(pid)
        if found is None:  # no lock, which a fork could inherit locked for ever; setdefault is atomic
            found = self._by_pid.setdefault(pid, self._make())
        self._here = fork_mark(), found
        return found

    def existing(self) -> T | None:
        return self._by_pid.get(os.getpid())


class _Engine:
    """What both vaults know: the checked options, and whether the vault is open."""

    def __init__(self, config: Config) -> None:
        self.config = config
        keys = None
        if config.key_store is not None:
            from tracevault.sealing.key_store import open_key_store  # noqa: PLC0415 - likewise

            keys = KeyCache(open_key_store(config.key_store, create=bool(config.encrypt_fields)))
        self.decryption = None if keys is None else Decryption(keys)
        self.settings = Settings(
            Encoder(masked_names(config.mask_fields), config.mask_value, config.max_event_bytes),
            config.environment,
            config.default_mode,
            None if keys is None or not config.encrypt_fields else Encryption(config.encrypt_fields, keys),
            tuple(config.context_sources),
            config.catalog == "closed",
        )
        self.tables = config.tables
        if config.retain:
            from tracevault.schema.retention import rules  # noqa: PLC0415 - `import tracevault` need not wait

            for table, retain in config.retain.items():
                rules(retain, f"scopes: retain of table {table}")
        self.state: Literal["new", "starting", "open", "closed"] = "new"
        self._embedded: dict[str, Embedded] = {}
        self._embedded_lock = Lock()
        self._connect: Callable[[], Connection[Any]]
        self._conninfo: str | None = None  # unless only the caller knows how to connect
        self._target: str | None = None
        self.unreached: DriverError | None = None
        """Why the server could not be reached at the start."""
        self.elsewhere: frozenset[str] = frozenset()
        """Scopes of the same vault on other servers."""
        self._writers = _PerProcess(
            lambda: BackgroundWriter(config, self._connect, self._target, shared=bool(self.elsewhere))
        )
        self._freshness: Freshness | None = None
        if config.max_staleness is not None and (config.read_connection_string or config.read_pool) is not None:
            self._freshness = Freshness(config.max_staleness)
        self._direct = 0  # sync emits that are being written without the writer
        self._sealing: SealingThread | None = None
        self._keeper: Keeper | None = None

    @property
    def decrypts(self) -> bool:
        """Whether what is read may have to be opened."""
        return self.decryption is not None

    @property
    def writer(self) -> BackgroundWriter:
        """The background writer of this process."""
        return self._writers.get()

    def put_now(self, scope: str, table: str, prepared: Prepared) -> Stored | None:
        """Keep an event of async mode if that takes no waiting; else return None, and `emit` is to be called."""
        return self._writers.get().put_now(scope, table, prepared) if prepared.mode == "async" else None

    def stats(self) -> Stats:
        return self.writer.stats()

    def _set_writer(self, conninfo: str | None) -> None:
        """Note how background writers connect, and where to."""
        self._connect = writer_connect(self.config, conninfo)
        self._conninfo = conninfo if self.config.writer_connect is None else None
        self._target = target_of(conninfo if conninfo is not None else self.config.pool.conninfo)
        if self.elsewhere and self._target is None and self.config.spool is not None:
            raise ConfigError(
                "a spool for several servers needs to know where `pool` leads: make it with a conninfo, not a function",
                field="spool",
            )

    @contextmanager
    def _bearing_outages(self) -> Iterator[None]:
        """Where other servers are as well, one that cannot be reached does not stop them: its events wait for it."""
        try:
            yield
        except DriverError as error:
            if not self.elsewhere or not error.transient:
                raise
            self.unreached = error
            _log.error("%s; scopes %s wait for that server, the others go on", error, ", ".join(self.tables))

    def _prepare_sealing(self) -> None:
        """Check keys and anchors, if the options have any, before anything is opened."""
        if self.config.seal is None:
            return
        from tracevault.sealing.service import SealingThread  # noqa: PLC0415 - `import tracevault` need not wait

        self._sealing = SealingThread(self._connect, list(dict.fromkeys(self.tables.values())), self.config.seal)

    def _start_threads(self) -> None:
        """Begin to seal, and to make partitions, if the options say so: in this process alone, whatever it forks."""
        if self._sealing is not None:
            self._sealing.start()
        if self.config.partitions and self.config.ensure_schema:
            from tracevault.postgres.partitions import Keeper  # noqa: PLC0415 - `import tracevault` need not wait

            self._keeper = Keeper(self._connect, self.config.partitions)
            self._keeper.start()

    def _stop_threads(self, seconds: float) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None and keeper.pid == os.getpid():
            keeper.close(max(_PATIENCE, seconds))
        sealing, self._sealing = self._sealing, None
        if sealing is not None and sealing.pid == os.getpid():
            sealing.close(max(_PATIENCE, seconds))

    def verify(
        self,
        table: str,
        keys: Sequence[str],
        anchors: Sequence[str],
        jobs: int = 1,
        progress: Progress = lambda _done, _all: None,
    ) -> Report:
        """Verify a table's log over a connection of its own."""
        from tracevault.sealing.trust import trust_of  # noqa: PLC0415 - `import tracevault` need not wait for it
        from tracevault.sealing.verify import origin_of, verify  # noqa: PLC0415

        self.check_open()
        with closing(self._connect()) as connection:
            trust = trust_of(keys, anchors, origin=origin_of(connection, table))
            return verify(connection, table, trust, progress=progress, jobs=jobs, conninfo=self._conninfo)

    def _saved(self, scope: str, table: str, prepared: Prepared, error: DriverError) -> bool:
        """Keep an event in the spool that could not be stored, if the options say so and waiting can help."""
        if self.config.on_unavailable != "spool" or not error.transient:
            return False
        try:
            self.writer.keep(scope, table, prepared, in_doubt=isinstance(error, OutcomeUnknownError))
        except TracevaultError as failure:
            _log.error("an event that could not be stored could not be spooled either: %s", failure)
            return False
        return True

    def _count_failure(self, error: BaseException, events: int = 1) -> None:
        """Note how sync events ended that were not stored."""
        unknown = isinstance(error, OutcomeUnknownError) or not isinstance(error, TracevaultError)
        self.writer.counters.add(in_flight=-events, **{"unknown" if unknown else "raised": events})

    def emit_on(self, connection: Any, table: str, batch: Sequence[Prepared], place: Place, **how: bool) -> Stored:
        """Store a batch on a caller's blocking connection, in its transaction; return where it is."""
        with self._on_callers(batch):
            inside = write_on(connection, table, batch, place, **how)
        return self._told_of(batch, inside=inside)

    @contextmanager
    def _on_callers(self, batch: Sequence[Prepared]) -> Iterator[None]:
        """Count events that go on a caller's connection."""
        counters = self.writer.counters
        counters.add(emitted=len(batch))
        try:
            yield
        except BaseException:
            counters.add(raised=len(batch))
            raise
        counters.add(delivered=len(batch))

    def _told_of(self, batch: Sequence[Prepared], *, inside: bool) -> Stored:
        where: Kept = "transaction" if inside else "database"
        self.tell(batch, where)
        return where

    def tell(self, batch: Iterable[Prepared], where: Kept = "database") -> None:
        """Tell ``on_stored``, if there is one."""
        if self.config.on_stored is not None:
            tell(self.config.on_stored, batch, where)

    def check_open(self) -> None:
        if self.state != "open":
            raise TracevaultError(
                "the vault is closed"
                if self.state == "closed"
                else "the vault is not started: `audit = await start_tracevault(...)`, or `async with` it"
            )

    def seconds(self, timeout: float | None) -> float:
        """Return how long flush or close may take."""
        if timeout is None:
            return self.config.timeout
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
            raise ValidationError(f"`timeout` must be a number of seconds, got {got(timeout)}", field="timeout")
        return min(timeout, _LONGEST)

    def resolve(self) -> tuple[str | None, str | None]:
        """Return where to write and where to read, starting embedded databases; None stands for a pool."""
        config = self.config
        with self._embedded_lock:
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
        """Leave the embedded databases, those included that a `resolve` in another thread is just starting."""
        with self._embedded_lock:
            while self._embedded:
                self._embedded.popitem()[1].release()

    def table_of(self, scope: str) -> str:
        if scope in self.elsewhere:
            raise ConfigError(f"scope `{scope}` is on another server, beyond this transaction", field="scopes")
        if scope not in self.tables:
            raise ConfigError(f"`{scope}` is not a scope of this vault; {nearest(scope, self.tables)}", field="scopes")
        return self.tables[scope]

    def write_one(self, table: str, prepared: Prepared, place: Place) -> Write:
        # A replay that finds the id taken has found its own row, unless the caller chose the id.
        return Write(
            lambda replay: insert_many(table, [prepared], replay=True) if replay else insert(table, prepared),
            _never,
            prepared.id,
            place,
        )

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
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._write: AsyncPool
        self._read: AsyncPool
        self._primary: AsyncPool  # what is read from where the replica is too far behind
        self._own_pools: list[AsyncConnectionPool[Any]] = []
        self._other_loops = _PerProcess(self._open_other_loops)
        self._abandoned: set[asyncio.Future[None]] = set()  # writes whose emit was cancelled
        self._closing: asyncio.Future[None] | None = None
        self._undelivered: UndeliveredError | None = None

    async def start(self) -> None:
        if self.state != "new":
            raise TracevaultError(f"the vault is {self.state} already; start a new one")
        self.state = "starting"
        self._pid, self._loop = os.getpid(), asyncio.get_running_loop()
        try:
            await self._start()
            if self.state != "starting":
                raise TracevaultError("the vault was closed while it started")
        except BaseException:
            if self.state == "starting":
                self.state = "new"
            await self._let_go(0.0)
            raise
        self.state = "open"

    async def _start(self) -> None:
        config, timeout = self.config, self.config.timeout
        write, read_from = await asyncio.to_thread(self.resolve)
        self._set_writer(write)
        await asyncio.to_thread(self._prepare_sealing)
        if config.pool is not None:
            self._write = self._primary = (config.pool, LastError())
            self._read = (config.read_pool or config.pool, LastError())
        else:
            assert write is not None and read_from is not None  # noqa: PT018
            self._write = make_pool(AsyncConnectionPool, write, timeout, write=True)
            self._read = self._primary = make_pool(AsyncConnectionPool, read_from, timeout, write=False)
            self._own_pools = [self._write[0], self._read[0]]
            if self._freshness is not None:
                self._primary = make_pool(AsyncConnectionPool, write, timeout, write=False)
                self._own_pools.append(self._primary[0])
        if config.ensure_schema:
            with self._bearing_outages():
                await self._ensure_schema(write)
        for pool in self._own_pools:
            await pool.open()
        self._writers.get()
        self._start_threads()

    async def _ensure_schema(self, conninfo: str | None) -> None:
        tables = list(dict.fromkeys(self.tables.values()))
        if self.config.pool is not None:
            async with lent_async(*self._write, _START, self.config.timeout) as connection:
                await ensure_schema_async(connection, tables, self.config.partitions)
            return
        assert conninfo is not None
        async with await connect_once_async(conninfo, self.config.timeout, _START) as connection:
            await ensure_schema_async(connection, tables, self.config.partitions)

    def _at_home(self) -> bool:
        """Whether this is the event loop that the async pools belong to."""
        return asyncio.get_running_loop() is self._loop and os.getpid() == self._pid

    async def emit(self, scope: str, table: str, prepared: Prepared, place: Place) -> Stored:
        """Store one event by its mode, and return where it is."""
        writer = self.writer
        if prepared.mode == "async":
            return await writer.put_async(scope, table, prepared)
        try:
            # Alone, a write of its own is quickest; with others under way, a common one is.
            if self._direct == 0 and not writer.loop_busy:
                writer.counters.add_flying()
                self._direct += 1
                try:
                    await self.store(self.write_one(table, prepared, place))
                finally:
                    self._direct -= 1
                writer.counters.add_landed()
            else:
                await writer.store_async(scope, table, prepared)  # which counts it
        except BaseException as error:
            if isinstance(error, DriverError) and self._saved(scope, table, prepared, error):
                writer.counters.add(in_flight=-1)
                return "spool"
            self._count_failure(error)
            raise
        self.tell([prepared])
        return "database"

    async def emit_many(self, table: str, batch: Sequence[Prepared], place: Place) -> None:
        """Store a batch, or nothing of it."""
        counters = self.writer.counters
        counters.add(emitted=len(batch), in_flight=len(batch))
        try:
            await self.store(self.write_many(table, batch, place))
        except BaseException as error:
            self._count_failure(error, len(batch))
            raise
        counters.add(in_flight=-len(batch), delivered=len(batch))
        self.tell(batch)

    async def emit_on_async(
        self, connection: Any, table: str, batch: Sequence[Prepared], place: Place, **how: bool
    ) -> Stored:
        """Like `emit_on`, on an async connection."""
        with self._on_callers(batch):
            inside = await write_on_async(connection, table, batch, place, **how)
        return self._told_of(batch, inside=inside)

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[AsyncConnection[Any]]:
        """Lend a connection that writes, for a caller's own transaction."""
        self.check_open()
        if not self._at_home():
            raise TracevaultError(
                "connections belong to the event loop that started the vault: start another vault in this loop"
            )
        async with lent_async(*self._write, _LENDING, self.config.timeout) as connection:
            yield connection

    async def store(self, write: Write) -> None:
        if self._at_home():
            # In a task of its own: a cancelled emit is stored all the same, or not, but never leaves a statement
            # half said; nor is the pool cancelled while it hands out a connection, which it does not survive.
            storing = asyncio.ensure_future(store_async(*self._write, write, self.config.timeout))
            try:
                await asyncio.shield(storing)
            except asyncio.CancelledError:
                self._abandoned.add(storing)
                storing.add_done_callback(self._forget)
                raise
            return
        # A pool belongs to its loop; other loops write on blocking connections, in threads.
        pool, last = self._other_loops.get()
        if self.state != "open":  # closed just now, and perhaps before this pool was there to be seen
            pool.close()
            self.check_open()
        await asyncio.to_thread(store, pool, last, write, self.config.timeout)

    def _forget(self, storing: asyncio.Future[None]) -> None:
        self._abandoned.discard(storing)
        if not storing.cancelled() and storing.exception() is not None:
            _log.error("a cancelled emit was not stored: %s", storing.exception())

    def _open_other_loops(self) -> Pool:
        pool, last = pool_of(self._connect, _OTHER_LOOPS, self.config.timeout)
        pool.open()
        return pool, last

    async def apart(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Do ``work`` in a thread: it asks the key store, for which the event loop must not wait."""
        return await asyncio.to_thread(work, *args, **kwargs)

    async def decrypt(self, records: Sequence[AuditRecord]) -> None:
        """Open what is encrypted in ``records``, as far as there are keys."""
        if self.decryption is not None and records:
            await self.apart(self.decryption.open_all, records)

    async def read(self, flow: Callable[[], Flow[T]], place: Place, *, transaction: bool = False) -> T:
        self.check_open()
        if not self._at_home():
            raise TracevaultError(
                "reads belong to the event loop that started the vault: start another vault in this loop"
            )
        return await read_async(*await self._reading(), flow, place, self.config.timeout, transaction=transaction)

    async def _reading(self) -> AsyncPool:
        """Return where to read: the replica if it is fresh enough, else the primary."""
        freshness = self._freshness
        if freshness is None:
            return self._read
        fresh = freshness.known()
        if fresh is None:
            fresh = freshness.note(await self._is_fresh(freshness.limit))
        return self._read if fresh else self._primary

    async def _is_fresh(self, limit: float) -> bool | None:
        timeout = self.config.timeout
        try:
            found = await read_async(*self._read, behind, _ASKING, timeout, bounded=True)
        except DriverError:
            return None
        if found.within(limit):
            return True
        try:
            lsn = found.lsn or "0/0"
            return not await read_async(*self._primary, partial(has_more, lsn), _ASKING, timeout, bounded=True)
        except DriverError:
            return False

    async def stream(self, query: Query, place: Place) -> AsyncGenerator[list[tuple[Any, ...]], None]:
        """Yield the rows of one statement in batches, on a connection that is borrowed meanwhile."""
        self.check_open()
        async with (
            lent_async(*await self._reading(), place, self.config.timeout) as connection,
            atomic_async(connection, place),
            aclosing(streamed_async(connection, query, place)) as batches,
        ):
            async for rows in batches:
                yield rows

    def listener(self, table: str) -> AsyncListener:
        """Return what waits for something new in a table."""
        conninfo, timeout = self._conninfo, self.config.timeout
        connect = None
        if self.config.notify and conninfo is not None:
            connect = partial(connect_once_async, conninfo, timeout, Place("listening"))
        return AsyncListener(connect, channel(table))

    async def await_sealed(self, table: str, id_: UUID | str, timeout: float | None) -> int:
        from tracevault.flows.seal import sealed_as  # noqa: PLC0415 - `import tracevault` need not wait for it

        deadline = time.monotonic() + self.seconds(timeout)
        while True:
            index = await self.read(lambda: sealed_as(table, uuid(id_, "id")), Place("reading seals"))
            if index is not None:
                return index
            await asyncio.sleep(_until_sealed(deadline))

    async def flush(self, timeout: float | None) -> None:
        self.check_open()
        await self.writer.flush_async(self.seconds(timeout))

    async def healthcheck(self) -> bool:
        if self.state != "open":
            return False
        try:
            if self._at_home():
                for pool, last in (self._write, self._read):
                    await read_async(pool, last, _ping, Place("healthcheck"), self.config.timeout, bounded=True)
                return True
            async with asyncio.timeout(self.config.timeout):
                return await self._run_at_home(self.healthcheck())
        except Exception:  # noqa: BLE001 - whatever it is, something is wrong
            return False

    async def close(self, timeout: float | None) -> None:
        seconds = self.seconds(timeout)
        if self.state in ("new", "starting"):
            self.state = "closed"  # start() will notice
            return
        if self._at_home():
            if self.state == "open":
                self.state = "closed"
                self._closing = asyncio.ensure_future(self._close(seconds))
            if self._closing is not None:
                # Shielded: a caller who gives up waiting must not leave the vault half closed for the others.
                await asyncio.shield(self._closing)
            self._report()
            return
        try:
            await self._run_at_home(self.close(timeout))
        except _HomeIsGoneError:
            # The async pools died with their loop; the rest can still be closed properly.
            self.state = "closed"
            await asyncio.to_thread(self._close_blocking, seconds)
            self._report()

    async def _close(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        try:
            if self._abandoned:
                await asyncio.wait(self._abandoned, timeout=seconds)
            await asyncio.to_thread(self._close_blocking, max(0.0, deadline - time.monotonic()))
        finally:
            await self._let_go(deadline - time.monotonic())

    def _close_blocking(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        try:
            self.writer.close(seconds)
        except UndeliveredError as error:
            self._undelivered = error
        self._stop_threads(deadline - time.monotonic())
        other_loops = self._other_loops.existing()
        if other_loops is not None:
            other_loops[0].close(_PATIENCE)

    async def _let_go(self, seconds: float) -> None:
        for pool in self._own_pools:
            await pool.close(max(_PATIENCE, seconds))
        await asyncio.to_thread(self.release)

    def _report(self) -> None:
        """Tell the first of those who wait for close(), and nobody else, what was lost."""
        undelivered, self._undelivered = self._undelivered, None
        if undelivered is not None:
            raise undelivered

    async def _run_at_home(self, work: Coroutine[Any, Any, T]) -> T:
        """Have ``work`` done in the vault's own loop, as long as that runs."""
        loop = self._loop
        try:
            if loop is None or not loop.is_running() or os.getpid() != self._pid:
                raise _HomeIsGoneError
            done = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
            while not done.done():
                await asyncio.wait([done], timeout=_PATIENCE)
                if not loop.is_running() and not done.done():
                    raise _HomeIsGoneError
        except RuntimeError as error:  # it was closed between two lines
            raise _HomeIsGoneError from error
        finally:
            if inspect.getcoroutinestate(work) == inspect.CORO_CREATED:
                work.close()
        return done.result()


class _HomeIsGoneError(RuntimeError):
    """The event loop that started the vault runs no longer, or in another process."""


class BlockingEngine(_Engine):
    """The connections of a blocking vault."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        check_pool(config.pool, ConnectionPool, "pool")
        check_pool(config.read_pool, ConnectionPool, "read_pool")
        self._write_to: str | None = None
        self._read_from: str | None = None
        self._pools = _PerProcess(self._open_pools)
        self._primaries = _PerProcess(self._open_primary)
        self._close_lock = Lock()

    def start(self) -> None:
        try:
            self._write_to, self._read_from = self.resolve()
            self._set_writer(self._write_to)
            self._prepare_sealing()
            if self.config.ensure_schema:
                with self._bearing_outages():
                    self._ensure_schema()
            self._pools.get()
            self._writers.get()
            self._start_threads()
        except BaseException:
            self.release()
            raise
        self.state = "open"

    def _open_pools(self) -> tuple[Pool, Pool]:
        config, timeout = self.config, self.config.timeout
        if config.pool is not None:
            return (config.pool, LastError()), (config.read_pool or config.pool, LastError())
        assert self._write_to is not None and self._read_from is not None  # noqa: PT018
        write = make_pool(ConnectionPool, self._write_to, timeout, write=True)
        read_ = make_pool(ConnectionPool, self._read_from, timeout, write=False)
        write[0].open()
        read_[0].open()
        return write, read_

    def _open_primary(self) -> Pool:
        """Open what is read from where the replica is too far behind."""
        if self.config.pool is not None:
            return self.config.pool, LastError()
        assert self._write_to is not None
        opened = make_pool(ConnectionPool, self._write_to, self.config.timeout, write=False)
        opened[0].open()
        return opened

    def _ensure_schema(self) -> None:
        tables = list(dict.fromkeys(self.tables.values()))
        if self.config.pool is not None:
            with lent(*self._pools.get()[0], _START, self.config.timeout) as connection:
                ensure_schema(connection, tables, self.config.partitions)
            return
        assert self._write_to is not None
        with connect_once(self._write_to, self.config.timeout, _START) as connection:
            ensure_schema(connection, tables, self.config.partitions)

    def emit(self, scope: str, table: str, prepared: Prepared, place: Place) -> Stored:
        """Store one event by its mode, and return where it is."""
        writer = self.writer
        if prepared.mode == "async":
            return writer.put(scope, table, prepared)
        writer.counters.add_flying()
        try:
            # Alone, a write of its own is quickest; with others under way, a common one is.
            if self._direct == 0 and not writer.sync_busy:
                self._direct += 1
                try:
                    self.store(self.write_one(table, prepared, place))
                finally:
                    self._direct -= 1
            else:
                writer.store(scope, table, prepared, place)
        except BaseException as error:
            if isinstance(error, DriverError) and self._saved(scope, table, prepared, error):
                writer.counters.add(in_flight=-1)
                return "spool"
            self._count_failure(error)
            raise
        writer.counters.add_landed()
        self.tell([prepared])
        return "database"

    def emit_many(self, table: str, batch: Sequence[Prepared], place: Place) -> None:
        """Store a batch, or nothing of it."""
        counters = self.writer.counters
        counters.add(emitted=len(batch), in_flight=len(batch))
        try:
            self.store(self.write_many(table, batch, place))
        except BaseException as error:
            self._count_failure(error, len(batch))
            raise
        counters.add(in_flight=-len(batch), delivered=len(batch))
        self.tell(batch)

    @contextmanager
    def lent(self) -> Iterator[Connection[Any]]:
        """Lend a connection that writes, for a caller's own transaction."""
        self.check_open()
        with lent(*self._pools.get()[0], _LENDING, self.config.timeout) as connection:
            yield connection

    def store(self, write: Write) -> None:
        store(*self._pools.get()[0], write, self.config.timeout)

    def decrypt(self, records: Sequence[AuditRecord]) -> None:
        """Open what is encrypted in ``records``, as far as there are keys."""
        if self.decryption is not None:
            self.decryption.open_all(records)

    def read(self, flow: Callable[[], Flow[T]], place: Place, *, transaction: bool = False) -> T:
        self.check_open()
        return read(*self._reading(), flow, place, self.config.timeout, transaction=transaction)

    def _reading(self) -> Pool:
        """Return where to read: the replica if it is fresh enough, else the primary."""
        freshness, replica = self._freshness, self._pools.get()[1]
        if freshness is None:
            return replica
        fresh = freshness.known()
        if fresh is None:
            fresh = freshness.note(self._is_fresh(replica, freshness.limit))
        return replica if fresh else self._primaries.get()

    def _is_fresh(self, replica: Pool, limit: float) -> bool | None:
        timeout = self.config.timeout
        try:
            found = read(*replica, behind, _ASKING, timeout, bounded=True)
        except DriverError:
            return None
        if found.within(limit):
            return True
        try:
            lsn = found.lsn or "0/0"
            return not read(*self._primaries.get(), partial(has_more, lsn), _ASKING, timeout, bounded=True)
        except DriverError:
            return False

    def stream(self, query: Query, place: Place) -> Generator[list[tuple[Any, ...]], None, None]:
        """Yield the rows of one statement in batches, on a connection that is borrowed meanwhile."""
        self.check_open()
        with lent(*self._reading(), place, self.config.timeout) as connection, atomic(connection, place):
            yield from streamed(connection, query, place)

    def listener(self, table: str, closed: Event) -> Listener:
        """Return what waits for something new in a table, or for ``closed``."""
        return Listener(self._connect if self.config.notify else None, channel(table), closed)

    def await_sealed(self, table: str, id_: UUID | str, timeout: float | None) -> int:
        from tracevault.flows.seal import sealed_as  # noqa: PLC0415 - `import tracevault` need not wait for it

        deadline = time.monotonic() + self.seconds(timeout)
        while True:
            index = self.read(lambda: sealed_as(table, uuid(id_, "id")), Place("reading seals"))
            if index is not None:
                return index
            time.sleep(_until_sealed(deadline))

    def flush(self, timeout: float | None) -> None:
        self.check_open()
        self.writer.flush(self.seconds(timeout))

    def healthcheck(self) -> bool:
        if self.state != "open":
            return False
        try:
            for pool, last in self._pools.get():
                read(pool, last, _ping, Place("healthcheck"), self.config.timeout, bounded=True)
        except Exception:  # noqa: BLE001 - whatever it is, something is wrong
            return False
        return True

    def close(self, timeout: float | None) -> None:
        seconds = self.seconds(timeout)
        with self._close_lock:  # whoever comes second waits until the first is done
            if self.state == "closed":
                return
            self.state = "closed"
            deadline = time.monotonic() + seconds
            try:
                self.writer.close(seconds)
            finally:
                self._stop_threads(deadline - time.monotonic())
                primary = self._primaries.existing()
                pools = [*(self._pools.existing() or ()), *([] if primary is None else [primary])]
                if self.config.pool is None:
                    for pool, _ in pools:
                        pool.close(max(_PATIENCE, deadline - time.monotonic()))
                self.release()


def _until_sealed(deadline: float) -> float:
    """Return for how long to wait before the next look; raise `SealError` when time has run out."""
    if time.monotonic() > deadline:
        raise SealError(
            "the event is not sealed yet: is a sealer running? `tracevault seal`, or the option `seal` of a vault"
        )
    return _SEAL_LOOK


def _never(_replay: bool) -> bool:
    return False


def _ping() -> Flow[None]:
    yield Query("SELECT 1")
