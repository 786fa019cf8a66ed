"""Async emits: how fast they reach the database, what the caller waits, and what memory they take."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.measure import Row, Seconds, pairs_async
from benchmarks.work import EVENT, FIELDS, SETTINGS, Bench, copy_by_hand, ready_row, ready_rows
from tracevault import Tracevault, start_tracevault
from tracevault.events.binary import encode_row
from tracevault.events.prepare import prepare

COUNT = 50_000
PER_SECOND = 1_000
LATENCIES = 2_000


def throughput(bench: Bench, *, spool: bool) -> Row:
    """Emit and flush, against one binary COPY. What is by hand runs in a thread, so that both sides have the loop."""

    async def measure() -> Row:
        ready: list[tuple[Any, ...]] = []
        folder = tempfile.mkdtemp(dir=bench.folder)
        options = bench.options(default_mode="async", **({"spool": folder} if spool else {}))
        async with start_tracevault(**options) as vault:
            with psycopg.connect(bench.conninfo, autocommit=True) as connection:

                async def before() -> None:
                    bench.empty()
                    ready[:] = ready_rows(COUNT)
                    gc.collect()

                async def ours() -> None:
                    for _ in range(COUNT):
                        await vault.emit(EVENT, **FIELDS)
                    await vault.flush(60)

                async def plain() -> None:
                    await asyncio.to_thread(copy_by_hand, connection, ready)

                seconds = await pairs_async(bench.pairs, ours, plain, before)
        shutil.rmtree(folder)
        return _throughput_row(seconds, spool=spool)

    return asyncio.run(measure())


def _throughput_row(seconds: Seconds, *, spool: bool) -> Row:
    name = f"{COUNT:,} async `emit` and flush, {'spool' if spool else 'no spool'}: rate"
    bound = 0.5 if spool else 0.8
    return Row(name, "binary COPY of ready rows", seconds.rates(), bound, note=seconds.per_second(COUNT))


def waits(one: Callable[[], object]) -> list[float]:
    """Do ``one`` at an even rate; return the seconds that each took, sorted."""
    taken = []
    start = time.perf_counter()
    for number in range(LATENCIES):
        pause = start + number / PER_SECOND - time.perf_counter()
        if pause > 0:
            time.sleep(pause)
        begun = time.perf_counter()
        one()
        taken.append(time.perf_counter() - begun)
    return sorted(taken)


def latency(bench: Bench) -> list[Row]:
    """What the caller of an async emit waits with the spool on. By hand: validate, and append to SQLite."""
    blob = encode_row(ready_row())
    sides: dict[str, list[list[float]]] = {"ours": [], "plain": []}
    folder = tempfile.mkdtemp(dir=bench.folder)
    with Tracevault(**bench.options(default_mode="async", spool=folder)) as vault:
        for number in range(-1, bench.pairs):
            for side in ("ours", "plain") if number % 2 else ("plain", "ours"):
                gc.collect()
                if side == "ours":
                    taken = waits(lambda: vault.emit(EVENT, **FIELDS))
                    vault.flush(60)
                else:
                    taken = _by_hand(bench.folder, blob)
                if number >= 0:
                    sides[side].append(taken)
    shutil.rmtree(folder)
    rows = []
    for percent, bound in ((50, 1.5), (99, 2.0)):
        ours, plain = ([taken[len(taken) * percent // 100] for taken in sides[side]] for side in ("ours", "plain"))
        note = f"{statistics.median(ours) * 1e6:.0f} µs against {statistics.median(plain) * 1e6:.0f} µs"
        name = f"async `emit` at {PER_SECOND:,}/s with a spool: wait, p{percent}"
        rows.append(Row(name, "validate, append to SQLite", Seconds(ours, plain).times(), bound, True, note))
    return rows


def _by_hand(folder: Path, blob: bytes) -> list[float]:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        spool = sqlite3.connect(f"{place}/by-hand", isolation_level=None)
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "wal_autocheckpoint = 0"):
            spool.execute(f"PRAGMA {pragma}")
        spool.execute("CREATE TABLE record (number INTEGER PRIMARY KEY, row BLOB NOT NULL)")

        def one() -> None:
            prepare(EVENT, FIELDS, SETTINGS)
            spool.execute("INSERT INTO record (row) VALUES (?)", (blob,))

        taken = waits(one)
        spool.close()
        return taken


def memory(bench: Bench) -> tuple[str, bool]:
    """Return what the process of ``benchmarks.memory`` said, and whether its memory was bounded and flat."""
    command = [sys.executable, "-m", "benchmarks.memory", bench.conninfo]
    done = subprocess.run(
        command, check=False, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=400
    )
    if done.returncode:
        return f"memory: the process failed: {done.stderr.strip()[-500:]}", False
    result = json.loads(done.stdout)
    kept = result["grown"] <= result["allowed"] and abs(result["drift"]) <= result["drift_allowed"]
    return (
        f"memory, {result['events']:,} async events past a slow database ({result['rate']:,.0f}/s): "
        f"{result['before']:.0f} MiB before, grew by at most {result['grown']:.1f} MiB (bar {result['allowed']:.0f}), "
        f"from the second fifth to the last by {result['drift']:+.1f} MiB (bar ±{result['drift_allowed']:.0f}), "
        f"{result['stored']:,} stored: {'kept' if kept else 'MISSED'}"
    ), kept and bool(result["stored"] == result["events"])
