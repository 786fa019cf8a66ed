-- tracevault 004: columns beyond Tracevault 1.0.1
-- Quick, also on a filled table.
-- Safe to run again: psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f 004_audit_logs_tracevault_columns.sql
-- Made from tracevault.schema.ddl by `make sql`; do not edit.

ALTER TABLE "audit_logs"
  ADD COLUMN IF NOT EXISTS tenant_id VARCHAR,
  ADD COLUMN IF NOT EXISTS trace_id VARCHAR,
  ADD COLUMN IF NOT EXISTS span_id VARCHAR,
  ADD COLUMN IF NOT EXISTS stored_xid XID8,
  ADD COLUMN IF NOT EXISTS payload_salt UUID,
  ALTER COLUMN stored_xid SET DEFAULT pg_current_xact_id(),
  ALTER COLUMN payload_salt SET DEFAULT gen_random_uuid();
