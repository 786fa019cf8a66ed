"""The correlation id of an HTTP request: read from ``X-Correlation-Id``, or made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from uuid import uuid4

from tracevault.events.payload import has_surrogate
from tracevault.events.record import limit_of

CORRELATION_ID_HEADER = "X-Correlation-Id"

Headers = Mapping[str, str] | Callable[[str], str | None]


def random_correlation_id() -> str:
    """Return a new correlation id: a random UUID (version 4, RFC 9562) as text."""
    return str(uuid4())


def read_correlation_id_header(headers: Headers) -> str | None:
    """Return the request's ``X-Correlation-Id``, trimmed; None if missing, blank, over 512 characters, or unstorable.

    ``headers`` is a mapping of header names (compared without regard to case) or a getter such as
    ``request.headers.get``. The value comes from outside: store it, do not trust it. One that PostgreSQL cannot
    hold (U+0000, lone surrogates) counts as missing: a request must not be able to keep its events out of the log.
    """
    value = header(headers, CORRELATION_ID_HEADER)
    if value is None:
        return None
    if not 0 < len(value) <= limit_of("correlation_id") or "\0" in value or has_surrogate(value):
        return None
    return value


def resolve_correlation_id(headers: Headers) -> str:
    """Return the request's correlation id, or a new one: one value for every event of the request."""
    return read_correlation_id_header(headers) or random_correlation_id()


def header(headers: Headers, name: str) -> str | None:
    """Return a header, trimmed; None if it is missing, or no text."""
    value = headers(name) if callable(headers) else _lookup(headers, name)
    return value.strip() if isinstance(value, str) else None


def _lookup(headers: Mapping[str, str], name: str) -> str | None:
    if name in headers:
        return headers[name]
    name = name.lower()
    return next((value for key, value in headers.items() if isinstance(key, str) and key.lower() == name), None)
