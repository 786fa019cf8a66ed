"""What an export tells of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

FormatName = Literal["jsonl", "csv", "ocsf", "parquet"]


@dataclass(frozen=True)
class Manifest:
    """What an export is of, and what makes its file recognizable.

    ``bytes`` and ``sha256`` (64 hex digits) are the file's, ``filters`` are a query text, ``created_at`` is ISO 8601.
    """

    format: str
    table: str
    filters: str
    order: str
    rows: int
    first_id: str | None
    last_id: str | None
    bytes: int
    sha256: str
    created_at: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON would hold it."""
        return asdict(self)
