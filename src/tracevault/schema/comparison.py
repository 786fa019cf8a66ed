"""Whether a stored event says the same as one that is sent again: the comparison, and the function that makes it.

A role that may read the table compares by itself. One that may only INSERT asks a function that belongs to the
table's owner (SECURITY DEFINER), so that a retry needs no right to read. What such a function must withstand:

- It says ``same``, ``different`` or ``absent`` of an event given whole, never which column differs. To learn what is
  stored, one would have to guess an id and everything else at once. Digests would serve a guesser no worse, and need
  a second canonical form of JSON.
- Who asks? Inside, ``current_user`` is the owner. The asker is the role that SET ROLE chose, else the session's; the
  server lets nobody set either to a role that he is not a member of. The asker must have INSERT, be it on the table's
  columns alone. That is checked inside, since it cannot be granted along with INSERT; so EXECUTE may stay with PUBLIC.
- Who may SELECT is turned away: he has no use for it. This keeps out code of other roles that runs in a session of a
  superuser or of the owner, such as an index expression during autovacuum, where the session is no sign of its rights.
- It reads only a table, named with its schema, of its own owner: a view put in that place could run anything as him.
  Temporary tables, and operators or functions elsewhere on a ``search_path``, are not found from inside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tracevault.events.record import BY_NAME, INSERT_COLUMNS, PAYLOAD_SALT, STORED_XID
from tracevault.integrity.leaf import PAYLOADS

# How it was written is not what was said: a retry in another mode is the same event.
CONTENT = tuple(name for name in INSERT_COLUMNS if name not in {"id", "mode", "occurred_at"})
# What the function is given: the key, whether the caller chose the time, so that it is content too, and the content.
_KEY = ("id", "occurred_at")
ARGUMENTS = (
    *((name, BY_NAME[name].column.sql_type) for name in _KEY),
    ("given_time", "boolean"),
    *((name, BY_NAME[name].column.sql_type) for name in CONTENT),
)

# Every row that knows its transaction has a salt, until it is erased.
_ERASED = (
    f"(stored.{PAYLOAD_SALT} IS NULL AND stored.{STORED_XID} IS NOT NULL"
    f"{''.join(f' AND stored.{name} IS NULL' for name in PAYLOADS)})"
)

_SUFFIX = "_compare"
_LONGEST_NAME = 63
_SETTINGS = "search_path=pg_catalog, pg_temp"


def companion(table: str, suffix: str) -> str:
    """Return the name of what stands beside a table: with ``suffix``, and shortened with a hash beyond 63 bytes."""
    if len(table) + len(suffix) <= _LONGEST_NAME:
        return table + suffix
    digest = hashlib.sha256(table.encode()).hexdigest()[:8]
    return f"{table[: _LONGEST_NAME - len(suffix) - 9]}_{digest}{suffix}"


def function_name(table: str) -> str:
    """Return the function's name: ``{table}_compare``."""
    return companion(table, _SUFFIX)


def signature(table: str) -> str:
    """Return the function's quoted name and the types of its arguments, without the schema, which is the table's."""
    return f'"{function_name(table)}"({", ".join(sql_type for _, sql_type in ARGUMENTS)})'


def call(schema: str, table: str) -> str:
    """Return the call of the function, with ``$1`` and up for `ARGUMENTS`; ``schema`` is quoted."""
    places = ", ".join(f"${place}::{sql_type}" for place, (_, sql_type) in enumerate(ARGUMENTS, 1))
    return f'{schema}."{function_name(table)}"({places})'


def says_the_same(columns: Sequence[str], first: int) -> str:
    """Return the condition that a row ``stored`` has these values in ``columns``; the first is ``${first}``.

    What the payloads of an erased row said is not known any more: they count as the same.
    """
    return " AND ".join(
        f"(stored.{name} IS NOT DISTINCT FROM ${place}::{BY_NAME[name].column.sql_type}"
        f"{f' OR {_ERASED}' if name in PAYLOADS else ''})"
        for place, name in enumerate(columns, first)
    )


# In a partitioned table only a row of the same time can be in the way, and only with the time is there an index.
# {table} becomes the quoted name with its schema, {literal} the same as a literal. No percent sign and no lone colon:
# the text passes through other tools.
BODY = f"""
DECLARE
    asker name DEFAULT CASE current_setting('role') WHEN 'none' THEN session_user ELSE current_setting('role') END;
    partitioned boolean;
BEGIN
    SELECT c.relkind = 'p' INTO partitioned
    FROM pg_class AS c JOIN pg_roles AS owner ON owner.oid = c.relowner
    WHERE c.oid = to_regclass({{literal}}) AND c.relkind IN ('r', 'p') AND owner.rolname = current_user
        AND has_column_privilege(asker, c.oid, 'id', 'INSERT') AND NOT has_table_privilege(asker, c.oid, 'SELECT');
    IF NOT FOUND THEN
        RAISE insufficient_privilege USING MESSAGE = 'this function compares for roles that may INSERT into its table'
            ' and not SELECT from it', HINT = 'After SET ROLE the new role counts, inside another SECURITY DEFINER'
            ' function the session''s; the function and its table must have one owner.';
    END IF;
    RETURN (
        SELECT CASE
            WHEN bool_or((NOT $3 OR stored.occurred_at = $2) AND {says_the_same(CONTENT, 4)}) THEN 'same'
            WHEN count(*) > 0 THEN 'different'
            ELSE 'absent'
        END
        FROM {{table}} AS stored
        WHERE stored.id = $1 AND (NOT partitioned OR stored.occurred_at = $2)
    );
END
"""


_FILLED = "replace(replace({body}, '{{literal}}', quote_literal({place})), '{{table}}', {place})"


def is_ours(body: str, place: str) -> str:
    """Return the SQL condition that function ``p`` (a row of pg_proc) of table ``c`` (of pg_class) is as it should be.

    ``body`` is SQL for `BODY`, ``place`` SQL for the table's quoted name with its schema.
    """
    filled = _FILLED.format(body=body, place=place)
    return f"p.prosrc = {filled} AND p.prosecdef AND p.proowner = c.relowner AND p.proconfig = ARRAY['{_SETTINGS}']"


def define(table: str) -> str:
    """Return the block that makes the function of ``table``, or replaces one that is not as it should be.

    It belongs to the table's owner, whoever runs this: with anybody else's rights the owner could do harm.
    """
    arguments = ", ".join(f"{name} {sql_type}" for name, sql_type in ARGUMENTS)
    return f"""DO $tracevault$
DECLARE
  audited regclass DEFAULT '"{table}"'::regclass;
  place text;
  owner text;
  body text DEFAULT $body${BODY}$body$;
BEGIN
  SELECT quote_ident(n.nspname::text), quote_ident(r.rolname::text) INTO STRICT place, owner
  FROM pg_catalog.pg_class AS c
  JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  JOIN pg_catalog.pg_roles AS r ON r.oid = c.relowner
  WHERE c.oid = audited;
  IF EXISTS (
    SELECT FROM pg_catalog.pg_class AS c, pg_catalog.pg_proc AS p
    WHERE c.oid = audited AND p.oid = to_regprocedure(place || '.{signature(table)}')
      AND {is_ours("body", f'''(place || '."{table}"')''')}
  ) THEN
    RETURN;
  END IF;
  EXECUTE 'CREATE OR REPLACE FUNCTION ' || place || '."{function_name(table)}"({arguments})'
    || ' RETURNS text LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS '
    || quote_literal({_FILLED.format(body="body", place=f'''(place || '."{table}"')''')});
  EXECUTE 'ALTER FUNCTION ' || place || '.{signature(table)} OWNER TO ' || owner;
END
$tracevault$"""


# For $1, the table, and $2, its `signature`: whether this role may SELECT, whether the table is partitioned, its
# schema, and whether its owner made the function and this role may use it; one of anybody else could tell lies.
RIGHTS = """
SELECT coalesce(has_table_privilege(c.oid, 'SELECT'), false), coalesce(c.relkind = 'p', false),
  quote_ident(n.nspname::text), EXISTS (
    SELECT FROM pg_proc p
    WHERE p.oid = to_regprocedure(quote_ident(n.nspname::text) || '.' || $2) AND p.prosecdef
      AND p.proowner = c.relowner AND has_function_privilege(p.oid, 'EXECUTE'))
FROM to_regclass(quote_ident($1)) AS found (oid)
LEFT JOIN pg_class c ON c.oid = found.oid
LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
"""
