"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks


class AuditLogConfig(AppConfig):
    """The audit log of a project."""

    name = "tracevault.integrations.django"
    label = "tracevault"
    verbose_name = "Audit log"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the checks, and watch audited models."""
        from tracevault.integrations.django import checks as ours  # noqa: PLC0415 - the registry has to be ready
        from tracevault.integrations.django import models_audited  # noqa: PLC0415

        checks.register(ours.check_settings, "tracevault")
        checks.register(ours.check_tables, "tracevault", checks.Tags.database)
        models_audited.watch()
