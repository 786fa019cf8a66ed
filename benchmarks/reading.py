"""Reading a log of a million rows: first pages, deep pages, steps of a tail, an export, and the viewer's list."""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import psycopg
from psycopg import RawCursor
from tests.rows import fill

from benchmarks.measure import Row, Seconds, often, pairs
from benchmarks.work import Bench
from tracevault import AuditQuery, Tracevault, start_tracevault
from tracevault.events.record import RECORD_COLUMNS
from tracevault.web import Access, viewer

ROWS = 1_000_000
DEEP = 500_000
STEP = 500
EXPORTED = 200_000
VIEWER_SECONDS = 0.05
_QUERIES = [
    b"",
    b"q=since:2026-01-05%20until:2026-01-12",
    b"q=actor:user/user_77",
    b"q=outcome:failure%20since:2026-01-05%20until:2026-01-12",
    b"q=event:auth.*",
]
_COLUMNS = ", ".join(RECORD_COLUMNS)
_TRACE = hashlib.md5(b"trace77", usedforsecurity=False).hexdigest()

# Each filter of one column, and how one would write it by hand.
FILTERS: dict[str, tuple[dict[str, Any], str, tuple[Any, ...]]] = {
    "no filter": ({}, "true", ()),
    "event": ({"event": "payment.captured"}, "event = $1", ("payment.captured",)),
    "event_prefix": ({"event_prefix": "auth."}, "event LIKE 'auth.%'", ()),
    "actor_id": ({"actor_id": "user_77"}, "actor_id = $1", ("user_77",)),
    "actor_ids": ({"actor_ids": ["user_77", "user_78"]}, "actor_id = ANY($1)", (["user_77", "user_78"],)),
    "actor_type": ({"actor_type": "user"}, "actor_type = $1", ("user",)),
    "target_id": ({"target_id": "product_77"}, "target_id = $1", ("product_77",)),
    "correlation_id": ({"correlation_id": "op_77"}, "correlation_id = $1", ("op_77",)),
    "request_id": ({"request_id": "req_77"}, "request_id = $1", ("req_77",)),
    "tenant_id": ({"tenant_id": "tenant_77"}, "tenant_id = $1", ("tenant_77",)),
    "trace_id": ({"trace_id": _TRACE}, "trace_id = $1", (_TRACE,)),
    "environment": ({"environment": "staging"}, "environment = $1", ("staging",)),
    "mode": ({"mode": "sync"}, "mode = $1", ("sync",)),
    "outcome": ({"outcome": "failure"}, "outcome = $1", ("failure",)),
    "error_code": ({"error_code": "E7"}, "error_code = $1", ("E7",)),
    "severity": ({"severity": "critical"}, "severity = $1", ("critical",)),
    "severities": ({"severities": ["critical", "error"]}, "severity = ANY($1)", (["critical", "error"],)),
    "errors_only": (
        {"errors_only": True},
        "(outcome = 'failure' OR severity IN ('error', 'critical', 'fatal'))",
        (),
    ),
    "changed": ({"changed": "price"}, "data->'diff' ? 'price'", ()),
    "is_null": ({"is_null": ["tenant_id"]}, "tenant_id IS NULL", ()),
    "since": ({"since": "2026-01-05"}, "occurred_at >= $1", ("2026-01-05",)),
}


def reading(bench: Bench) -> list[Row]:
    """Fill the table, and measure all of it."""
    with psycopg.connect(bench.conninfo, autocommit=True) as connection:
        for first in range(1, ROWS + 1, 100_000):
            fill(connection, 100_000, first=first)
        connection.execute("VACUUM ANALYZE audit_logs")
        with Tracevault(**bench.options()) as audit:
            rows = [
                _first_pages(bench, audit.query, connection),
                *_deep_pages(bench, audit.query, connection),
                _tail(bench, audit.query, connection),
                _export(bench, audit.query, connection),
            ]
    return [*rows, asyncio.run(_viewer(bench))]


_PAGE = "ORDER BY occurred_at DESC, id DESC LIMIT 50"


def _by_hand(
    connection: psycopg.Connection[Any], where: str, params: tuple[Any, ...], more: str = _PAGE
) -> Callable[[], Any]:
    sql = f"SELECT {_COLUMNS} FROM audit_logs WHERE {where} {more}".encode()
    cursor = RawCursor(connection)
    return lambda: cursor.execute(sql, params, binary=True).fetchall()


def _first_pages(bench: Bench, query: AuditQuery, connection: psycopg.Connection[Any]) -> Row:
    """Return the filter whose first page costs most, against the same by hand."""
    worst: tuple[float, str, Seconds] | None = None
    for name, (filters, where, params) in FILTERS.items():
        ours = often(partial(query.find_page, **filters))
        seconds = pairs(bench.pairs, ours, often(_by_hand(connection, where, params)))
        ratio = statistics.median(seconds.times())
        if worst is None or ratio > worst[0]:
            worst = ratio, name, seconds
    assert worst is not None
    _, name, seconds = worst
    note = f"`{name}`: {statistics.median(seconds.ours) / 20 * 1000:.2f} ms"
    against = f"by hand; the slowest of {len(FILTERS)} filters"
    return Row("time of a first page of 50", against, seconds.times(), 2, at_most=True, note=note)


def _deep_pages(bench: Bench, query: AuditQuery, connection: psycopg.Connection[Any]) -> list[Row]:
    cursor = query.find_page(limit=500).next_cursor
    for _ in range(DEEP // 500 - 1):
        assert cursor is not None
        page = query.find_page(limit=500, cursor=cursor)
        cursor = page.next_cursor
    assert cursor is not None
    last = page.rows[-1]
    by_hand = _by_hand(connection, "(occurred_at, id) < ($1::timestamptz, $2)", (last.occurred_at, last.id))
    deep = often(partial(query.find_page, cursor=cursor))
    first = often(query.find_page)
    against_hand = pairs(bench.pairs, deep, often(by_hand))
    against_first = pairs(bench.pairs, deep, first)
    name = f"time of the page after {DEEP:,} rows"
    return [
        Row(name, "by hand", against_hand.times(), 2, at_most=True),
        Row(name, "the first page", against_first.times(), 2, at_most=True),
    ]


def _tail(bench: Bench, query: AuditQuery, connection: psycopg.Connection[Any]) -> Row:
    tail = query.tail(after="beginning", follow=False)
    last = list(islice(tail, DEEP))[-1]
    position = str(tail.position)
    found = connection.execute("SELECT stored_xid::text FROM audit_logs WHERE id = %s", (last.id,)).fetchone()
    assert found is not None
    by_hand = _by_hand(
        connection,
        "(stored_xid, id) > ($1::xid8, $2)",
        (found[0], last.id),
        f"ORDER BY stored_xid, id LIMIT {STEP}",
    )
    ours = often(lambda: list(islice(query.tail(after=position, follow=False), STEP)), 5)
    seconds = pairs(bench.pairs, ours, often(by_hand, 5))
    return Row(f"time of a step of `tail`, {STEP} rows after {DEEP:,}", "by hand", seconds.times(), 2, at_most=True)


def _export(bench: Bench, query: AuditQuery, connection: psycopg.Connection[Any]) -> Row:
    # Of a part, so that the pairs take no quarter of an hour.
    until = f"timestamptz '2026-01-01 00:00:00+00' + {EXPORTED} * interval '1 second'"
    rows = f"SELECT {_COLUMNS} FROM audit_logs WHERE occurred_at <= {until}"
    copy = f"COPY (SELECT row_to_json(t) FROM ({rows}) t) TO STDOUT".encode()

    def plain() -> None:
        with connection.cursor().copy(copy) as rows, (bench.folder / "copy").open("wb") as file:
            for row in rows:
                file.write(row)

    found = connection.execute(f"SELECT {until}".encode()).fetchone()
    assert found is not None
    last = found[0]
    seconds = pairs(bench.pairs, lambda: query.export(bench.folder / "export", until=last), plain)
    name = "rate of exporting JSON Lines"
    return Row(name, "`COPY (SELECT row_to_json(...))`", seconds.rates(), 0.5, note=seconds.per_second(EXPORTED))


async def _viewer(bench: Bench) -> Row:
    times, size = [], 0
    async with start_tracevault(**bench.options()) as audit:
        app = viewer(audit, authorize=lambda _request: Access(), audit_reads=False)
        for query in _QUERIES * bench.pairs:
            began = time.perf_counter()
            size = max(size, await _get(app, query))
            times.append((time.perf_counter() - began) / VIEWER_SECONDS)
    name = "time of the viewer's list"
    return Row(name, "50 ms", times, 1, at_most=True, note=f"{size / 1000:,.0f} kB")


async def _get(app: Any, query: bytes) -> int:
    """Ask an ASGI app for its list, and return how many bytes it sends."""
    sizes = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200
        sizes.append(len(message.get("body", b"")))

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/s/default",
        "raw_path": b"/s/default",
        "root_path": "",
        "query_string": query,
        "headers": [(b"host", b"bench")],
        "scheme": "http",
        "server": ("bench", 80),
        "client": ("127.0.0.1", 1),
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    return sum(sizes)
