r"""What is hashed of a row: leaf encoding, version 1. In SQL for the sealer, in Python for whoever verifies.

``leaf = "tracevault/leaf/v1\n"`` and then fields, ascending by tag: ``tag (2 bytes) | length (4) | value``, numbers
big-endian. A NULL field is left out, so that a new nullable column changes no old leaf. Tag 1 is the tree's name; the
other tags stand with the columns in ``events.record``. Values: UTF-8 of text, 16 bytes of a uuid, microseconds since
2000-01-01T00:00Z (int64, as PostgreSQL's ``timestamptz_send``) of a time. Of a payload only a commitment stands there:
``SHA-256("tracevault/payload/v1\n" | salt (16 bytes, absent if NULL) | UTF-8 of its jsonb text)``, so that it can be
erased while the leaf still verifies, and a hash gives no small secret away.

What PostgreSQL prints of a ``jsonb`` is hashed since that text survives a round trip: order of keys, and numbers beyond
a double's. RFC 8785 cannot hold an integer past 2^53.

Both halves are made from the same columns and are otherwise independent: that they agree is tested on random rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from hashlib import sha256
from itertools import repeat
from struct import Struct
from struct import error as struct_error
from typing import Any
from uuid import UUID

from tracevault.errors import ProofError
from tracevault.events.payload import iso_utc
from tracevault.events.record import COLUMNS, PAYLOAD_SALT, StoredColumn

LEAF_PREFIX = b"tracevault/leaf/v1\n"
PAYLOAD_PREFIX = b"tracevault/payload/v1\n"
TREE_TAG = 1

# Fields of a leaf, ascending by tag.
FIELDS = tuple(sorted((stored for stored in COLUMNS if stored.column.leaf), key=lambda stored: stored.column.leaf or 0))
PAYLOADS = tuple(stored.name for stored in FIELDS if stored.column.sql_type == "jsonb")
_PLAIN = tuple(stored for stored in FIELDS if stored.column.sql_type != "jsonb")

_TAG = Struct("!H")
_LENGTH = Struct("!i")
_TIME = Struct("!q")
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_HASH_BYTES = 32


def _head(tag: int, size: int) -> bytes:
    """Return what stands before a value of ``size`` bytes."""
    return _TAG.pack(tag) + _LENGTH.pack(size)


def _field(tag: int, value: bytes) -> bytes:
    return _head(tag, len(value)) + value


def leaf_prefix(tree: str) -> bytes:
    """Return what every leaf of ``tree`` begins with."""
    return LEAF_PREFIX + _field(TREE_TAG, tree.encode())


# ------------------------------------------------------------------------------------------------ in SQL


def hash_sql(prefix: str, row: str = "r") -> str:
    """Return SQL for the RFC 6962 leaf hash of ``row``: ``sha256(0x00 | leaf)``; 3 µs a row.

    ``prefix`` is SQL for 0x00 and `leaf_prefix`. Plain operators alone: a function of our own would not be inlined.
    """
    parts = [_field_sql(stored, row) for stored in FIELDS]
    return f"sha256({prefix} || {' || '.join(parts)})"


def commitment_sql(payload: str, row: str = "r") -> str:
    """Return SQL for the commitment to a payload column that is not NULL."""
    salt = f"coalesce(uuid_send({row}.{PAYLOAD_SALT}), '')"
    return f"sha256({_literal(PAYLOAD_PREFIX)} || {salt} || convert_to({row}.{payload}::text, 'UTF8'))"


def _field_sql(stored: StoredColumn, row: str) -> str:
    name, tag = f"{row}.{stored.name}", _TAG.pack(stored.column.leaf or 0)
    match stored.column.sql_type:
        case "uuid":
            field = f"{_literal(tag + _LENGTH.pack(16))} || uuid_send({name})"
        case "timestamp with time zone":
            field = f"{_literal(tag + _LENGTH.pack(8))} || timestamptz_send({name})"
        case "jsonb":
            field = f"{_literal(tag + _LENGTH.pack(_HASH_BYTES))} || {commitment_sql(stored.name, row)}"
        case _:
            field = f"{_literal(tag)} || int4send(octet_length({name})) || convert_to({name}, 'UTF8')"
    return f"coalesce({field}, '')" if stored.nullable else field


def _literal(value: bytes) -> str:
    return f"'\\x{value.hex()}'::bytea"


def canary_sql() -> str:
    """Return a SELECT of the leaf hash of `CANARY`, whatever table is there: its result is known beforehand."""
    columns = [
        f"{_canary_literal(CANARY.values.get(stored.name))}::{stored.column.sql_type} AS {stored.name}"
        for stored in FIELDS
    ]
    salt = f"{_canary_literal(CANARY.values[PAYLOAD_SALT])}::uuid AS {PAYLOAD_SALT}"
    prefix = _literal(b"\x00" + leaf_prefix(CANARY.tree))
    return f"SELECT {hash_sql(prefix)} FROM (SELECT {', '.join([*columns, salt])}) AS r"


def _canary_literal(value: str | None) -> str:
    return "NULL" if value is None else f"'{value}'"


# --------------------------------------------------------------------------------------------- in Python


# What `Encoder.hash` takes, in this order, each in its type's binary format.
READ = (*(stored.name for stored in _PLAIN), PAYLOAD_SALT, *(f"{name}::text" for name in PAYLOADS))

_SALT = len(_PLAIN)
_NO_COMMITMENTS: tuple[bytes | None, ...] = (None,) * len(PAYLOADS)
# Of values shorter than this, what stands before them is made beforehand.
_SHORT = 256


class _Heads(dict[int, bytes]):
    """What stands before a value of one field, by the value's size."""

    def __init__(self, tag: int) -> None:
        super().__init__((size, _head(tag, size)) for size in range(_SHORT))
        self._tag = tag

    def __missing__(self, size: int) -> bytes:
        return _head(self._tag, size)


class Encoder:
    """Hashes the leaves of one tree from rows as PostgreSQL sends them, of which no value has to be decoded."""

    def __init__(self, tree: str) -> None:
        self._prefix = b"\x00" + leaf_prefix(tree)
        self._heads = [_Heads(stored.column.leaf or 0) for stored in _PLAIN]
        payloads = (stored for stored in FIELDS if stored.name in PAYLOADS)
        self._payload_heads = [_head(stored.column.leaf or 0, _HASH_BYTES) for stored in payloads]

    def hash(self, fields: Sequence[bytes | None], commitments: Sequence[bytes | None] = _NO_COMMITMENTS) -> bytes:
        """Return the RFC 6962 leaf hash of a row, given as the values of `READ`.

        ``commitments`` replace payloads that were erased, in the order of `PAYLOADS`.
        """
        parts = [self._prefix]
        add = parts.append
        for heads, value in zip(self._heads, fields, strict=False):
            if value is not None:
                add(heads[len(value)])
                add(value)
        salt, *payloads = fields[_SALT:]
        begin = PAYLOAD_PREFIX if salt is None else PAYLOAD_PREFIX + salt
        for head, payload, committed in zip(self._payload_heads, payloads, commitments, strict=True):
            if payload is not None:
                add(head)
                add(sha256(begin + payload).digest())
            elif committed is not None:
                add(head)
                add(committed)
        return sha256(b"".join(parts)).digest()

    def hash_all(self, columns: Sequence[Sequence[bytes | None]]) -> list[bytes]:
        """Return what `hash` returns of each of some rows of which nothing was erased, given field by field.

        It takes half to three quarters of the time: what is the same in all of them is put together once.
        """
        parts: list[Iterable[bytes]] = []
        same = self._prefix
        for heads, values in zip(self._heads, columns, strict=False):
            first = values[0]
            if first == values[-1] and values.count(first) == len(values):
                same += b"" if first is None else heads[len(first)] + first
                continue
            parts += (repeat(same), [b"" if value is None else heads[len(value)] + value for value in values])
            same = b""
        parts.append(repeat(same))
        salts, *payloads = columns[_SALT:]
        begins = [PAYLOAD_PREFIX if salt is None else PAYLOAD_PREFIX + salt for salt in salts]
        for head, values in zip(self._payload_heads, payloads, strict=True):
            parts.append(
                [
                    b"" if value is None else head + sha256(begin + value).digest()
                    for begin, value in zip(begins, values, strict=True)
                ]
            )
        leaves = zip(*parts, strict=False)
        return [sha256(b"".join(leaf)).digest() for leaf in leaves]


def commitment(salt: UUID | None, text: str) -> bytes:
    """Return the commitment to a payload, given as the text of its ``jsonb``."""
    return sha256(PAYLOAD_PREFIX + (salt.bytes if salt else b"") + text.encode()).digest()


class Statement:
    """What a row says, as plain values from which anyone can make its leaf: the content of a proof.

    ``values`` are JSON's: text as it is, a uuid in its 36 characters, times as ISO 8601 in UTC with microseconds (a
    time outside the years 1-9999 as a number of microseconds since 2000), payloads as the text of their ``jsonb``
    with ``payload_salt``, or as ``data_commitment`` in hexadecimal digits where they were erased. Raises `ProofError`
    for a value that is none of these, and for a name that is unknown.
    """

    def __init__(self, tree: str, values: Mapping[str, Any]) -> None:
        self.tree = tree
        self.values = dict(values)

    @cached_property
    def leaf(self) -> bytes:
        """The leaf."""
        values = self.values
        known = {stored.name for stored in FIELDS} | {PAYLOAD_SALT} | {f"{name}_commitment" for name in PAYLOADS}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ProofError(f"the event has a field `{unknown[0][:64]}` that leaves of version 1 do not have")
        parts = [leaf_prefix(self.tree)]
        for stored in FIELDS:
            value = self._value(stored)
            if value is not None:
                parts.append(_field(stored.column.leaf or 0, value))
        return b"".join(parts)

    def _value(self, stored: StoredColumn) -> bytes | None:
        name = stored.name
        value = self.values.get(name)
        try:
            if stored.column.sql_type == "jsonb":
                committed = self.values.get(f"{name}_commitment")
                if committed is not None:
                    if value is not None or len(committed) != 2 * _HASH_BYTES:
                        raise ValueError
                    return bytes.fromhex(committed)
                salt = self.values.get(PAYLOAD_SALT)
                return None if value is None else commitment(UUID(salt) if salt else None, value)
            return None if value is None else _ENCODERS.get(stored.column.sql_type, str.encode)(value)
        except (ValueError, TypeError, AttributeError, struct_error):
            raise ProofError(f"the event's `{name}` is not what a leaf can be made of") from None


# A row with characters and numbers of every kind, and with NULLs; see `canary_sql`.
CANARY = Statement(
    "canary",
    {
        "id": "01930000-0000-7000-8000-0000000000ca",
        "occurred_at": "1999-12-31T23:59:59.999999Z",
        "created_at": "2026-01-01T00:00:00Z",
        "event": "canary.sang",
        "actor_id": "Ångström 🐦",
        "mode": "sync",
        "tenant_id": "",
        "data": '{"": null, "a": 1.0, "b": 12345678901234567890, "aa": [-0.5, true, "ü"]}',
        PAYLOAD_SALT: "00112233-4455-6677-8899-aabbccddeeff",
    },
)
CANARY_HASH = bytes.fromhex("07b8a55cec759a8ba7462101c0ec58d22f4483bed43c79c9bba26c2ff962856d")


def _encode_time(value: Any) -> bytes:
    if isinstance(value, int):
        return _TIME.pack(value)
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError
    return _TIME.pack((moment - _EPOCH) // _MICROSECOND)


_ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "uuid": lambda value: UUID(value).bytes,
    "timestamp with time zone": _encode_time,
}


def statement_of(
    tree: str, fields: Sequence[bytes | None], commitments: Sequence[bytes | None] = _NO_COMMITMENTS
) -> Statement:
    """Return what a row says, from what `Encoder.hash` takes."""
    values: dict[str, Any] = {}
    for stored, field in zip(_PLAIN, fields, strict=False):
        if field is not None:
            values[stored.name] = _DECODERS.get(stored.column.sql_type, bytes.decode)(field)
    salt, *payloads = fields[_SALT:]
    if salt is not None:
        values[PAYLOAD_SALT] = str(UUID(bytes=salt))
    for name, field, committed in zip(PAYLOADS, payloads, commitments, strict=True):
        if field is not None:
            values[name] = field.decode()
        elif committed is not None:
            values[f"{name}_commitment"] = committed.hex()
    return Statement(tree, values)


def _decode_time(value: bytes) -> str | int:
    (microseconds,) = _TIME.unpack(value)
    try:
        return iso_utc(_EPOCH + timedelta(microseconds=microseconds))
    except OverflowError:
        return int(microseconds)


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "uuid": lambda value: str(UUID(bytes=value)),
    "timestamp with time zone": _decode_time,
}
