"""The vault of the settings, and emitting in Django's own transactions."""

from __future__ import annotations

import atexit
from contextlib import suppress
from threading import Lock
from typing import Any, Unpack

from asgiref.sync import sync_to_async
from django.core.signals import setting_changed
from django.db import connections

from tracevault import AuditEvent, Receipt, Scope, Tracevault, TracevaultError
from tracevault.events.event import DiffFields, EventFields
from tracevault.integrations.django.conf import conf

_lock = Lock()
_opened: list[Tracevault] = []


def get_audit() -> Tracevault:
    """Return the vault of the settings; it is opened when it is first asked for, and closed with the process.

    What it emits is independent of Django's transactions; `emit` is not. It survives a fork.
    """
    with _lock:
        if not _opened:
            _opened.append(Tracevault(**conf().vault_options()))
        return _opened[0]


def emit(
    event: str | AuditEvent | None = None, /, *, scope: str | None = None, **fields: Unpack[EventFields]
) -> Receipt:
    """Emit an event; inside ``transaction.atomic`` it is stored, or not, with the transaction.

    Outside of one it is stored at once. ``scope`` is the name of another scope than the default one. Errors are those
    of `tracevault.Scope.emit`.
    """
    return _scope(scope).emit(event, connection=_connection(), **fields)


def emit_diff(event: str | None = None, /, *, scope: str | None = None, **fields: Unpack[DiffFields]) -> Receipt:
    """Like `emit`, with ``before`` and ``after`` in place of ``data``."""
    return _scope(scope).emit_diff(event, connection=_connection(), **fields)


# For async views: in the thread that has Django's connections, and that may ask for `request.user`.
aemit = sync_to_async(emit)
aemit_diff = sync_to_async(emit_diff)


def _scope(name: str | None) -> Scope:
    audit = get_audit()
    return audit if name is None else audit.get_scope(name)


def _connection() -> Any:
    connection = connections[conf().database]
    return connection if connection.in_atomic_block else None


def close() -> None:
    """Close the vault, if there is one; the next `get_audit` opens another."""
    with _lock:
        while _opened:
            with suppress(TracevaultError):
                _opened.pop().close()


def _changed(*, setting: str, **_: Any) -> None:
    if setting in {"TRACEVAULT", "DATABASES"}:
        close()


setting_changed.connect(_changed)
atexit.register(close)
