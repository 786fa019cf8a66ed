"""`viewer`: the routes, and the headers that every answer has."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tracevault import AsyncTracevault, ConfigError, DriverError, TracevaultError
from tracevault.web.access import Authorize, Guard
from tracevault.web.pages import Pages

_log = logging.getLogger("tracevault")

_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_STATIC = {"viewer.css": "text/css", "viewer.js": "text/javascript", "icon.svg": "image/svg+xml"}
_FOR_EVER = "public, max-age=31536000, immutable"


class _Headers:
    """Puts the same headers on every answer, also on errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["X-Frame-Options"] = "DENY"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cross-Origin-Opener-Policy"] = "same-origin"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, sending)


def viewer(
    audit: AsyncTracevault,
    *,
    authorize: Authorize,
    audit_reads: bool = True,
    title: str = "Audit log",
    scopes: Sequence[str] | None = None,
) -> ASGIApp:
    """Return an ASGI app that shows the log of ``audit``, to be mounted under any prefix.

    ``authorize(request)``, a function or a coroutine function, returns `Access`, or None for somebody who may see
    nothing; what it raises denies as well. It is asked at every request. Looks at the log and exports from it are
    events of the log themselves, unless ``audit_reads`` is False. ``scopes`` are the vault's that are shown; default:
    all. Raises `ConfigError`.
    """
    if not isinstance(audit, AsyncTracevault):
        raise ConfigError("`audit` must be a vault of start_tracevault: the viewer is an async app", field="audit")
    if not callable(authorize):
        raise ConfigError(
            "`authorize` must be a function of the request: without it nobody may see the log", field="authorize"
        )
    static = {name: files("tracevault.web").joinpath("static", name).read_bytes() for name in _STATIC}
    names = {name: f"{hashlib.sha256(content).hexdigest()[:16]}/{name}" for name, content in static.items()}
    guard = Guard(audit, audit.scope_names if scopes is None else scopes, authorize, audit_reads=audit_reads)
    pages = Pages(guard, title, names)

    async def send_static(request: Request) -> Response:
        name = request.path_params["name"]
        if names.get(name) != f"{request.path_params['digest']}/{name}":
            raise HTTPException(404, "There is no such file.")
        return Response(static[name], media_type=_STATIC[name], headers={"Cache-Control": _FOR_EVER})

    async def failed(request: Request, error: Exception) -> Response:
        status, why = _told(error)
        if status >= 500:
            _log.error("a page of the viewer could not be made", exc_info=error)
        return await pages.error(request, status, why)

    handlers: dict[Any, Any] = dict.fromkeys((HTTPException, TracevaultError, Exception), failed)
    app = Starlette(
        routes=[
            Route("/", pages.home),
            Route("/theme", pages.theme, methods=["POST"]),
            Route("/static/{digest}/{name}", send_static),
            Route("/s/{scope}", pages.events),
            Route("/s/{scope}/new", pages.new),
            Route("/s/{scope}/keys", pages.keys),
            Route("/s/{scope}/export", pages.export),
            Route("/s/{scope}/actor", pages.actor),
            Route("/s/{scope}/target", pages.target),
            Route("/s/{scope}/trace", pages.trace),
            Route("/s/{scope}/events/{id}", pages.event),
            Route("/s/{scope}/events/{id}/raw", pages.raw),
        ],
        exception_handlers=handlers,
    )
    return _Headers(app)  # around all of it, or an answer to an error would lack them


def _told(error: Exception) -> tuple[int, str]:
    """Return the status and what is said of an error: of the database's no more than that it is away."""
    if isinstance(error, HTTPException):
        return error.status_code, error.detail
    if isinstance(error, DriverError):
        return 503, "The database could not answer. Try again, or narrow the search."
    return 500, "Something went wrong. The server's log says what."
