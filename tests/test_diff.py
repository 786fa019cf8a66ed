"""Differences between two versions of one thing."""

from __future__ import annotations

import enum
from copy import deepcopy
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest

from tests.faces import OpenVault
from tracevault import ValidationError, compute_diff
from tracevault.events.mask import masked_names
from tracevault.events.payload import Encoder, decode
from tracevault.events.prepare import Settings, prepare_diff
from tracevault.events.record import INSERT_COLUMNS

DATA = INSERT_COLUMNS.index("data")
SETTINGS = Settings(Encoder(masked_names([]), "", 262_144), None, "sync")
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
ID = UUID(int=7)


class Color(enum.Enum):
    RED = "red"
    ALSO_RED = "red "


class Level(enum.IntEnum):
    HIGH = 3


class Name(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("before", "after", "diff"),
    [
        ({}, {}, {}),
        (None, None, {}),
        (None, {"a": 1}, {"a": {"after": 1}}),
        ({"a": 1}, None, {"a": {"before": 1}}),
        ({"a": 1}, {"a": 2}, {"a": {"before": 1, "after": 2}}),
        ({"a": None}, {}, {"a": {"before": None}}),
        ({}, {"a": None}, {"a": {"after": None}}),
        ({"a": None}, {"a": None}, {}),
        ({"a": {"x": 1}}, {"a": {"x": 2}}, {"a": {"before": {"x": 1}, "after": {"x": 2}}}),
        ({"a": 1, "b": 2}, {"b": 2, "c": 3}, {"a": {"before": 1}, "c": {"after": 3}}),
    ],
)
def test_shape(before: Any, after: Any, diff: Any) -> None:
    assert compute_diff(before, after) == diff


def test_keys_come_in_order_before_first() -> None:
    assert list(compute_diff({"b": 1, "a": 1}, {"d": 1, "a": 2, "c": 1})) == ["b", "a", "d", "c"]


SAME = [
    (1, 1.0),
    (1, Decimal("1.00")),
    (0.1, Decimal("0.1")),
    (0.0, -0.0),
    (10**30, 1e30),
    ({"x": 1, "y": [2]}, {"y": (2.0,), "x": 1}),
    ([], ()),
    (NOON, NOON.astimezone(timezone(timedelta(hours=2)))),
    (NOON, "2026-01-02T12:00:00.000Z"),
    (date(2026, 1, 2), "2026-01-02"),
    (ID, str(ID)),
    (Color.RED, "red"),
    (Level.HIGH, 3),
    ([Level.HIGH], [3.0]),
    (Name("a"), "a"),
    ({Name("k"): 1}, {"k": 1}),
]
DIFFERENT = [
    (1, True),
    (0, False),
    (1.0, True),
    (Decimal(1), True),
    (None, False),
    (None, 0),
    (None, ""),
    (None, {}),
    ([], {}),
    ([1], [True]),
    ({"x": 1}, {"x": True}),
    ({"x": 1}, {"x": 1, "y": None}),
    ([1, 2], [2, 1]),
    ([1], [1, 1]),
    ("1", 1),
    ("", []),
    (0.1, Decimal("0.1000000000000000055511151231257827")),
    (10**23, 1e23 + 2e7),
    (2**53, 2**53 + 1),
    (float(2**53), 2**53 + 1),
    ("é", "e\u0301"),
    ("a", "A"),
    ("a", "a "),
    (NOON, NOON + timedelta(microseconds=1)),
    (Color.RED, Color.ALSO_RED),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_same(one: Any, other: Any) -> None:
    assert compute_diff({"k": one}, {"k": other}) == {}
    assert compute_diff({"k": other}, {"k": one}) == {}


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different(one: Any, other: Any) -> None:
    assert compute_diff({"k": one}, {"k": other}).keys() == {"k"}
    assert compute_diff({"k": other}, {"k": one}).keys() == {"k"}


def test_any_mapping_will_do() -> None:
    assert compute_diff(MappingProxyType({"a": 1}), {"a": 1}) == {}


def test_inputs_stay_as_they_are() -> None:
    before, after = {"a": [{"x": NOON}], "b": (1,)}, {"a": [{"x": date(2026, 1, 2)}], "c": Decimal(1)}
    copies = deepcopy((before, after))
    compute_diff(before, after)
    prepare_diff("e", {"before": before, "after": after}, SETTINGS)
    assert (before, after) == copies


def test_cycles_and_depth_are_no_trouble() -> None:
    def loop() -> dict[str, Any]:
        value: dict[str, Any] = {"a": 1}
        value["self"] = [value]
        return value

    def deep() -> Any:
        value: Any = 1
        for _ in range(50_000):
            value = [value]
        return value

    assert compute_diff({"k": loop()}, {"k": loop()}) == {}
    assert compute_diff({"k": loop()}, {"k": {"a": 1, "self": [{"a": 2}]}}).keys() == {"k"}
    assert compute_diff({"k": deep()}, {"k": deep()}) == {}


def test_shared_values_are_compared_once() -> None:
    def tree() -> Any:
        value: Any = 1
        for _ in range(60):
            value = [value, {"x": value}]
        return value

    assert compute_diff({"k": tree()}, {"k": tree()}) == {}


def test_times_outside_of_utc_are_compared_too() -> None:
    edge = datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))
    assert compute_diff({"k": edge}, {"k": edge.replace()}) == {}


# emit_diff


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels - 1):
        value = {"n": value}
    return value


def test_emit_diff_stores_both_sides_and_the_difference() -> None:
    data = decode(prepare_diff("e", {"before": {"a": 1, "b": 2}, "after": {"a": True, "b": 2.0}}, SETTINGS).row[DATA])
    assert data == {
        "before": {"a": 1, "b": 2},
        "after": {"a": True, "b": 2.0},
        "diff": {"a": {"before": 1, "after": True}},
    }


@pytest.mark.parametrize("fields", [{}, {"before": None, "after": None}, {"before": {}, "after": {}}])
def test_sides_that_are_not_given_are_empty(fields: dict[str, Any]) -> None:
    assert decode(prepare_diff("e", fields, SETTINGS).row[DATA]) == {"before": {}, "after": {}, "diff": {}}


@pytest.mark.parametrize("side", ["before", "after"])
def test_paths_start_with_the_side(side: str) -> None:
    for value, field in (
        ([1], side),
        ("x", side),
        ({"x": {1}}, f"{side}.x"),
        ({"x": [0, {"y": b""}]}, f"{side}.x[1].y"),
    ):
        with pytest.raises(ValidationError) as caught:
            prepare_diff("e", {side: value}, SETTINGS)
        assert caught.value.field == field
        assert f"`{field}` " in str(caught.value)


@pytest.mark.parametrize("side", ["before", "after"])
def test_each_side_may_have_100_levels(side: str) -> None:
    prepare_diff("e", {side: nested(100)}, SETTINGS)
    with pytest.raises(ValidationError, match="nested deeper than 100 levels") as caught:
        prepare_diff("e", {side: nested(101)}, SETTINGS)
    assert caught.value.field == side + 100 * ".n"


def test_what_fits_alone_may_be_too_large_with_its_difference() -> None:
    half = {"x": "x" * 40_000, "y": "y" * 40_000}
    prepare_diff("e", {"before": half, "after": half}, SETTINGS)
    other = {"x": "z" * 60_000, "y": "z" * 60_000}
    with pytest.raises(ValidationError, match="max_event_bytes") as caught:
        prepare_diff("e", {"before": half, "after": other}, SETTINGS)
    assert caught.value.field == "data"


@pytest.mark.parametrize(("field", "value"), [("data", {}), ("diff", {}), ("befor", {})])
def test_data_is_no_field_of_emit_diff(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match="is not a field of an event") as caught:
        prepare_diff("e", {field: value}, SETTINGS)
    assert caught.value.field == field


def test_emit_diff_over_the_wire(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    one = vault.emit_diff(
        "e", before={"a": nested(98), "n": 1}, after={"a": nested(98), "n": Decimal("1.0"), "t": NOON}
    )
    two = vault.emit_diff({"event": "e", "after": nested(100)})
    three = vault.emit_diff("e", before={"outcome": "x" * 100}, after={"outcome": None})
    assert vault.query.find_by_id(one.id).data["diff"] == {"t": {"after": "2026-01-02T12:00:00.000Z"}}
    assert vault.query.find_by_id(two.id).data["diff"] == {"n": {"after": nested(99)}}
    assert vault.query.find_by_id(three.id).outcome is None
