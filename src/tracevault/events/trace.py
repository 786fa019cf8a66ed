"""The caller's trace: W3C Trace Context, level 1 and 2, section 3.2, the header ``traceparent``."""

from __future__ import annotations

import re
from typing import NamedTuple

from tracevault.events.correlation import Headers, header

TRACEPARENT_HEADER = "traceparent"

# A later version may append to it, after another hyphen; version ff is none.
_TRACEPARENT = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?P<trace_id>[0-9a-f]{32})-(?P<span_id>[0-9a-f]{16})-[0-9a-f]{2}(?P<more>-.*)?",
    re.ASCII,
)
_LONGEST = 512


class Trace(NamedTuple):
    """What a ``traceparent`` names: a trace, and the span in it that made the call."""

    trace_id: str
    span_id: str


def parse_traceparent(value: str) -> Trace | None:
    """Return what a ``traceparent`` names; None if it breaks a rule of the standard, which then says: ignore it."""
    if len(value) > _LONGEST:
        return None
    found = _TRACEPARENT.fullmatch(value)
    if found is None or (found["version"] == "00" and found["more"] is not None):
        return None
    if found["trace_id"] == "0" * 32 or found["span_id"] == "0" * 16:
        return None
    return Trace(found["trace_id"], found["span_id"])


def read_traceparent_header(headers: Headers) -> str | None:
    """Return the request's ``traceparent``, trimmed; None if missing, or not as W3C Trace Context has it.

    ``headers`` is a mapping of header names (compared without regard to case) or a getter.
    """
    value = header(headers, TRACEPARENT_HEADER)
    if value is None or parse_traceparent(value) is None:
        return None
    return value
