"""FastAPI and Starlette: the example over HTTP, and what the middleware does with what comes in."""

from __future__ import annotations

from tests.conftest import rows
from tests.integrations.conftest import Start

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
