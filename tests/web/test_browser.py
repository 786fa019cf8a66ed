"""The viewer in a browser, as `tracevault serve` shows it: no error in its console, WCAG A and AA, and by keyboard."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import HTTPRedirectHandler, Request, build_opener

import pytest

from tests.servers import one_server
from tests.test_cli import command, environment
from tracevault import Tracevault

playwright = pytest.importorskip("playwright.sync_api", reason="a development dependency")
pytest.importorskip("uvicorn", reason='needs the extra "web"')

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
pytestmark = one_server
EVIL = "<b>x</b>\u202e\x1b[31m"


def fill(dsn: str) -> dict[str, str]:
    with Tracevault(connection_string=dsn) as audit:
        for n in range(70):
            audit.emit(f"page.viewed.{n % 3}", actor={"id": f"u{n % 5}", "type": "user"}, data={"outcome": "success"})
        diff = audit.emit_diff(
            "product.changed",
            before={"price": 120, "stock": {"berlin": 3, "paris": 1}},
            after={"price": 150, "stock": {"berlin": 2, "paris": 1}, "tag": EVIL},
            actor={"id": "ana", "type": "user"},
            target={"id": "456", "type": "product"},
            correlation_id="op",
            meta={"agent": EVIL, "long": "x" * 3000, "many": list(range(200))},
        )
        audit.emit("payment.failed", data={"outcome": "failure", "severity": "critical"}, correlation_id="op")
        audit.emit("job.slow", data={"severity": "warning"})
    return {
        "list": "/s/audit_logs",
        "search": "/s/audit_logs?q=event:page.*+since:24h",
        "older": "/s/audit_logs?q=actor:user/u1",
        "empty": "/s/audit_logs?q=event:none",
        "event": f"/s/audit_logs/events/{diff.id}",
        "target": "/s/audit_logs/target?type=product&id=456",
        "actor": "/s/audit_logs/actor?type=user&id=u1",
        "trace": "/s/audit_logs/trace?id=op",
    }


class Served:
    """`tracevault serve` in a process, and the address that it printed."""

    def __init__(self, dsn: str) -> None:
        self.process = subprocess.Popen(
            command("serve", "--port", "0", "--dsn", dsn), env=environment(), stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", self.address), self.address
        self.base = self.address.partition("/?")[0]

    def close(self) -> int:
        self.process.send_signal(2)
        code = self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def served(ready_dsn: str) -> Iterator[tuple[Served, dict[str, str]]]:
    pages = fill(ready_dsn)
    made = Served(ready_dsn)
    yield made, pages
    if made.process.poll() is None:
        made.close()


@pytest.fixture
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        # Neither root nor a container has what its sandbox needs; the pages are our own.
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def watched(context: Any) -> tuple[Any, list[str]]:
    """Return a page, and the list of whatever its console says is wrong."""
    wrong: list[str] = []
    page = context.new_page()
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    # What is under way when a page is left is aborted.
    aborted = "net::ERR_ABORTED"
    page.on("requestfailed", lambda request: wrong.append(request.url) if request.failure != aborted else None)
    return page, wrong


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_args: Any) -> None:
        return None


def answered(url: str, **headers: str) -> tuple[int, Any]:
    from urllib.error import HTTPError

    try:
        with build_opener(_NoRedirect).open(Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.headers
    except HTTPError as error:
        with error:
            return error.code, error.headers


def test_serve_lets_in_whoever_has_the_address_once(served: tuple[Served, dict[str, str]]) -> None:
    server, pages = served
    port = server.base.rpartition(":")[2]
    assert answered(server.base + "/")[0] == 403
    assert answered(server.base + pages["list"], Cookie="tracevault-session=x")[0] == 403
    assert answered(server.address, Host=f"evil.example:{port}")[0] == 403
    assert answered(server.base + "/?token=" + "A" * 32)[0] == 403
    status, headers = answered(server.address)
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert answered(server.address)[0] == 403, "the token works twice"
    session = cookie.partition(";")[0]
    assert answered(server.base + pages["list"], Cookie=session)[0] == 200
    assert answered(server.base + pages["list"], Cookie=session, Host=f"localhost.evil:{port}")[0] == 403
    assert server.close() == 130


@in_browser
def test_every_page_in_both_colours(served: tuple[Served, dict[str, str]], browser: Any) -> None:
    server, pages = served
    axe = None
    if find_spec("axe_playwright_python"):
        axe = (Path(str(find_spec("axe_playwright_python").origin)).parent / "axe.min.js").read_text()  # type: ignore[union-attr]
    assert axe, "axe is a development dependency"
    context = browser.new_context(color_scheme="light", viewport={"width": 1280, "height": 800})
    page, wrong = watched(context)
    page.goto(server.address)
    for path in pages.values():
        page.goto(server.base + path)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
    page.goto(server.base + pages["event"])
    assert "<b>x</b>\\u202e" in "".join(page.locator(".tree").all_inner_texts())
    assert page.locator(".diff .changed").count() >= 3
    assert wrong == []
    state = context.storage_state()
    for theme in ("light", "dark"):
        # Axe is put into the page, which its policy would forbid.
        context = browser.new_context(color_scheme=theme, bypass_csp=True, storage_state=state)
        page = context.new_page()
        for name, path in {**pages, "wrong": "/s/audit_logs?q=acter:x"}.items():
            page.goto(server.base + path)
            page.evaluate(axe)
            tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
            found = page.evaluate("tags => axe.run(document, {runOnly: tags})", tags)
            problems = [(one["id"], one["nodes"][0]["html"][:200]) for one in found["violations"]]
            assert problems == [], (theme, name)
    narrow = browser.new_context(viewport={"width": 360, "height": 740}, storage_state=state)
    page, wrong = watched(narrow)
    for path in pages.values():
        page.goto(server.base + path)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
    assert wrong == []


@in_browser
def test_by_keyboard_alone(served: tuple[Served, dict[str, str]], browser: Any) -> None:
    server, _ = served
    page, wrong = watched(browser.new_context())
    page.goto(server.address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("/")
    page.keyboard.type("event:product.changed")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=event*")
    assert page.locator("[data-row]").count() == 1
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url("**/events/*")
    assert page.locator("h1").inner_text() == "product.changed"
    page.go_back()
    page.goto(server.base + "/s/audit_logs")
    for _ in range(3):
        page.keyboard.press("j")
    page.keyboard.press("k")
    focused = "[...document.querySelectorAll('[data-row]')].findIndex(row => row.contains(document.activeElement))"
    assert page.evaluate(focused) == 1
    page.keyboard.press("?")
    assert page.locator(".help").get_attribute("open") is not None
    page.locator(".to-dark").focus()
    with page.expect_navigation():
        page.keyboard.press("Enter")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert wrong == []


@in_browser
def test_new_events_are_announced(served: tuple[Served, dict[str, str]], browser: Any, ready_dsn: str) -> None:
    server, _ = served
    page, wrong = watched(browser.new_context())
    page.goto(server.address)
    page.goto(server.base + "/s/audit_logs?q=event:fresh")
    page.wait_for_timeout(500)
    with Tracevault(connection_string=ready_dsn) as audit:
        audit.emit("stale")
        audit.emit_many(["fresh", "fresh"])
    page.locator(".live a").wait_for(state="visible", timeout=10_000)
    assert page.locator(".live").inner_text() == "2 new — show"
    page.locator(".live a").click()
    page.wait_for_load_state()
    assert page.locator("[data-row]").count() == 2
    page.locator("#q").fill("event:x out")
    page.locator("#suggestions option").first.wait_for(state="attached", timeout=10_000)
    assert page.locator("#suggestions option").first.get_attribute("value") == "event:x outcome:"
    assert wrong == []


@in_browser
def test_without_javascript(served: tuple[Served, dict[str, str]], browser: Any) -> None:
    server, pages = served
    page, wrong = watched(browser.new_context(java_script_enabled=False))
    page.goto(server.address)
    page.locator("#q").fill("event:product.changed")
    page.locator(".search button").click()
    assert page.locator("[data-row]").count() == 1
    page.locator(".when a").click()
    assert page.locator("h1").inner_text() == "product.changed"
    page.locator("text=its history").click()
    assert page.locator(".change").count() == 1
    page.goto(server.base + pages["list"])
    page.locator("text=Older").click()
    assert page.locator("[data-row]").count() == 23
    page.locator(".to-dark").click()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert wrong == []
