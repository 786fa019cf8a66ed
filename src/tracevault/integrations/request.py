"""What an HTTP request says about itself, for every web framework: ids, the client's address and its user agent.

Everything in a request comes from outside: a value that could not be stored, or is too long, counts as missing; an
address is believed from a proxy alone that was declared trusted.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from functools import lru_cache
from os import urandom
from typing import Any, Protocol

from tracevault import ConfigError, ContextFields, declare, read_traceparent_header

REQUEST_EVENT = "http.request"
declare(REQUEST_EVENT, description="A request of `audit_requests`.")

CORRELATION_ID = "x-correlation-id"
REQUEST_ID = "x-request-id"
FORWARDED_FOR = "x-forwarded-for"

_LONGEST_ID = 128
_VISIBLE = bytes(range(ord("!"), ord("~") + 1))
_LONGEST_AGENT = 512
# Addresses in one header that are looked at.
_HOPS = 32

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
GetHeader = Callable[[str], str | None]


class ReadRequest(Protocol):
    """Returns a request's fields for `tracevault.context`; see `request_reader`."""

    def __call__(self, header: GetHeader, peer: str | None, correlation_id: str | None = None) -> ContextFields:
        """Read a request whose headers ``header`` returns, by lower-case name, and that ``peer`` has sent.

        ``correlation_id``: it is known already.
        """


def request_reader(trusted_proxies: Iterable[str] = ()) -> ReadRequest:
    """Return the function that reads a request.

    ``trusted_proxies`` are addresses, networks (``10.0.0.0/8``) or ``"unix"``, for a server that listens on a Unix
    socket. ``X-Forwarded-For`` is read from its end, as far as it was written by them; without them it is ignored.
    Raises `ConfigError` for what is neither.
    """
    networks, unix = _networks(trusted_proxies)

    @lru_cache(maxsize=1024)
    def is_trusted(address: str) -> bool:
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        return any(found in network for network in networks)

    def client(header: GetHeader, peer: str | None) -> str | None:
        if not (unix if peer is None else bool(networks) and is_trusted(peer)):
            return peer
        address = peer
        for hop in reversed((header(FORWARDED_FOR) or "").rsplit(",", _HOPS)[-_HOPS:]):
            given = _address(hop.strip())
            if given is None:
                break
            address = given
            if not is_trusted(address):
                break
        return address

    def read(header: GetHeader, peer: str | None, correlation_id: str | None = None) -> ContextFields:
        meta: dict[str, Any] = {}
        address = client(header, peer)
        if address is not None:
            meta["ip"] = address
        agent = header("user-agent")
        if agent is not None and agent.isprintable() and agent.isascii():
            meta["user_agent"] = agent[:_LONGEST_AGENT]
        fields: ContextFields = {
            "correlation_id": correlation_id or read_id(header(CORRELATION_ID)),
            "request_id": read_id(header(REQUEST_ID)),
            "meta": meta,
        }
        if header("traceparent") is not None:
            fields["traceparent"] = read_traceparent_header(header)
        return fields

    return read


def read_id(given: str | None) -> str:
    """Return an id of a request's if it can be one, else a new one."""
    return id_of(None if given is None else given.encode("latin-1", "replace")).decode()


def is_id(value: bytes) -> bool:
    """Whether an id may be taken from a request, or go out in a header: 1 to 128 visible ASCII characters."""
    return 0 < len(value) <= _LONGEST_ID and not value.translate(None, _VISIBLE)


def id_of(given: bytes | None) -> bytes:
    """Return an id of a request's if it can be one, else a new one."""
    return given if given is not None and is_id(given) else new_id()


def new_id() -> bytes:
    """Return 32 hex digits from the system's generator: as unpredictable as a UUID of version 4, and quicker made."""
    return urandom(16).hex().encode()


def _address(text: str) -> str | None:
    """Return an address of ``X-Forwarded-For`` without its port; None for what is no address."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


def _networks(proxies: Iterable[str]) -> tuple[tuple[Network, ...], bool]:
    if isinstance(proxies, (str, bytes)):
        raise ConfigError(
            '`trusted_proxies` must be a list of addresses and networks: ["10.0.0.0/8"]', field="trusted_proxies"
        )
    networks, unix = [], False
    for proxy in proxies:
        if proxy == "unix":
            unix = True
            continue
        try:
            networks.append(ipaddress.ip_network(proxy))
        except (ValueError, TypeError):
            problem = True
        else:
            problem = False
        if problem:
            raise ConfigError(
                f'`trusted_proxies` must hold addresses, networks as 10.0.0.0/8, or "unix", got {str(proxy)[:64]!r}',
                field="trusted_proxies",
            )
    return tuple(networks), unix


def selection(patterns: Iterable[str]) -> Callable[[str, str], bool] | None:
    """Return the function of method and path that says whether a request is an event; None if none is.

    ``patterns`` are methods (``"POST"``) and paths (``"/admin/*"``: a ``*`` at the end stands for anything). Raises
    `ConfigError` for what is neither.
    """
    if isinstance(patterns, str):
        raise ConfigError('`audit_requests` must be a list: ["POST", "/admin/*"]', field="audit_requests")
    patterns = list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str) or not (pattern.startswith("/") or (pattern.isalpha() and pattern.isupper())):
            raise ConfigError(
                f'`audit_requests` must hold methods as "POST" and paths as "/admin/*", got {str(pattern)[:64]!r}',
                field="audit_requests",
            )
    methods = frozenset(pattern for pattern in patterns if not pattern.startswith("/"))
    paths = frozenset(pattern for pattern in patterns if pattern.startswith("/") and not pattern.endswith("*"))
    prefixes = tuple(pattern[:-1] for pattern in patterns if pattern.startswith("/") and pattern.endswith("*"))

    def selected(method: str, path: str) -> bool:
        return method in methods or path in paths or (bool(prefixes) and path.startswith(prefixes))

    return selected if patterns else None


def request_data(method: str, path: str, route: str | None, status: int) -> dict[str, Any]:
    """Return the payload of a `REQUEST_EVENT`: no query, no body, which may hold anything."""
    data = {"method": method, "path": path, "status": status, "outcome": "success" if status < 400 else "failure"}
    return data if route is None else {**data, "route": route}
