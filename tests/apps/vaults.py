"""The vaults that the applications of `tests.test_processes` use, and what they say about their events."""

from __future__ import annotations

import os
from typing import Any

from tracevault import Tracevault

Receipts = list[tuple[str, str]]
KINDS = tuple(os.environ.get("TEST_KINDS", "database spool memory").split())


def options(*, spool: bool) -> dict[str, Any]:
    """Options of a vault whose background writer waits for more for a minute: what it has is sent at the exit."""
    return {
        "connection_string": os.environ["TEST_DSN"],
        "bootstrap": {"ensure_schema": False},
        "default_mode": "async",
        "async_flush_interval_ms": float(os.environ.get("TEST_LINGER", "60000")),
        **({"spool": os.environ["TEST_SPOOL"]} if spool else {}),
    }


class Vaults:
    """One vault with a spool, and one without."""

    def __init__(self) -> None:
        self.spooled = Tracevault(**options(spool=True))
        self.plain = Tracevault(**options(spool=False))

    def emit(self, kind: str, event: str) -> tuple[str, str]:
        """Emit one event to end up, as far as its receipt says, in ``kind``; return its id and where it is."""
        vault = self.plain if kind == "memory" else self.spooled
        receipt = vault.emit(event, mode="sync" if kind == "database" else "async")
        return str(receipt.id), receipt.stored

    def emit_all(self, event: str, count: int = 3) -> Receipts:
        """Emit ``count`` events of each kind."""
        return [self.emit(kind, event) for kind in KINDS for _ in range(count)]

    def close(self) -> None:
        """Close both."""
        self.plain.close()
        self.spooled.close()
