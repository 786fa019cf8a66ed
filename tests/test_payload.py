"""Payloads: what is stored and how it reads back, what is refused and where, and PostgreSQL's own text."""

from __future__ import annotations

import enum
import json
import sys
from collections import Counter, OrderedDict, defaultdict, namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest

from tests.conftest import rows
from tests.faces import OpenVault
from tracevault import ValidationError
from tracevault.events.payload import Encoder, decode, jsonb_text

ENCODER = Encoder(frozenset(), "[REDACTED]", 262_144)
JSONB_TEXT = json.loads((Path(__file__).parent / "conformance/tlog/jsonb_text.json").read_text())["cases"]

Point = namedtuple("Point", "x y")


class Color(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Bits(enum.Flag):
    A = 1
    B = 2


class Any_(enum.Enum):  # noqa: N801
    NONE = None
    RATE = Decimal("1.50")
    WHEN = datetime(2026, 1, 2, tzinfo=UTC)
    LIST = ("a", 1)
    COLOR = Color.RED
    OBJECT = object()
    SET = frozenset({1})


class Text(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return "repr"

    __str__ = __repr__


class Whole(int):
    def __repr__(self) -> str:
        return "repr"

    __str__ = __repr__


class Real(float):
    def __repr__(self) -> str:
        return "repr"

    __str__ = __repr__


class Exact(Decimal):
    def __repr__(self) -> str:
        return "repr"

    __str__ = __repr__


class NoOffset(tzinfo):
    def utcoffset(self, _moment: datetime | None) -> timedelta | None:
        return None

    dst = utcoffset

    def tzname(self, _moment: datetime | None) -> str | None:
        return None


NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
ID = UUID("018f4e5c-7a1b-7c3d-9e2f-1a2b3c4d5e6f")

STORED: list[tuple[Any, Any]] = [
    (None, None),
    (True, True),
    (False, False),
    # integers are exact
    (0, 0),
    (-1, -1),
    (2**53 + 1, 2**53 + 1),
    (2**63 - 1, 2**63 - 1),
    (2**63, 2**63),
    (-(2**63), -(2**63)),
    (10**1000 - 1, 10**1000 - 1),
    (1 - 10**1000, 1 - 10**1000),
    (Whole(7), 7),
    (Level.HIGH, 3),
    (Bits.A | Bits.B, 3),
    # floats stand for their shortest text
    (0.1, 0.1),
    (-0.0, 0.0),
    (1.0, 1.0),
    (1e-7, 1e-7),
    (5e-324, 5e-324),
    (123456789.125, 123456789.125),
    (1e15, 1e15),
    (1e16, 10**16),
    (1e23, 10**23),
    (sys.float_info.max, 17976931348623157 * 10**292),
    (Real(1.5), 1.5),
    # Decimals are exact, to the last digit
    (Decimal("0.1"), 0.1),
    (Decimal("1.50"), 1.5),
    (Decimal("1"), 1),
    (Decimal("-0"), 0),
    (Decimal("0E+5"), 0),
    (Decimal("0.000"), 0.0),
    (Decimal("12E+2"), 1200),
    (Decimal("0.1000000000000000055511151231257827"), Decimal("0.1000000000000000055511151231257827")),
    (Decimal("9" * 1000), 10**1000 - 1),
    (Decimal("-0." + "9" * 1000), Decimal("-0." + "9" * 1000)),
    (Decimal("1E+1000"), 10**1000),
    (Decimal("1E-1000"), Decimal("1E-1000")),
    (Decimal("9" * 1000 + "E+1000"), (10**1000 - 1) * 10**1000),
    (Exact("2.5"), 2.5),
    # text
    ("", ""),
    ("plain", "plain"),
    ("'; DROP TABLE audit_logs; --", "'; DROP TABLE audit_logs; --"),
    ('"\\/\b\f\n\r\t', '"\\/\b\f\n\r\t'),
    ("\x01\x1f\x7f\x80\x9f", "\x01\x1f\x7f\x80\x9f"),
    ("\u00a0\u2028\u2029\ufeff\ufffe\uffff", "\u00a0\u2028\u2029\ufeff\ufffe\uffff"),
    ("😀\U0010ffff", "😀\U0010ffff"),
    ("e\u0301", "e\u0301"),
    (r"\u0000", r"\u0000"),
    (r"\ud800", r"\ud800"),
    (r"\N", r"\N"),
    (Text("abc"), "abc"),
    (Color.RED, "red"),
    # times
    (NOON, "2026-01-02T12:00:00.000Z"),
    (NOON.replace(microsecond=120_000), "2026-01-02T12:00:00.120Z"),
    (NOON.replace(microsecond=123_456), "2026-01-02T12:00:00.123456Z"),
    (NOON.astimezone(timezone(timedelta(hours=5, minutes=30))), "2026-01-02T12:00:00.000Z"),
    (datetime.min.replace(tzinfo=UTC), "0001-01-01T00:00:00.000Z"),
    (datetime.max.replace(tzinfo=UTC), "9999-12-31T23:59:59.999999Z"),
    (date(2026, 1, 2), "2026-01-02"),
    (date(1, 1, 1), "0001-01-01"),
    (ID, str(ID)),
    # containers
    ({}, {}),
    ([], []),
    ((), []),
    ([None, 1, [None]], [None, 1, [None]]),
    ((1, (2,)), [1, [2]]),
    (Point(1, 2.5), [1, 2.5]),
    (
        {"": 1, " ": 2, "a.b": 3, "a[0]": 4, '"': 5, "\n": 6, "😀": 7},
        {"": 1, " ": 2, "a.b": 3, "a[0]": 4, '"': 5, "\n": 6, "😀": 7},
    ),
    ({Text("k"): 1, Color.RED: 2}, {"k": 1, "red": 2}),
    (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    (defaultdict(int, a=1), {"a": 1}),
    (Counter("aab"), {"a": 2, "b": 1}),
    ({"k" * 5000: 1}, {"k" * 5000: 1}),
    # enums
    (Any_.NONE, None),
    (Any_.RATE, 1.5),
    (Any_.WHEN, "2026-01-02T00:00:00.000Z"),
    (Any_.LIST, ["a", 1]),
    (Any_.COLOR, "red"),
]


def identical(found: Any, expected: Any) -> bool:
    """Compare values and their types, at every depth."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(identical(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(identical, found, expected))
    return bool(found == expected)


def test_values_are_stored_and_read_back(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    receipts = vault.emit_many(
        {"event": "e", "data": {"v": given}, "meta": {"v": [{"w": (given, given)}]}} for given, _ in STORED
    )
    one = vault.emit("one", data={"v": [given for given, _ in STORED]})
    records = {record.id: record for record in vault.query.find_many(event="e", limit=500)}
    for receipt, (given, expected) in zip(receipts, STORED, strict=True):
        record = records[receipt.id]
        assert identical(record.data, {"v": expected}), given
        assert identical(record.meta, {"v": [{"w": [expected, expected]}]}), given
    assert identical(vault.query.find_by_id(one.id).data, {"v": [expected for _, expected in STORED]})


@pytest.mark.parametrize("number", range(len(STORED)))
def test_the_text_is_what_reads_back(number: int) -> None:
    given, expected = STORED[number]
    text = ENCODER.encode({"v": given}, "data")
    assert json.loads(text) is not None
    assert identical(decode(json_as_printed(text)), {"v": expected})


def json_as_printed(text: str) -> str:
    return jsonb_text(json.loads(text, parse_float=Decimal, parse_int=Decimal))


# Refusals


def deep(levels: int, leaf: Any = 1) -> dict[str, Any]:
    value: Any = {"n": leaf}
    for _ in range(levels - 1):
        value = {"n": value}
    return value  # type: ignore[no-any-return]


def cycle() -> dict[str, Any]:
    value: dict[str, Any] = {"b": {}}
    value["b"]["c"] = value
    return value


def list_cycle() -> list[Any]:
    value: list[Any] = [1]
    value.append((value,))
    return value


def wide_cycle() -> dict[str, Any]:
    value: dict[str, Any] = {"wide": [0] * 10_000}
    value["self"] = value
    return value


class Looping(enum.Enum):
    LIST = [1]  # noqa: RUF012


Looping.LIST.value[:] = [Looping.LIST]  # type: ignore[list-item]

REFUSED: list[tuple[Any, str, str]] = [
    (float("nan"), "", "is not a finite number, which JSON cannot hold (got nan)"),
    (float("inf"), "", "(got inf)"),
    (-float("inf"), "", "(got -inf)"),
    (Decimal("NaN"), "", "is not a finite number"),
    (Decimal("sNaN"), "", "is not a finite number"),
    (Decimal("-Infinity"), "", "is not a finite number"),
    (10**1000, "", "is an integer of more than 1,000 digits (got 1000"),
    (-(10**1000), "", "is an integer of more than 1,000 digits"),
    (10**100_000, "", "is an integer of more than 1,000 digits"),
    (Whole(10**1000), "", "is an integer of more than 1,000 digits"),
    (Decimal("1" * 1001), "", "is a Decimal beyond 1,000 digits"),
    (Decimal("1E+1001"), "", "(got Decimal('1E+1001'))"),
    (Decimal("1E-1001"), "", "an exponent of 1,000 either way"),
    (b"a", "", "is an instance of bytes, which JSON cannot hold: pass None, bool"),
    (bytearray(b"a"), "", "is an instance of bytearray"),
    (memoryview(b"a"), "", "is an instance of memoryview"),
    ({1}, "", "is an instance of set"),
    (frozenset(), "", "is an instance of frozenset"),
    (object(), "", "is an instance of object"),
    (object, "", "is an instance of type"),
    (print, "", "is a builtin_function_or_method"),
    (lambda: 1, "", "is a function"),
    (1j, "", "is an instance of complex"),
    (range(2), "", "is an instance of range"),
    (iter([1]), "", "is an instance of list_iterator"),
    ({}.keys(), "", "is an instance of dict_keys"),
    (MappingProxyType({}), "", "is an instance of mappingproxy"),
    (time(1), "", "is an instance of time"),
    (timedelta(1), "", "is an instance of timedelta"),
    (ValueError("x"), "", "is an instance of ValueError"),
    (..., "", "is an instance of ellipsis"),
    (Any_.OBJECT, "", "is an instance of object"),
    (Any_.SET, "", "is an instance of frozenset"),
    (
        datetime(2026, 1, 2),
        "",
        "is a naive datetime; pass an aware one, as datetime.now(UTC) (got datetime.datetime(2026",
    ),
    (datetime(2026, 1, 2, tzinfo=NoOffset()), "", "is a naive datetime"),
    (datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))), "", "lies outside the years 1 to 9999 in UTC"),
    (datetime.min.replace(tzinfo=timezone(timedelta(hours=1))), "", "lies outside the years 1 to 9999 in UTC"),
    ("a\0b", "", r"contains the character U+0000, which PostgreSQL cannot store (got 'a\x00b')"),
    ("\0" + "x" * 200, "", "…)"),
    ("a\ud800", "", r"contains a lone surrogate, which is not valid Unicode text (got 'a\ud800')"),
    ("\udfff\ud800", "", "contains a lone surrogate"),
    (Text("a\0b"), "", "contains the character U+0000"),
    ({"a\0b": 1}, r".a\x00b", "is a key with U+0000 or a lone surrogate"),
    ({"a\ud800": 1}, r".a\ud800", "is a key with U+0000 or a lone surrogate"),
    ({1: 1}, ".1", "is a key of type int; keys must be strings"),
    ({None: 1}, ".None", "is a key of type NoneType"),
    ({True: 1}, ".True", "is a key of type bool"),
    ({1.5: 1}, ".1.5", "is a key of type float"),
    ({b"k": 1}, ".an instance of bytes", "is a key of type bytes"),
    ({(1, 2): 1}, ".an instance of tuple", "is a key of type tuple"),
    ({ID: 1}, ".an instance of UUID", "is a key of type UUID"),
    ({10**5000: 1}, ".1" + "0" * 62 + "…", "is a key of type int"),
    ({Level.HIGH: 1}, ".<Level.HIGH: 3>", "is a key of type Level"),
    ({"k" * 100: {1}}, "." + "k" * 63 + "…", "is an instance of set"),
    ({"a\nb": {1}}, r".a\nb", "is an instance of set"),
    ({"a b": [{1}]}, ".a b[0]", "is an instance of set"),
    (cycle(), ".b.c", "refers back to a container that holds it (a cycle)"),
    (list_cycle(), "[1][0]", "refers back to a container that holds it (a cycle)"),
    (wide_cycle(), ".self", "refers back to a container that holds it (a cycle)"),
    (Looping.LIST, "[0]", "refers back to a container that holds it (a cycle)"),
    (["x" * 1000] * 263, "[261]", "makes the event larger than"),
    ("x" * 262_145, "", "makes the event larger than `max_event_bytes` (262,144)"),
]
NUMBERS = [str(number) for number in range(len(REFUSED))]


@pytest.mark.parametrize(("bad", "path", "words"), REFUSED, ids=NUMBERS)
@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda value: {"v": value}, ".v"),
        (lambda value: {"a": 1, "items": [None, {"x": 2, "price": (0, value)}, 3]}, ".items[1].price[1]"),
    ],
    ids=["plain", "nested"],
)
def test_refusals_name_the_path(wrap: Any, place: str, bad: Any, path: str, words: str) -> None:
    given = wrap(bad)
    for field in ("data", "meta"):
        with pytest.raises(ValidationError) as caught:
            ENCODER.encode(given, field)
        error = caught.value
        assert error.field == field + place + path
        assert str(error).startswith(f"`{error.field}` ")
        assert words in str(error)
        assert error.__cause__ is None
        assert error.__context__ is None
        str(error).encode()


@pytest.mark.parametrize(
    "value",
    [[1], "x", 5, True, (), {1}, b"{}", MappingProxyType({}), UUID(int=1), Any_.LIST, object()],
    ids=lambda value: type(value).__name__,
)
def test_a_payload_is_a_dict(value: Any) -> None:
    with pytest.raises(ValidationError, match="`data` must be a dict with string keys, not a") as caught:
        ENCODER.encode(value, "data")
    assert caught.value.field == "data"


def test_the_text_in_place_of_a_payload_is_not_shown() -> None:
    with pytest.raises(ValidationError) as caught:
        ENCODER.encode('{"password": "s3cr3t"}', "data")
    assert "s3cr3t" not in str(caught.value)


def test_nothing_is_written_for_what_is_refused(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    for bad, _, _ in REFUSED:
        with pytest.raises(ValidationError):
            vault.emit("e", data={"v": bad}, mode="async")
        with pytest.raises(ValidationError):
            vault.emit_many([{"event": "e"}, {"event": "e", "meta": {"v": bad}}, {"event": "e"}])
    vault.flush()
    assert rows(ready_dsn, "SELECT count(*) FROM audit_logs") == [(0,)]


# Depth, size, sharing


def test_a_hundred_levels_are_stored(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    lists: Any = 1
    for _ in range(99):
        lists = (lists,)
    receipts = vault.emit_many([{"event": "e", "data": deep(100)}, {"event": "e", "data": {"l": lists}}])
    assert vault.query.find_by_id(receipts[0].id).data == deep(100)
    assert str(vault.query.find_by_id(receipts[1].id).data).count("[") == 99


@pytest.mark.parametrize("leaf", [1, "x", None, [], {}, NOON])
def test_depth_counts_containers(leaf: Any) -> None:
    levels = 99 if isinstance(leaf, (list, dict)) else 100
    ENCODER.encode(deep(levels, leaf), "data")
    with pytest.raises(ValidationError, match="nested deeper than 100 levels") as caught:
        ENCODER.encode(deep(levels + 1, leaf), "data")
    assert caught.value.field == "data" + 100 * ".n"


def test_a_value_that_appears_twice_is_no_cycle() -> None:
    shared = {"x": [1]}
    text = ENCODER.encode({"a": shared, "b": [shared, shared], "c": {"d": shared}}, "data")
    assert json.loads(text) == {"a": shared, "b": [shared, shared], "c": {"d": shared}}


def explosions() -> dict[str, dict[str, Any]]:
    lists: Any = 1
    dicts: Any = 1
    for _ in range(60):
        lists = [lists, lists]
        dicts = {"a": dicts, "b": dicts}
    return {
        "lists": {"v": lists},
        "dicts": dicts,
        "large strings": {"v": ["x" * 1_000_000] * 200_000},
        "large keys": {"v": [{"k" * 1_000_000: 1}] * 200_000},
        "large integers": {"v": [10**999] * 200_000},
        "large decimals": {"v": [Decimal("1" * 1000)] * 200_000},
        "a large list": {"v": [[0] * 100_000] * 200_000},
        "many numbers": {"v": [0] * 1_000_000},
    }


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", explosions())
def test_what_would_explode_is_refused_quickly(name: str) -> None:
    with pytest.raises(ValidationError, match="makes the event larger than `max_event_bytes`"):
        ENCODER.encode(explosions()[name], "data")


@pytest.mark.timeout(10)
def test_short_strings_may_amount_to_a_large_text_but_not_to_a_huge_one() -> None:
    assert len(ENCODER.encode({"v": ["\x01" * 64] * 200_000}, "data")) < 400 * 262_144


def test_budgets_refuse_nothing_that_fits() -> None:
    payloads: list[Any] = [{"v": [0] * 1000}, {"k" * 1000: "x" * 1000}, {"v": [[]] * 1000}, {"v": [10**999] * 9}]
    for value in payloads:
        size = len(json.dumps(value, ensure_ascii=False))
        Encoder(frozenset(), "", size).encode(value, "data")


def test_keys_are_checked_each_time() -> None:
    encoder = Encoder(frozenset({"secret"}), "***", 262_144)
    for _ in range(3):
        assert encoder.encode({"key": 1, "SECRET": 2}, "data") == '{"key": 1, "SECRET": "***"}'
        with pytest.raises(ValidationError):
            encoder.encode({"a\0": 1}, "data")
    for number in range(10_000):  # more than it remembers
        assert encoder.encode({f"k{number}": 1}, "data") == f'{{"k{number}": 1}}'


def test_integers_that_python_may_not_print(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        text = ENCODER.encode({"v": [10**999, 10**5]}, "data")
        found = decode(text)["v"]
    finally:
        sys.set_int_max_str_digits(limit)
    assert found == [10**999, 10**5]


# Reading what others wrote


def test_numbers_of_other_writers(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    texts = {
        "9" * 5000: Decimal("9" * 5000),
        "1e400": 10**400,
        "-1e400": -(10**400),
        "1e-400": Decimal("1e-400"),
        "0.1000000000000000055511151231257827": Decimal("0.1000000000000000055511151231257827"),
        "0.10": 0.1,
        "1e3": 1000,
        "100e-2": 1.0,
        "-0.0": 0.0,
        "1.7976931348623157e309": int(Decimal("1.7976931348623157e309")),
        "9007199254740993": 9007199254740993,
        "0." + "1" * 16_000: Decimal("0." + "1" * 16_000),
    }
    for text in texts:
        rows(
            ready_dsn,
            "INSERT INTO audit_logs (id, event, mode, occurred_at, data)"
            " VALUES (gen_random_uuid(), 'raw', 'sync', now(), jsonb_build_object('n', %s::jsonb))",
            text,
        )
    found = [record.data["n"] for record in vault.query.find_many(order="asc")]
    for number, expected in zip(found, texts.values(), strict=True):
        assert identical(number, expected)
    assert found[0] == 10**5000 - 1


def test_payloads_of_other_writers(face: OpenVault, ready_dsn: str) -> None:
    """Not only dicts, and nested deeper than Python's stack: nothing breaks a page."""
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    for text in ("[1]", '"text"', "null", "7", '{"a":' * 2000 + '[1, "\\"]}", 1.5]' + "}" * 2000):
        rows(
            ready_dsn,
            "INSERT INTO audit_logs (id, event, mode, occurred_at, data, meta)"
            " VALUES (gen_random_uuid(), 'raw', 'sync', now(), %s::jsonb, %s::jsonb)",
            text,
            text,
        )
    found = [record.data for record in vault.query.find_many(order="asc")]
    assert found[:4] == [[1], "text", None, 7]
    value = found[4]
    for _ in range(2000):
        value = value["a"]
    assert value == [1, '"]}', 1.5]


DEEP = "[" * 3000 + "]" * 3000


@pytest.mark.parametrize(
    ("text", "leaf"),
    [
        (DEEP.replace("[]", '[{"a": 1.50, "b": []}]'), {"a": 1.5, "b": []}),
        (DEEP.replace("[]", '["\\\\\\"]:,{", ""]'), '\\"]:,{'),
        (DEEP.replace("[]", "[-7, true, null, {}]"), -7),
        (DEEP.replace("[]", '[{"k": "v", "k:": {"": null}}]'), {"k": "v", "k:": {"": None}}),
    ],
)
def test_deep_text_is_decoded_like_any_other(text: str, leaf: Any) -> None:
    value = decode(text)
    for _ in range(2999):
        (value,) = value
    assert identical(value[0], leaf)


def test_times_of_other_writers(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    last, first = datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)
    times = {
        "-infinity": first,
        "4713-01-01 BC": first,
        "0001-01-01 00:00:00+00 BC": first,
        "0001-01-01 00:00:00+00": first,
        "2026-01-02 12:00:00+00": NOON,
        "9999-12-31 23:59:59.999999+00": last,
        "10000-01-01 00:00:00+00": last,
        "294276-12-31 23:59:59+00": last,
        "infinity": last,
    }
    for text in times:
        rows(
            ready_dsn,
            "INSERT INTO audit_logs (id, event, mode, occurred_at, created_at)"
            " VALUES (gen_random_uuid(), 'raw', 'sync', %s, %s)",
            text,
            text,
        )
    records = vault.query.find_many(order="asc")
    assert [record.occurred_at for record in records] == list(times.values())
    assert [record.created_at for record in records] == list(times.values())
    assert {record.occurred_at.tzinfo for record in records} == {UTC}
    assert vault.query.find_by_id(records[0].id).occurred_at == first
    assert vault.query.count(since=last) == 4
    assert vault.query.count(until=first) == 4


# PostgreSQL's own text


def exact(text: str) -> Any:
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


@pytest.mark.parametrize("case", JSONB_TEXT, ids=lambda case: case["input"][:40])
def test_jsonb_text(case: dict[str, str]) -> None:
    assert jsonb_text(exact(case["input"])) == case["jsonb_text"]


def test_jsonb_text_on_the_server(dsn: str) -> None:
    inputs = [
        *(case["input"] for case in JSONB_TEXT),
        *(ENCODER.encode({"v": given}, "data") for given, _ in STORED),
        *(f"[{number}]" for number in ("1.50E+1", "0e3", "-0e-3", "1E-5", "12.340e2", "5e-324", "9" * 5000)),
        '{"\\u0001":1,"\\ud83d\\ude00":2,"ab":3,"b":4,"a":5,"é":6,"zz":7,"":8}',
    ]
    printed = rows(
        dsn, "SELECT text::jsonb::text FROM unnest(%s::text[]) WITH ORDINALITY AS t (text, n) ORDER BY n", inputs
    )
    for text, (expected,) in zip(inputs, printed, strict=True):
        assert jsonb_text(exact(text)) == expected
        assert jsonb_text(decode(expected)) is not None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (1, "1"),
        (10**5000, "1" + "0" * 5000),
        (1e22, "1" + "0" * 22),
        (-0.0, "0.0"),
        (1.5, "1.5"),
        ("é", '"é"'),
    ],
    ids=lambda value: str(value)[:10] if isinstance(value, str) else type(value).__name__,
)
def test_jsonb_text_of_python_values(value: Any, text: str) -> None:
    assert jsonb_text(value) == text
