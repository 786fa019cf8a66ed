"""The rules that fields and filters share."""

from __future__ import annotations

import enum
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from typing import Any
from uuid import UUID

import pytest

from tracevault import ValidationError
from tracevault.events import rules

TEN = "x" * 10


class Color(enum.StrEnum):
    RED = "red"


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


class NoOffset(tzinfo):
    def utcoffset(self, _moment: datetime | None) -> timedelta | None:
        return None

    dst = utcoffset

    def tzname(self, _moment: datetime | None) -> str | None:
        return None


def refused(call: Any, *args: Any, **kwargs: Any) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        call(*args, **kwargs)
    error = caught.value
    assert error.field == "f"
    assert str(error).startswith("`f` ")
    assert error.__cause__ is None
    assert error.__context__ is None
    str(error).encode()  # can be logged
    return error


@pytest.mark.parametrize("value", ["a", TEN, " ", "\t", "ü" * 10, "😀" * 10, "\ufeff"])
def test_text_accepts(value: str) -> None:
    assert rules.text(value, "f", 10) == value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "must not be empty"),
        (TEN + "x", "must have 1 to 10 characters, got 11: 'xxxxxxxxxxx'"),
        ("a\0b", "must not contain U+0000"),
        ("a\ud800", r"lone surrogate, which is not valid Unicode text: 'a\ud800'"),
        (b"a", "must be a string, got an instance of bytes"),
        (5, "must be a string, got 5"),
        (None, "must be a string, got None"),
        (True, "must be a string, got True"),
        (1.5, "must be a string, got 1.5"),
        (["a"], "must be a string, got an instance of list"),
    ],
)
def test_text_refuses(value: Any, words: str) -> None:
    assert words in str(refused(rules.text, value, "f", 10))


@pytest.mark.parametrize(
    ("value", "expected"), [(Color.RED, "red"), (Text("abc"), "abc")], ids=["StrEnum", "str subclass"]
)
def test_a_subclass_of_str_stands_for_its_characters(value: str, expected: str) -> None:
    found = rules.text(value, "f", 10)
    assert found == expected
    assert type(found) is str


BLANKS = [" ", "\t\n", "\u00a0", "\u2003", "\u3000", "\ufeff", " \ufeff ", "\ufeff \ufeff \ufeff", "\u2028\u2029"]


@pytest.mark.parametrize("value", BLANKS)
def test_blank_text(value: str) -> None:
    assert rules.text(value, "f", 10) == value
    assert "must not be blank" in str(refused(rules.text, value, "f", 10, blank=False))


@pytest.mark.parametrize("value", ["a", " a ", "a b", "\ufeffa", "a\u2028b", "a\x0bb", "a\x7fb", "✅", "x" * 255])
def test_event_name_accepts(value: str) -> None:
    assert rules.event_name(value, "f", 255) == value


@pytest.mark.parametrize("value", ["", *BLANKS, "a\nb", "a\rb", "a\tb", "a\0b", "x" * 256, 1, None, "a\n", "\na"])
def test_event_name_refuses(value: Any) -> None:
    refused(rules.event_name, value, "f", 255)


@pytest.mark.parametrize("value", ["sync ", "SYNC", "", "both", None, True, 1, ["sync"]])
def test_choice_refuses(value: Any) -> None:
    assert 'must be "sync" or "async"' in str(refused(rules.choice, value, "f", ("sync", "async")))


@pytest.mark.parametrize("spelled", [str, lambda value: str(value).upper(), lambda value: value])
def test_uuid_accepts_either_case_and_objects(spelled: Any) -> None:
    value = UUID("abcdefab-cdef-4bcd-8fab-cdefabcdefab")
    assert rules.uuid(spelled(value), "f") == value


@pytest.mark.parametrize(
    "value",
    [
        "",
        "abcdefabcdef4bcd8fabcdefabcdefab",
        "{abcdefab-cdef-4bcd-8fab-cdefabcdefab}",
        "urn:uuid:abcdefab-cdef-4bcd-8fab-cdefabcdefab",
        "abcdefab-cdef-4bcd-8fab-cdefabcdefab\n",
        "abcdefab-cdef-4bcd-8fab-cdefabcdefaġ",
        "٠bcdefab-cdef-4bcd-8fab-cdefabcdefab",
        5,
        None,
        b"0" * 16,
    ],
)
def test_uuid_refuses(value: Any) -> None:
    assert "must be a UUID" in str(refused(rules.uuid, value, "f"))


@pytest.mark.parametrize(
    "value",
    ["0" * 16, "A" * 16, "a" * 15, "a" * 17, "g" * 16, " " + "a" * 15, "a" * 15 + "\n", "٠" * 16, "", 1, None],
)
def test_hex_id_refuses(value: Any) -> None:
    assert "16 lower-case hex digits" in str(refused(rules.hex_id, value, "f", 16))


def test_hex_id_accepts() -> None:
    assert rules.hex_id("00f067aa0ba902b7", "f", 16) == "00f067aa0ba902b7"


NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (NOON, NOON),
        (datetime(2026, 1, 2, 14, tzinfo=timezone(timedelta(hours=2))), NOON),
        (date(2026, 1, 2), datetime(2026, 1, 2, tzinfo=UTC)),
        ("2026-01-02", datetime(2026, 1, 2, tzinfo=UTC)),
        ("2026-01-02T12:00:00Z", NOON),
        ("2026-01-02t12:00:00z", NOON),
        ("2026-01-02 12:00Z", NOON),
        ("2026-01-02T14:00:00+02:00", NOON),
        ("2026-01-02T14:00:00+0200", NOON),
        ("2026-01-02T14:00:00+02", NOON),
        ("2026-01-02T06:30:00-05:30", NOON),
        ("2026-01-02T12:00:00.5Z", NOON.replace(microsecond=500_000)),
        ("2026-01-02T12:00:00,123456Z", NOON.replace(microsecond=123_456)),
        ("2026-01-02T12:00:00.123456789Z", NOON.replace(microsecond=123_456)),
        ("0001-01-01T00:00:00Z", datetime.min.replace(tzinfo=UTC)),
        ("9999-12-31T23:59:59.999999Z", datetime.max.replace(tzinfo=UTC)),
        (datetime.max.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)),
    ],
    ids=str,
)
def test_moment_accepts(value: Any, expected: datetime) -> None:
    found = rules.moment(value, "f")
    assert found == expected
    assert found.tzinfo is UTC


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (datetime(2026, 1, 2), "naive datetime, 2026-01-02T00:00:00"),
        (datetime(2026, 1, 2, tzinfo=NoOffset()), "naive datetime"),
        ("2026-01-02T12:00:00", "no offset from UTC, got '2026-01-02T12:00:00': append Z"),
        ("2026-01-02 12:00", "no offset"),
        ("2026-13-02", "not a time that exists"),
        ("2026-02-29", "not a time that exists"),
        ("2026-01-02T25:00:00Z", "not a time that exists"),
        ("2026-01-02T12:00:60Z", "not a time that exists"),
        ("0000-01-01", "not a time that exists"),
        ("2026-01-02T12:00:00+25:00", "not a time that exists"),
        ("0001-01-01T00:00:00+01:00", "outside the years 1 to 9999"),
        (datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))), "outside the years 1 to 9999"),
        ("20260102", "must be ISO 8601"),
        ("2026-W01-1", "must be ISO 8601"),
        ("2026-1-2", "must be ISO 8601"),
        ("12026-01-02", "must be ISO 8601"),
        ("٢٠٢٦-٠١-٠٢", "must be ISO 8601"),
        ("2026-01-02T12:00:00Z\n", "must be ISO 8601"),
        ("", "must be ISO 8601"),
        ("now", "must be ISO 8601"),
        (1767355200, "must be an aware datetime, a date, or ISO 8601 text with an offset, got 1767355200"),
        (True, "got True"),
        (1.5, "got 1.5"),
        (None, "got None"),
        (["2026-01-02"], "got an instance of list"),
    ],
    ids=str,
)
def test_moment_refuses(value: Any, words: str) -> None:
    assert words in str(refused(rules.moment, value, "f"))


@pytest.mark.parametrize("value", [0, 501, -1, True, False, 1.0, "1", None, 10**5000], ids=rules.got)
def test_whole_number_refuses(value: Any) -> None:
    assert "must be a whole number from 1 to 500" in str(refused(rules.whole_number, value, "f", 1, 500))


def test_whole_number_is_a_plain_int() -> None:
    Size = enum.IntEnum("Size", {"FIVE": 5})  # noqa: N806
    assert type(rules.whole_number(Size["FIVE"], "f", 1, 500)) is int


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 62, "'" + "x" * 62 + "'"),
        ("x" * 63, "'" + "x" * 62 + "…"),
        (10**5000, "1" + "0" * 62 + "…"),
        (-(10**5000), "-1" + "0" * 61 + "…"),
        ({"secret": 1}, "an instance of dict"),
        (b"secret", "an instance of bytes"),
        ("\ud800", r"'\ud800'"),
    ],
    ids=rules.got,
)
def test_values_in_messages_are_shortened_to_64_characters(value: Any, shown: str) -> None:
    assert rules.got(value) == shown
    assert len(shown) <= 64


def test_names_in_messages_are_printable_and_short() -> None:
    assert rules.printable("a\nb\0\ud800") == r"a\nb\x00\ud800"
    assert rules.printable("ü ✅") == "ü ✅"
    assert len(rules.printable("\n" * 1_000_000)) == 64
    assert rules.printable(10**5000).startswith("1000")


def test_nearest_names_the_closest_or_all() -> None:
    assert rules.nearest("sevrity", ["severity", "since"]) == "did you mean `severity`?"
    assert rules.nearest("qqq", ["since", "severity"]) == "known are severity, since"
    assert rules.nearest(5, ["since"]) == "known are since"
