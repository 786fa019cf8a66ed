"""FastAPI and Starlette: the example over HTTP, and what the middleware does with what comes in."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

import tracevault
from tests.conftest import rows
from tests.integrations.conftest import Start, call
from tracevault import AsyncTracevault, ConfigError, TracevaultError, start_tracevault
from tracevault.integrations.starlette import AuditMiddleware, get_audit

TRACEPARENT = f"00-{'a' * 32}-{'b' * 16}-01"

ROWS = """SELECT event, actor_id, correlation_id, request_id, target_id, data, meta, stored_xid::text
          FROM audit_logs ORDER BY occurred_at, id"""


def test_the_example_over_http(start: Start, ready_dsn: str) -> None:
    shop = start("fastapi", "uvicorn", "app:app", "--port", "{port}")
    answer = shop.http.put(
        "/prices/tea/120", headers={"x-user": "ann", "x-correlation-id": "c-1", "traceparent": TRACEPARENT}
    )
    assert answer.json() == {"was": 100, "is": 120}
    assert answer.headers["x-correlation-id"] == "c-1"
    ((event, actor, correlation, request, target, data, meta, xid),) = rows(ready_dsn, ROWS)
    assert (event, actor, correlation, target) == ("price.changed", "ann", "c-1", "tea")
    assert data == {
        "before": {"price": 100},
        "after": {"price": 120},
        "diff": {"price": {"before": 100, "after": 120}},
    }
    assert meta["ip"] == "127.0.0.1"
    assert meta["user_agent"].startswith("python-httpx/")
    assert len(request) == 32
    # One transaction: that of the change.
    assert rows(ready_dsn, "SELECT xmin::text, price FROM prices") == [(xid, 120)]
    assert rows(ready_dsn, "SELECT trace_id, span_id FROM audit_logs") == [("a" * 32, "b" * 16)]

    assert shop.http.put("/prices/tea/-1", headers={"x-user": "ann"}).status_code == 422
    assert shop.http.put("/prices/tea/1", headers={"x-user": "guest"}).status_code == 403
    assert shop.http.put("/prices/tea/1").status_code == 401
    assert shop.http.post("/admin/reload", headers={"x-user": "bea"}).status_code == 200
    found = [(row[0], row[1], row[5]) for row in rows(ready_dsn, ROWS)[1:]]
    assert found == [
        ("price.denied", "guest", {"outcome": "failure"}),
        (
            "http.request",
            "bea",
            {"method": "POST", "path": "/admin/reload", "route": "/admin/reload", "status": 200, "outcome": "success"},
        ),
    ]
    assert rows(ready_dsn, "SELECT price FROM prices") == [(120,)]


async def test_two_hundred_requests_at_once_do_not_cross(start: Start, ready_dsn: str) -> None:
    shop = start("fastapi", "uvicorn", "app:app", "--port", "{port}", "--log-level", "warning")
    users = [f"user-{number}" for number in range(200)]

    async def visit(user: str) -> list[int]:
        calls = [("PUT", "/prices/tea/7"), ("POST", "/admin/reload"), ("PUT", "/prices/tea/-1"), ("PUT", "/prices/x/1")]
        random.Random(user).shuffle(calls)
        answers = []
        for number, (method, path) in enumerate(calls):
            id_ = f"{user}/{number}"
            status, headers = await call(shop.port, method, path, {"x-user": user, "x-correlation-id": id_})
            assert headers["x-correlation-id"] == id_
            answers.append(status)
        return sorted(answers)

    found = await asyncio.gather(*map(visit, users))
    assert found == [[200, 200, 404, 422]] * len(users), shop.output
    stored = rows(ready_dsn, "SELECT event, actor_id, split_part(correlation_id, '/', 1) FROM audit_logs")
    assert sorted(stored) == sorted(
        (event, user, user) for user in users for event in ("price.changed", "http.request")
    )


class Client:
    """Calls an ASGI application in process."""

    def __init__(self, app: Any) -> None:
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
        )

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.http.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})


def application(audit: AsyncTracevault, **options: Any) -> Starlette:
    def blocking(_request: Request) -> PlainTextResponse:  # in a thread
        tracevault.set_context(actor={"id": "thread", "type": "user"}, correlation_id="from-the-endpoint")
        return PlainTextResponse("")

    async def background(_request: Request) -> PlainTextResponse:
        tracevault.set_context(actor={"id": "first", "type": "user"})
        return PlainTextResponse("", background=BackgroundTask(audit.emit, "later"))

    async def fails(_request: Request) -> PlainTextResponse:
        tracevault.set_context(actor={"id": "ann", "type": "user"})
        raise RuntimeError("no")

    async def own_header(_request: Request) -> PlainTextResponse:
        return PlainTextResponse("", headers={"X-Correlation-Id": "mine"})

    async def unfit(_request: Request) -> PlainTextResponse:
        tracevault.set_context(correlation_id="line\nbreak")
        return PlainTextResponse("")

    async def streams(_request: Request) -> StreamingResponse:
        async def pieces() -> Any:
            yield b"one"
            await audit.emit("streamed")

        return StreamingResponse(pieces())

    async def shows(_request: Request) -> JSONResponse:
        return JSONResponse(tracevault.current_context())

    async def emits(request: Request) -> PlainTextResponse:
        await get_audit(request).emit("seen")
        return PlainTextResponse("")

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await audit.emit("socket.opened")
        await websocket.close()

    async def failed(_request: Request, _error: Exception) -> JSONResponse:
        await audit.emit("request.failed")
        return JSONResponse(tracevault.current_context("actor", "correlation_id"), status_code=500)

    app = Starlette(
        routes=[
            *(
                Route(f"/{endpoint.__name__}", endpoint)
                for endpoint in (blocking, background, fails, own_header, unfit, streams, shows, emits)
            ),
            WebSocketRoute("/socket", socket),
        ],
        exception_handlers={Exception: failed},
    )
    app.add_middleware(AuditMiddleware, audit=audit, **options)
    return app


@pytest.fixture
def serving(ready_dsn: str) -> Callable[..., Any]:
    """A function that opens a vault, and a client for the application with these options of its middleware."""

    @asynccontextmanager
    async def serve(**options: Any) -> AsyncIterator[tuple[AsyncTracevault, Client]]:
        async with start_tracevault(connection_string=ready_dsn, bootstrap={"ensure_schema": False}) as audit:
            yield audit, Client(application(audit, **options))

    return serve


async def test_what_an_endpoint_sets_is_seen_outside(serving: Callable[..., Any], ready_dsn: str) -> None:
    async with serving(audit_requests=["GET"]) as (_audit, client):
        answer = await client.get("/blocking", x_correlation_id="given")
        assert answer.headers["x-correlation-id"] == "from-the-endpoint"
        await client.get("/background")
        await client.get("/streams", x_correlation_id="s")
    found = rows(ready_dsn, "SELECT event, actor_id, correlation_id FROM audit_logs ORDER BY occurred_at, id")
    assert found[0] == ("http.request", "thread", "from-the-endpoint")
    assert [(event, actor) for event, actor, _ in found[1:3]] == [("http.request", "first"), ("later", "first")]
    assert found[1][2] == found[2][2]
    assert found[3:] == [("http.request", None, "s"), ("streamed", None, "s")]


async def test_an_exception_keeps_the_context(serving: Callable[..., Any], ready_dsn: str) -> None:
    async with serving(audit_requests=["/fails"]) as (_audit, client):
        answer = await client.get("/fails", x_correlation_id="c")
        assert answer.status_code == 500
        assert answer.json() == {"actor": {"id": "ann", "type": "user"}, "correlation_id": "c"}
    found = rows(
        ready_dsn, "SELECT event, actor_id, correlation_id, outcome, data->'status' FROM audit_logs ORDER BY id"
    )
    assert found == [("http.request", "ann", "c", "failure", 500), ("request.failed", "ann", "c", None, None)]


async def test_no_answer_goes_out_unrecorded(serving: Callable[..., Any], ready_dsn: str) -> None:
    async with serving(audit_requests=["/own*"]) as (_audit, client):
        assert (await client.get("/own_header")).status_code == 200
        rows(ready_dsn, "DROP TABLE audit_logs")
        assert (await client.get("/own_header")).status_code == 500
        assert (await client.get("/shows")).status_code == 200


async def test_ids_come_in_and_go_out(serving: Callable[..., Any]) -> None:
    async with serving() as (_audit, client):
        kept = await client.get("/shows", x_correlation_id="a-b/c", x_request_id="r", traceparent=TRACEPARENT)
        assert kept.headers["x-correlation-id"] == "a-b/c"
        assert kept.json() == {
            "correlation_id": "a-b/c",
            "request_id": "r",
            "traceparent": TRACEPARENT,
            "meta": kept.json()["meta"],
        }
        for bad in ("", "x" * 129, "two words", "\N{SNOWMAN}".encode().decode("latin-1")):
            made = await client.http.get(
                "/shows", headers=[(b"x-correlation-id", bad.encode("latin-1")), (b"traceparent", b"00-no")]
            )
            assert len(made.headers["x-correlation-id"]) == 32
            assert made.json()["correlation_id"] == made.headers["x-correlation-id"] != made.json()["request_id"]
            assert "traceparent" not in made.json()
        twice = await client.http.get("/shows", headers=[(b"x-correlation-id", b"one"), (b"x-correlation-id", b"two")])
        assert twice.json()["correlation_id"] == twice.headers["x-correlation-id"] == "one"
        assert (await client.get("/own_header", x_correlation_id="c")).headers.get_list("x-correlation-id") == ["mine"]
        assert "x-correlation-id" not in (await client.get("/unfit")).headers


async def test_the_address_is_the_peers_unless_a_trusted_proxy_says_otherwise(serving: Callable[..., Any]) -> None:
    async with serving() as (_audit, client):
        assert (await client.get("/shows", x_forwarded_for="10.9.9.9")).json()["meta"]["ip"] == "127.0.0.1"
    async with serving(trusted_proxies=["127.0.0.0/8"]) as (_audit, client):
        answer = await client.get("/shows", x_forwarded_for="6.6.6.6, 203.0.113.7", user_agent="x" * 1000)
        assert answer.json()["meta"] == {"ip": "203.0.113.7", "user_agent": "x" * 512}


async def test_the_actor_is_asked_for_when_an_event_is_emitted(serving: Callable[..., Any], ready_dsn: str) -> None:
    asked = []

    def actor(connection: HTTPConnection) -> dict[str, str]:
        asked.append(connection.url.path)
        return {"id": connection.headers["x-user"], "type": "user"}

    async with serving(actor=actor, tenant_id=lambda connection: connection.headers.get("x-tenant")) as (_, client):
        await client.get("/own_header", x_user="ann")
        assert asked == []
        await client.get("/emits", x_user="ann", x_tenant="t1")
        await client.get("/emits", x_user="bea")
    assert asked == ["/emits", "/emits"]
    assert rows(ready_dsn, "SELECT actor_id, tenant_id FROM audit_logs ORDER BY id") == [("ann", "t1"), ("bea", None)]


async def test_websockets_have_a_context_and_other_protocols_pass(serving: Callable[..., Any], ready_dsn: str) -> None:
    async with serving() as (audit, _client):
        sent: list[Any] = []
        incoming = iter([{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}])

        async def receive() -> Any:
            return next(incoming)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "websocket",
            "path": "/socket",
            "headers": [(b"x-correlation-id", b"ws")],
            "query_string": b"",
            "client": None,
            "subprotocols": [],
        }
        await application(audit)(scope, receive, send)
        assert sent[0]["type"] == "websocket.accept"
        assert (b"x-correlation-id", b"ws") in sent[0]["headers"]

        passed: list[Any] = []

        async def inner(*arguments: Any) -> None:
            passed.append(arguments)

        lifespan = {"type": "lifespan"}
        await AuditMiddleware(inner, audit)(lifespan, receive, send)
        assert passed == [(lifespan, receive, send)]
        assert tracevault.current_context() == {}
    assert rows(ready_dsn, "SELECT event, correlation_id FROM audit_logs") == [("socket.opened", "ws")]


def test_mistakes_are_named(ready_dsn: str) -> None:
    audit = start_tracevault(connection_string=ready_dsn)
    for options, field in (
        ({"trusted_proxies": ["10.0.0.0/40"]}, "trusted_proxies"),
        ({"trusted_proxies": "10.0.0.0/8"}, "trusted_proxies"),
        ({"audit_requests": "POST"}, "audit_requests"),
        ({"audit_requests": ["post"]}, "audit_requests"),
    ):
        with pytest.raises(ConfigError) as refusal:
            AuditMiddleware(application, audit, **options)
        assert refusal.value.field == field
    with pytest.raises(TracevaultError, match="add_middleware"):
        get_audit(HTTPConnection({"type": "http", "headers": []}))
