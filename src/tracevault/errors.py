"""Everything tracevault raises on purpose.

::

    TracevaultError
    ├── ConfigError          an option is wrong; nothing was started          .field
    ├── ValidationError      an event or a filter is wrong; nothing written   .field
    │   └── QueryError       a query text is wrong, at a place               .column .pointer
    ├── DriverError          the database refused or could not be reached     .sqlstate .transient
    │   └── OutcomeUnknownError    the connection broke; the event may exist  .id
    ├── MigrationError       the table is not ours, or not ready
    ├── DuplicateIdError     this id is taken by another event                .id
    ├── QueueFullError       the async queue is full and ``on_full`` is strict
    ├── SpoolError           the spool cannot be used
    ├── KeyStoreError        the store of data keys cannot be used
    ├── UndeliveredError     flush or close leave records behind              .lost .spooled .pending
    ├── ProofError           a note, checkpoint or proof does not verify
    ├── SealError            the log cannot be sealed
    │   └── RollbackError    ROLLBACK DETECTED: the log is not the one that was signed
    └── ArchiveError         an archive cannot be read or written

A message names the field in back quotes, the rule, the offending value (shortened to 64 characters, never
one below a masked key) and what to do. PostgreSQL's DETAIL, which can quote a row, and passwords are in no
message and in no chained exception.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID


class TracevaultError(Exception):
    """The root of the tree. Raised as itself for lifecycle mistakes, such as use after ``close()``."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as message and fields, so that an error reaches another process whole."""
        return _unpickled, (type(self), self.args, self.__dict__)


def _unpickled(kind: type[TracevaultError], args: tuple[Any, ...], fields: dict[str, Any]) -> TracevaultError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class ConfigError(TracevaultError):
    """An option is missing, unknown or wrong. ``field`` is its name."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ValidationError(TracevaultError):
    """An event or a filter breaks a rule. ``field`` is the path of the offender: ``data.items[3].price``."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class QueryError(ValidationError):
    """A query text is wrong. ``column`` says where, counted from 1; ``pointer`` shows it, in two lines.

    ``length`` is how many characters are meant; ``text`` is the query.
    """

    def __init__(self, message: str, *, text: str, column: int, length: int) -> None:
        super().__init__(f"column {column}: {message}", field="query")
        self.text = text
        self.column = column
        self.length = length

    @property
    def pointer(self) -> str:
        """The part of the query around the place, and under it carets; what does not print is a question mark."""
        begin = max(0, self.column - 1 - 40)
        shown = "".join(c if c.isprintable() else "?" for c in self.text[begin : begin + 76])
        length = max(1, min(self.length, len(shown) - (self.column - 1 - begin)))
        return f"{shown}\n{' ' * (self.column - 1 - begin)}{'^' * length}"


class DriverError(TracevaultError):
    """The database refused, or could not be reached. Nothing was written and nothing will be.

    ``sqlstate`` is PostgreSQL's five characters, or None where it gave none. ``transient`` is True where
    trying again later can help (connection failures, deadlocks, a full disk), False where somebody has to
    change something first. ``row`` is the place of the refused event in a batch, counted from 0, where
    PostgreSQL says it. The cause is chained, without the parts that can quote a row.
    """

    def __init__(
        self, message: str, *, sqlstate: str | None = None, transient: bool = False, row: int | None = None
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.transient = transient
        self.row = row


class OutcomeUnknownError(DriverError):
    """The connection broke after the event was sent, or the spool could not be synced: it may be stored, or not.

    Emit again with ``id=error.id`` and the same content: that stores it once, whatever happened before.
    For ``emit_many`` it is the first id; the batch is stored whole or not at all.
    """

    def __init__(self, message: str, *, id: UUID, sqlstate: str | None = None) -> None:  # noqa: A002
        super().__init__(message, sqlstate=sqlstate, transient=True)
        self.id = id


class MigrationError(TracevaultError):
    """The audit table cannot be used or upgraded as it stands. The message says what differs."""


class DuplicateIdError(TracevaultError):
    """An event with this ``id`` is stored already, and its content differs from this one."""

    def __init__(self, message: str, *, id: UUID) -> None:  # noqa: A002
        super().__init__(message)
        self.id = id


class QueueFullError(TracevaultError):
    """The queue, or the spool, is full: at once with ``on_full="raise"``, after ``timeout`` with "block"."""


class SpoolError(TracevaultError):
    """The spool's folder or file cannot be used: a right is missing, the disk fails. The event was not kept."""


class KeyStoreError(TracevaultError):
    """The key store of `encrypt_fields` cannot be used: a right is missing, it fails, or a key in it is damaged."""


class UndeliveredError(TracevaultError):
    """``flush()`` or ``close()`` ended with records that are not in the database.

    ``lost`` counts those that were not stored and will not be by themselves, since the last report: each was
    given to ``on_error``, or dropped as ``on_full="drop_newest"`` asked; with a spool the refused ones are kept
    there as dead letters. ``spooled`` counts those that wait in the spool, and ``pending`` those that wait in
    memory alone, when time ran out.
    """

    def __init__(self, message: str, *, lost: int = 0, pending: int = 0, spooled: int = 0) -> None:
        super().__init__(message)
        self.lost = lost
        self.pending = pending
        self.spooled = spooled


class ProofError(TracevaultError):
    """A signed note, a checkpoint or a proof is malformed, or does not verify. Nothing it claims may be believed."""


class SealError(TracevaultError):
    """The log cannot be sealed: keys, rights or tables are missing, or an anchor contradicts the database."""


class RollbackError(SealError):
    """ROLLBACK DETECTED: the database does not extend what was signed before, so nothing more is signed.

    It was restored from a backup, or changed. An operator decides: repair it, or open a new epoch.
    """


class ArchiveError(TracevaultError):
    """An archive cannot be read or written, or holds something else than it should."""
