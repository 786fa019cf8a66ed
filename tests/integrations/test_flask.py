"""Flask: the example over HTTP, and what the extension does with requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask, jsonify, request, stream_with_context

import tracevault
from tests.conftest import rows
from tests.integrations.conftest import Start
from tracevault import ConfigError, TracevaultError
from tracevault.integrations.flask import Audit
from tracevault.web import Access

ROWS = "SELECT event, actor_id, correlation_id FROM audit_logs ORDER BY occurred_at, id"


def test_the_example_over_http(start: Start, ready_dsn: str) -> None:
    shop = start("flask", "flask", "run", "--port", "{port}")
    ids = {"x-correlation-id": "c-1", "x-user": "ann"}
    answer = shop.http.put("/prices/tea/120", headers=ids)
    assert answer.json() == {"was": 100}
    assert answer.headers["x-correlation-id"] == "c-1"
    assert shop.http.put("/prices/tea/-1", headers=ids).status_code == 422
    assert shop.http.put("/prices/tea/1", headers={**ids, "x-user": "guest"}).status_code == 403
    assert shop.http.post("/admin/reload", headers=ids).text == "reloaded"
    found = rows(ready_dsn, "SELECT event, actor_id, correlation_id, data FROM audit_logs ORDER BY occurred_at, id")
    diff = {"price": {"before": 100, "after": 120}}
    assert found == [
        ("price.changed", "ann", "c-1", {"before": {"price": 100}, "after": {"price": 120}, "diff": diff}),
        ("price.denied", "guest", "c-1", {"outcome": "failure"}),
        (
            "http.request",
            "ann",
            "c-1",
            {"method": "POST", "path": "/admin/reload", "route": "/admin/reload", "status": 200, "outcome": "success"},
        ),
    ]
    xids = rows(ready_dsn, "SELECT stored_xid::text FROM audit_logs WHERE event = 'price.changed'")
    assert xids == rows(ready_dsn, "SELECT xmin::text FROM prices")

    assert shop.http.get("/audit/").status_code == 403
    auditor = {"x-user": "auditor", "x-correlation-id": "look"}
    page = shop.http.get("/audit/", headers=auditor, follow_redirects=True)
    assert page.status_code == 200
    assert "price.denied" in page.text
    sheet = next(piece for piece in page.text.split('"') if piece.endswith(".css"))
    assert sheet.startswith("/audit/static/")
    assert shop.http.get(sheet, headers=auditor).headers["content-type"].startswith("text/css")
    exported = shop.http.get("/audit/s/default/export?format=jsonl", headers=auditor)
    assert exported.status_code == 200, exported.text
    assert exported.text.count("\n") >= 3
    assert shop.http.get("/audit/s/no-such", headers=auditor).status_code == 404
    looks = shop.await_rows(
        ready_dsn, "SELECT actor_id, correlation_id FROM audit_logs WHERE event LIKE 'audit\\_log.%%'", count=2
    )
    assert set(looks) == {("auditor", "look")}


@pytest.fixture
def make(ready_dsn: str) -> Iterator[Callable[..., tuple[Flask, Audit]]]:
    """A function that makes an application of these options."""
    made: list[Flask] = []

    def make_app(**options: Any) -> tuple[Flask, Audit]:
        app = Flask("site")
        app.config["TRACEVAULT"] = {"connection_string": ready_dsn, "bootstrap": {"ensure_schema": False}}
        audit = Audit(app, **options)
        made.append(app)

        @app.errorhandler(500)
        def failed(_error: Exception) -> tuple[str, int]:
            audit.emit("failed")
            return "failed", 500

        @app.teardown_request
        def torn_down(_error: BaseException | None) -> None:
            if request.path == "/torn":
                audit.emit("torn down")

        @app.get("/fails")
        def fails() -> str:
            raise RuntimeError("no")

        @app.get("/sets")
        def sets() -> str:
            tracevault.set_context(correlation_id="mine", actor={"id": "x", "type": "service"})
            audit.emit("set")
            return ""

        @app.get("/streams")
        def streams() -> Any:
            def pieces() -> Iterator[str]:
                yield "one"
                audit.emit("streamed", data={"path": request.path})
                yield "two"

            return app.response_class(stream_with_context(pieces()))

        @app.get("/torn")
        @app.get("/shows/<int:number>")
        def shows(number: int = 0) -> Any:
            return jsonify(tracevault.current_context())

        @app.get("/emits/<user>")
        def emits(user: str) -> str:
            tracevault.set_context(actor={"id": user, "type": "user"})
            audit.emit("emitted", data={"user": user})
            return ""

        return app, audit

    yield make_app
    for app in made:
        app.extensions["tracevault"].close()


def test_requests_have_a_context(make: Callable[..., tuple[Flask, Audit]], ready_dsn: str) -> None:
    client = make()[0].test_client()
    ids = {"x-correlation-id": "c"}
    assert client.get("/fails", headers=ids).status_code == 500
    assert client.get("/sets", headers=ids).headers.getlist("X-Correlation-Id") == ["mine"]
    assert client.get("/streams", headers=ids).text == "onetwo"
    client.get("/torn", headers=ids)
    assert rows(ready_dsn, ROWS) == [
        ("failed", None, "c"),
        ("set", "x", "mine"),
        ("streamed", None, "c"),
        ("torn down", None, "c"),
    ]
    assert tracevault.current_context() == {}
    made = client.get("/shows/1", headers={"x-correlation-id": "two words"})
    assert len(made.headers["X-Correlation-Id"]) == 32
    assert made.json is not None
    assert made.json["correlation_id"] == made.headers["X-Correlation-Id"]
    assert made.json["meta"]["ip"] == "127.0.0.1"


def test_requests_that_are_audited(make: Callable[..., tuple[Flask, Audit]], ready_dsn: str) -> None:
    app, _ = make(audit_requests=["/shows/*"], actor=lambda: {"id": request.path, "type": "path"})
    client = app.test_client()
    assert client.get("/shows/7").status_code == 200
    assert client.get("/shows/x").status_code == 404
    assert rows(ready_dsn, "SELECT actor_id, outcome, data->'route', data->'status' FROM audit_logs ORDER BY id") == [
        ("/shows/7", "success", "/shows/<int:number>", 200),
        ("/shows/x", "failure", None, 404),
    ]
    rows(ready_dsn, "DROP TABLE audit_logs")
    with pytest.raises(TracevaultError):  # no answer goes out unrecorded
        client.get("/shows/7")


def test_many_threads_do_not_cross(make: Callable[..., tuple[Flask, Audit]], ready_dsn: str) -> None:
    app, _ = make()

    def visit(number: int) -> None:
        assert app.test_client().get(f"/emits/user-{number}").status_code == 200

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(visit, range(300)))
    found = rows(ready_dsn, "SELECT actor_id, data->>'user' FROM audit_logs")
    assert len(found) == 300
    assert all(actor == user for actor, user in found)


def test_mistakes_are_named(ready_dsn: str, make: Callable[..., tuple[Flask, Audit]]) -> None:
    app = Flask("site")
    with pytest.raises(ConfigError, match="TRACEVAULT"):
        Audit(app)
    app.config["TRACEVAULT"] = {"conection_string": "x"}
    with pytest.raises(ConfigError, match="did you mean `connection_string`"):
        Audit(app)
    with app.app_context(), pytest.raises(TracevaultError, match="init_app"):
        Audit().emit("one")
    other, audit = make()
    with other.app_context(), pytest.raises(AttributeError):
        audit.no_such_thing  # noqa: B018


def test_the_viewer_lets_nobody_in_by_an_error(make: Callable[..., tuple[Flask, Audit]]) -> None:
    app, audit = make()

    def authorize() -> Access:
        raise KeyError("user")

    audit.mount_viewer(app, "/log", authorize)
    assert app.test_client().get("/log/").status_code == 403
