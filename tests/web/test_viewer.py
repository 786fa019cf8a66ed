"""The viewer as an ASGI app: who sees what, what is escaped, and what is said when something is wrong."""

from __future__ import annotations

import asyncio
import csv
import io
import itertools
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from tests.conftest import rows
from tracevault import AsyncTracevault, ConfigError, Tracevault, start_tracevault

httpx = pytest.importorskip("httpx", reason="a development dependency")
pytest.importorskip("starlette", reason='needs the extra "web"')

from starlette.applications import Starlette  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.routing import Mount  # noqa: E402

from tests.rows import fill  # noqa: E402
from tests.sealed import Sealed  # noqa: E402
from tracevault.web import Access, viewer  # noqa: E402
from tracevault.web.access import EXPORTED, VIEWED  # noqa: E402

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\x1b[31m\u202e"
NOBODY = Access(tenant_ids=[])
ALL = Access(may_export=True, actor={"id": "auditor", "type": "user"})


@asynccontextmanager
async def shown(dsn: str, access: Any = ALL, *, prefix: str = "/audit", **more: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Yield a vault, and a client of the viewer of it; ``access`` may be a function of the request."""
    authorize = access if callable(access) else lambda _request: access
    scopes = {"default": "audit_logs", "users": "audit_user_events"}
    async with start_tracevault(
        connection_string=dsn, scopes=scopes, bootstrap={"ensure_schema": False}, max_event_bytes=4_000_000
    ) as audit:
        app = Starlette(routes=[Mount(prefix, viewer(audit, authorize=authorize, **more))]) if prefix else viewer(
            audit, authorize=authorize, **more)  # fmt: skip
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://test{prefix}") as client:
            yield audit, client


async def stored(audit: AsyncTracevault, event: str) -> list[Any]:
    await audit.flush()
    return await audit.query.find_many(event=event)


def links(html: str) -> list[str]:
    return [link.replace("&amp;", "&") for link in re.findall(r'href="([^"]*)"', html)]


async def test_every_page_answers_under_any_prefix(ready_dsn: str) -> None:
    for prefix in ("/audit", "", "/a/b c"):
        async with shown(ready_dsn, prefix=prefix) as (audit, client):
            one = (
                await audit.emit_diff("product.changed", before={"a": 1}, after={"a": [1, {"b": None}]},
                                      actor={"id": "ana/x", "type": "user"}, target={"id": "4 5", "type": "a&b"},
                                      correlation_id="c?d", meta={"x": 1}, tenant_id="t", request_id="r")
            ).id  # fmt: skip
            seen: set[str] = set()
            waiting = ["/"]
            while waiting and len(seen) < 120:
                path = waiting.pop(0)
                answer = await client.get(path, follow_redirects=True)
                assert answer.status_code == 200, path
                assert "script-src 'self'" in answer.headers["content-security-policy"]
                if "html" in answer.headers["content-type"]:
                    assert "style=" not in answer.text
                    assert "<script>" not in answer.text
                    assert not re.search(r"\son\w+=", answer.text)
                    for link in links(answer.text):
                        assert link.startswith(("/", "#")), link
                        rest = link.removeprefix(prefix.replace(" ", "%20"))
                        if link.startswith("/") and rest not in seen:
                            assert prefix == "" or rest != link, "a link leaves the app"
                            seen.add(rest)
                            waiting.append(rest)
            assert any(str(one) in path for path in seen)
            assert any("/target?" in path for path in seen)
            assert any("/trace?" in path for path in seen)
            assert any("format=csv" in path for path in seen)


async def test_nobody_gets_in_by_default(ready_dsn: str) -> None:
    async def slow(_request: Request) -> None:
        return None

    def failing(_request: Request) -> Access:
        raise RuntimeError("secret reason")

    for access in (None, False, True, "all", slow, failing, {"tenants": None}):
        async with shown(ready_dsn, access) as (audit, client):
            id_ = (await audit.emit("secret.event")).id
            pages = ("", f"/events/{id_}", f"/events/{id_}/raw", "/new", "/export", "/keys", "/target?type=a&id=b")
            for path in ("/", "/s/none", *(f"/s/default{page}" for page in pages)):
                answer = await client.get(path)
                assert answer.status_code == 403, path
                assert "secret" not in answer.text
                assert answer.headers["cache-control"] == "no-store"
                assert "default-src 'none'" in answer.headers["content-security-policy"]
    with pytest.raises(TypeError):
        viewer(start_tracevault(connection_string=ready_dsn))  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="authorize"):
        viewer(start_tracevault(connection_string=ready_dsn), authorize=None)  # type: ignore[arg-type]
    with Tracevault(connection_string=ready_dsn) as blocking, pytest.raises(ConfigError, match="async"):
        viewer(blocking, authorize=lambda _request: ALL)  # type: ignore[arg-type]


async def test_a_tenant_sees_its_own_events_alone(ready_dsn: str) -> None:
    access = Access(
        scopes=["default"], tenant_ids=["mine"], hidden=["meta", "data.secret", "actor_id"], may_export=True
    )
    async with shown(ready_dsn, access) as (audit, client):
        common: dict[str, Any] = {
            "correlation_id": "op",
            "target": {"id": "1", "type": "t"},
            "actor": {"id": "s3cret", "type": "user"},
            "data": {"secret": "s3cret", "kept": "k"},
            "meta": {"x": "s3cret"},
        }
        mine = (await audit.emit("e", tenant_id="mine", **common)).id
        theirs = (await audit.emit("f0reign", tenant_id="theirs", **common)).id
        none = (await audit.emit("f0reign", **common)).id
        for path in ("/s/default", "/s/default?q=event:f*", "/s/default?q=tenant:theirs", f"/s/default/events/{mine}",
                     f"/s/default/events/{mine}/raw", "/s/default/trace?id=op", "/s/default/target?type=t&id=1",
                     "/s/default/export?format=jsonl", "/s/default/export?format=csv"):  # fmt: skip
            answer = await client.get(path)
            assert answer.status_code == 200, path
            assert "f0reign" not in answer.text.replace("q=event%3Af", "")
            assert "s3cret" not in answer.text, path
        for id_ in (theirs, none, uuid4(), "x"):
            assert (await client.get(f"/s/default/events/{id_}")).status_code == 404
            assert (await client.get(f"/s/default/events/{id_}/raw")).status_code == 404
        for path in ("/s/users", "/s/audit_logs", "/s/users/export"):
            assert (await client.get(path)).status_code == 404
        for query in ("meta.x:s3cret", "actor:s3cret", "data.secret:s3cret", "no:actor_id"):
            answer = await client.get("/s/default", params={"q": query})
            assert answer.status_code == 400
            assert "not everything may be seen" in answer.text
            assert (await client.get("/s/default/export", params={"q": query})).status_code == 400
        assert (await client.get("/s/default/actor?type=user&id=s3cret")).status_code == 400
        (looked, *_) = await stored(audit, EXPORTED)
        assert looked.tenant_id == "mine"


async def test_hostile_events_are_text(ready_dsn: str) -> None:
    async with shown(ready_dsn) as (audit, client):
        data = {
            EVIL: EVIL,
            "deep": [[[[{"x": EVIL}]]]],
            "keys": {f"k{n}": n for n in range(500)},
            "long": "x" * 1_000_000,
        }
        id_ = (
            await audit.emit_diff(EVIL, before={EVIL: EVIL}, after=data, actor={"id": EVIL, "type": EVIL},
                                  target={"id": EVIL, "type": EVIL}, correlation_id=EVIL, request_id=EVIL,
                                  tenant_id=EVIL[:250], environment=EVIL, meta={"x": [EVIL] * 500})
        ).id  # fmt: skip
        await audit.emit("a", data={"outcome": EVIL[:40], "severity": EVIL[:30], "error": {"code": EVIL}})
        seen = ["/s/default", f"/s/default/events/{id_}"]
        for path in seen:
            answer = await client.get(path)
            assert answer.status_code == 200
            if "html" not in answer.headers["content-type"]:
                assert answer.headers["x-content-type-options"] == "nosniff"
                continue
            assert "<script>alert" not in answer.text
            assert "<img" not in answer.text
            typed = re.sub(r'(<input id="q" name="q" value=)"[^"]*"', r"\1", answer.text)  # the reader's own query
            assert "\x1b" not in typed
            assert "\u202e" not in typed
            assert len(answer.text) < 600_000
            inside = [link.removeprefix("/audit") for link in links(answer.text) if "/s/default" in link]
            seen += [link for link in inside if link not in seen and len(seen) < 60]
        raw = await client.get(f"/s/default/events/{id_}/raw")
        assert raw.headers["content-type"] == "application/json"
        assert raw.json()["data"]["after"]["long"] == "x" * 1_000_000


async def test_wrong_requests_are_told_why(ready_dsn: str) -> None:
    async with shown(ready_dsn) as (audit, client):
        await audit.emit_many(f"e{n}" for n in range(60))
        for path, status, says in (
            ("/s/default?q=event:a+acter:b", 400, "did you mean `actor`"),
            ("/s/default?q=free+words", 400, "needs `since`"),
            ("/s/default?cursor=nonsense", 400, "not one that a page gave"),
            ("/s/default?q=" + "x" * 5000, 400, "4,096"),
            ("/s/default?q=%00", 400, ""),
            ("/s/default?q=%ff", 400, ""),
            ("/s/none", 404, "no such log"),
            ("/nowhere", 404, ""),
            ("/static/x/viewer.js", 404, ""),
            ("/s/default/trace", 400, "correlation_id"),
            ("/s/default/target?type=a", 400, "target_id"),
            ("/s/default/target?type=a&id=b&at=never", 400, "ISO 8601"),
            ("/s/default/actor?id=b", 400, "actor_type"),
            ("/s/default/actor?type=a&id=b&cursor=x", 400, "page gave"),
            ("/s/default/export?format=exe", 400, "format"),
            ("/s/default/export?q=acter:b", 400, "actor"),
            ("/s/default/new?q=acter:b", 400, "actor"),
        ):
            answer = await client.get(path)
            assert (answer.status_code, says in answer.text) == (status, True), (path, answer.text[-300:])
            assert "Traceback" not in answer.text
        assert "^^^^^" in (await client.get("/s/default?q=event:a+acter:b")).text
        cursor = next(link for link in links((await client.get("/s/default")).text) if "cursor=" in link)
        stolen = cursor.removeprefix("/audit").replace("?", "?q=event%3Aa&")
        assert (await client.get(stolen)).status_code == 400
        assert (await client.post("/s/default")).status_code == 405


async def test_a_database_that_is_away_is_no_stack_trace(ready_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async with shown(ready_dsn) as (_, client):
        rows(ready_dsn, "ALTER TABLE audit_logs RENAME TO elsewhere")
        answer = await client.get("/s/default")
        assert answer.status_code == 503
        assert "could not answer" in answer.text
        assert "audit_logs" not in answer.text
        assert "could not be made" in caplog.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]


async def test_a_question_does_not_keep_a_connection_for_long(ready_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracevault.web.pages._READING_SECONDS", 0.3)
    async with shown(ready_dsn, audit_reads=False) as (_, client):
        async with await psycopg.AsyncConnection.connect(ready_dsn) as other:
            await other.execute("LOCK TABLE audit_logs IN ACCESS EXCLUSIVE MODE")
            for path in ("/s/default", "/s/default/trace?id=x", "/s/default/target?type=a&id=b"):
                answer = await client.get(path)
                assert answer.status_code == 503
                assert "Narrow the time range" in answer.text
        assert (await client.get("/s/default")).status_code == 200


async def test_pages_say_what_they_show(ready_dsn: str) -> None:
    async with shown(ready_dsn, audit_reads=False) as (audit, client):
        await audit.emit_many({"event": "a", "correlation_id": "op"} for _ in range(201))
        assert "there are more" in (await client.get("/s/default/trace?id=op")).text
        target = {"id": "1", "type": "t"}
        for day in (1, 2, 3):
            await audit.emit_diff("b", before={}, after={"n": day}, target=target, occurred_at=f"2026-01-0{day}")
        then = (await client.get("/s/default/target?type=t&id=1&at=2026-01-02")).text
        (export,) = [link for link in links(then) if "format=jsonl" in link]
        lines = (await client.get(export.removeprefix("/audit"))).text.splitlines()
        assert [json.loads(line)["data"]["after"]["n"] for line in lines] == [2, 1]
        long = "event:" + ",".join(f"event_number_{n:03}" for n in range(90)) + ",a since:2026-01-01"
        answer = await client.get("/s/default", params={"q": long})
        assert answer.status_code == 200
        assert answer.text.count("data-row") == 50
        assert len(answer.content) < 100_000


async def test_a_long_history_is_cut(ready_dsn: str) -> None:
    async with shown(ready_dsn, audit_reads=False) as (audit, client):
        versions = [{f"k{n}": [version] * 300 for n in range(20)} for version in range(12)]
        for before, after in itertools.pairwise(versions):
            await audit.emit_diff("changed", before=before, after=after, target={"id": "1", "type": "t"})
        answer = await client.get("/s/default/target?type=t&id=1")
        assert answer.status_code == 200
        assert "its own page" in answer.text or "event's own page" in answer.text
        assert len(answer.text) < 2_000_000


async def test_pages_walk_through_the_log(ready_dsn: str) -> None:
    async with shown(ready_dsn, audit_reads=False) as (audit, client):
        start = datetime(2026, 1, 1, tzinfo=UTC)
        await audit.emit_many({"event": f"e{n}", "occurred_at": start + timedelta(seconds=n)} for n in range(120))
        seen: list[str] = []
        path = "/s/default"
        while path:
            html = (await client.get(path)).text
            seen += re.findall(r'title="Only these events">(e\d+)<', html)
            older = re.search(r'rel="next" href="([^"]*)"', html)
            path = older[1].removeprefix("/audit").replace("&amp;", "&") if older else ""
        assert seen == [f"e{n}" for n in range(119, -1, -1)]
        await audit.emit_many(f"now.{n}" for n in range(60))
        first = (await client.get("/s/default?q=since:1d")).text
        older = re.search(r'rel="next" href="([^"]*)"', first)
        assert older
        rest = await client.get(older[1].removeprefix("/audit").replace("&amp;", "&"))
        assert rest.status_code == 200
        assert len(re.findall("Only these events", rest.text)) == 10
        assert "No event matches" in (await client.get("/s/default?q=event:none")).text
        assert "The log is empty" in (await client.get("/s/users")).text
        html = (await client.get("/s/default?q=since:2026-01-01+until:2026-01-01T00:02:00Z")).text
        bars = [(label, link) for link, label in re.findall(r'<a href="([^"]*)" aria-label="([^"]* events?)">', html)]
        assert sum(counted(label) for label, _ in bars) == 120
        first = await client.get(bars[0][1].removeprefix("/audit").replace("&amp;", "&"))
        assert len(re.findall("Only these events", first.text)) == min(50, counted(bars[0][0]))


def counted(label: str) -> int:
    found = re.search(r": (\d+) event", label)
    assert found
    return int(found[1])


async def test_what_is_looked_at_is_recorded(ready_dsn: str) -> None:
    async with shown(ready_dsn) as (audit, client):
        for _ in range(3):
            await client.get("/s/default?q=event:x")
        await client.get("/s/default?q=event:y")
        await client.get("/s/default/export?q=event:x&format=csv")
        viewed, (exported,) = await stored(audit, VIEWED), await stored(audit, EXPORTED)
        assert sorted(record.data["query"] for record in viewed) == ["event:x", "event:y"]
        assert exported.data == {"query": "event:x", "format": "csv"}
        assert {record.actor.id for record in (*viewed, exported)} == {"auditor"}
        rows(ready_dsn, "ALTER TABLE audit_logs ADD CONSTRAINT no CHECK (event <> 'audit_log.exported') NOT VALID")
        assert (await client.get("/s/default/export")).status_code == 503, "an export was made that is not recorded"
    async with shown(ready_dsn, audit_reads=False) as (audit, client):
        await client.get("/s/default?q=event:z")
        assert (await client.get("/s/default/export")).status_code == 200
        assert len(await stored(audit, VIEWED)) == 2
    async with shown(ready_dsn, Access()) as (audit, client):
        assert (await client.get("/s/default/export")).status_code == 403
        assert "Export" not in (await client.get("/s/default")).text


async def test_exports_are_what_the_screen_shows(ready_dsn: str) -> None:
    async with shown(ready_dsn, audit_reads=False) as (audit, client):
        await audit.emit_many({"event": f"e{n % 3}", "data": {"n": n, "x": "=1+1"}} for n in range(1200))
        lines = (await client.get("/s/default/export?q=event:e1&format=jsonl")).text.splitlines()
        assert [json.loads(line)["data"]["n"] for line in lines] == list(range(1198, 0, -3))
        answer = await client.get("/s/default/export?q=event:e2&format=csv")
        assert re.search(r'attachment; filename="default-\d{8}T\d{6}Z\.csv"', answer.headers["content-disposition"])
        assert len(list(csv.reader(io.StringIO(answer.text)))) == 401


async def test_an_event_says_whether_it_is_sealed(ready_dsn: str, tmp_path: Path) -> None:
    async with shown(ready_dsn, audit_reads=False) as (audit, client):
        id_ = (await audit.emit("payment.captured", data={"amount": 1})).id
        page = f"/s/default/events/{id_}"
        assert "Integrity" not in (await client.get(page)).text
        sealed = Sealed(ready_dsn, tmp_path)
        try:
            await asyncio.to_thread(sealed.seal)
            late = (await audit.emit("payment.captured")).id
            badge = (await client.get(page)).text
            assert '<span class="badge good"' in badge
            assert "leaf 0 of 1 under a signed checkpoint" in badge
            assert "not sealed yet" in (await client.get(f"/s/default/events/{late}")).text
            with psycopg.connect(ready_dsn, autocommit=True) as superuser:
                superuser.execute("SET session_replication_role = replica")
                superuser.execute("""UPDATE audit_logs SET data = '{"amount": 2}' WHERE event = 'payment.captured'""")
            changed = (await client.get(page)).text
            assert "badge good" not in changed
            assert '<span class="badge bad"' in changed
            assert "was tampered with" in changed
        finally:
            sealed.close()


async def test_themes_and_static_files(ready_dsn: str) -> None:
    async with shown(ready_dsn) as (_, client):
        answer = await client.post("/theme?to=dark&back=/audit/s/default?q=x")
        assert (answer.status_code, answer.headers["location"]) == (303, "/audit/s/default?q=x")
        assert 'data-theme="dark"' in (await client.get("/s/default")).text
        for back in ("https://evil.example/", "//evil.example", "/\\evil.example", "/other", "\r\nX: y"):
            answer = await client.post("/theme", params={"back": back, "to": "pink"})
            assert answer.headers["location"] in ("/audit", "/audit/")
            assert "set-cookie" not in answer.headers
        html = (await client.get("/s/default")).text
        files = [link for link in links(html) if "/static/" in link] + re.findall(r'src="([^"]*)"', html)
        assert len(files) == 3
        for file in files:
            answer = await client.get(file.removeprefix("/audit"))
            assert answer.status_code == 200
            assert "immutable" in answer.headers["cache-control"]


async def test_suggestions(ready_dsn: str) -> None:
    async with shown(ready_dsn) as (_, client):
        assert (await client.get("/s/default/keys?q=event:a ac")).json() == ["actor:"]
        assert (await client.get("/s/default/keys?q=mode:")).json() == ["mode:sync", "mode:async"]


async def test_a_large_log_is_quick_and_small(ready_dsn: str) -> None:
    with psycopg.connect(ready_dsn, autocommit=True) as connection:
        fill(connection, 60_000)
    async with shown(ready_dsn, audit_reads=False) as (_, client):
        answer = await client.get("/s/default?q=since:2026-01-01+until:2026-01-02")
        assert answer.status_code == 200
        assert "pale bars are estimates" in answer.text
        assert len(answer.content) < 100_000
