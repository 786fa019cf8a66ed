"""Starlette and FastAPI: a context for each request, and dependencies for the vault and a transaction.

Pure ASGI, so that what an endpoint sets is seen outside of it, and nothing is buffered.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any

from tracevault import (
    AsyncTracevault,
    AsyncUnitOfWork,
    ContextFields,
    TracevaultError,
    current_context,
)
from tracevault.events.context import Holder, current
from tracevault.integrations.request import REQUEST_EVENT, is_id, new_id, request_data, request_reader, selection

try:
    from starlette.requests import HTTPConnection
except ImportError as error:
    message = 'this needs Starlette: pip install "tracevault[starlette]"'
    raise ImportError(message) from error

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Of = Callable[[HTTPConnection], Any]

_log = logging.getLogger("tracevault")
_KEY = "tracevault"
_HEADER = b"x-correlation-id"
_BEGINS = frozenset({"http.response.start", "websocket.accept"})


class AuditMiddleware:
    """Opens a `tracevault.context` for each HTTP request and websocket, and answers with its correlation id.

    ``actor`` and ``tenant_id`` are functions of the connection, called when an event is emitted: who is logged in is
    known later than the request. ``trusted_proxies``: see `request_reader`; ``meta.ip`` is the client's address.
    ``audit_requests`` are methods (``"POST"``) and paths (``"/admin/*"``, a ``*`` at the end stands for anything):
    each such request is an event ``http.request``, stored before its answer begins, so that no answer goes out
    unrecorded.

    After an exception the context stays in the task that served the request, for the handlers outside of this.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        audit: AsyncTracevault,
        *,
        actor: Of | None = None,
        tenant_id: Of | None = None,
        trusted_proxies: Iterable[str] = (),
        audit_requests: Iterable[str] = (),
    ) -> None:
        self.app = app
        self.audit = audit
        self._read = request_reader(trusted_proxies)
        self._actor = actor
        self._tenant_id = tenant_id
        self.selected = selection(audit_requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        kind = scope["type"]
        if kind != "http" and kind != "websocket":  # noqa: PLR1714 - this is run for every request
            await self.app(scope, receive, send)
            return
        scope[_KEY] = self.audit
        served = _Served(self, scope, send)
        token = current.set(served)
        try:
            await self.app(scope, receive, served.send)
        except Exception:
            if not served.begun and served.is_audited():
                await served.record_failure()
            raise
        current.reset(token)

    def fields_of(self, scope: Scope, id_: bytes) -> ContextFields:
        """Return what a connection says of itself."""
        peer = scope.get("client")
        headers = dict(reversed(scope["headers"]))  # of a header that comes twice, the first counts
        fields = self._read(partial(_header, headers), peer[0] if peer else None, id_.decode())
        connection = HTTPConnection(scope)
        if self._actor is not None:
            fields["actor"] = partial(self._actor, connection)
        if self._tenant_id is not None:
            fields["tenant_id"] = partial(self._tenant_id, connection)
        return fields


class _Served(Holder):
    """A connection that is served: its context, and the `send` that its answer goes through."""

    __slots__ = ("_middleware", "_scope", "_send", "begun", "id")

    def __init__(self, middleware: AuditMiddleware, scope: Scope, send: Send) -> None:
        self._middleware = middleware
        self._scope = scope
        self._send = send
        self.begun = False
        for name, value in scope["headers"]:
            if name == _HEADER:
                self.id = value if is_id(value) else new_id()
                return
        self.id = new_id()

    def load(self) -> ContextFields:
        return self._middleware.fields_of(self._scope, self.id)

    def send(self, message: Message) -> Awaitable[None]:
        if not self.begun and message["type"] in _BEGINS:
            self.begun = True
            self._answer(message)
            if self.is_audited():
                return self._send_recorded(message)
        return self._send(message)

    def is_audited(self) -> bool:
        selected, scope = self._middleware.selected, self._scope
        return selected is not None and scope["type"] == "http" and selected(scope["method"], scope["path"])

    async def record_failure(self) -> None:
        try:
            await self._record(500)
        except TracevaultError:
            _log.exception("that a request failed could not be recorded")  # the failure itself says more

    async def _send_recorded(self, message: Message) -> None:
        await self._record(message["status"])
        await self._send(message)

    async def _record(self, status: int) -> None:
        scope = self._scope
        route = getattr(scope.get("route"), "path", None)
        data = request_data(scope["method"], scope["path"], route, status)
        await self._middleware.audit.emit(REQUEST_EVENT, data=data)

    def _answer(self, message: Message) -> None:
        """Add the header to an answer, unless the application did so itself."""
        id_ = self.id
        if self.fields is not None:  # and the application may have set another id
            id_ = current_context("correlation_id").get("correlation_id", "").encode()
            if not is_id(id_):
                return
        headers = message.get("headers", ())
        for name, _ in headers:
            if name == _HEADER:
                return
        message["headers"] = [*headers, (_HEADER, id_)]


def get_audit(connection: HTTPConnection) -> AsyncTracevault:
    """Return the vault of the middleware: a dependency for FastAPI, a function for Starlette."""
    try:
        return connection.scope[_KEY]  # type: ignore[no-any-return]
    except KeyError:
        missing = True
    assert missing
    raise TracevaultError("the application has no AuditMiddleware: app.add_middleware(AuditMiddleware, audit=audit)")


async def get_unit_of_work(connection: HTTPConnection) -> AsyncIterator[AsyncUnitOfWork]:
    """Yield the request's transaction: a dependency for FastAPI; `AsyncTracevault.unit_of_work` has the rules.

    It is committed when the endpoint returns and rolled back when it raises. FastAPI from 0.118 on ends dependencies
    after the answer has been sent, unless told otherwise: ``Depends(get_unit_of_work, scope="function")``.
    """
    async with get_audit(connection).unit_of_work() as unit:
        yield unit


def _header(headers: Mapping[bytes, bytes], name: str) -> str | None:
    value = headers.get(name.encode())
    return None if value is None else value.decode("latin-1")
