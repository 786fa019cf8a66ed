"""Errors of psycopg and the pool become ours: what went wrong, where, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any
from uuid import UUID

import psycopg
import psycopg_pool
from psycopg import AsyncConnection, Connection

from tracevault.errors import DriverError, DuplicateIdError, OutcomeUnknownError, TracevaultError
from tracevault.events.rules import shorten

# Classes and codes for which trying again later can help. PostgreSQL, appendix A.
_TRANSIENT_CLASSES = ("08", "53", "57", "58")
_TRANSIENT_CODES = frozenset({"25006", "40001", "40003", "40P01", "55P03"})
# The record itself is refused, and always would be.
_RECORD_CLASSES = ("22", "23")
_RECORD_CODES = frozenset({"54000", "P0001"})
# The session is not what we think it is: a pooler gave us another one, a statement or transaction was lost.
_SESSION_CODES = frozenset({"26000", "42P05", "25P01", "25P02"})
# Role, database, schema, table, column or right are missing, or are not what the statement needs.
_OPERATOR_CLASSES = ("28", "3D", "3F", "42")
# The server ends the session, and has perhaps said so before the socket is closed.
_SESSION_ENDED = frozenset({"57P01", "57P02", "57P03", "57P04", "57P05"})

_SCHEMA_ADVICE = "create or upgrade it with `tracevault migrate`, or start with bootstrap={'ensure_schema': True}"
_ADVICE = {
    "42P01": f"the table does not exist, or search_path does not lead to it: {_SCHEMA_ADVICE}",
    "42703": f"the table lacks a column: {_SCHEMA_ADVICE}",
    "3F000": "the schema does not exist: create it, or correct search_path",
    "42501": "the role lacks a right: writing needs INSERT on the table, reading needs SELECT",
    "28P01": "the role or its password is refused: correct the connection string",
    "28000": "the role is refused: correct the connection string, or the server's pg_hba.conf",
    "3D000": "the database does not exist: create it, or correct the connection string",
    "53300": "the server has no connection left: raise max_connections, or use fewer",
    "57P03": "the server is starting up or shutting down: try again",
    "25006": "the server is read-only, perhaps a standby: connect to the primary",
    "57014": "it took longer than `timeout`: is the table locked, or the server overloaded?",
    "25P02": "the transaction has failed already: roll it back",
}
# Where the server says which row of a COPY it refused. In every language the number stands there.
_COPY_LINE = re.compile(r"^COPY [^,\n]+, \D*(\d+)", re.MULTILINE)
# What libpq asks the reader; we ask it ourselves, once.
_LIBPQ_QUESTION = re.compile(r" Is the server running [^?]*\?")
# libpq reports why a connection failed in words alone. English ones, since that is what servers speak by default.
_CONNECT_STATES = (
    (re.compile(r"password authentication failed|no password supplied"), "28P01"),
    (re.compile(r'role ".*" does not exist|no pg_hba\.conf entry|not permitted to log in'), "28000"),
    (re.compile(r'database ".*" does not exist'), "3D000"),
    (re.compile(r"too many (clients|connections)|remaining connection slots"), "53300"),
    (re.compile(r"the database system is"), "57P03"),
    (re.compile(r"permission denied for database"), "42501"),
)


@dataclass(frozen=True)
class Place:
    """Where an error happened, for its message."""

    doing: str
    scope: str | None = None
    table: str | None = None

    def __str__(self) -> str:
        """Name the scope and the table, as far as there are any."""
        where = [f"scope `{self.scope}`"] if self.scope else []
        where += [f"table `{self.table}`"] if self.table else []
        return f"{self.doing} ({', '.join(where)})" if where else self.doing


def is_transient(sqlstate: str | None) -> bool:
    """Whether trying again later can help."""
    return sqlstate is not None and (sqlstate[:2] in _TRANSIENT_CLASSES or sqlstate in _TRANSIENT_CODES)


class Failure(Enum):
    """What a failed write calls for."""

    TRANSIENT = "try again, ever less often"
    SESSION = "try again at once, in a new session"
    SLOW = "try again with less"
    OPERATOR = "somebody has to change something: keep everything, and look from time to time"
    REFUSED = "the record itself is refused, and always would be; no other one is concerned"


def failure_of(error: Exception) -> Failure:
    """Return what ``error`` calls for. What is not known is transient: nothing is dropped from ignorance."""
    if not isinstance(error, DriverError):
        return Failure.REFUSED if isinstance(error, DuplicateIdError) else Failure.TRANSIENT
    state, cause = error.sqlstate, error.__cause__
    if cause is None:
        # Found by us, not by PostgreSQL: something in the database keeps the row out.
        return Failure.TRANSIENT if error.transient else Failure.REFUSED
    if state is None:
        # psycopg could not say it. Anything else without a code is not the record's fault.
        return Failure.REFUSED if isinstance(cause, psycopg.DataError) else Failure.TRANSIENT
    if state == "57014":
        return Failure.SLOW
    if state in _SESSION_CODES or (state == "0A000" and "cached plan" in str(error)):
        return Failure.SESSION
    if state == "23514" and "no partition" in str(error):
        return Failure.OPERATOR
    if state[:2] in _RECORD_CLASSES or state in _RECORD_CODES:
        return Failure.REFUSED
    return Failure.OPERATOR if state[:2] in _OPERATOR_CLASSES else Failure.TRANSIENT


def is_broken(connection: Connection[Any] | AsyncConnection[Any], error: TracevaultError) -> bool:
    """Whether the connection went away, so that nobody can tell how far the statement came."""
    state = getattr(error, "sqlstate", None) or ""
    return connection.closed or state.startswith("08") or state in _SESSION_ENDED


def from_psycopg(error: psycopg.Error, place: Place) -> DriverError:
    """Return our error for one of psycopg's, chained to it without DETAIL, HINT and CONTEXT."""
    clean = _clean(error)
    sqlstate = clean.sqlstate or _connect_state(str(clean))
    # Without a code, libpq or psycopg raised it: OperationalError is about the connection, others about us.
    connection_failed = sqlstate is None and isinstance(error, psycopg.OperationalError)
    message = f"{place} failed: {shorten(str(clean), 300)}"
    if sqlstate:
        message += f" [SQLSTATE {sqlstate}]"
    if sqlstate in _ADVICE:
        message += f"; {_ADVICE[sqlstate]}"
    elif connection_failed:
        message += "; is the server up, and the address right?"
    transient = connection_failed or is_transient(sqlstate)
    line = _COPY_LINE.search(error.diag.context or "")
    row = int(line[1]) - 1 if line else None
    driver_error = DriverError(message, sqlstate=sqlstate, transient=transient, row=row)
    driver_error.__cause__ = clean
    return driver_error


@contextmanager
def translated(place: Place) -> Iterator[None]:
    """Translate psycopg's errors in the block, those of BEGIN and COMMIT; those of flows are ours already."""
    try:
        yield
    except psycopg.Error as error:
        failure = from_psycopg(error, place)
    else:
        return
    raise failure


def outcome_unknown(error: DriverError, id_: UUID, place: Place) -> OutcomeUnknownError:
    """Return the error for a write whose connection broke before PostgreSQL confirmed it."""
    unknown = OutcomeUnknownError(
        f"{place}: the connection broke before PostgreSQL confirmed it, so the event may or may not be stored; "
        f"emit it again with the same content and id={str(id_)!r} to have it once",
        id=id_,
        sqlstate=error.sqlstate,
    )
    unknown.__cause__ = error.__cause__
    return unknown


def from_pool(error: Exception, place: Place, last: BaseException | None, seconds: float) -> TracevaultError:
    """Return our error for a pool that gave no connection; ``last`` is why its last attempt to connect failed."""
    if isinstance(error, psycopg_pool.PoolClosed):
        return TracevaultError(f"{place}: the vault or its pool is closed")
    if isinstance(last, psycopg.Error):
        return from_psycopg(last, place)
    if last is not None:  # of a caller's `writer_connect`
        what = str(last) if isinstance(last, TracevaultError) else type(last).__name__
        return DriverError(f"{place} failed: {what}", transient=True)
    return DriverError(
        f"{place} failed: no connection became free within {seconds:g} s; raise the pool's max_size or `timeout`",
        transient=True,
    )


def _clean(error: psycopg.Error) -> psycopg.Error:
    """Copy an error without what can quote a row: DETAIL and CONTEXT, which psycopg appends to the text."""
    primary = error.diag.message_primary
    if primary is None:
        # Raised by libpq or psycopg: a connection failure, which may list one line per address tried.
        primary = _LIBPQ_QUESTION.sub("", " ".join(str(error).split()))
    clean = type(error)(primary)
    if clean.sqlstate is None and error.sqlstate is not None:
        clean.sqlstate = error.sqlstate
    return clean


def _connect_state(message: str) -> str | None:
    return next((state for pattern, state in _CONNECT_STATES if pattern.search(message)), None)
