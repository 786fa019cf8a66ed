"""Other processes that check rows of the same log at the same time.

Each is a Python of its own with a connection of its own, which sees what this one sees (``pg_export_snapshot``). It is
told all it has to know over its standard input, since command lines and environments are not secret: first that, then
ranges of leaves, a line each, which it answers with a line each. It is no fork: this process may have threads.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
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
# Seconds that are waited at once: Python looks for signals in between, also for those that another thread took.
_STEP = 0.1

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
    """Checks ranges in their order, with helpers that check later ones meanwhile.

    Each helper is given another range when it has answered one, so that nobody waits for who began later or is slower.
    """

    def __init__(self, own: RowCheck, helpers: list[Helper], spans: Sequence[tuple[int, int]]) -> None:
        self._own = own
        self._helpers = helpers
        self._spans = spans
        self._turn = 0
        self._dealt = 0  # so many of the ranges were given to somebody
        self._found: dict[int, Findings] = {}
        # How far others may be ahead: what they found waits here, and in the pipes.
        self._ahead = 4 * (len(helpers) + 1)

    def check(self, start: int, end: int, hashes: bytes) -> Findings:
        """Return what is found of the leaves ``start`` to ``end``, like `RowCheck.check`.

        To be called with all ranges in their order. What a helper could not do, it raises; one that could not begin
        is given nothing.
        """
        turn, self._turn = self._turn, self._turn + 1
        assert self._spans[turn] == (start, end)
        while turn not in self._found:
            # The first range is checked here: helpers take longer than that to begin.
            for helper in list(self._helpers) if self._dealt else ():
                self._attend(helper)
            if turn in self._found:
                break
            if self._may_deal():
                number = self._deal()
                self._found[number] = self._own.check(*self._spans[number], hashes if number == turn else None)
            else:
                self._take(next(helper for helper in self._helpers if turn in helper.numbers))
        return self._found.pop(turn)

    def _attend(self, helper: Helper) -> None:
        """Take what a helper has found, and give it more: two ranges, so that it has one while it answers."""
        while helper.has_spoken:
            if helper.is_ready:
                self._take(helper)
            elif not helper.ready:
                self._helpers.remove(helper)
                return
        while helper.is_ready and len(helper.numbers) < 2 and self._may_deal():
            number = self._deal()
            helper.numbers.append(number)
            helper.give(*self._spans[number])

    def _take(self, helper: Helper) -> None:
        """Take what a helper found of the first of its ranges; waits for that."""
        found = helper.findings()
        self._found[helper.numbers.popleft()] = found

    def _may_deal(self) -> bool:
        return self._dealt < min(len(self._spans), self._turn + self._ahead)

    def _deal(self) -> int:
        number, self._dealt = self._dealt, self._dealt + 1
        return number

    def close(self) -> None:
        """End the helpers, whatever they are doing."""
        for helper in self._helpers:
            helper.close()


def crew(
    connection: Connection[Any],
    own: RowCheck,
    tree: Tree,
    spans: Sequence[tuple[int, int]],
    conninfo: str | None,
    jobs: int,
    place: Place,
) -> Crew:
    """Return who checks the ranges ``spans``, in at most ``jobs`` processes, this one among them.

    Helpers are possible only where ``conninfo`` says how to connect, where no pooler is in between, which might have
    no other connection to give, and where this program is Python itself.
    """
    jobs = min(jobs, len(spans))
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
            }
            try:
                for _ in range(1, jobs):
                    helpers.append(Helper(job, place))  # noqa: PERF401 - those begun are to be ended
            except OSError:
                pass  # the system has no process to give: those that there are do it
            except BaseException:
                for helper in helpers:
                    helper.close()
                raise
    return Crew(own, helpers, spans)


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
        self.numbers: deque[int] = deque()
        """The ranges that it was given and has not answered, in order."""
        # In a session of its own, Ctrl-C reaches this process alone, which then ends the other.
        self._process = subprocess.Popen(  # noqa: S603 - it is this Python
            [sys.executable, "-P", "-c", _BEGIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        self._heard = b""
        self._ended = False
        try:
            self._tell(json.dumps(job))
        except BaseException:
            self.close()
            raise

    def give(self, start: int, end: int) -> None:
        """Have it check the leaves ``start`` to ``end`` when it has done what it was given before."""
        self._tell(f"{start} {end}")

    def _tell(self, line: str) -> None:
        # What it is told through stays open: its end tells the other process that this one is gone.
        with suppress(BrokenPipeError):  # it ended, which is noticed when it is listened to
            cast("IO[bytes]", self._process.stdin).write(line.encode() + b"\n")

    @property
    def has_spoken(self) -> bool:
        """Whether there is an answer, or none will come any more: then nothing here waits."""
        while b"\n" not in self._heard and not self._ended:
            if not self._listen(0):
                return False
        return True

    def _listen(self, seconds: float) -> bool:
        """Wait until it says more, or ends, for so long; return whether it did."""
        pipe = cast("IO[bytes]", self._process.stdout).fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return False
        more = os.read(pipe, 1 << 16)
        self._heard += more
        self._ended = not more
        return True

    def _line(self) -> bytes | None:
        """Return the next line that it says; None if it has ended. Waits for that."""
        while b"\n" not in self._heard:
            if self._ended:
                return None
            self._listen(_STEP)
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    @property
    def is_ready(self) -> bool:
        """Whether it could begin, as far as that is known."""
        return self._ready is True

    @property
    def ready(self) -> bool:
        """Whether it could begin; waits until that is known."""
        if self._ready is None:
            self._ready = self._line() == b"ready"
            if not self._ready:
                self.close()
        return self._ready

    def findings(self) -> Findings:
        """Return what it found of its next range. Raises the `DriverError` that it met, or one that says it is gone."""
        line = self._line()
        if line is None:
            code = self._process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise DriverError(f"{self._place} failed: a process that checked rows ended by {how}", transient=True)
        if line.startswith(b"error "):
            error = json.loads(line[len(b"error ") :])
            raise DriverError(error["message"], sqlstate=error["sqlstate"], transient=error["transient"])
        return Findings.from_json(line)

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._ended = True
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            cast("IO[bytes]", pipe).close()
