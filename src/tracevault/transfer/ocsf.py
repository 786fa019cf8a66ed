"""An event in the words of OCSF, the Open Cybersecurity Schema Framework, version 1.3.0 (schema.ocsf.io).

An event with a target is Entity Management (3004), whose entity is the target: what `emit_diff` saw stands there as
``entity.data`` and ``entity_result.data``. One without is a Base Event (0). The last word of the event's name says
which activity it is. What OCSF has no word for stands in ``unmapped``.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from tracevault.events.history import field_changes
from tracevault.events.record import AuditRecord

VERSION = "1.3.0"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_BASE, _ENTITY_MANAGEMENT = 0, 3004
_OTHER = 99
ACTIVITIES = {
    1: ("Create", {"create", "created", "add", "added", "placed", "registered", "invited"}),
    2: ("Read", {"read", "view", "viewed", "get", "list", "listed", "search", "searched", "exported", "downloaded"}),
    3: ("Update", {"update", "updated", "change", "changed", "edit", "edited", "set", "renamed"}),
    4: ("Delete", {"delete", "deleted", "remove", "removed", "erased", "pruned"}),
}
SEVERITIES = {
    "debug": (1, "Informational"),
    "info": (1, "Informational"),
    "notice": (2, "Low"),
    "warning": (3, "Medium"),
    "error": (4, "High"),
    "critical": (5, "Critical"),
    "fatal": (6, "Fatal"),
}
STATUSES = {"success": (1, "Success"), "failure": (2, "Failure")}
USER_TYPES = {"user": (1, "User"), "admin": (2, "Admin"), "system": (3, "System"), "service": (3, "System")}


def ocsf_event(record: AuditRecord) -> dict[str, Any]:
    """Return the event as OCSF; attributes that there is nothing for are left out."""
    has_target = record.target_id is not None or record.target_type is not None
    class_uid = _ENTITY_MANAGEMENT if has_target else _BASE
    activity_id, activity = _activity(record.event) if has_target else (_OTHER, record.event)
    severity_id, severity = _named(record.severity, SEVERITIES)
    status_id, status = _named(record.outcome, STATUSES)
    event = {
        "activity_id": activity_id,
        "activity_name": activity,
        "category_uid": 3 if has_target else 0,
        "category_name": "Identity & Access Management" if has_target else "Uncategorized",
        "class_uid": class_uid,
        "class_name": "Entity Management" if has_target else "Base Event",
        "type_uid": class_uid * 100 + activity_id,
        "time": _milliseconds(record.occurred_at),
        "severity_id": severity_id,
        "severity": severity,
        "status_id": status_id,
        "status": status,
        "status_code": record.error_code,
        "message": record.event,
        "metadata": {
            "version": VERSION,
            "uid": str(record.id),
            "event_code": record.event,
            "correlation_uid": record.correlation_id,
            "tenant_uid": record.tenant_id,
            "logged_time": None if record.created_at is None else _milliseconds(record.created_at),
            "product": {"name": "tracevault", "vendor_name": "tracevault"},
        },
        "actor": _actor(record),
        "unmapped": {
            "data": record.data,
            "meta": record.meta,
            "mode": record.mode,
            "request_id": record.request_id,
            "environment": record.environment,
            "trace_id": record.trace_id,
            "span_id": record.span_id,
        },
    }
    if has_target:
        entity = {"uid": record.target_id, "type": record.target_type}
        if field_changes(record.data):
            event["entity"] = entity | {"data": (record.data or {})["before"]}
            event["entity_result"] = entity | {"data": (record.data or {})["after"]}
        else:
            event["entity"] = entity
    return _given(event)


def _activity(name: str) -> tuple[int, str]:
    last = name.replace("_", ".").rsplit(".", 1)[-1].lower()
    found = next((key for key, (_, words) in ACTIVITIES.items() if last in words), None)
    return (_OTHER, name) if found is None else (found, ACTIVITIES[found][0])


def _named(value: str | None, known: dict[str, tuple[int, str]]) -> tuple[int, str]:
    if value is None:
        return 0, "Unknown"
    return known.get(value, (_OTHER, value))


def _actor(record: AuditRecord) -> dict[str, Any] | None:
    if record.actor_id is None and record.actor_type is None:
        return None
    type_id, type_ = _named(record.actor_type, USER_TYPES)
    return {"user": {"uid": record.actor_id, "type_id": type_id, "type": type_}}


def _milliseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // _MILLISECOND


def _given(event: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is None, but for what payloads hold."""
    return {
        key: _given(value) if key in ("metadata", "actor", "user", "entity", "entity_result", "unmapped") else value
        for key, value in event.items()
        if value is not None
    }
