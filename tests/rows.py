"""Many rows, made in the database by one seeded statement: for tests of plans, and for the benchmark.

``python -m tests.rows DSN [COUNT]`` adds them to ``audit_logs``, a million unless COUNT says else.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg import Connection

# Shares as an application's: few events are most of the log, some ids are rare, some columns mostly empty.
_FILL = """
INSERT INTO "{table}" (id, event, actor_id, actor_type, target_id, target_type, data, meta, mode, occurred_at,
  correlation_id, request_id, environment, tenant_id, trace_id)
SELECT
  (lpad(to_hex({start} + n::bigint * {step}), 12, '0') || '7' || substr(md5('id' || n), 1, 3) || '8'
    || substr(md5('id' || n), 4, 15))::uuid,
  (ARRAY['page.viewed', 'auth.login', 'auth.logout', 'product.price.updated', 'order.placed', 'payment.captured',
    'report.exported'])[1 + least(6, floor(-ln(1 - u) * 1.6)::int)],
  'user_' || (n * 7919::bigint % 5000), 'user',
  'product_' || (n * 104729::bigint % 20000), (ARRAY['product', 'order'])[1 + n % 2],
  jsonb_build_object('price', n % 1000, 'payment', jsonb_build_object('currency',
    CASE WHEN n % 1000 = 0 THEN 'CHF' ELSE 'EUR' END))
  || CASE WHEN n % 50 = 0 THEN jsonb_build_object(
      'outcome', 'failure',
      'severity', (ARRAY['error', 'warning', 'critical'])[1 + n / 50 % 3],
      'error', jsonb_build_object('code', 'E' || n / 50 % 40))
    ELSE '{{"outcome": "success", "severity": "info"}}' END
  || CASE WHEN n % 200 = 7 THEN jsonb_build_object(
      'before', '{{"price": 1}}'::jsonb,
      'after', '{{"price": 2}}'::jsonb,
      'diff', '{{"price": {{"before": 1, "after": 2}}}}'::jsonb)
    ELSE '{{}}' END,
  jsonb_build_object('ip', '10.0.' || n % 250 || '.' || n % 200), 'sync',
  to_timestamp(({start} + n::bigint * {step}) / 1000.0),
  'op_' || n / 4, 'req_' || n / 2, (ARRAY['production', 'staging'])[1 + (n % 20 = 0)::int],
  CASE WHEN n % 3 > 0 THEN 'tenant_' || (n % 300) END, md5('trace' || n / 4)
FROM (
  SELECT n, ((n * 2654435761::bigint) % 1000003) / 1000003.0 AS u FROM generate_series({first}, {last}) AS n
) AS numbers
"""


START = datetime(2026, 1, 1, tzinfo=UTC)


def fill(
    connection: Connection[Any],
    count: int,
    *,
    table: str = "audit_logs",
    first: int = 1,
    start: datetime = START,
    step: int = 1000,
) -> None:
    """Add ``count`` rows, one each ``step`` milliseconds, and gather statistics. The same rows every time."""
    since = int(start.timestamp() * 1000)
    sql = _FILL.format(table=table, first=first, last=first + count - 1, start=since, step=step)
    connection.execute(sql.encode())
    connection.execute(f'ANALYZE "{table}"'.encode())


if __name__ == "__main__":
    with psycopg.connect(sys.argv[1], autocommit=True) as link:
        fill(link, int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000)
