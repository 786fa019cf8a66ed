"""The viewer for applications that are no ASGI: in an event loop of its own, in a thread of each process.

The application decides who may see what, in its own thread and with its own request, before the viewer is asked.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
from collections.abc import Callable, Coroutine, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from threading import Lock, Thread
from typing import Any, NamedTuple, TypeVar

from tracevault import AsyncTracevault, TracevaultError, start_tracevault
from tracevault.web import Access, viewer

T = TypeVar("T")

_ACCESS = "tracevault.access"
# Pieces of an answer that wait for the client; an export is as fast as who reads it.
_AHEAD = 8
# Seconds that the vault may take to start, or to stop.
_PATIENCE = 30.0


class Call(NamedTuple):
    """A request to the viewer, as any server has it."""

    method: str
    prefix: str
    """Where the viewer is mounted: ``/audit``."""
    path: str
    """What follows, from its slash on."""
    query: bytes
    headers: Sequence[tuple[str, str]]
    body: bytes
    address: str | None


class Answer:
    """What the viewer answers: a status, headers, and pieces that are made as they are read."""

    def __init__(self, host: _Host, call: Call, access: Access | None) -> None:
        self._host = host
        self._pieces: queue.Queue[Mapping[str, Any] | BaseException | None] = queue.Queue(_AHEAD)
        self._gone = False
        self._done = host.run(self._serve(_scope(call, access), call.body))
        first = self._pieces.get()
        if isinstance(first, BaseException):
            raise first
        if first is None:
            raise TracevaultError("the viewer gave no answer")
        self.status: int = first["status"]
        self.headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in first["headers"]]

    def __iter__(self) -> Iterator[bytes]:
        """Yield the body; raise what went wrong while it was made."""
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            if piece.get("body"):
                yield piece["body"]

    def close(self) -> None:
        """Stop making it: the client is gone, or has read everything."""
        self._gone = True
        self._done.cancel()

    async def _serve(self, scope: dict[str, Any], body: bytes) -> None:
        incoming = iter([{"type": "http.request", "body": body, "more_body": False}])
        is_whole = False

        async def receive() -> MutableMapping[str, Any]:
            message = next(incoming, None)
            if message is None:
                await asyncio.get_running_loop().create_future()  # the client is there until it is not
            return message or {"type": "http.disconnect"}

        async def put(piece: Mapping[str, Any] | BaseException | None) -> None:
            nonlocal is_whole
            if isinstance(piece, Mapping):
                is_whole = piece["type"] == "http.response.body" and not piece.get("more_body", False)
            while not self._gone:
                try:
                    self._pieces.put_nowait(piece)
                except queue.Full:
                    await asyncio.sleep(0.005)
                else:
                    return

        failure: BaseException | None = None
        try:
            await self._host.app(scope, receive, put)
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is read
            failure = error
        # After a whole answer, which was a page that says so, there is nobody left to tell; the viewer has logged it.
        await put(None if is_whole else failure)


class _Host:
    """The event loop of one process, with the vault and the viewer in it."""

    def __init__(self, options: Mapping[str, Any], viewing: Mapping[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="tracevault viewer", daemon=True).start()
        self.audit = self.run(self._start(options)).result(_PATIENCE)
        self.app = viewer(self.audit, authorize=lambda request: request.scope[_ACCESS], **viewing)
        atexit.register(self.close)

    @staticmethod
    async def _start(options: Mapping[str, Any]) -> AsyncTracevault:
        return await start_tracevault(**options)

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the loop, in a copy of the caller's context; to cancel the future cancels it."""
        done: Future[T] = Future()

        def begin() -> None:
            task = self._loop.create_task(work, context=context)
            task.add_done_callback(ended)
            done.add_done_callback(lambda _: done.cancelled() and self._loop.call_soon_threadsafe(task.cancel))

        def ended(task: asyncio.Task[T]) -> None:
            if done.cancelled():
                return
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(task.result())

        context = copy_context()
        self._loop.call_soon_threadsafe(begin)
        return done

    def close(self) -> None:
        """Store what waits, and end the loop."""
        with suppress(Exception):
            self.run(self.audit.close()).result(_PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)


class HostedViewer:
    """The viewer of a vault made of ``options()``; started with the first request in each process.

    ``viewing`` are the other arguments of `tracevault.web.viewer`: ``title``, ``scopes``, ``audit_reads``.
    """

    def __init__(self, options: Callable[[], Mapping[str, Any]], **viewing: Any) -> None:
        self._options = options
        self._viewing = viewing
        self._hosts: dict[int, _Host] = {}
        self._lock = Lock()

    def answer(self, call: Call, access: Access | None) -> Answer:
        """Return the answer to a request of somebody who may see ``access``; None: nothing."""
        return Answer(self._host(), call, access)

    def _host(self) -> _Host:
        with self._lock:
            pid = os.getpid()
            if pid not in self._hosts:
                self._hosts[pid] = _Host(self._options(), self._viewing)
            return self._hosts[pid]


def _scope(call: Call, access: Access | None) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.prefix + call.path,
        "raw_path": (call.prefix + call.path).encode(),
        "root_path": call.prefix,
        "query_string": call.query,
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in call.headers],
        "client": None if call.address is None else (call.address, 0),
        "server": None,
        _ACCESS: access,
    }
