"""The correlation id of a request."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest

from tests.faces import OpenVault
from tracevault import random_correlation_id, read_correlation_id_header, resolve_correlation_id


class Headers:
    """Neither mapping nor function, and blind to case, as some frameworks have it."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __contains__(self, name: str) -> bool:
        return name.lower() == "x-correlation-id"

    def __getitem__(self, name: str) -> str:
        return self.value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("abc", "abc"),
        ("  abc\t", "abc"),
        ("a\nb", "a\nb"),
        ("ü✅", "ü✅"),
        ("x" * 512, "x" * 512),
        (" " + "x" * 512 + " ", "x" * 512),
        ("x" * 513, None),
        ("", None),
        (" \t", None),
        (None, None),
        (5, None),
        (["abc"], None),
        (b"abc", None),
        ("a\0b", None),
        ("a\ud800", None),
    ],
    ids=ascii,
)
def test_read(value: Any, expected: str | None) -> None:
    assert read_correlation_id_header({"X-Correlation-Id": value}) == expected
    assert read_correlation_id_header({"x-correlation-id": value}) == expected
    assert read_correlation_id_header(MappingProxyType({"X-CORRELATION-ID": value})) == expected
    assert read_correlation_id_header({"X-Correlation-Id": value}.get) == expected
    assert read_correlation_id_header(Headers(value)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("headers", [{}, {"X-Request-Id": "r"}, {"X-Correlation-Id2": "r"}, {1: "r"}, {}.get])
def test_missing(headers: Any) -> None:
    assert read_correlation_id_header(headers) is None
    assert UUID(resolve_correlation_id(headers)).version == 4


def test_resolve_prefers_the_header() -> None:
    assert resolve_correlation_id({"x-correlation-id": " abc "}) == "abc"


def test_random_ids_differ() -> None:
    made = {random_correlation_id() for _ in range(1000)}
    assert len(made) == 1000
    assert {len(value) for value in made} == {36}
    assert {UUID(value).version for value in made} == {4}


def test_whatever_a_request_says_its_event_is_stored(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    for value in ("\0", "\ud800", "x" * 513, "', DROP TABLE audit_logs; --", "a\nb"):
        given = resolve_correlation_id({"x-correlation-id": value})
        receipt = vault.emit("request", correlation_id=given)
        assert vault.query.find_by_id(receipt.id).correlation_id == given
