"""Encrypted fields: no plaintext is kept anywhere, who holds the key reads it, and without the key it is gone."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import rows
from tests.faces import Face, OpenVault
from tests.test_background import REFUSE_BAD, down
from tracevault import (
    AuditRecord,
    ConfigError,
    DirectoryKeyStore,
    DuplicateIdError,
    KeyStore,
    KeyStoreError,
    Target,
    UndeliveredError,
    ValidationError,
    compute_diff,
    start_tracevault,
)
from tracevault.events import data_key
from tracevault.events.data_key import DataKey, KeyCache, is_envelope, place_of, subject_of
from tracevault.events.encrypt import Decryption, Encryption
from tracevault.events.payload import Encoder
from tracevault.events.prepare import Settings, prepare, prepare_diff, unstored_record
from tracevault.sealing.key_store import FunctionKeyStore

ANA = {"id": "42", "type": "user"}
EMAIL = "ana@example.org"
FIELDS = ["data.email", "data.address.street", "data.people.*.name", "data.tags.*", "meta.ip"]

OpenEncrypted = Callable[..., Face]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def open_vault(face: OpenVault, ready_dsn: str, keys: Path) -> OpenEncrypted:
    """A function that opens a vault that encrypts, with other options on top."""

    def opened(**options: Any) -> Face:
        defaults: dict[str, Any] = {
            "connection_string": ready_dsn,
            "bootstrap": {"ensure_schema": False},
            "encrypt_fields": FIELDS,
            "key_store": keys,
        }
        return face(**{**defaults, **options})

    return opened


def stored(dsn: str, where: str = "true") -> list[str]:
    """What stands in the table: everything of each row, as text."""
    return [row for (row,) in rows(dsn, f"SELECT audit_logs::text FROM audit_logs WHERE {where} ORDER BY id")]


def payload(dsn: str, column: str = "data") -> Any:
    ((text,),) = rows(dsn, f"SELECT {column}::text FROM audit_logs")
    return json.loads(text)


def is_enclosed(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"$enc"}


def test_values_are_stored_encrypted_and_read_back(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    vault = open_vault()
    data = {
        "email": EMAIL,
        "plan": "gold",
        "address": {"street": "Elm Street 1", "city": "Graz"},
        "people": [{"name": "Bo Li", "role": "boss"}, {"name": "Cy Ng"}],
        "tags": ["red-one", "red-two"],
    }
    receipt = vault.emit("user.created", target=ANA, data=data, meta={"ip": "203.0.113.7", "agent": "x"})

    (row,) = stored(ready_dsn)
    for secret in (EMAIL, "Elm Street", "Bo Li", "Cy Ng", "red-one", "203.0.113.7"):
        assert secret not in row
    found = payload(ready_dsn)
    assert is_enclosed(found["email"])
    assert found["plan"] == "gold"
    assert found["address"]["city"] == "Graz"
    assert [is_enclosed(person["name"]) for person in found["people"]] == [True, True]
    assert found["people"][0]["role"] == "boss"
    assert list(map(is_enclosed, found["tags"])) == [True, True]

    for record in (vault.query.find_by_id(receipt.id), vault.query.find_many()[0]):
        assert record.data == data
        assert record.meta == {"ip": "203.0.113.7", "agent": "x"}


def test_the_envelope_is_plain_aes_256_gcm(open_vault: OpenEncrypted, ready_dsn: str, keys: Path) -> None:
    """Anybody with the key can open it by any implementation: the format is a promise."""
    import base64
    import hashlib

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    receipt = open_vault().emit("user.created", target=ANA, data={"people": [{"name": "Bo"}]})
    envelope = payload(ready_dsn)["people"][0]["name"]["$enc"]
    assert envelope.keys() == {"key", "hash", "nonce", "ciphertext"}
    (file,) = keys.glob("*.key")
    about = json.loads(file.read_text())
    key = base64.b64decode(about["key"])
    assert (about["subject"], about["id"]) == ("user/42", envelope["key"])
    assert file.stem == hashlib.sha256(b"user/42").hexdigest()[:32]
    assert envelope["hash"] == hashlib.sha256(key).hexdigest()
    associated = b"tracevault/enc/v1\n" + receipt.id.bytes + b'["data","people",0,"name"]'
    nonce = base64.b64decode(envelope["nonce"])
    assert len(nonce) == 12
    assert AESGCM(key).decrypt(nonce, base64.b64decode(envelope["ciphertext"]), associated) == b'"Bo"'


class Colour(Enum):
    RED = "red"


EXACT_VALUES = [
    0,
    -7,
    2**70,
    10**999,
    0.1,
    1e300,
    -0.0,
    Decimal("1.10"),
    Decimal("1E+2"),
    Decimal("1e-400"),
    Decimal(2**80) / 3,
    True,
    False,
    "",
    'quote " and \\ and \u2028 é 😀',
    datetime(2026, 1, 2, 3, 4, 5, 600, tzinfo=UTC),
    date(2026, 1, 2),
    UUID(int=5),
    Colour.RED,
    [],
    {},
    [1, [2.5, {"b": None, "a": Decimal("3.0")}], "x"],
    {"aa": 1, "b": {"c": [True, None]}, "nested": "deep"},
]


@pytest.mark.parametrize("value", EXACT_VALUES, ids=lambda value: repr(value)[:30])
def test_every_value_reads_back_as_without_encryption(ready_dsn: str, keys: Path, face: OpenVault, value: Any) -> None:
    vault = face(connection_string=ready_dsn, encrypt_fields=["data.hidden"], key_store=keys)
    receipt = vault.emit("e", target=ANA, data={"hidden": value, "plain": value})
    record = vault.query.find_by_id(receipt.id)
    assert is_enclosed(payload(ready_dsn)["hidden"])
    assert record.data["hidden"] == record.data["plain"]
    assert repr(record.data["hidden"]) == repr(record.data["plain"])


def test_none_and_missing_values_stay(open_vault: OpenEncrypted, ready_dsn: str, keys: Path) -> None:
    vault = open_vault()
    data: dict[str, Any] = {
        "email": None,
        "address": "none on file",
        "people": [None, 3, {"name": None}, []],
        "tags": [None],
    }
    vault.emit("user.created", data=data)
    assert payload(ready_dsn) == data
    assert not list(keys.glob("*.key"))


def test_masked_stays_masked(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    vault = open_vault(mask_fields=["email", "pin", "key", "hash"], encrypt_fields=["data.email", "data.card"])
    receipt = vault.emit("e", target=ANA, data={"email": EMAIL, "card": {"pin": "1234", "name": "Ana"}, "key": 1})
    found = payload(ready_dsn)
    assert found["email"] == found["key"] == "[REDACTED]"
    # The mask does not look into envelopes, which have keys of these names too.
    assert is_enclosed(found["card"])
    assert vault.query.find_by_id(receipt.id).data["card"] == {"pin": "[REDACTED]", "name": "Ana"}


@pytest.mark.parametrize(
    "data",
    [
        {"Email": EMAIL},
        {"address": {"STREET": EMAIL}},
        {"address.street": EMAIL},
        {"address": [{"street": EMAIL}, [{"street": EMAIL}]]},
        {"people": {"boss": {"name": EMAIL}}},
        {"people": [[{"name": EMAIL}]]},
        {"tags": [[EMAIL]]},
        {"tags": {"one": EMAIL}},
        {"tags": [{"any": EMAIL}]},
    ],
    ids=repr,
)
def test_a_path_finds_its_value_however_it_is_written(
    open_vault: OpenEncrypted, ready_dsn: str, data: dict[str, Any]
) -> None:
    vault = open_vault()
    receipt = vault.emit("e", target=ANA, data=data)
    assert EMAIL not in stored(ready_dsn)[0]
    assert vault.query.find_by_id(receipt.id).data == data


def test_the_number_of_an_item_may_stand_in_a_path(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    open_vault(encrypt_fields=["data.emails.0"]).emit("e", target=ANA, data={"emails": [EMAIL, "public"]})
    assert payload(ready_dsn)["emails"][1] == "public"
    assert EMAIL not in stored(ready_dsn)[0]


def test_lists_in_lists_do_not_multiply_the_paths(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    value: Any = 1
    for _ in range(99):
        value = [value]
    vault = open_vault(encrypt_fields=["data." + "*." * 20 + "secret"])  # else as many steps as there are subsets
    vault.emit("e", data={"a": value})
    assert payload(ready_dsn) == {"a": value}
    with pytest.raises(ValidationError, match="nested deeper than 100"):
        vault.emit("e", data={"a": [value]})


# ------------------------------------------------------------------------------------------ emit_diff

BEFORE = {"email": "old@example.org", "plan": "gold", "address": {"street": "Elm Street 1", "city": "Graz"}}
AFTER = {"email": "new@example.org", "plan": "gold", "address": {"street": "Oak Street 2", "city": "Graz"}}
SECRETS = ("old@example.org", "new@example.org", "Elm Street", "Oak Street")


@pytest.mark.parametrize(
    "fields",
    [
        ["data.email", "data.address.street"],
        ["data.email", "data.address"],
        ["data.before.email", "data.after.address.street"],
        ["data.*.email", "data.*.address.street"],
        ["data.*.email", "data.address.*"],
        ["data.before"],
        ["data.after", "data.email"],
    ],
    ids=repr,
)
def test_emit_diff_leaves_no_plaintext(open_vault: OpenEncrypted, ready_dsn: str, fields: list[str]) -> None:
    vault = open_vault(encrypt_fields=fields)
    receipt = vault.emit_diff("user.changed", target=ANA, before=BEFORE, after=AFTER)
    (row,) = stored(ready_dsn)
    for secret in SECRETS:
        assert secret not in row
    record = vault.query.find_by_id(receipt.id)
    diff = {key: {"before": BEFORE[key], "after": AFTER[key]} for key in ("email", "address")}
    assert record.data == {"before": BEFORE, "after": AFTER, "diff": diff}


def test_emit_diff_of_values_that_are_equal_says_so_only_by_the_diff(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    vault = open_vault()
    vault.emit_diff("user.changed", target=ANA, before={"email": EMAIL, "n": 1}, after={"email": EMAIL, "n": 2})
    found = payload(ready_dsn)
    assert found["diff"] == {"n": {"before": 1, "after": 2}}
    assert found["before"]["email"]["$enc"]["ciphertext"] != found["after"]["email"]["$enc"]["ciphertext"]


def test_emit_diff_masks_first(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    vault = open_vault(mask_fields=["email"], encrypt_fields=["data.email", "data.address"])
    vault.emit_diff("user.changed", target=ANA, before=BEFORE, after={})
    found = payload(ready_dsn)
    assert found["before"]["email"] == found["diff"]["email"] == "[REDACTED]"
    assert is_enclosed(found["before"]["address"])
    assert is_enclosed(found["diff"]["address"]["before"])


def test_emit_diff_of_one_side(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    vault = open_vault()
    receipt = vault.emit_diff("user.created", target=ANA, after={"email": EMAIL, "people": [{"name": "Bo"}]})
    assert EMAIL not in stored(ready_dsn)[0]
    assert '"Bo"' not in stored(ready_dsn)[0]
    assert vault.query.find_by_id(receipt.id).data["diff"]["people"] == {"after": [{"name": "Bo"}]}


# --------------------------------------------------------------------------------- whoever else keeps it


def test_the_spool_holds_ciphertext(open_vault: OpenEncrypted, ready_dsn: str, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    vault = open_vault(default_mode="async", spool=spool, timeout=0.5)
    with down(ready_dsn):
        vault.emit("user.created", target=ANA, data={"email": EMAIL})
        vault.emit_diff("user.changed", target=ANA, before=BEFORE, after=AFTER)
        kept = b"".join(path.read_bytes() for path in spool.iterdir())
    assert kept.count(b"$enc") == 1 + 2 * 4
    for secret in (EMAIL, *SECRETS):
        assert secret.encode() not in kept
    vault.flush(30)
    assert vault.query.find_many(event="user.created")[0].data == {"email": EMAIL}
    assert not any(secret in row for row in stored(ready_dsn) for secret in SECRETS)


def test_dead_letters_and_on_error_hold_ciphertext(open_vault: OpenEncrypted, ready_dsn: str, tmp_path: Path) -> None:
    rows(ready_dsn, REFUSE_BAD)
    lost: list[AuditRecord] = []
    vault = open_vault(default_mode="async", on_error=lambda error, record: lost.append(record))
    vault.emit("bad", target=ANA, data={"email": EMAIL})
    with pytest.raises(UndeliveredError):
        vault.flush()
    assert is_enclosed(lost[0].data and lost[0].data["email"])
    assert EMAIL not in repr(lost)

    spool = tmp_path / "spool"
    vault = open_vault(default_mode="async", spool=spool)
    vault.emit("bad", target=ANA, data={"email": EMAIL})
    with pytest.raises(UndeliveredError):
        vault.flush()
    assert b"$enc" in (spool / "dead-letters").read_bytes()
    assert not any(EMAIL.encode() in path.read_bytes() for path in spool.iterdir())


def test_emit_many_and_a_connection_of_the_caller(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    vault = open_vault()
    vault.emit_many(
        [{"event": "e", "target": {"id": str(n), "type": "user"}, "data": {"email": EMAIL}} for n in range(100)]
    )
    connection = vault.connect(ready_dsn)
    vault.emit("mine", target=ANA, data={"email": EMAIL}, connection=connection.vault)
    connection.commit()
    connection.close()
    assert not any(EMAIL in row for row in stored(ready_dsn))
    assert [record.data for record in vault.query.find_many(limit=500)] == [{"email": EMAIL}] * 101


# ---------------------------------------------------------------------------------------- the subject


def test_the_subject_is_the_target_or_what_is_said(open_vault: OpenEncrypted, keys: Path) -> None:
    vault = open_vault()
    data = {"email": EMAIL}
    vault.emit("e", target=ANA, data=data)
    vault.emit("e", target=Target("42", "user"), data=data)
    vault.emit("e", target={"id": "7", "type": "order"}, subject="user/42", data=data)
    vault.emit("e", subject=ANA, data=data)
    vault.emit_diff("e", subject=Target("42", "user"), after=data)
    assert [json.loads(path.read_text())["subject"] for path in keys.glob("*.key")] == ["user/42"]
    vault.emit("e", target=ANA, subject={"id": "b/c", "type": "a/b"}, data=data)
    assert subject_of("a/b", "b/c") == "a%2Fb/b/c"
    assert DirectoryKeyStore(keys).get("a%2Fb/b/c") is not None
    assert len(list(keys.glob("*.key"))) == 2


def test_the_subject_is_not_stored(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    open_vault().emit("e", subject="user/who-it-is", data={"email": EMAIL})
    assert "who-it-is" not in stored(ready_dsn)[0]


@pytest.mark.parametrize(
    ("subject", "problem"),
    [
        ("user", "with a slash between"),
        ("/42", "with a slash between"),
        ("user/ ", "with a slash between"),
        ("", "empty"),
        ("user/\0", "U\\+0000"),
        ("user/" + "x" * 1025, "characters"),
        (42, "Target\\(id, type\\)"),
        ({"id": "42"}, "`subject.type`"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("encrypts", [True, False])
def test_a_wrong_subject_is_refused(open_vault: OpenEncrypted, subject: Any, problem: str, encrypts: bool) -> None:
    vault = open_vault() if encrypts else open_vault(encrypt_fields=(), key_store=None)
    with pytest.raises(ValidationError, match=problem) as caught:
        vault.emit("e", target=ANA, subject=subject, data={"email": EMAIL})
    assert (caught.value.field or "").startswith("subject")


def test_a_value_to_encrypt_needs_a_subject(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    vault = open_vault()
    cases: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (vault.emit, {"data": {"people": [{"name": "Bo"}]}}, "data.people[0].name"),
        (vault.emit, {"meta": {"ip": "203.0.113.7"}, "actor": ANA}, "meta.ip"),
        (vault.emit_diff, {"after": {"email": EMAIL}}, "data.after.email"),
        (lambda name, **event: vault.emit_many([{"event": name, **event}]), {"meta": {"ip": "::1"}}, "meta.ip"),
    ]
    for call, fields, field in cases:
        with pytest.raises(ValidationError) as caught:
            call("e", **fields)
        assert f"`{field}` is to be encrypted" in str(caught.value)
        assert "`target`" in str(caught.value)
    assert stored(ready_dsn) == []


# --------------------------------------------------------------------------------------------- retries


def test_a_retry_with_the_same_content_is_a_no_op(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    id_ = uuid4()
    number = Decimal("1E+2")
    first = {"email": EMAIL, "people": [{"name": {"a": number, "b": 1.5}}]}
    again = {"people": [{"name": {"b": 1.5, "a": 100}}], "email": EMAIL}
    open_vault().emit("e", id=id_, target=ANA, data=first, meta={"ip": "::1"})
    before = stored(ready_dsn)
    vault = open_vault()  # another process would do the same
    vault.emit("e", id=id_, target=ANA, data=again, meta={"ip": "::1"})
    vault.emit_many([{"event": "e", "id": id_, "target": ANA, "data": again, "meta": {"ip": "::1"}}])
    assert stored(ready_dsn) == before
    with pytest.raises(DuplicateIdError):
        vault.emit("e", id=id_, target=ANA, data={**first, "email": "eve@example.org"}, meta={"ip": "::1"})


def test_no_nonce_comes_back_with_other_content(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    vault = open_vault()
    data = {"email": "same", "tags": ["same", "same", "other"]}
    for _ in range(3):
        vault.emit("e", target=ANA, data=data)
    vault.emit("e", target={"id": "43", "type": "user"}, data=data)
    found = rows(ready_dsn, "SELECT v FROM audit_logs, jsonb_path_query(data, 'strict $.**.\"$enc\"', '{}', true) AS v")
    assert len(found) == 4 * 4
    assert len({envelope["nonce"] for (envelope,) in found}) == len(found)
    assert len({envelope["ciphertext"] for (envelope,) in found}) == len(found)


# --------------------------------------------------------------------------------------------- reading


def test_a_destroyed_key_leaves_the_envelope(
    open_vault: OpenEncrypted, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_key, "EXPIRY", 0.0)
    vault = open_vault()
    other = {"id": "43", "type": "user"}
    for target in (ANA, other):
        vault.emit("e", target=target, data={"email": EMAIL, "n": 1})
    key = DirectoryKeyStore(keys).get("user/42")
    assert key is not None
    assert DirectoryKeyStore(keys).destroy("user/42") == [key.id]
    assert DirectoryKeyStore(keys).destroy("user/42") == []

    gone, kept = vault.query.find_many(order="asc")
    assert is_enclosed(gone.data["email"])
    assert gone.data["n"] == 1
    assert kept.data == {"email": EMAIL, "n": 1}

    # The next event of the subject has another key, and the erased ones stay erased.
    receipt = vault.emit("e", target=ANA, data={"email": "new"})
    renewed = DirectoryKeyStore(keys).get("user/42")
    assert renewed is not None
    assert renewed.id != key.id
    assert vault.query.find_by_id(receipt.id).data == {"email": "new"}
    assert is_enclosed(vault.query.find_by_id(gone.id).data["email"])


def test_a_vault_lets_go_of_a_destroyed_key(
    open_vault: OpenEncrypted, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data_key.EXPIRY == 5.0  # as the documentation says
    now = [1000.0]
    monkeypatch.setattr(data_key, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    vault = open_vault()
    receipt = vault.emit("e", target=ANA, data={"email": EMAIL})
    assert vault.query.find_by_id(receipt.id).data == {"email": EMAIL}
    DirectoryKeyStore(keys).destroy("user/42")
    now[0] += 4.9
    assert vault.query.find_by_id(receipt.id).data == {"email": EMAIL}
    now[0] += 0.2
    assert is_enclosed(vault.query.find_by_id(receipt.id).data["email"])


def test_without_the_key_store_envelopes_stay(open_vault: OpenEncrypted, face: OpenVault, ready_dsn: str) -> None:
    receipt = open_vault().emit("e", target=ANA, data={"email": EMAIL})
    data = face(connection_string=ready_dsn).query.find_by_id(receipt.id).data
    assert data == payload(ready_dsn)
    assert is_enclosed(data["email"])


def test_who_only_reads_needs_the_key_store_alone(open_vault: OpenEncrypted, keys: Path) -> None:
    receipt = open_vault().emit("e", target=ANA, data={"email": EMAIL})
    reader = open_vault(encrypt_fields=())
    assert reader.query.find_by_id(receipt.id).data == {"email": EMAIL}
    reader.emit("plain", data={"email": EMAIL})
    assert len(list(keys.glob("*.key"))) == 1


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE audit_logs SET data = jsonb_set(data, '{email,$enc,ciphertext}', '\"AAAAAAAAAAAAAAAAAAAAAAAAAAAA\"')",
        "UPDATE audit_logs SET data = jsonb_set(data, '{email,$enc,nonce}', '\"AAAAAAAAAAAAAAAA\"')",
        "UPDATE audit_logs SET data = jsonb_set(data, '{email,$enc,nonce}', '\"!\"')",
        "UPDATE audit_logs SET data = jsonb_set(data, '{email,$enc,nonce}', '\"\"')",
        "UPDATE audit_logs SET data = jsonb_set(data, '{email,$enc,ciphertext}', '\"é\"')",
        "UPDATE audit_logs SET data = jsonb_set(data, '{email}', data -> 'name')",  # moved to another place
        "UPDATE audit_logs SET id = gen_random_uuid()",  # moved to another event
    ],
)
def test_what_does_not_authenticate_stays_and_is_logged(
    open_vault: OpenEncrypted, ready_dsn: str, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    vault = open_vault(encrypt_fields=["data.email", "data.name"])
    vault.emit("e", target=ANA, data={"email": EMAIL, "name": "Ana"})
    rows(ready_dsn, change)
    with caplog.at_level(logging.WARNING, "tracevault"):
        (record,) = vault.query.find_many()
        vault.query.find_many()
    assert is_enclosed(record.data["email"])
    (warning,) = caplog.records
    assert "does not authenticate" in warning.message
    assert str(record.id) in warning.message


def test_what_only_looks_like_an_envelope_is_left_alone(
    open_vault: OpenEncrypted, ready_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    vault = open_vault()
    unknown = {"$enc": {"key": "../../etc/passwd", "hash": "", "nonce": "", "ciphertext": ""}}
    data = {
        "a": {"$enc": 1},
        "b": {"$enc": {"key": "k"}},
        "c": unknown,
        "d": [{"$enc": None}],
        "e": {"$enc": 1, "f": 2},
    }
    receipt = vault.emit("e", target=ANA, data={**data, "email": unknown})
    assert vault.query.find_by_id(receipt.id).data == {**data, "email": unknown}
    rows(ready_dsn, "UPDATE audit_logs SET data = '[1, \"x\"]', meta = '7'")  # as other writers can
    assert vault.query.find_many()[0].data == [1, "x"]
    assert not caplog.records


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (["email"], "`data.email`"),
        (["actor.id"], "begins with `data.` or `meta.`"),
        (["data"], "keys with a dot between"),
        (["data."], "keys with a dot between"),
        (["data..a"], "keys with a dot between"),
        (["data.outcome"], "`outcome`"),
        (["data.Severity"], "`severity`"),
        (["data.error"], "`error_code`"),
        (["data.error.code"], "`error_code`"),
        (["data.error.*"], "`error_code`"),
        (["data.*.code"], "`error_code`"),
        (["data.*"], "`outcome`"),
        ("data.email", "must be a list"),
        ({"data.email": 1}, "must be a list"),
        ([1], "as text"),
        ([""], "as text"),
        (None, "must be a list"),
    ],
    ids=repr,
)
def test_a_wrong_path_is_refused(open_vault: OpenEncrypted, fields: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        open_vault(encrypt_fields=fields)
    assert caught.value.field == "encrypt_fields"


def test_what_lies_beside_and_below_generated_columns_is_allowed(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    vault = open_vault(encrypt_fields=["data.error.message", "data.*.name", "meta.*"])
    data = {"outcome": "failure", "error": {"code": "e1", "message": EMAIL}, "who": {"name": "Ana"}}
    vault.emit("e", target=ANA, data=data, meta={"outcome": EMAIL})
    assert rows(ready_dsn, "SELECT outcome, error_code FROM audit_logs") == [("failure", "e1")]
    assert EMAIL not in stored(ready_dsn)[0]
    # The column is made from what is stored: an envelope in it is too long, and is refused before it is sent.
    with pytest.raises(ValidationError, match=r"`data\.outcome` must have at most 64"):
        vault.emit("e", target=ANA, data={"outcome": {"name": "x"}})


async def _coroutine(subject: str, create: bool) -> bytes:
    return b""


@pytest.mark.parametrize(
    ("key_store", "problem"),
    [
        (None, "needs `key_store`"),
        (7, "must be the path"),
        ("", "empty"),
        (_coroutine, "coroutine"),
        ("/dev/null/keys", "cannot be used"),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_a_wrong_key_store_is_refused(open_vault: OpenEncrypted, key_store: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        open_vault(key_store=key_store)
    assert caught.value.field == "key_store"


def test_who_only_reads_makes_no_directory(open_vault: OpenEncrypted, keys: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        open_vault(encrypt_fields=())
    assert not keys.exists()


def test_a_missing_package_names_the_extra(open_vault: OpenEncrypted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ConfigError, match=r"tracevault\[seal\]"):
        open_vault()


def test_refusals_quote_no_value_that_is_to_be_encrypted(open_vault: OpenEncrypted) -> None:
    vault = open_vault(encrypt_fields=["data.secret"])
    for value in (f"{EMAIL}\0", {"a": [f"{EMAIL}\0"]}, {"a": {EMAIL: 1, 5: EMAIL}}, datetime(2026, 1, 2)):
        with pytest.raises(ValidationError) as caught:
            vault.emit("e", target=ANA, data={"secret": value})
        assert (caught.value.field or "").startswith("data.secret")
        assert EMAIL not in str(caught.value)
        assert "2026" not in str(caught.value)
    cycle: dict[str, Any] = {}
    cycle["again"] = cycle
    with pytest.raises(ValidationError, match="a cycle"):
        vault.emit("e", target=ANA, data={"secret": cycle})
    with pytest.raises(ValidationError, match="a cycle"):
        open_vault(encrypt_fields=["data.again.again.x"]).emit("e", target=ANA, data=cycle)


def test_size_and_depth_are_those_of_what_is_stored(open_vault: OpenEncrypted) -> None:
    vault = open_vault(encrypt_fields=["data.*.x"], max_event_bytes=1000)
    with pytest.raises(ValidationError, match="max_event_bytes") as caught:
        vault.emit("e", target=ANA, data={str(n): {"x": 1} for n in range(10)})
    assert caught.value.field != "data"  # as soon as it is too large: the others are not encrypted first
    vault = open_vault(encrypt_fields=["data.*.x"])
    deep: Any = {}
    for _ in range(100):
        deep = {"x": deep}
    for value in (deep, {"a": [deep]}):
        with pytest.raises(ValidationError, match="nested deeper than 100"):
            vault.emit("e", target=ANA, data={"a": value})
    assert vault.emit("e", target=ANA, data={"a": {"x": deep["x"]["x"]["x"]}}).stored == "database"


# ------------------------------------------------------------------------------------ keys of the caller's


def test_a_function_as_key_store(
    open_vault: OpenEncrypted, ready_dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(data_key, "EXPIRY", 0.0)
    kept: dict[str, bytes] = {}
    threads = set()

    def key_store(subject: str, create: bool) -> bytes | None:
        threads.add(threading.current_thread())
        return kept.setdefault(subject, os.urandom(32)) if create else kept.get(subject)

    vault = open_vault(key_store=key_store)
    receipt = vault.emit("e", target=ANA, data={"email": EMAIL})
    vault.emit_many([{"event": "many", "target": ANA, "data": {"email": EMAIL}}])
    assert payload_of(ready_dsn, receipt.id)["email"]["$enc"]["key"] == "user/42"
    assert vault.query.find_by_id(receipt.id).data == {"email": EMAIL}
    if vault.kind == "async":  # an event loop must not wait for it
        assert threading.main_thread() not in threads
    kept.clear()
    assert is_enclosed(vault.query.find_by_id(receipt.id).data["email"])
    kept["user/42"] = os.urandom(32)  # made anew under the same id: not the key of that value
    assert is_enclosed(vault.query.find_by_id(receipt.id).data["email"])
    assert not caplog.records  # it is gone, and not spoilt


def payload_of(dsn: str, id_: UUID) -> Any:
    ((text,),) = rows(dsn, "SELECT data::text FROM audit_logs WHERE id = %s", id_)
    return json.loads(text)


@pytest.mark.parametrize("answer", [b"short", "x" * 32, 7, None, OSError("password=hunter2")], ids=repr)
def test_a_key_store_that_fails_refuses_the_event(open_vault: OpenEncrypted, ready_dsn: str, answer: Any) -> None:
    def key_store(subject: str, create: bool) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(KeyStoreError) as caught:
        open_vault(key_store=key_store).emit("e", target=ANA, data={"email": EMAIL})
    assert "hunter2" not in str(caught.value)
    assert stored(ready_dsn) == []


def test_a_key_store_that_fails_spoils_no_page(
    open_vault: OpenEncrypted, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_key, "EXPIRY", 0.0)
    working, asked = [True], []

    def key_store(subject: str, create: bool) -> bytes:
        asked.append(subject)
        if not working:
            raise TimeoutError
        return subject.encode().ljust(32)

    vault = open_vault(key_store=key_store)
    for number in range(20):
        vault.emit("e", target={"id": str(number), "type": "user"}, data={"email": EMAIL})
    working.clear()
    asked.clear()
    page = vault.query.find_many()
    assert all(is_enclosed(record.data["email"]) for record in page)
    assert len(page) == 20
    assert len(asked) == 3
    assert "the key store failed with TimeoutError" in caplog.text


def test_an_object_as_key_store(open_vault: OpenEncrypted, ready_dsn: str) -> None:
    class Keys:
        def __init__(self) -> None:
            self.kept: dict[str, DataKey] = {}

        def get(self, subject: str) -> DataKey | None:
            return self.kept.get(subject)

        def create(self, subject: str) -> DataKey:
            return self.kept.setdefault(subject, DataKey(f"key of {subject}", os.urandom(32)))

        def find(self, key_id: str) -> DataKey | None:
            return self.kept.get(key_id.removeprefix("key of "))

        def destroy(self, subject: str) -> list[str]:
            return [self.kept.pop(subject).id]

    keys = Keys()
    assert isinstance(keys, KeyStore)
    vault = open_vault(key_store=keys)
    receipt = vault.emit("e", target=ANA, data={"email": EMAIL})
    assert payload_of(ready_dsn, receipt.id)["email"]["$enc"]["key"] == "key of user/42"
    assert vault.query.find_by_id(receipt.id).data == {"email": EMAIL}


# ------------------------------------------------------------------------------------------- the directory


def test_the_directory_is_for_its_owner_alone(keys: Path) -> None:
    store = DirectoryKeyStore(keys)
    key = store.create("user/42")
    store.destroy("user/43")
    store.destroy("user/42")
    store.create("user/42")
    assert keys.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in keys.iterdir()} == {0o600}
    assert key.export() not in repr(key).encode()
    keys.chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        DirectoryKeyStore(keys)


def test_a_key_that_comes_back_is_not_used(keys: Path) -> None:
    store = DirectoryKeyStore(keys)
    first = store.create("user/42")
    assert store.find(first.id) is not None
    (file,) = keys.glob("*.key")
    backup = file.read_bytes()
    assert store.destroy("user/42") == [first.id]
    assert not list(keys.glob("*.key"))
    assert not any(b"user/42" in path.read_bytes() for path in keys.iterdir())

    file.write_bytes(backup)
    assert store.get("user/42") is store.find(first.id) is None
    second = store.create("user/42")
    assert second.id != first.id
    assert second.export() != first.export()
    assert store.find(second.id) is not None
    assert store.find(first.id) is None
    assert store.destroy("user/42") == [second.id]

    # A line that a crash has cut off hides none that follow it.
    (tombstones,) = keys.glob("*.destroyed")
    tombstones.write_bytes(b"\n" + first.id.encode()[:20])
    third = store.create("user/42")
    (file,) = keys.glob("*.key")
    backup = file.read_bytes()
    store.destroy("user/42")
    file.write_bytes(backup)
    assert store.find(third.id) is None


def test_a_file_that_is_cut_off_was_never_a_key(keys: Path) -> None:
    store = DirectoryKeyStore(keys)
    store.create("user/42")
    (file,) = keys.glob("*.key")
    for text in (b"", file.read_bytes()[:-1], bytes(100)):
        file.write_bytes(text)
        assert store.get("user/42") is None
        key = store.create("user/42")
        found = DirectoryKeyStore(keys).get("user/42")
        assert found is not None
        assert (found.id, found.export()) == (key.id, key.export())


@pytest.mark.parametrize("old", ['"id"', '"subject": "user/42"', "=", '"key"'])
def test_a_damaged_key_is_neither_used_nor_replaced(keys: Path, old: str) -> None:
    store = DirectoryKeyStore(keys)
    store.create("user/42")
    (file,) = keys.glob("*.key")
    file.write_text(file.read_text().replace(old, '"x": 1, "y"' if old.startswith('"') else ""))
    for ask in (store.get, store.create):
        with pytest.raises(KeyStoreError, match="damaged"):
            ask("user/42")
    assert store.destroy("user/42") == []
    assert not file.exists()


def test_what_the_disk_refuses_is_said(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryKeyStore(keys)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyStoreError, match="No space left"):
        store.create("user/42")


RACE = """
import sys, time
from tracevault import DirectoryKeyStore
store = DirectoryKeyStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for n in range(50):
    key = store.get(f"user/{n}") or store.create(f"user/{n}")
    print(key.id, key.hash)
"""


def test_processes_that_race_use_one_key(keys: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", RACE, str(keys)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=60)[0] for process in processes}
    assert len(answers) == 1
    assert len(answers.pop().splitlines()) == 50
    assert len(list(keys.glob("*.key"))) == 50


def test_a_key_is_on_the_disk_before_it_is_used(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    store = DirectoryKeyStore(keys)
    monkeypatch.setattr(os, "fsync", noted)
    store.create("user/42")
    (file,) = keys.glob("*.key")
    assert synced == [file.stat().st_ino, keys.stat().st_ino]
    synced.clear()
    store.destroy("user/42")
    (tombstones,) = keys.glob("*.destroyed")
    assert synced == [tombstones.stat().st_ino, keys.stat().st_ino, keys.stat().st_ino]


def test_the_same_value_under_other_keys_places_and_events_differs() -> None:
    key, other = DataKey("k", bytes(32)), DataKey("k", bytes(31) + b"1")
    places = [
        place_of(id_, path)
        for id_ in (UUID(int=1), UUID(int=2))
        for path in (("data", "a"), ("data", "a", 0), ("data", "a", "0"), ("data", 'a","0'), ("meta", "a"))
    ]
    assert len({store.seal('"x"', place) for store in (key, other) for place in places}) == 2 * len(places)
    assert key.seal('"x"', places[0]) == key.seal('"x"', places[0])


def test_a_nonce_is_not_used_for_two_texts_or_places() -> None:
    """With one nonce twice, AES-GCM would give both texts away, and its authentication key."""
    key = DataKey("k", bytes(32))
    places = [place_of(UUID(int=1), ("data", "a")), place_of(UUID(int=1), ("data", "b"))]
    sealed = [json.loads(key.seal(text, place))["$enc"]["nonce"] for text in ('"x"', '"y"', "") for place in places]
    # Nor where the end of one place is the beginning of another text.
    sealed += [json.loads(key.seal(*pair))["$enc"]["nonce"] for pair in (('"bc"', b"a"), ('bc"', b'a"'))]
    assert len(set(sealed)) == len(sealed)


async def test_a_vault_of_asyncio_goes_on_while_a_key_is_made(ready_dsn: str) -> None:
    asked, go = threading.Event(), threading.Event()

    def key_store(subject: str, create: bool) -> bytes | None:
        asked.set()
        assert go.wait(30)
        return b"k" * 32

    async with start_tracevault(
        connection_string=ready_dsn, encrypt_fields=["data.email"], key_store=key_store
    ) as vault:
        slow = asyncio.ensure_future(vault.emit("e", target=ANA, data={"email": EMAIL}))
        assert await asyncio.to_thread(asked.wait, 30)
        assert (await vault.emit("plain")).stored == "database"
        assert not slow.done()
        go.set()
        await slow


SECRET = "se cret"  # with a space, which base64 has not
KEYS = st.sampled_from(["a", "b", "A", "a.b", "before", "after", "diff", "*", "0", "$enc", "key"])
PAYLOADS = st.dictionaries(
    KEYS,
    st.recursive(
        st.sampled_from([SECRET, None, 1]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=12,
    ),
    max_size=4,
)
PATHS = st.lists(
    st.lists(st.sampled_from(["a", "b", "*", "before", "0", "key"]), min_size=1, max_size=4).filter(
        lambda path: path not in (["*"], ["*", "*"])  # which cover columns
    ),
    min_size=1,
    max_size=3,
)


def cover(value: Any, paths: list[list[str]]) -> Any:
    """The rule of the documentation, said in another way: what is covered becomes ``None``."""
    if [] in paths:
        return None
    if isinstance(value, dict):
        return {
            key: cover(item, [rest for path in paths for rest in after(path, key.lower())])
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [
            cover(item, [*paths, *(path[1:] for path in paths if path and path[0] in ("*", str(index)))])
            for index, item in enumerate(value)
        ]
    return value


def after(path: list[str], key: str) -> list[list[str]]:
    """What remains of a path below a key, which may be taken for several."""
    if not path:
        return []
    found = [path[1:]] if path[0] in ("*", key) else []
    parts = key.split(".")
    begun = zip(path, parts, strict=False)
    if 1 < len(parts) <= len(path) and all(one in ("*", part) for one, part in begun):
        found.append(path[len(parts) :])
    return found


@settings(max_examples=400, deadline=None)
@given(PAYLOADS, PAYLOADS, PATHS)
def test_what_the_paths_say_is_what_is_encrypted(
    before: dict[str, Any], after_: dict[str, Any], paths: list[list[str]]
) -> None:
    keys = KeyCache(FunctionKeyStore(lambda subject, create: b"k" * 32))
    encryption = Encryption(["data." + ".".join(path) for path in paths], keys)
    settings_ = Settings(Encoder(frozenset(), "", 262_144), None, "sync", encryption)
    prepared = prepare("e", {"target": ANA, "data": before}, settings_)
    record = unstored_record(prepared)
    covered = cover(before, paths)
    assert (SECRET in repr(record.data)) == (SECRET in repr(covered))
    assert without(record.data, before) == without(covered, before)
    Decryption(keys).open_all([record])
    assert record.data == before

    # In a difference it is no less than in each side.
    record = unstored_record(prepare_diff("e", {"target": ANA, "before": before, "after": after_}, settings_))
    assert record.data is not None
    for side, given_ in (("before", before), ("after", after_)):
        if SECRET not in repr(cover(given_, paths)):
            assert SECRET not in repr(record.data[side])
            assert all(SECRET not in repr(change.get(side)) for change in record.data["diff"].values())
    Decryption(keys).open_all([record])
    assert record.data == {"before": before, "after": after_, "diff": compute_diff(before, after_)}


def without(value: Any, original: Any) -> Any:
    """``value`` with None in place of whatever is not as in ``original``."""
    if is_envelope(value):
        return None
    if isinstance(value, dict) and isinstance(original, dict) and value.keys() == original.keys():
        return {key: without(item, original[key]) for key, item in value.items()}
    if isinstance(value, list) and isinstance(original, list):
        return [without(*pair) for pair in zip(value, original, strict=True)]
    return value if value == original else None
