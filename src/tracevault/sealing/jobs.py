"""Other processes that check rows of the same log at the same time.

Each is a Python of its own with a connection of its own, which sees what this one sees (``pg_export_snapshot``). It is
told all it has to know over its standard input, since command lines and environments are not secret, and answers with
one line for each range of leaves. It is no fork: this process may have threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from psycopg import Connection
from psycopg.conninfo import make_conninfo

from tracevault.errors import DriverError
from tracevault.flows.seal import Tree
from tracevault.flows.verify import share_snapshot
from tracevault.integrity.tiles import WIDTH
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.sealing.findings import Findings
from tracevault.sealing.rows import RowCheck

MOST_JOBS = 64
# By default up to so many processes check a log, and only one a log of fewer leaves: Python takes 0.3 s to start.
_USUAL_JOBS = 4
_WORTH_IT = 150_000

# Modules are found where this process finds them, and nothing in the present folder stands in for one.
_BEGIN = (
    "import json, sys; job = json.loads(sys.stdin.buffer.readline()); sys.path[:] = job['path']; "
    "from tracevault.sealing.row_job import work; work(job)"
)


def jobs_for(leaves: int) -> int:
    """Return how many processes it pays to check so many leaves with."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_USUAL_JOBS, usable) if leaves >= _WORTH_IT else 1


def ranges(first: int, last: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges that leaves ``first`` to ``last`` are checked in; all but the first begin with a tile."""
    for begin in range(first - first % WIDTH, last, chunk):
        yield max(begin, first), min(begin + chunk, last)


class Crew:
    """Checks one range after another: this process and its helpers in turn, each with every n-th of them."""

    def __init__(self, own: RowCheck, helpers: list[Helper]) -> None:
        self._own = own
        self._turns: list[Helper | None] = [None, *helpers]
        self._number = -1

    def check(self, start: int, end: int, hashes: bytes) -> Findings:
        """Return what is found of the leaves ``start`` to ``end``, like `RowCheck.check`.

        To be called with all `ranges` in their order. What a helper could not do, it raises; the ranges of one that
        could not begin are checked here.
        """
        self._number += 1
        turn = self._number % len(self._turns)
        helper = self._turns[turn]
        if helper is not None and not helper.ready:
            helper = self._turns[turn] = None
        return self._own.check(start, end, hashes) if helper is None else helper.findings()

    def close(self) -> None:
        """End the helpers, whatever they are doing."""
        for helper in self._turns:
            if helper is not None:
                helper.close()


def crew(
    connection: Connection[Any],
    own: RowCheck,
    tree: Tree,
    span: tuple[int, int, int],
    conninfo: str | None,
    jobs: int,
    place: Place,
) -> Crew:
    """Return who checks the `ranges` of ``span``, in at most ``jobs`` processes, this one among them.

    Helpers are possible only where ``conninfo`` says how to connect, where no pooler is in between, which might have
    no other connection to give, and where this program is Python itself.
    """
    first, last, chunk = span
    jobs = min(jobs, -(-(last - first) // chunk))
    helpers: list[Helper] = []
    if jobs > 1 and conninfo is not None and _is_python():
        snapshot = run(connection, share_snapshot(connection.info.backend_pid), place)
        if snapshot is not None:
            job = {
                "path": [str(place) for place in sys.path],
                "conninfo": _same_server(connection, conninfo),
                "snapshot": snapshot,
                "table": tree.table,
                "allowed": [list(ranges) for ranges in own.allowed],
                "span": span,
                "jobs": jobs,
            }
            try:
                for turn in range(1, jobs):
                    helpers.append(Helper({**job, "turn": turn}, place))  # noqa: PERF401 - those begun are to be ended
            except OSError:
                pass  # the system has no process to give: those that there are do it
            except BaseException:
                Crew(own, helpers).close()
                raise
    return Crew(own, helpers)


def _is_python() -> bool:
    """Whether `sys.executable` is a Python, and not a program that has one in it, which would be started again."""
    name = Path(sys.executable or "").name
    return name.startswith(("python", "pypy")) and not getattr(sys, "frozen", False)


def _same_server(connection: Connection[Any], conninfo: str) -> str:
    """Return ``conninfo`` for the very server that ``connection`` leads to, where several are named."""
    info = connection.info
    where: dict[str, str | int] = {"host": info.host, "hostaddr": info.hostaddr, "port": info.port}
    return make_conninfo(conninfo, **{key: value for key, value in where.items() if value})


class Helper:
    """One other process. Raises `OSError` where it cannot be started."""

    def __init__(self, job: dict[str, Any], place: Place) -> None:
        self._place = place
        self._ready: bool | None = None
        # In a session of its own, Ctrl-C reaches this process alone, which then ends the other.
        self._process = subprocess.Popen(  # noqa: S603 - it is this Python
            [sys.executable, "-P", "-c", _BEGIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._answers = cast("IO[bytes]", self._process.stdout)
        try:
            self._tell(job)
        except BaseException:
            self.close()
            raise

    def _tell(self, job: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            # It stays open: its end tells the other process that this one is gone.
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ready = False

    @property
    def ready(self) -> bool:
        """Whether it could begin; waits until that is known."""
        if self._ready is None:
            self._ready = self._answers.readline() == b"ready\n"
            if not self._ready:
                self.close()
        return self._ready

    def findings(self) -> Findings:
        """Return what it found of its next range. Raises the `DriverError` that it met, or one that says it is gone."""
        line = self._answers.readline()
        if not line.endswith(b"\n"):
            code = self._process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise DriverError(f"{self._place} failed: a process that checked rows ended by {how}", transient=True)
        if line.startswith(b"error "):
            error = json.loads(line[len(b"error ") :])
            raise DriverError(error["message"], sqlstate=error["sqlstate"], transient=error["transient"])
        return Findings.from_json(line)

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._answers.close()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it never read what it was told
                self._process.stdin.close()
