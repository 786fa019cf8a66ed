"""Telling ``on_stored`` of what is stored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Literal

from tracevault.events.prepare import Prepared, unstored_record
from tracevault.events.record import AuditRecord

_log = logging.getLogger("tracevault")

Kept = Literal["database", "transaction"]
"""Where a stored event is: committed, or in a caller's transaction."""
OnStored = Callable[[AuditRecord, Kept], object]


def tell(on_stored: OnStored, events: Iterable[Prepared], where: Kept) -> None:
    """Call ``on_stored`` for each event. What it raises is logged: the events are stored, whatever it makes of them."""
    for prepared in events:
        try:
            on_stored(unstored_record(prepared), where)
        except Exception:  # noqa: BLE001 - the handler's fault
            _log.exception("on_stored itself failed")
