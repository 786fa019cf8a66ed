"""What is said to the database, as pure generators.

A flow yields statements and is sent their results; it never sees a connection and never says BEGIN or COMMIT.
`tracevault.postgres.run` drives one over a blocking or an async connection; an error of the database is thrown
into it as a `DriverError`. Statements use PostgreSQL's own ``$1`` placeholders.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, NamedTuple, TypeVar


class Query(NamedTuple):
    """One statement and its parameters; ``reads`` is False for one that returns no rows."""

    sql: str
    params: tuple[Any, ...] = ()
    reads: bool = True


class Copy(NamedTuple):
    """One ``COPY ... FROM STDIN (FORMAT binary)``, and the bytes of its stream."""

    sql: str
    stream: Iterable[bytes]


class Result(NamedTuple):
    """What a statement returned: its rows (empty for one that returns none), and how many it touched."""

    rows: list[tuple[Any, ...]]
    touched: int


T = TypeVar("T")
Flow = Generator[Query | Copy, Result, T]
