-- tracevault 002: generated columns outcome and error_code
-- Rewrites a filled table that lacks them: its writers and readers wait meanwhile.
-- Safe to run again: psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f 002_audit_logs_outcome_error_code.sql
-- Made from tracevault.schema.ddl by `make sql`; do not edit.

ALTER TABLE "audit_logs"
  ADD COLUMN IF NOT EXISTS outcome VARCHAR(64) GENERATED ALWAYS AS (NULLIF(btrim(data->>'outcome'), '')) STORED,
  ADD COLUMN IF NOT EXISTS error_code VARCHAR(255) GENERATED ALWAYS AS (NULLIF(btrim(data->'error'->>'code'), '')) STORED;
