"""Parquet: one column for each of the record's, compressed with zstd, a row group for each page.

Payloads are JSON text, since every event's is another; times are ``timestamp[us, UTC]``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from tracevault.errors import ConfigError
from tracevault.events.json_text import json_text
from tracevault.events.record import BY_NAME, RECORD_COLUMNS, AuditRecord

try:
    import pyarrow
    from pyarrow import parquet
except ImportError as error:
    message = 'Parquet needs the extra "parquet": pip install "tracevault[parquet]"'
    raise ConfigError(message, field="format") from error

_TYPES = {"jsonb": pyarrow.string(), "timestamp with time zone": pyarrow.timestamp("us", tz="UTC")}
SCHEMA = pyarrow.schema(
    [
        pyarrow.field(name, _TYPES.get(BY_NAME[name].column.sql_type, pyarrow.string()), BY_NAME[name].nullable)
        for name in RECORD_COLUMNS
    ]
)


class Parquet:
    """Makes a Parquet file, row group by row group."""

    takes_lines = False
    resumable = False  # its end tells where everything stands

    def __init__(self) -> None:
        self._pending = io.BytesIO()
        self._taken = 0
        self._writer = parquet.ParquetWriter(self._pending, SCHEMA, compression="zstd")

    def begin(self) -> bytes:
        """Return the magic bytes."""
        return self._drained()

    def page(self, rows: Sequence[AuditRecord]) -> bytes:
        """Return a row group."""
        if rows:
            columns = {name: [_value(name, getattr(row, name)) for row in rows] for name in RECORD_COLUMNS}
            self._writer.write_table(pyarrow.table(columns, schema=SCHEMA))
        return self._drained()

    def end(self) -> bytes:
        """Return the footer."""
        self._writer.close()
        return self._drained()

    def _drained(self) -> bytes:
        # The writer asks its file where it stands, so what was taken stays counted.
        content = self._pending.getvalue()[self._taken :]
        self._taken += len(content)
        return content


def _value(name: str, value: Any) -> Any:
    if value is None:
        return None
    sql_type = BY_NAME[name].column.sql_type
    return json_text(value) if sql_type == "jsonb" else str(value) if sql_type == "uuid" else value
