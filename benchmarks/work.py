"""What is measured: the example event, through a vault and by hand, on one server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import adapters
from psycopg.adapt import Dumper
from psycopg.pq import Format

from tracevault.events.ids import uuid7
from tracevault.events.mask import masked_names
from tracevault.events.payload import Encoder
from tracevault.events.prepare import Settings, prepare
from tracevault.events.record import BY_NAME, INSERT_COLUMNS

EVENT = "product.price.updated"
DATA = {"old_price": 120, "new_price": 150}
META = {"ip": "127.0.0.1"}
FIELDS: dict[str, Any] = {
    "actor": {"id": "user_123", "type": "user"},
    "target": {"id": "product_456", "type": "product"},
    "data": DATA,
    "meta": META,
    "correlation_id": "req_abc",
}
MASK_FIELDS = ["password", "token", "pin"]
SETTINGS = Settings(Encoder(masked_names(MASK_FIELDS), "[REDACTED]", 262_144), "production", "sync")

_PLACES = ", ".join("%s" for _ in INSERT_COLUMNS)
INSERT = f"INSERT INTO audit_logs ({', '.join(INSERT_COLUMNS)}) VALUES ({_PLACES})".encode()
COPY = f"COPY audit_logs ({', '.join(INSERT_COLUMNS)}) FROM STDIN (FORMAT binary)".encode()
TYPES = tuple(BY_NAME[name].column.sql_type for name in INSERT_COLUMNS)


@dataclass(frozen=True)
class Bench:
    """Where to measure, how many pairs, and a folder for what the rows write."""

    conninfo: str
    folder: Path
    pairs: int

    def options(self, **more: Any) -> dict[str, Any]:
        """Return the options of a vault with everything switched on."""
        return {
            "connection_string": self.conninfo,
            "mask_fields": MASK_FIELDS,
            "environment": "production",
            "timeout": 60,
            **more,
        }

    def empty(self) -> None:
        """Empty the table, so that each row starts with the same indexes."""
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute("TRUNCATE audit_logs")
            connection.execute("CHECKPOINT")


class JsonText(Dumper):
    """JSON text that is ready, in the binary form of ``jsonb``: a version, then the text."""

    format = Format.BINARY
    oid = adapters.types["jsonb"].oid

    def dump(self, obj: str) -> bytes:
        return b"\x01" + obj.encode()


def ready_row() -> tuple[Any, ...]:
    """Return a row that needs no more work."""
    return prepare(EVENT, FIELDS, SETTINGS).row


def ready_rows(count: int) -> list[tuple[Any, ...]]:
    row = ready_row()[1:]
    return [(uuid7(), *row) for _ in range(count)]


def copy_by_hand(connection: psycopg.Connection[Any], rows: Sequence[tuple[Any, ...]]) -> None:
    """Store ``rows`` by one binary COPY in one transaction."""
    connection.adapters.register_dumper(JsonText, JsonText)
    with connection.cursor() as cursor, cursor.copy(COPY) as copy:
        copy.set_types(TYPES)
        for row in rows:
            copy.write_row(row)
