"""A row in the database and in Parquet: every byte that a leaf is made of goes there and comes back the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct, error
from typing import Any, NamedTuple
from uuid import UUID

from tracevault.errors import ArchiveError, ConfigError, ProofError
from tracevault.events.record import BY_NAME, STORED_XID
from tracevault.integrity.leaf import PAYLOADS, READ
from tracevault.postgres.run import RawRow

try:
    import pyarrow
except ImportError as missing:
    message = 'an archive needs the extra "archive": pip install "tracevault[archive]"'
    raise ConfigError(message) from missing

LEAF = "leaf"
# The columns of `READ` by their names, and those before and after them in a file.
NAMES = tuple(name.removesuffix("::text") for name in READ)
_COMMITMENTS = tuple(f"{name}_commitment" for name in PAYLOADS)
_PLAIN_TYPES = {"timestamp with time zone": pyarrow.timestamp("us", tz="UTC")}
SCHEMA = pyarrow.schema(
    [
        pyarrow.field(LEAF, pyarrow.int64()),
        *(
            pyarrow.field(
                name, _PLAIN_TYPES.get(BY_NAME[name].column.sql_type, pyarrow.string()), BY_NAME[name].nullable
            )
            for name in NAMES
        ),
        *(pyarrow.field(name, pyarrow.binary()) for name in _COMMITMENTS),
        pyarrow.field(STORED_XID, pyarrow.uint64()),
    ]
)
_TIMES = {name for name in NAMES if BY_NAME[name].column.sql_type in _PLAIN_TYPES}
_UUIDS = {name for name in NAMES if BY_NAME[name].column.sql_type == "uuid"}
_ID, _OCCURRED = NAMES.index("id"), NAMES.index("occurred_at")

_LENGTH = Struct("!i")
_INDEX = Struct("!q")
_TIME = Struct("!q")
_XID = Struct("!Q")
_NULL = _LENGTH.pack(-1)
# Microseconds from 1970, where Parquet counts from, to 2000, where PostgreSQL does.
FROM_2000 = 946_684_800_000_000
# What stands for infinity, and negated for minus infinity, in PostgreSQL and in readers of Parquet such as DuckDB.
INFINITY = 2**63 - 1


class Sent(NamedTuple):
    """A row of `flows.archive.rows_sql`, as the server sent it."""

    leaf: int | None
    hash: bytes | None
    xid: int | None
    commitments: tuple[bytes | None, ...]
    fields: Sequence[bytes | None]
    """Those of `integrity.leaf.READ`."""

    @property
    def id(self) -> UUID:
        """The event's id."""
        return UUID(bytes=self.fields[_ID])

    @property
    def occurred_at(self) -> int:
        """When it happened, in microseconds since 2000."""
        (value,) = _TIME.unpack(self.fields[_OCCURRED] or b"")
        return int(value)


def sent_row(row: RawRow) -> Sent:
    """Return what a row says, as the server sends it."""
    leaf, hash_, xid, data, meta, *fields = row
    return Sent(
        None if leaf is None else _INDEX.unpack(leaf)[0],
        hash_,
        None if xid is None else _XID.unpack(xid)[0],
        (data, meta),
        fields,
    )


def batch_of(rows: Sequence[Sent]) -> Any:
    """Return rows as Arrow has them; raise `ArchiveError` for a time that Parquet has no number for."""
    columns = [pyarrow.array([row.leaf for row in rows], pyarrow.int64())]
    for place, name in enumerate(NAMES):
        values = [row.fields[place] for row in rows]
        if name in _TIMES:
            columns.append(pyarrow.array([_unix(name, value, rows) for value in values]).cast(SCHEMA.field(name).type))
        elif name in _UUIDS:
            columns.append(pyarrow.array([None if value is None else str(UUID(bytes=value)) for value in values]))
        else:
            columns.append(pyarrow.array(values, pyarrow.binary()).cast(pyarrow.string()))
    columns += [
        pyarrow.array([row.commitments[place] for row in rows], pyarrow.binary()) for place in range(len(_COMMITMENTS))
    ]
    columns.append(pyarrow.array([row.xid for row in rows], pyarrow.uint64()))
    return pyarrow.record_batch(
        [column.cast(field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )


def _unix(name: str, value: bytes | None, rows: Sequence[Sent]) -> int:
    (moment,) = _TIME.unpack(value or b"")
    if abs(moment) >= INFINITY:
        return INFINITY if moment > 0 else -INFINITY
    if moment + FROM_2000 >= INFINITY:
        found = next(row for row in rows if row.fields[NAMES.index(name)] == value)
        raise ArchiveError(f"event {found.id} cannot be archived: Parquet has no number for its `{name}`")
    return int(moment + FROM_2000)


class Archived(NamedTuple):
    """A row of a file, ready to be hashed or stored. ``fault`` says why it can be neither."""

    leaf: int | None
    id: str | None
    occurred_at: int | None
    """In microseconds since 1970."""
    xid: int | None
    commitments: tuple[bytes | None, ...]
    fields: list[bytes | None]
    fault: ProofError | None


def archived(batch: Any) -> Iterator[Archived]:
    """Yield the rows of a record batch. What is in it may be anything."""
    leaves, *columns = (_plain(column) for column in batch.columns)
    named, rest = columns[: len(NAMES)], columns[len(NAMES) :]
    encoders = [_encoder(name) for name in NAMES]
    *committed, xids = rest
    for place, leaf in enumerate(leaves):
        fields: list[bytes | None] = []
        fault = None
        for name, encode, column in zip(NAMES, encoders, named, strict=True):
            value = column[place]
            try:
                fields.append(None if value is None else encode(value))
            except (ValueError, error):
                fault = ProofError(f"its `{name}` is not what a leaf can be made of")
        commitments = tuple(column[place] for column in committed)
        yield Archived(leaf, named[_ID][place], named[_OCCURRED][place], xids[place], commitments, fields, fault)


def _plain(column: Any) -> list[Any]:
    if pyarrow.types.is_timestamp(column.type):
        column = column.cast(pyarrow.int64())
    return list(column.to_pylist())


def _encoder(name: str) -> Any:
    if name in _TIMES:
        return _time
    if name in _UUIDS:
        return _uuid
    return str.encode


def _time(value: int) -> bytes:
    return _TIME.pack(value if value == INFINITY else -(2**63) if value == -INFINITY else value - FROM_2000)


def _uuid(value: str) -> bytes:
    made = UUID(value)
    if str(made) != value:
        raise ValueError("not as it is written here")
    return made.bytes


# The columns that a row is restored to, and the tuple of binary COPY for them.
RESTORED = (*NAMES, STORED_XID)


def restored(row: Archived, *, xid: bool) -> bytes:
    """Return a row as a tuple of binary COPY for `RESTORED`; without ``xid`` it names no transaction."""
    parts = [_COUNT]
    for name, field in zip(NAMES, row.fields, strict=True):
        if field is None:
            parts.append(_NULL)
        elif name in PAYLOADS:
            parts.append(_LENGTH.pack(len(field) + 1) + b"\x01" + field)  # the version of jsonb's format
        else:
            parts.append(_LENGTH.pack(len(field)) + field)
    parts.append(_NULL if row.xid is None or not xid else _LENGTH.pack(8) + _XID.pack(row.xid))
    return b"".join(parts)


_COUNT = Struct("!h").pack(len(RESTORED))
