"""What must hold for any payload: on a real server where something is stored, pure where not."""

from __future__ import annotations

import enum
import itertools
import json
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo

from tests.conftest import TEMPLATE, rows
from tests.faces import Face, opener
from tracevault import ValidationError, compute_diff, mask
from tracevault.events.mask import masked_names
from tracevault.events.payload import Encoder, Walk, _decode_deep, decode, jsonb_text
from tracevault.events.prepare import Settings, prepare, prepare_diff, unstored_record
from tracevault.events.record import GENERATED_COLUMNS, INSERT_COLUMNS

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
PROFILE: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": bool(os.environ.get("CI")),
    "suppress_health_check": SLOW,
}
PURE = settings(max_examples=100, **PROFILE)
STORED = settings(max_examples=15, **PROFILE)  # each example is a batch

FIELDS = ("password", "Token", "straße", "ключ", "şifre_ı")
ENCODER = Encoder(masked_names(FIELDS), "[REDACTED]", 2**24)
SETTINGS = Settings(ENCODER, None, "sync")
DATA = INSERT_COLUMNS.index("data")
GENERATED_PATHS = [stored.column.generated for stored in GENERATED_COLUMNS if stored.column.generated]


# Payloads: every accepted type, at any place


class Color(enum.Enum):
    RED = "red"
    RATE = Decimal("1.50")
    LIST = ("a", 1)


class Name(enum.StrEnum):
    KEY = "key"


class Level(enum.IntEnum):
    HIGH = 3


def decimal(sign: int, digits: int, exponent: int) -> Decimal:
    return Decimal((sign, tuple(map(int, str(digits))), exponent))


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(
    [r"\u0000", r"\ud800", '"', "\\", "\x01\x1f\x7f", "\u2028\ufeff", "\U0010ffff", "x" * 300, "é" * 70]
)
decimals = st.builds(
    decimal,
    st.integers(0, 1),
    st.integers(0, 10**40) | st.integers(0, 10**1000 - 1),
    st.integers(-40, 40) | st.integers(-1000, 1000),
)
offsets = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
times = st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31), timezones=offsets)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(1 - 10**1000, 10**1000 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | decimals
    | texts
    | times
    | st.dates()
    | st.uuids()
    | st.sampled_from([*Color, Name.KEY, Level.HIGH])
)
# None that is masked, which Hypothesis would otherwise find in our source: of those there are tests of their own.
keys = (texts | st.sampled_from(["a", "b", "c", "", " ", "a.b", Name.KEY])).filter(lambda key: not ENCODER.masks(key))
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)
# Of what the generated columns are made from there is a test of its own: it can be too long for them. Hypothesis knows
# these names from our source.
payloads = st.dictionaries(keys, values, max_size=4).filter(
    lambda payload: not {path[0] for path in GENERATED_PATHS} & set(map(str, payload))
)


def as_read(value: Any) -> Any:
    """Say by the rules of the documentation, not by our code, how ``value`` reads back."""
    match value:
        case enum.Enum():
            return as_read(value.value)
        case None | bool():
            return value
        case str():
            return str(value)
        case int():
            return int(value)
        case float():
            return number_as_read(Decimal(repr(value)))
        case Decimal():
            return number_as_read(value)
        case datetime():
            moment = value.astimezone(UTC).replace(tzinfo=None)
            precision = "microseconds" if moment.microsecond % 1000 else "milliseconds"
            return moment.isoformat(timespec=precision) + "Z"
        case dict():
            return {str(key): as_read(item) for key, item in value.items()}
        case list() | tuple():
            return [as_read(item) for item in value]
    return str(value)


def number_as_read(number: Decimal) -> int | float | Decimal:
    if "." not in f"{number:f}":
        return int(number)
    return float(number) if Decimal(repr(float(number))) == number else number


def identical(found: Any, expected: Any) -> bool:
    """Compare values and their types, at every depth."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return list(map(str, found)) == list(map(str, expected)) and all(
            identical(found[key], expected[key]) for key in expected
        )
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(identical, found, expected))
    return bool(found == expected)


def in_order(value: Any) -> Any:
    """Sort keys: jsonb keeps no order."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return [in_order(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def dsn(server: str) -> Iterator[str]:
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE properties TEMPLATE {TEMPLATE}".encode())
        yield make_conninfo(server, dbname="properties")
        admin.execute("DROP DATABASE properties WITH (FORCE)")


@pytest.fixture(scope="module", params=["blocking", "async"])
def vault(request: pytest.FixtureRequest, dsn: str) -> Iterator[Face]:
    opened: list[Face] = []
    with opener(request.param, opened) as open_vault:
        yield open_vault(
            connection_string=dsn, bootstrap={"ensure_schema": False}, mask_fields=FIELDS, max_event_bytes=2**24
        )
        opened[0].close_quietly()


batches = map(str, itertools.count())


def emitted(vault: Face, events: list[dict[str, Any]]) -> list[Any]:
    """Emit ``events`` in one transaction and read them in one page; return the records in their order."""
    batch = next(batches)
    receipts = vault.emit_many([{"event": "e", **event, "request_id": batch} for event in events])
    records = {record.id: record for record in vault.query.find_many(request_id=batch, limit=500)}
    return [records[receipt.id] for receipt in receipts]


@PURE
@given(st.dictionaries(keys | st.sampled_from(FIELDS), scalars | values, max_size=6))
def test_a_payload_becomes_the_same_text_whether_its_keys_are_known_or_not(payload: dict[str, Any]) -> None:
    encoder = Encoder(masked_names(FIELDS), "[REDACTED]", 2**24)
    first, second = encoder.encode(payload, "data"), encoder.encode(payload, "data")
    assert first == second == Walk(encoder).object_text(payload, 1)


@STORED
@given(st.lists(st.tuples(payloads, payloads), min_size=1, max_size=25))
def test_payloads_read_back_as_the_same_json(vault: Face, batch: list[tuple[Any, Any]]) -> None:
    before = deepcopy(batch)
    records = emitted(vault, [{"data": data, "meta": meta} for data, meta in batch])
    for record, (data, meta) in zip(records, batch, strict=True):
        assert identical(in_order(record.data), in_order(as_read(data)))
        assert identical(in_order(record.meta), in_order(as_read(meta)))
    assert identical(batch, before)


@STORED
@given(st.lists(payloads, min_size=1, max_size=25))
def test_jsonb_text_is_what_the_server_prints(dsn: str, batch: list[dict[str, Any]]) -> None:
    given_texts = [ENCODER.encode(payload, "data") for payload in batch]
    printed = rows(
        dsn, "SELECT t::jsonb::text FROM unnest(%s::text[]) WITH ORDINALITY AS x (t, n) ORDER BY n", given_texts
    )
    for text, (expected,) in zip(given_texts, printed, strict=True):
        assert jsonb_text(json.loads(text, parse_float=Decimal, parse_int=Decimal)) == expected


@STORED
@given(st.lists(values, min_size=1, max_size=25))
def test_generated_columns_are_what_the_check_expects(vault: Face, batch: list[Any]) -> None:
    """Whatever the value: refused here, or stored by the server as foreseen; never refused by the server."""
    events = []
    for value in batch:
        for data in ({"outcome": value}, {"severity": value}, {"error": {"code": value}}, {"error": value}):
            try:
                prepare("e", {"data": data}, SETTINGS)
            except ValidationError as error:
                assert "must have at most" in str(error)  # noqa: PT017
            else:
                events.append({"data": data})
    for record, event in zip(emitted(vault, events), events, strict=True):
        foreseen = unstored_record(prepare("e", event, SETTINGS))
        assert (record.outcome, record.error_code, record.severity) == (
            foreseen.outcome,
            foreseen.error_code,
            foreseen.severity,
        )


@PURE
@given(payloads)
def test_deep_text_is_decoded_like_any_other(payload: dict[str, Any]) -> None:
    text = ENCODER.encode(payload, "data")
    assert identical(_decode_deep(text), decode(text))


# One forbidden value, anywhere

FORBIDDEN: list[tuple[Any, str]] = [
    (float("nan"), ""),
    (float("-inf"), ""),
    (Decimal("NaN"), ""),
    (Decimal("1E+1001"), ""),
    (10**1000, ""),
    (b"x", ""),
    ({1}, ""),
    (object(), ""),
    (Ellipsis, ""),
    (datetime(2026, 1, 2), ""),
    ("a\0", ""),
    ("\ud800", ""),
    ({1: 1}, ".1"),
    ({"x": 1, "a\0": 1}, r".a\x00"),
    ({"\udc00": 1}, r".\udc00"),
]
plain_keys = st.from_regex(r"[A-Za-z][A-Za-z0-9_ .\-é✅]{0,10}", fullmatch=True).filter(
    lambda key: not ENCODER.masks(key)
)


@st.composite
def misplaced(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """Return a payload with one forbidden value in it, and the path of that."""
    value, path = draw(st.sampled_from(FORBIDDEN))
    for _ in range(draw(st.integers(0, 6))):
        value, step = draw(around(value))
        path = step + path
    key = draw(plain_keys)
    others = draw(st.dictionaries(plain_keys.filter(lambda other: other != key), values, max_size=2))
    return {**others, key: value}, f".{key}{path}"


@st.composite
def around(draw: st.DrawFn, value: Any) -> tuple[Any, str]:
    if draw(st.booleans()):
        key = draw(plain_keys)
        others = draw(st.dictionaries(plain_keys.filter(lambda other: other != key), scalars, max_size=2))
        return {**others, key: value}, f".{key}"
    first, last = draw(st.lists(scalars, max_size=2)), draw(st.lists(scalars, max_size=2))
    kind = draw(st.sampled_from([list, tuple]))
    return kind([*first, value, *last]), f"[{len(first)}]"


def paths_in(call: Callable[[], Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        call()
    assert caught.value.field == field
    assert f"`{field}`" in str(caught.value)


@PURE
@given(misplaced())
def test_a_forbidden_value_is_refused_with_its_path(case: tuple[dict[str, Any], str]) -> None:
    payload, path = case
    shown = repr(payload)
    paths_in(lambda: prepare("e", {"data": payload}, SETTINGS), f"data{path}")
    paths_in(lambda: prepare("e", {"meta": payload, "data": {}}, SETTINGS), f"meta{path}")
    paths_in(lambda: prepare_diff("e", {"before": payload}, SETTINGS), f"before{path}")
    paths_in(lambda: prepare_diff("e", {"after": payload, "before": {}}, SETTINGS), f"after{path}")
    assert repr(payload) == shown


@STORED
@given(st.lists(misplaced(), min_size=1, max_size=5), st.lists(payloads, max_size=3))
def test_nothing_is_written_with_a_forbidden_value(
    vault: Face, cases: list[tuple[dict[str, Any], str]], good: list[dict[str, Any]]
) -> None:
    batch = next(batches)
    for payload, path in cases:
        for field in ("data", "meta"):
            event = {"event": "e", "request_id": batch, field: payload}
            paths_in(lambda event=event: vault.emit(event), field + path)  # type: ignore[misc]
            events = [*({"event": "e", "request_id": batch, "data": data} for data in good), event]
            place = f"events[{len(good)}].{field}{path}"
            with pytest.raises(ValidationError) as caught:
                vault.emit_many(events)
            assert caught.value.field == place
    assert vault.query.count(request_id=batch) == 0


# Masking

MARK = "s3cr3t"
secrets = st.recursive(
    st.sampled_from([MARK, f"x{MARK}y", [MARK], {"k": MARK}, (MARK,)]),
    lambda inner: st.lists(inner, min_size=1, max_size=2) | st.dictionaries(plain_keys, inner, min_size=1, max_size=2),
    max_leaves=4,
)
# A forbidden value next to the secret, for the error messages.
bad_secrets = st.sampled_from([MARK + "\0", MARK + "\ud800", MARK.encode(), {MARK}, {(MARK,): 1}])


@st.composite
def spelled(draw: st.DrawFn) -> str:
    """Return the name of a masked field in some case."""
    name = draw(st.sampled_from(FIELDS))
    change = draw(st.sampled_from([str.upper, str.lower, str.title, str.swapcase, str.casefold, str.capitalize, None]))
    if change is not None:
        return change(name)
    uppers = draw(st.lists(st.booleans(), min_size=len(name), max_size=len(name)))
    return "".join(c.upper() if upper else c.lower() for c, upper in zip(name, uppers, strict=True))


@st.composite
def secretive(draw: st.DrawFn, inside: st.SearchStrategy[Any]) -> dict[str, Any]:
    """Return a payload with a secret below a masked key, at any depth."""
    value: Any = {**draw(st.dictionaries(plain_keys, scalars, max_size=2)), draw(spelled()): draw(inside)}
    for _ in range(draw(st.integers(0, 5))):
        value, _ = draw(around(value))
    return (
        {"top": value, **draw(st.dictionaries(plain_keys, scalars, max_size=2))}
        if not isinstance(value, dict)
        else value
    )


@PURE
@given(secretive(secrets))
def test_masked_values_leak_nowhere(payload: dict[str, Any]) -> None:
    before = deepcopy(payload)
    texts = [
        repr(prepare("e", {"data": payload, "meta": payload}, SETTINGS)),
        repr(prepare_diff("e", {"before": payload}, SETTINGS)),
        repr(prepare_diff("e", {"before": {"password": 1}, "after": payload}, SETTINGS)),
        repr(unstored_record(prepare("e", {"data": payload}, SETTINGS))),
        repr(mask(payload, FIELDS)),
    ]
    assert not any(MARK in text for text in texts)
    assert identical(payload, before)


@PURE
@given(secretive(bad_secrets))
def test_errors_leak_no_masked_value(payload: dict[str, Any]) -> None:
    for call, field in ((prepare, "data"), (prepare, "meta"), (prepare_diff, "before"), (prepare_diff, "after")):
        with pytest.raises(ValidationError) as caught:
            call("e", {field: payload}, SETTINGS)
        error = caught.value
        assert MARK not in f"{error!r} {error} {error.field}"
        assert error.__context__ is None
    assert MARK not in repr(mask(payload, FIELDS))


@PURE
@given(values)
def test_mask_changes_nothing_but_masked_values(value: Any) -> None:
    before = deepcopy(value)
    copy = mask(value, ["none of these"])
    assert identical(copy, value)
    assert mask(mask(value, FIELDS), FIELDS) == mask(value, FIELDS)
    assert identical(value, before)


# Differences


@st.composite
def versions(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two payloads that share some keys and some values."""
    before = draw(payloads)
    kept = {key: deepcopy(before[key]) for key in before if draw(st.booleans())}
    changed = {key: draw(values) for key in before if draw(st.booleans())}
    return before, {**kept, **changed, **draw(payloads)}


def applied(before: dict[str, Any], diff: dict[str, dict[str, Any]]) -> dict[str, Any]:
    after = {key: value for key, value in before.items() if key not in diff or "after" in diff[key]}
    return {**after, **{key: change["after"] for key, change in diff.items() if "after" in change}}


def json_equal(one: Any, other: Any) -> bool:
    """Compare what reads back: numbers by value, booleans apart."""
    one, other = as_read(one), as_read(other)
    return bool(jsonb_equal(one, other))


def jsonb_equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, (int, float, Decimal)) and isinstance(other, (int, float, Decimal)):
        return Decimal(str(one)) == Decimal(str(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(jsonb_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(jsonb_equal, one, other))
    return type(one) is type(other) and bool(one == other)


@PURE
@given(versions())
def test_a_diff_leads_from_before_to_after(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    before, after = pair
    copies = deepcopy(pair)
    diff = compute_diff(before, after)
    assert json_equal(applied(before, diff), after)
    assert identical(pair, copies)
    for key, change in diff.items():
        assert set(change) == {side for side, whole in (("before", before), ("after", after)) if key in whole}
        if len(change) == 2:
            assert not json_equal(change["before"], change["after"])


@PURE
@given(versions())
def test_a_diff_is_symmetric(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    before, after = pair
    swapped = {
        key: {"before" if side == "after" else "after": value for side, value in change.items()}
        for key, change in compute_diff(before, after).items()
    }
    assert swapped == compute_diff(after, before)


@PURE
@given(payloads)
def test_a_diff_with_itself_is_empty(payload: dict[str, Any]) -> None:
    assert compute_diff(payload, payload) == {}
    assert compute_diff(payload, deepcopy(payload)) == {}
    assert compute_diff(payload, as_read(payload)) == {}
    assert compute_diff(as_read(payload), payload) == {}


@STORED
@given(versions())
def test_emit_diff_stores_what_it_computed(vault: Face, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    before, after = pair
    copies = deepcopy(pair)
    receipt = vault.emit_diff("e", before=before, after=after)
    data = vault.query.find_by_id(receipt.id).data
    assert identical(pair, copies)
    assert jsonb_equal(data["before"], as_read(before))
    assert jsonb_equal(data["after"], as_read(after))
    assert jsonb_equal(data["diff"], as_read(compute_diff(before, after)))


# Events are not changed either


@PURE
@given(
    st.fixed_dictionaries(
        {
            "event": texts,
            "data": payloads,
            "meta": payloads,
            "actor": st.fixed_dictionaries({"id": texts, "type": texts}),
        },
        optional={
            "correlation_id": texts | st.none(),
            "occurred_at": times,
            "id": st.uuids() | st.uuids().map(str),
            "tenant_id": texts,
            "unknown": texts,
        },
    )
)
def test_any_event_is_prepared_or_refused_and_stays_as_it_is(event: dict[str, Any]) -> None:
    before = deepcopy(event)
    try:
        made = prepare(event, {}, SETTINGS)
    except ValidationError as error:
        assert f"`{error.field}" in str(error)  # noqa: PT017
    else:
        row = dict(zip(INSERT_COLUMNS, made.row, strict=True))
        assert row["event"] == event["event"]
        assert (row["actor_id"], row["actor_type"]) == (event["actor"]["id"], event["actor"]["type"])
        assert row["occurred_at"].tzinfo is UTC
        assert isinstance(row["id"], UUID)
    assert identical(event, before)
