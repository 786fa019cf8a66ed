"""The servers of one vault: an engine for each, which have nothing in common that could fail for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any, Generic, TypeVar

from tracevault.config import Config
from tracevault.engine import AsyncEngine, BlockingEngine
from tracevault.errors import ConfigError, UndeliveredError
from tracevault.events.rules import nearest
from tracevault.writer.stats import Stats

E = TypeVar("E", AsyncEngine, BlockingEngine)
T = TypeVar("T")


class _Servers(Generic[E]):
    """The engines; the first one is that of the default scope."""

    def __init__(self, make: Callable[[Config], E], config: Config) -> None:
        self.engines: list[E] = [make(one) for one in config.servers]
        self.names = tuple(config.tables)
        for engine in self.engines:
            engine.elsewhere = frozenset(self.names) - set(engine.tables)

    @property
    def first(self) -> E:
        """The engine of the default scope."""
        return self.engines[0]

    def of(self, scope: str) -> E:
        """Return the engine of a scope; `ConfigError` names the nearest known one if there is none."""
        for engine in self.engines:
            if scope in engine.tables:
                return engine
        raise ConfigError(f"`{scope}` is not a scope of this vault; {nearest(scope, self.names)}", field="scopes")

    def stats(self) -> Stats:
        """Return the counters of all of them."""
        return added(engine.stats() for engine in self.engines)

    def _check_reached(self) -> None:
        """Raise the first one's error where no server was reached."""
        unreached = [engine.unreached for engine in self.engines if engine.unreached is not None]
        if len(unreached) == len(self.engines):
            raise unreached[0]

    def __repr__(self) -> str:
        """Show scopes and state; no connection string, which may hold a password."""
        kind = "AsyncTracevault" if isinstance(self.first, AsyncEngine) else "Tracevault"
        return f"<{kind} {self.first.state}, scopes: {', '.join(self.names)}>"


class AsyncServers(_Servers[AsyncEngine]):
    """Those of a vault for asyncio."""

    async def start(self) -> None:
        """Start all of them; where one server cannot be reached the others go on, unless it is the only one."""
        started: list[AsyncEngine] = []
        try:
            for engine in self.engines:
                await engine.start()
                started.append(engine)
            self._check_reached()
        except BaseException:
            await asyncio.gather(*(engine.close(0.0) for engine in started), return_exceptions=True)
            raise

    async def flush(self, timeout: float | None) -> None:
        """Flush all of them at once."""
        await self._together(lambda engine: engine.flush(timeout))

    async def close(self, timeout: float | None) -> None:
        """Close all of them at once."""
        await self._together(lambda engine: engine.close(timeout))

    async def healthcheck(self) -> bool:
        """Whether all of them answer."""
        return all(await self._together(lambda engine: engine.healthcheck()))

    async def _together(self, work: Callable[[AsyncEngine], Awaitable[T]]) -> list[T]:
        if len(self.engines) == 1:
            return [await work(self.first)]
        return _all(await asyncio.gather(*(work(engine) for engine in self.engines), return_exceptions=True))


class Servers(_Servers[BlockingEngine]):
    """Those of a blocking vault."""

    def start(self) -> None:
        """Start all of them; where one server cannot be reached the others go on, unless it is the only one."""
        started: list[BlockingEngine] = []
        try:
            for engine in self.engines:
                engine.start()
                started.append(engine)
            self._check_reached()
        except BaseException:
            for engine in started:
                engine.close(0.0)
            raise

    def flush(self, timeout: float | None) -> None:
        """Flush all of them at once."""
        self._together(lambda engine: engine.flush(timeout))

    def close(self, timeout: float | None) -> None:
        """Close all of them at once."""
        self._together(lambda engine: engine.close(timeout))

    def healthcheck(self) -> bool:
        """Whether all of them answer."""
        return all(self._together(lambda engine: engine.healthcheck()))

    def _together(self, work: Callable[[BlockingEngine], T]) -> list[T]:
        if len(self.engines) == 1:
            return [work(self.first)]

        def tried(engine: BlockingEngine) -> T | BaseException:
            try:
                return work(engine)
            except Exception as error:  # noqa: BLE001 - the others are heard first
                return error

        with ThreadPoolExecutor(len(self.engines), "tracevault-servers") as pool:
            try:
                waiting = [pool.submit(tried, engine) for engine in self.engines]
            except RuntimeError:  # the interpreter ends, and starts no more threads
                return _all([tried(engine) for engine in self.engines])
            return _all([each.result() for each in waiting])


def added(several: Iterable[Stats]) -> Stats:
    """Return the sum of counters; of ages the greatest, and the lanes of all."""
    found = list(several)
    if len(found) == 1:
        return found[0]
    values: dict[str, Any] = {}
    for field in fields(Stats):
        each = [getattr(one, field.name) for one in found]
        match field.name:
            case "lanes":
                values["lanes"] = {scope: state for lanes in each for scope, state in lanes.items()}
            case "oldest_seconds":
                values["oldest_seconds"] = max(each)
            case name:
                values[name] = sum(each)
    return Stats(**values)


def _all(found: Sequence[T | BaseException]) -> list[T]:
    """Return what all of them returned; raise what one raised, and what is undelivered as one error."""
    errors = list(_errors(found))
    undelivered = [error for error in errors if isinstance(error, UndeliveredError)]
    for error in errors:
        if error not in undelivered:
            raise error
    if len(undelivered) == 1:
        raise undelivered[0]
    if undelivered:
        raise UndeliveredError(
            "; ".join(map(str, undelivered)),
            lost=sum(error.lost for error in undelivered),
            pending=sum(error.pending for error in undelivered),
            spooled=sum(error.spooled for error in undelivered),
        )
    return [value for value in found if not isinstance(value, BaseException)]


def _errors(found: Sequence[T | BaseException]) -> Iterator[BaseException]:
    for value in found:
        if isinstance(value, BaseException):
            yield value
