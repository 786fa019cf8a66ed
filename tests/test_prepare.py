"""Events: every field and its rule, limits as the database has them, and what an error says."""

from __future__ import annotations

import enum
from copy import deepcopy
from dataclasses import FrozenInstanceError
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest

from tests.conftest import rows
from tests.faces import OpenVault
from tracevault import Actor, Target, ValidationError
from tracevault.events.mask import masked_names
from tracevault.events.payload import Encoder
from tracevault.events.prepare import DIFF_FIELDS, EVENT_FIELDS, Settings, prepare, prepare_diff, unstored_record
from tracevault.events.record import INSERT_COLUMNS, AuditRecord

ENCODER = Encoder(masked_names(["secret"]), "[REDACTED]", 262_144)
SETTINGS = Settings(ENCODER, "production", "sync")
ID = UUID("018f4e5c-7a1b-7c3d-9e2f-1a2b3c4d5e6f")
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


class Name(enum.StrEnum):
    EVENT = "user.created"
    ASYNC = "async"


class Admin(Actor):
    """A caller's own kind of actor."""


class Holder(enum.Enum):
    ERROR = {"code": "x" * 300}  # noqa: RUF012
    LONG = "x" * 65
    SHORT = (1,)


def row(event: Any = "e", settings: Settings = SETTINGS, /, **fields: Any) -> dict[str, Any]:
    return dict(zip(INSERT_COLUMNS, prepare(event, fields, settings).row, strict=True))


def refused(*args: Any, **fields: Any) -> ValidationError:
    same = repr((args, fields))
    with pytest.raises(ValidationError) as caught:
        prepare(args[0] if args else "e", fields, SETTINGS)
    error = caught.value
    assert f"`{error.field}" in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert repr((args, fields)) == same
    return error


# Accepted


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({}, {"environment": "production", "mode": "sync", "data": None, "meta": None, "actor_id": None}),
        ({"actor": {"id": "u", "type": "t"}}, {"actor_id": "u", "actor_type": "t", "target_id": None}),
        ({"actor": Actor("u", "t"), "target": Target("x", "y")}, {"actor_type": "t", "target_id": "x"}),
        ({"actor": Admin("u", "t")}, {"actor_id": "u", "actor_type": "t"}),
        ({"actor": MappingProxyType({"id": "u", "type": "t", "name": "ignored"})}, {"actor_id": "u"}),
        ({"actor": {"id": "x" * 512, "type": " t "}}, {"actor_id": "x" * 512, "actor_type": " t "}),
        ({"correlation_id": " ", "request_id": "r" * 512}, {"correlation_id": " ", "request_id": "r" * 512}),
        ({"environment": "e" * 128}, {"environment": "e" * 128}),
        ({"environment": None}, {"environment": "production"}),
        ({"tenant_id": "t" * 255}, {"tenant_id": "t" * 255}),
        ({"trace_id": "a" * 32, "span_id": "0" * 15 + "1"}, {"trace_id": "a" * 32, "span_id": "0" * 15 + "1"}),
        ({"id": str(ID).upper()}, {"id": ID}),
        ({"id": ID}, {"id": ID}),
        ({"occurred_at": NOON.astimezone(timezone(timedelta(hours=3)))}, {"occurred_at": NOON}),
        ({"occurred_at": date(2026, 1, 2)}, {"occurred_at": NOON.replace(hour=0)}),
        ({"occurred_at": "2026-01-02T13:00:00+01:00"}, {"occurred_at": NOON}),
        ({"mode": "async"}, {"mode": "async"}),
        ({"mode": Name.ASYNC}, {"mode": "async"}),
        ({"data": {}, "meta": {}}, {"data": "{}", "meta": "{}"}),
        ({"data": {"secret": 1}, "meta": {"a": [{"Secret": 1}]}}, {"data": '{"secret": "[REDACTED]"}'}),
        (dict.fromkeys(sorted(EVENT_FIELDS)), {"data": None, "trace_id": None}),
    ],
    ids=str,
)
def test_accepted(fields: dict[str, Any], columns: dict[str, Any]) -> None:
    fields = {name: value for name, value in fields.items() if name != "event"}
    found = row(**fields)
    assert {name: found[name] for name in columns} == columns
    assert found == {**row({"event": "e", **fields}), **{name: found[name] for name in ("id", "occurred_at")}}
    assert all(type(value) is str for value in found.values() if isinstance(value, str))


def test_time_and_id_are_made() -> None:
    before = datetime.now(UTC)
    made = prepare("e", {}, SETTINGS)
    assert before <= row()["occurred_at"] <= datetime.now(UTC)
    assert made.id.version == 7
    assert made.row[0] == made.id
    assert not made.given_id
    assert not made.given_time


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        ("a.b", {}),
        (None, {"event": "a.b"}),
        ("a.b", {"event": None}),
        ({"event": "a.b"}, {}),
        ({"event": None}, {"event": "a.b"}),
        ({"event": "a.b"}, {"event": None, "data": None}),
        (MappingProxyType({"event": "a.b"}), {"meta": {}}),
        ({}, {"event": "a.b"}),
    ],
    ids=str,
)
def test_ways_to_name_the_event(event: Any, fields: dict[str, Any]) -> None:
    assert row(event, **fields)["event"] == "a.b"


@pytest.mark.parametrize("name", ["e", "x" * 255, "✅" * 255, " a ", "a b", Name.EVENT])
def test_event_names(name: str) -> None:
    assert row(name)["event"] == str(name)


def test_none_means_not_given_wherever_the_field_stands() -> None:
    found = row({"event": "e", "data": None, "meta": {"a": 1}}, data={"b": 1}, meta=None)
    assert found["data"] == '{"b": 1}'
    assert found["meta"] == '{"a": 1}'


# Refused


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"actor": "u"}, "actor", 'must be {"id": ..., "type": ...} or Actor(id, type), got \'u\''),
        ({"actor": ["u", "t"]}, "actor", "an instance of list"),
        ({"actor": Target("u", "t")}, "actor", "an instance of Target"),
        ({"target": 7}, "target", "got 7"),
        ({"target": True}, "target", "got True"),
        ({"actor": {}}, "actor.id", "must be a string, got None"),
        ({"actor": {"id": "u"}}, "actor.type", "must be a string, got None"),
        ({"actor": {"id": 7, "type": "t"}}, "actor.id", "must be a string, got 7"),
        ({"actor": {"id": True, "type": "t"}}, "actor.id", "must be a string, got True"),
        ({"actor": {"id": "", "type": "t"}}, "actor.id", "must not be empty"),
        ({"actor": {"id": "\ufeff ", "type": "t"}}, "actor.id", "must not be blank"),
        ({"actor": {"id": "x" * 513, "type": "t"}}, "actor.id", "1 to 512 characters, got 513: 'xxx"),
        ({"target": {"id": "u", "type": "t" * 513}}, "target.type", "1 to 512 characters"),
        ({"target": {"id": "u\0", "type": "t"}}, "target.id", "U+0000"),
        ({"target": {"id": "u", "type": "\ud800"}}, "target.type", "surrogate"),
        ({"correlation_id": ""}, "correlation_id", "must not be empty; leave it out, or pass None"),
        ({"correlation_id": "x" * 513}, "correlation_id", "1 to 512 characters"),
        ({"correlation_id": 5}, "correlation_id", "must be a string, got 5"),
        ({"correlation_id": ID}, "correlation_id", "must be a string, got an instance of UUID"),
        ({"request_id": "x" * 513}, "request_id", "1 to 512 characters"),
        ({"request_id": "a\0"}, "request_id", "U+0000"),
        ({"environment": ""}, "environment", "must not be empty"),
        ({"environment": "x" * 129}, "environment", "1 to 128 characters"),
        ({"tenant_id": ""}, "tenant_id", "must not be empty"),
        ({"tenant_id": "x" * 256}, "tenant_id", "1 to 255 characters"),
        ({"tenant_id": True}, "tenant_id", "got True"),
        ({"trace_id": "A" * 32}, "trace_id", "32 lower-case hex digits"),
        ({"trace_id": "0" * 32}, "trace_id", "not all zero"),
        ({"trace_id": "a" * 31}, "trace_id", "32 lower-case hex digits"),
        ({"span_id": "a" * 32}, "span_id", "16 lower-case hex digits"),
        ({"id": "1"}, "id", "must be a UUID such as"),
        ({"id": 1}, "id", "must be a UUID"),
        ({"id": ID.hex}, "id", "must be a UUID"),
        ({"occurred_at": datetime(2026, 1, 2)}, "occurred_at", "naive datetime"),
        ({"occurred_at": "2026-01-02T00:00:00"}, "occurred_at", "append Z"),
        ({"occurred_at": 0}, "occurred_at", "got 0"),
        ({"mode": "both"}, "mode", 'must be "sync" or "async", got \'both\''),
        ({"mode": True}, "mode", "got True"),
        ({"mode": ""}, "mode", "got ''"),
        ({"data": [1]}, "data", "must be a dict with string keys"),
        ({"meta": "x"}, "meta", "must be a dict with string keys"),
        ({"data": {"items": [0, 1, 2, {"price": b""}]}}, "data.items[3].price", "an instance of bytes"),
        ({"meta": {"a": {"b": float("nan")}}}, "meta.a.b", "(got nan)"),
        ({"before": {}}, "before", "is not a field of an event"),
        ({"actor_id": "u"}, "actor_id", "did you mean `actor`?"),
        ({"occured_at": None}, "occured_at", "did you mean `occurred_at`?"),
        ({"correlationId": "c"}, "correlationId", "did you mean `correlation_id`?"),
        ({"outcome": "failure"}, "outcome", "is not a field of an event"),
        ({"zzz": 1}, "zzz", "known are actor, correlation_id, data,"),
        ({"a\nb": 1}, r"a\nb", "is not a field"),
        ({"x" * 1000: 1}, "x" * 63 + "…", "is not a field"),
        ({"event": "other"}, "event", "given twice"),
    ],
    ids=ascii,
)
def test_refused(fields: dict[str, Any], field: str, words: str) -> None:
    error = refused("e", **fields)
    assert error.field == field
    assert words in str(error)
    if "event" not in fields:
        assert str(refused({"event": "e", **fields})) == str(error)


@pytest.mark.parametrize("event", ["", " ", "\ufeff", "a\nb", "a\rb", "a\tb", "a\0b", "x" * 256, "\ud800"], ids=ascii)
def test_names_that_are_refused(event: str) -> None:
    assert refused(event).field == "event"
    assert refused({"event": event}).field == "event"


@pytest.mark.parametrize(
    "event",
    [42, True, 1.5, b"e", ["e"], ("e",), object(), NOON, Actor("a", "b")],
    ids=lambda event: type(event).__name__,
)
def test_what_is_neither_name_nor_mapping(event: Any) -> None:
    error = refused(event)
    assert error.field == "event"
    assert "must be a string" in str(error)


@pytest.mark.parametrize("event", [None, {}, {"event": None}], ids=str)
def test_an_event_needs_a_name(event: Any) -> None:
    assert str(refused(event)) == "`event` must be a string, got None"


@pytest.mark.parametrize(
    ("event", "fields", "field"),
    [
        ({"event": "e"}, {"event": "e"}, "event"),
        ("e", {"event": "e"}, "event"),
        ({"event": "e", "data": {}}, {"data": {}}, "data"),
        ({"event": "e", "mode": "sync"}, {"mode": "async"}, "mode"),
    ],
)
def test_given_twice(event: Any, fields: dict[str, Any], field: str) -> None:
    error = refused(event, **fields)
    assert error.field == field
    assert "given twice" in str(error)


@pytest.mark.parametrize("key", [1, None, ("data",), b"data", 10**5000], ids=lambda key: type(key).__name__)
def test_keys_of_a_mapping_that_are_no_names(key: Any) -> None:
    with pytest.raises(ValidationError, match="is not a field of an event"):
        prepare({"event": "e", key: 1}, {}, SETTINGS)


def test_a_forced_mode() -> None:
    assert prepare("e", {}, Settings(ENCODER, None, "async"), mode="sync").mode == "sync"
    assert prepare("e", {"mode": "sync"}, SETTINGS, mode="sync").mode == "sync"
    with pytest.raises(ValidationError, match='`mode` cannot be "async" here: this call is always sync') as caught:
        prepare("e", {"mode": "async"}, SETTINGS, mode="sync")
    assert caught.value.field == "mode"


def test_fields_of_both_calls() -> None:
    common = {
        "event", "actor", "target", "subject", "meta", "correlation_id", "request_id", "environment", "tenant_id",
        "trace_id", "span_id", "id", "occurred_at", "mode",
    }  # fmt: skip
    assert common | {"data"} == EVENT_FIELDS
    assert common | {"before", "after"} == DIFF_FIELDS


@pytest.mark.parametrize("call", [prepare, prepare_diff])
def test_the_callers_objects_are_not_changed(call: Any) -> None:
    payload: dict[str, Any] = {"secret": {"a": 1}, "list": [{"Secret": 1}, (NOON, Decimal("1.0"))], "outcome": " x "}
    actor = {"id": "u", "type": "t", "extra": [1]}
    fields = {"actor": actor, "meta": payload, **({"data": payload} if call is prepare else {"before": payload})}
    event = {"event": "e", **fields}
    before = deepcopy((event, fields))
    call("e", fields, SETTINGS)
    call(event, {}, SETTINGS)
    call(event, {"request_id": "r", "data": None} if call is prepare else {"after": None}, SETTINGS)
    assert (event, fields) == before
    assert str((event, fields)) == str(before)


# Limits


@pytest.mark.parametrize(
    ("id_", "type_", "fits"),
    [
        ("€" * 512, "€" * 321, True),  # 3 bytes each: 2,499
        ("€" * 512, "€" * 321 + "x", True),
        ("€" * 512, "€" * 321 + "xx", False),
        ("😀" * 512, "x" * 452, True),
        ("😀" * 512, "x" * 453, False),
        ("é" * 512, "é" * 512, True),
        ("x" * 512, "x" * 512, True),
    ],
)
@pytest.mark.parametrize("field", ["actor", "target"])
def test_identities_fit_an_index_entry(field: str, id_: str, type_: str, fits: bool) -> None:
    value = {"id": id_, "type": type_}
    if fits:
        row(**{field: value})
        return
    error = refused(**{field: value})
    assert error.field == field
    assert "2,500 bytes" in str(error)


def test_the_largest_fields_are_stored(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    # Random-looking text, so that PostgreSQL cannot compress the index entry into the limit.
    code = [chr(0x10000 + (number * 7919 + number**3) % 0xFFFF) for number in range(2000)]
    fields: dict[str, Any] = {
        "actor": {"id": "".join(code[:512]), "type": "".join(code[512:625])},
        "target": {"id": "".join(code[113:625]), "type": "".join(code[:113])},
        "correlation_id": "".join(code[300:812]),
        "request_id": "".join(code[400:912]),
        "environment": "".join(code[:128]),
        "tenant_id": "".join(code[:255]),
        "trace_id": "f" * 32,
        "span_id": "f" * 16,
        "data": {
            "outcome": "".join(code[:64]),
            "severity": "".join(code[:32]),
            "error": {"code": "".join(code[:255])},
        },
    }
    name = "".join(code[:255])
    record = vault.query.find_by_id(vault.emit({"event": name, **fields}).id)
    assert record.event == name
    assert (record.actor, record.target) == (Actor(**fields["actor"]), Target(**fields["target"]))
    assert {key: getattr(record, key) for key in fields if isinstance(fields[key], str)} == {
        key: value for key, value in fields.items() if isinstance(value, str)
    }
    assert record.error_code == fields["data"]["error"]["code"]


@pytest.mark.parametrize("payload", ["data", "meta"])
@pytest.mark.parametrize(("character", "size"), [("x", 1), ("é", 2), ("€", 3), ("😀", 4), ("\x01", 6), ('"', 2)])
def test_max_event_bytes_counts_utf8(payload: str, character: str, size: int) -> None:
    settings = Settings(Encoder(frozenset(), "", 1000), None, "sync")
    room = 1000 - len('{"k": ""}')
    fits = character * (room // size) + "x" * (room % size)
    assert len(row("e", settings, **{payload: {"k": fits}})[payload].encode()) == 1000
    with pytest.raises(ValidationError, match=r"max_event_bytes") as caught:
        row("e", settings, **{payload: {"k": fits + "x"}})
    assert caught.value.field in {payload, payload + ".k"}


def test_max_event_bytes_counts_both_payloads() -> None:
    settings = Settings(Encoder(frozenset(), "", 1000), None, "sync")
    half = {"k": "x" * (500 - 9)}
    row("e", settings, data=half, meta=half)
    with pytest.raises(ValidationError, match="take 1,001 bytes as JSON, `max_event_bytes` allows 1,000") as caught:
        row("e", settings, data=half, meta={"k": "x" * (501 - 9)})
    assert caught.value.field == "meta"
    with pytest.raises(ValidationError, match="store large content elsewhere"):
        row("e", settings, data={"k": "x" * (501 - 9)}, meta=half)


def test_max_event_bytes_of_a_vault(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False}, max_event_bytes=100)
    vault.emit("e", data={"k": "x" * 91})
    with pytest.raises(ValidationError, match="max_event_bytes"):
        vault.emit("e", data={"k": "x" * 92})
    assert vault.query.count() == 1


# Generated columns: checked as PostgreSQL will make them, after masking, as jsonb text


TEXTS: list[tuple[Any, str | None]] = [
    ("failure", "failure"),
    (" failure ", "failure"),
    ("\tfailure\u00a0", "\tfailure\u00a0"),
    ("", None),
    ("   ", None),
    (None, None),
    (True, "true"),
    (1, "1"),
    (1.0, "1.0"),
    (1.50, "1.5"),
    (-0.0, "0.0"),
    (Decimal("1.50"), "1.50"),
    (Decimal("0E+3"), "0"),
    (1e22, "1" + "0" * 22),
    (10**31, "1" + "0" * 31),
    (Decimal("1E-5"), "0.00001"),
    ([], "[]"),
    ({"b": 1, "aa": 2, "a": "é\n"}, '{"a": "é\\n", "b": 1, "aa": 2}'),
    ({"secret": "x" * 100}, '{"secret": "[REDACTED]"}'),
    (NOON, "2026-01-02T12:00:00.000Z"),
    (Name.ASYNC, "async"),
    (Holder.SHORT, "[1]"),
]


def test_generated_columns_hold_jsonb_text(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False}, mask_fields=["secret"])
    payloads = [{"outcome": value, "severity": value, "error": {"code": value}} for value, _ in TEXTS]
    receipts = vault.emit_many({"event": "e", "data": data} for data in payloads)
    for receipt, data, (_, text) in zip(receipts, payloads, TEXTS, strict=True):
        stored = vault.query.find_by_id(receipt.id)
        expected = unstored_record(prepare("e", {"data": data}, SETTINGS))
        for record in (stored, expected):
            assert (record.outcome, record.severity, record.error_code) == (text, text, text)


PATHS = [("outcome", "outcome", 64), ("error.code", "error_code", 255), ("severity", "severity", 32)]


def at(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value  # type: ignore[no-any-return]


def test_generated_columns_have_limits(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    for path, column, limit in PATHS:
        receipts = vault.emit_many({"event": "e", "data": at(path, value)} for value in fitting(limit))
        for receipt, value in zip(receipts, fitting(limit), strict=True):
            length = len(getattr(vault.query.find_by_id(receipt.id), column))
            assert limit - 5 <= length <= limit, value
        for value in exceeding(limit):
            with pytest.raises(ValidationError, match=f"must have at most {limit} characters") as caught:
                vault.emit("e", data=at(path, value))
            assert caught.value.field == f"data.{path}"
            assert f"column `{column}`" in str(caught.value)
            assert len(str(caught.value)) < 250
    assert vault.query.count() == sum(len(fitting(limit)) for _, _, limit in PATHS)


def fitting(limit: int) -> list[Any]:
    return [
        "x" * limit,
        "😀" * limit,
        " " * 40 + "x" * limit + " " * 40,
        10 ** (limit - 1),
        -(10 ** (limit - 2)),
        Decimal(1).scaleb(limit - 1),
        Decimal(1).scaleb(-(limit - 2)),
        ["x" * (limit - 4)],
        {"": "x" * (limit - 8)},
        ["é" * (limit - 4)],
        ["\x01" * ((limit - 4) // 6)],
    ]


def exceeding(limit: int) -> list[Any]:
    return [
        "x" * (limit + 1),
        "😀" * (limit + 1),
        " " * 40 + "x" * (limit + 1) + " " * 40,
        "x" * limit + "\t",
        10**limit,
        -(10 ** (limit - 1)),
        Decimal(1).scaleb(limit),
        Decimal(1).scaleb(-(limit - 1)),
        float(f"1e{limit}"),
        ["x" * (limit - 3)],
        {"": "x" * (limit - 7)},
        ["\x01" * ((limit - 4) // 6 + 1)],
        [NOON] * (limit // 20 + 1),
    ]


@pytest.mark.parametrize(
    ("data", "field"), [({"error": Holder.ERROR}, "data.error.code"), ({"outcome": Holder.LONG}, "data.outcome")]
)
def test_generated_columns_of_what_enums_hold(data: dict[str, Any], field: str) -> None:
    assert refused("e", data=data).field == field


@pytest.mark.parametrize(
    "data",
    [
        {"error": "boom"},
        {"error": ["x" * 300]},
        {"error": {"Code": "x" * 300}},
        {"error": None},
        {"Outcome": "x" * 300},
        {"a": {"outcome": "x" * 300}},
        {"error": [{"code": "x" * 300}]},
    ],
    ids=lambda data: str(data)[:20],
)
def test_other_values_are_not_limited(data: dict[str, Any]) -> None:
    row(data=data)


def test_generated_columns_are_made_after_masking(face: OpenVault, ready_dsn: str) -> None:
    for masked, columns in {
        "Outcome": ("[REDACTED]", "s", "c"),
        "severity": ("o", "[REDACTED]", "c"),
        "CODE": ("o", "s", "[REDACTED]"),
        "error": ("o", "s", None),
    }.items():
        vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False}, mask_fields=[masked])
        for code in ("c", "c" * 500) if columns[2] != "c" else ("c",):
            data = {"outcome": "o", "severity": "s", "error": {"code": code}}
            record = vault.query.find_by_id(vault.emit("e", data=data).id)
            assert (record.outcome, record.severity, record.error_code) == columns


def test_a_mask_value_may_be_too_long_for_a_column() -> None:
    settings = Settings(Encoder(masked_names(["severity"]), "*" * 33, 262_144), None, "sync")
    with pytest.raises(ValidationError) as caught:
        row("e", settings, data={"severity": "s3cr3t"})
    assert caught.value.field == "data.severity"
    assert "s3cr3t" not in str(caught.value)


# The record that was not stored


def test_unstored_record() -> None:
    made = prepare(
        "e",
        {
            "actor": Actor("u", "t"),
            "data": {
                "outcome": Decimal("1.50"),
                "severity": " info ",
                "n": 1.5,
                "secret": 1,
                "error": {"code": 10**40},
            },
            "meta": {"t": NOON},
            "mode": "async",
        },
        SETTINGS,
    )
    record = unstored_record(made)
    assert isinstance(record, AuditRecord)
    assert record.id == made.id
    assert record.actor == Actor("u", "t")
    assert record.target is None
    assert record.data == {
        "outcome": 1.5,
        "severity": " info ",
        "n": 1.5,
        "secret": "[REDACTED]",
        "error": {"code": 10**40},
    }
    assert record.meta == {"t": "2026-01-02T12:00:00.000Z"}
    assert (record.outcome, record.severity, record.error_code) == ("1.50", "info", "1" + "0" * 40)
    assert record.created_at is None
    with pytest.raises(FrozenInstanceError):
        record.event = "other"  # type: ignore[misc]


def test_nothing_is_written_for_what_is_refused(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False})
    for fields in ({"actor": "u"}, {"mode": "both"}, {"zzz": 1}, {"occurred_at": 1}, {"data": {"outcome": "x" * 65}}):
        for mode in ("sync", "async"):
            with pytest.raises(ValidationError):
                vault.emit("e", **{"mode": mode, **fields})
        with pytest.raises(ValidationError, match=r"^events\[1\]: ") as caught:
            vault.emit_many([{"event": "e"}, {"event": "e", **fields}])
        assert str(caught.value.field).startswith("events[1].")
    vault.flush()
    assert rows(ready_dsn, "SELECT count(*) FROM audit_logs") == [(0,)]
