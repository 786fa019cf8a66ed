"""``tracevault bench``: what this database and this machine can do, in a table of its own."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from tracevault import Tracevault
from tracevault.cli.connect import connection, conninfo, write_dsn
from tracevault.cli.options import dsn_option, output_options
from tracevault.cli.output import Output, write_lines
from tracevault.events.json_text import json_text
from tracevault.schema.comparison import signature

_EVENT: dict[str, Any] = {
    "event": "product.price.updated",
    "actor": {"id": "user_123", "type": "user"},
    "target": {"id": "product_456", "type": "product"},
    "data": {"old_price": 120, "new_price": 150, "password": "masked"},
    "meta": {"ip": "127.0.0.1", "agent": "bench"},
    "correlation_id": "req_abc",
}
_CALLERS = 32


@click.command()
@click.option(
    "--events", type=click.IntRange(100, 1_000_000), default=10_000, show_default=True, help="events of each kind"
)
@dsn_option("DATABASE_URL_WRITE")
@output_options
def bench(dsn: str | None, events: int, output: Output) -> None:
    """Measure how many events a second can be stored and read here.

    In a table of its own, which is dropped in the end; the role has to be allowed to make one. Other work on the
    machine and on the server shows in the numbers.
    """
    table = f"tracevault_bench_{secrets.token_hex(4)}"
    with conninfo(write_dsn(dsn)) as target:
        try:
            options: dict[str, Any] = {"connection_string": target, "scopes": {"default": table}}
            with Tracevault(**options, mask_fields=["password"]) as audit:
                measured = list(_measured(audit, events))
        finally:
            with connection(target, "cleaning up") as link:
                link.execute(f'DROP TABLE IF EXISTS "{table}"'.encode())
                link.execute(f"DROP FUNCTION IF EXISTS {signature(table)}".encode())
    if output == "json":
        write_lines(
            json_text({"what": what, "count": count, "per_second": round(rate)}) for what, count, rate in measured
        )
    else:
        from tracevault.cli.show import print_rates  # noqa: PLC0415 - it needs rich, which JSON does not

        print_rates(measured)


def _measured(audit: Tracevault, events: int) -> Any:
    alone = max(100, events // 20)

    def one() -> None:
        audit.emit(**_EVENT)

    def one_by_one() -> None:
        for _ in range(alone):
            one()

    def together() -> None:
        with ThreadPoolExecutor(_CALLERS) as callers:
            for done in [callers.submit(one) for _ in range(events)]:
                done.result()

    def later() -> None:
        for _ in range(events):
            audit.emit(**_EVENT, mode="async")
        audit.flush(600)

    yield "emit, one after another", alone, _rate(alone, one_by_one)
    yield f"emit, {_CALLERS} threads at once", events, _rate(events, together)
    yield "emit, async, and flush", events, _rate(events, later)
    yield "emit_many", events, _rate(events, lambda: audit.emit_many([_EVENT] * events))
    yield "find_page, 50 events", 100, _rate(100, lambda: [audit.query.find_page() for _ in range(100)])
    every = audit.query.count()
    yield "iterate", every, _rate(every, lambda: sum(1 for _ in audit.query.iterate(page_size=5000)))


def _rate(count: int, work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)
