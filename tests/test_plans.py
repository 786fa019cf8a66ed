"""Which index serves which filter, on rows enough for the planner to care."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.conftest import TEMPLATE, database
from tests.rows import fill
from tracevault.flows import Query
from tracevault.flows import tail as tail_flow
from tracevault.flows.read import page_query, select, walk, walk_after
from tracevault.postgres.schema import migrate, migration_plan
from tracevault.schema.filters import COUNT_FILTERS
from tracevault.schema.position import BEFORE_TRANSACTIONS, Position, Snapshot
from tracevault.schema.restriction import EVERYTHING

COUNT = 50_000

# A value that few rows have, and the indexes of which one is to be used. Without one: it walks by time.
SERVED: dict[str, tuple[Any, set[str]]] = {
    "event": ("payment.captured", {"event"}),
    "events": (["neither", "nothing"], {"event", "event_prefix"}),
    "event_prefix": ("zzz.", {"event_prefix"}),
    "actor_id": ("user_77", {"actor"}),
    "actor_ids": (["user_77", "user_78"], {"actor"}),
    "target_id": ("product_77", {"target"}),
    "target_ids": (["product_77", "product_78"], {"target"}),
    "correlation_id": ("op_77", {"correlation_occurred_id"}),
    "request_id": ("req_77", {"request"}),
    "tenant_id": ("tenant_77", {"tenant"}),
    "tenant_ids": (["tenant_77", "tenant_79"], {"tenant"}),
    "trace_id": ("ab" * 16, {"trace"}),
    "outcome": ("failure", {"outcome_occurred", "errors"}),
    "error_code": ("E7", {"error_code_occurred"}),
    "severity": ("critical", {"severity_occurred", "errors"}),
    "severities": (["critical", "fatal"], {"severity_occurred", "errors"}),
    "errors_only": (True, {"errors"}),
    "data": ({"payment.currency": "XXX"}, {"data_paths"}),
    "meta": ({"ip": "nowhere"}, {"meta_paths"}),
    "changed": ("nothing", {"data_changes"}),
    "since": ("2026-01-01T13:50:00Z", {"occurred_at"}),
    "until": ("2026-01-01T00:10:00Z", {"occurred_at"}),
}
BY_TIME: dict[str, Any] = {
    "actor_type": "user",
    "target_type": "product",
    "environment": "staging",
    "mode": "sync",
    "is_null": ["tenant_id"],
    "text": "user_77",
}


@pytest.fixture(scope="module")
def connection(running: Any) -> Iterator[psycopg.Connection[Any]]:
    server = running("18")
    for dsn in database(server, TEMPLATE):
        with psycopg.connect(dsn, autocommit=True) as link:
            fill(link, COUNT)
            migrate(link, migration_plan(link, ["audit_logs"], payloads=True), lambda _change: None, payloads=True)
            link.execute("VACUUM ANALYZE audit_logs")
            yield link


def plan(connection: psycopg.Connection[Any], query: Query) -> str:
    found = psycopg.RawCursor(connection).execute(f"EXPLAIN {query.sql}".encode(), query.params).fetchall()
    return "\n".join(line for (line,) in found)


def test_every_filter_is_told_of() -> None:
    assert set(SERVED) | set(BY_TIME) == set(COUNT_FILTERS)


@pytest.mark.parametrize("name", SERVED)
def test_an_index_serves_the_filter(connection: psycopg.Connection[Any], name: str) -> None:
    value, indexes = SERVED[name]
    shown = plan(connection, page_query(walk("audit_logs", {name: value}), select(), 51))
    assert any(f"idx_audit_logs_{index} " in shown or f"idx_audit_logs_{index}\n" in shown for index in indexes), shown
    assert "Seq Scan" not in shown


@pytest.mark.parametrize("name", BY_TIME)
def test_others_walk_by_time(connection: psycopg.Connection[Any], name: str) -> None:
    filters = {name: BY_TIME[name]} | ({"since": "2026-01-01T10:00:00Z"} if name == "text" else {})
    shown = plan(connection, page_query(walk("audit_logs", filters), select(), 51))
    assert "idx_audit_logs_occurred_at" in shown, shown


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize(
    "filters", [{}, {"event": "page.viewed"}, {"actor_id": "user_77"}, {"errors_only": True}], ids=str
)
def test_a_deep_page_enters_the_index_at_its_place(
    connection: psycopg.Connection[Any], filters: dict[str, Any], order: str
) -> None:
    row = connection.execute(
        "SELECT timestamptz_send(occurred_at), id FROM audit_logs ORDER BY occurred_at OFFSET 25000 LIMIT 1"
    ).fetchone()
    assert row is not None
    begun = walk("audit_logs", {**filters, "order": order})
    shown = plan(connection, page_query(walk_after(begun, row), select(), 51))
    assert "Index Cond" in shown, shown
    assert "ROW(occurred_at, id)" in shown.partition("Index Cond")[2].partition("\n")[0], shown


def test_a_step_of_a_tail_enters_the_index_at_its_place(connection: psycopg.Connection[Any]) -> None:
    row = connection.execute(
        "SELECT pg_current_snapshot()::text, stored_xid::text, id FROM audit_logs "
        "ORDER BY stored_xid, id OFFSET 25000 LIMIT 1"
    ).fetchone()
    assert row is not None
    position = Position("1", BEFORE_TRANSACTIONS, Snapshot.parse(row[0]), int(row[1]), row[2])
    flow = tail_flow._take(tail_flow.follower("audit_logs", {}, None, EVERYTHING), position, 500)
    query = next(flow)
    assert isinstance(query, Query)
    shown = plan(connection, query)
    assert "idx_audit_logs_stored" in shown, shown
    assert "ROW(stored_xid, id)" in shown.partition("Index Cond")[2].partition("\n")[0], shown
    assert "Seq Scan" not in shown
