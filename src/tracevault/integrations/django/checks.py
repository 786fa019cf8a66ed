"""System checks: what would fail later is said when the project starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning  # noqa: A004
from django.db import connections
from django.db.utils import DatabaseError

from tracevault import ConfigError
from tracevault.config import config_from
from tracevault.integrations.django.conf import conf
from tracevault.integrations.request import request_reader

_MIDDLEWARE = "tracevault.integrations.django.middleware.AuditMiddleware"


def check_settings(**_: Any) -> list[CheckMessage]:
    """Check the setting TRACEVAULT, the database it names, and that the middleware is there."""
    try:
        found = conf()
        vendor = connections[found.database].vendor
        if vendor != "postgresql":
            return [
                Error(
                    f"The audit log needs PostgreSQL, and the database {found.database!r} is {vendor}.",
                    hint="Name the alias of a PostgreSQL database in TRACEVAULT['DATABASE'].",
                    id="tracevault.E002",
                )
            ]
        config_from(found.vault_options())
        request_reader(found.trusted_proxies)
    except ConfigError as error:
        return [Error(f"The setting TRACEVAULT is wrong: {error}", id="tracevault.E001")]
    if _MIDDLEWARE not in settings.MIDDLEWARE:
        return [
            Warning(
                "Events will have no actor and no request: the audit log's middleware is not in MIDDLEWARE.",
                hint=f"Add {_MIDDLEWARE!r}.",
                id="tracevault.W001",
            )
        ]
    return []


def check_tables(*, databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Check that the audit tables are there; part of ``check --database default``, and of ``migrate``."""
    try:
        found = conf()
    except ConfigError:
        return []
    if not databases or found.database not in databases:
        return []
    try:
        with connections[found.database].cursor() as cursor:
            cursor.execute(
                "SELECT t FROM unnest(%s::text[]) AS t WHERE to_regclass(quote_ident(t)) IS NULL", [found.tables]
            )
            missing = [row[0] for row in cursor.fetchall()]
    except DatabaseError as error:
        return [Warning(f"The audit tables cannot be looked for: {type(error).__name__}.", id="tracevault.W003")]
    return [
        Warning(
            f"The audit table {table!r} does not exist, so every event will be refused.",
            hint="Run `manage.py migrate tracevault`.",
            id="tracevault.W002",
        )
        for table in missing
    ]
