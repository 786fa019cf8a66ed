"""The middleware, on a request that emits nothing: what every request of an application pays."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.measure import Row, pairs_async
from benchmarks.work import Bench
from tracevault import start_tracevault
from tracevault.integrations.starlette import AuditMiddleware

# Many short pairs: 30 ms each, between which the machine changes little.
REQUESTS = 1_500
PAIRS = 61
# As a browser sends them, through a proxy that adds ids.
HEADERS = [
    (b"host", b"shop.example.com"),
    (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
    (b"accept", b"text/html,application/xhtml+xml"),
    (b"accept-language", b"en"),
    (b"accept-encoding", b"gzip, br"),
    (b"x-correlation-id", b"8c1f1d35-7d6e-4f6d-9a55-1a0e6b8f6d1a"),
    (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    (b"connection", b"keep-alive"),
]


def middleware(bench: Bench) -> Row:
    """Call two applications in process: an empty one, and the same with the middleware."""

    async def empty(_request: Request) -> Response:
        return Response()

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_message: MutableMapping[str, Any]) -> None:
        pass

    def application() -> Starlette:
        return Starlette(routes=[Route("/", empty)])

    async def serve(app: Starlette) -> None:
        for _ in range(REQUESTS):
            scope = {
                "type": "http",
                "http_version": "1.1",
                "method": "GET",
                "path": "/",
                "raw_path": b"/",
                "query_string": b"",
                "root_path": "",
                "scheme": "http",
                "server": ("127.0.0.1", 80),
                "client": ("127.0.0.1", 50_000),
                "headers": list(HEADERS),
            }
            await app(scope, receive, send)

    async def both() -> Row:
        plain, ours = application(), application()
        ours.add_middleware(AuditMiddleware, audit=start_tracevault(**bench.options()))
        seconds = await pairs_async(max(bench.pairs, PAIRS), lambda: serve(ours), lambda: serve(plain))
        added = [ratio - 1 for ratio in seconds.times()]
        name = "time that the middleware adds to a request"
        return Row(name, "an empty Starlette request", added, 0.334, at_most=True, note=seconds.per_second(REQUESTS))

    return asyncio.run(both())
