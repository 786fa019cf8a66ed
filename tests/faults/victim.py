"""The victim: a process with one vault, run by the supervisor and harmed by the scenario.

It reads commands, one JSON object a line, from its standard input, and reports to the ledger through a pipe.
"""

from __future__ import annotations

import asyncio
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
from typing import Any

import psycopg

import tracevault
from tests.faults.ledger import payload_of


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

    # -- commands ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the vault."""
        options = dict(self.spec["options"])
        if self.spec.get("on_error", True):
            options["on_error"] = self._given_up
        if self.spec["kind"] == "blocking":
            self.vault = tracevault.Tracevault(**options)
            return
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="loop", daemon=True).start()
        self.vault = self.wait(_awaited(tracevault.start_tracevault(**options)))

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
        self.tell("S", json.dumps(stats))
        return stats

    def fork(self, way: str, count: int, *, hooks: bool = True) -> int:
        """Fork a child that emits ``count`` events and then ends in this way; return its process id.

        ``hooks``: whether Python's functions of fork are run. uWSGI, which forks from C, runs none.
        """
        # The library's own fork, called with the interpreter's lock held, as uWSGI does.
        child: int = os.fork() if hooks else ctypes.PyDLL(None).fork()
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

    def one(self, event: str, **fields: Any) -> str:
        """Emit one event, and report what came of it."""
        token = fields.pop("token", None) or self.token(event)
        self.tell("I", token, time.time())
        try:
            receipt = self.call("emit", event, correlation_id=token, data=payload_of(token), **fields)
        except tracevault.TracevaultError as error:
            self.raised(token, error)
        else:
            self.tell("R", token, receipt.id, receipt.stored, time.time())
        return token

    def raised(self, token: str, error: tracevault.TracevaultError) -> None:
        unknown = isinstance(error, tracevault.OutcomeUnknownError)
        self.tell("X", token, "unknown" if unknown else "certain", type(error).__name__)

    def call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        result = getattr(self.vault, method)(*arguments, **keywords)
        return result if self.loop is None else self.wait(result)

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
        self.tell("L", record.correlation_id, type(error).__name__)

    def serve(self) -> None:
        """Do what the supervisor says, until it closes the pipe."""
        names = ("start", "emit", "many", "begin", "stop", "flush", "close", "stats", "fork", "reap")
        commands: dict[str, Callable[..., Any]] = {name: getattr(self, name) for name in names}
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer: object = {"value": commands[order.pop("do")](**order)}
            except (tracevault.TracevaultError, psycopg.Error, OSError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            self.tell("A", json.dumps(answer))


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    Victim(json.loads(sys.argv[1])).serve()
