"""Who may do what: the least rights of each kind of role, and how to ask what they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tracevault.errors import ConfigError
from tracevault.events.record import BY_NAME, INSERT_COLUMNS, RECORD_COLUMNS
from tracevault.schema.comparison import companion
from tracevault.schema.custody import DROP, ERASE, PRUNE
from tracevault.schema.holds import HOLDS
from tracevault.schema.trees import ANCHORS, CHECKPOINTS, ERASURES, LEAVES, TILES, TREES

# A right is a word of GRANT and a column, or "" for all columns.
Right = tuple[str, str]

MAX_ROLE_NAME = 63
TENANT = "tracevault.tenant_id"
INSERTING = frozenset(("INSERT", column) for column in INSERT_COLUMNS)
SELECTING = frozenset({("SELECT", "")})
EXECUTING = frozenset({("EXECUTE", "")})

KINDS = ("writer", "reader", "sealer", "custodian", "tenant_reader")

# On an audit table. The sealer may record what it does, such as `key_added`.
TABLE_RIGHTS: Mapping[str, frozenset[Right]] = {
    "writer": INSERTING,
    "reader": SELECTING,
    "sealer": SELECTING | INSERTING,
    "custodian": SELECTING | INSERTING,
}

# On the tables of the vault, as far as they exist in the audit table's schema. Kinds that are not named have none. Who
# reads the log verifies it as well, and who prunes it looks at what is anchored.
_LOOKING = {"reader": ("SELECT",), "custodian": ("SELECT",)}
_KEEPING = {"sealer": ("SELECT", "INSERT", "UPDATE")}
VAULT_RIGHTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    TREES: {**_LOOKING, **_KEEPING},
    LEAVES: {**_LOOKING, "sealer": ("SELECT", "INSERT")},
    TILES: {**_LOOKING, **_KEEPING},
    CHECKPOINTS: {**_LOOKING, **_KEEPING},
    ANCHORS: {**_LOOKING, **_KEEPING},
    ERASURES: {**_LOOKING, "sealer": ("SELECT",)},
    HOLDS: {**_LOOKING, "custodian": ("SELECT", "INSERT", "UPDATE")},
}

# On the view that shows one tenant's events.
VIEW_RIGHTS: Mapping[str, frozenset[Right]] = {"tenant_reader": SELECTING}

# The functions of these names, in the audit table's schema and of its owner: the custodian's, and nobody else's. One of
# another owner could run anything as the custodian, so nothing is granted on it.
CUSTODY_FUNCTIONS = (PRUNE, ERASE, DROP)

# What PostgreSQL sets by default, so that nobody may set it: whoever could would forge when a row was stored.
UNSETTABLE = tuple(name for name, stored in BY_NAME.items() if stored.column.default is not None)


@dataclass(frozen=True)
class Roles:
    """The names of the roles, None for one that is not wanted. One role may be of several kinds."""

    writer: str | None = None
    reader: str | None = None
    sealer: str | None = None
    custodian: str | None = None
    tenant_reader: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Return each name once."""
        return tuple(dict.fromkeys(name for kind in KINDS if (name := getattr(self, kind)) is not None))

    def wanted(self, rights: Mapping[str, frozenset[Right]]) -> dict[str, frozenset[Right]]:
        """Return what each role is to have, given what each kind is."""
        result: dict[str, frozenset[Right]] = {name: frozenset() for name in self.names}
        for kind, granted in rights.items():
            name = getattr(self, kind)
            if name is not None:
                result[name] |= granted
        return result


def check_role_name(value: str, option: str) -> str:
    """Return ``value`` if it can name a role: 1-63 bytes of UTF-8, and no name that PostgreSQL keeps for itself.

    Raises `ConfigError`. Source: PostgreSQL, CREATE ROLE.
    """
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= MAX_ROLE_NAME or "\0" in value:
        raise ConfigError(f"`{option}`: the name of a role has 1 to {MAX_ROLE_NAME} bytes of UTF-8", field=option)
    if value in {"public", "none"} or value.startswith("pg_"):
        raise ConfigError(f"`{option}`: the name {value} is PostgreSQL's own; choose another", field=option)
    return value


def vault_rights(table: str) -> dict[str, frozenset[Right]]:
    """Return the rights of each kind on a table of the vault."""
    return {kind: frozenset((word, "") for word in words) for kind, words in VAULT_RIGHTS[table].items()}


def identifier(name: str) -> str:
    """Return a name quoted, as SQL."""
    return '"' + name.replace('"', '""') + '"'


def shown(name: str | None) -> str:
    """Return a role for a person, who may paste it into SQL: quoted where it has to be; None is PUBLIC."""
    if name is None:
        return "PUBLIC"
    return name if re.fullmatch("[a-z_][a-z0-9_]*", name) else identifier(name)


def literal(text: str) -> str:
    """Return a text as a literal of SQL, whatever ``standard_conforming_strings`` is."""
    quoted = "'" + text.replace("'", "''") + "'"
    return " E" + quoted.replace("\\", "\\\\") if "\\" in quoted else quoted


def described(rights: Iterable[Right]) -> str:
    """Return rights as GRANT and REVOKE take them: ``SELECT, INSERT (id, event)``."""
    columns: dict[str, list[str]] = {}
    order = [*INSERT_COLUMNS]
    for word, column in sorted(
        rights, key=lambda right: (right[0], order.index(right[1]) if right[1] in order else 99)
    ):
        columns.setdefault(word, []).append(column)
    return ", ".join(
        word if "" in names else f"{word} ({', '.join(map(_plain, names))})" for word, names in columns.items()
    )


def summary(rights: frozenset[Right]) -> str:
    """Return rights like `described`, without naming all columns of an event."""
    if rights >= INSERTING:
        others = described(rights - INSERTING)
        return f"INSERT ({len(INSERTING)} columns)" + (f", {others}" if others else "")
    return described(rights)


def _plain(column: str) -> str:
    return column if column in BY_NAME else identifier(column)


@dataclass(frozen=True)
class Thing:
    """One table, partition, view or function, and what anybody but its owner may do with it; None is PUBLIC.

    ``kind`` is one of those in `GRANTS`; ``sql`` is what stands after ON in GRANT; ``stranger`` owns it, if it is
    neither the audit table's owner nor a superuser.
    """

    kind: str
    name: str
    sql: str
    stranger: str | None
    granted: Mapping[str | None, frozenset[Right]]

    @property
    def rights(self) -> Mapping[str, frozenset[Right]]:
        """Return what each kind of role is to have on it."""
        match self.kind:
            case "table":
                return TABLE_RIGHTS
            case "view":
                return VIEW_RIGHTS
            case "vault":
                return vault_rights(self.name)
            case "custody":
                return {"custodian": EXECUTING}
            case _:
                return {}

    def too_much(self, grantee: str | None) -> frozenset[Right]:
        """Return which of the grantee's rights no kind of role has. Anybody may be let read, but not PUBLIC.

        INSERT on the whole table is none of them; see `sets_too_much`.
        """
        held = self.granted.get(grantee, frozenset())
        if grantee is None:
            return held
        allowed = frozenset[Right]().union(SELECTING, *self.rights.values())
        if self.kind in {"table", "partition"}:
            allowed |= {("INSERT", ""), *TABLE_RIGHTS["writer"]}
        return frozenset(right for right in held - allowed if right[0] != "SELECT")

    def sets_too_much(self, grantee: str | None) -> bool:
        """Whether a role may set columns of an audit table that are PostgreSQL's to set."""
        return self.kind == "table" and grantee is not None and ("INSERT", "") in self.granted.get(grantee, ())


# --- the view of a tenant's readers -------------------------------------------------------------------------


def tenant_view(table: str) -> str:
    """Return the name of the view that shows one tenant's events: ``{table}_tenant``."""
    return companion(table, "_tenant")


def view_query(table: str) -> str:
    """Return the query of the view; ``table`` is quoted. Without a tenant, or with an empty one, it finds nothing."""
    columns = ", ".join(RECORD_COLUMNS)
    return f"SELECT {columns} FROM {table} WHERE tenant_id = NULLIF(current_setting('{TENANT}', true), '')"


# --- what is found -----------------------------------------------------------------------------------------

# For $1, the table's quoted name: each thing that concerns the log, and each right that anybody but its owner has on
# it; a thing without any has one row. The kinds: table, partition, view, vault, custody (a function).
GRANTS = """
WITH audited AS (
  SELECT c.oid, c.relname, c.relnamespace, c.relowner FROM pg_class c WHERE c.oid = to_regclass($1)
), things AS (
  SELECT 0 AS place, 'table' AS kind, oid FROM audited
  UNION ALL
  SELECT 1, 'partition', t.relid FROM audited a, pg_partition_tree(a.oid) t WHERE t.relid <> a.oid
  UNION ALL
  SELECT 2, CASE c.relname WHEN $2 THEN 'view' ELSE 'vault' END, c.oid
  FROM audited a JOIN pg_class c ON c.relnamespace = a.relnamespace AND c.relname = ANY($3::text[] || $2::text)
), named AS (
  SELECT t.place, t.kind, c.relname::text AS name, quote_ident(n.nspname::text) || '.' || quote_ident(c.relname::text)
    AS sql, c.relowner, g.grantee, g.privilege_type, g.is_grantable, g.attname
  FROM things t JOIN pg_class c ON c.oid = t.oid JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN LATERAL (
    SELECT x.*, '' AS attname FROM aclexplode(c.relacl) x
    UNION ALL
    SELECT x.*, a.attname::text FROM pg_attribute a, aclexplode(a.attacl) x WHERE a.attrelid = c.oid
  ) AS g ON g.grantee <> c.relowner
  UNION ALL
  SELECT 3, 'custody', p.proname::text, 'FUNCTION ' || p.oid::regprocedure, p.proowner, x.grantee, x.privilege_type,
    x.is_grantable, ''
  FROM audited a JOIN pg_proc p ON p.pronamespace = a.relnamespace AND p.proowner = a.relowner
    AND p.proname = ANY($4::text[])
  LEFT JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) x ON x.grantee <> p.proowner
)
SELECT kind, named.name, sql, r.rolname::text,
  privilege_type || CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END, attname,
  CASE WHEN named.relowner <> audited.relowner AND NOT o.rolsuper THEN o.rolname::text END
FROM audited CROSS JOIN named JOIN pg_roles o ON o.oid = named.relowner LEFT JOIN pg_roles r ON r.oid = grantee
ORDER BY place, named.name, 3, 4 NULLS FIRST
"""

# For $1, the table's quoted name, $2, names of roles, and $3, the signature of the function that compares: for each
# role whether it exists, may do anything to the table, finds it, and may ask the function.
ROLES = """
SELECT given.name, r.oid IS NOT NULL, coalesce(pg_has_role(r.oid, c.relowner, 'MEMBER'), false),
  coalesce(has_schema_privilege(r.oid, n.oid, 'USAGE'), false),
  coalesce(has_function_privilege(r.oid, to_regprocedure(quote_ident(n.nspname::text) || '.' || $3)::oid, 'EXECUTE'),
    to_regprocedure(quote_ident(n.nspname::text) || '.' || $3) IS NULL)
FROM unnest($2::text[]) WITH ORDINALITY AS given (name, place)
JOIN pg_class c ON c.oid = to_regclass($1)
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_roles r ON r.rolname = given.name
ORDER BY given.place
"""

# For $1, names of roles (NULL: the owner of table $2): each with its members, by whatever way, superusers left out.
MEMBERS = """
SELECT given.name, quote_ident(m.rolname::text)
FROM unnest($1::text[]) AS given (name)
JOIN pg_class c ON c.oid = to_regclass($2)
JOIN pg_roles r ON r.rolname = given.name OR given.name IS NULL AND r.oid = c.relowner
JOIN pg_roles m ON m.oid <> r.oid AND m.oid <> c.relowner AND NOT m.rolsuper AND pg_has_role(m.oid, r.oid, 'MEMBER')
ORDER BY 1, 2
"""

# For $1, the table's quoted name, and $2, the view's name: whether there is anything of that name, whether it is such
# a view on the table and of its owner, its columns, and its query as PostgreSQL prints it.
VIEW = """
SELECT v.relkind = 'v' AND v.relowner = c.relowner AND v.reloptions = ARRAY['security_barrier=true'] AND EXISTS (
    SELECT FROM pg_rewrite w JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
    WHERE w.ev_class = v.oid AND d.refobjid = c.oid), pg_get_viewdef(v.oid)
FROM pg_class c JOIN pg_class v ON v.relnamespace = c.relnamespace AND v.relname = $2
WHERE c.oid = to_regclass($1)
"""


def is_tenant_view(table: str, printed: str) -> bool:
    """Whether a query, as PostgreSQL prints it, is that of the view of ``table``."""
    return _normal(printed) == _normal(view_query(table))


def _normal(query: str) -> str:
    """Strip what versions of PostgreSQL print in different ways: casts, brackets, quotes, blanks, qualifications."""
    return re.sub(r'::[a-z ]+|[()\s;"]', "", re.sub(r'(?:"(?:[^"]|"")+"|\w+)\.', "", query))
