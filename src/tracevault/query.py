"""Reading: `AsyncQuery` and `AuditQuery`, side by side. Each reads one audit table; ``flows`` say what is read."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import aclosing, closing
from datetime import date, datetime, timedelta
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, BinaryIO, Literal, Self, TypeVar, Unpack
from uuid import UUID

from tracevault.engine import AsyncEngine, BlockingEngine
from tracevault.events.history import History, history
from tracevault.events.record import AuditRecord
from tracevault.flows import Flow, aggregate
from tracevault.flows import read as read_flows
from tracevault.flows.aggregate import Facets, Histogram
from tracevault.flows.read import Count, Page, Walk
from tracevault.flows.tail import Follower, follower, step
from tracevault.postgres.failures import Place
from tracevault.schema.filters import CountFilters, FindFilters, PageFilters
from tracevault.schema.position import Position
from tracevault.schema.restriction import EVERYTHING, Restriction, restriction
from tracevault.transfer.manifest import FormatName, Manifest

if TYPE_CHECKING:
    from tracevault.transfer.file import ExportBytes

T = TypeVar("T")
Moment = datetime | date | str

# Rows that a follower takes at once.
_STEP = 500
# Events that an export reads in one transaction.
_EXPORTED = 50_000
# Seconds between looks at the log, where nothing tells that there is something new.
_LOOK = 0.5


# --------------------------------------------------------------------------------------------- async


class AsyncQuery:
    """Reads one audit table. Belongs to the event loop that started the vault."""

    def __init__(self, engine: AsyncEngine, scope: str, table: str, seen: Restriction = EVERYTHING) -> None:
        self._engine = engine
        self._scope = scope
        self._table = table
        self._seen = seen
        self._place = Place("read", scope, table)

    def restricted(self, *, tenant_ids: Collection[str] | None = None, hidden: Collection[str] = ()) -> AsyncQuery:
        """Return a query that sees the events of these tenants alone, and not what is ``hidden``.

        Events of no tenant are not seen either, unless ``tenant_ids`` is None. ``hidden`` are columns, which read as
        None, and paths in payloads such as ``data.card.number``, which are left out, as are their copies in what
        `emit_diff` stored; paths go through objects, not lists. A filter that looks at something hidden is refused:
        its answer would give it away. Applied in SQL. Raises `ValidationError`.
        """
        seen = restriction(tenant_ids, hidden)
        return AsyncQuery(self._engine, self._scope, self._table, self._seen.narrowed(seen))

    async def find_many(self, **filters: Unpack[FindFilters]) -> list[AuditRecord]:
        """Return the events for which every filter holds, newest first, 50 of them unless ``limit`` says else.

        Raises `ValidationError` for an unknown or wrong filter, and for None: a forgotten value must not widen
        an audit query. The docs list the filters.
        """
        return await self._records(lambda: read_flows.find_many(self._table, filters, self._seen))

    async def find_by_id(self, id: UUID | str) -> AuditRecord | None:  # noqa: A002
        """Return the event with this id (a UUID, or its 36 characters), or None."""
        record = await self._read(lambda: read_flows.find_by_id(self._table, id, self._seen))
        await self._engine.decrypt([] if record is None else [record])
        return record

    async def find_page(self, **filters: Unpack[PageFilters]) -> Page:
        """Return a page of events, and the cursor of the next one, to be passed as ``cursor`` with the same filters.

        However deep, a page costs as much as the first. The cursor is text that may be shown: it says where to go on,
        and grants nothing. Raises `ValidationError`, also for a cursor that was changed or made for other filters.
        """
        return await self._page(read_flows.walk(self._table, filters, self._seen))

    def pages(
        self, *, page_size: int = 500, order: Literal["desc", "asc"] = "desc", **filters: Unpack[CountFilters]
    ) -> AsyncIterator[Page]:
        """Iterate over all pages of 1 to 10,000 events, each read in a short transaction of its own.

        Newest first it ends at the oldest event; with ``order="asc"`` at what was the newest one when it began.
        """
        return self._pages(read_flows.long_walk(self._table, filters, page_size, order, self._seen))

    async def _pages(self, walk: Walk) -> AsyncIterator[Page]:
        while True:
            page = await self._page(walk)
            yield page
            if page.next_cursor is None:
                return
            walk = read_flows.next_walk(walk, page.next_cursor)

    def iterate(
        self, *, page_size: int = 500, order: Literal["desc", "asc"] = "desc", **filters: Unpack[CountFilters]
    ) -> AsyncIterator[AuditRecord]:
        """Iterate over all events, like `pages`."""
        return self._rows(self.pages(page_size=page_size, order=order, **filters))

    async def _rows(self, pages: AsyncIterator[Page]) -> AsyncIterator[AuditRecord]:
        async for page in pages:
            for record in page.rows:
                yield record

    async def count(self, *, at_most: int | None = None, **filters: Unpack[CountFilters]) -> Count:
        """Return how many events there are for which every filter holds.

        It counts exactly, so it may take long; with ``at_most`` it stops there, and says so: ``str()`` of it is
        "10,000 or more" then.
        """
        return await self._read(lambda: read_flows.count(self._table, filters, at_most, self._seen))

    async def estimate(self, **filters: Unpack[CountFilters]) -> int:
        """Return about how many events there are, as PostgreSQL's planner believes. Reads none of them."""
        return await self._read(lambda: read_flows.estimate(self._table, filters, self._seen))

    async def histogram(
        self,
        interval: str | timedelta,
        *,
        timeout: float = aggregate.DEFAULT_SECONDS,
        at_most: int = aggregate.DEFAULT_AT_MOST,
        **filters: Unpack[CountFilters],
    ) -> Histogram:
        """Count events by time, from ``since`` (required) to ``until`` (now, unless given).

        ``interval`` is "minute", "hour", "day", "week" or "month" of UTC, or a timedelta; at most 2,000 buckets. The
        newest ``at_most`` events are counted, and the result says if there are more. Raises `DriverError` if that takes
        more than ``timeout`` seconds.
        """
        return await self._engine.read(
            lambda: aggregate.histogram(self._table, interval, filters, timeout, at_most, self._seen),
            self._place,
            transaction=True,
        )

    async def facets(
        self,
        field: str,
        *,
        top: int = 50,
        timeout: float = aggregate.DEFAULT_SECONDS,
        at_most: int = aggregate.DEFAULT_AT_MOST,
        **filters: Unpack[CountFilters],
    ) -> Facets:
        """Count events by the values of ``field``, since ``since`` (required); the ``top`` (1-1,000) most frequent.

        Bounded like `histogram`.
        """
        return await self._engine.read(
            lambda: aggregate.facets(self._table, field, filters, top, timeout, at_most, self._seen),
            self._place,
            transaction=True,
        )

    async def history(
        self,
        target_type: str,
        target_id: str,
        *,
        at: Moment | None = None,
        limit: int = 1000,
    ) -> History:
        """Return the changes of the target with this type and id, oldest first, with the fields that changed.

        ``at`` is the last moment that is looked at; ``state`` of the result is what the target was like then, as far as
        `emit_diff` events tell. The newest ``limit`` (1-10,000) changes are read.
        """
        records = await self._records(
            lambda: read_flows.history(self._table, target_type, target_id, at, limit, self._seen)
        )
        return history(records[limit - 1 :: -1], is_complete=len(records) <= limit)

    async def trace(self, correlation_id: str, *, limit: int = 500) -> list[AuditRecord]:
        """Return the events of one operation, oldest first, at most ``limit`` (1-10,000) of them."""
        return await self._records(lambda: read_flows.trace(self._table, correlation_id, limit, self._seen))

    def tail(self, *, after: str | None = None, follow: bool = True, **filters: Unpack[CountFilters]) -> AsyncTail:
        """Follow the log: iterate over events as they are stored, in an order in which none is ever skipped.

        It begins now, or behind ``after``: the ``position`` of a tail before, or "beginning". With ``follow=False`` it
        ends where there is nothing more for the present. See `AsyncTail`.
        """
        return AsyncTail(self, follower(self._table, filters, after, self._seen), follow=follow)

    async def export(
        self,
        target: str | os.PathLike[str] | BinaryIO,
        format: FormatName = "jsonl",  # noqa: A002
        *,
        order: Literal["asc", "desc"] = "asc",
        raw: bool = False,
        resume: bool = False,
        progress: Callable[[int], None] = lambda _rows: None,
        **filters: Unpack[CountFilters],
    ) -> Manifest:
        """Write all events for which the filters hold to a file, oldest first, and return its `Manifest`.

        ``target`` is a path, or a file that takes bytes. ``format`` is "jsonl" (a JSON object a line, every column,
        numbers exact), "csv" (cells that a spreadsheet could take for a formula are defused, unless ``raw``), "ocsf"
        (OCSF 1.3 as JSON Lines) or "parquet" (the extra of that name). A name that ends with ``.gz`` is compressed.

        Memory stays constant. The file takes its place whole; until then it is ``NAME.part``. An export that was
        interrupted goes on there with ``resume=True``; not so a Parquet file. ``progress`` is told how many events are
        written. Raises `ConfigError`, `ValidationError`, `DriverError`, and `OSError` where the file cannot be written.
        """
        from tracevault.transfer.file import begin_export  # noqa: PLC0415 - `import tracevault` need not wait for it

        walk = read_flows.long_walk(self._table, filters, read_flows.MAX_PAGE, order, self._seen)
        begin = partial(begin_export, target, format, walk, filters, raw=raw, resume=resume)
        file, walk = await asyncio.to_thread(begin, lines=not self._engine.decrypts)
        try:
            rest = await self._read(lambda: read_flows.begin_walk(walk))
            while rest is not None:
                found = 0
                async with aclosing(self._engine.stream(file.query(rest, _EXPORTED), self._place)) as batches:
                    async for rows in batches:
                        records = file.records(rows)
                        await self._engine.decrypt(records)
                        rest = await asyncio.to_thread(file.add, rest, rows, records)
                        found += len(rows)
                        progress(file.rows)
                if found < _EXPORTED:
                    break
            return await asyncio.to_thread(file.finish)
        except BaseException:
            await asyncio.to_thread(file.interrupt)
            raise

    def exported(
        self,
        format: FormatName = "jsonl",  # noqa: A002
        *,
        order: Literal["asc", "desc"] = "asc",
        raw: bool = False,
        **filters: Unpack[CountFilters],
    ) -> AsyncIterator[bytes]:
        """Iterate over the bytes of what `export` would write to a file, for a response that is streamed."""
        from tracevault.transfer.file import ExportBytes  # noqa: PLC0415 - `import tracevault` need not wait for it
        from tracevault.transfer.formats import format_of  # noqa: PLC0415

        walk = read_flows.long_walk(self._table, filters, read_flows.MAX_PAGE, order, self._seen)
        return self._exported(walk, ExportBytes(format_of(format, raw=raw, lines=not self._engine.decrypts)))

    async def _exported(self, walk: Walk, out: ExportBytes) -> AsyncIterator[bytes]:
        yield out.begin()
        rest = await self._read(lambda: read_flows.begin_walk(walk))
        while rest is not None:
            found = 0
            async with aclosing(self._engine.stream(out.query(rest, _EXPORTED), self._place)) as batches:
                async for rows in batches:
                    records = out.records(rows)
                    await self._engine.decrypt(records)
                    yield await asyncio.to_thread(out.page, rows, records)
                    found += len(rows)
                    rest = read_flows.walk_after(rest, rows[-1]) if rows else rest
            if found < _EXPORTED:
                break
        yield out.end()

    async def _page(self, walk: Walk) -> Page:
        page = await self._read(lambda: read_flows.find_page(walk))
        await self._engine.decrypt(page.rows)
        return page

    async def _records(self, flow: Callable[[], Flow[list[AuditRecord]]]) -> list[AuditRecord]:
        records = await self._read(flow)
        await self._engine.decrypt(records)
        return records

    async def _read(self, flow: Callable[[], Flow[T]]) -> T:
        return await self._engine.read(flow, self._place)


class AsyncTail:
    """An endless async iterator over events as they are stored; ``position`` is the place of the last one it gave.

    A row comes once its transaction has committed, however late that is, and never twice. Keep ``position``, and pass
    it as ``after`` to go on there: in another process, or years later. A new event is found within half a second, or
    0.1 s where the option ``notify`` is on.
    """

    def __init__(self, query: AsyncQuery, follower: Follower, *, follow: bool) -> None:
        self._query = query
        self._follower = follower
        self._follow = follow
        self._reached: Position | None = None
        self._ahead: Iterator[tuple[AuditRecord, Position]] = iter(())
        self._after_all: Position | None = None
        self._at_end = False
        self._listener = query._engine.listener(follower.table)

    @property
    def position(self) -> str | None:
        """Where it stands, as text to keep; None before the log was looked at for the first time."""
        return None if self._reached is None else str(self._reached)

    def __aiter__(self) -> Self:
        """Return itself, ready to look again if it had ended."""
        self._at_end = False
        return self

    async def __anext__(self) -> AuditRecord:
        """Return the next event, when there is one."""
        while True:
            found = next(self._ahead, None)
            if found is not None:
                record, self._reached = found
                return record
            self._reached = self._after_all
            if self._at_end and not self._follow:
                raise StopAsyncIteration
            if self._at_end:
                await self._listener.wait(_LOOK)
            await self._look()

    async def start(self) -> Self:
        """Look at the log once, so that `position` is known, and what is stored from now on will come."""
        if self._after_all is None:
            await self._look()
        return self

    async def aclose(self) -> None:
        """Let go of the connection that it listens on, if it has one; for whoever stops iterating."""
        await self._listener.close()

    async def _look(self) -> None:
        query = self._query
        found = await query._read(lambda: step(self._follower, self._after_all, _STEP))
        await query._engine.decrypt([record for record, _ in found.rows])
        self._reached = found.begun if found.rows else found.position
        self._ahead, self._after_all, self._at_end = iter(found.rows), found.position, found.at_end


# ------------------------------------------------------------------------------------------ blocking


class AuditQuery:
    """Reads one audit table. Safe from any thread."""

    def __init__(self, engine: BlockingEngine, scope: str, table: str, seen: Restriction = EVERYTHING) -> None:
        self._engine = engine
        self._scope = scope
        self._table = table
        self._seen = seen
        self._place = Place("read", scope, table)

    def restricted(self, *, tenant_ids: Collection[str] | None = None, hidden: Collection[str] = ()) -> AuditQuery:
        """Like `AsyncQuery.restricted`."""
        seen = restriction(tenant_ids, hidden)
        return AuditQuery(self._engine, self._scope, self._table, self._seen.narrowed(seen))

    def find_many(self, **filters: Unpack[FindFilters]) -> list[AuditRecord]:
        """Like `AsyncQuery.find_many`."""
        return self._records(lambda: read_flows.find_many(self._table, filters, self._seen))

    def find_by_id(self, id: UUID | str) -> AuditRecord | None:  # noqa: A002
        """Like `AsyncQuery.find_by_id`."""
        record = self._read(lambda: read_flows.find_by_id(self._table, id, self._seen))
        self._engine.decrypt([] if record is None else [record])
        return record

    def find_page(self, **filters: Unpack[PageFilters]) -> Page:
        """Like `AsyncQuery.find_page`."""
        return self._page(read_flows.walk(self._table, filters, self._seen))

    def pages(
        self, *, page_size: int = 500, order: Literal["desc", "asc"] = "desc", **filters: Unpack[CountFilters]
    ) -> Iterator[Page]:
        """Like `AsyncQuery.pages`."""
        return self._pages(read_flows.long_walk(self._table, filters, page_size, order, self._seen))

    def _pages(self, walk: Walk) -> Iterator[Page]:
        while True:
            page = self._page(walk)
            yield page
            if page.next_cursor is None:
                return
            walk = read_flows.next_walk(walk, page.next_cursor)

    def iterate(
        self, *, page_size: int = 500, order: Literal["desc", "asc"] = "desc", **filters: Unpack[CountFilters]
    ) -> Iterator[AuditRecord]:
        """Like `AsyncQuery.iterate`."""
        return self._rows(self.pages(page_size=page_size, order=order, **filters))

    def _rows(self, pages: Iterator[Page]) -> Iterator[AuditRecord]:
        for page in pages:
            yield from page.rows

    def count(self, *, at_most: int | None = None, **filters: Unpack[CountFilters]) -> Count:
        """Like `AsyncQuery.count`."""
        return self._read(lambda: read_flows.count(self._table, filters, at_most, self._seen))

    def estimate(self, **filters: Unpack[CountFilters]) -> int:
        """Like `AsyncQuery.estimate`."""
        return self._read(lambda: read_flows.estimate(self._table, filters, self._seen))

    def histogram(
        self,
        interval: str | timedelta,
        *,
        timeout: float = aggregate.DEFAULT_SECONDS,
        at_most: int = aggregate.DEFAULT_AT_MOST,
        **filters: Unpack[CountFilters],
    ) -> Histogram:
        """Like `AsyncQuery.histogram`."""
        return self._engine.read(
            lambda: aggregate.histogram(self._table, interval, filters, timeout, at_most, self._seen),
            self._place,
            transaction=True,
        )

    def facets(
        self,
        field: str,
        *,
        top: int = 50,
        timeout: float = aggregate.DEFAULT_SECONDS,
        at_most: int = aggregate.DEFAULT_AT_MOST,
        **filters: Unpack[CountFilters],
    ) -> Facets:
        """Like `AsyncQuery.facets`."""
        return self._engine.read(
            lambda: aggregate.facets(self._table, field, filters, top, timeout, at_most, self._seen),
            self._place,
            transaction=True,
        )

    def history(
        self,
        target_type: str,
        target_id: str,
        *,
        at: Moment | None = None,
        limit: int = 1000,
    ) -> History:
        """Like `AsyncQuery.history`."""
        records = self._records(lambda: read_flows.history(self._table, target_type, target_id, at, limit, self._seen))
        return history(records[limit - 1 :: -1], is_complete=len(records) <= limit)

    def trace(self, correlation_id: str, *, limit: int = 500) -> list[AuditRecord]:
        """Like `AsyncQuery.trace`."""
        return self._records(lambda: read_flows.trace(self._table, correlation_id, limit, self._seen))

    def tail(self, *, after: str | None = None, follow: bool = True, **filters: Unpack[CountFilters]) -> Tail:
        """Like `AsyncQuery.tail`."""
        return Tail(self, follower(self._table, filters, after, self._seen), follow=follow)

    def export(
        self,
        target: str | os.PathLike[str] | BinaryIO,
        format: FormatName = "jsonl",  # noqa: A002
        *,
        order: Literal["asc", "desc"] = "asc",
        raw: bool = False,
        resume: bool = False,
        progress: Callable[[int], None] = lambda _rows: None,
        **filters: Unpack[CountFilters],
    ) -> Manifest:
        """Like `AsyncQuery.export`."""
        from tracevault.transfer.file import begin_export  # noqa: PLC0415 - `import tracevault` need not wait for it

        walk = read_flows.long_walk(self._table, filters, read_flows.MAX_PAGE, order, self._seen)
        begin = partial(begin_export, target, format, walk, filters, raw=raw, resume=resume)
        file, walk = begin(lines=not self._engine.decrypts)
        try:
            rest = self._read(lambda: read_flows.begin_walk(walk))
            while rest is not None:
                found = 0
                with closing(self._engine.stream(file.query(rest, _EXPORTED), self._place)) as batches:
                    for rows in batches:
                        records = file.records(rows)
                        self._engine.decrypt(records)
                        rest = file.add(rest, rows, records)
                        found += len(rows)
                        progress(file.rows)
                if found < _EXPORTED:
                    break
            return file.finish()
        except BaseException:
            file.interrupt()
            raise

    def exported(
        self,
        format: FormatName = "jsonl",  # noqa: A002
        *,
        order: Literal["asc", "desc"] = "asc",
        raw: bool = False,
        **filters: Unpack[CountFilters],
    ) -> Iterator[bytes]:
        """Like `AsyncQuery.exported`."""
        from tracevault.transfer.file import ExportBytes  # noqa: PLC0415 - `import tracevault` need not wait for it
        from tracevault.transfer.formats import format_of  # noqa: PLC0415

        walk = read_flows.long_walk(self._table, filters, read_flows.MAX_PAGE, order, self._seen)
        return self._exported(walk, ExportBytes(format_of(format, raw=raw, lines=not self._engine.decrypts)))

    def _exported(self, walk: Walk, out: ExportBytes) -> Iterator[bytes]:
        yield out.begin()
        rest = self._read(lambda: read_flows.begin_walk(walk))
        while rest is not None:
            found = 0
            with closing(self._engine.stream(out.query(rest, _EXPORTED), self._place)) as batches:
                for rows in batches:
                    records = out.records(rows)
                    self._engine.decrypt(records)
                    yield out.page(rows, records)
                    found += len(rows)
                    rest = read_flows.walk_after(rest, rows[-1]) if rows else rest
            if found < _EXPORTED:
                break
        yield out.end()

    def _page(self, walk: Walk) -> Page:
        page = self._read(lambda: read_flows.find_page(walk))
        self._engine.decrypt(page.rows)
        return page

    def _records(self, flow: Callable[[], Flow[list[AuditRecord]]]) -> list[AuditRecord]:
        records = self._read(flow)
        self._engine.decrypt(records)
        return records

    def _read(self, flow: Callable[[], Flow[T]]) -> T:
        return self._engine.read(flow, self._place)


class Tail:
    """An endless iterator over events as they are stored; like `AsyncTail`. `close` ends it, from any thread."""

    def __init__(self, query: AuditQuery, follower: Follower, *, follow: bool) -> None:
        self._query = query
        self._follower = follower
        self._follow = follow
        self._reached: Position | None = None
        self._ahead: Iterator[tuple[AuditRecord, Position]] = iter(())
        self._after_all: Position | None = None
        self._at_end = False
        self._closed = Event()
        self._listener = query._engine.listener(follower.table, self._closed)

    @property
    def position(self) -> str | None:
        """Like `AsyncTail.position`."""
        return None if self._reached is None else str(self._reached)

    def __iter__(self) -> Self:
        """Return itself, ready to look again if it had ended."""
        self._at_end = False
        return self

    def __next__(self) -> AuditRecord:
        """Return the next event, when there is one."""
        while True:
            found = next(self._ahead, None)
            if found is not None:
                record, self._reached = found
                return record
            self._reached = self._after_all
            if self._closed.is_set() or (self._at_end and not self._follow):
                self._listener.close()
                raise StopIteration
            if self._at_end:
                self._listener.wait(_LOOK)
            if not self._closed.is_set():
                self._look()

    def close(self) -> None:
        """End the iteration, also one that waits in another thread."""
        self._closed.set()

    def start(self) -> Self:
        """Like `AsyncTail.start`."""
        if self._after_all is None:
            self._look()
        return self

    def _look(self) -> None:
        query = self._query
        found = query._read(lambda: step(self._follower, self._after_all, _STEP))
        query._engine.decrypt([record for record, _ in found.rows])
        self._reached = found.begun if found.rows else found.position
        self._ahead, self._after_all, self._at_end = iter(found.rows), found.position, found.at_end
