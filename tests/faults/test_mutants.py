"""The checker is checked: sources with a known fault must turn a scenario red."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What is changed in which file, the scenario that must see it, and what the scenario says then.
MUTANTS = {
    "replays do not expect to find their ids": (
        "flows/write.py",
        [('skip = " ON CONFLICT DO NOTHING" if taken else ""', 'skip = ""')],
        "test_killed_between_commit_and_delete",
        "not drained|proves nothing|doubled|lost",
    ),
    "records leave the spool before the commit": (
        "writer/delivery.py",
        [
            (
                "            failure, connected, certain = self._try(session, lane, part, place)\n",
                "            if lane.spool is not None:\n"
                "                self._forget(lane.spool, part)\n"
                "                lane.spool.depth += len(part)\n"
                "            failure, connected, certain = self._try(session, lane, part, place)\n",
            )
        ],
        "test_killed_a_hundred_times",
        "lost",
    ),
    "the time is stamped when it is written": (
        "writer/spool.py",
        [
            (
                "    return Prepared(row[_ID], row[_MODE], row, ",
                "    import datetime\n"
                "    row = list(row)\n"
                "    row[INSERT_COLUMNS.index('occurred_at')] = datetime.datetime.now(datetime.UTC)\n"
                "    row = tuple(row)\n"
                "    return Prepared(row[_ID], row[_MODE], row, ",
            )
        ],
        "test_two_processes_race_to_adopt",
        "occurred at",
    ),
    "a child unlocks what it has inherited": (
        "writer/spool.py",
        [
            (
                "        os.close(self._descriptor)\n        os.close(self._lock_descriptor)\n\n\n",
                "        os.close(self._descriptor)\n"
                "        fcntl.flock(self._lock_descriptor, fcntl.LOCK_UN)\n"
                "        os.close(self._lock_descriptor)\n\n\n",
            )
        ],
        "test_nobody_takes_over_the_file_of_a_parent_that_lives",
        "more than the dead children left",
    ),
    "a sync that failed counts": (
        "writer/spool.py",
        [
            (
                "                os.fdatasync(self._descriptor)\n                if",
                "                with contextlib.suppress(OSError):\n"
                "                    os.fdatasync(self._descriptor)\n                if",
            )
        ],
        "test_sync_fails_once",
        "lost",
    ),
    "a worker acknowledges before it stores": (
        "ingest/worker.py",
        [
            (
                "            try:\n                refused = await asyncio.to_thread(",
                "            await asyncio.gather(*(message.ack() for message, _ in group))\n"
                "            try:\n                refused = await asyncio.to_thread(",
            )
        ],
        "test_workers_are_killed_before_they_acknowledge",
        "lost| of ",
    ),
    "an event loop stands still for each write": (
        "engine.py",
        [
            (
                "                    await self.store(self.write_one(table, prepared, place))",
                "                    writer.store(scope, table, prepared, place)",
            ),
            (
                "                await writer.store_async(scope, table, prepared)",
                "                writer.store(scope, table, prepared, place)",
            ),
        ],
        "test_the_event_loop_is_not_held_up and far",
        "held up|hardly watched",
    ),
    "the newest file is synced first": (
        "writer/upkeep.py",
        [
            (
                "[*self._others, *([self._own] if self._own else [])]",
                "[*([self._own] if self._own else []), *self._others]",
            )
        ],
        "test_power_lost_without_fsync",
        "in the middle",
    ),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_turns_the_checker_red(mutant: str, tmp_path: Path) -> None:
    name, changes, scenario, complaint = MUTANTS[mutant]
    sources = tmp_path / "src"
    shutil.copytree(ROOT / "src", sources)
    file = sources / "tracevault" / name
    for text, changed in changes:
        before = file.read_text()
        assert before.count(text) == 1, f"{name} has changed: mend the mutant"
        file.write_text(before.replace(text, changed))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/faults", "-o", "norecursedirs=.*", "-k", scenario, "-q", "-x"],
        cwd=ROOT,
        env={**os.environ, "TRACEVAULT_FAULTS_SOURCES": str(sources)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout[-3000:]
    assert re.search(f"(FaultError|VacuousError|AssertionError).*({complaint})", result.stdout), result.stdout[-3000:]
