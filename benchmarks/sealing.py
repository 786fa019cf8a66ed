"""Sealing: what emits lose by it, how fast a backlog is sealed and a log verified, and how soon an event is sealed."""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.measure import Row, pairs, spread, timed, timed_async
from benchmarks.work import EVENT, FIELDS, Bench
from tracevault import Tracevault, Verdict, start_tracevault
from tracevault.integrity.leaf import READ, statement_of
from tracevault.integrity.note import Signer
from tracevault.postgres.failures import Place
from tracevault.postgres.run import raw_rows
from tracevault.sealing.jobs import jobs_for
from tracevault.sealing.sealer import Sealer
from tracevault.sealing.signer import CheckpointSigner, SigningState
from tracevault.sealing.verify import Trust, verify

TABLE = "audit_logs"
EMITS = 12_000
CALLERS = 64
BACKLOG = 50_000
# Enough for other processes to help: below that each would start for longer than it works.
VERIFIED = 300_000
STEADY, STEADY_SECONDS = 2_000, 5
NAME = "bench.example/log"


def _clear(bench: Bench) -> None:
    """Forget table and trees, as if nothing had been sealed."""
    bench.empty()
    with psycopg.connect(bench.conninfo, autocommit=True) as connection:
        for name in ("trees", "leaves", "tiles", "checkpoints", "anchors", "erasures"):
            connection.execute(f"DROP TABLE IF EXISTS tracevault_{name}".encode())


def _key(folder: Path) -> Path:
    path = folder / "seal.key"
    if not path.exists():
        path.touch(0o600)
        path.write_text(f"{Signer.generate(NAME).encode()}\n")
    path.with_name("seal.key.state").unlink(missing_ok=True)
    return path


@contextmanager
def _sealer(bench: Bench) -> Iterator[Sealer]:
    state = SigningState(bench.folder / "state")
    state.path.unlink(missing_ok=True)
    signer = CheckpointSigner([Signer.generate(NAME)], state)
    sealer = Sealer(lambda: psycopg.connect(bench.conninfo, autocommit=True), [TABLE], signer)
    try:
        yield sealer
    finally:
        sealer.close()


def emits(bench: Bench) -> Row:
    """Concurrent emits of a vault that seals in its background, against one that does not."""

    async def measure(**options: Any) -> float:
        async with start_tracevault(**bench.options(**options)) as vault:

            async def one() -> None:
                await vault.emit(EVENT, **FIELDS)

            await spread(CALLERS, 500, one)
            return await timed_async(partial(spread, CALLERS, EMITS, one))

    ratios, rates = [], []
    for number in range(bench.pairs):
        seconds = {}
        for sealing in (True, False) if number % 2 else (False, True):
            _clear(bench)
            more = {"seal": {"key": str(_key(bench.folder)), "every_ms": 250}} if sealing else {}
            seconds[sealing] = asyncio.run(measure(**more))
        ratios.append(seconds[False] / seconds[True])
        rates.append(EMITS / seconds[True])
    note = f"{statistics.median(rates):,.0f}/s while sealing"
    return Row(
        f"{CALLERS} concurrent `emit` while sealing every 250 ms: rate", "the same, not sealing", ratios, 0.9, note=note
    )


def backlog(bench: Bench) -> Row:
    """Sealing rows that are there, against `emit_many` that puts them there."""
    events = [{"event": EVENT, **FIELDS}] * BACKLOG
    ratios, rates = [], []
    with Tracevault(**bench.options()) as vault:
        for _ in range(bench.pairs):
            _clear(bench)
            filling = timed(lambda: vault.emit_many(events))
            with _sealer(bench) as sealer:
                sealing = timed(lambda: sealer.seal(TABLE))
            ratios.append(filling / sealing)
            rates.append(BACKLOG / sealing)
    note = f"{statistics.median(rates):,.0f} rows/s"
    return Row(f"sealing a backlog of {BACKLOG:,}: rate", "`emit_many` that fills it", ratios, 1.5, note=note)


def verification(bench: Bench) -> Row:
    """Verifying every row, against SHA-256 over the same leaves in a bare loop."""
    _clear(bench)
    with Tracevault(**bench.options()) as vault:
        for _ in range(VERIFIED // BACKLOG):
            vault.emit_many([{"event": EVENT, **FIELDS}] * BACKLOG)
    with _sealer(bench) as sealer, psycopg.connect(bench.conninfo, autocommit=True) as connection:
        sealer.seal(TABLE)
        select = f"SELECT {', '.join(f'r.{name}' for name in READ)} FROM {TABLE} AS r"
        leaves = [statement_of(TABLE, row).leaf for row in raw_rows(connection, select, Place("reading"))]

        def ours() -> None:
            report = verify(connection, TABLE, Trust(), jobs=None, conninfo=bench.conninfo)
            assert (report.verdict, report.checked) == (Verdict.CONSISTENT, VERIFIED)

        def plain() -> None:
            for leaf in leaves:
                hashlib.sha256(leaf).digest()

        seconds = pairs(bench.pairs, ours, plain)
    note = seconds.per_second(VERIFIED)
    name = f"verifying {VERIFIED:,} rows in {jobs_for(VERIFIED)} processes: rate"
    return Row(name, "a bare SHA-256 loop", seconds.rates(), 0.1, note=note)


def latency(bench: Bench) -> Row:
    """How long an event takes from its emit to the checkpoint that covers it, 99th percentile, in seconds."""

    async def measure() -> float:
        emitted: list[tuple[float, Any]] = []
        async with start_tracevault(
            **bench.options(seal={"key": str(_key(bench.folder)), "every_ms": 250}, default_mode="async")
        ) as vault:
            started = time.perf_counter()
            for number in range(STEADY * STEADY_SECONDS):
                ahead = started + number / STEADY - time.perf_counter()
                if ahead > 0.001:
                    await asyncio.sleep(ahead)
                receipt = await vault.emit(EVENT, **FIELDS)
                if number % 20 == 0:
                    emitted.append((time.time(), receipt.id))
            await vault.await_sealed(emitted[-1][1], 30)
        with psycopg.connect(bench.conninfo) as connection:
            signed: dict[Any, float] = dict(
                connection.execute(
                    "SELECT l.id, extract(epoch FROM min(c.created_at))::float8 FROM tracevault_leaves AS l "
                    "JOIN tracevault_checkpoints AS c ON c.tree = l.tree AND c.size > l.index "
                    "WHERE l.id = ANY(%s) GROUP BY l.id",
                    ([id_ for _, id_ in emitted],),
                ).fetchall()
            )
        waits = [signed[id_] - at for at, id_ in emitted]
        return float(statistics.quantiles(waits, n=100)[98])

    ratios = []
    for _ in range(bench.pairs):
        _clear(bench)
        ratios.append(asyncio.run(measure()))
    name = f"from `emit` to a signed checkpoint at {STEADY:,} events/s: p99"
    return Row(name, "one second", ratios, 1.0, at_most=True)
