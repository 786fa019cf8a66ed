"""Flask: a vault of the application's config, a context for each request, the viewer under a prefix."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from tracevault import ConfigError, ContextFields, Tracevault, TracevaultError, context, current_context
from tracevault.config import config_from
from tracevault.integrations.request import REQUEST_EVENT, is_id, request_data, request_reader, selection

try:
    from flask import Flask, Response, current_app, has_request_context, request
    from werkzeug.exceptions import HTTPException
except ImportError as error:
    message = 'this needs Flask: pip install "tracevault[flask]"'
    raise ImportError(message) from error

if TYPE_CHECKING:
    from tracevault.web import Access

_log = logging.getLogger("tracevault")

_KEY = "tracevault"
_HEADER = "X-Correlation-Id"


class Audit:
    """The extension: ``audit = Audit(); audit.init_app(app)``, or ``Audit(app)``.

    ``app.config["TRACEVAULT"]`` holds the options of `tracevault.Tracevault`. ``actor`` and ``tenant_id`` are functions
    without arguments, called when an event is emitted; the default actor is Flask-Login's ``current_user``, where that
    is in use. ``trusted_proxies`` and ``audit_requests`` are as of ``AuditMiddleware``.

    What the vault can, this can: ``audit.emit(...)``, ``audit.unit_of_work()``, ``audit.query``, inside of an
    application's context. The vault is opened when it is first asked for, and survives the fork of a server's workers.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        actor: Callable[[], Any] | None = None,
        tenant_id: Callable[[], Any] | None = None,
        trusted_proxies: Iterable[str] = (),
        audit_requests: Iterable[str] = (),
    ) -> None:
        self._actor = actor or _logged_in
        self._tenant_id = tenant_id
        self._read = request_reader(trusted_proxies)
        self._audited = selection(audit_requests)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give each request of ``app`` a context. `ConfigError` names what is wrong in its config."""
        options = app.config.get("TRACEVAULT")
        if not isinstance(options, Mapping):
            raise ConfigError(
                'app.config["TRACEVAULT"] must hold the options of a vault: {"connection_string": ...}',
                field="TRACEVAULT",
            )
        app.extensions[_KEY] = _Vault(options)
        inner = app.wsgi_app
        app.wsgi_app = lambda environ, start: self._serve(inner, app, environ, start)  # type: ignore[assignment, method-assign]

    @property
    def vault(self) -> Tracevault:
        """The current application's vault."""
        try:
            held = current_app.extensions[_KEY]
        except KeyError:
            held = None
        if held is None:
            raise TracevaultError("the application is not known to `Audit`: audit.init_app(app)")
        return held.get()  # type: ignore[no-any-return]

    def mount_viewer(self, app: Flask, prefix: str, authorize: Callable[[], Access | None], **viewing: Any) -> None:
        """Show the log under ``prefix``; the extra `web` is needed.

        ``authorize()`` is called for each request, in its context, and returns the `Access` of who asks, or None; what
        it raises denies as well. ``viewing``: ``title``, ``scopes``, ``audit_reads`` of `tracevault.web.viewer`. The
        viewer runs in a thread with an event loop and a vault of its own, made of the same options.
        """
        from tracevault.integrations.hosted import Call, HostedViewer  # noqa: PLC0415 - needs the extra

        hosted = HostedViewer(lambda: app.extensions[_KEY].options, **viewing)

        def view(path: str = "") -> Response:
            call = Call(
                request.method,
                request.script_root + prefix,
                "/" + path,
                request.query_string,
                list(request.headers),
                request.get_data(),
                request.remote_addr,
            )
            answer = hosted.answer(call, _access(authorize))
            response = Response(iter(answer), answer.status, answer.headers, direct_passthrough=True)
            response.call_on_close(answer.close)
            return response

        methods = ["GET", "HEAD", "POST"]
        app.add_url_rule(f"{prefix}/", "tracevault", view, methods=methods)
        app.add_url_rule(f"{prefix}/<path:path>", "tracevault", view, methods=methods)

    def _serve(self, inner: Any, app: Flask, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        around = context(partial(self._fields, environ), inherit=False)

        def starting(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            if self._audited is not None and self._audited(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
                route = request.url_rule.rule if has_request_context() and request.url_rule is not None else None
                data = request_data(environ["REQUEST_METHOD"], environ["PATH_INFO"], route, int(status[:3]))
                app.extensions[_KEY].get().emit(REQUEST_EVENT, data=data)
            id_ = current_context("correlation_id").get("correlation_id", "")
            if is_id(id_.encode()) and all(name.lower() != _HEADER.lower() for name, _ in headers):
                headers = [*headers, (_HEADER, id_)]
            return start_response(status, headers, *error)

        with around:
            pieces = inner(environ, starting)
        return _Pieces(pieces, around)

    def _fields(self, environ: Mapping[str, Any]) -> ContextFields:
        def header(name: str) -> str | None:
            return environ.get("HTTP_" + name.upper().replace("-", "_"))

        fields = self._read(header, environ.get("REMOTE_ADDR") or None)
        fields["actor"] = self._actor
        if self._tenant_id is not None:
            fields["tenant_id"] = self._tenant_id
        return fields

    def __getattr__(self, name: str) -> Any:
        """Return what the vault has by this name: `emit`, `query`, `get_scope`, ..."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.vault, name)


class _Pieces:
    """The body of an answer, each piece of which is made inside of the request's context."""

    def __init__(self, pieces: Iterable[bytes], around: context) -> None:
        self._pieces = pieces
        self._iterator = iter(pieces)
        self._around = around

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        with self._around:
            return next(self._iterator)

    def close(self) -> None:
        close = getattr(self._pieces, "close", None)
        if close is not None:
            with self._around:  # what Flask does at the end of a request is done now
                close()


class _Vault:
    """The vault of one application, opened when it is first asked for."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        config_from(self.options)  # says now what is wrong
        self._lock = Lock()
        self._opened: Tracevault | None = None

    def get(self) -> Tracevault:
        with self._lock:
            if self._opened is None:
                self._opened = Tracevault(**self.options)
                atexit.register(self.close)
            return self._opened

    def close(self) -> None:
        if self._opened is not None:
            with suppress(TracevaultError):
                self._opened.close()


def _access(authorize: Callable[[], Any]) -> Any:
    try:
        return authorize()
    except HTTPException:
        raise
    except Exception:  # noqa: BLE001 - whatever it is, nobody gets in by it
        _log.exception("the viewer's `authorize` failed, so access is denied")
        return None


def _logged_in() -> dict[str, str] | None:
    """Return Flask-Login's user, if there is one."""
    login = sys.modules.get("flask_login")
    user = login.current_user if login is not None and has_request_context() else None
    return {"id": str(user.get_id()), "type": "user"} if user is not None and user.is_authenticated else None
