"""The victim: a process with one vault, run by the supervisor and harmed by the scenario.

It reads commands, one JSON object a line, from its standard input, and reports to the ledger through a pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psycopg

import tracevault
from tests.faults.ledger import payload_of
from tests.faults.mixture import Mixture


class Reporter:
    """Writes lines to the ledger's pipe; each in one write, so that no kill tears one."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self.name = name

    def __call__(self, *words: object) -> None:
        os.write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())


class Victim:
    """One vault, blocking or async, behind blocking commands."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.tell = Reporter(spec["descriptor"], spec["name"])
        self.spec = spec
        self.numbers = itertools.count(1)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.vault: Any = None
        self.stopping = threading.Event()
        self.load: list[threading.Thread] = []
        self.blocking: Any = None
        self.mixture: Mixture | None = None

    # -- commands ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the vault."""
        if self.spec["kind"] == "blocking":
            self.vault = tracevault.Tracevault(**self.options)
            return
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="loop", daemon=True).start()
        self.vault = self.wait(_awaited(tracevault.start_tracevault(**self.options)))

    @property
    def options(self) -> dict[str, Any]:
        """The vault's options."""
        handler = {"on_error": self._given_up} if self.spec.get("on_error", True) else {}
        return {**self.spec["options"], **handler}

    def emit(
        self,
        count: int = 1,
        threads: int = 1,
        pause: float = 0.0,
        event: str = "faults.emitted",
        stop: bool = False,
        **fields: Any,
    ) -> list[str]:
        """Emit ``count`` events, shared by ``threads``; ``stop``: until it is told to stop. Returns the tokens."""
        tokens: list[str] = []

        def work(share: int) -> None:
            done = 0
            while done < share and not (stop and self.stopping.is_set()):
                tokens.append(self.one(event, **fields))
                done += 1
                if pause:
                    time.sleep(pause)

        shares = [count // threads + (place < count % threads) for place in range(threads)]
        if threads == 1:
            work(count)
            return tokens
        workers = [threading.Thread(target=work, args=(share,)) for share in shares]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return tokens

    def many(self, count: int, event: str = "faults.emitted") -> list[str]:
        """Emit ``count`` events by one `emit_many`."""
        tokens = [self.token(event) for _ in range(count)]
        for token in tokens:
            self.tell("I", token, time.time())
        try:
            receipts = self.call(
                "emit_many", [{"event": event, "correlation_id": token, "data": payload_of(token)} for token in tokens]
            )
        except tracevault.TracevaultError as error:
            for token in tokens:
                self.raised(token, error)
            return tokens
        for token, receipt in zip(tokens, receipts, strict=True):
            self.tell("R", token, receipt.id, receipt.stored, time.time())
        return tokens

    def mix(self) -> None:
        """Open a blocking vault besides the async one, for a mixed load."""
        self.blocking = tracevault.Tracevault(**self.options)
        self.mixture = Mixture(self, self.blocking)

    def mixed(
        self,
        threads: int,
        tasks: int,
        each: tuple[int, int],
        seconds: float = 0.0,
        costs: dict[str, float] | None = None,
    ) -> dict[str, float]:
        """Emit from threads and tasks at once; see `Mixture.run`."""
        assert self.mixture is not None
        return self.mixture.run(threads, tasks, each, seconds, costs)

    def costs(self, count: int) -> dict[str, float]:
        """Return what one emit costs its caller."""
        assert self.mixture is not None
        return self.mixture.costs(count)

    def transactions(self, dsn: str, ends: list[str]) -> None:
        """Run transactions of the application's own, each with an event and a row of ``changes`` of the same token.

        Their ends: ``commit``, ``rollback``, ``inner`` (and another event in a savepoint that is rolled back) and
        ``refused`` (and another event that the database refuses, emitted with ``savepoint=True``).
        """
        connect: Any = psycopg.connect if self.loop is None else psycopg.AsyncConnection.connect
        for end in ends:
            connection = self.result(connect(dsn))
            try:
                if end == "inner":
                    self.result(connection.execute("SAVEPOINT inner_part"))
                    inner = self.one("faults.inner", connection=connection)
                    self.result(connection.execute("ROLLBACK TO SAVEPOINT inner_part"))
                    self.tell("B", inner)
                if end == "refused":
                    self.one("faults.refused", connection=connection, savepoint=True, tenant_id="poison")
                token = self.one("faults.outer", connection=connection)
                self.result(connection.execute("INSERT INTO changes VALUES (%s)", [token]))
                self.result(connection.rollback() if end == "rollback" else connection.commit())
            except psycopg.Error:
                continue  # whether it was committed, the tables know
            finally:
                self.result(connection.close())
            self.tell("B" if end == "rollback" else "K", token)

    def begin(self, **how: Any) -> None:
        """Emit in the background until `stop`."""
        thread = threading.Thread(target=self.emit, kwargs={"count": 10**9, "stop": True, **how}, daemon=True)
        self.load.append(thread)
        thread.start()

    def stop(self) -> None:
        """End the load."""
        self.stopping.set()
        for thread in self.load:
            thread.join(60)
            assert not thread.is_alive(), "the load does not end"
        self.load.clear()
        self.stopping.clear()

    def flush(self, timeout: float = 30.0) -> str | None:
        return self._settled("flush", timeout)

    def close(self, timeout: float = 30.0) -> str | None:
        return self._settled("close", timeout)

    def stats(self) -> dict[str, Any]:
        stats = asdict(self.vault.stats())
        if self.blocking is not None:
            for name, count in asdict(self.blocking.stats()).items():
                if name != "lanes":
                    stats[name] += count
        self.tell("S", json.dumps(stats))
        return stats

    def fork(self, way: str, count: int, *, hooks: bool = True) -> int:
        """Fork a child that emits ``count`` events and then ends in this way; return its process id.

        ``hooks``: whether Python's functions of fork are run. uWSGI, which forks from C, runs none.
        """
        if hooks:
            child = os.fork()
        else:
            _wait_for_rest()
            # The library's own fork, called with the interpreter's lock held, as uWSGI does.
            child = ctypes.PyDLL(None).fork()
        if child:
            return child
        if count:
            self.emit(count)
        if way == "stay":
            signal.pause()
        elif way == "exit":
            sys.exit(0)
        elif way == "raise":
            raise LookupError("nobody catches this")
        os._exit(0)

    def reap(self, child: int) -> int:
        """Wait for a child; return its exit code, or minus the signal."""
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    # -- the pieces ----------------------------------------------------------------------------------------

    def token(self, event: str) -> str:
        return f"{self.tell.name}.{os.getpid()}/{event}/{next(self.numbers)}"

    def one(self, event: str, *, token: str | None = None, scope: str | None = None, **fields: Any) -> str:
        """Emit one event, and report what came of it."""
        token = token or self.token(event)
        target = self.vault if scope is None else self.vault.get_scope(scope)
        self.tell("I", token, time.time())
        try:
            receipt = self.result(target.emit(event, **{"correlation_id": token, "data": payload_of(token), **fields}))
        except tracevault.TracevaultError as error:
            self.raised(token, error)
        else:
            self.tell("R", token, receipt.id, receipt.stored, time.time())
        return token

    def raised(self, token: str, error: tracevault.TracevaultError) -> None:
        unknown = isinstance(error, tracevault.OutcomeUnknownError)
        self.tell("X", token, "unknown" if unknown else "certain", type(error).__name__)

    def call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        return self.result(getattr(self.vault, method)(*arguments, **keywords))

    def result(self, called: Any) -> Any:
        """Return what a method of either kind of vault returned."""
        return called if self.loop is None else self.wait(called)

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def _settled(self, method: str, timeout: float) -> str | None:
        try:
            self.call(method, timeout=timeout)
        except tracevault.UndeliveredError as error:
            return str(error)
        self.tell("F", f"{self.tell.name}.{os.getpid()}")
        return None

    def _given_up(self, error: Exception, record: tracevault.AuditRecord) -> None:
        self.tell("L", record.correlation_id, type(error).__name__, getattr(error, "sqlstate", None))

    def serve(self) -> None:
        """Do what the supervisor says, until it closes the pipe."""
        names = (
            "start",
            "emit",
            "many",
            "mix",
            "mixed",
            "costs",
            "transactions",
            "begin",
            "stop",
            "flush",
            "close",
            "stats",
            "fork",
            "reap",
        )
        commands: dict[str, Callable[..., Any]] = {name: getattr(self, name) for name in names}
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer: object = {"value": commands[order.pop("do")](**order)}
            except (tracevault.TracevaultError, psycopg.Error, OSError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            self.tell("A", json.dumps(answer))


def _wait_for_rest() -> None:
    """Wait until no other thread of this process runs.

    One that waits for the interpreter's lock while C forks leaves that lock unusable in the child: its first new
    thread hangs, whatever the libraries. Only Python's functions of fork could mend it.
    """
    before: dict[str, str] | None = None
    while before != (before := _ran()):
        time.sleep(0.05)


def _ran() -> dict[str, str]:
    """Return how long each other thread of this process has run."""
    ran = {}
    for task in Path("/proc/self/task").iterdir():
        if task.name != str(threading.get_native_id()):
            with contextlib.suppress(OSError):  # it has ended
                ran[task.name] = (task / "schedstat").read_text()
    return ran


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    Victim(json.loads(sys.argv[1])).serve()
