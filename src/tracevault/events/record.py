"""The record: one field per column of the audit table. THE column table; everything else derives from it.

DDL and migrations (``schema``), INSERT and COPY and SELECT (``flows``), limits (``events.prepare``), filters'
limits, and the table in ``docs/data-model.md`` are all read off the annotations below. To change a column,
change it here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints
from uuid import UUID

Mode = Literal["sync", "async"]
MODES: tuple[str, ...] = get_args(Mode)

# Identity ids and types share an index entry with 24 other bytes; a B-tree entry holds about 2,700.
IDENTITY_BYTES = 2500

# Set by PostgreSQL, not part of AuditRecord: which transaction stored the row (readers that follow the log
# go by snapshots), and the salt of the payload commitment (so that a hash never gives a small secret away).
STORED_XID = "stored_xid"
PAYLOAD_SALT = "payload_salt"


@dataclass(frozen=True)
class Column:
    """How one field is stored. ``since`` is the number of the migration that adds the column."""

    sql_type: str
    help: str
    limit: int | None = None
    """Most characters the field may hold."""
    default: str | None = None
    """SQL expression; a column with one is set by PostgreSQL, never by an INSERT of ours."""
    generated: tuple[str, ...] | None = None
    """Path inside ``data`` that PostgreSQL extracts into this column (STORED)."""
    since: int = 1
    leaf: int | None = None
    """Tag of the field in what is hashed of a row (``integrity.leaf``): never changed, never given to another."""


@dataclass(frozen=True)
class Actor:
    """Who did it. ``id`` and ``type``: 1-512 characters each, together at most 2,500 bytes of UTF-8."""

    id: str
    type: str


@dataclass(frozen=True)
class Target:
    """What it was done to. ``id`` and ``type``: 1-512 characters each, together at most 2,500 bytes of UTF-8."""

    id: str
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One stored event, as ``audit.query`` returns it and ``on_error`` receives it.

    Times are aware, in UTC. A stored time outside Python's years 1-9999, which other writers can produce,
    reads as ``datetime.max`` or ``datetime.min`` in UTC. In ``data`` and ``meta`` a JSON integer is an
    ``int`` (beyond the 4,300 digits that Python converts a ``Decimal``); another number is a ``float`` if that
    float prints the same number, else a ``Decimal``.
    ``created_at`` is None only in a record that was not stored (``on_error``).
    """

    id: Annotated[UUID, Column("uuid", "UUIDv7 made by `emit`, or the caller's own", leaf=2)]
    event: Annotated[str, Column("character varying", "what happened: `product.price.updated`", 255, leaf=5)]
    actor_id: Annotated[str | None, Column("character varying", "who did it", 512, leaf=6)] = None
    actor_type: Annotated[str | None, Column("character varying", "kind of actor: `user`, `service`", 512, leaf=7)] = (
        None
    )
    target_id: Annotated[str | None, Column("character varying", "what it was done to", 512, leaf=8)] = None
    target_type: Annotated[str | None, Column("character varying", "kind of target: `product`", 512, leaf=9)] = None
    data: Annotated[dict[str, Any] | None, Column("jsonb", "the event's own payload, masked", leaf=100)] = None
    meta: Annotated[
        dict[str, Any] | None, Column("jsonb", "circumstances: address, agent, source; masked", leaf=101)
    ] = None
    mode: Annotated[Mode, Column("character varying", "how it was written: `sync` or `async`", leaf=10)] = "sync"
    occurred_at: Annotated[
        datetime, Column("timestamp with time zone", "when it happened, by the writer's clock", leaf=3)
    ]
    created_at: Annotated[
        datetime | None,
        Column("timestamp with time zone", "when it was stored, by the database's clock", default="now()", leaf=4),
    ] = None
    correlation_id: Annotated[str | None, Column("character varying", "ties events of one operation", 512, leaf=11)] = (
        None
    )
    request_id: Annotated[str | None, Column("character varying", "the request that caused it", 512, leaf=12)] = None
    environment: Annotated[str | None, Column("character varying", "`production`, `staging`", 128, leaf=13)] = None
    outcome: Annotated[
        str | None,
        Column("character varying(64)", "from `data.outcome`", 64, generated=("outcome",), since=2),
    ] = None
    error_code: Annotated[
        str | None,
        Column("character varying(255)", "from `data.error.code`", 255, generated=("error", "code"), since=2),
    ] = None
    severity: Annotated[
        str | None,
        Column("character varying(32)", "from `data.severity`", 32, generated=("severity",), since=3),
    ] = None
    tenant_id: Annotated[
        str | None, Column("character varying", "the customer it belongs to", 255, since=4, leaf=14)
    ] = None
    trace_id: Annotated[
        str | None, Column("character varying", "W3C trace id, 32 hex digits", 32, since=4, leaf=15)
    ] = None
    span_id: Annotated[str | None, Column("character varying", "W3C span id, 16 hex digits", 16, since=4, leaf=16)] = (
        None
    )

    @property
    def actor(self) -> Actor | None:
        """``actor_id`` and ``actor_type`` together, or None if either is missing."""
        if self.actor_id is None or self.actor_type is None:
            return None
        return Actor(self.actor_id, self.actor_type)

    @property
    def target(self) -> Target | None:
        """``target_id`` and ``target_type`` together, or None if either is missing."""
        if self.target_id is None or self.target_type is None:
            return None
        return Target(self.target_id, self.target_type)


class StoredColumn(NamedTuple):
    """A column as the rest of the package uses it: its name, its ``Column``, and whether it may be NULL."""

    name: str
    column: Column
    nullable: bool


def _stored_columns() -> tuple[StoredColumn, ...]:
    hints = get_type_hints(AuditRecord, include_extras=True)
    columns = []
    for field in fields(AuditRecord):
        kind, column = get_args(hints[field.name])
        optional = get_origin(kind) in (Union, UnionType) and type(None) in get_args(kind)
        # created_at is optional in Python alone: a record that failed to be stored has none.
        columns.append(StoredColumn(field.name, column, optional and column.default is None))
    columns.append(
        StoredColumn(
            STORED_XID,
            Column("xid8", "transaction that stored the row", default="pg_current_xact_id()", since=4),
            nullable=True,
        )
    )
    columns.append(
        StoredColumn(
            PAYLOAD_SALT,
            Column("uuid", "random salt of the payload's hash", default="gen_random_uuid()", since=4),
            nullable=True,
        )
    )
    return tuple(columns)


COLUMNS = _stored_columns()
BY_NAME = {column.name: column for column in COLUMNS}
RECORD_COLUMNS = tuple(field.name for field in fields(AuditRecord))
INSERT_COLUMNS = tuple(name for name, column, _ in COLUMNS if column.default is None and column.generated is None)
GENERATED_COLUMNS = tuple(stored for stored in COLUMNS if stored.column.generated is not None)


def limit_of(name: str) -> int:
    """Most characters that field ``name`` may hold."""
    limit = BY_NAME[name].column.limit
    assert limit is not None, f"{name} has no limit"
    return limit
