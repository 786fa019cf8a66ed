"""Audit events for Python on PostgreSQL: emit, keep, prove, read."""

try:
    import psycopg as _psycopg  # noqa: F401 - first, to say what to do where it cannot work
except ImportError as error:
    message = (
        'tracevault needs psycopg with libpq: pip install "tracevault[binary]" brings both, '
        "Debian's libpq5 is enough as well"
    )
    raise ImportError(message) from error

from importlib import import_module
from typing import TYPE_CHECKING

from tracevault.errors import (
    ArchiveError,
    ConfigError,
    DriverError,
    DuplicateIdError,
    KeyStoreError,
    MigrationError,
    OutcomeUnknownError,
    ProofError,
    QueryError,
    QueueFullError,
    RollbackError,
    SealError,
    SpoolError,
    TracevaultError,
    UndeliveredError,
    ValidationError,
)
from tracevault.events.catalog import DeclaredEvent, DeclaredField, catalog, declare, event
from tracevault.events.context import ContextFields, context, current_context, propagation_headers, set_context
from tracevault.events.correlation import (
    random_correlation_id,
    read_correlation_id_header,
    resolve_correlation_id,
)
from tracevault.events.data_key import KeyStore
from tracevault.events.diff import compute_diff
from tracevault.events.event import AuditEvent
from tracevault.events.history import Change, FieldChange, History
from tracevault.events.mask import DEFAULT_MASK_VALUE, mask
from tracevault.events.record import Actor, AuditRecord, Target
from tracevault.events.trace import read_traceparent_header
from tracevault.flows.aggregate import Bucket, Facet, Facets, Histogram
from tracevault.flows.read import Count, Page
from tracevault.integrity.report import Report, Verdict
from tracevault.query import AsyncQuery, AsyncTail, AuditQuery, Tail
from tracevault.schema.ddl import generate_init_sql
from tracevault.schema.indexes import DOCUMENTED_SEVERITY_LEVELS, SEVERITIES_FOR_ERRORS_ONLY_FILTER
from tracevault.vault import (
    AsyncScope,
    AsyncTracevault,
    AsyncUnitOfWork,
    Receipt,
    Scope,
    Tracevault,
    UnitOfWork,
    start_tracevault,
    verify_export,
)
from tracevault.writer.stats import Stats

if TYPE_CHECKING:
    from tracevault.archive.search import Archive
    from tracevault.integrity.event_proof import EventProof, verify_proof
    from tracevault.schema.query_text import format_query, parse_query
    from tracevault.sealing.key_store import DirectoryKeyStore
    from tracevault.transfer.manifest import Manifest

# Not every program needs these, and each takes its time to be imported: they are when they are asked for.
_LATER = {
    "Archive": "tracevault.archive.search",
    "DirectoryKeyStore": "tracevault.sealing.key_store",
    "EventProof": "tracevault.integrity.event_proof",
    "Manifest": "tracevault.transfer.manifest",
    "format_query": "tracevault.schema.query_text",
    "parse_query": "tracevault.schema.query_text",
    "verify_proof": "tracevault.integrity.event_proof",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_LATER[name]), name)
    return found


__all__ = [
    "DEFAULT_MASK_VALUE",
    "DOCUMENTED_SEVERITY_LEVELS",
    "SEVERITIES_FOR_ERRORS_ONLY_FILTER",
    "Actor",
    "Archive",
    "ArchiveError",
    "AsyncQuery",
    "AsyncScope",
    "AsyncTail",
    "AsyncTracevault",
    "AsyncUnitOfWork",
    "AuditEvent",
    "AuditQuery",
    "AuditRecord",
    "Bucket",
    "Change",
    "ConfigError",
    "ContextFields",
    "Count",
    "DeclaredEvent",
    "DeclaredField",
    "DirectoryKeyStore",
    "DriverError",
    "DuplicateIdError",
    "EventProof",
    "Facet",
    "Facets",
    "FieldChange",
    "Histogram",
    "History",
    "KeyStore",
    "KeyStoreError",
    "Manifest",
    "MigrationError",
    "OutcomeUnknownError",
    "Page",
    "ProofError",
    "QueryError",
    "QueueFullError",
    "Receipt",
    "Report",
    "RollbackError",
    "Scope",
    "SealError",
    "SpoolError",
    "Stats",
    "Tail",
    "Target",
    "Tracevault",
    "TracevaultError",
    "UndeliveredError",
    "UnitOfWork",
    "ValidationError",
    "Verdict",
    "catalog",
    "compute_diff",
    "context",
    "current_context",
    "declare",
    "event",
    "format_query",
    "generate_init_sql",
    "mask",
    "parse_query",
    "propagation_headers",
    "random_correlation_id",
    "read_correlation_id_header",
    "read_traceparent_header",
    "resolve_correlation_id",
    "set_context",
    "start_tracevault",
    "verify_export",
    "verify_proof",
]

__version__ = "0.1.0"
