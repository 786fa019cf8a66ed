"""Filters: what `find_many` and `count` accept, what they refuse, and which rows they find."""

from __future__ import annotations

import enum
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from tests.faces import OpenVault
from tracevault import ValidationError
from tracevault.schema.filters import COUNT_FILTERS, FIND_FILTERS, count_condition, find_condition

TEXTS = {
    "event": 255,
    "actor_id": 512,
    "actor_type": 512,
    "target_id": 512,
    "target_type": 512,
    "correlation_id": 512,
    "request_id": 512,
    "tenant_id": 255,
    "environment": 128,
    "outcome": 64,
    "error_code": 255,
    "severity": 32,
}
LISTS = {"events", "actor_ids", "target_ids", "tenant_ids", "severities"}
PAGING = {"limit", "offset", "order"}


class Level(enum.StrEnum):
    FATAL = "fatal"


class Size(enum.IntEnum):
    FIVE = 5


def refused(check: Any, **filters: Any) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        check(filters)
    error = caught.value
    assert f"`{error.field}`" in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    return error


def test_the_filters_are_these() -> None:
    expected = {*TEXTS, *LISTS, "mode", "errors_only", "since", "until"}
    expected |= {"event_prefix", "trace_id", "data", "meta", "changed", "text", "is_null"}
    assert set(COUNT_FILTERS) == expected
    assert set(FIND_FILTERS) == expected | PAGING
    assert all(spec.help for spec in FIND_FILTERS.values())


@pytest.mark.parametrize(("name", "limit"), TEXTS.items())
def test_texts(name: str, limit: int) -> None:
    for value in ("x", " x ", "%", "x" * limit, "😀" * limit, Level.FATAL):
        where, params = find_condition({name: value})[0]
        assert (where, params) == (f"WHERE {name} = $1", (str(value),))
        assert type(params[0]) is str
        assert count_condition({name: value}) == (where, params)
    for bad in ("", " ", "\ufeff", "x" * (limit + 1), "a\0", "\ud800", 5, True, b"x", ["x"], {"x"}, {"eq": "x"}, 1.5):
        for check in (find_condition, count_condition):
            assert refused(check, **{name: bad}).field == name


@pytest.mark.parametrize("bad", ["a\nb", "a\tb", "a\rb"])
def test_an_event_stays_on_one_line(bad: str) -> None:
    assert refused(find_condition, event=bad).field == "event"
    find_condition({"actor_id": bad})


@pytest.mark.parametrize("name", FIND_FILTERS)
def test_none_is_refused(name: str) -> None:
    error = refused(find_condition, **{name: None})
    assert error.field == name
    assert "must not widen an audit query" in str(error)
    if name not in PAGING:
        assert str(refused(count_condition, **{name: None})) == str(error)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("actor", "did you mean `actor_"),
        ("severty", "did you mean `severity`?"),
        ("actorId", "did you mean `actor_id`?"),
        ("tenants", "did you mean `tenant_id"),
        ("zzz", "known are actor_id,"),
    ],
)
def test_unknown_filters_are_refused(name: str, hint: str) -> None:
    for check, method in ((find_condition, "find_many"), (count_condition, "count")):
        error = refused(check, **{name: "x"})
        assert error.field == name
        assert f"is not a filter of {method}" in str(error)
        assert hint in str(error)


@pytest.mark.parametrize("name", sorted(PAGING))
def test_count_has_no_pages(name: str) -> None:
    assert refused(count_condition, **{name: 1}).field == name


@pytest.mark.parametrize(
    ("filters", "page"),
    [
        ({}, (50, 0, "desc")),
        ({"limit": 1}, (1, 0, "desc")),
        ({"limit": 500, "offset": 2**63 - 1, "order": "asc"}, (500, 2**63 - 1, "asc")),
        ({"limit": Size.FIVE, "offset": Size.FIVE}, (5, 5, "desc")),
    ],
)
def test_pages(filters: dict[str, Any], page: tuple[Any, ...]) -> None:
    condition, found = find_condition(filters)
    assert found == page
    assert [type(value) for value in found] == [int, int, str]
    assert condition == ("", ())


BAD: dict[str, list[Any]] = {
    "limit": [0, -1, 501, True, False, 1.0, "10", Decimal(5), 10**5000, [1]],
    "offset": [-1, 2**63, True, 0.0, "0", 10**5000],
    "order": ["ASC", "descending", "", 1, True, "desc; DROP TABLE audit_logs", ["desc"]],
    "mode": ["both", "SYNC", "", 1, True],
    "errors_only": [1, 0, "true", "", []],
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    for bad in BAD[name]:
        assert refused(find_condition, **{name: bad}).field == name


@pytest.mark.parametrize("value", [["error"], ("error", "info"), [str(n) for n in range(16)], [Level.FATAL]])
def test_severities(value: Any) -> None:
    where, params = find_condition({"severities": value})[0]
    assert where == "WHERE severity = ANY($1)"
    assert params == ([str(item) for item in value],)
    assert {type(item) for item in params[0]} == {str}


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ([], "severities"),
        ((), "severities"),
        ([str(n) for n in range(17)], "severities"),
        (["error", "error"], "severities"),
        ([Level.FATAL, "fatal"], "severities"),
        ("error", "severities"),
        ({"error"}, "severities"),
        ({"error": 1}, "severities"),
        (b"error", "severities"),
        (iter(["error"]), "severities"),
        (5, "severities"),
        ([1], "severities[0]"),
        (["a", None], "severities[1]"),
        (["a", "b", ""], "severities[2]"),
        ([" "], "severities[0]"),
        (["x" * 33], "severities[0]"),
        (["a\0"], "severities[0]"),
        ([["a"]], "severities[0]"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_severities_refused(bad: Any, field: str) -> None:
    assert refused(find_condition, severities=bad).field == field


NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize("name", ["since", "until"])
def test_times(name: str) -> None:
    sign = ">=" if name == "since" else "<="
    for value in (NOON, "2026-01-02T13:00:00+01:00"):
        assert find_condition({name: value})[0] == (f"WHERE occurred_at {sign} $1", (NOON,))
    for day in (date(2026, 1, 2), "2026-01-02"):
        assert count_condition({name: day}).params == (NOON.replace(hour=0),)
    for bad in (datetime(2026, 1, 2), "2026-01-02T12:00:00", "yesterday", "", 5, True, [NOON]):
        assert refused(find_condition, **{name: bad}).field == name


def test_since_is_not_later_than_until() -> None:
    find_condition({"since": NOON, "until": NOON})
    find_condition({"until": "2026-01-02", "since": date(2026, 1, 2)})
    for filters in ({"since": NOON, "until": NOON - timedelta(microseconds=1)}, {"until": "2026-01-01", "since": NOON}):
        for check in (find_condition, count_condition):
            error = refused(check, **filters)
            assert error.field == "since"
            assert "2026-01-02T12:00:00+00:00" in str(error)


def test_flags() -> None:
    assert find_condition({"errors_only": False})[0] == ("", ())
    where, params = find_condition({"errors_only": True, "event": "e"})[0]
    assert where == "WHERE (outcome = 'failure' OR severity IN ('error', 'critical', 'fatal')) AND event = $1"
    assert params == ("e",)


def test_all_filters_together_are_numbered() -> None:
    filters = {
        **dict.fromkeys(TEXTS, "x"),
        "mode": "sync",
        "severities": ["a", "b"],
        "errors_only": True,
        "since": NOON,
        "until": NOON,
        "limit": 5,
    }
    where, params = find_condition(filters)[0]
    assert len(params) == where.count("$") == len(TEXTS) + 4
    assert where.count(" AND ") == len(TEXTS) + 4
    assert [f"${place}" in where for place in range(1, len(params) + 1)] == [True] * len(params)
    assert "'x'" not in where


EVENTS: list[dict[str, Any]] = [
    {
        "event": f"e{n}",
        "actor": {"id": f"a{n}", "type": f"at{n}"},
        "target": {"id": f"t{n}", "type": f"tt{n}"},
        "correlation_id": f"c{n}",
        "request_id": f"r{n}",
        "environment": f"env{n}",
        "data": {"outcome": f"o{n}", "severity": f"s{n}", "error": {"code": f"x{n}"}},
        "occurred_at": NOON + timedelta(hours=n),
    }
    for n in range(4)
]


def test_each_filter_finds_its_rows(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    vault.emit_many(EVENTS)
    vault.emit("late", mode="async", occurred_at=NOON + timedelta(days=9), data={"outcome": "failure"})
    vault.flush()

    def found(**filters: Any) -> list[str]:
        names = [record.event for record in vault.query.find_many(**filters)]
        assert vault.query.count(**{key: filters[key] for key in filters if key not in PAGING}) >= len(names)
        return names

    for name, prefix in {
        "event": "e", "actor_id": "a", "actor_type": "at", "target_id": "t", "target_type": "tt", "correlation_id": "c",
        "request_id": "r", "environment": "env", "outcome": "o", "error_code": "x", "severity": "s",
    }.items():  # fmt: skip
        assert found(**{name: f"{prefix}2"}) == ["e2"]
        assert found(**{name: f"{prefix}_"}) == []
        assert found(**{name: f"{prefix}2".upper()}) == []
    assert found(severities=["s0", "s3", "nope"]) == ["e3", "e0"]
    assert found(errors_only=True) == ["late"]
    assert found(errors_only=False) == found() == ["late", "e3", "e2", "e1", "e0"]
    assert found(mode="async") == ["late"]
    assert found(order="asc", limit=2, offset=1) == ["e1", "e2"]
    assert found(since=NOON + timedelta(hours=1), until=NOON + timedelta(hours=2)) == ["e2", "e1"]
    assert found(since=datetime.min.replace(tzinfo=UTC), until="9999-12-31T23:59:59.999999Z", limit=1) == ["late"]
    assert found(offset=2**63 - 1) == []
    assert vault.query.count() == 5
    assert vault.query.count(event="e1", actor_id="a2") == 0


def test_ties_are_broken_by_id(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    receipts = vault.emit_many([{"event": "e", "occurred_at": NOON}] * 20)
    ids = [receipt.id for receipt in receipts]
    pages = [record.id for offset in (0, 7, 14) for record in vault.query.find_many(limit=7, offset=offset)]
    assert pages == ids[::-1]
    assert [record.id for record in vault.query.find_many(order="asc")] == ids


def test_refusals_through_a_vault(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    for filters in ({"actor_id": None}, {"limit": 0}, {"zzz": 1}, {"since": "2027-01-01", "until": "2026-01-01"}):
        with pytest.raises(ValidationError):
            vault.query.find_many(**filters)
        with pytest.raises(ValidationError):
            vault.query.count(**filters)
    with pytest.raises(ValidationError):
        vault.query.count(limit=5)
