-- tracevault 003: generated column severity
-- Rewrites a filled table that lacks them: its writers and readers wait meanwhile.
-- Safe to run again: psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f 003_audit_logs_severity.sql
-- Made from tracevault.schema.ddl by `make sql`; do not edit.

ALTER TABLE "audit_logs"
  ADD COLUMN IF NOT EXISTS severity VARCHAR(32) GENERATED ALWAYS AS (NULLIF(btrim(data->>'severity'), '')) STORED;
