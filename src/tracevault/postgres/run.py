"""The two runners: a flow over a blocking, or over an async connection. They differ in ``await`` alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from datetime import UTC, datetime, timedelta
from struct import Struct
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, Connection, RawCursor, adapters
from psycopg.abc import Buffer
from psycopg.adapt import AdaptersMap, Loader
from psycopg.pq import Format
from psycopg.rows import tuple_row
from psycopg.types.string import ByteaBinaryLoader

from tracevault.errors import TracevaultError
from tracevault.flows import Copy, Flow, Query, Result
from tracevault.postgres.failures import Place, from_psycopg

T = TypeVar("T")

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECONDS = Struct("!q")


class _Timestamp(Loader):
    """Reads ``timestamptz`` as UTC; a time that Python has no datetime for becomes its last or first one."""

    format = Format.BINARY

    def load(self, data: Buffer) -> datetime:
        (microseconds,) = _MICROSECONDS.unpack(data)
        try:
            return _EPOCH + timedelta(microseconds=microseconds)
        except OverflowError:
            return (datetime.max if microseconds > 0 else datetime.min).replace(tzinfo=UTC)


# Rows that are yielded at once, and that libpq is asked for at once, which it can from version 17 on.
_BATCH = 100
_CHUNK = 100 if psycopg.capabilities.has_stream_chunked() else 1

_ADAPTERS = AdaptersMap(adapters)
_ADAPTERS.register_loader("timestamptz", _Timestamp)


class _Cursor(RawCursor[Any]):
    """A cursor with adapters of its own, whatever a caller's connection was taught."""

    @property
    def adapters(self) -> AdaptersMap:
        return _ADAPTERS


class _AsyncCursor(AsyncRawCursor[Any]):
    """A cursor with adapters of its own, whatever a caller's connection was taught."""

    @property
    def adapters(self) -> AdaptersMap:
        return _ADAPTERS


# A row whose values, but NULLs, are bytes: the binary formats of their types.
RawRow = tuple[Any, ...]

# Of whatever type a column is, or was made by somebody: its bytes.
_AS_BYTES = AdaptersMap()
_AS_BYTES.register_loader(0, ByteaBinaryLoader)


class _BytesCursor(RawCursor[Any]):
    """A cursor that decodes nothing."""

    @property
    def adapters(self) -> AdaptersMap:
        return _AS_BYTES


def run(connection: Connection[Any], flow: Flow[T], place: Place) -> T:
    """Drive ``flow`` over ``connection``; the caller answers for the transaction around it."""
    with _Cursor(connection, row_factory=tuple_row) as cursor:
        try:
            statement = next(flow)
            while True:
                try:
                    if isinstance(statement, Query):
                        cursor.execute(statement.sql.encode(), statement.params, binary=True)
                        rows = cursor.fetchall() if statement.reads and _has_rows(cursor) else []
                        result = Result(rows, cursor.rowcount)
                    else:
                        result = _copy(cursor, statement)
                except psycopg.Error as error:
                    failure = from_psycopg(error, place)
                except UnicodeEncodeError:
                    failure = from_psycopg(psycopg.DataError(_LACKS), place)
                else:
                    statement = flow.send(result)
                    continue
                statement = flow.throw(failure)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


async def run_async(connection: AsyncConnection[Any], flow: Flow[T], place: Place) -> T:
    """Drive ``flow`` over ``connection``; the caller answers for the transaction around it."""
    async with _AsyncCursor(connection, row_factory=tuple_row) as cursor:
        try:
            statement = next(flow)
            while True:
                try:
                    if isinstance(statement, Query):
                        await cursor.execute(statement.sql.encode(), statement.params, binary=True)
                        rows = await cursor.fetchall() if statement.reads and _has_rows(cursor) else []
                        result = Result(rows, cursor.rowcount)
                    else:
                        result = await _copy_async(cursor, statement)
                except psycopg.Error as error:
                    failure = from_psycopg(error, place)
                except UnicodeEncodeError:
                    failure = from_psycopg(psycopg.DataError(_LACKS), place)
                else:
                    statement = flow.send(result)
                    continue
                statement = flow.throw(failure)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def _has_rows(cursor: _Cursor | _AsyncCursor) -> bool:
    """Whether the last statement was one that returns rows. psycopg's `description` says so too, and takes 30 µs."""
    result = cursor.pgresult
    return result is not None and result.nfields > 0


class _AbandonedError(Exception):
    """Ends a COPY from our side; psycopg sends its text, which is all that the server's log is to know."""


_LACKS = "the connection's client_encoding lacks a character of the event; set it to UTF8"


def _check_encoding(connection: Connection[Any] | AsyncConnection[Any]) -> None:
    # The server would take our UTF-8 for another encoding, and store something else without a word.
    if connection.info.encoding != "utf-8":
        raise psycopg.NotSupportedError("the connection's client_encoding is not UTF8; set it")


def _copy(cursor: _Cursor, statement: Copy) -> Result:
    _check_encoding(cursor.connection)
    refusal = None
    try:
        with cursor.copy(statement.sql.encode()) as copy:
            try:
                for piece in statement.stream:
                    copy.write(piece)
            except TracevaultError as error:
                refusal = error
            if refusal is not None:
                raise _AbandonedError("an event was refused")
    except _AbandonedError:
        assert refusal is not None
        raise refusal from None
    return Result([], cursor.rowcount)


def raw_rows(connection: Connection[Any], select: str, place: Place) -> Iterator[RawRow]:
    """Yield the rows of a SELECT as the server sends them, without decoding them."""
    try:
        with _BytesCursor(connection, row_factory=tuple_row) as cursor:
            yield from cursor.stream(select.encode(), binary=True, size=_CHUNK)
    except psycopg.Error as error:
        raise from_psycopg(error, place) from None


def streamed(connection: Connection[Any], query: Query, place: Place) -> Iterator[list[tuple[Any, ...]]]:
    """Yield the rows of one statement in batches, as the server sends them, so that memory holds one batch."""
    try:
        with _Cursor(connection, row_factory=tuple_row) as cursor:
            batch = []
            for row in cursor.stream(query.sql.encode(), query.params, binary=True, size=_CHUNK):
                batch.append(row)
                if len(batch) == _BATCH:
                    yield batch
                    batch = []
            yield batch
    except psycopg.Error as error:
        raise from_psycopg(error, place) from None


async def streamed_async(
    connection: AsyncConnection[Any], query: Query, place: Place
) -> AsyncGenerator[list[tuple[Any, ...]], None]:
    """Like `streamed`, on an async connection."""
    try:
        async with _AsyncCursor(connection, row_factory=tuple_row) as cursor:
            batch = []
            async for row in cursor.stream(query.sql.encode(), query.params, binary=True, size=_CHUNK):
                batch.append(row)
                if len(batch) == _BATCH:
                    yield batch
                    batch = []
            yield batch
    except psycopg.Error as error:
        raise from_psycopg(error, place) from None


async def _copy_async(cursor: _AsyncCursor, statement: Copy) -> Result:
    _check_encoding(cursor.connection)
    refusal = None
    try:
        async with cursor.copy(statement.sql.encode()) as copy:
            try:
                for piece in statement.stream:
                    await copy.write(piece)
                    await asyncio.sleep(0)  # psycopg queues the piece for a task of its own; let it be sent
            except TracevaultError as error:
                refusal = error
            if refusal is not None:
                raise _AbandonedError("an event was refused")
    except _AbandonedError:
        assert refusal is not None
        raise refusal from None
    return Result([], cursor.rowcount)
