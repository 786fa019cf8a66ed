"""The indexes of an audit table: each serves its filter and the order ``(occurred_at, id)``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

SEVERITIES_FOR_ERRORS_ONLY_FILTER = ("error", "critical", "fatal")
DOCUMENTED_SEVERITY_LEVELS = ("debug", "info", "notice", "warning", *SEVERITIES_FOR_ERRORS_ONLY_FILTER)

# The filter `errors_only` and the predicate of its index are one text, so that the planner matches them.
ERRORS_ONLY = "outcome = 'failure' OR severity IN ({})".format(
    ", ".join(f"'{severity}'" for severity in SEVERITIES_FOR_ERRORS_ONLY_FILTER)
)

_ORDER = ("occurred_at DESC", "id DESC")
# Up to this length every index name fits PostgreSQL's 63 bytes; the reference's bootstrap finds its own names.
_PLAIN_NAME = 35


@dataclass(frozen=True)
class Index:
    """One index: ``suffix`` makes its name, ``columns`` its keys, ``where`` its predicate."""

    suffix: str
    columns: tuple[str, ...]
    where: str | None = None
    method: str = "btree"

    def name(self, table: str) -> str:
        """Return the index's name on ``table``: ``idx_{table}_{suffix}``, hashed where that could collide."""
        return index_name(table, self.suffix)

    @property
    def access(self) -> str:
        """Return what PostgreSQL prints of the index's keys."""
        return f"USING {self.method} ({', '.join(self.columns)})"

    def definition(self, table: str) -> str:
        """Return what follows ``ON`` in CREATE INDEX."""
        where = f" WHERE {self.where}" if self.where else ""
        using = "" if self.method == "btree" else f" USING {self.method}"
        return f'"{table}"{using} ({", ".join(self.columns)}){where}'


def index_name(table: str, suffix: str) -> str:
    """Return a name of at most 63 bytes, unique per table, also for long and mixed-case table names."""
    if len(table) <= _PLAIN_NAME and table == table.lower():
        return f"idx_{table}_{suffix}"
    digest = hashlib.sha256(table.encode()).hexdigest()[:8]
    return f"idx_{table.lower()[: _PLAIN_NAME - 9]}_{digest}_{suffix}"


def temporary_name(kind: str, name: str) -> str:
    """Return what index ``name`` is called before (``kind`` new) and after (old) it has its place."""
    return f"{kind}_{hashlib.sha256(name.encode()).hexdigest()[:8]}_{name}"[:63]


def _filtered(suffix: str, column: str, *more: str) -> Index:
    return Index(suffix, (column, *_ORDER, *more), f"{column} IS NOT NULL")


INDEXES = (
    Index("occurred_at", _ORDER),
    Index("event", ("event", *_ORDER)),
    Index("event_prefix", ("event varchar_pattern_ops",)),
    # The type comes last: an id alone finds its rows in order, and the type is checked inside the index.
    _filtered("actor", "actor_id", "actor_type"),
    _filtered("target", "target_id", "target_type"),
    _filtered("correlation_occurred_id", "correlation_id"),
    _filtered("request", "request_id"),
    _filtered("outcome_occurred", "outcome"),
    _filtered("error_code_occurred", "error_code"),
    _filtered("severity_occurred", "severity"),
    Index("errors", _ORDER, ERRORS_ONLY),
    _filtered("tenant", "tenant_id"),
    _filtered("trace", "trace_id"),
    Index("stored", ("stored_xid", "id")),
)

# The primary key of a partitioned table begins with the time, so that an id alone would be looked for everywhere.
PARTITIONED_INDEXES = (*INDEXES, Index("id", ("id",)))

# Only where somebody asks for them, since they cost every insert: a table may have some or all.
PAYLOAD_INDEXES = (
    Index("data_paths", ("data jsonb_path_ops",), method="gin"),
    Index("meta_paths", ("meta jsonb_path_ops",), method="gin"),
    Index("data_changes", ("((data -> 'diff'::text))",), method="gin"),
)

# Of the reference's migration 001; its 002 replaced it.
OBSOLETE = ("correlation_occurred",)
