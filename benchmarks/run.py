"""Ratios of tracevault against plain psycopg doing the same work by hand, measured in one run.

Each ratio is the median of interleaved pairs: ours, then plain, and the other way round, so that whatever else
the machine does falls on both. Run it with ``make bench``; ``--pairs N`` sets how many pairs (11, at least 7).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import psycopg

from tracevault import AsyncTracevault, Tracevault, start_tracevault
from tracevault.event.ids import uuid7
from tracevault.event.mask import masked_names
from tracevault.event.payload import Encoder
from tracevault.event.prepare import Settings, prepare
from tracevault.event.record import INSERT_COLUMNS
from tracevault.postgres.embedded import acquire

EVENT = "product.price.updated"
DATA = {"old_price": 120, "new_price": 150}
META = {"ip": "127.0.0.1"}
FIELDS: dict[str, Any] = {
    "actor": {"id": "user_123", "type": "user"},
    "target": {"id": "product_456", "type": "product"},
    "data": DATA,
    "meta": META,
    "correlation_id": "req_abc",
}
MASK_FIELDS = ["password", "token", "pin"]
SETTINGS = Settings(Encoder(masked_names(MASK_FIELDS), "[REDACTED]", 262_144), "production", "sync")

EMITS = 400
PREPARATIONS = 4_000
MANY = 20_000

_PLACES = ", ".join("%s" for _ in INSERT_COLUMNS)
INSERT = f"INSERT INTO audit_logs ({', '.join(INSERT_COLUMNS)}) VALUES ({_PLACES})".encode()
COPY = f"COPY audit_logs ({', '.join(INSERT_COLUMNS)}) FROM STDIN".encode()


@dataclass
class Ratio:
    """One line of the table. ``bound`` is the promise; ``at_most`` says on which side of it we stay."""

    name: str
    plain: str
    ratios: list[float]
    bound: float
    at_most: bool

    @property
    def kept(self) -> bool:
        median = statistics.median(self.ratios)
        return median <= self.bound if self.at_most else median >= self.bound

    def row(self) -> str:
        low, _, high = statistics.quantiles(self.ratios, n=4)
        sign = "≤" if self.at_most else "≥"
        return (
            f"| {self.name} | {self.plain} | {statistics.median(self.ratios):.2f} | {low:.2f} to {high:.2f} "
            f"| {sign} {self.bound:g} |"
        )


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


async def timed_async(work: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


def pairs(count: int, ours: Callable[[], object], plain: Callable[[], object]) -> list[float]:
    """Return ours/plain for ``count`` interleaved pairs, after one of each to warm up."""
    ours(), plain()
    ratios = []
    for number in range(count):
        if number % 2:
            plain_time, our_time = timed(plain), timed(ours)
        else:
            our_time, plain_time = timed(ours), timed(plain)
        ratios.append(our_time / plain_time)
    return ratios


async def pairs_async(
    count: int, ours: Callable[[], Awaitable[object]], plain: Callable[[], Awaitable[object]]
) -> list[float]:
    await ours()
    await plain()
    ratios = []
    for number in range(count):
        if number % 2:
            plain_time, our_time = await timed_async(plain), await timed_async(ours)
        else:
            our_time, plain_time = await timed_async(ours), await timed_async(plain)
        ratios.append(our_time / plain_time)
    return ratios


def ready_row() -> tuple[Any, ...]:
    """Return a row that needs no more work but a new id."""
    row = prepare(EVENT, FIELDS, SETTINGS).row
    return (uuid7(), *row[1:])


def one_by_one(vault: Tracevault, connection: psycopg.Connection[Any], count: int) -> Ratio:
    row = ready_row()[1:]

    def ours() -> None:
        for _ in range(EMITS):
            vault.emit(EVENT, **FIELDS)

    def plain() -> None:
        for _ in range(EMITS):
            connection.execute(INSERT, (uuid7(), *row), prepare=True)

    return Ratio("`emit`, one after another, blocking", "prepared INSERT", pairs(count, ours, plain), 1.3, at_most=True)


async def one_by_one_async(vault: AsyncTracevault, connection: psycopg.AsyncConnection[Any], count: int) -> Ratio:
    row = ready_row()[1:]

    async def ours() -> None:
        for _ in range(EMITS):
            await vault.emit(EVENT, **FIELDS)

    async def plain() -> None:
        for _ in range(EMITS):
            await connection.execute(INSERT, (uuid7(), *row), prepare=True)

    ratios = await pairs_async(count, ours, plain)
    return Ratio("`emit`, one after another, async", "prepared INSERT", ratios, 1.3, at_most=True)


def preparation(count: int) -> Ratio:
    def ours() -> None:
        for _ in range(PREPARATIONS):
            prepare(EVENT, FIELDS, SETTINGS)

    def plain() -> None:
        for _ in range(PREPARATIONS):
            json.dumps(DATA)
            json.dumps(META)

    return Ratio("validate, mask, encode, stamp", "two json.dumps", pairs(count, ours, plain), 6, at_most=True)


def many(vault: Tracevault, connection: psycopg.Connection[Any], count: int) -> Ratio:
    events = [{"event": EVENT, **FIELDS} for _ in range(MANY)]
    ready: list[tuple[Any, ...]] = []

    def plain() -> None:
        with connection.transaction(), connection.cursor().copy(COPY) as copy:
            for row in ready:
                copy.write_row(row)

    def with_room(work: Callable[[], object]) -> float:
        nonlocal ready
        connection.execute("TRUNCATE audit_logs")
        ready = [ready_row() for _ in range(MANY)] if work is plain else []
        gc.collect()
        return timed(work)

    def ours() -> None:
        vault.emit_many(events)

    ratios = []
    for number in range(-1, count):
        works = (ours, plain) if number % 2 else (plain, ours)
        times = {work.__name__: with_room(work) for work in works}
        if number >= 0:  # the first pair warms up
            ratios.append(times["plain"] / times["ours"])
    return Ratio(f"`emit_many` of {MANY:,}, rate", "COPY of ready rows", ratios, 0.6, at_most=False)


async def many_async(vault: AsyncTracevault, connection: psycopg.AsyncConnection[Any], count: int) -> Ratio:
    events = [{"event": EVENT, **FIELDS} for _ in range(MANY)]
    ratios = []
    for number in range(-1, count):
        times = {}
        for name in ("ours", "plain") if number % 2 else ("plain", "ours"):
            await connection.execute("TRUNCATE audit_logs")
            ready = [ready_row() for _ in range(MANY)] if name == "plain" else []
            gc.collect()
            start = time.perf_counter()
            if name == "ours":
                await vault.emit_many(events)
            else:
                async with connection.transaction(), connection.cursor().copy(COPY) as copy:
                    for row in ready:
                        await copy.write_row(row)
            times[name] = time.perf_counter() - start
        if number >= 0:
            ratios.append(times["plain"] / times["ours"])
    return Ratio(f"`emit_many` of {MANY:,}, rate, async", "COPY of ready rows", ratios, 0.6, at_most=False)


def measure(conninfo: str, count: int) -> list[Ratio]:
    options: dict[str, Any] = {
        "connection_string": conninfo,
        "mask_fields": MASK_FIELDS,
        "environment": "production",
        "timeout": 60,
    }
    with Tracevault(**options) as vault, psycopg.connect(conninfo, autocommit=True) as connection:
        blocking = [one_by_one(vault, connection, count), preparation(count), many(vault, connection, count)]

    async def asynchronous() -> list[Ratio]:
        connecting = psycopg.AsyncConnection.connect(conninfo, autocommit=True)
        async with start_tracevault(**options) as vault, await connecting as connection:
            return [await one_by_one_async(vault, connection, count), await many_async(vault, connection, count)]

    return blocking + asyncio.run(asynchronous())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11)
    count = max(7, parser.parse_args().pairs)
    with tempfile.TemporaryDirectory(prefix="tracevault-bench-") as folder:
        server = acquire(f"embedded:{folder}/pgdata")
        try:
            ratios = measure(server.conninfo, count)
        finally:
            server.release()
    print(f"psycopg {psycopg.__version__} ({psycopg.pq.__impl__}), median of {count} interleaved pairs\n")
    print("| tracevault | against | ratio | quartiles | promised |\n|---|---|---|---|---|")
    for ratio in ratios:
        print(ratio.row())
    broken = [ratio.name for ratio in ratios if not ratio.kept]
    if broken:
        raise SystemExit(f"\nnot kept: {', '.join(broken)}")


if __name__ == "__main__":
    main()
