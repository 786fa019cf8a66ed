"""A process that emits a million async events to a slow database, and watches its own memory. Prints JSON."""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from pathlib import Path
from resource import getpagesize
from typing import Any

import psycopg

from benchmarks.work import EVENT, FIELDS, MASK_FIELDS
from tracevault import Tracevault

EVENTS = 1_000_000
QUEUE = 10_000
TABLE = "audit_slow"
# Seconds that each statement takes longer: the caller is faster than that, so the queue is full nearly always.
SLOWER = 0.02
# MiB. A queued event takes less than 1 KiB; the rest is the connections' and the allocator's.
ALLOWED = QUEUE / 1024 + 16
DRIFT_ALLOWED = 4.0


def resident() -> float:
    """MiB of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize() / 2**20


def main(conninfo: str, events: int) -> None:
    options: dict[str, Any] = {"mask_fields": MASK_FIELDS, "environment": "production", "timeout": 60}
    with Tracevault(
        connection_string=conninfo, scopes={"default": TABLE}, default_mode="async", max_queue=QUEUE, **options
    ) as vault:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute(f"TRUNCATE {TABLE}".encode())
            connection.execute(
                "CREATE OR REPLACE FUNCTION audit_slow() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN PERFORM pg_sleep({SLOWER}); RETURN NULL; END $$".encode()
            )
            connection.execute(
                f"CREATE OR REPLACE TRIGGER slow BEFORE INSERT ON {TABLE} "
                "FOR EACH STATEMENT EXECUTE FUNCTION audit_slow()".encode()
            )
        before, samples, done = resident(), [], threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                samples.append(resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        try:
            for _ in range(events):
                vault.emit(EVENT, **FIELDS)
            sampled = len(samples)  # what drains afterwards says nothing about growth
            vault.flush(60)
        finally:
            done.set()
            watcher.join()
        took = time.perf_counter() - start
    with psycopg.connect(conninfo, autocommit=True) as connection:
        found = connection.execute(f"SELECT count(*) FROM {TABLE}".encode()).fetchone()
        connection.execute(f"DROP TABLE {TABLE}; DROP FUNCTION audit_slow".encode())
    fifth = sampled // 5
    result = {
        "events": events,
        "stored": found[0] if found else 0,
        "rate": events / took,
        "before": before,
        "grown": max(samples) - before,
        "allowed": ALLOWED,
        "drift": statistics.median(samples[4 * fifth : sampled]) - statistics.median(samples[fifth : 2 * fifth]),
        "drift_allowed": DRIFT_ALLOWED,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else EVENTS)
