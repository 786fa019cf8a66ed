"""The functions by which rows leave an audit table, or lose their payload: nothing else passes the guards.

All do what sealed events of the same table say, and only that: ``tracevault.pruned`` names ranges of leaves whose
rows go, ``tracevault.erased`` those that lose payload and salt. So whoever may call them can do nothing that the log
does not tell. A pruning must be anchored as well, since what is gone cannot be looked at again. Rows that a legal hold
holds, see `schema.holds`, are passed over.

A partition whose rows are all named goes as a whole. Only events of tracevault itself, ``tracevault.*``, need not be
named: they move to the default partition. Those that tell of prunings and erasures always do, since they are what a
verification goes by.

They belong to the owner of the trees (SECURITY DEFINER) and set what `schema.guards` looks for. EXECUTE is for one
role, the custodian; ``tracevault roles --custodian`` grants it. Each takes part of a range, so that a large one can
be done in transactions of a bearable size, and may be called again.
"""

from __future__ import annotations

from tracevault.integrity.leaf import commitment_sql
from tracevault.schema.holds import HOLDS, is_held
from tracevault.schema.trees import ANCHORS, ERASURES, LEAVES, TREES

# What names of events of tracevault itself begin with.
OURS = "tracevault."
PRUNED = "tracevault.pruned"
ERASED = "tracevault.erased"
PRUNE = "tracevault_prune"
ERASE = "tracevault_erase"
DROP = "tracevault_drop_partition"
_RANGE = ("table_name text, event_id uuid, first bigint, past bigint", "(text, uuid, bigint, bigint)")
_PARTITION = ("table_name text, event_ids uuid[], partition text", "(text, uuid[], text)")

_TREE = """
  SELECT t.tree INTO number FROM {schema}.{trees} AS t
  JOIN pg_class AS c ON c.oid = audited AND c.relkind IN ('r', 'p')
  JOIN pg_roles AS o ON o.oid = c.relowner AND o.rolname = current_user
  WHERE t.table_name = $1 ORDER BY t.epoch DESC LIMIT 1;
  IF number IS NULL THEN
    RAISE 'table % is not a sealed audit table of the owner of this function', $1
      USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;"""

# {schema} becomes the quoted name of the schema, {event} the event's, {anchored} a check, {work} what is done.
_BODY = """
DECLARE
  audited regclass DEFAULT to_regclass('{schema}.' || quote_ident($1));
  number integer;
  stated jsonb;
  leaf bigint;
  touched bigint;
BEGIN{tree}
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
    AND r.event NOT IN (''{pruned}'', ''{erased}'') AND NOT {held}"""

# What is named must be sealed and anchored. A row that is not named, or is held, stays: none but ours may.
_DROP_BODY = """
DECLARE
  audited regclass DEFAULT to_regclass('{schema}.' || quote_ident($1));
  part regclass DEFAULT to_regclass('{schema}.' || quote_ident($3));
  number integer;
  named int8multirange;
  columns text;
  found text;
  stays text;
  others bigint;
  touched bigint;
BEGIN{tree}
  IF NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = part AND inhparent = audited) THEN
    RAISE '% is no partition of table %', $3, $1 USING ERRCODE = 'undefined_table';
  END IF;
  EXECUTE 'SELECT range_agg(int8range((s.range->>0)::bigint, (s.range->>1)::bigint)) FROM ' || audited || ' AS r
    JOIN {schema}.{leaves} AS l ON l.tree = $1 AND l.id = r.id AND l.occurred_at = r.occurred_at
    CROSS JOIN LATERAL jsonb_array_elements(r.data->''ranges'') AS s (range)
    WHERE r.id = ANY($2) AND r.event = ''{pruned}'' AND EXISTS (
      SELECT FROM {schema}.{anchors} AS a WHERE a.tree = $1 AND a.size > l.index AND a.receipt IS NOT NULL)'
    INTO named USING number, $2;
  EXECUTE 'LOCK TABLE ' || part || ' IN ACCESS EXCLUSIVE MODE';
  found := ' FROM ' || part || ' AS r
    LEFT JOIN {schema}.{leaves} AS l ON l.tree = $1 AND l.id = r.id AND l.occurred_at = r.occurred_at';
  stays := '(l.index IS NULL OR (l.index <@ $2) IS NOT TRUE OR r.event IN (''{pruned}'', ''{erased}'') OR {held})';
  EXECUTE 'SELECT count(*) FILTER (WHERE ' || stays || ' AND NOT starts_with(r.event, ''{ours}'')),
    count(*) FILTER (WHERE NOT ' || stays || ')' || found INTO others, touched USING number, named;
  IF others > 0 THEN
    RAISE 'partition % has % rows that no sealed and anchored event names, or that are held', $3, others
      USING ERRCODE = 'insufficient_privilege';
  END IF;
  SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) INTO columns FROM pg_attribute AS a
  WHERE a.attrelid = audited AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '';
  EXECUTE 'ALTER TABLE ' || audited || ' DETACH PARTITION ' || part;
  EXECUTE 'INSERT INTO ' || audited || ' (' || columns || ') SELECT ' || columns || ' FROM ' || part
    || ' WHERE (id, occurred_at) IN (SELECT r.id, r.occurred_at' || found || ' WHERE ' || stays || ')'
    USING number, named;
  EXECUTE 'DROP TABLE ' || part;
  RETURN touched;
END
"""

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


def _filled(body: str, event: str = "", anchored: str = "", work: str = "") -> str:
    text = body.replace("{tree}", _TREE).replace("{anchored}", anchored)
    text = text.replace("{work}", work.replace("{where}", _WHERE))
    for name, value in {
        "held": is_held("' || quote_literal($1) || '", "{schema}." + HOLDS),
        "event": event,
        "pruned": PRUNED,
        "erased": ERASED,
        "ours": OURS,
        "trees": TREES,
        "leaves": LEAVES,
        "anchors": ANCHORS,
        "erasures": ERASURES,
        "data": commitment_sql("data").replace("'", "''"),
        "meta": commitment_sql("meta").replace("'", "''"),
    }.items():
        text = text.replace(f"{{{name}}}", value)
    return text


# What each function does, its arguments, and their types.
BODIES = {
    PRUNE: (_filled(_BODY, PRUNED, _ANCHORED, _DELETE), *_RANGE),
    ERASE: (_filled(_BODY, ERASED, "", _STRIP), *_RANGE),
    DROP: (_filled(_DROP_BODY), *_PARTITION),
}


def define_custody() -> str:
    """Return the block that makes the functions beside the trees, for their owner; PUBLIC may not execute them."""
    made = "\n".join(
        f"""  EXECUTE 'CREATE OR REPLACE FUNCTION ' || place || '.{name}({arguments}) RETURNS bigint LANGUAGE plpgsql'
    || ' SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET tracevault.custody = ''on'' AS '
    || quote_literal(replace($body${body}$body$, '{{schema}}', place));
  EXECUTE 'REVOKE ALL ON FUNCTION ' || place || '.{name}{signature} FROM PUBLIC';
  EXECUTE 'ALTER FUNCTION ' || place || '.{name}{signature} OWNER TO ' || owner;"""
        for name, (body, arguments, signature) in BODIES.items()
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
