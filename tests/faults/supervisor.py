"""The supervisor's side: a scenario with its victims, its ledger and its verdict."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import Empty, Queue
from typing import Any, NamedTuple

from psycopg.conninfo import make_conninfo

from tests.faults.ledger import FaultError, Ledger, VacuousError, Verdict, check
from tests.faults.proxy import Proxy
from tests.faults.server import ROLE, Server
from tests.faults.shim import Shim
from tracevault.writer.spool import is_held

ROOT = Path(__file__).resolve().parents[2]
# A mutant puts its own copy of the sources here, for the victims alone.
SOURCES = os.environ.get("TRACEVAULT_FAULTS_SOURCES", str(ROOT / "src"))


class Died(Exception):  # noqa: N818 - it is an event, not a mistake
    """The victim ended instead of answering."""


class Row(NamedTuple):
    """One line of the table that is printed at the end."""

    scenario: str
    acknowledged: int
    lost: int
    doubled: int
    replayed: int
    dead: int
    seconds: float


ROWS: list[Row] = []


class Victim:
    """A subprocess with one vault; see `tests.faults.victim`."""

    def __init__(self, ledger: Ledger, folder: Path, name: str, spec: dict[str, Any], shim: Shim | None) -> None:
        self.name = name
        self._ledger = ledger
        self._answers: Queue[dict[str, Any]] = Queue()
        self._dry = threading.Event()
        self._out, descriptor = os.pipe()
        spec = {**spec, "name": name, "descriptor": descriptor}
        paths = os.pathsep.join((SOURCES, str(ROOT)))
        environment = {**os.environ, "PYTHONPATH": paths, **(shim.environment if shim else {})}
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.victim", json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[descriptor],
                env=environment,
                cwd=ROOT,
            )
        os.close(descriptor)
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        buffer = b""
        while True:
            ready, _, _ = select.select([self._out], [], [], 0.1)
            if not ready:
                # A forked child keeps the pipe open; once the victim is dead and the pipe is dry, that is all.
                if self.process.poll() is not None and not select.select([self._out], [], [], 0)[0]:
                    self._answers.put({"died": True})
                    self._dry.set()
                    if not self.listening:
                        return
                continue
            piece = os.read(self._out, 65_536)
            if not piece:
                break
            *lines, buffer = (buffer + piece).split(b"\n")
            for line in lines:
                text = line.decode()
                if text.startswith("A "):
                    self._answers.put(json.loads(text[2:]))
                else:
                    self._ledger.hear(self.name, text)
        self._answers.put({"died": True})
        self._dry.set()

    listening = False
    """Whether to go on listening after the victim's death, to a child that it forked."""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, command: str, **arguments: Any) -> None:
        """Give a command without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, timeout: float = 60.0) -> Any:
        """Wait for the answer to the oldest command."""
        try:
            answer = self._answers.get(timeout=timeout)
        except Empty:
            raise FaultError(f"{self.name} did not answer within {timeout:g} s:\n{self.tail()}") from None
        if "died" in answer:
            self._answers.put(answer)
            raise Died(f"{self.name} died: {self.process.wait(10)}\n{self.tail()}")
        if "error" in answer:
            raise FaultError(f"{self.name}: {answer['error']}")
        return answer["value"]

    def do(self, command: str, *, within: float = 60.0, **arguments: Any) -> Any:
        """Give a command and return its answer."""
        try:
            self.send(command, **arguments)
        except BrokenPipeError:
            raise Died(f"{self.name} is dead:\n{self.tail()}") from None
        return self.answer(within)

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.do("stats")
        return stats

    def kill(self) -> None:
        """kill -9, and hear what it had said by then."""
        self.process.kill()
        self.ended()

    def terminate(self, timeout: float = 30.0) -> int:
        self.process.terminate()
        return self.ended(timeout)

    def finish(self, timeout: float = 30.0) -> int:
        """End its input, upon which it exits as a script does; return the exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.ended(timeout)

    def ended(self, timeout: float = 30.0) -> int:
        """Wait until it is dead and all is heard; return the exit code, or minus the signal."""
        code = self.process.wait(timeout)
        assert self._dry.wait(10), "the pipe never ends"
        return code

    def release(self) -> None:
        """Close both pipes; it is dead."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.listening = False
        self._reader.join(10)
        os.close(self._out)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


class Scenario:
    """One scenario: a database, a spool directory, victims, a seed, and what all of them said."""

    def __init__(self, name: str, server: Server, dbname: str, folder: Path, seed: int) -> None:
        self.name = name
        self.server = server
        self.dbname = dbname
        self.folder = folder
        self.spool = folder / "spool"
        self.seed = seed
        self.random = random.Random(f"{seed}-{name}")
        self.ledger = Ledger()
        self.verdict: Verdict | None = None
        self.victims: list[Victim] = []
        self._proxies: list[Proxy] = []
        self._began = time.monotonic()
        self._kills = 0

    @property
    def dsn(self) -> str:
        """The application's way to the database."""
        return make_conninfo(self.server.admin, dbname=self.dbname, user=ROLE)

    @property
    def admin_dsn(self) -> str:
        return make_conninfo(self.server.admin, dbname=self.dbname)

    def proxy(self) -> Proxy:
        self._proxies.append(Proxy(self.server.socket))
        return self._proxies[-1]

    def through(self, proxy: Proxy) -> str:
        """The application's way to the database through a proxy."""
        return make_conninfo(
            host="127.0.0.1", port=proxy.port, user=ROLE, dbname=self.dbname, sslmode="disable", gssencmode="disable"
        )

    def shim(self) -> Shim:
        """Build what makes the disk fail for victims that are started with it; skip where that cannot be."""
        return Shim(self.folder, self.spool)

    def victim(
        self,
        *,
        dsn: str | None = None,
        kind: str = "blocking",
        start: bool = True,
        shim: Shim | None = None,
        spool: bool = True,
        on_error: bool = True,
        **options: Any,
    ) -> Victim:
        """Start a victim; its events are async and spooled unless the options say otherwise."""
        chosen: dict[str, Any] = {
            "connection_string": dsn or self.dsn,
            "bootstrap": {"ensure_schema": False},
            "default_mode": "async",
            **({"spool": str(self.spool)} if spool else {}),
            **options,
        }
        spec = {"options": chosen, "kind": kind, "on_error": on_error}
        victim = Victim(self.ledger, self.folder, f"v{len(self.victims) + 1}", spec, shim)
        self.victims.append(victim)
        if start:
            victim.do("start")
        return victim

    def kill(self, victim: Victim) -> None:
        victim.kill()
        self._kills += 1

    def died(self) -> None:
        """Note that a victim was killed otherwise."""
        self._kills += 1

    def drain(self, *, within: float = 60.0, leave_dead: int = 0, **options: Any) -> dict[str, Any]:
        """Let a new vault adopt every spool and deliver all, and end it; return its last counters."""
        victim = self.victim(**options)
        stats = self.drained(victim, within=within, leave_dead=leave_dead)
        victim.finish()
        return stats

    def drained(self, victim: Victim, *, within: float = 60.0, leave_dead: int = 0) -> dict[str, Any]:
        """Wait until this vault has delivered all there is, its own and the spools of the dead."""
        stats: dict[str, Any] = {}

        def empty() -> bool:
            nonlocal stats
            stats = victim.stats()
            orphans = [path for path in self.spool.glob("*.spool") if not is_held(path)]
            waiting = stats["spooled"] + stats["queued"] + stats["in_flight"]
            return waiting == 0 and len(orphans) <= leave_dead

        self.until(empty, within, lambda: f"not drained: {stats}, {sorted(self.spool.glob('*'))}\n{victim.tail()}")
        return stats

    def until(self, reached: Callable[[], bool], within: float, what: str | Callable[[], str] = "") -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + within
        while not reached():
            if time.monotonic() > deadline:
                raise FaultError(what() if callable(what) else what or f"not reached within {within:g} s")
            time.sleep(0.05)

    def rows(self, table: str = "audit_logs") -> int:
        """Return how many rows the table has."""
        count = self.server.sql(f'SELECT count(*) FROM "{table}"', dbname=self.dbname)[0][0]
        assert isinstance(count, int)
        return count

    def check(
        self,
        *,
        tables: Iterable[str] = ("audit_logs",),
        elsewhere: Iterable[str] = (),
        dead: Iterable[str] = (),
        excused: Iterable[str] = (),
        clock: bool = True,
        **least: int,
    ) -> Verdict:
        """Compare the ledger with the table; fail on a broken promise, or if the run saw too little.

        ``least``: what the run must have seen: ``acknowledged``, ``killed``, ``unknown`` (errors of that kind), or
        a counter of the vault, such as ``replayed``, ``found``, ``adopted``.
        """
        verdict = check(
            self.ledger, self.admin_dsn, tables=tables, elsewhere=elsewhere, dead=dead, excused=excused, clock=clock
        )
        self.verdict = verdict
        if not verdict.sound:
            raise FaultError(f"{self.name} (seed {self.seed}): {verdict}")
        for name, number in {"acknowledged": 1, **least}.items():
            seen = self.seen(name)
            if seen < number:
                raise VacuousError(f"{self.name} (seed {self.seed}) proves nothing: {name} is {seen}, not {number}")
        self.invariant()
        return verdict

    def seen(self, name: str) -> int:
        if name == "acknowledged":
            return self.verdict.acknowledged if self.verdict else 0
        if name == "killed":
            return self._kills
        if name == "unknown":
            return self.ledger.errors()["OutcomeUnknownError"] + self.ledger.total("unknown")
        return self.ledger.total(name)

    def invariant(self) -> None:
        """Check the last counters of each victim: what came in is somewhere."""
        for name, stats in self.ledger.stats.items():
            came = stats["emitted"] + stats["adopted"]
            places = ("delivered", "dead", "dropped", "spooled", "queued", "in_flight", "refused", "raised", "unknown")
            went = {place: stats[place] for place in places}
            if came != sum(went.values()):
                raise FaultError(f"{self.name}: {name} counts {came} events that came, and went to {went}")

    def close(self, *, failed: bool) -> None:
        """End the victims, note the counts, and keep the ledger if it failed."""
        for victim in self.victims:
            if victim.alive:
                victim.process.send_signal(signal.SIGCONT)
                victim.process.kill()
                victim.process.wait(30)
            victim.release()
        for proxy in self._proxies:
            proxy.close()
        if not self.server.running:
            self.server.start()
        verdict = self.verdict or Verdict()
        seconds = time.monotonic() - self._began
        counts = (verdict.acknowledged, len(verdict.lost), len(verdict.doubled), verdict.replayed, verdict.dead)
        ROWS.append(Row(self.name + (" FAILED" if failed else ""), *counts, seconds))
        if failed:
            self.ledger.save(self.folder / "ledger.txt")
            print(f"seed {self.seed}; the ledger, the spools and the logs of the victims are kept in {self.folder}")
