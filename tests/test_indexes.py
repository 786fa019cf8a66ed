"""The indexes: their names fit and never collide, and each is used by the query it serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import RawCursor
from psycopg.conninfo import make_conninfo

from tests.conftest import rows
from tracevault import generate_init_sql
from tracevault.flows import Query
from tracevault.flows.read import find_many
from tracevault.schema.indexes import INDEXES, OBSOLETE, index_name, temporary_name

TABLE_NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,62}", fullmatch=True)


def names_of(table: str) -> list[str]:
    names = [index.name(table) for index in INDEXES]
    return names + [temporary_name(kind, name) for name in names for kind in ("new", "old")]


@given(TABLE_NAMES, TABLE_NAMES)
def test_names_fit_and_differ(one: str, other: str) -> None:
    names = names_of(one) + (names_of(other) if one != other else [])
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 63
    assert names == [name.lower() for name in names]


@pytest.mark.parametrize(
    ("one", "other"),
    [("audit", "Audit"), ("a" * 62 + "b", "a" * 62 + "c"), ("a" * 35, "a" * 36), ("x" * 35, "X" * 35)],
)
def test_names_of_like_tables_differ(one: str, other: str) -> None:
    assert not set(names_of(one)) & set(names_of(other))


def test_names_are_the_reference_s_where_it_has_them() -> None:
    table = "a" * 35
    assert {f"idx_{table}_{suffix}" for suffix in ("event", "correlation_occurred_id", "severity_occurred")} < {
        index.name(table) for index in INDEXES
    }
    assert not set(OBSOLETE) & {index.suffix for index in INDEXES}
    assert index_name(table, OBSOLETE[0]) == f"idx_{table}_correlation_occurred"


# --- the planner --------------------------------------------------------------------------------------------

# Some 200 rows for each value: with a few rows the planner may as well sort.
FILL = """
INSERT INTO audit_logs (id, event, actor_id, actor_type, target_id, target_type, data, mode, occurred_at,
  correlation_id, request_id, environment, tenant_id, trace_id)
SELECT gen_random_uuid(), 'auth.' || mod(n, 97),
  'user' || mod(n, 97), CASE mod(n, 2) WHEN 0 THEN 'user' ELSE 'service' END,
  'order' || mod(n, 97), CASE mod(n, 2) WHEN 0 THEN 'order' ELSE 'invoice' END,
  CASE mod(n, 8) WHEN 0 THEN jsonb_build_object(
    'outcome', 'failure', 'severity', CASE mod(n, 16) WHEN 0 THEN 'error' ELSE 'info' END,
    'error', jsonb_build_object('code', 'E' || mod(n, 7))) END,
  'sync', timestamptz '2026-01-01Z' + n * interval '1 second',
  'corr' || mod(n, 97), 'req' || mod(n, 97), 'production', 'tenant' || mod(n, 97), 'trace' || mod(n, 97)
FROM generate_series(1, 20000) AS n
"""


@pytest.fixture(scope="module")
def filled_dsn(server: str) -> Iterator[str]:
    """A database whose collation is not C, where only an index made for it serves LIKE, with 20,000 rows."""
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("CREATE DATABASE planner TEMPLATE template0 LC_COLLATE 'C.UTF-8' LC_CTYPE 'C.UTF-8'")
        dsn = make_conninfo(server, dbname="planner")
        rows(dsn, generate_init_sql("audit_logs"))
        rows(dsn, FILL)
        rows(dsn, "VACUUM ANALYZE audit_logs")
        yield dsn
        admin.execute("DROP DATABASE planner WITH (FORCE)")


def plan_nodes(dsn: str, sql: str, params: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    """The nodes of the plan for a query."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        found = RawCursor(connection).execute(f"EXPLAIN (FORMAT JSON) {sql}".encode(), params).fetchone()
    assert found is not None
    nodes = [found[0][0]["Plan"]]
    for node in nodes:
        nodes += node.get("Plans", [])
    return nodes


@pytest.mark.parametrize("order", ["desc", "asc"])
@pytest.mark.parametrize(
    ("suffix", "filters"),
    [
        ("occurred_at", {}),
        ("occurred_at", {"since": "2026-01-01T01:00Z", "until": "2026-01-01T02:00Z"}),
        ("event", {"event": "auth.7"}),
        ("event", {"event": "auth.7", "since": "2026-01-01T01:00Z"}),
        ("actor", {"actor_id": "user7"}),
        ("actor", {"actor_id": "user7", "actor_type": "service"}),
        ("target", {"target_id": "order7"}),
        ("target", {"target_id": "order7", "target_type": "invoice"}),
        ("correlation_occurred_id", {"correlation_id": "corr7"}),
        ("request", {"request_id": "req7"}),
        ("outcome_occurred", {"outcome": "failure"}),
        ("error_code_occurred", {"error_code": "E3"}),
        ("severity_occurred", {"severity": "info"}),
        ("errors", {"errors_only": True}),
        ("errors", {"errors_only": True, "since": "2026-01-01T01:00Z"}),
    ],
)
def test_a_filter_is_served_in_order_by_its_index(
    filled_dsn: str, suffix: str, filters: dict[str, Any], order: str
) -> None:
    query = next(find_many("audit_logs", {**filters, "order": order}))
    assert isinstance(query, Query)
    nodes = plan_nodes(filled_dsn, query.sql, query.params)
    assert [node["Node Type"] for node in nodes] == ["Limit", "Index Scan"]
    assert nodes[1]["Index Name"] == index_name("audit_logs", suffix)
    if "actor_type" in filters:
        assert "actor_type" in nodes[1]["Index Cond"]  # checked inside the index, not row by row


@pytest.mark.parametrize(
    ("suffix", "condition"),
    [
        ("event_prefix", "WHERE event LIKE 'auth.77%'"),
        ("tenant", "WHERE tenant_id = 'tenant7' ORDER BY occurred_at DESC, id DESC LIMIT 50"),
        ("trace", "WHERE trace_id = 'trace7' ORDER BY occurred_at, id LIMIT 50"),
        ("stored", "WHERE stored_xid >= pg_current_xact_id() ORDER BY stored_xid, id LIMIT 50"),
    ],
)
def test_other_queries_are_served_by_their_index(filled_dsn: str, suffix: str, condition: str) -> None:
    nodes = plan_nodes(filled_dsn, f"SELECT id, event FROM audit_logs {condition}")
    assert index_name("audit_logs", suffix) in {node.get("Index Name") for node in nodes}
    assert "Sort" not in {node["Node Type"] for node in nodes}
