"""Both vaults behind one blocking face, so that one test covers both."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Any

import psycopg

from tracevault import AsyncQuery, AsyncTail, AsyncTracevault, AuditQuery, Tracevault, TracevaultError, start_tracevault

OpenVault = Callable[..., "Face"]


class Face:
    """One vault, blocking or async, with blocking methods of the same names."""

    def __init__(self, kind: str, vault: Any, runner: asyncio.Runner | None) -> None:
        self.kind = kind
        self.vault = vault
        self._runner = runner

    def _call(self, target: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
        result = getattr(target, name)(*args, **kwargs)
        if isinstance(result, (AsyncQuery, AuditQuery)):
            return Face(self.kind, result, self._runner)
        if isinstance(result, AsyncTail):
            return FacedTail(result, self)
        if hasattr(result, "__aiter__"):
            return self._iterated(result)
        if self._runner is None or not inspect.iscoroutine(result):
            return result
        return self._runner.run(result, context=copy_context())  # of the caller, as one that awaits has

    def _iterated(self, items: Any) -> Iterator[Any]:
        assert self._runner is not None
        while True:
            try:
                yield self._runner.run(_await(anext(items)))
            except StopAsyncIteration:
                return

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):  # what printers and copiers ask an object for
            raise AttributeError(name)
        return lambda *args, **kwargs: self._call(self.vault, name, *args, **kwargs)

    def get_scope(self, name: str) -> Face:
        return Face(self.kind, self.vault.get_scope(name), self._runner)

    @property
    def query(self) -> Face:
        return Face(self.kind, self.vault.query, self._runner)

    def connect(self, dsn: str, **kwargs: Any) -> Any:
        """A caller's connection of the vault's kind, behind a face of its own."""
        if self._runner is None:
            return Face(self.kind, psycopg.connect(dsn, **kwargs), None)
        connecting = psycopg.AsyncConnection.connect(dsn, **kwargs)
        return Face(self.kind, self._runner.run(_await(connecting)), self._runner)

    def close_quietly(self) -> None:
        with suppress(TracevaultError):
            self.close()


class FacedTail:
    """An `AsyncTail`, as a blocking iterator."""

    def __init__(self, tail: AsyncTail, face: Face) -> None:
        self._tail = tail
        self._face = face
        self._rows = face._iterated(tail)
        self.start = lambda: face._call(tail, "start")

    @property
    def position(self) -> str | None:
        return self._tail.position

    def __iter__(self) -> Iterator[Any]:
        self._rows = self._face._iterated(aiter(self._tail))
        return self._rows

    def __next__(self) -> Any:
        return next(self._rows)


async def _await(awaitable: Any) -> Any:
    return await awaitable


@contextmanager
def opener(kind: str, opened: list[Face]) -> Iterator[OpenVault]:
    """Yield a function that opens a vault of ``kind`` with the options given, and notes it in ``opened``."""
    if kind == "blocking":

        def open_blocking(**options: Any) -> Face:
            opened.append(Face(kind, Tracevault(**options), None))
            return opened[-1]

        yield open_blocking
        return

    with asyncio.Runner() as runner:

        def open_async(**options: Any) -> Face:
            vault: AsyncTracevault = runner.run(_await(start_tracevault(**options)))
            opened.append(Face(kind, vault, runner))
            return opened[-1]

        yield open_async
