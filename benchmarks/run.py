"""Ratios of tracevault against the same work by hand, measured in one run on one PostgreSQL of its own (fsync on).

Each ratio is the median of interleaved pairs: ours, then by hand, and the other way round, so that whatever else
the machine does falls on both. A bar is missed when the better quartile of the pairs misses it; when only the
median does, the row is at the edge. Run it with ``make bench``; it exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python benchmarks/run.py`

from benchmarks import background, reading, sealing, sync, web
from benchmarks.measure import Row
from benchmarks.work import Bench
from tracevault import Tracevault, TracevaultError
from tracevault.postgres.embedded import acquire

ROWS: dict[str, Callable[[Bench], Row | list[Row]]] = {
    "prepare": sync.preparation,
    "alone": sync.alone,
    "alone-asyncio": sync.alone_async,
    "together": lambda bench: sync.together(bench, 64, 2.5),
    "together-50": lambda bench: sync.together(bench, 50, None),
    "together-500": lambda bench: sync.together(bench, 500, None),
    "together-threads": sync.threads,
    "together-slow-commit": sync.slow_commit,
    "many": sync.many,
    "async": lambda bench: background.throughput(bench, spool=False),
    "async-spool": lambda bench: background.throughput(bench, spool=True),
    "async-wait": background.latency,
    "seal-emit": sealing.emits,
    "seal-backlog": sealing.backlog,
    "seal-latency": sealing.latency,
    "verify": sealing.verification,
    "read": reading.reading,
    "middleware": web.middleware,
}
MEMORY = "memory"


def measure(bench: Bench, names: list[str]) -> list[str]:
    """Print the rows of ``names`` as they come; return those that missed their bar, or failed."""
    with Tracevault(**bench.options()):
        pass  # makes the table
    missed = []
    print("| tracevault | against | ratio | quartiles | bar | verdict | |\n|---|---|---|---|---|---|---|")
    for name in names:
        if name == MEMORY:
            continue
        bench.empty()
        try:
            found = ROWS[name](bench)
        except TracevaultError as error:
            print(f"| {name} | | | | | FAILED | {type(error).__name__}: {error} |", flush=True)
            missed.append(name)
            continue
        for row in found if isinstance(found, list) else [found]:
            print(row.line(), flush=True)
            if row.verdict == "MISSED":
                missed.append(row.name)
    if MEMORY in names:
        text, kept = background.memory(bench)
        print(f"\n{text}")
        if not kept:
            missed.append(MEMORY)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs of each row, at least 7 (default)")
    parser.add_argument("--only", action="append", choices=[*ROWS, MEMORY], help="this row; may be given again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tracevault-bench-") as folder:
        server = acquire(f"embedded:{folder}/pgdata")
        try:
            with psycopg.connect(server.conninfo) as connection:
                fsync = connection.execute("SHOW fsync").fetchone()
            pairs = max(7, arguments.pairs)
            print(f"psycopg {psycopg.__version__} ({psycopg.pq.__impl__}), fsync {fsync and fsync[0]}, {pairs} pairs\n")
            missed = measure(Bench(server.conninfo, Path(folder), pairs), arguments.only or [*ROWS, MEMORY])
        finally:
            server.release()
    if missed:
        raise SystemExit(f"\nmissed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
