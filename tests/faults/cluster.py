"""NATS servers on loopback, one or a cluster of three, which a scenario may kill, freeze and cut off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tracevault.errors import DriverError
from tracevault.ingest.streams import setup
from tracevault.writer.stream import DEAD, STREAM, connected, servers_of

BINARY = shutil.which("nats-server", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
NODES = 3


class Node:
    """One server. Its store outlives it."""

    def __init__(self, number: int, ports: list[tuple[int, int, int]], folder: Path) -> None:
        client, cluster, monitor = ports[number]
        self.name = f"n{number}"
        self.port, self.monitor = client, monitor
        self._config = folder / f"{self.name}.json"
        self._log = folder / f"{self.name}.log"
        routes = [f"nats://127.0.0.1:{other}" for place, (_, other, _) in enumerate(ports) if place != number]
        config: dict[str, Any] = {
            "server_name": self.name,
            "listen": f"127.0.0.1:{client}",
            "http": f"127.0.0.1:{monitor}",
            "jetstream": {"store_dir": str(folder / self.name), "max_mem": 67108864, "max_file": 1073741824},
        }
        if routes:
            config["cluster"] = {"name": "faults", "listen": f"127.0.0.1:{cluster}", "routes": routes}
        self._config.write_text(json.dumps(config))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert BINARY is not None
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([BINARY, "-c", str(self._config)], stdout=log, stderr=log)

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)
            self.process = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop it with SIGSTOP: connections stay, and nobody answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def leads(self) -> bool:
        """Whether it leads the stream."""
        with contextlib.suppress(OSError, ValueError):
            address = f"http://127.0.0.1:{self.monitor}/jsz?streams=1"
            with urllib.request.urlopen(address, timeout=1) as answer:
                found = json.loads(answer.read())
            for account in found.get("account_details", []):
                for stream in account.get("stream_detail", []):
                    if stream["name"] == STREAM:
                        return bool(stream.get("cluster", {}).get("leader") == self.name)
        return False


class Cluster:
    """Some of them, with the streams on each."""

    def __init__(self, folder: Path, nodes: int = NODES) -> None:
        folder.mkdir(parents=True)
        ports = _free_ports(3 * nodes)
        triples = [(ports[3 * n], ports[3 * n + 1], ports[3 * n + 2]) for n in range(nodes)]
        self.nodes = [Node(number, triples, folder) for number in range(nodes)]
        for node in self.nodes:
            node.start()
        deadline = time.monotonic() + 60
        while True:
            try:
                asyncio.run(setup(servers_of(self.address), nodes, 5.0))
                return
            except Exception as error:  # they have to find each other first
                if time.monotonic() > deadline:
                    raise DriverError(f"the cluster does not begin: {error}") from error
                time.sleep(0.5)

    @property
    def address(self) -> str:
        return "nats://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def leader(self, within: float = 30.0) -> Node:
        """The node that leads the stream."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            for node in self.nodes:
                if node.process is not None and node.leads():
                    return node
            time.sleep(0.2)
        raise AssertionError("no node leads the stream")

    async def dead_letters(self, count: int) -> list[dict[str, str]]:
        """The headers of so many dead letters."""
        client = await connected(servers_of(self.address), 10)
        try:
            pulled = await client.jetstream().pull_subscribe(f"{DEAD}.*", durable="test")
            found: list[dict[str, str]] = []
            while len(found) < count:
                for message in await pulled.fetch(count, timeout=10):
                    found.append(dict(message.headers))
                    await message.ack()
            return found
        finally:
            await client.close()

    def close(self) -> None:
        for node in self.nodes:
            node.kill()


class Relay:
    """A way to one of the servers that can be cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._to), 5)
                except OSError:
                    client.close()
                    continue
                self._open += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                sink.sendall(piece)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End every connection, in the middle of whatever it says."""
        opened, self._open = self._open, []
        for each in opened:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def close(self) -> None:
        self._listener.close()
        self.cut()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
