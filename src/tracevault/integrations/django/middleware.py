"""A context for each request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.utils.decorators import sync_and_async_middleware

from tracevault import ContextFields, context, current_context
from tracevault.integrations.django.conf import Conf, conf
from tracevault.integrations.request import ReadRequest, is_id, request_reader

_HEADER = "X-Correlation-Id"


@sync_and_async_middleware
def AuditMiddleware(get_response: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:  # noqa: N802
    """Open a `tracevault.context` for each request, and answer with its correlation id.

    The actor is ``request.user``, or what the setting says, asked for when an event is emitted; so it does not matter
    where in MIDDLEWARE this stands. A streamed answer has the context as well.
    """
    settings = conf()
    read = request_reader(settings.trusted_proxies)

    def opened(request: HttpRequest) -> context:
        return context(partial(_fields, request, settings, read), inherit=False)

    if iscoroutinefunction(get_response):

        async def asynchronous(request: HttpRequest) -> HttpResponseBase:
            with (around := opened(request)):
                return _answered(await get_response(request), around)

        return asynchronous

    def blocking(request: HttpRequest) -> HttpResponseBase:
        with (around := opened(request)):
            return _answered(get_response(request), around)

    return blocking


def _fields(request: HttpRequest, settings: Conf, read: ReadRequest) -> ContextFields:
    fields = read(request.headers.get, request.META.get("REMOTE_ADDR") or None)
    fields["actor"] = partial(settings.actor or user_of, request)
    if settings.tenant_id is not None:
        fields["tenant_id"] = partial(settings.tenant_id, request)
    return fields


def user_of(request: HttpRequest) -> dict[str, str] | None:
    """Return the authenticated user as an actor."""
    user = getattr(request, "user", None)
    return {"id": str(user.pk), "type": "user"} if user is not None and user.is_authenticated else None


def _answered(response: Any, around: context) -> HttpResponseBase:
    id_ = current_context("correlation_id").get("correlation_id", "")
    if is_id(id_.encode()):
        response.headers.setdefault(_HEADER, id_)
    if response.streaming:
        pieces = response.streaming_content
        wrapped = _async_pieces(pieces, around) if response.is_async else _pieces(pieces, around)
        response.streaming_content = wrapped
    return response


# A generator has no context of its own, so each piece is made inside of ours.


def _pieces(pieces: Iterator[bytes], around: context) -> Iterator[bytes]:
    while True:
        with around:
            try:
                piece = next(pieces)
            except StopIteration:
                return
        yield piece


async def _async_pieces(pieces: AsyncIterator[bytes], around: context) -> AsyncIterator[bytes]:
    while True:
        with around:
            try:
                piece = await anext(pieces)
            except StopAsyncIteration:
                return
        yield piece
