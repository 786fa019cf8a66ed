"""Sync emits: one after another, many at once, and in bulk."""

from __future__ import annotations

import asyncio
import gc
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from benchmarks.measure import Row, pairs, pairs_async, spread
from benchmarks.work import (
    DATA,
    EVENT,
    FIELDS,
    INSERT,
    META,
    SETTINGS,
    Bench,
    copy_by_hand,
    ready_row,
    ready_rows,
)
from tracevault import Tracevault, start_tracevault
from tracevault.events.ids import uuid7
from tracevault.events.prepare import prepare

ALONE = 400
TOGETHER = 4_000
PREPARATIONS = 4_000
MANY = 50_000
POOL = 10


def preparation(bench: Bench) -> Row:
    def ours() -> None:
        for _ in range(PREPARATIONS):
            prepare(EVENT, FIELDS, SETTINGS)

    def plain() -> None:
        for _ in range(PREPARATIONS):
            json.dumps(DATA)
            json.dumps(META)

    seconds = pairs(bench.pairs, ours, plain)
    return Row("validate, mask, encode, stamp: time", "two json.dumps", seconds.times(), 6, at_most=True)


def alone(bench: Bench) -> Row:
    row = ready_row()[1:]
    with (
        Tracevault(**bench.options()) as vault,
        psycopg.connect(bench.conninfo, autocommit=True) as connection,
    ):

        def ours() -> None:
            for _ in range(ALONE):
                vault.emit(EVENT, **FIELDS)

        def plain() -> None:
            for _ in range(ALONE):
                connection.execute(INSERT, (uuid7(), *row), prepare=True)

        seconds = pairs(bench.pairs, ours, plain)
    name = "`emit`, one after another, blocking: time"
    return Row(name, "prepared INSERT", seconds.times(), 1.3, at_most=True, note=seconds.per_second(ALONE))


def alone_async(bench: Bench) -> Row:
    async def measure() -> Row:
        row = ready_row()[1:]
        connecting = psycopg.AsyncConnection.connect(bench.conninfo, autocommit=True)
        async with start_tracevault(**bench.options()) as vault, await connecting as connection:

            async def ours() -> None:
                for _ in range(ALONE):
                    await vault.emit(EVENT, **FIELDS)

            async def plain() -> None:
                for _ in range(ALONE):
                    await connection.execute(INSERT, (uuid7(), *row), prepare=True)

            seconds = await pairs_async(bench.pairs, ours, plain)
        name = "`emit`, one after another, asyncio: time"
        return Row(name, "prepared INSERT", seconds.times(), 1.3, at_most=True, note=seconds.per_second(ALONE))

    return asyncio.run(measure())


def together(bench: Bench, callers: int, bound: float | None, name: str = "") -> Row:
    async def measure() -> Row:
        row = ready_row()[1:]
        pooling: AsyncConnectionPool[Any] = AsyncConnectionPool(
            bench.conninfo, min_size=POOL, max_size=POOL, kwargs={"autocommit": True}, open=False
        )
        async with start_tracevault(**bench.options()) as vault, pooling as pool:
            await pool.wait()

            async def one() -> None:
                await vault.emit(EVENT, **FIELDS)

            async def by_hand() -> None:
                async with pool.connection() as connection:
                    await connection.execute(INSERT, (uuid7(), *row), prepare=True)

            seconds = await pairs_async(
                bench.pairs,
                lambda: spread(callers, TOGETHER, one),
                lambda: spread(callers, TOGETHER, by_hand),
            )
        title = f"{callers} concurrent `emit`, asyncio{name}: rate"
        note = seconds.per_second(TOGETHER)
        return Row(title, f"pool of {POOL}, one INSERT each", seconds.rates(), bound, note=note)

    return asyncio.run(measure())


def slow_commit(bench: Bench) -> Row:
    """Each commit waits 2 ms more before its fsync; PostgreSQL lets others join that fsync, as a slow disk would."""
    slow = make_conninfo(bench.conninfo, options="-c commit_delay=2000 -c commit_siblings=0")
    return together(Bench(slow, bench.folder, bench.pairs), 64, None, " (commit_delay 2 ms)")


def threads(bench: Bench) -> Row:
    callers, row = 64, ready_row()[1:]
    pooling: ConnectionPool[Any] = ConnectionPool(
        bench.conninfo, min_size=POOL, max_size=POOL, kwargs={"autocommit": True}, open=False
    )
    with (
        Tracevault(**bench.options()) as vault,
        pooling as pool,
        ThreadPoolExecutor(callers) as executor,
    ):
        pool.wait()

        def by_hand() -> None:
            with pool.connection() as connection:
                connection.execute(INSERT, (uuid7(), *row), prepare=True)

        def spread_out(one: Any) -> None:
            def caller() -> None:
                for _ in range(TOGETHER // callers):
                    one()

            for done in [executor.submit(caller) for _ in range(callers)]:
                done.result()

        seconds = pairs(
            bench.pairs, lambda: spread_out(lambda: vault.emit(EVENT, **FIELDS)), lambda: spread_out(by_hand)
        )
    note = seconds.per_second(TOGETHER // callers * callers)
    name = f"{callers} concurrent `emit`, threads: rate"
    return Row(name, f"pool of {POOL}, one INSERT each", seconds.rates(), note=note)


def many(bench: Bench) -> Row:
    events: list[Any] = [{"event": EVENT, **FIELDS} for _ in range(MANY)]
    ready: list[tuple[Any, ...]] = []

    with (
        Tracevault(**bench.options()) as vault,
        psycopg.connect(bench.conninfo, autocommit=True) as connection,
    ):

        def before() -> None:
            bench.empty()
            ready[:] = ready_rows(MANY)
            gc.collect()

        seconds = pairs(bench.pairs, lambda: vault.emit_many(events), lambda: copy_by_hand(connection, ready), before)
    note = seconds.per_second(MANY)
    return Row(f"`emit_many` of {MANY:,}: rate", "binary COPY of ready rows", seconds.rates(), 0.75, note=note)
