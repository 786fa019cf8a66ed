-- tracevault 001: the table
-- Does nothing where it exists.
-- Safe to run again: psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f 001_init_audit_logs.sql
-- Made from tracevault.schema.ddl by `make sql`; do not edit.

CREATE TABLE IF NOT EXISTS "audit_logs" (
  id UUID PRIMARY KEY,
  event VARCHAR NOT NULL,
  actor_id VARCHAR,
  actor_type VARCHAR,
  target_id VARCHAR,
  target_type VARCHAR,
  data JSONB,
  meta JSONB,
  mode VARCHAR NOT NULL,
  occurred_at TIMESTAMPTZ NOT NULL,
  created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
  correlation_id VARCHAR,
  request_id VARCHAR,
  environment VARCHAR
);
