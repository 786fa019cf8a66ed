"""The viewer for one's own machine: on loopback alone, behind a token that works once."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

_COOKIE = "tracevault-session"


class LocalGate:
    """Lets in who has the cookie that the token was exchanged for, and asks for one of ``hosts``.

    A page of another site can send requests to this machine, but it neither knows the token nor gets the cookie; that
    the host is checked keeps out names that were made to point here.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = frozenset(hosts)
        self.token = secrets.token_urlsafe(24)
        self._session = secrets.token_urlsafe(32)
        self._used = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = self._answer(Request(scope))
        await (self._app if answer is None else answer)(scope, receive, send)

    def _answer(self, request: Request) -> Response | None:
        headers = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        if request.headers.get("host", "").lower() not in self._hosts:
            return PlainTextResponse("This viewer answers to its own address alone.", 403, headers)
        given = request.query_params.get("token")
        if given is not None and not self._used and hmac.compare_digest(given.encode(), self.token.encode()):
            self._used = True
            welcome = RedirectResponse("/", 303, headers)
            welcome.set_cookie(_COOKIE, self._session, httponly=True, samesite="strict")
            return welcome
        if hmac.compare_digest(request.cookies.get(_COOKIE, "").encode(), self._session.encode()):
            return None
        why = "The address with the token works once. Start `tracevault serve` again for another one."
        return PlainTextResponse(why, 403, headers)
