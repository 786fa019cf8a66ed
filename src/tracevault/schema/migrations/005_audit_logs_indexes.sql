-- tracevault 005: indexes that serve filter and order
-- Writers wait while they are built; on a filled table `tracevault migrate` builds them without that.
-- Safe to run again: psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f 005_audit_logs_indexes.sql
-- Made from tracevault.schema.ddl by `make sql`; do not edit.

DO $tracevault$
DECLARE
  unlike regclass;
BEGIN
  FOR unlike IN
    SELECT x.indexrelid
    FROM pg_catalog.pg_index AS x
    JOIN pg_catalog.pg_class AS i ON i.oid = x.indexrelid
    JOIN (VALUES
      ('idx_audit_logs_occurred_at', 'USING btree (occurred_at DESC, id DESC)'),
      ('idx_audit_logs_event', 'USING btree (event, occurred_at DESC, id DESC)'),
      ('idx_audit_logs_event_prefix', 'USING btree (event varchar_pattern_ops)'),
      ('idx_audit_logs_actor', 'USING btree (actor_id, occurred_at DESC, id DESC, actor_type)'),
      ('idx_audit_logs_target', 'USING btree (target_id, occurred_at DESC, id DESC, target_type)'),
      ('idx_audit_logs_correlation_occurred_id', 'USING btree (correlation_id, occurred_at DESC, id DESC)'),
      ('idx_audit_logs_request', 'USING btree (request_id, occurred_at DESC, id DESC)'),
      ('idx_audit_logs_outcome_occurred', 'USING btree (outcome, occurred_at DESC, id DESC)'),
      ('idx_audit_logs_error_code_occurred', 'USING btree (error_code, occurred_at DESC, id DESC)'),
      ('idx_audit_logs_severity_occurred', 'USING btree (severity, occurred_at DESC, id DESC)'),
      ('idx_audit_logs_errors', 'USING btree (occurred_at DESC, id DESC)'),
      ('idx_audit_logs_tenant', 'USING btree (tenant_id, occurred_at DESC, id DESC)'),
      ('idx_audit_logs_trace', 'USING btree (trace_id, occurred_at DESC, id DESC)'),
      ('idx_audit_logs_stored', 'USING btree (stored_xid, id)'),
      ('idx_audit_logs_correlation_occurred', NULL)
    ) AS ours (name, keys) ON ours.name = i.relname
    WHERE x.indrelid = to_regclass('"audit_logs"')
      AND (ours.keys IS NULL OR strpos(pg_get_indexdef(i.oid), ours.keys) = 0 OR NOT x.indisvalid)
  LOOP
    EXECUTE 'DROP INDEX ' || unlike;
  END LOOP;
END
$tracevault$;

CREATE INDEX IF NOT EXISTS "idx_audit_logs_occurred_at" ON "audit_logs" (occurred_at DESC, id DESC);

CREATE INDEX IF NOT EXISTS "idx_audit_logs_event" ON "audit_logs" (event, occurred_at DESC, id DESC);

CREATE INDEX IF NOT EXISTS "idx_audit_logs_event_prefix" ON "audit_logs" (event varchar_pattern_ops);

CREATE INDEX IF NOT EXISTS "idx_audit_logs_actor" ON "audit_logs" (actor_id, occurred_at DESC, id DESC, actor_type) WHERE actor_id IS NOT NULL;

CREATE INDEX IF NOT EXISTS "idx_audit_logs_target" ON "audit_logs" (target_id, occurred_at DESC, id DESC, target_type) WHERE target_id IS NOT NULL;

CREATE INDEX IF NOT EXISTS "idx_audit_logs_correlation_occurred_id" ON "audit_logs" (correlation_id, occurred_at DESC, id DESC) WHERE correlation_id IS NOT NULL;

CREATE INDEX IF NOT EXISTS "idx_audit_logs_request" ON "audit_logs" (request_id, occurred_at DESC, id DESC) WHERE request_id IS NOT NULL;

CREATE INDEX IF NOT EXISTS "idx_audit_logs_outcome_occurred" ON "audit_logs" (outcome, occurred_at DESC, id DESC) WHERE outcome IS NOT NULL;

CREATE INDEX IF NOT EXISTS "idx_audit_logs_error_code_occurred" ON "audit_logs" (error_code, occurred_at DESC, id DESC) WHERE error_code IS NOT NULL;

CREATE INDEX IF NOT EXISTS "idx_audit_logs_severity_occurred" ON "audit_logs" (severity, occurred_at DESC, id DESC) WHERE severity IS NOT NULL;

CREATE INDEX IF NOT EXISTS "idx_audit_logs_errors" ON "audit_logs" (occurred_at DESC, id DESC) WHERE outcome = 'failure' OR severity IN ('error', 'critical', 'fatal');

CREATE INDEX IF NOT EXISTS "idx_audit_logs_tenant" ON "audit_logs" (tenant_id, occurred_at DESC, id DESC) WHERE tenant_id IS NOT NULL;

CREATE INDEX IF NOT EXISTS "idx_audit_logs_trace" ON "audit_logs" (trace_id, occurred_at DESC, id DESC) WHERE trace_id IS NOT NULL;

CREATE INDEX IF NOT EXISTS "idx_audit_logs_stored" ON "audit_logs" (stored_xid, id);
