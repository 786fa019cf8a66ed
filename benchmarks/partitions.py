"""Many rows in many partitions, against a tenth of them in the same partitions; and a conversion under load.

``python -m benchmarks.partitions`` makes 10,000,000 seeded rows in 36 months, which takes a quarter of an hour and
20 GB of the disk; ``--rows`` says how many else. It exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.rows import fill

from benchmarks.measure import Row, often, pairs
from benchmarks.work import DATA, EVENT
from tracevault import AuditQuery, Tracevault, start_tracevault
from tracevault.flows.partitions import make
from tracevault.integrity.note import Signer
from tracevault.postgres import partitions
from tracevault.postgres.embedded import acquire
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.schema.partitions import missing

MONTHS = 36
START = datetime(2024, 1, 1, tzinfo=UTC)
SPAN_MS = int((datetime(2027, 1, 1, tzinfo=UTC) - START).total_seconds() * 1000)
SCOPES = {
    "many": {"table_name": "many", "partition": "month"},
    "few": {"table_name": "few", "partition": "month"},
    "plain": {"table_name": "plain"},
}
PAIRS = 15
STEP = 500
BATCH = 20_000
WRITES = 500
_PLACE = Place("benchmark")


def make_partitions(connection: psycopg.Connection[Any], table: str) -> None:
    """Make the months that the rows are of."""
    layout = partitions.layout_of(connection, table)
    for wanted in missing(layout.partitions, "month", START, MONTHS):
        with connection.transaction():
            run(connection, make(partitions.layout_of(connection, table), "month", wanted), _PLACE)


def fill_all(connection: psycopg.Connection[Any], rows: int) -> None:
    """Make the rows: all of them, and a tenth of them, over the same time."""
    for table, count in (("many", rows), ("few", rows // 10), ("plain", rows // 10)):
        if table != "plain":
            make_partitions(connection, table)
        began, piece = time.monotonic(), min(count, 250_000)
        for first in range(1, count, piece):
            fill(connection, piece, table=table, first=first, start=START, step=SPAN_MS // count)
            print(f"\r{table}: {first + piece - 1:,} rows", end="", file=sys.stderr)
        connection.execute(f"VACUUM ANALYZE {table}".encode())
        print(f"\r{table}: {count:,} rows in {time.monotonic() - began:.0f} s", file=sys.stderr)


def reads(audit: Tracevault, connection: psycopg.Connection[Any], rows: int) -> Iterator[Row]:
    """Compare each read with the same of a tenth of the rows."""
    many, few = (audit.get_scope(name).query for name in ("many", "few"))
    against = f"the same of {rows // 10:,} rows"

    def row(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], count: int = 20) -> Row:
        seconds = pairs(PAIRS, often(ours, count), often(theirs, count))
        note = f"{statistics.median(seconds.ours) / count * 1000:.2f} ms"
        return Row(name, against, seconds.times(), 1.5, at_most=True, note=note)

    yield row("first page of 50", many.find_page, few.find_page)
    yield row("page in the middle", _middle(many), _middle(few))
    yield row(
        "find_by_id",
        _each(many.find_by_id, _ids(connection, "many", rows)),
        _each(few.find_by_id, _ids(connection, "few", rows // 10)),
    )
    first, second = _steps(many), _steps(few)
    yield row(f"step of tail, {STEP} events", partial(_step, first), partial(_step, second), count=2)
    yield row("events of one correlation id", _operations(many, rows), _operations(few, rows // 10))


def _middle(query: AuditQuery) -> Callable[[], Any]:
    """Return what reads a page of 50, twenty pages before July 2025."""
    place = _place(query, 20)
    return lambda: query.find_page(until="2025-07-01", limit=50, cursor=place)


def _place(query: AuditQuery, pages: int) -> str:
    page = query.find_page(until="2025-07-01", limit=50)
    for _ in range(pages):
        assert page.next_cursor is not None
        page = query.find_page(until="2025-07-01", limit=50, cursor=page.next_cursor)
    assert page.next_cursor is not None
    return page.next_cursor


def _ids(connection: psycopg.Connection[Any], table: str, rows: int) -> list[UUID]:
    """Return about 400 ids of all months."""
    percent = min(100.0, 40_000 / rows)
    sql = f"SELECT id FROM {table} TABLESAMPLE bernoulli({percent}) REPEATABLE (7)"
    return [row[0] for row in connection.execute(sql.encode()).fetchall()]


def _operations(query: AuditQuery, rows: int) -> Callable[[], None]:
    names = [f"op_{number}" for number in range(1, rows // 4, rows // 1600)]
    return _each(lambda name: query.find_many(correlation_id=name), names)


def _each(work: Callable[[Any], Any], values: list[Any]) -> Callable[[], None]:
    """Return what looks one value up after the other. All were looked up before: the disk is not what is compared."""
    place = 0
    began = time.perf_counter()
    for value in values:
        assert work(value)
    print(f"first time: {(time.perf_counter() - began) / len(values) * 1000:.2f} ms each", file=sys.stderr)

    def one() -> None:
        nonlocal place
        place = (place + 7) % len(values)
        assert work(values[place])

    return one


def _steps(query: AuditQuery) -> Any:
    tail = query.tail(after="beginning", follow=False)
    assert len(list(islice(tail, STEP))) == STEP
    return tail


def _step(tail: Any) -> None:
    assert len(list(islice(tail, STEP))) == STEP


def planning(connection: psycopg.Connection[Any]) -> Iterator[str]:
    """Say how long PostgreSQL plans, in milliseconds."""
    for name, what in {
        "first page": "ORDER BY occurred_at DESC, id DESC LIMIT 50",
        "one id": "WHERE id = '00000000-0000-7000-8000-000000000000'",
        "one id of a known time": "WHERE id = '00000000-0000-7000-8000-000000000000' "
        "AND occurred_at >= '2025-05-05' AND occurred_at < '2025-05-06'",
    }.items():
        found = []
        for table in ("many", "plain"):
            took = []
            for _ in range(9):
                (plan,) = connection.execute(f"EXPLAIN (SUMMARY, FORMAT json) SELECT * FROM {table} {what}".encode())
                took.append(plan[0][0]["Planning Time"])
            found.append(statistics.median(took))
        yield f"planning, {name}: {found[0]:.2f} ms, {found[1]:.2f} ms in a plain table"


def inserts(audit: Tracevault, connection: psycopg.Connection[Any]) -> Row:
    """Compare the rate of inserting into partitions with that of a plain table, both of as many rows."""
    events = [{"event": EVENT, "data": DATA, "correlation_id": f"c{number}"} for number in range(BATCH)]
    few, plain = audit.get_scope("few"), audit.get_scope("plain")
    seconds = pairs(
        9,
        lambda: few.emit_many(events),
        lambda: plain.emit_many(events),
        before=lambda: connection.execute("CHECKPOINT"),
    )
    return Row("rate of emit_many", "a plain table", seconds.rates(), 0.85, note=seconds.per_second(BATCH))


def conversion(conninfo: str, folder: Path, rows: int) -> bool:
    """Convert a table of sealed rows while events are written; print what its writers saw."""
    key = folder / "seal.key"
    key.touch(0o600)
    key.write_text(f"{Signer.generate('log.example.com/bench').encode()}\n")
    with psycopg.connect(conninfo, autocommit=True) as connection:
        with Tracevault(connection_string=conninfo, scopes={"default": "live"}):
            pass
        for first in range(1, rows, 250_000):
            fill(connection, min(rows, 250_000), table="live", first=first, start=START, step=SPAN_MS // rows // 2)
        options: dict[str, Any] = {"connection_string": conninfo, "scopes": {"default": "live"}, "timeout": 60}
        with Tracevault(**options, seal={"key": str(key), "every_ms": 100}) as sealing:
            sealing.await_sealed(sealing.emit("sealed").id, timeout=1800)
            (leaves,) = connection.execute("SELECT max(size) FROM tracevault_trees").fetchone() or (0,)
            hashes = connection.execute(
                "SELECT number, hashes FROM tracevault_tiles WHERE level = 0 ORDER BY 1"
            ).fetchall()
            took, failures, seconds = asyncio.run(_under_load(options, conninfo))
        key_line = str(Signer.parse(key.read_text().strip()).renamed("log.example.com/bench/live").verifier)
        with closing(Tracevault(**options)) as audit:
            report = audit.verify(keys=[key_line])
        (found,) = connection.execute("SELECT count(*) FROM live WHERE event = 'during'").fetchone() or (0,)
        after = connection.execute("SELECT number, hashes FROM tracevault_tiles WHERE level = 0 ORDER BY 1").fetchall()
        kept = all(now[1].startswith(old[1]) for old, now in zip(hashes, after, strict=False))
    ordered = sorted(took)
    slowest, late = ordered[-1] * 1000, ordered[-len(ordered) // 100] * 1000
    print(
        f"conversion of {rows:,} rows: {seconds:.1f} s, {len(took):,} writes at {len(took) / seconds:,.0f}/s: "
        f"{len(failures)} failed, {len(took) - found} lost, the slowest took {slowest:.0f} ms, p99 {late:.0f} ms; "
        f"{leaves:,} leaves {'kept' if kept else 'CHANGED'}, {report.verdict.name}, {len(report.problems)} problems"
    )
    for failure in failures[:3]:
        print(f"  {failure!r}")
    return not failures and ordered[-1] < 1 and found == len(took) and kept and not report.problems


async def _under_load(options: dict[str, Any], conninfo: str) -> tuple[list[float], list[BaseException], float]:
    took: list[float] = []
    failures: list[BaseException] = []
    done = asyncio.Event()
    async with start_tracevault(**options, bootstrap={"ensure_schema": False}) as audit:

        async def one() -> None:
            began = time.perf_counter()
            try:
                await audit.emit("during", data=DATA)
            except Exception as error:  # noqa: BLE001 - it is counted
                failures.append(error)
            else:
                took.append(time.perf_counter() - began)

        async def load() -> None:
            tasks = set()
            begun, number = time.perf_counter(), 0
            while not done.is_set():
                due = int((time.perf_counter() - begun) * WRITES)
                while number < due:
                    task = asyncio.create_task(one())
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    number += 1
                await asyncio.sleep(0.002)
            await asyncio.gather(*tasks)

        def convert() -> float:
            began = time.perf_counter()
            with psycopg.connect(conninfo, autocommit=True) as connection:
                partitions.convert(connection, partitions.plan_conversion(connection, "live", "month"))
            return time.perf_counter() - began

        loading = asyncio.create_task(load())
        await asyncio.sleep(3)
        seconds = await asyncio.to_thread(convert)
        await asyncio.sleep(2)
        done.set()
        await loading
    return took, failures, seconds + 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--convert", type=int, default=1_000_000, help="rows of the table that is converted")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tracevault-bench-") as folder:
        server = acquire(f"embedded:{folder}/pgdata")
        try:
            kept = conversion(server.conninfo, Path(folder), arguments.convert)
            kept = _measure(server.conninfo, arguments.rows) and kept
        finally:
            server.release()
    if not kept:
        raise SystemExit("a bar is missed")


def _measure(conninfo: str, rows: int) -> bool:
    options: dict[str, Any] = {"connection_string": conninfo, "scopes": SCOPES, "default_scope": "plain", "timeout": 60}
    missed = False
    with Tracevault(**options) as audit, psycopg.connect(conninfo, autocommit=True) as connection:
        fill_all(connection, rows)
        print("| what | against | ratio | quartiles | bar | verdict | |\n|---|---|---|---|---|---|---|")
        for row in (*reads(audit, connection, rows), inserts(audit, connection)):
            print(row.line(), flush=True)
            missed = missed or row.verdict == "MISSED"
        for line in planning(connection):
            print(line)
    return not missed


if __name__ == "__main__":
    main()
