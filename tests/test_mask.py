"""Masking: in `mask`, in what is stored, and in what errors say."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from copy import deepcopy
from enum import Enum
from types import MappingProxyType
from typing import Any, cast

import pytest

from tests.conftest import rows
from tests.faces import OpenVault
from tracevault import DEFAULT_MASK_VALUE, ValidationError, mask
from tracevault.events.mask import masked_names
from tracevault.events.payload import Encoder, decode
from tracevault.events.prepare import Settings, prepare, prepare_diff
from tracevault.events.record import INSERT_COLUMNS

DATA = INSERT_COLUMNS.index("data")
FIELDS = ["password", "Token", "straße", "ПАРОЛЬ", "pin"]
SETTINGS = Settings(Encoder(masked_names(FIELDS), "[REDACTED]", 262_144), None, "sync")
SECRET = "s3cr3t"  # not one of ours


class Wrapped(Enum):
    DICT = {"password": SECRET}  # noqa: RUF012


def stored(data: dict[str, Any]) -> Any:
    text = prepare("e", {"data": data}, SETTINGS).row[DATA]
    assert SECRET not in text
    return decode(text)


BOTH = pytest.mark.parametrize("masking", [stored, lambda data: mask(data, FIELDS)], ids=["emit", "mask"])


@BOTH
@pytest.mark.parametrize(
    "key",
    [
        "password",
        "PASSWORD",
        "pAssWoRd",
        "token",
        "TOKEN",
        "STRASSE",
        "strasse",
        "STRAẞE",
        "пароль",
        "Пароль",
        "PIN",
        "PİN",
        "pın",
    ],
)
def test_whatever_the_case(masking: Any, key: str) -> None:
    assert masking({key: SECRET, "other": 1}) == {key: "[REDACTED]", "other": 1}


@BOTH
@pytest.mark.parametrize("key", ["password_hash", "my password", "pass", "", "tokens", " token", "token ", "p.in"])
def test_keys_match_whole(masking: Any, key: str) -> None:
    assert masking({key: "x"}) == {key: "x"}


@BOTH
@pytest.mark.parametrize(
    "value", [None, True, 0, 1.5, "", SECRET, [SECRET], {"a": {SECRET: [SECRET]}}, ({"b": SECRET},), {"token": SECRET}]
)
def test_the_whole_value_is_replaced(masking: Any, value: Any) -> None:
    assert masking({"password": value}) == {"password": "[REDACTED]"}


@BOTH
def test_at_any_depth(masking: Any) -> None:
    given = {"a": [{"b": [[{"PIN": SECRET, "c": 1}]]}, ({"token": SECRET},)], "d": {"password": {}}}
    expected = {
        "a": [{"b": [[{"PIN": "[REDACTED]", "c": 1}]]}, [{"token": "[REDACTED]"}]],
        "d": {"password": "[REDACTED]"},
    }
    before = deepcopy(given)
    found = masking(given)
    assert given == before
    assert str(found).replace("(", "[").replace(",)", "]") == str(expected)


@BOTH
@pytest.mark.parametrize("kind", [OrderedDict, lambda value: defaultdict(list, value)])
def test_subclasses_of_dict(masking: Any, kind: Any) -> None:
    assert masking({"a": kind({"token": SECRET, "b": 1})}) == {"a": {"token": "[REDACTED]", "b": 1}}


def test_what_an_enum_holds() -> None:
    assert stored({"a": Wrapped.DICT}) == {"a": {"password": "[REDACTED]"}}


def test_mask_takes_mappings_of_any_kind() -> None:
    assert mask(MappingProxyType({"a": MappingProxyType({"pin": SECRET})}), FIELDS) == {"a": {"pin": "[REDACTED]"}}


def test_mask_keeps_tuples_and_other_objects() -> None:
    thing = object()
    assert mask(({"pin": 1}, thing, {1: 2}), FIELDS) == ({"pin": "[REDACTED]"}, thing, {1: 2})


def test_mask_copies_deeply() -> None:
    given: dict[str, Any] = {"a": [{"b": 1}], "pin": [1]}
    copy = mask(given, FIELDS)
    copy["a"][0]["b"] = 2
    assert given == {"a": [{"b": 1}], "pin": [1]}


def test_mask_of_a_cycle_is_the_same_cycle() -> None:
    given: dict[str, Any] = {"pin": 1, "list": []}
    given["self"] = given
    given["list"].append(given)
    copy = mask(given, FIELDS)
    assert copy is not given
    assert copy["self"] is copy
    assert copy["list"] == [copy]
    assert copy["pin"] == DEFAULT_MASK_VALUE


@pytest.mark.parametrize("pair", [lambda x: [x, x], lambda x: (x, x), lambda x: {"a": x, "b": x}])
def test_mask_of_shared_values_is_quick(pair: Any) -> None:
    value: Any = {"pin": 1}
    for _ in range(60):
        value = pair(value)
    copy = mask(value, FIELDS)
    for _ in range(60):
        copy = next(iter(copy.values())) if isinstance(copy, dict) else copy[-1]
    assert copy == {"pin": "[REDACTED]"}


def test_mask_value_is_free() -> None:
    assert mask({"pin": 1}, {"PIN"}, "***") == {"pin": "***"}
    assert mask({"pin": 1}, (), "***") == {"pin": 1}


def test_a_string_is_no_list_of_fields() -> None:
    with pytest.raises(ValidationError, match="`fields` must be a list") as caught:
        mask({"password": SECRET}, "password")
    assert caught.value.field == "fields"


# What stands below a masked key is checked like the rest, and no message shows it.


def cycle() -> dict[str, Any]:
    value: dict[str, Any] = {"text": SECRET}
    value["self"] = value
    return value


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (SECRET + "\0", ""),
        (SECRET + "\ud800", ""),
        ({"x": [1, SECRET + "\0"]}, ".x[1]"),
        ({"pin": {"y": SECRET + "\0"}}, ".pin.y"),
        (SECRET.encode(), ""),
        ({SECRET}, ""),
        ({(SECRET,): 1}, ".an instance of tuple"),
        ({20_26: 1}, ".an instance of int"),
        (float("nan"), ""),
        (10**1000, ""),
        (cycle(), ".self"),
        ([cycle()], "[0].self"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("root", ["data", "meta", "before", "after"])
def test_errors_below_a_masked_key_name_the_path_alone(root: str, value: Any, path: str) -> None:
    call = prepare if root in {"data", "meta"} else prepare_diff
    with pytest.raises(ValidationError) as caught:
        call("e", {root: {"a": [{"Password": value}]}}, SETTINGS)
    error = caught.value
    assert error.field == f"{root}.a[0].Password{path}"
    assert f"`{error.field}` " in str(error)
    for shown in (str(error), repr(error)):
        assert not any(word in shown for word in (SECRET, "2026", "nan", "1000000"))
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_masked_side_of_a_diff_is_masked_and_not_shown(side: str) -> None:
    settings = Settings(Encoder(masked_names([side]), "[REDACTED]", 262_144), None, "sync")
    text = prepare_diff("e", {side: {"a": SECRET}}, settings).row[DATA]
    assert SECRET not in text
    data = decode(text)
    assert data[side] == "[REDACTED]"
    assert data["diff"] == {"a": {side: "[REDACTED]"}}
    with pytest.raises(ValidationError) as caught:
        prepare_diff("e", {side: {"a": SECRET + "\0"}}, settings)
    assert caught.value.field == f"{side}.a"
    assert SECRET not in str(caught.value)


def test_a_masked_diff_is_masked() -> None:
    settings = Settings(Encoder(masked_names(["diff"]), "[REDACTED]", 262_144), None, "sync")
    data = decode(prepare_diff("e", {"after": {"a": 1}}, settings).row[DATA])
    assert data == {"before": {}, "after": {"a": 1}, "diff": "[REDACTED]"}


def test_a_changed_secret_shows_as_a_change_without_values() -> None:
    data = decode(prepare_diff("e", {"before": {"pin": SECRET}, "after": {"pin": SECRET + "2"}}, SETTINGS).row[DATA])
    assert data["diff"] == {"pin": "[REDACTED]"}
    unchanged = decode(prepare_diff("e", {"before": {"pin": SECRET}, "after": {"pin": SECRET}}, SETTINGS).row[DATA])
    assert unchanged["diff"] == {}


def test_what_is_masked_does_not_count_for_the_size() -> None:
    assert stored({"pin": [SECRET * 200_000]}) == {"pin": "[REDACTED]"}


def test_shared_values_below_masked_keys_are_quick() -> None:
    value: Any = [SECRET]
    for _ in range(90):
        value = [value, value]
    assert stored({"pin": value, "items": [{"token": value}] * 1000})["pin"] == "[REDACTED]"
    deep = value
    for _ in range(10):
        deep = [value, deep]
    with pytest.raises(ValidationError, match="nested deeper than 100 levels"):
        stored({"pin": value, "token": deep})


def test_no_secret_reaches_the_database(face: OpenVault, ready_dsn: str) -> None:
    vault = face(connection_string=ready_dsn, bootstrap={"ensure_schema": False}, mask_fields=FIELDS, mask_value="***")
    payload = {"a": [{"PASSWORD": SECRET}], "Pin": {"deep": SECRET}}
    same = deepcopy(payload)
    for mode in ("sync", "async"):
        vault.emit("e", data=payload, meta=payload, mode=mode)
        vault.emit_diff("e", before=payload, after={"pin": SECRET * 2}, mode=mode)
    vault.emit_many([{"event": "e", "data": payload}] * 10)
    vault.flush()
    assert payload == same
    found = rows(ready_dsn, "SELECT audit_logs::text FROM audit_logs")
    assert len(found) == 14
    assert SECRET not in str(found)
    assert all('"***"' in cast("str", row[0]).replace('""', '"') for row in found)
