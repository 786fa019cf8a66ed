"""The default scope's table as a model that is only read: for the admin, and for queries of your own."""

from __future__ import annotations

from typing import Any

from django.db import models

from tracevault.events.record import BY_NAME, RECORD_COLUMNS
from tracevault.integrations.django.conf import conf

_KINDS: dict[str, type[models.Field[Any, Any]]] = {
    "uuid": models.UUIDField,
    "jsonb": models.JSONField,
    "timestamp with time zone": models.DateTimeField,
}


def record_fields() -> dict[str, models.Field[Any, Any]]:
    """Return a field for each column of the record."""
    fields: dict[str, models.Field[Any, Any]] = {}
    for name in RECORD_COLUMNS:
        stored = BY_NAME[name]
        options: dict[str, Any] = {"help_text": stored.column.help.replace("`", "")}
        if name == "id":
            options["primary_key"] = True
        elif stored.nullable:
            options |= {"null": True, "blank": True}
        kind = _KINDS.get(stored.column.sql_type)
        if kind is None:
            kind, options["max_length"] = models.CharField, stored.column.limit or 255
        fields[name] = kind(**options)
    return fields


def record_options() -> dict[str, Any]:
    """Return the options of the model: it is Django's to read, and nothing else."""
    return {
        "managed": False,
        "db_table": conf().default_table,
        "ordering": ("-occurred_at", "-id"),
        "verbose_name": "audit event",
        "verbose_name_plural": "audit events",
        "default_permissions": ("view",),
    }


AuditEvent = type(
    "AuditEvent",
    (models.Model,),
    {
        "__module__": __name__,
        "__doc__": "An event as it is stored in the default scope's table.",
        "__str__": lambda self: self.event,
        **record_fields(),
        "Meta": type("Meta", (), record_options()),
    },
)
