"""The two functions by which rows leave an audit table, or lose their payload: nothing else passes the guards.

Both do what a sealed event of the same table says, and only that: ``tracevault.pruned`` names ranges of leaves whose
rows go, ``tracevault.erased`` those that lose payload and salt. So whoever may call them can do nothing that the log
does not tell. A pruning must be anchored as well, since what is gone cannot be looked at again.

They belong to the owner of the trees (SECURITY DEFINER) and set what `schema.guards` looks for. EXECUTE is for one
role, the custodian; ``tracevault roles --custodian`` grants it. Each takes part of a range, so that a large one can
be done in transactions of a bearable size, and may be called again.
"""

from __future__ import annotations

from tracevault.integrity.leaf import commitment_sql
from tracevault.schema.trees import ANCHORS, ERASURES, LEAVES, TREES

PRUNED = "tracevault.pruned"
ERASED = "tracevault.erased"
PRUNE = "tracevault_prune"
ERASE = "tracevault_erase"
ARGUMENTS = "table_name text, event_id uuid, first bigint, past bigint"
SIGNATURE = "(text, uuid, bigint, bigint)"

# {schema} becomes the quoted name of the schema, {event} the event's, {anchored} a check, {work} what is done.
_BODY = """
DECLARE
  audited regclass DEFAULT to_regclass('{schema}.' || quote_ident($1));
  number integer;
  stated jsonb;
  leaf bigint;
  touched bigint;
BEGIN
  SELECT t.tree INTO number FROM {schema}.{trees} AS t
  JOIN pg_class AS c ON c.oid = audited AND c.relkind IN ('r', 'p')
  JOIN pg_roles AS o ON o.oid = c.relowner AND o.rolname = current_user
  WHERE t.table_name = $1 ORDER BY t.epoch DESC LIMIT 1;
  IF number IS NULL THEN
    RAISE 'table % is not a sealed audit table of the owner of this function', $1
      USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;
  EXECUTE 'SELECT r.data->''ranges'', l.index FROM ' || audited || ' AS r JOIN {schema}.{leaves} AS l'
    || ' ON l.tree = $1 AND l.id = r.id AND l.occurred_at = r.occurred_at WHERE r.id = $2 AND r.event = $3'
    INTO stated, leaf USING number, $2, '{event}';
  IF leaf IS NULL THEN
    RAISE 'event % is no sealed event {event} of table %', $2, $1
      USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'It is sealed within a second while a sealer runs.';
  END IF;{anchored}
  IF NOT EXISTS (
    SELECT FROM jsonb_array_elements(stated) AS s (range)
    WHERE (range->>0)::bigint <= $3 AND (range->>1)::bigint >= $4
  ) THEN
    RAISE 'event % does not name the leaves from % to %', $2, $3, $4 USING ERRCODE = 'insufficient_privilege';
  END IF;
{work}
  GET DIAGNOSTICS touched = ROW_COUNT;
  RETURN touched;
END
"""

_ANCHORED = """
  IF NOT EXISTS (
    SELECT FROM {schema}.{anchors} AS a WHERE a.tree = number AND a.size > leaf AND a.receipt IS NOT NULL
  ) THEN
    RAISE 'event % is not anchored outside the database yet', $2
      USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'A sealer with an anchor does that.';
  END IF;"""

# The events that tell of prunings and erasures stay: they are what a verification goes by.
_WHERE = """ l.tree = $1 AND l.index >= $2 AND l.index < $3 AND r.id = l.id AND r.occurred_at = l.occurred_at
    AND r.event NOT IN (''{pruned}'', ''{erased}'')"""

_DELETE = (
    """  EXECUTE 'DELETE FROM ' || audited || ' AS r USING {schema}.{leaves} AS l WHERE{where}' USING number, $3, $4;"""
)

_STRIP = """  EXECUTE 'INSERT INTO {schema}.{erasures} (tree, index, data_commitment, meta_commitment, event_id)
    SELECT l.tree, l.index, CASE WHEN r.data IS NOT NULL THEN {data} END,
      CASE WHEN r.meta IS NOT NULL THEN {meta} END, $4
    FROM ' || audited || ' AS r, {schema}.{leaves} AS l
    WHERE{where} AND NOT (r.data IS NULL AND r.meta IS NULL)
    ON CONFLICT DO NOTHING' USING number, $3, $4, $2;
  EXECUTE 'UPDATE ' || audited || ' AS r SET data = NULL, meta = NULL, payload_salt = NULL
    FROM {schema}.{leaves} AS l
    WHERE{where} AND NOT (r.data IS NULL AND r.meta IS NULL)' USING number, $3, $4;"""


def _filled(event: str, anchored: str, work: str) -> str:
    text = _BODY.replace("{anchored}", anchored).replace("{work}", work.replace("{where}", _WHERE))
    for name, value in {
        "event": event,
        "pruned": PRUNED,
        "erased": ERASED,
        "trees": TREES,
        "leaves": LEAVES,
        "anchors": ANCHORS,
        "erasures": ERASURES,
        "data": commitment_sql("data").replace("'", "''"),
        "meta": commitment_sql("meta").replace("'", "''"),
    }.items():
        text = text.replace(f"{{{name}}}", value)
    return text


BODIES = {PRUNE: _filled(PRUNED, _ANCHORED, _DELETE), ERASE: _filled(ERASED, "", _STRIP)}


def define_custody() -> str:
    """Return the block that makes both functions beside the trees, for their owner; PUBLIC may not execute them."""
    made = "\n".join(
        f"""  EXECUTE 'CREATE OR REPLACE FUNCTION ' || place || '.{name}({ARGUMENTS}) RETURNS bigint LANGUAGE plpgsql'
    || ' SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET tracevault.custody = ''on'' AS '
    || quote_literal(replace($body${body}$body$, '{{schema}}', place));
  EXECUTE 'REVOKE ALL ON FUNCTION ' || place || '.{name}{SIGNATURE} FROM PUBLIC';
  EXECUTE 'ALTER FUNCTION ' || place || '.{name}{SIGNATURE} OWNER TO ' || owner;"""
        for name, body in BODIES.items()
    )
    return f"""DO $tracevault$
DECLARE
  place text;
  owner text;
BEGIN
  SELECT quote_ident(n.nspname::text), quote_ident(r.rolname::text) INTO STRICT place, owner
  FROM pg_catalog.pg_class AS c
  JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  JOIN pg_catalog.pg_roles AS r ON r.oid = c.relowner
  WHERE c.oid = '{TREES}'::regclass;
{made}
END
$tracevault$"""
