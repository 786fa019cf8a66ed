"""What the tests of integrations share: one server, and the examples started as a user would start them."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import rows
from tests.docs.test_snippets import url as url_of
from tests.newest import server

__all__ = ["server"]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_BIN = Path(sys.executable).parent
# Seconds in which an application has to answer.
_PATIENCE = 30.0

Start = Callable[..., "Started"]


@pytest.fixture
def url(ready_dsn: str) -> str:
    """URL of a database of the test's own, with audit_logs and audit_user_events in it."""
    return url_of(ready_dsn)


class Started:
    """A process of an example: its output, and a client for what it serves."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path, port: int) -> None:
        self.process = process
        self._output = output
        self.port = port
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20.0, trust_env=False)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(errors="replace")

    def await_http(self) -> None:
        """Wait until it answers, whatever it says."""
        self.await_true(self._answers)

    def await_true(self, condition: Callable[[], Any]) -> Any:
        """Wait until ``condition()`` is true, and return it; fail with the output if that does not happen."""
        deadline = time.monotonic() + _PATIENCE
        while not (found := condition()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{self.process.args!r} is not ready\n{self.output}", pytrace=False)
            time.sleep(0.05)
        return found

    def await_rows(self, dsn: str, query: str, *params: Any, count: int = 1) -> list[tuple[Any, ...]]:
        """Wait until ``query`` returns at least ``count`` rows, and return them."""

        def enough() -> list[tuple[Any, ...]] | None:
            found = rows(dsn, query, *params)
            return found if len(found) >= count else None

        return self.await_true(enough)  # type: ignore[no-any-return]

    def _answers(self) -> bool:
        try:
            self.http.get("/")
        except httpx.TransportError:
            return False
        return True

    def stop(self) -> None:
        """End it as an operator would, and wait."""
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run_example(example: str, *command: str, url: str, **environment: str) -> str:
    """Run ``command`` in the folder ``examples/<example>`` to its end; return what it prints. It must succeed."""
    program, *arguments = command
    done = subprocess.run(
        [_program(program), *arguments],
        cwd=EXAMPLES / example,
        env={**os.environ, "DATABASE_URL_WRITE": url, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def start(url: str, tmp_path: Path) -> Iterator[Start]:
    """A function that starts ``command`` in the folder ``examples/<example>``; ``{port}`` in it is a free port.

    The first word is a program of this environment (``uvicorn``, ``flask``), or ``python``.
    """
    with ExitStack() as stack:

        def run(example: str, *command: str, http: bool = True, **environment: str) -> Started:
            port = free_port()
            program, *arguments = (word.replace("{port}", str(port)) for word in command)
            output = tmp_path / f"{example}-{port}.txt"
            with output.open("wb") as sink:
                process = subprocess.Popen(
                    [_program(program), *arguments],
                    cwd=EXAMPLES / example,
                    env={**os.environ, "DATABASE_URL_WRITE": url, "PYTHONUNBUFFERED": "1", **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                )
            started = Started(process, output, port)
            stack.callback(started.stop)
            if http:
                started.await_http()
            return started

        yield run


async def call(port: int, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str]]:
    """Make one request on a connection of its own; return status and headers. Cheap enough for hundreds at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"{method} {path} HTTP/1.1", "host: test", "connection: close", "content-length: 0"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    status, *found = (await reader.read()).partition(b"\r\n\r\n")[0].decode().split("\r\n")
    writer.close()
    await writer.wait_closed()
    return int(status.split()[1]), {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in found)
    }


def _program(name: str) -> str:
    return sys.executable if name == "python" else str(_BIN / name)


def free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
