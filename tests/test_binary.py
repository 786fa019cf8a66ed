"""Rows as bytes: whichever way they are made, they are the same, and say the same."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tracevault.events.binary import decode_row, encode_row, encode_rows
from tracevault.events.ids import uuid7
from tracevault.events.record import BY_NAME, INSERT_COLUMNS

TEXTS = {"short": "user_1", "wide": "Zoë 🔒", "long": "x" * 5000, "almost": "y" * 4095, "empty": "", "none": None}
OF_TYPES = {"uuid": uuid7(), "timestamp with time zone": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)}


def row_of(text: str | None) -> tuple[object, ...]:
    return tuple(OF_TYPES.get(BY_NAME[name].column.sql_type, text) for name in INSERT_COLUMNS)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_row_is_read_as_it_was_written(kind: str) -> None:
    row = row_of(TEXTS[kind])
    assert decode_row(encode_row(row)) == row


@pytest.mark.parametrize(
    "kinds",
    [
        [],
        ["none"],
        ["short", "none"],
        ["none", "long", "wide"],
        ["short", "wide", "long", "almost", "empty"],
        ["wide"] * 4,
        [*["short"] * 5, *["none"] * 3],
        list(TEXTS),
    ],
)
def test_rows_are_written_together_as_one_by_one(kinds: list[str]) -> None:
    rows = [row_of(TEXTS[kind]) for kind in kinds]
    assert encode_rows(rows) == b"".join(map(encode_row, rows))
