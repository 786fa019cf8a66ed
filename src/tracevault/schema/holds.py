"""Legal holds: which rows are kept whatever retention says. The functions of `schema.custody` look here as well."""

from __future__ import annotations

HOLDS = "tracevault_holds"
HELD = "tracevault.hold_placed"
RELEASED = "tracevault.hold_released"
# What a hold may say of the rows that it holds; each that is not NULL has to fit.
SUBJECTS = ("actor_id", "actor_type", "target_id", "target_type", "tenant_id", "correlation_id")

STATEMENT = f"""CREATE TABLE IF NOT EXISTS {HOLDS} (
  id uuid PRIMARY KEY,
  table_name text NOT NULL,
  actor_id text,
  actor_type text,
  target_id text,
  target_type text,
  tenant_id text,
  correlation_id text,
  since timestamptz,
  until timestamptz,
  reason text NOT NULL,
  placed_at timestamptz NOT NULL DEFAULT now(),
  placed_by text NOT NULL DEFAULT session_user,
  released_at timestamptz,
  released_by text,
  release_reason text
)"""


def is_held(table: str, holds: str = HOLDS) -> str:
    """Return the condition that a hold on a table, whose name is the SQL ``table``, holds row ``r``."""
    subjects = " AND ".join(f"(h.{name} IS NULL OR h.{name} = r.{name})" for name in SUBJECTS)
    return (
        f"EXISTS (SELECT FROM {holds} AS h WHERE h.table_name = {table} AND h.released_at IS NULL AND {subjects} "
        "AND (h.since IS NULL OR r.occurred_at >= h.since) AND (h.until IS NULL OR r.occurred_at <= h.until))"
    )
