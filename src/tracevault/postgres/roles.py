"""Guarding tables and setting rights, by ``tracevault roles``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from psycopg import Connection

from tracevault.flows import roles as flows
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.postgres.schema import patiently
from tracevault.schema.rights import Roles

_LOOKING = Place("looking at the rights")
_GRANTING = Place("setting the rights")


def differences(connection: Connection[Any], roles: Roles, tables: Sequence[str]) -> list[str]:
    """Return what is missing and what is too much, one line each."""
    return run(connection, flows.differences(roles, tables), _LOOKING)


def establish(connection: Connection[Any], roles: Roles, tables: Sequence[str]) -> None:
    """Guard ``tables`` and give ``roles`` their rights, all or nothing, on an autocommit connection.

    A table whose triggers have to be made is locked for a moment; writers go on while that lock is waited for.
    """
    patiently(connection, partial(flows.establish, roles, tables), "`, `".join(tables), "roles", _GRANTING)
