-- tracevault 006: function that confirms retries of roles that may not read
-- Quick, also on a filled table.
-- Safe to run again: psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f 006_audit_logs_compare.sql
-- Made from tracevault.schema.ddl by `make sql`; do not edit.

DO $tracevault$
DECLARE
  audited regclass DEFAULT '"audit_logs"'::regclass;
  place text;
  owner text;
  body text DEFAULT $body$
DECLARE
    asker name DEFAULT CASE current_setting('role') WHEN 'none' THEN session_user ELSE current_setting('role') END;
    partitioned boolean;
BEGIN
    SELECT c.relkind = 'p' INTO partitioned
    FROM pg_class AS c JOIN pg_roles AS owner ON owner.oid = c.relowner
    WHERE c.oid = to_regclass({literal}) AND c.relkind IN ('r', 'p') AND owner.rolname = current_user
        AND has_column_privilege(asker, c.oid, 'id', 'INSERT') AND NOT has_table_privilege(asker, c.oid, 'SELECT');
    IF NOT FOUND THEN
        RAISE insufficient_privilege USING MESSAGE = 'this function compares for roles that may INSERT into its table'
            ' and not SELECT from it', HINT = 'After SET ROLE the new role counts, inside another SECURITY DEFINER'
            ' function the session''s; the function and its table must have one owner.';
    END IF;
    RETURN (
        SELECT CASE
            WHEN bool_or((NOT $3 OR stored.occurred_at = $2) AND (stored.event IS NOT DISTINCT FROM $4::character varying) AND (stored.actor_id IS NOT DISTINCT FROM $5::character varying) AND (stored.actor_type IS NOT DISTINCT FROM $6::character varying) AND (stored.target_id IS NOT DISTINCT FROM $7::character varying) AND (stored.target_type IS NOT DISTINCT FROM $8::character varying) AND (stored.data IS NOT DISTINCT FROM $9::jsonb OR (stored.payload_salt IS NULL AND stored.stored_xid IS NOT NULL AND stored.data IS NULL AND stored.meta IS NULL)) AND (stored.meta IS NOT DISTINCT FROM $10::jsonb OR (stored.payload_salt IS NULL AND stored.stored_xid IS NOT NULL AND stored.data IS NULL AND stored.meta IS NULL)) AND (stored.correlation_id IS NOT DISTINCT FROM $11::character varying) AND (stored.request_id IS NOT DISTINCT FROM $12::character varying) AND (stored.environment IS NOT DISTINCT FROM $13::character varying) AND (stored.tenant_id IS NOT DISTINCT FROM $14::character varying) AND (stored.trace_id IS NOT DISTINCT FROM $15::character varying) AND (stored.span_id IS NOT DISTINCT FROM $16::character varying)) THEN 'same'
            WHEN count(*) > 0 THEN 'different'
            ELSE 'absent'
        END
        FROM {table} AS stored
        WHERE stored.id = $1 AND (NOT partitioned OR stored.occurred_at = $2)
    );
END
$body$;
BEGIN
  SELECT quote_ident(n.nspname::text), quote_ident(r.rolname::text) INTO STRICT place, owner
  FROM pg_catalog.pg_class AS c
  JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  JOIN pg_catalog.pg_roles AS r ON r.oid = c.relowner
  WHERE c.oid = audited;
  IF EXISTS (
    SELECT FROM pg_catalog.pg_class AS c, pg_catalog.pg_proc AS p
    WHERE c.oid = audited AND p.oid = to_regprocedure(place || '."audit_logs_compare"(uuid, timestamp with time zone, boolean, character varying, character varying, character varying, character varying, character varying, jsonb, jsonb, character varying, character varying, character varying, character varying, character varying, character varying)')
      AND p.prosrc = replace(replace(body, '{literal}', quote_literal((place || '."audit_logs"'))), '{table}', (place || '."audit_logs"')) AND p.prosecdef AND p.proowner = c.relowner AND p.proconfig = ARRAY['search_path=pg_catalog, pg_temp']
  ) THEN
    RETURN;
  END IF;
  EXECUTE 'CREATE OR REPLACE FUNCTION ' || place || '."audit_logs_compare"(id uuid, occurred_at timestamp with time zone, given_time boolean, event character varying, actor_id character varying, actor_type character varying, target_id character varying, target_type character varying, data jsonb, meta jsonb, correlation_id character varying, request_id character varying, environment character varying, tenant_id character varying, trace_id character varying, span_id character varying)'
    || ' RETURNS text LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS '
    || quote_literal(replace(replace(body, '{literal}', quote_literal((place || '."audit_logs"'))), '{table}', (place || '."audit_logs"')));
  EXECUTE 'ALTER FUNCTION ' || place || '."audit_logs_compare"(uuid, timestamp with time zone, boolean, character varying, character varying, character varying, character varying, character varying, jsonb, jsonb, character varying, character varying, character varying, character varying, character varying, character varying) OWNER TO ' || owner;
END
$tracevault$;
