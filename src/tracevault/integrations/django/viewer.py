"""The viewer under a URL of the project; the extra `web` is needed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, StreamingHttpResponse
from django.urls import URLPattern, path
from django.views.decorators.csrf import csrf_exempt

from tracevault.integrations.django.conf import conf
from tracevault.integrations.hosted import Call, HostedViewer
from tracevault.web import Access

_log = logging.getLogger("tracevault")


def viewer_urls(authorize: Callable[[HttpRequest], Access | None], **viewing: Any) -> list[URLPattern]:
    """Return the URLs of the viewer: ``path("audit/", include(viewer_urls(authorize)))``.

    ``authorize(request)`` is called for each request and returns the `Access` of who asks, or None; what it raises
    denies as well. ``viewing``: ``title``, ``scopes``, ``audit_reads`` of `tracevault.web.viewer`. The viewer runs in a
    thread with an event loop and a vault of its own, made of the same settings.
    """
    hosted = HostedViewer(lambda: conf().vault_options(), **viewing)

    # The one thing that it takes a POST for is whether its pages are light or dark.
    @csrf_exempt
    def view(request: HttpRequest, rest: str = "") -> StreamingHttpResponse:
        call = Call(
            request.method or "GET",
            request.path.removesuffix(rest).rstrip("/"),
            "/" + rest,
            request.META.get("QUERY_STRING", "").encode("latin-1"),
            list(request.headers.items()),
            request.body,
            request.META.get("REMOTE_ADDR") or None,
        )
        answer = hosted.answer(call, _access(authorize, request))
        response = StreamingHttpResponse(answer, status=answer.status)
        for name, value in answer.headers:
            response.headers[name] = value
        return response

    return [path("", view), path("<path:rest>", view)]


def _access(authorize: Callable[[HttpRequest], Any], request: HttpRequest) -> Any:
    try:
        return authorize(request)
    except (PermissionDenied, Http404):
        raise
    except Exception:  # noqa: BLE001 - whatever it is, nobody gets in by it
        _log.exception("the viewer's `authorize` failed, so access is denied")
        return None
