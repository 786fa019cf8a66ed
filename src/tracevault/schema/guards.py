"""Guards: triggers that keep an audit table append-only, whoever holds which right on it.

A row trigger refuses UPDATE and DELETE, a statement trigger TRUNCATE, with SQLSTATE 42501. Both call one function,
``tracevault_guard()``, in the table's schema. What it lets through and what not:

- Only the custody functions pass, which prune and erase: SECURITY DEFINER, of the table's owner, with ``SET
  tracevault.custody = 'on'`` in their definition. So ``current_user`` has to be the owner, and the setting on. The
  setting alone opens nothing, since anybody may set it.
- Nothing passes from inside another trigger: an ON DELETE CASCADE of somebody's foreign key runs as the table's owner,
  in a session of somebody else, who could have set the setting.
- The function is SECURITY INVOKER, and finds nothing but the system's own functions and tables.
- The triggers are ENABLE ALWAYS: ``session_replication_role = replica`` does not silence them. They fire for the apply
  worker of a logical subscription as well, so a subscriber takes what is inserted, and stops at a prune or an erasure
  of its publisher. Publish with ``publish = 'insert'``; each side then prunes and erases by itself.
- pg_dump and pg_restore keep them. ``pg_restore --disable-triggers`` turns ALWAYS into the ordinary kind, which
  `doctor` sees and ``tracevault roles`` mends.
- Row triggers reach every partition, also a new one. TRUNCATE of a partition is guarded by a trigger of its own, which
  a partition made later lacks until ``tracevault roles`` runs again; meanwhile nobody but the owner has the right.

What they cannot do: the owner of the table can set the setting, disable or drop the triggers, or drop the table, and a
superuser can do anything. Guards stop mistakes and stolen application passwords. What an owner or a superuser does to
sealed rows is found by ``tracevault verify``.
"""

from __future__ import annotations

GUARD = "tracevault_guard"
CUSTODY = "tracevault.custody"
ROWS = "tracevault_guard_rows"
TRUNCATE = "tracevault_guard_truncate"

_SETTINGS = "search_path=pg_catalog, pg_temp"

# No percent sign and no lone colon: the text passes through other tools.
BODY = f"""
BEGIN
    IF current_setting('{CUSTODY}', true) = 'on' AND pg_trigger_depth() = 1 AND current_user = (
        SELECT pg_get_userbyid(c.relowner) FROM pg_class AS c
        WHERE c.oid = coalesce(pg_partition_root(TG_RELID), TG_RELID)
    ) THEN
        IF TG_OP = 'DELETE' THEN
            RETURN OLD;
        END IF;
        RETURN NEW;
    END IF;
    RAISE insufficient_privilege USING
        MESSAGE = 'audit table "' || TG_TABLE_NAME || '" is append-only, ' || TG_OP || ' is refused',
        HINT = 'Retention and erasure are the custodian''s, by `tracevault prune` and `tracevault erase`;'
            ' see docs/integrity.md.',
        SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME;
END
"""


def is_guard(body: str) -> str:
    """Return the SQL condition that function ``p`` (of pg_proc) is a guard for table ``c`` (of pg_class).

    Whoever owns the function can change it, so that is the table's owner, or a superuser where the tables of a schema
    have several owners. ``body`` is SQL for `BODY`.
    """
    return (
        f"p.prosrc = {body} AND NOT p.prosecdef AND p.proconfig = ARRAY['{_SETTINGS}'] AND (p.proowner = c.relowner "
        "OR EXISTS (SELECT FROM pg_catalog.pg_roles AS r WHERE r.oid = p.proowner AND r.rolsuper))"
    )


# Each guard that table {table} (an oid) and its partitions should have, and the trigger found under its name. The
# kinds of trigger are the bits of pg_trigger.tgtype: row 1, before 2, delete 8, update 16, truncate 32.
_GUARDS = f"""
SELECT part.oid::regclass AS part, part.oid = c.oid AS root, wanted.name, t.oid IS NOT NULL AS found,
  coalesce(t.tgparentid <> 0, false) AS cloned, t.tgenabled = 'A' AS always, t.tgenabled = 'D' AS disabled,
  coalesce(t.tgfoid = to_regprocedure(quote_ident(n.nspname::text) || '.{GUARD}()') AND t.tgtype = wanted.kind
    AND t.tgqual IS NULL AND t.tgattr::text = '', false) AS right_kind
FROM pg_catalog.pg_class AS c
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (SELECT c.oid UNION SELECT relid FROM pg_partition_tree(c.oid)) AS tree (oid)
JOIN pg_catalog.pg_class AS part ON part.oid = tree.oid
CROSS JOIN (VALUES ('{ROWS}', 27), ('{TRUNCATE}', 34)) AS wanted (name, kind)
LEFT JOIN pg_catalog.pg_trigger AS t ON t.tgrelid = part.oid AND t.tgname = wanted.name
WHERE c.oid = {{table}} AND NOT (part.relkind = 'f' AND wanted.name = '{TRUNCATE}')
"""

# For $1, the table's quoted name, and $2, `BODY`: what of its guards is missing or not in force; no row if nothing.
FAULTS = f"""
SELECT c.relname::text, 'the function {GUARD} is missing, or not as it should be'
FROM pg_class c
LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_proc p ON p.oid = to_regprocedure(quote_ident(n.nspname::text) || '.{GUARD}()')
WHERE c.oid = to_regclass($1) AND ({is_guard("$2")}) IS NOT TRUE
UNION ALL
(
SELECT c.relname::text, CASE g.name WHEN '{ROWS}' THEN 'UPDATE and DELETE are' ELSE 'TRUNCATE is' END || CASE
    WHEN NOT g.found THEN ' not guarded' WHEN NOT g.right_kind THEN ' guarded by another trigger than ours'
    WHEN g.disabled THEN ' not guarded, since the trigger is disabled'
    ELSE ' guarded in ordinary sessions alone, since the trigger is not ENABLE ALWAYS' END
FROM ({_GUARDS.format(table="to_regclass($1)")}) AS g JOIN pg_class c ON c.oid = g.part
WHERE NOT (g.found AND g.right_kind AND g.always)
ORDER BY g.root DESC, 1, g.name
)
"""


def install(table: str) -> str:
    """Return the block that guards ``table`` and its partitions; it does nothing, and locks nothing, where they are.

    Where a trigger is missing, writers wait while it is made.
    """
    guards = _GUARDS.format(table="audited")
    return f"""DO $tracevault$
DECLARE
  audited regclass DEFAULT '"{table}"'::regclass;
  place text;
  owner text;
  guard record;
  body text DEFAULT $body${BODY}$body$;
BEGIN
  SELECT quote_ident(n.nspname::text), quote_ident(pg_get_userbyid(c.relowner)::text) INTO STRICT place, owner
  FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  WHERE c.oid = audited;
  IF NOT EXISTS (
    SELECT FROM pg_catalog.pg_class AS c, pg_catalog.pg_proc AS p
    WHERE c.oid = audited AND p.oid = to_regprocedure(place || '.{GUARD}()') AND {is_guard("body")}
  ) THEN
    EXECUTE 'CREATE OR REPLACE FUNCTION ' || place || '.{GUARD}() RETURNS trigger LANGUAGE plpgsql'
      || ' SET search_path = pg_catalog, pg_temp AS ' || quote_literal(body);
    EXECUTE 'ALTER FUNCTION ' || place || '.{GUARD}() OWNER TO ' || owner;
  END IF;
  -- Partitions first: a row trigger of their own would be in the way of the one that they get from the table.
  FOR guard IN SELECT * FROM ({guards}) AS g ORDER BY g.root, g.part LOOP
    CONTINUE WHEN guard.cloned OR guard.right_kind AND (guard.root OR guard.name = '{TRUNCATE}');
    IF guard.found THEN
      EXECUTE 'DROP TRIGGER ' || guard.name || ' ON ' || guard.part;
    END IF;
    IF guard.name = '{TRUNCATE}' THEN
      EXECUTE 'CREATE TRIGGER {TRUNCATE} BEFORE TRUNCATE ON ' || guard.part
        || ' FOR EACH STATEMENT EXECUTE FUNCTION ' || place || '.{GUARD}()';
    ELSIF guard.root THEN
      EXECUTE 'CREATE TRIGGER {ROWS} BEFORE UPDATE OR DELETE ON ' || guard.part
        || ' FOR EACH ROW EXECUTE FUNCTION ' || place || '.{GUARD}()';
    END IF;
  END LOOP;
  FOR guard IN SELECT * FROM ({guards}) AS g WHERE g.found AND NOT g.always LOOP
    EXECUTE 'ALTER TABLE ONLY ' || guard.part || ' ENABLE ALWAYS TRIGGER ' || guard.name;
  END LOOP;
END
$tracevault$"""
