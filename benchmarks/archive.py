"""A million sealed rows into the archive and back: memory, rates, and whether every leaf is what it was.

``python -m benchmarks.archive`` takes some minutes and 5 GB of the disk; ``--rows`` says how many else. It exits with 1
if a bar is missed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pyarrow
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from tests.rows import fill
from tests.sealed import Sealed, Sealing

from tracevault import Verdict
from tracevault.archive.store import Store
from tracevault.archive.verify import verify_archive
from tracevault.postgres.embedded import acquire
from tracevault.postgres.schema import ensure_schema

START = datetime(2024, 1, 1, tzinfo=UTC)
STEP = timedelta(seconds=5)
# How much more memory ten times the rows may take.
MOST_GROWTH = 1.1


def command(*words: str) -> tuple[float, float]:
    """Run a command of tracevault; return its seconds and the most memory it had, in MiB."""
    began = time.perf_counter()
    most = 0
    with subprocess.Popen([sys.executable, "-m", "tracevault", *words], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            # Not its resource usage, which counts what this process had when it forked.
            with suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                most = max(most, int(next(line for line in lines if line.startswith("VmHWM")).split()[1]))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed")
    return time.perf_counter() - began, most / 1024


def tampered(store: Store) -> tuple[int, set[int | None]]:
    """Change one value of one row; return its leaf, and those that the verification then names."""
    file = max(store.manifests(), key=lambda one: one.rows).files[0]
    path = store.full(file.path)
    whole = Path(path).read_bytes()
    table = parquet.read_table(path, partitioning=None)
    place = table.num_rows // 2
    actors = table.column("actor_id").to_pylist()
    actors[place] = "somebody_else"
    number = table.schema.get_field_index("actor_id")
    changed = table.set_column(number, table.schema.field(number), pyarrow.array(actors, pyarrow.string()))
    parquet.write_table(changed, path, compression="zstd")
    found = {problem.index for problem in verify_archive(store).problems if problem.kind == "changed"}
    Path(path).write_bytes(whole)
    return table.column("leaf")[place].as_py(), found


def measure(conninfo: str, folder: Path, rows: int) -> bool:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        ensure_schema(connection, ["audit_logs"], {})
        fill(connection, rows, start=START, step=int(STEP.total_seconds() * 1000))
    with closing(Sealed(conninfo, folder, batch=10_000)) as log:
        size = log.seal()
        key, anchor = str(log.key()), str(log.anchor)
        tenth = (START + rows // 10 * STEP).isoformat()
        end = (START + rows * STEP + timedelta(days=1)).isoformat()
        dsn = ["--dsn", conninfo]
        _, small = command("archive", "--before", tenth, "--to", str(folder / "tenth"), *dsn)
        took, large = command("archive", "--before", end, "--to", str(folder / "all"), *dsn)
        kept = large <= MOST_GROWTH * small
        print(
            f"archive of {rows:,} rows: {rows / took:,.0f} rows/s, at most {large:.0f} MiB; of a tenth of them "
            f"{small:.0f} MiB: {large / small:.2f} x (bar {MOST_GROWTH}): {'ok' if kept else 'MISSED'}"
        )
        stored = sum(path.stat().st_size for path in (folder / "all").rglob("*") if path.is_file())
        with psycopg.connect(conninfo) as connection:
            found: Any = connection.execute("SELECT pg_total_relation_size('audit_logs')").fetchone()
        print(f"{stored / rows:.0f} bytes a row with all proofs, in the table {found[0] / rows:.0f}")
        verify = ["verify", "--archive", str(folder / "all"), "--key", key, "--anchor", anchor]
        took, most = command(*verify)
        print(f"verification: OK, {rows / took:,.0f} rows/s, at most {most:.0f} MiB")
        leaf, named = tampered(Store(folder / "all", "audit_logs"))
        print(f"one value of leaf {leaf:,} changed: {sorted(map(str, named))} named")
        log.seal()
        with Sealing(log):
            took, most = command(
                *("archive", "--before", end, "--to", str(folder / "all"), "--detach", "--yes", "--key", key, *dsn)
            )
        print(f"verified and detached in {took:.0f} s, at most {most:.0f} MiB")
        log.seal()
        pruned = log.verify()
        took, most = command("restore", "--from", str(folder / "all"), "--key", key, *dsn)
        print(f"verified and restored: {rows / took:,.0f} rows/s, at most {most:.0f} MiB")
        log.seal()
        back = log.verify()
    same = (pruned.verdict, back.verdict) == (Verdict.OK, Verdict.OK) and (pruned.pruned, back.pruned) == (size, 0)
    print(f"leaves as they were: {back.checked:,} of {back.size:,}, {len(back.problems)} problems")
    return kept and same and named == {leaf} and back.checked == back.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tracevault-bench-") as folder:
        server = acquire(f"embedded:{folder}/pgdata")
        try:
            kept = measure(server.conninfo, Path(folder), arguments.rows)
        finally:
            server.release()
    if not kept:
        raise SystemExit("a bar is missed")


if __name__ == "__main__":
    main()
