"""The SQL that guards tables and grants: what ``tracevault roles`` runs, and what its ``--sql`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tracevault.schema import guards
from tracevault.schema.comparison import signature
from tracevault.schema.rights import (
    CUSTODY_FUNCTIONS,
    TABLE_RIGHTS,
    VAULT_RIGHTS,
    VIEW_RIGHTS,
    Right,
    Roles,
    described,
    identifier,
    literal,
    tenant_view,
    vault_rights,
    view_query,
)


def statements(roles: Roles, tables: Iterable[str]) -> list[str]:
    """Return what guards ``tables`` and gives ``roles`` their rights, and none beyond; each may run again.

    They belong in one transaction: rights are taken away before they are given.
    """
    result = ["SET LOCAL lock_timeout = '2s'"]
    result += [_refuse_owners(table, roles.names) for table in tables if roles.names]
    result += [_create_role(name) for name in roles.names]
    for table in tables:
        result.append(guards.install(table))
        if roles.tenant_reader is not None:
            result.append(define_view(table))
        result += _table_rights(roles, table)
        result.append(_beside_table(roles, table))
    return result


def script(roles: Roles, tables: Iterable[str]) -> str:
    """Return `statements` as a script for psql."""
    return "".join(f"{statement};\n\n" for statement in ("BEGIN", *statements(roles, tables), "COMMIT"))


def define_view(table: str) -> str:
    """Return the block that makes the view, which belongs to the table's owner and reads the table as him.

    So its readers need no right on the table; ``security_invoker`` would ask them for one.
    """
    view = f'"{tenant_view(table)}"'
    return _block(
        f"""DECLARE
  place text;
  owner text;
  query text;
BEGIN
  SELECT quote_ident(n.nspname::text), quote_ident(pg_get_userbyid(c.relowner)::text) INTO STRICT place, owner
  FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  WHERE c.oid = '"{table}"'::regclass;
  query := ' WITH (security_barrier = true) AS ' || replace({literal(view_query("{table}"))},
    '{{table}}', place || '."{table}"');
  BEGIN
    EXECUTE 'CREATE OR REPLACE VIEW ' || place || '.{view}' || query;
  EXCEPTION WHEN invalid_table_definition THEN  -- a view with other columns
    EXECUTE 'DROP VIEW ' || place || '.{view}';
    EXECUTE 'CREATE VIEW ' || place || '.{view}' || query;
  END;
  EXECUTE 'ALTER VIEW ' || place || '.{view} OWNER TO ' || owner;
END"""
    )


def _block(code: str) -> str:
    """Return a DO block; no name of a role can end it."""
    tag = "tracevault"
    while f"${tag}$" in code:
        tag += "_"
    return f"DO ${tag}$\n{code}\n${tag}$"


def _create_role(name: str) -> str:
    return _block(
        f"""BEGIN
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {literal(name)}) THEN
    CREATE ROLE {identifier(name)} NOLOGIN;
  END IF;
END"""
    )


def _refuse_owners(table: str, names: Iterable[str]) -> str:
    """Return a block that fails where a role could do anything to the table all the same."""
    return _block(
        f"""DECLARE
  mighty name;
BEGIN
  SELECT r.rolname INTO mighty FROM pg_catalog.pg_class AS c, pg_catalog.pg_roles AS r
  WHERE c.oid = '"{table}"'::regclass AND r.rolname IN ({", ".join(map(literal, names))})
    AND pg_has_role(r.oid, c.relowner, 'MEMBER');
  IF FOUND THEN
    RAISE EXCEPTION USING MESSAGE = 'role ' || quote_ident(mighty::text) || ' is a superuser, or owns the table'
      ' "{table}", or is a member of its owner, so it may do anything to it', HINT = 'Choose another role.';
  END IF;
END"""
    )


def _grantees(roles: Roles) -> str:
    return ", ".join(["PUBLIC", *map(identifier, roles.names)])


def _table_rights(roles: Roles, table: str) -> list[str]:
    result = [f'REVOKE ALL ON "{table}" FROM {_grantees(roles)} CASCADE']
    for name, rights in roles.wanted(TABLE_RIGHTS).items():
        if rights:
            result.append(f'GRANT {described(rights)} ON "{table}" TO {identifier(name)}')
    return result


def _beside_table(roles: Roles, table: str) -> str:
    """Return the block for partitions, the vault's tables, functions and schema: for what there is of them."""
    revoked = literal(f" FROM {_grantees(roles)} CASCADE")
    beside = _rights_on(roles, tenant_view(table), VIEW_RIGHTS)
    beside += "".join(_rights_on(roles, name, vault_rights(name)) for name in VAULT_RIGHTS)
    custodian = "" if roles.custodian is None else f"\n    EXECUTE {_execute_to(roles.custodian)};"
    return _block(
        f"""DECLARE
  audited regclass DEFAULT '"{table}"'::regclass;
  place text;
  home oid;
  master oid;
  thing text;
BEGIN
  SELECT quote_ident(n.nspname::text), n.oid, c.relowner INTO STRICT place, home, master
  FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  WHERE c.oid = audited;
  FOR thing IN SELECT relid::regclass FROM pg_partition_tree(audited) WHERE relid <> audited LOOP
    EXECUTE 'REVOKE ALL ON ' || thing || {revoked};
  END LOOP;{beside}
  FOR thing IN
    SELECT oid::regprocedure FROM pg_catalog.pg_proc
    WHERE pronamespace = home AND proowner = master AND proname IN ({", ".join(map(literal, CUSTODY_FUNCTIONS))})
  LOOP
    EXECUTE 'REVOKE ALL ON FUNCTION ' || thing || {revoked};{custodian}
  END LOOP;{"" if roles.writer is None else _compare_rights(roles.writer, table)}{"".join(map(_usage, roles.names))}
END"""
    )


def _compare_rights(writer: str, table: str) -> str:
    return f"""
  -- PUBLIC may, unless default privileges took that away.
  thing := to_regprocedure(place || '.{signature(table)}');
  IF NOT has_function_privilege({literal(writer)}::name, to_regprocedure(thing)::oid, 'EXECUTE') THEN
    EXECUTE {_execute_to(writer)};
  END IF;"""


def _usage(name: str) -> str:
    return f"""
  IF NOT has_schema_privilege({literal(name)}::name, home, 'USAGE') THEN
    EXECUTE 'GRANT USAGE ON SCHEMA ' || place || {_to(name)};
  END IF;"""


def _execute_to(name: str) -> str:
    return f"'GRANT EXECUTE ON FUNCTION ' || thing || {_to(name)}"


def _to(name: str) -> str:
    return literal(f" TO {identifier(name)}")


def _rights_on(roles: Roles, name: str, rights: Mapping[str, frozenset[Right]]) -> str:
    grants = "".join(
        f"\n    EXECUTE 'GRANT {described(wanted)} ON ' || thing || {_to(role)};"
        for role, wanted in roles.wanted(rights).items()
        if wanted
    )
    return f"""
  thing := to_regclass(place || '."{name}"');
  IF thing IS NOT NULL THEN
    EXECUTE 'REVOKE ALL ON ' || thing || {literal(f" FROM {_grantees(roles)} CASCADE")};{grants}
  END IF;"""
