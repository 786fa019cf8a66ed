"""Who may do what is looked at, compared with what should be, and put right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tracevault.errors import DriverError, MigrationError
from tracevault.flows import Flow, Query
from tracevault.flows.migrate import plan
from tracevault.schema import guards
from tracevault.schema.comparison import signature
from tracevault.schema.grants import statements
from tracevault.schema.rights import (
    CUSTODY_FUNCTIONS,
    GRANTS,
    MEMBERS,
    ROLES,
    VAULT_RIGHTS,
    VIEW,
    Right,
    Roles,
    Thing,
    identifier,
    is_tenant_view,
    shown,
    summary,
    tenant_view,
)

# As a command runs for one database at a time, so does this; another number than those of start-up and `migrate`.
_ROLES_LOCK = 0x74726163 + 2
_NOT_ALLOWED = "42501"


@dataclass(frozen=True)
class Access:
    """What is found of one audit table: its things, and which of its guards are not in force, and why."""

    table: str
    things: tuple[Thing, ...]
    faults: tuple[tuple[str, str], ...]


def look(table: str) -> Flow[Access]:
    """Return who may do what; refuse a table that is not there, or not ours, or not up to date."""
    (table_plan,) = yield from plan([table])
    if not table_plan.state.exists or table_plan.pending("columns", "rewrite"):
        what = "is not up to date" if table_plan.state.exists else "does not exist"
        raise MigrationError(f"table `{table}` {what}: run `tracevault migrate --table {table}` first")
    return (yield from look_at_grants(table))


def look_at_grants(table: str) -> Flow[Access]:
    """Return who may do what to a table of ours."""
    found = yield Query(GRANTS, (identifier(table), tenant_view(table), list(VAULT_RIGHTS), list(CUSTODY_FUNCTIONS)))
    things: dict[tuple[str, str, str, str | None], dict[str | None, set[Right]]] = {}
    for kind, name, sql, grantee, word, column, stranger in found.rows:
        granted = things.setdefault((kind, name, sql, stranger), {})
        if word is not None:
            granted.setdefault(grantee, set()).add((word, column))
    faults = yield Query(guards.FAULTS, (identifier(table), guards.BODY))
    return Access(
        table,
        tuple(
            Thing(*key, {grantee: frozenset(rights) for grantee, rights in granted.items()})
            for key, granted in things.items()
        ),
        tuple(_grouped((part, fault) for part, fault in faults.rows)),
    )


def _grouped(faults: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield each fault once, of the first table or partition that has it; there may be hundreds."""
    parts: dict[str, list[str]] = {}
    for part, fault in faults:
        parts.setdefault(fault, []).append(part)
    for fault, names in parts.items():
        yield names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", fault


def members(table: str, names: Sequence[str | None]) -> Flow[dict[str | None, list[str]]]:
    """Return the members of each role, by whatever way and quoted; None stands for the table's owner."""
    found = yield Query(MEMBERS, (list(names), identifier(table)))
    result: dict[str | None, list[str]] = {}
    for name, member in found.rows:
        result.setdefault(name, []).append(member)
    return result


def differences(roles: Roles, tables: Sequence[str]) -> Flow[list[str]]:
    """Return what is missing and what is too much, one line each, as what would be done about it.

    Raises `MigrationError` for a table that is not there or not up to date, and for a role that may do anything to
    a table, which no grant can change.
    """
    result = []
    missing: list[str] = []
    for table in tables:
        access = yield from look(table)
        found = yield Query(ROLES, (identifier(table), list(roles.names), signature(table)))
        result += [f"{part}: set the guard ({fault})" for part, fault in access.faults]
        lines = yield from _view_difference(roles, table)
        for name, exists, mighty, _, _ in found.rows:
            if mighty:
                raise MigrationError(
                    f"role {shown(name)} is a superuser, or owns table `{table}`, or is a member of its owner, so "
                    "it may do anything to it: choose another role"
                )
            if not exists and name not in missing:
                missing.append(name)
        for thing in access.things:
            lines += _rights_differences(roles, thing)
        for name, exists, _, finds, asks in found.rows:
            if not finds:
                lines.append(f"grant USAGE on the schema to {shown(name)}")
            if exists and not asks and name == roles.writer:
                lines.append(f"grant EXECUTE on the function that compares to {shown(name)}")
        result += [f"{table}: {line}" for line in lines]
    created = [f"create role {shown(name)}, NOLOGIN and without a password" for name in missing]
    return created + list(dict.fromkeys(result))


def _view_difference(roles: Roles, table: str) -> Flow[list[str]]:
    if roles.tenant_reader is None:
        return []
    view = tenant_view(table)
    found = yield Query(VIEW, (identifier(table), view))
    if found.rows:
        is_view, printed = found.rows[0]
        return [] if is_view and is_tenant_view(table, printed) else [f"replace view {view}"]
    wanted = f"grant SELECT on {view} to {shown(roles.tenant_reader)}"
    return [f"create view {view}", wanted]


def _rights_differences(roles: Roles, thing: Thing) -> Iterator[str]:
    for grantee, right in [(None, frozenset[Right]()), *roles.wanted(thing.rights).items()]:
        held = thing.granted.get(grantee, frozenset())
        if held - right:
            yield f"revoke {summary(held - right)} on {thing.name} from {shown(grantee)}"
        if right - held:
            yield f"grant {summary(right - held)} on {thing.name} to {shown(grantee)}"


def establish(roles: Roles, tables: Sequence[str]) -> Flow[None]:
    """Guard the tables and set the roles' rights; in one transaction of the caller's."""
    yield Query("SELECT pg_advisory_xact_lock($1)", (_ROLES_LOCK,))
    for statement in statements(roles, tables):
        try:
            yield Query(statement)
        except DriverError as error:
            if error.sqlstate != _NOT_ALLOWED:
                raise
            raise MigrationError(
                "this role may not do that: run `tracevault roles` as the owner of the tables; creating roles needs "
                f"CREATEROLE as well ({error.__cause__ or error})"
            ) from error
