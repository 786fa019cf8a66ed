"""Make the pictures of the documentation: a demo log in a PostgreSQL of its own, seen through a real browser.

``python -m scripts.screenshots``, or ``make screenshots``. Needs Chromium.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from tracevault import Tracevault

IMAGES = Path(__file__).parent.parent / "docs" / "images"
_EVENTS = (
    ("auth.login", "session", 30),
    ("product.viewed", "product", 40),
    ("product.price.updated", "product", 8),
    ("order.placed", "order", 12),
    ("payment.captured", "order", 9),
    ("report.exported", "report", 3),
    ("user.role.changed", "user", 2),
)
_PEOPLE = ("ana", "bob", "chen", "dana", "eve")


def fill(audit: Tracevault) -> dict[str, str]:
    """Store some days of a shop, and return the ids of what is shown."""
    chance, now = Random(7), datetime.now(UTC)
    names = [name for name, _, weight in _EVENTS for _ in range(weight)]
    kinds = {name: kind for name, kind, _ in _EVENTS}
    events: list[dict[str, Any]] = []
    for _ in range(2600):
        age = timedelta(days=chance.random() ** 1.5 * 13)
        moment = now - age
        if 1 < moment.hour < 6 and chance.random() < 0.8:
            continue
        name = chance.choice(names)
        failed = chance.random() < 0.05
        events.append(
            {
                "event": name,
                "actor": {"id": chance.choice(_PEOPLE), "type": "user"},
                "target": {"id": str(chance.randint(100, 480)), "type": kinds[name]},
                "data": {"outcome": "failure", "severity": "error"} if failed else {"outcome": "success"},
                "occurred_at": moment,
                "correlation_id": f"req_{chance.randrange(10**6):06}",
            }
        )
    audit.emit_many(events)
    before = {"price": 120, "currency": "EUR", "stock": {"berlin": 3, "paris": 4}, "tags": ["new"]}
    after = {
        "price": 99,
        "currency": "EUR",
        "stock": {"berlin": 3, "paris": 3},
        "tags": ["new", "sale"],
        "until": "Sunday",
    }
    shown = audit.emit_diff(
        "product.price.updated",
        before=before,
        after=after,
        actor={"id": "ana", "type": "user"},
        target={"id": "456", "type": "product"},
        correlation_id="req_5f3a91",
        request_id="4711",
        tenant_id="acme",
        environment="production",
        meta={"ip": "10.0.0.7", "agent": "Mozilla/5.0"},
    )
    return {"event": str(shown.id)}


def main() -> None:
    """Write the pictures."""
    chromium = shutil.which("chromium") or sys.exit("needs Chromium: apt-get install chromium")
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        dsn = f"embedded:{folder}/pgdata"
        with Tracevault(connection_string=dsn) as audit:
            ids = fill(audit)
            serve = [sys.executable, "-m", "tracevault", "serve", "--port", "0", "--dsn", dsn]
            with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None
                address = server.stdout.readline().strip()
                with sync_playwright() as running:
                    browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                    _shoot(browser, address, ids)
                    browser.close()
                server.terminate()


def _shoot(browser: Browser, address: str, ids: dict[str, str]) -> None:
    base = re.sub(r"/\?.*", "", address)
    context = browser.new_context(viewport={"width": 1200, "height": 760})
    page = context.new_page()
    page.goto(address)
    state = context.storage_state()
    log, event = f"{base}/s/audit_logs", f"{base}/s/audit_logs/events/{ids['event']}"
    for name, url, theme, width, height in (
        ("list", f"{log}?q=since:14d", "light", 1200, 760),
        ("dark", f"{log}?q=outcome:failure+since:14d", "dark", 1200, 760),
        ("event", event, "light", 1200, 900),
        ("narrow", f"{log}?q=since:14d", "dark", 390, 760),
    ):
        scheme: Any = theme
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, storage_state=state
        )
        page = context.new_page()
        page.goto(url)
        page.wait_for_timeout(300)
        page.screenshot(path=IMAGES / f"{name}.png")
        context.close()


if __name__ == "__main__":
    main()
