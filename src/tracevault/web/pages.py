"""The pages: what each asks the log, and gives its template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

from tracevault import (
    AsyncQuery,
    AsyncScope,
    AuditRecord,
    DriverError,
    Histogram,
    SealError,
    TracevaultError,
    ValidationError,
    format_query,
    parse_query,
)
from tracevault.events.history import field_changes
from tracevault.events.json_text import json_record, json_text
from tracevault.events.rules import moment
from tracevault.schema.query_text import complete_query
from tracevault.web import show
from tracevault.web.access import EXPORTED, VIEWED, Access, Guard

T = TypeVar("T")

PAGE = 50
# A histogram is drawn of so many events at most, and must not make a page wait.
_DRAWN = 20_000
_DRAWING_SECONDS = 0.05
_READING_SECONDS = 10
# Characters of a query up to which links repeat it.
_REPEATED = 300
_CHANGES = 100
_TRACED = 200
_DEFAULT_WINDOW = timedelta(days=30)
SPANS = ("1h", "24h", "7d", "30d")
THEMES = ("light", "dark")
_THEME = "tracevault-theme"
# A page that waits for new events asks again after so many seconds; streams are so many at most.
_STREAM_SECONDS = 600.0
_STREAM_LOOK = 1.0
_STREAMS = 100
_EXPORTS = {"jsonl": ("application/x-ndjson", "jsonl"), "csv": ("text/csv; charset=utf-8", "csv")}


@dataclass(frozen=True)
class _Seen:
    """A request, with what it may see."""

    request: Request
    access: Access
    scope: AsyncScope
    query: AsyncQuery

    def link(self, *parts: str, **params: str | None) -> str:
        """Return a link to a page of this scope, under whatever prefix the app is mounted."""
        path = "/".join((root_of(self.request), "s", _quoted(self.scope.name), *map(_quoted, parts)))
        given = {name: value for name, value in params.items() if value}
        return path + (f"?{urlencode(given)}" if given else "")


def root_of(request: Request) -> str:
    """Return where the app is mounted, as it stands in links."""
    return quote(str(request.scope.get("root_path", "")))


def _quoted(part: str) -> str:
    return quote(part, safe="")


class Pages:
    """The handlers of all routes."""

    def __init__(self, guard: Guard, title: str, static: Mapping[str, str]) -> None:
        self._guard = guard
        self._streams = 0
        environment = Environment(
            loader=PackageLoader("tracevault.web"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(
            visible=show.visible, shortened=show.shortened, iso=show.iso, clock=show.clock, ago=show.ago, tree=show.tree
        )
        environment.globals.update(also=show.also, identity=show.identity_query)
        environment.globals.update(title=title, static=dict(static), spans=SPANS, page_size=PAGE)
        self._templates = {name: environment.get_template(name) for name in environment.list_templates(["html"])}

    async def home(self, request: Request) -> Response:
        """Lead to the first log that may be seen."""
        access = await self._guard.access(request)
        scopes = self._guard.scopes(access)
        if not scopes:
            raise HTTPException(403, "You may not see any audit log here.")
        return RedirectResponse(f"{root_of(request)}/s/{_quoted(scopes[0])}")

    async def theme(self, request: Request) -> Response:
        """Remember light or dark."""
        chosen = request.query_params.get("to")  # no body is read: nobody has said yet who sends it
        answer = RedirectResponse(_back(request), status_code=303)
        if chosen in THEMES:
            path = root_of(request) or "/"
            answer.set_cookie(_THEME, chosen, max_age=31_536_000, path=path, httponly=True, samesite="lax")
        return answer

    # ------------------------------------------------------------------------------------- the list

    async def events(self, request: Request) -> Response:
        """List events, newest first."""
        seen = await self._seen(request)
        text = request.query_params.get("q", "")
        try:
            filters = parse_query(text)
            page = await _in_time(seen.query.find_page(limit=PAGE, **_cursor(request), **filters))
        except ValidationError as error:
            return self._page(request, "events.html", 400, seen=seen, text=text, problem=error, **_nothing())
        await self._guard.note(seen.access, seen.scope, VIEWED, {"query": text})
        return self._page(
            request,
            "events.html",
            seen=seen,
            text=text,
            problem=None,
            # A long query is not repeated in every link: a click then begins a new one.
            filters=filters if len(text) <= _REPEATED else {},
            rows=page.rows,
            # A span back from now is another one with each request, and a cursor belongs to its filters.
            older=page.next_cursor and seen.link(q=format_query(filters), cursor=page.next_cursor),
            first=not request.query_params.get("cursor"),
            chips=show.chips(filters),
            drawing=await self._drawing(seen.query, filters, linked=len(text) <= _REPEATED),
            within=partial(show.within, filters),
        )

    async def _drawing(
        self, query: AsyncQuery, filters: Mapping[str, Any], *, linked: bool = True
    ) -> show.Drawing | None:
        """Return the histogram of a query's window, or None where that would take too long."""
        until = moment(filters["until"], "until") if "until" in filters else datetime.now(UTC)
        since = moment(filters["since"], "since") if "since" in filters else until - _DEFAULT_WINDOW
        if "text" in filters or since >= until:
            return None
        window = {**filters, "since": since, "until": until}
        try:
            found = await query.histogram(
                show.bar_width(since, until), at_most=_DRAWN, timeout=_DRAWING_SECONDS, **window
            )
            estimates = {} if found.is_complete else await _in_time(self._estimates(query, window, found))
        except (DriverError, HTTPException):
            return None
        return show.drawing(found, filters, estimates, linked=linked)

    async def _estimates(self, query: AsyncQuery, window: Mapping[str, Any], found: Histogram) -> dict[datetime, int]:
        """Return what the planner believes of the buckets that were not counted."""
        estimates = {}
        for bucket in found.buckets:
            if bucket.start <= found.counted_since:
                until = bucket.end - timedelta(microseconds=1)
                estimates[bucket.start] = await query.estimate(**{**window, "since": bucket.start, "until": until})
        return estimates

    async def keys(self, request: Request) -> Response:
        """Suggest how the word under the cursor could go on."""
        await self._seen(request)
        text = request.query_params.get("q", "")[:4096]
        return JSONResponse(complete_query(text, len(text))[:20])

    async def new(self, request: Request) -> Response:
        """Stream how many events came since the page was made, as server-sent events."""
        seen = await self._seen(request)
        try:
            filters = parse_query(request.query_params.get("q", ""))
            tail = seen.query.tail(follow=False, **filters)
        except ValidationError as error:
            raise HTTPException(400, str(error)) from None
        if self._streams >= _STREAMS:
            raise HTTPException(503, "Too many pages wait for new events.")
        return StreamingResponse(
            self._counts(request, tail), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )

    async def _counts(self, request: Request, tail: Any) -> AsyncIterator[str]:
        self._streams += 1
        count, ends = 0, asyncio.get_running_loop().time() + _STREAM_SECONDS
        try:
            await _in_time(tail.start())
            yield "retry: 5000\n\n"
            while asyncio.get_running_loop().time() < ends and not await request.is_disconnected():
                before = count
                async for record in tail:
                    count += record.event != VIEWED
                yield f"data: {count}\n\n" if count != before else ": nothing new\n\n"
                await asyncio.sleep(_STREAM_LOOK)
        except (TracevaultError, HTTPException):
            return  # the browser asks again
        finally:
            self._streams -= 1

    async def export(self, request: Request) -> Response:
        """Stream what a query finds as a file."""
        seen = await self._seen(request)
        kind = request.query_params.get("format", "jsonl")
        if not seen.access.may_export:
            raise HTTPException(403, "You may see this log, but not export from it.")
        if kind not in _EXPORTS:
            raise HTTPException(400, "There is no export of this format here.")
        text = request.query_params.get("q", "")
        try:
            out = seen.query.exported(kind, order="desc", **parse_query(text))  # type: ignore[arg-type]
        except ValidationError as error:
            raise HTTPException(400, str(error)) from None
        await self._guard.note(seen.access, seen.scope, EXPORTED, {"query": text, "format": kind})
        media_type, ending = _EXPORTS[kind]
        name = f"{seen.scope.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.{ending}"
        name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)
        return StreamingResponse(
            out, media_type=media_type, headers={"Content-Disposition": f'attachment; filename="{name}"'}
        )

    # ---------------------------------------------------------------------------------- single pages

    async def event(self, request: Request) -> Response:
        """Show one event."""
        seen = await self._seen(request)
        record = await self._record(seen)
        await self._guard.note(seen.access, seen.scope, VIEWED, {"event_id": str(record.id)})
        return self._page(
            request,
            "event.html",
            seen=seen,
            record=record,
            diff=show.side_by_side(field_changes(record.data)),
            proof=await self._proof(seen, record),
        )

    async def _proof(self, seen: _Seen, record: AuditRecord) -> tuple[str, str, str] | None:
        """Return how an event stands in the sealed log, in a word and in full; None where that is not sealed."""
        try:
            proof = await _in_time(seen.scope.prove(record.id))
        except SealError as error:
            why = str(error)
            if "was never sealed" in why:
                return None
            waiting = "not sealed yet" in why or "is signed yet" in why
            return ("warn", "not sealed yet", why) if waiting else ("bad", "does not verify", why)
        except DriverError as error:
            return "warn", "not checked", str(error)
        return "good", "sealed", f"leaf {proof.index:,} of {proof.checkpoint.size:,} under a signed checkpoint"

    async def raw(self, request: Request) -> Response:
        """Return one event as JSON."""
        seen = await self._seen(request)
        record = await self._record(seen)
        await self._guard.note(seen.access, seen.scope, VIEWED, {"event_id": str(record.id)})
        return Response(json_text(json_record(record)), media_type="application/json")

    async def _record(self, seen: _Seen) -> AuditRecord:
        try:
            record = await _in_time(seen.query.find_by_id(seen.request.path_params["id"]))
        except ValidationError:
            record = None
        if record is None:
            raise HTTPException(404, "There is no such event, or you may not see it.")
        return record

    async def actor(self, request: Request) -> Response:
        """Show what one actor did."""
        return await self._of(request, "actor")

    async def target(self, request: Request) -> Response:
        """Show what became of one target."""
        seen = await self._seen(request)
        type_, id_ = _identity(request)
        try:
            at = request.query_params.get("at") or None
            history = await _in_time(seen.query.history(type_, id_, at=at, limit=_CHANGES))
        except ValidationError as error:
            raise HTTPException(400, str(error)) from None
        query = show.also({}, target_type=type_, target_id=id_, until=at)
        await self._guard.note(seen.access, seen.scope, VIEWED, {"query": query})
        return self._page(
            request,
            "target.html",
            seen=seen,
            type=type_,
            id=id_,
            at=at,
            history=history,
            changes=show.changes(history),
            query=query,
        )

    async def _of(self, request: Request, role: str) -> Response:
        seen = await self._seen(request)
        type_, id_ = _identity(request)
        filters: dict[str, Any] = {f"{role}_type": type_, f"{role}_id": id_}
        try:
            page = await _in_time(seen.query.find_page(limit=PAGE, **_cursor(request), **filters))
            query = show.also({}, **filters)
            since = datetime.now(UTC) - _DEFAULT_WINDOW
            facets = await self._facets(seen.query, {**filters, "since": since})
            drawing = await self._drawing(seen.query, filters)
        except ValidationError as error:
            raise HTTPException(400, str(error)) from None
        await self._guard.note(seen.access, seen.scope, VIEWED, {"query": query})
        return self._page(
            request,
            "actor.html",
            seen=seen,
            type=type_,
            id=id_,
            rows=page.rows,
            older=page.next_cursor and seen.link(role, type=type_, id=id_, cursor=page.next_cursor),
            filters=filters,
            facets=facets,
            drawing=drawing,
            query=query,
        )

    async def _facets(self, query: AsyncQuery, filters: Mapping[str, Any]) -> Any:
        try:
            return await query.facets("event", top=8, at_most=_DRAWN, timeout=_DRAWING_SECONDS, **filters)
        except DriverError:
            return None

    async def trace(self, request: Request) -> Response:
        """Show the events of one operation."""
        seen = await self._seen(request)
        id_ = request.query_params.get("id", "")
        try:
            rows = await _in_time(seen.query.trace(id_, limit=_TRACED + 1))
            query = show.also({}, correlation_id=id_)
        except ValidationError as error:
            raise HTTPException(400, str(error)) from None
        await self._guard.note(seen.access, seen.scope, VIEWED, {"query": query})
        return self._page(
            request,
            "trace.html",
            seen=seen,
            id=id_,
            rows=rows[:_TRACED],
            cut=len(rows) > _TRACED,
            query=query,
            filters={},
        )

    # --------------------------------------------------------------------------------------- shared

    async def _seen(self, request: Request) -> _Seen:
        access = await self._guard.access(request)
        return _Seen(request, access, *self._guard.scope(access, request.path_params["scope"]))

    def _page(self, request: Request, template: str, code: int = 200, /, **values: Any) -> HTMLResponse:
        theme = request.cookies.get(_THEME)
        seen: _Seen | None = values.get("seen")
        html = self._templates[template].render(
            **values,
            root=root_of(request),
            theme=theme if theme in THEMES else None,
            here=request.url.path + (f"?{request.url.query}" if request.url.query else ""),
            scopes=[] if seen is None else self._guard.scopes(seen.access),
            now=datetime.now(UTC),
        )
        return HTMLResponse(html, status_code=code)

    async def error(self, request: Request, status: int, why: str) -> Response:
        """Show what went wrong."""
        return self._page(request, "error.html", status, status=status, why=why)


async def _in_time(reading: Awaitable[T]) -> T:
    """Return what is read; a reader's question must not keep the application's connections for long."""
    try:
        async with asyncio.timeout(_READING_SECONDS):
            return await reading
    except TimeoutError:
        why = f"The database took longer than {_READING_SECONDS} seconds. Narrow the time range, or add a filter."
        raise HTTPException(503, why) from None


def _cursor(request: Request) -> dict[str, Any]:
    cursor = request.query_params.get("cursor")
    return {"cursor": cursor} if cursor else {}


def _identity(request: Request) -> tuple[str, str]:
    return request.query_params.get("type", ""), request.query_params.get("id", "")


def _nothing() -> dict[str, Any]:
    """Return what a list shows where its query is wrong."""
    return {"filters": {}, "rows": [], "older": None, "first": True, "chips": [], "drawing": None, "within": None}


def _back(request: Request) -> str:
    """Return the page that a form was sent from, if it is one of this app."""
    back = request.query_params.get("back", "")
    root = root_of(request) or "/"
    inside = back.startswith(root) and not back.startswith("//") and "\\" not in back and back.isprintable()
    return back if inside else root
