"""The setting ``TRACEVAULT``: the options of a vault, and four of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, cast

from django.conf import settings
from django.db import connections
from django.http import HttpRequest
from django.utils.module_loading import import_string
from psycopg import pq
from psycopg.conninfo import make_conninfo

from tracevault import ConfigError

Of = Callable[[HttpRequest], Any]

_OURS = ("DATABASE", "ACTOR", "TENANT_ID", "TRUSTED_PROXIES")
_NAMES = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}


@dataclass(frozen=True)
class Conf:
    """What the setting says."""

    database: str = "default"
    """The alias of the database that has the audit tables; ``DATABASE``."""
    actor: Of | None = None
    """Who acts in a request; ``ACTOR``, a function or its dotted path. Default: ``request.user``."""
    tenant_id: Of | None = None
    """For which tenant; ``TENANT_ID``, likewise."""
    trusted_proxies: tuple[str, ...] = ()
    """Whose ``X-Forwarded-For`` is believed; ``TRUSTED_PROXIES``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of the vault, in lower case as everywhere, or in upper case as settings are."""

    def vault_options(self) -> dict[str, Any]:
        """Return the vault's options, with where to connect to, and with the schema left to migrations."""
        options = {"bootstrap": {"ensure_schema": False}, **self.options}
        if "connection_string" not in options and "pool" not in options:
            options["connection_string"] = conninfo_of(self.database)
        return options

    @property
    def tables(self) -> list[str]:
        """The names of the audit tables, without those on servers of their own."""
        scopes = self.options.get("scopes", {"default": "audit_logs"})
        here = [each for each in scopes.values() if isinstance(each, str) or "connection_string" not in each]
        return list(dict.fromkeys(each if isinstance(each, str) else each["table_name"] for each in here))

    @property
    def default_table(self) -> str:
        """The table of the default scope."""
        scopes = self.options.get("scopes", {"default": "audit_logs"})
        entry = scopes[self.options.get("default_scope", "default")]
        return str(entry if isinstance(entry, str) else entry["table_name"])


def conf() -> Conf:
    """Return the setting, read anew; `ConfigError` names what is wrong in it."""
    given = getattr(settings, "TRACEVAULT", {})
    if not isinstance(given, Mapping):
        raise ConfigError("the setting TRACEVAULT must be a dict", field="TRACEVAULT")
    options = {name.lower(): value for name, value in given.items() if name not in _OURS}
    alias = given.get("DATABASE", "default")
    if alias not in settings.DATABASES:
        close = get_close_matches(str(alias), list(settings.DATABASES), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"TRACEVAULT['DATABASE'] is {alias!r}, which DATABASES has not{hint}", field="DATABASE")
    return Conf(
        database=alias,
        actor=_function(given.get("ACTOR"), "ACTOR"),
        tenant_id=_function(given.get("TENANT_ID"), "TENANT_ID"),
        trusted_proxies=tuple(given.get("TRUSTED_PROXIES", ())),
        options=options,
    )


def _function(given: Any, name: str) -> Of | None:
    if isinstance(given, str):
        try:
            given = import_string(given)
        except ImportError as error:
            raise ConfigError(f"TRACEVAULT[{name!r}] cannot be imported: {error}", field=name) from None
    if given is not None and not callable(given):
        raise ConfigError(f"TRACEVAULT[{name!r}] must be a function of the request, or its dotted path", field=name)
    return cast("Of | None", given)


def conninfo_of(alias: str) -> str:
    """Return how to connect to a database of the settings; of its OPTIONS, those that libpq knows."""
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    given = connections[alias].settings_dict
    values = {theirs: given[ours] for ours, theirs in _NAMES.items() if given.get(ours)}
    values |= {name: value for name, value in given.get("OPTIONS", {}).items() if name in known}
    return make_conninfo(**values)
