"""Engines that keep events in memory, for tests: everything happens as ever, up to where a database would be asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn, Protocol

from tracevault.config import Config
from tracevault.engine import AsyncEngine, BlockingEngine, Stored
from tracevault.errors import TracevaultError
from tracevault.events.prepare import Prepared
from tracevault.postgres.failures import Place
from tracevault.writer.stats import Counters, Stats


class Keeper(Protocol):
    """What keeps the events."""

    def keep(self, scope: str, prepared: Prepared, stored: Stored) -> None:
        """Keep one."""


Current = Callable[[], Keeper]


def _no_database(what: str) -> NoReturn:
    raise TracevaultError(f"{what}: this vault is in memory, for tests; see what was emitted in `audit_log.events`")


class MemoryConnection:
    """Stands in for a connection of a unit of work: its events are kept when the transaction ends well."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Prepared]] = []

    def __getattr__(self, name: str) -> Any:
        """Refuse whatever needs a database."""
        if name.startswith("_"):
            raise AttributeError(name)
        return _no_database(f"`connection.{name}` needs a database")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Begin a transaction."""
        yield


class AsyncMemoryConnection(MemoryConnection):
    """Like `MemoryConnection`, of an async vault."""

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:  # type: ignore[override]
        """Begin a transaction."""
        yield


class _Memory:
    """What both engines do with events instead of storing them."""

    config: Config
    tables: dict[str, str]
    state: Any
    check_open: Callable[[], None]
    tell: Any

    def __init__(self, config: Config, current: Current) -> None:
        super().__init__(config)  # type: ignore[call-arg] # the engine's
        self._current = current
        self._counters = Counters()

    def put_now(self, scope: str, table: str, prepared: Prepared) -> Stored | None:
        if prepared.mode != "async":
            return None
        self._keep(scope, [prepared], "memory")
        return "memory"

    def emit_on(self, connection: Any, table: str, batch: Sequence[Prepared], place: Place, **_how: bool) -> Stored:
        scope = place.scope or self.config.default_scope
        if isinstance(connection, MemoryConnection):
            connection.events += [(scope, prepared) for prepared in batch]
        else:  # of a database that the test has; whether it commits is not known here
            self._keep(scope, batch, "transaction")
        return "transaction"

    async def emit_on_async(
        self, connection: Any, table: str, batch: Sequence[Prepared], place: Place, **how: bool
    ) -> Stored:
        return self.emit_on(connection, table, batch, place, **how)

    def stats(self) -> Stats:
        return Stats(emitted=self._counters.count("emitted"), delivered=self._counters.count("delivered"))

    def verify(self, *_: Any, **__: Any) -> NoReturn:
        _no_database("nothing can be verified")

    def _keep(self, scope: str, batch: Sequence[Prepared], stored: Stored) -> None:
        keeper = self._current()
        for prepared in batch:
            keeper.keep(scope, prepared, stored)
        self._counters.add(emitted=len(batch), delivered=len(batch))
        self.tell(batch, "transaction" if stored == "transaction" else "database")

    def _committed(self, connection: MemoryConnection) -> None:
        for scope, prepared in connection.events:
            self._keep(scope, [prepared], "transaction")


class AsyncMemoryEngine(_Memory, AsyncEngine):
    """An `AsyncEngine` without a database. It belongs to no event loop."""

    async def start(self) -> None:
        self.state = "open"

    async def emit(self, scope: str, table: str, prepared: Prepared, place: Place) -> Stored:
        self._keep(scope, [prepared], "database")
        return "database"

    async def emit_many(self, table: str, batch: Sequence[Prepared], place: Place) -> None:
        self._keep(place.scope or self.config.default_scope, list(batch), "database")

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[Any]:
        self.check_open()
        connection = AsyncMemoryConnection()
        yield connection
        self._committed(connection)

    async def read(self, *_: Any, **__: Any) -> NoReturn:
        _no_database("nothing can be read")

    async def stream(self, *_: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        _no_database("nothing can be read")
        yield

    def listener(self, *_: Any) -> NoReturn:
        _no_database("nothing can be followed")

    async def await_sealed(self, *_: Any) -> int:
        _no_database("nothing is sealed")

    async def flush(self, timeout: float | None) -> None:
        self.check_open()

    async def healthcheck(self) -> bool:
        return bool(self.state == "open")

    async def close(self, timeout: float | None) -> None:
        self.state = "closed"


class BlockingMemoryEngine(_Memory, BlockingEngine):
    """A `BlockingEngine` without a database."""

    def start(self) -> None:
        self.state = "open"

    def emit(self, scope: str, table: str, prepared: Prepared, place: Place) -> Stored:
        self._keep(scope, [prepared], "database")
        return "database"

    def emit_many(self, table: str, batch: Sequence[Prepared], place: Place) -> None:
        self._keep(place.scope or self.config.default_scope, list(batch), "database")

    @contextmanager
    def lent(self) -> Iterator[Any]:
        self.check_open()
        connection = MemoryConnection()
        yield connection
        self._committed(connection)

    def read(self, *_: Any, **__: Any) -> NoReturn:
        _no_database("nothing can be read")

    def stream(self, *_: Any) -> NoReturn:
        _no_database("nothing can be read")

    def listener(self, *_: Any) -> NoReturn:
        _no_database("nothing can be followed")

    def await_sealed(self, *_: Any) -> int:
        _no_database("nothing is sealed")

    def flush(self, timeout: float | None) -> None:
        self.check_open()

    def healthcheck(self) -> bool:
        return bool(self.state == "open")

    def close(self, timeout: float | None) -> None:
        self.state = "closed"
