"""What is hashed of a row: SQL and Python agree, and every column counts."""

from __future__ import annotations

import hashlib
import json
import random
import string
import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.conftest import rows
from tests.sealed import Sealed
from tracevault import ProofError, SealError
from tracevault.events.record import COLUMNS, INSERT_COLUMNS
from tracevault.flows import seal
from tracevault.flows.write import insert_sql
from tracevault.integrity.leaf import (
    CANARY,
    CANARY_HASH,
    FIELDS,
    READ,
    Encoder,
    Statement,
    canary_sql,
    hash_sql,
    leaf_prefix,
    statement_of,
)
from tracevault.integrity.merkle import leaf_hash
from tracevault.postgres.failures import Place
from tracevault.postgres.run import raw_rows

TREE = "audit_logs"
FUZZED = 100_000
# What random rows are made of: quotes, separators, characters of every length in UTF-8, and what looks like SQL.
ALPHABET = string.ascii_letters + string.digits + " '\"\\%$,;:{}[]()\t\n" + "äßΩ中🎈\u200f\x7f"
HASHES = f"SELECT id, {hash_sql('$1::bytea')} FROM audit_logs AS r"


def text(dice: random.Random, most: int) -> str:
    return "".join(dice.choices(ALPHABET, k=dice.choice((1, 1, 3, 12, min(most, 60)))))


def number(dice: random.Random) -> str:
    return dice.choice(
        ("0", "-0.0", "1", "1.0", "1.500", "1e3", "1E-7", "12345678901234567890123", "0.1000", "1e40", "-17")
    )


def payload(dice: random.Random, depth: int = 0) -> str:
    """Random JSON as text, such as other writers could send: numbers in every spelling, doubled keys."""
    kind = dice.random()
    if depth < 3 and kind < 0.3:
        return "[" + ", ".join(payload(dice, depth + 1) for _ in range(dice.randrange(4))) + "]"
    if depth == 0 or (depth < 3 and kind < 0.6):
        keys = [text(dice, 20) for _ in range(dice.randrange(5))]
        return "{" + ", ".join(f"{quoted(key)}: {payload(dice, depth + 1)}" for key in keys) + "}"
    return dice.choice((quoted(text(dice, 40)), number(dice), "true", "false", "null"))


def quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def moment(dice: random.Random) -> str:
    return dice.choice(
        (
            "2026-01-01 00:00:00+00",
            f"2026-0{dice.randrange(1, 10)}-17 0{dice.randrange(10)}:59:59.{dice.randrange(10**6):06}+02",
            f"{dice.randrange(1, 9999):04}-02-03 04:05:06.7+00",
            "infinity",
            "-infinity",
            "0044-03-15 12:00:00+00 BC",
            "20000-01-01 00:00:00+00",
        )
    )


def fuzzed(seed: int, count: int) -> Iterator[tuple[Any, ...]]:
    """Yield rows in the order of ``INSERT_COLUMNS``, then created_at and the salt."""
    dice = random.Random(seed)
    for _ in range(count):
        values: dict[str, Any] = {}
        for stored in COLUMNS:
            if stored.name not in INSERT_COLUMNS or (stored.nullable and dice.random() < 0.4):
                continue
            match stored.column.sql_type:
                case "uuid":
                    values[stored.name] = UUID(int=dice.getrandbits(128))
                case "jsonb":
                    values[stored.name] = payload(dice)
                case "timestamp with time zone":
                    values[stored.name] = moment(dice)
                case _:
                    values[stored.name] = text(dice, stored.column.limit or 8)
        salt = None if dice.random() < 0.1 else UUID(int=dice.getrandbits(128))
        yield (*(values.get(name) for name in INSERT_COLUMNS), moment(dice), salt)


def test_sql_and_python_agree_on_fuzzed_rows(ready_dsn: str) -> None:
    columns = ", ".join((*INSERT_COLUMNS, "created_at", "payload_salt"))
    with psycopg.connect(ready_dsn, autocommit=True) as connection:
        for index in rows(ready_dsn, "SELECT indexname FROM pg_indexes WHERE tablename = 'audit_logs'"):
            if index[0] != "audit_logs_pkey":  # they are not what is tested, and take half the time
                connection.execute(f'DROP INDEX "{index[0]}"'.encode())
        with connection.cursor().copy(f"COPY audit_logs ({columns}) FROM STDIN".encode()) as copy:
            for row in fuzzed(20_261_125, FUZZED):
                copy.write_row(row)
        encoder, seen = Encoder(TREE), 0
        # Both are read in one statement, so that each row is compared with itself.
        select = f"SELECT {hash_sql(literal(prefix()))}, {', '.join(f'r.{name}' for name in READ)} FROM audit_logs AS r"
        found = raw_rows(connection, select, Place("reading"))
        while batch := list(islice(found, 100)):
            hashes, *values = zip(*batch, strict=True)
            assert encoder.hash_all(values) == list(hashes)
            for hash_, *fields in batch:
                assert encoder.hash(fields) == hash_
                if seen % 10 == 0:  # the third way, by plain values, is slower
                    assert leaf_hash(statement_of(TREE, fields).leaf) == hash_
                    assert encoder.hash_all([(field, field) for field in fields]) == [hash_, hash_]
                seen += 1
    assert seen == FUZZED


def prefix() -> bytes:
    return b"\x00" + leaf_prefix(TREE)


def literal(value: bytes) -> str:
    return f"'\\x{value.hex()}'::bytea"


def insert(dsn: str, **values: Any) -> None:
    given = {"id": uuid4(), "event": "order.paid", "mode": "sync", "occurred_at": "2026-01-01T00:00:00Z", **values}
    names = ", ".join(given)
    places = ", ".join(f"%({name})s" for name in given)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"INSERT INTO audit_logs ({names}) VALUES ({places})".encode(), given)


def server_hash(dsn: str) -> bytes:
    with psycopg.connect(dsn, autocommit=True) as connection:
        found = connection.execute(f"SELECT {hash_sql(literal(prefix()))} FROM audit_logs AS r".encode()).fetchone()
    assert found is not None
    return bytes(found[0])


def field(tag: int, value: bytes) -> bytes:
    return struct.pack("!HI", tag, len(value)) + value


def test_a_row_is_encoded_as_documented(ready_dsn: str) -> None:
    id_, salt = UUID("01930000-0000-7000-8000-000000000001"), UUID("00112233-4455-6677-8899-aabbccddeeff")
    insert(
        ready_dsn,
        id=id_,
        occurred_at="2000-01-01T00:00:01.5Z",
        created_at="1999-12-31T23:59:59Z",
        actor_id="ä",
        data='{"b":1,"a":1.0}',
        payload_salt=salt,
    )
    committed = hashlib.sha256(b"tracevault/payload/v1\n" + salt.bytes + b'{"a": 1.0, "b": 1}').digest()
    expected = (
        b"tracevault/leaf/v1\n"
        + field(1, b"audit_logs")
        + field(2, id_.bytes)
        + field(3, struct.pack("!q", 1_500_000))
        + field(4, struct.pack("!q", -1_000_000))
        + field(5, b"order.paid")
        + field(6, "ä".encode())
        + field(10, b"sync")
        + field(100, committed)
    )
    assert server_hash(ready_dsn) == hashlib.sha256(b"\x00" + expected).digest()
    statement = Statement(
        "audit_logs",
        {
            "id": str(id_),
            "event": "order.paid",
            "occurred_at": "2000-01-01T00:00:01.500Z",
            "created_at": "1999-12-31T23:59:59Z",
            "actor_id": "ä",
            "mode": "sync",
            "data": '{"a": 1.0, "b": 1}',
            "payload_salt": str(salt),
        },
    )
    assert statement.leaf == expected


def test_tags_never_change() -> None:
    assert {stored.name: stored.column.leaf for stored in FIELDS} == {
        "id": 2,
        "occurred_at": 3,
        "created_at": 4,
        "event": 5,
        "actor_id": 6,
        "actor_type": 7,
        "target_id": 8,
        "target_type": 9,
        "mode": 10,
        "correlation_id": 11,
        "request_id": 12,
        "environment": 13,
        "tenant_id": 14,
        "trace_id": 15,
        "span_id": 16,
        "data": 100,
        "meta": 101,
    }


def test_rows_of_the_reference_have_leaves_too(ready_dsn: str) -> None:
    # It knows neither salt nor transaction; an old row of its has neither, a new one the defaults.
    insert(ready_dsn, data='{"outcome": "failure"}', payload_salt=None, stored_xid=None)
    (row,) = list_rows(ready_dsn)
    assert server_hash(ready_dsn) == Encoder(TREE).hash(row)


def list_rows(dsn: str) -> list[tuple[bytes | None, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        select = f"SELECT {', '.join(f'r.{name}' for name in READ)} FROM audit_logs AS r"
        return list(raw_rows(connection, select, Place("reading")))


@pytest.mark.parametrize("stored", FIELDS, ids=lambda stored: stored.name)
def test_every_column_counts(ready_dsn: str, stored: Any) -> None:
    insert(ready_dsn, data="{}", meta="{}", **dict.fromkeys(("actor_id", "tenant_id", "trace_id"), "x"))
    before = server_hash(ready_dsn)
    changed = {
        "uuid": "gen_random_uuid()",
        "jsonb": "'{\"a\": 1}'",
        "timestamp with time zone": f"{stored.name} + interval '1 microsecond'",
    }.get(stored.column.sql_type, "'changed'")
    rows(ready_dsn, f"UPDATE audit_logs SET {stored.name} = {changed}")
    after = server_hash(ready_dsn)
    assert after != before
    (row,) = list_rows(ready_dsn)
    assert Encoder(TREE).hash(row) == after


@pytest.mark.parametrize(
    "values",
    [
        {"id": "no uuid"},
        {"occurred_at": "2026-01-01T00:00:00"},
        {"occurred_at": 2**70},
        {"event": 7},
        {"data_commitment": "00"},
        {"data": "{}", "data_commitment": "00" * 32},
        {"colour": "red"},
        {"data": "{}", "payload_salt": "x"},
    ],
    ids=str,
)
def test_a_statement_that_no_leaf_can_be_made_of_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ProofError):
        _ = Statement(TREE, values).leaf


def test_insert_sql_knows_all_columns() -> None:
    # The fuzzed rows above are made of these.
    assert all(name in insert_sql(TREE, 1, taken=False) for name in INSERT_COLUMNS)


def test_the_canary_has_the_hash_that_is_known(dsn: str) -> None:
    assert leaf_hash(CANARY.leaf) == CANARY_HASH
    assert rows(dsn, canary_sql()) == [(CANARY_HASH,)]


def test_a_server_that_hashes_otherwise_seals_nothing(
    ready_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seal, "CANARY_HASH", bytes(32))
    log = Sealed(ready_dsn, tmp_path)
    with pytest.raises(SealError, match="hashes a row otherwise"):
        log.sealer.seal("audit_logs")
    assert rows(ready_dsn, "SELECT to_regclass('tracevault_trees')") == [(None,)]
    log.close()
