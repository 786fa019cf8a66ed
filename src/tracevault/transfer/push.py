"""Batches of events on their way to somebody's HTTP endpoint, as Standard Webhooks has them (standardwebhooks.com).

A batch is NDJSON, gzipped. ``webhook-id`` is made of what is in the batch, so that it is the same when the batch comes
again, and the receiver can tell; ``webhook-signature`` is HMAC-SHA256 over id, timestamp and body, by each secret.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import hmac
import http.client
import random
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from urllib.parse import urlsplit

from tracevault.errors import ConfigError, DriverError
from tracevault.events.json_text import json_record, json_text
from tracevault.events.record import AuditRecord

_SECRET_PREFIX = "whsec_"  # noqa: S105 - what a secret begins with
_LEAST_SECRET = 24
_LONGEST_PAUSE = 60.0
_MAX_ANSWER = 65_536


@dataclass(frozen=True)
class Endpoint:
    """Where batches are pushed to. ``secrets`` are keys of signatures, two while one takes the other's place."""

    url: str
    secrets: tuple[bytes, ...] = ()
    timeout: float = 30.0

    def push(self, records: Sequence[AuditRecord]) -> None:
        """Push one batch, once.

        Raises `DriverError`, which is ``transient`` where it may be tried again.
        """
        lines = "".join(f"{json_text(json_record(record))}\n" for record in records).encode()
        body = gzip.compress(lines, mtime=0)
        headers = self._headers(body, f"batch_{hashlib.sha256(lines).hexdigest()[:32]}")
        parts = urlsplit(self.url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection = self._connection()
            try:
                connection.request("POST", path, body, headers)
                answer = connection.getresponse()
                answer.read(_MAX_ANSWER)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            message = f"pushing to {self._shown} failed: {error or type(error).__name__}"
        else:
            if 200 <= answer.status < 300:
                return
            raise PushRefused(self._shown, answer.status, _retry_after(answer.headers.get("Retry-After")))
        raise DriverError(message, transient=True)

    @property
    def _shown(self) -> str:
        """The address without what may be a secret."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"

    def _connection(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        if parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=self.timeout, context=context)
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=self.timeout)

    def _headers(self, body: bytes, id_: str) -> dict[str, str]:
        moment = str(int(time.time()))
        headers = {
            "Content-Type": "application/x-ndjson",
            "Content-Encoding": "gzip",
            "User-Agent": "tracevault",
            "webhook-id": id_,
            "webhook-timestamp": moment,
        }
        if self.secrets:
            signed = f"{id_}.{moment}.".encode() + body
            digests = (hmac.new(secret, signed, hashlib.sha256).digest() for secret in self.secrets)
            headers["webhook-signature"] = " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)
        return headers


class PushRefused(DriverError):  # noqa: N818 - control flow of the command
    """The receiver answered with something else than 2xx. ``retry_after`` is for how many seconds it asked to wait."""

    def __init__(self, where: str, status: int, retry_after: float | None) -> None:
        transient = status >= 500 or status in (408, 425, 429)
        hint = "; redirects are not followed" if 300 <= status < 400 else ""
        super().__init__(f"pushing to {where} failed: the receiver answered {status}{hint}", transient=transient)
        self.status = status
        self.retry_after = retry_after


def endpoint(url: str, secrets: Sequence[str], timeout: float) -> Endpoint:
    """Check and return where to push to; raise `ConfigError`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.fragment:
        raise ConfigError("`to` must be an https:// address without user and fragment", field="to")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ConfigError("`to` must be https:// unless it is this machine: events would travel readable", field="to")
    return Endpoint(url, tuple(map(_secret, secrets)), timeout)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _secret(text: str) -> bytes:
    """Return the key in ``whsec_`` and base64."""
    encoded = text.strip().removeprefix(_SECRET_PREFIX)
    try:
        key = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if len(key) < _LEAST_SECRET:
        raise ConfigError(
            f"a secret is {_SECRET_PREFIX} and base64 of {_LEAST_SECRET} bytes or more, got {len(text)} characters of "
            "something else",
            field="secret",
        )
    return key


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that ``Retry-After`` asks for (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        moment = None if value.strip().isdigit() else parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    seconds: float = float(value) if moment is None else moment.timestamp() - time.time()
    return min(max(seconds, 0.0), 3600.0)


def pause_after(failures: int, error: DriverError) -> float:
    """Return how many seconds to wait after so many failures in a row, half of it by chance."""
    longest = min(_LONGEST_PAUSE, 0.5 * 2.0 ** min(failures, 10))
    asked = error.retry_after if isinstance(error, PushRefused) else None
    return max(asked or 0.0, longest * random.uniform(0.5, 1.0))  # noqa: S311 - it spreads retries, and hides nothing
