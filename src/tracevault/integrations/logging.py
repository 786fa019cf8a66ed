"""Logging: a log line for each stored event, and a handler that makes events of what a legacy audit logger says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from tracevault import AuditRecord, ConfigError, Scope
from tracevault.events.record import RECORD_COLUMNS, limit_of
from tracevault.integrations.values import plain
from tracevault.writer.told import Kept, OnStored

EVENT = "audit_event"
"""The attribute of a log record that holds the event as a dict, for formatters."""

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "notice": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "fatal": logging.CRITICAL,
}
_SEVERITIES = ("critical", "error", "warning", "info")
# What every log record has; what a caller adds by `extra` is the rest.
_ORDINARY = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", EVENT}

_emitting: ContextVar[bool] = ContextVar("tracevault_logging", default=False)


def log_stored(
    logger: str | logging.Logger = "tracevault.events", *, level: int = logging.INFO, payloads: bool = False
) -> OnStored:
    """Return an ``on_stored`` that writes one line for each stored event: its name, who, to what, and its ids.

    The line's level is that of the event's severity, where it has one that is documented, else ``level``. The record
    has the event as a dict under ``audit_event``, for formatters that write JSON; ``data`` and ``meta`` are in it only
    with ``payloads``, since more people read logs than the audit log.
    """
    log = logging.getLogger(logger) if isinstance(logger, str) else logger

    def mirror(record: AuditRecord, where: Kept) -> None:
        chosen = level_of(record, level)
        if log.isEnabledFor(chosen):
            fields = fields_of(record, where, payloads=payloads)
            log.log(chosen, "%s", _line(record, where), extra={EVENT: fields})

    return mirror


def level_of(record: AuditRecord, level: int) -> int:
    """Return the level of an event's severity, or ``level``."""
    return _LEVELS.get(record.severity or "", level)


def fields_of(record: AuditRecord, where: Kept, *, payloads: bool) -> dict[str, Any]:
    """Return what a record holds as JSON has it, without what is empty."""
    fields: dict[str, Any] = {"stored": where}
    for name in RECORD_COLUMNS:
        value = getattr(record, name)
        if value is None or (name in {"data", "meta"} and not payloads):
            continue
        fields[name] = value.isoformat() if isinstance(value, datetime) else str(value) if name == "id" else value
    return fields


def _line(record: AuditRecord, where: Kept) -> str:
    words = [_word(record.event)]
    for name in ("actor", "target"):
        id_, type_ = getattr(record, f"{name}_id"), getattr(record, f"{name}_type")
        if id_ is not None:
            words.append(f"{name}={_word(type_)}/{_word(id_)}")
    for name in ("outcome", "error_code", "severity", "tenant_id", "correlation_id", "request_id"):
        value = getattr(record, name)
        if value is not None:
            words.append(f"{name}={_word(value)}")
    words.append(f"id={record.id}")
    if where == "transaction":
        words.append("in a transaction")
    return " ".join(words)


def _word(text: str) -> str:
    """Return a value so that it neither ends the line nor passes for another one."""
    return text if text.isprintable() and not any(sign in text for sign in ' ="') else ascii(text)


class AuditHandler(logging.Handler):
    """Makes an event of each log record of the loggers it is added to: for code that audits by logging.

    ``audit`` is a blocking vault or one of its scopes; with its mode ``"async"`` logging waits for no database.
    ``event`` is the name of the events, or a function of the log record that returns it, or None for no event; by
    default the logger's name. ``data`` holds the message, the level, what came as ``extra``, and the error of an
    exception. ``fields`` is a function of the log record that returns more fields, which win: ``actor``, ``target``,
    ``data``. What fails goes to `logging.Handler.handleError`, as logging has it: it is printed, and nothing raised.

    Records of tracevault and psycopg, lines of `log_stored`, and what emitting itself logs, are left out: they would
    never end.
    """

    def __init__(
        self,
        audit: Scope,
        *,
        event: str | Callable[[logging.LogRecord], str | None] | None = None,
        fields: Callable[[logging.LogRecord], Mapping[str, Any]] | None = None,
        mode: Literal["sync", "async"] | None = None,
        level: int | str = logging.NOTSET,
    ) -> None:
        super().__init__(level)
        if not isinstance(audit, Scope):
            raise ConfigError(
                f"`audit` must be a Tracevault, or a scope of one, got {type(audit).__name__}: logging cannot await",
                field="audit",
            )
        self._audit = audit
        self._event = event
        self._fields = fields
        self._mode = mode

    def emit(self, record: logging.LogRecord) -> None:
        """Emit the event of a log record."""
        if _emitting.get() or hasattr(record, EVENT) or record.name.partition(".")[0] in {"tracevault", "psycopg"}:
            return
        token = _emitting.set(True)
        try:
            name = self._event(record) if callable(self._event) else self._event or record.name
            if name is not None:
                own = dict(self._fields(record)) if self._fields is not None else {}
                occurred_at = datetime.fromtimestamp(record.created, UTC)
                fields: dict[str, Any] = {
                    "data": data_of(record),
                    "occurred_at": occurred_at,
                    "mode": self._mode,
                    **own,
                }
                self._audit.emit(_storable(name), **fields)
        except Exception:  # noqa: BLE001 - as every handler of logging does
            self.handleError(record)
        finally:
            _emitting.reset(token)


def data_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the payload of a log record's event."""
    data: dict[str, Any] = {
        "message": _storable(record.getMessage()),
        "logger": record.name,
        "severity": next((name for name in _SEVERITIES if _LEVELS[name] <= record.levelno), "debug"),
    }
    extra = {name: _clean(plain(value)) for name, value in vars(record).items() if name not in _ORDINARY}
    if extra:
        data["extra"] = extra
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        data["error"] = {"code": type(error).__name__[: limit_of("error_code")], "message": _storable(str(error))}
    return data


def _storable(text: str) -> str:
    """Return a text as PostgreSQL can store it: what it cannot is written as an escape."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _storable(value)
    if isinstance(value, dict):
        return {_storable(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value
