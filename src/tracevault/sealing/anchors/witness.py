"""The anchor ``https://HOST/PREFIX#vkey=KEY``: a witness that cosigns what extends what it cosigned before.

The protocol is ``add-checkpoint`` of C2SP tlog-witness. A witness remembers one checkpoint of each log, and nothing
that anybody does to the database changes its memory. Its cosignature carries a time, which makes the receipt a proof
that the log was no smaller then. Without ``vkey`` cosignatures are kept unverified. A password in the URL goes as
HTTP Basic authentication, and into no message.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException, HTTPMessage
from typing import IO, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from tracevault.errors import ConfigError, ProofError, RollbackError, SealError
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.note import COSIGNATURE_V1, Note, Signature, Verifier
from tracevault.sealing.anchors.anchor import LogView, checkpoint_of

TIMEOUT = 10.0
"""Seconds without a sign of life from the witness; an answer may take three times as long altogether."""
MAX_ANSWER = 65_536
_SIZE_TYPE = "text/x.tlog.size"
_MOST_HASHES = 63
_USERINFO = re.compile(r"(?<=://)[^/\s]*@")
_SHOWN = 200


class _Answer(NamedTuple):
    status: int
    kind: str
    body: bytes


class WitnessAnchor:
    """A witness over HTTP. What size it took last is remembered in memory alone: it says so itself."""

    def __init__(self, url: str, *, authorization: str | None = None, verifier: Verifier | None = None) -> None:
        self.sink = url
        self._authorization = authorization
        self._verifier = verifier
        self._sizes: dict[str, int] = {}
        # Plain http is for this machine, where no proxy has a part in it.
        proxies = [urllib.request.ProxyHandler({})] if url.startswith("http:") else []
        self._opener = urllib.request.build_opener(_NoRedirects(), *proxies)

    def __repr__(self) -> str:
        return f"WitnessAnchor({self.sink!r})"

    @classmethod
    def parse(cls, text: str) -> WitnessAnchor:
        """Return the witness of a URL; plain ``http`` is taken for this machine alone."""
        try:
            url = urlsplit(text)
            host, port = url.hostname or "", url.port
        except ValueError:
            raise ConfigError(f"the anchor {hide_passwords(text)!r} is no URL", field="anchor") from None
        shown = hide_passwords(text)
        if not host or url.query or not text.isprintable() or " " in text:
            raise ConfigError(f"a witness is `https://HOST/PREFIX#vkey=KEY`, got {shown!r}", field="anchor")
        if url.scheme == "http" and not _is_this_machine(host):
            raise ConfigError(f"a witness elsewhere is reached by https, got {shown!r}", field="anchor")
        where = f"[{host}]" if ":" in host else host
        where += f":{port}" if port is not None else ""
        return cls(
            urlunsplit((url.scheme, where, url.path.rstrip("/"), "", "")),
            authorization=_authorization(url),
            verifier=_verifier(url.fragment, shown),
        )

    def publish(self, note: Note, log: LogView) -> str:
        """Have the witness cosign, and return its cosignature lines, verified if its key is known."""
        checkpoint = checkpoint_of(note)
        old = min(self._sizes.get(checkpoint.origin, 0), checkpoint.size)
        answer = self._ask(note, checkpoint, old, log)
        if answer.status == 409 and answer.kind == _SIZE_TYPE:
            size = _size(answer.body)
            if size is None or size > checkpoint.size:
                held = "an unknown size" if size is None else f"size {size:,}"
                raise SealError(
                    f"the witness {self.sink} has cosigned {held} of {checkpoint.origin!r} and this is size "
                    f"{checkpoint.size:,}: another sealer is ahead, or the database was rolled back"
                )
            answer = self._ask(note, checkpoint, size, log)
        if answer.status != 200:
            self._sizes.pop(checkpoint.origin, None)
            raise self._refusal(answer, checkpoint)
        receipt = self._cosignatures(note, answer.body)
        self._sizes[checkpoint.origin] = checkpoint.size
        return receipt

    def newest(self, origin: str, verifiers: Sequence[Verifier] = ()) -> Note | None:
        """Return None: the protocol has no way to ask a witness for what it holds."""
        return None

    def _ask(self, note: Note, checkpoint: Checkpoint, old: int, log: LogView) -> _Answer:
        hashes = log.prove(old, checkpoint.size) if 0 < old < checkpoint.size else ()
        if len(hashes) > _MOST_HASHES:
            raise SealError(f"a consistency proof of {len(hashes)} hashes is none")
        lines = [f"old {old}", *(base64.b64encode(one).decode() for one in hashes), "", str(note)]
        return self._post("\n".join(lines).encode())

    def _post(self, body: bytes) -> _Answer:
        headers = {"Content-Type": "text/plain; charset=utf-8", "User-Agent": "tracevault"}
        if self._authorization is not None:
            headers["Authorization"] = self._authorization
        request = urllib.request.Request(f"{self.sink}/add-checkpoint", body, headers, method="POST")  # noqa: S310
        try:
            with self._opener.open(request, timeout=TIMEOUT) as response:
                return _Answer(response.status, response.headers.get_content_type(), _limited(response))
        except HTTPError as error:
            with error:
                return _Answer(error.code, error.headers.get_content_type(), _limited(error))
        except (URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise SealError(f"the witness {self.sink} cannot be reached: {shorten(str(reason))}") from None

    def _refusal(self, answer: _Answer, checkpoint: Checkpoint) -> SealError:
        said = shorten(answer.body.decode(errors="replace"))
        told = f"the witness {self.sink} answered {answer.status}" + (f": {said}" if said else "")
        match answer.status:
            case 404:
                return SealError(f"{told}; it does not know the origin {checkpoint.origin!r}, or the URL is wrong")
            case 403:
                return SealError(f"{told}; it knows none of the keys that signed: give it the verifier key")
            case 422:
                return RollbackError(
                    f"ROLLBACK DETECTED: {told}; size {checkpoint.size:,} of {checkpoint.origin!r} does not extend "
                    "what it cosigned"
                )
            case 409 if answer.kind != _SIZE_TYPE:
                return RollbackError(
                    f"ROLLBACK DETECTED: {told}; it cosigned another root of size {checkpoint.size:,} of "
                    f"{checkpoint.origin!r}"
                )
        return SealError(told)

    def _cosignatures(self, note: Note, body: bytes) -> str:
        try:
            both = Note.parse(str(note) + body.decode())
            added = both.signatures[len(note.signatures) :]
            if self._verifier is not None:
                added = [one for one in added if _is_by(one, self._verifier)]
                if not Note(both.text, added).verified_by([self._verifier]):
                    raise ProofError("there is no cosignature of its key")
        except (ProofError, UnicodeDecodeError) as error:
            raise SealError(f"what the witness {self.sink} answered does not verify: {error}") from None
        if not added:
            raise SealError(f"the witness {self.sink} answered without a cosignature")
        return str(Note(both.text, added)).removeprefix(f"{both.text}\n")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Lets redirects be the errors that they are: a checkpoint, and a password, go where they were sent."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def hide_passwords(text: str) -> str:
    """Return ``text`` with whatever precedes the host in its URLs left out."""
    return _USERINFO.sub("…@", text)


def shorten(text: str) -> str:
    """Return what somebody else said on one line, 200 characters at most, without what does not print."""
    line = "".join(c if c.isprintable() else " " for c in text[: 4 * _SHOWN])
    line = " ".join(line.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


def _limited(response: IO[bytes]) -> bytes:
    """Read an answer; `SealError` if it is too long, in bytes or in time."""
    deadline = time.monotonic() + 3 * TIMEOUT
    read = getattr(response, "read1", response.read)
    data = b""
    while piece := read(8192):
        data += piece
        if len(data) > MAX_ANSWER or time.monotonic() > deadline:
            raise SealError(f"a witness answered with more than {MAX_ANSWER:,} bytes, or too slowly")
    return data


def _size(body: bytes) -> int | None:
    text = body.removesuffix(b"\n")
    return int(text) if text.isdigit() and len(text) <= 19 else None


def _is_by(signature: Signature, verifier: Verifier) -> bool:
    return (signature.name, signature.key_id) == (verifier.name, verifier.key_id)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _authorization(url: SplitResult) -> str | None:
    if url.username is None:
        return None
    pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _verifier(fragment: str, shown: str) -> Verifier | None:
    if not fragment:
        return None
    name, _, value = fragment.partition("=")
    if name != "vkey":
        raise ConfigError(f"the anchor {shown!r}: only `#vkey=KEY` may follow the URL", field="anchor")
    try:
        verifier = Verifier.parse(unquote(value))
    except ConfigError as error:
        raise ConfigError(f"the anchor {shown!r}: {error}", field="anchor") from None
    if verifier.algorithm != COSIGNATURE_V1:
        raise ConfigError(f"the anchor {shown!r}: its key makes no cosignatures", field="anchor")
    return verifier
