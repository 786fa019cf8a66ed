"""The product: `AsyncTracevault` and `Tracevault`, side by side.

A scope emits into one audit table and reads from it; a vault is its default scope, holds the others, and owns
the connections. Everything else is done elsewhere: events are prepared in ``events``, said to the database in
``flows``, written by ``writer`` and ``postgres``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar, Unpack
from uuid import UUID

from psycopg import AsyncConnection, Connection

from tracevault.config import Config, config_from
from tracevault.engine import AsyncEngine, BlockingEngine, Stored
from tracevault.errors import ValidationError
from tracevault.events.catalog import TypedEvent
from tracevault.events.event import AuditEvent, DiffFields, EventFields
from tracevault.events.prepare import Batch, Prepared, awaits_no_key, prepare, prepare_diff
from tracevault.integrity.report import Report
from tracevault.postgres.failures import Place
from tracevault.query import AsyncQuery, AuditQuery
from tracevault.servers import AsyncServers, Servers
from tracevault.writer.stats import Stats

if TYPE_CHECKING:
    from tracevault.integrity.event_proof import EventProof

P = ParamSpec("P")
T = TypeVar("T")


class Receipt(NamedTuple):
    """What `emit` returns: the event's id, and where the event is now.

    ``database``: committed. ``transaction``: in the caller's transaction, and committed or not with it.
    ``spool``: on this machine, and it will be stored. ``memory``: queued for the background writers. ``dropped``:
    lost, as ``on_full="drop_newest"`` asked.
    """

    id: UUID
    stored: Stored


def _takes_options_of(
    _config: Callable[P, Config],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give an ``__init__(self, **options)`` the signature of `Config`, for type checkers and editors."""

    def same(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        return init

    return same


def _check_no_connection(*, allow_autocommit: bool, savepoint: bool) -> None:
    for name, value in (("allow_autocommit", allow_autocommit), ("savepoint", savepoint)):
        if value:
            raise ValidationError(f"`{name}` means something only with `connection`", field=name)


def _emit_on(
    scope: AsyncScope | Scope, connection: Any, batch: Sequence[Prepared], allow_autocommit: bool, savepoint: bool
) -> list[Receipt]:
    where = scope._engine.emit_on(
        connection, scope.table, batch, scope._place, allow_autocommit=allow_autocommit, savepoint=savepoint
    )
    return [Receipt(prepared.id, where) for prepared in batch]


# --------------------------------------------------------------------------------------------- async


class AsyncScope:
    """Emits into one audit table of an `AsyncTracevault`, and reads from it. Get one by ``get_scope``."""

    def __init__(self, engine: AsyncEngine, name: str, table: str) -> None:
        self._engine = engine
        self.name = name
        self.table = table
        self._place = Place("emit", name, table)
        self._proving = Place("proving an event", name, table)
        self.query = AsyncQuery(engine, name, table)

    async def emit(
        self,
        event: str | AuditEvent | Mapping[str, Any] | TypedEvent | None = None,
        /,
        *,
        connection: AsyncConnection[Any] | Any = None,
        allow_autocommit: bool = False,
        savepoint: bool = False,
        **fields: Unpack[EventFields],
    ) -> Receipt:
        """Store an event: its name, a typed event, or a mapping with all fields; fields may also be keywords.

        In sync mode it returns after the commit; in async mode at once, see ``default_mode``. With
        ``connection`` the event is written there, inside the caller's transaction, and nothing else is run;
        ``savepoint=True`` keeps that transaction alive if the database refuses the row, and
        ``allow_autocommit=True`` accepts a connection outside any transaction. Works from any event loop.

        Raises `ValidationError` before anything is written; `DriverError` (not written), `OutcomeUnknownError`
        (perhaps), `DuplicateIdError`, `QueueFullError`.
        """
        return await self._emit(prepare, event, fields, connection, allow_autocommit, savepoint)

    async def emit_diff(
        self,
        event: str | Mapping[str, Any] | type[Any] | None = None,
        /,
        *,
        connection: AsyncConnection[Any] | Any = None,
        allow_autocommit: bool = False,
        savepoint: bool = False,
        **fields: Unpack[DiffFields],
    ) -> Receipt:
        """Like `emit`, with ``before`` and ``after`` in place of ``data``: stores ``{before, after, diff}``."""
        return await self._emit(prepare_diff, event, fields, connection, allow_autocommit, savepoint)

    async def emit_many(
        self,
        events: Iterable[str | AuditEvent | Mapping[str, Any] | TypedEvent],
        *,
        connection: AsyncConnection[Any] | Any = None,
        allow_autocommit: bool = False,
        savepoint: bool = False,
    ) -> list[Receipt]:
        """Store all ``events`` in one transaction, or none; always synchronous. Receipts come in their order.

        An event with ``before`` or ``after`` is stored as `emit_diff` stores it.
        """
        return await self._emit_many(events, connection, allow_autocommit, savepoint)

    async def _emit_many(self, events: Any, connection: Any, allow_autocommit: bool, savepoint: bool) -> list[Receipt]:
        self._engine.check_open()
        batch = await self._batch(events)
        if connection is not None:
            batch.prepare()  # before anything is said in the caller's transaction, which a refusal would end
            return await self._emit_on(connection, batch, allow_autocommit, savepoint)
        _check_no_connection(allow_autocommit=allow_autocommit, savepoint=savepoint)
        if batch:
            await self._engine.emit_many(self.table, batch, self._place)
        return [Receipt(prepared.id, "database") for prepared in batch]

    def emit_many_blocking(
        self,
        events: Iterable[str | AuditEvent | Mapping[str, Any] | TypedEvent],
        *,
        connection: Any,
        savepoint: bool = False,
    ) -> list[Receipt]:
        """Like `emit_many` on a blocking ``connection``, for blocking code that async code runs.

        An event hook of SQLAlchemy's is such code: under an AsyncSession it sees a Session.
        """
        self._engine.check_open()
        batch = Batch(events, self._engine.settings)
        batch.prepare()
        return _emit_on(self, connection, batch, False, savepoint)

    async def await_sealed(self, id: UUID | str, timeout: float | None = None) -> int:  # noqa: A002
        """Wait until a signed checkpoint covers the event with this id; return the index of its leaf.

        From then on nobody without the key changes it unseen. Raises `SealError` after ``timeout`` seconds (default:
        the option ``timeout``), as where no sealer runs.
        """
        return await self._engine.await_sealed(self.table, id, timeout)

    async def prove(self, id: UUID | str) -> EventProof:  # noqa: A002
        """Return the proof that this table's log holds the event with this id, for whoever has no access to it.

        Its text (``str(proof)``) is a C2SP tlog-proof, which `verify_proof` and ``tracevault verify-proof`` check.
        Raises `SealError` if the event is not sealed and signed yet, or if row, hashes and checkpoint do not fit.
        """
        from tracevault.flows.prove import prove_event  # noqa: PLC0415 - `import tracevault` need not wait for it

        return await self._engine.read(lambda: prove_event(self.table, id), self._proving)

    async def verify(self, *, keys: Sequence[str] = (), anchors: Sequence[str] = (), jobs: int = 1) -> Report:
        """Verify the whole log of this table, in a thread, and return what was found; ``report.verdict`` sums it up.

        ``keys`` are the log's verifier keys as ``tracevault keygen`` prints them, ``KEY@SIZE`` for one that was
        revoked at a size; ``anchors`` name checkpoints outside the database: an anchor's file, folder or address.
        Without them the verdict is at best ``CONSISTENT``. Up to ``jobs`` processes (1 to 64) check rows at once, if
        the vault was given a connection string. Raises `SealError` where nothing can be verified.
        """
        return await asyncio.to_thread(self._engine.verify, self.table, keys, anchors, jobs)

    async def flush(self, timeout: float | None = None) -> None:
        """Wait until the vault's async records are stored; see `AsyncTracevault.flush`."""
        await self._engine.flush(timeout)

    async def _emit(
        self,
        prepare_event: Callable[..., Prepared],
        event: Any,
        fields: Mapping[str, Any],
        connection: Any,
        allow_autocommit: bool,
        savepoint: bool,
    ) -> Receipt:
        engine = self._engine
        engine.check_open()
        if connection is None and (allow_autocommit or savepoint):
            _check_no_connection(allow_autocommit=allow_autocommit, savepoint=savepoint)
        settings, mode = engine.settings, None if connection is None else "sync"
        if settings.encryption is None or awaits_no_key(event, fields, settings.encryption):
            prepared = prepare_event(event, fields, settings, mode=mode)
        else:
            prepared = await engine.apart(prepare_event, event, fields, settings, mode=mode)
        if connection is not None:
            return (await self._emit_on(connection, [prepared], allow_autocommit, savepoint))[0]
        where = engine.put_now(self.name, self.table, prepared)
        if where is None:
            where = await engine.emit(self.name, self.table, prepared, self._place)
        return Receipt(prepared.id, where)

    async def _batch(self, events: Any) -> Batch:
        settings = self._engine.settings
        if settings.encryption is None:
            return Batch(events, settings)
        batch = Batch(events, settings, now=False)
        await self._engine.apart(batch.prepare)
        return batch

    async def _emit_on(
        self, connection: Any, batch: Sequence[Prepared], allow_autocommit: bool, savepoint: bool
    ) -> list[Receipt]:
        where = await self._engine.emit_on_async(
            connection, self.table, batch, self._place, allow_autocommit=allow_autocommit, savepoint=savepoint
        )
        return [Receipt(prepared.id, where) for prepared in batch]


class AsyncUnitOfWork(AsyncScope):
    """A scope whose emits go into one transaction; see `AsyncTracevault.unit_of_work`."""

    def __init__(self, engine: AsyncEngine, name: str, connection: AsyncConnection[Any]) -> None:
        super().__init__(engine, name, engine.table_of(name))
        self.connection = connection
        """The connection, for the statements that belong to the same transaction."""

    def get_scope(self, name: str) -> AsyncUnitOfWork:
        """Return another scope of the vault, in the same transaction."""
        return AsyncUnitOfWork(self._engine, name, self.connection)

    async def _emit(
        self,
        prepare_event: Callable[..., Prepared],
        event: Any,
        fields: Mapping[str, Any],
        connection: Any,
        allow_autocommit: bool,
        savepoint: bool,
    ) -> Receipt:
        connection = self.connection if connection is None else connection
        return await super()._emit(prepare_event, event, fields, connection, allow_autocommit, savepoint)

    async def _emit_many(self, events: Any, connection: Any, allow_autocommit: bool, savepoint: bool) -> list[Receipt]:
        connection = self.connection if connection is None else connection
        return await super()._emit_many(events, connection, allow_autocommit, savepoint)


class AsyncTracevault(AsyncScope):
    """An audit log for asyncio: its default scope, with the others and the connections.

    Made by `start_tracevault`; takes its options. Await it, or enter it with ``async with``.
    """

    _engine: AsyncEngine

    @_takes_options_of(Config)
    def __init__(self, **options: Any) -> None:
        """Check the options; connect only when awaited or entered."""
        config = config_from(options)
        self._servers = AsyncServers(AsyncEngine, config)
        super().__init__(self._servers.first, config.default_scope, config.tables[config.default_scope])
        self._scopes: dict[str, AsyncScope] = {config.default_scope: self}

    def __await__(self) -> Generator[Any, None, Self]:
        """Start the vault: connect, make the tables if asked to, and return the vault itself."""
        return self._start().__await__()

    async def __aenter__(self) -> Self:
        """Start the vault, unless it was awaited before."""
        return self if self._engine.state == "open" else await self._start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the vault."""
        await self.close()

    async def _start(self) -> Self:
        await self._servers.start()
        return self

    @property
    def scope_names(self) -> tuple[str, ...]:
        """The names of all scopes."""
        return self._servers.names

    def get_scope(self, name: str) -> AsyncScope:
        """Return the scope of this name; `ConfigError` names the nearest known one if there is none."""
        if name not in self._scopes:
            engine = self._servers.of(name)
            self._scopes[name] = AsyncScope(engine, name, engine.table_of(name))
        return self._scopes[name]

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncIterator[AsyncUnitOfWork]:
        """Lend a connection of the vault's in a transaction: committed at the end, rolled back by an exception.

        What ``unit.connection`` executes and what ``unit.emit`` stores happen together or not at all; ``audit.emit`` is
        independent of it, so that a denial stays. Errors of the commit are psycopg's. Raises `DriverError` if no
        connection can be had.
        """
        async with self._engine.lent() as connection, connection.transaction():
            yield AsyncUnitOfWork(self._engine, self.name, connection)

    async def flush(self, timeout: float | None = None) -> None:
        """Wait until every async record accepted so far, of all scopes, is in the database.

        Raises `UndeliveredError` if records were lost since the last report, or still wait after ``timeout``
        seconds (default: the option ``timeout``).
        """
        await self._servers.flush(timeout)

    async def close(self, timeout: float | None = None) -> None:
        """Store what is queued within ``timeout`` seconds (default: the option), and let go of everything.

        Raises `UndeliveredError` if records were lost. May be called again, and from several places at once.
        """
        await self._servers.close(timeout)

    def stats(self) -> Stats:
        """Return what the vault has done in this process, and what waits. Reads no database."""
        return self._servers.stats()

    async def healthcheck(self) -> bool:
        """Whether both the write and the read connection answer now; False once closed. Never raises."""
        return await self._servers.healthcheck()

    def __repr__(self) -> str:
        """Show scopes and state."""
        return repr(self._servers)


start_tracevault = AsyncTracevault


# ------------------------------------------------------------------------------------------ blocking


class Scope:
    """Emits into one audit table of a `Tracevault`, and reads from it. Get one by ``get_scope``."""

    def __init__(self, engine: BlockingEngine, name: str, table: str) -> None:
        self._engine = engine
        self.name = name
        self.table = table
        self._place = Place("emit", name, table)
        self._proving = Place("proving an event", name, table)
        self.query = AuditQuery(engine, name, table)

    def emit(
        self,
        event: str | AuditEvent | Mapping[str, Any] | TypedEvent | None = None,
        /,
        *,
        connection: Connection[Any] | Any = None,
        allow_autocommit: bool = False,
        savepoint: bool = False,
        **fields: Unpack[EventFields],
    ) -> Receipt:
        """Store an event; like `AsyncScope.emit`, on blocking connections. Works from any thread."""
        return self._emit(prepare, event, fields, connection, allow_autocommit, savepoint)

    def emit_diff(
        self,
        event: str | Mapping[str, Any] | type[Any] | None = None,
        /,
        *,
        connection: Connection[Any] | Any = None,
        allow_autocommit: bool = False,
        savepoint: bool = False,
        **fields: Unpack[DiffFields],
    ) -> Receipt:
        """Like `emit`, with ``before`` and ``after`` in place of ``data``: stores ``{before, after, diff}``."""
        return self._emit(prepare_diff, event, fields, connection, allow_autocommit, savepoint)

    def emit_many(
        self,
        events: Iterable[str | AuditEvent | Mapping[str, Any] | TypedEvent],
        *,
        connection: Connection[Any] | Any = None,
        allow_autocommit: bool = False,
        savepoint: bool = False,
    ) -> list[Receipt]:
        """Store all ``events`` in one transaction, or none; always synchronous. Receipts come in their order.

        An event with ``before`` or ``after`` is stored as `emit_diff` stores it.
        """
        return self._emit_many(events, connection, allow_autocommit, savepoint)

    def _emit_many(self, events: Any, connection: Any, allow_autocommit: bool, savepoint: bool) -> list[Receipt]:
        self._engine.check_open()
        batch = Batch(events, self._engine.settings)
        if connection is not None:
            batch.prepare()  # before anything is said in the caller's transaction, which a refusal would end
            return _emit_on(self, connection, batch, allow_autocommit, savepoint)
        _check_no_connection(allow_autocommit=allow_autocommit, savepoint=savepoint)
        if batch:
            self._engine.emit_many(self.table, batch, self._place)
        return [Receipt(prepared.id, "database") for prepared in batch]

    def await_sealed(self, id: UUID | str, timeout: float | None = None) -> int:  # noqa: A002
        """Like `AsyncScope.await_sealed`."""
        return self._engine.await_sealed(self.table, id, timeout)

    def prove(self, id: UUID | str) -> EventProof:  # noqa: A002
        """Like `AsyncScope.prove`."""
        from tracevault.flows.prove import prove_event  # noqa: PLC0415 - `import tracevault` need not wait for it

        return self._engine.read(lambda: prove_event(self.table, id), self._proving)

    def verify(self, *, keys: Sequence[str] = (), anchors: Sequence[str] = (), jobs: int = 1) -> Report:
        """Like `AsyncScope.verify`."""
        return self._engine.verify(self.table, keys, anchors, jobs)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until the vault's async records are stored; see `Tracevault.flush`."""
        self._engine.flush(timeout)

    def _emit(
        self,
        prepare_event: Callable[..., Prepared],
        event: Any,
        fields: Mapping[str, Any],
        connection: Any,
        allow_autocommit: bool,
        savepoint: bool,
    ) -> Receipt:
        engine = self._engine
        engine.check_open()
        if connection is not None:
            prepared = prepare_event(event, fields, engine.settings, mode="sync")
            return _emit_on(self, connection, [prepared], allow_autocommit, savepoint)[0]
        if allow_autocommit or savepoint:
            _check_no_connection(allow_autocommit=allow_autocommit, savepoint=savepoint)
        prepared = prepare_event(event, fields, engine.settings)
        where = engine.put_now(self.name, self.table, prepared)
        if where is None:
            where = engine.emit(self.name, self.table, prepared, self._place)
        return Receipt(prepared.id, where)


class UnitOfWork(Scope):
    """A scope whose emits go into one transaction; see `Tracevault.unit_of_work`."""

    def __init__(self, engine: BlockingEngine, name: str, connection: Connection[Any]) -> None:
        super().__init__(engine, name, engine.table_of(name))
        self.connection = connection
        """The connection, for the statements that belong to the same transaction."""

    def get_scope(self, name: str) -> UnitOfWork:
        """Return another scope of the vault, in the same transaction."""
        return UnitOfWork(self._engine, name, self.connection)

    def _emit(
        self,
        prepare_event: Callable[..., Prepared],
        event: Any,
        fields: Mapping[str, Any],
        connection: Any,
        allow_autocommit: bool,
        savepoint: bool,
    ) -> Receipt:
        connection = self.connection if connection is None else connection
        return super()._emit(prepare_event, event, fields, connection, allow_autocommit, savepoint)

    def _emit_many(self, events: Any, connection: Any, allow_autocommit: bool, savepoint: bool) -> list[Receipt]:
        connection = self.connection if connection is None else connection
        return super()._emit_many(events, connection, allow_autocommit, savepoint)


class Tracevault(Scope):
    """An audit log for blocking code: its default scope, with the others and the connections.

    Takes the options of `start_tracevault`, connects at once, and is a context manager.
    """

    _engine: BlockingEngine

    @_takes_options_of(Config)
    def __init__(self, **options: Any) -> None:
        """Check the options, connect, and make the tables if asked to."""
        config = config_from(options)
        self._servers = Servers(BlockingEngine, config)
        super().__init__(self._servers.first, config.default_scope, config.tables[config.default_scope])
        self._scopes: dict[str, Scope] = {config.default_scope: self}
        self._servers.start()

    def __enter__(self) -> Self:
        """Return the vault."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the vault."""
        self.close()

    @property
    def scope_names(self) -> tuple[str, ...]:
        """Like `AsyncTracevault.scope_names`."""
        return self._servers.names

    def get_scope(self, name: str) -> Scope:
        """Return the scope of this name; `ConfigError` names the nearest known one if there is none."""
        if name not in self._scopes:
            engine = self._servers.of(name)
            self._scopes[name] = Scope(engine, name, engine.table_of(name))
        return self._scopes[name]

    @contextmanager
    def unit_of_work(self) -> Iterator[UnitOfWork]:
        """Like `AsyncTracevault.unit_of_work`."""
        with self._engine.lent() as connection, connection.transaction():
            yield UnitOfWork(self._engine, self.name, connection)

    def flush(self, timeout: float | None = None) -> None:
        """Like `AsyncTracevault.flush`."""
        self._servers.flush(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Like `AsyncTracevault.close`."""
        self._servers.close(timeout)

    def stats(self) -> Stats:
        """Like `AsyncTracevault.stats`."""
        return self._servers.stats()

    def healthcheck(self) -> bool:
        """Like `AsyncTracevault.healthcheck`."""
        return self._servers.healthcheck()

    def __repr__(self) -> str:
        """Show scopes and state."""
        return repr(self._servers)


# ------------------------------------------------------------------------------------- without a vault


def verify_export(path: str | os.PathLike[str], *, keys: Sequence[str] = (), anchors: Sequence[str] = ()) -> Report:
    """Verify a file that ``tracevault export --verifiable`` has written; no database is asked.

    ``keys`` and ``anchors`` are those of `AsyncScope.verify`; an anchor that is a directory names the wrong lines.
    Raises `SealError` for a file that is no export, or that cannot be read.
    """
    from tracevault.sealing.offline import verify_file  # noqa: PLC0415 - `import tracevault` need not wait for it

    return verify_file(path, keys=keys, anchors=anchors)
