"""A proxy of ours between a victim and PostgreSQL, which breaks connections where the scenario asks for it.

It listens on loopback TCP, understands just enough of the protocol to know where a commit is confirmed, and
relays to the server's Unix socket.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

# A linger of no seconds: close() sends a reset, as a machine does that knows nothing of the connection.
_RESET = struct.pack("ii", 1, 0)
_WRITES = (b"INSERT", b"COPY", b"COMMIT")
_PIECE = 65_536


class Proxy:
    """A listening proxy in threads of its own.

    Modes, for all connections: ``open``, ``refuse`` (nobody listens), ``black hole`` (a connection is taken and
    nothing is ever said), ``freeze`` (nothing passes any more; nothing is closed).
    """

    def __init__(self, server_socket: Path) -> None:
        self._server_socket = server_socket
        self._links: set[_Link] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self.port = 0
        self.mode = "open"
        self.delay = 0.0
        self.on_commit: Callable[[_Link], str] | None = None
        """Asked at each confirmation of a commit, before it is forwarded: pass, cut before, cut after, hold."""
        self.cut_requests = 0
        self.cut_at = b"/faults."
        """So many of the next requests with this in them, by default an event, are cut off: the server sees none."""
        self.accepted = self.commits = self.cuts = self.attempts = self.round_trips = 0
        self._listen()

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            if listener is not self._listener:
                client.close()
                return
            self.accepted += 1
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(self, client)
            with self._lock:
                self._links.add(link)
            threading.Thread(target=link.serve, args=(self._server_socket,), daemon=True).start()

    def refuse(self) -> None:
        """Stop listening and reset what is open: the host is up, the server is not."""
        self.mode = "refuse"
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.reset()

    def open(self) -> None:
        """Let everything pass again; what was frozen goes on."""
        self.mode = "open"
        if self._listener is None:
            self._listen()

    def reset(self) -> None:
        """Reset every connection."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.cut()

    def forget(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)

    def cut_commits(self, when: str, every: int = 1, most: int = 10**9) -> None:
        """Cut the connection at every ``every``-th confirmation, ``before`` or ``after`` it is forwarded."""
        seen = cut = 0
        lock = threading.Lock()

        def decide(_link: _Link) -> str:
            nonlocal seen, cut
            with lock:
                seen += 1
                if seen % every or cut >= most:
                    return "pass"
                cut += 1
                return when

        self.on_commit = decide

    def close(self) -> None:
        self.refuse()


class _Link:
    """One client's connection and the one behind it."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server: socket.socket | None = None
        self._held = bytearray()
        self._wrote = self._failed = False
        self._hopeless = threading.Event()

    def serve(self, server_socket: Path) -> None:
        if self._stuck("black hole"):
            return
        try:
            self._server = socket.socket(socket.AF_UNIX)
            self._server.connect(str(server_socket))
        except OSError:
            self.cut()
            return
        threading.Thread(target=self._relay, args=(self._client, self._server, self._request), daemon=True).start()
        self._relay(self._server, self._client, self._answer)

    def _stuck(self, mode: str) -> bool:
        """Wait while the proxy is in ``mode``; whether the connection was cut meanwhile."""
        while self._proxy.mode == mode:
            if self._hopeless.wait(0.01):
                return True
        return False

    def _relay(self, source: socket.socket, sink: socket.socket, forward: Callable[[bytes], bytes | None]) -> None:
        try:
            while piece := source.recv(_PIECE):
                if self._stuck("freeze"):
                    break
                if self._proxy.delay:
                    time.sleep(self._proxy.delay)
                passed = forward(piece)
                if passed is None:
                    break
                sink.sendall(passed)
                if self._hopeless.is_set():
                    break
        except OSError:
            pass
        self.cut()

    def _request(self, piece: bytes) -> bytes | None:
        if self._proxy.cut_requests > 0 and self._proxy.cut_at in piece:
            self._proxy.cut_requests -= 1
            self._proxy.cuts += 1
            return None
        return piece

    def _answer(self, piece: bytes) -> bytes | None:
        """Forward whole messages up to each ReadyForQuery, deciding at those that confirm a commit."""
        self._held += piece
        out = bytearray()
        start = settled = 0
        while (length := self._message(start)) is not None:
            kind, body = self._held[start : start + 1], bytes(self._held[start + 5 : start + length])
            out += self._held[start : start + length]
            start += length
            if kind == b"C" and body.startswith(_WRITES):
                self._wrote = True
            elif kind == b"E":
                self._failed = True
            elif kind == b"Z":
                if not self._confirmed(body, out):
                    return None
                settled = start
        if self._wrote:  # its CommandComplete waits for its ReadyForQuery, and is read again with it
            self._wrote = self._failed = False
            start = settled
        del self._held[:start]
        return bytes(out[:start])

    def _confirmed(self, status: bytes, out: bytearray) -> bool:
        """Look at one ReadyForQuery; False: the connection is cut, and what waits is not forwarded."""
        proxy = self._proxy
        proxy.round_trips += 1
        proxy.attempts += self._wrote or self._failed
        committed = self._wrote and not self._failed and status == b"I"
        self._failed = False
        if self._wrote and status != b"I":
            self._wrote = False
            return True
        self._wrote = False
        if not committed:
            return True
        proxy.commits += 1
        decision = proxy.on_commit(self) if proxy.on_commit is not None else "pass"
        if decision == "pass":
            return True
        proxy.cuts += 1
        if decision == "hold":
            self._hopeless.wait(60)
        if decision == "after":
            with contextlib.suppress(OSError):
                self._client.sendall(out)
        return False

    def _message(self, start: int) -> int | None:
        if len(self._held) < start + 5:
            return None
        length = 1 + int.from_bytes(self._held[start + 1 : start + 5], "big")
        return length if len(self._held) >= start + length else None

    def cut(self) -> None:
        self._hopeless.set()
        self._proxy.forget(self)
        for end in (self._client, self._server):
            if end is not None:
                with contextlib.suppress(OSError):
                    if end.family == socket.AF_INET:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    end.shutdown(socket.SHUT_RDWR)
                with contextlib.suppress(OSError):
                    end.close()
