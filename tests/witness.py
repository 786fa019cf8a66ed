"""A witness on the loopback, after C2SP tlog-witness: it checks what it is sent, remembers it, and cosigns."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from tracevault.errors import ProofError
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.merkle import verify_consistency
from tracevault.integrity.note import COSIGNATURE_V1, Note, Signer, Verifier

NAME = "witness.example.com/w1"
SIZE = "text/x.tlog.size"


class Answer(NamedTuple):
    status: int
    body: bytes
    kind: str = "text/plain"
    headers: tuple[tuple[str, str], ...] = ()


class Witness:
    """The state of a witness; ``answer`` is what it says to everybody instead of doing its work."""

    def __init__(self, known: Sequence[Verifier]) -> None:
        self.known = list(known)
        self.signer = Signer(NAME, b"\x07" * 32, COSIGNATURE_V1)
        self.held: dict[str, Checkpoint] = {}
        self.requests: list[str] = []
        self.authorizations: list[str | None] = []
        self.paths: list[str] = []
        self.answer: Answer | None = None
        self.drip = 0.0
        self.url = ""
        self._lock = threading.Lock()

    @property
    def vkey(self) -> str:
        return str(self.signer.verifier)

    def add_checkpoint(self, body: str) -> Answer:
        with self._lock:
            self.requests.append(body)
            return self.answer or self._judge(body)

    def _judge(self, body: str) -> Answer:
        head, _, rest = body.partition("\n\n")
        first, *proof = head.split("\n")
        word, _, digits = first.partition(" ")
        if word != "old" or not digits.isdigit() or len(proof) > 63:
            return Answer(400, b"no request\n")
        old, hashes = int(digits), [base64.b64decode(line, validate=True) for line in proof]
        note = Note.parse(rest)
        new = Checkpoint.parse(note.text)
        known = [verifier for verifier in self.known if verifier.name == new.origin]
        if not known:
            return Answer(404, b"unknown log\n")
        if not note.verified_by(known):
            return Answer(403, b"not signed by a known key\n")
        if old > new.size or (hashes and old == 0):
            return Answer(400, b"no such sizes\n")
        held = self.held.get(new.origin)
        if old != (held.size if held else 0):
            return Answer(409, f"{held.size if held else 0}\n".encode(), SIZE)
        if held is not None and held.size == new.size and held.root != new.root:
            return Answer(409, b"another root\n")
        if held is not None and 0 < old < new.size:
            try:
                verify_consistency(old, new.size, held.root, new.root, hashes)
            except ProofError:
                return Answer(422, b"not consistent\n")
        self.held[new.origin] = new
        stranger = Signer("stranger.example.com/w", b"\x08" * 32, COSIGNATURE_V1)
        signatures = [
            stranger.sign(note.text, time=int(time.time())),
            self.signer.sign(note.text, time=int(time.time())),
        ]
        return Answer(200, str(Note(note.text, signatures)).removeprefix(f"{note.text}\n").encode())


@contextmanager
def running(witness: Witness) -> Iterator[Witness]:
    """Serve it on a port of the loopback; its ``url`` is set."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            witness.paths.append(self.path)
            witness.authorizations.append(self.headers.get("Authorization"))
            answer = witness.add_checkpoint(body)
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body)))
            for name, value in answer.headers:
                self.send_header(name, value)
            self.end_headers()
            try:
                for place in range(0, len(answer.body), 4096):
                    time.sleep(witness.drip)
                    self.wfile.write(answer.body[place : place + 4096])
            except OSError:
                pass  # the client has had enough

        do_GET = do_POST  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    witness.url = f"http://127.0.0.1:{server.server_address[1]}/log"
    try:
        yield witness
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
