"""What a caller says: the fields of an event."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from typing import Any, TypedDict
from uuid import UUID

from tracevault.events.record import Actor, Mode, Target

Identity = Mapping[str, Any]


class CommonFields(TypedDict, total=False):
    """Fields that `emit` and `emit_diff` share. None means not given."""

    actor: Actor | Identity | None
    """Who: ``{"id": ..., "type": ...}`` or an `Actor`."""
    target: Target | Identity | None
    """To what: ``{"id": ..., "type": ...}`` or a `Target`."""
    subject: Target | Identity | str | None
    """Whose data key encrypts the fields of `encrypt_fields`: ``"user/42"``, or like `target`, which is the default."""
    meta: dict[str, Any] | None
    """Circumstances: address, user agent, source."""
    correlation_id: str | None
    """1-512 characters."""
    request_id: str | None
    """1-512 characters."""
    environment: str | None
    """1-128 characters; default: the vault's ``environment``."""
    tenant_id: str | None
    """1-255 characters."""
    trace_id: str | None
    """W3C trace id: 32 lower-case hex digits."""
    span_id: str | None
    """W3C span id: 16 lower-case hex digits."""
    id: UUID | str | None
    """The caller's own UUID, for idempotent retries."""
    occurred_at: datetime | date | str | None
    """Aware datetime, date, or ISO 8601 text with an offset; default: now."""
    mode: Mode | None
    """``"sync"`` or ``"async"``; default: the vault's ``default_mode``."""


class EventFields(CommonFields, total=False):
    """The keyword arguments of `emit`."""

    data: dict[str, Any] | None
    """The event's own payload."""


class DiffFields(CommonFields, total=False):
    """The keyword arguments of `emit_diff`, which stores ``data = {before, after, diff}``."""

    before: dict[str, Any] | None
    """The thing as it was; None where it did not exist."""
    after: dict[str, Any] | None
    """The thing as it is now; None where it is gone."""


class AuditEvent(EventFields):
    """A whole event in one mapping, as `emit` and `emit_many` take it."""

    event: str
    """What happened: 1-255 characters on one line, not blank."""
