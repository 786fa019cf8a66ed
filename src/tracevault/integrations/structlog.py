"""structlog: events take ids and actor from its contextvars, log lines take theirs from ours, and mirror events."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from tracevault import AuditRecord, current_context
from tracevault.events.record import limit_of
from tracevault.integrations.logging import fields_of, level_of
from tracevault.writer.told import Kept, OnStored

try:
    import structlog
except ImportError as error:
    message = 'this needs structlog: pip install "tracevault[structlog]"'
    raise ImportError(message) from error

_SHOWN = ("actor", "on_behalf_of", "tenant_id", "correlation_id", "request_id")


def from_contextvars(
    *,
    actor: str | None = None,
    actor_type: str = "user",
    tenant_id: str | None = "tenant_id",
    correlation_id: str | None = "correlation_id",
    request_id: str | None = "request_id",
    meta: Iterable[str] = (),
) -> Callable[[], Mapping[str, Any] | None]:
    """Return a source for the option ``context_sources`` that reads what `structlog.contextvars` has bound.

    Each argument is the key under which your code binds it, or None: ``actor`` that of the actor's id, whose type is
    ``actor_type``; ``meta`` are keys that go into ``meta`` under their own names. A value that no event could have
    counts as missing, since ids in logs often come from outside.
    """
    names = {"tenant_id": tenant_id, "correlation_id": correlation_id, "request_id": request_id}
    limits = {name: (key, limit_of(name)) for name, key in names.items() if key is not None}
    kept = tuple(meta)
    longest = limit_of("actor_id")

    def source() -> dict[str, Any] | None:
        bound = structlog.contextvars.get_contextvars()
        if not bound:
            return None
        found: dict[str, Any] = {}
        for name, (key, limit) in limits.items():
            value = _text(bound.get(key), limit)
            if value is not None:
                found[name] = value
        id_ = _text(bound.get(actor), longest) if actor is not None else None
        if id_ is not None:
            found["actor"] = {"id": id_, "type": actor_type}
        own = {key: bound[key] for key in kept if key in bound}
        if own:
            found["meta"] = own
        return found

    return source


def _text(value: Any, limit: int) -> str | None:
    text = "" if value is None else str(value)
    return text if text.isprintable() and 0 < len(text) <= limit and not text.isspace() else None


def add_context(_logger: Any, _method: str, event_dict: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add the context's actor, tenant and ids to a log line, where it has none of its own: a processor."""
    for name, value in current_context(*_SHOWN).items():
        event_dict.setdefault(name, value)
    return event_dict


def log_stored(logger: Any = None, *, level: int = logging.INFO, payloads: bool = False) -> OnStored:
    """Return an ``on_stored`` that logs each stored event by structlog: the event's name, its fields as keys.

    ``logger`` is by default ``structlog.get_logger("tracevault.events")``. Level and ``payloads`` are as of
    `tracevault.integrations.logging.log_stored`.
    """
    log = structlog.get_logger("tracevault.events") if logger is None else logger

    def mirror(record: AuditRecord, where: Kept) -> None:
        fields = fields_of(record, where, payloads=payloads)
        log.log(level_of(record, level), fields.pop("event"), **fields)

    return mirror
