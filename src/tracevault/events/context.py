"""What the events of one operation have in common: who acts, for which tenant, in which request.

A context is a holder in a `ContextVar`. Tasks, and threads that run in a copy of the context, share the holder, so that
what an endpoint sets is seen by the middleware around it, and the other way round; two requests never share one.

An event's own fields win over the context's, the inner context over the outer, and a context over the vault's
``context_sources``. Of a ``traceparent`` the ids are taken only where nothing else names a trace: the span that runs
here is nearer to the event than the one that called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextvars import ContextVar, Token
from inspect import iscoroutinefunction
from typing import Any, Self, TypedDict, Unpack, cast

from tracevault.errors import TracevaultError, ValidationError
from tracevault.events import rules
from tracevault.events.correlation import CORRELATION_ID_HEADER
from tracevault.events.event import Identity
from tracevault.events.identity import identity
from tracevault.events.record import Actor, limit_of
from tracevault.events.trace import TRACEPARENT_HEADER, parse_traceparent

Source = Callable[[], Mapping[str, Any] | None]


class ContextFields(TypedDict, total=False):
    """The keyword arguments of `context`. None means not given.

    Each may also be a function without arguments, which is called for each event, when it is emitted; a coroutine
    function is refused.
    """

    actor: Actor | Identity | Callable[[], Actor | Identity | None] | None
    """Who acts: ``{"id": ..., "type": ...}`` or an `Actor`."""
    on_behalf_of: Actor | Identity | Callable[[], Actor | Identity | None] | None
    """As whom the actor acts, who impersonates somebody; stored as ``meta.on_behalf_of``."""
    tenant_id: str | Callable[[], str | None] | None
    """1-255 characters."""
    correlation_id: str | Callable[[], str | None] | None
    """1-512 characters."""
    request_id: str | Callable[[], str | None] | None
    """1-512 characters."""
    traceparent: str | None
    """The caller's trace, as W3C Trace Context has it: ``trace_id`` and ``span_id`` where nothing else names them."""
    meta: dict[str, Any] | Callable[[], dict[str, Any] | None] | None
    """Circumstances; merged, key by key, with those of outer contexts and of the event."""


_LIMITS = {name: limit_of(name) for name in ("tenant_id", "correlation_id", "request_id")}
# What a source may give.
_SOURCED = frozenset({"actor", "on_behalf_of", "trace_id", "span_id", "meta", *_LIMITS})


class Holder:
    """What the `ContextVar` holds: a context's own fields, read when they are first needed, and the context around it.

    No slots: most requests of an application emit nothing, and set none of these.
    """

    outer: Holder | None = None
    fields: dict[str, Any] | None = None

    def load(self) -> Mapping[str, Any]:
        """Return the fields, which `own` checks and keeps."""
        raise NotImplementedError

    def own(self) -> dict[str, Any]:
        """Return the fields of this context alone."""
        if self.fields is None:
            self.fields = _checked(self.load())
        return self.fields


class context(Holder):  # noqa: N801 - it is used like a function: `with context(...):`
    """Give the events that are emitted inside the ``with`` block these fields, where they do not name their own.

    Contexts nest: the inner one wins, and ``meta`` is merged. ``inherit=False`` begins with nothing, as a worker or a
    task does that outlives the request which started it. Instead of fields there may be a function that returns them:
    it is called once, when they are first needed. Raises `ValidationError` for a value that no event could have, at
    once, or when the function has returned it.
    """

    def __init__(
        self,
        load: Callable[[], ContextFields] | None = None,
        /,
        *,
        inherit: bool = True,
        **fields: Unpack[ContextFields],
    ) -> None:
        """Check the fields; the context begins with the block."""
        if load is None:
            self.fields = _checked(fields)
        self._load = load
        self._inherit = inherit
        self._token: Token[Holder | None] | None = None

    def __enter__(self) -> Self:
        """Begin the context."""
        if self._token is not None:
            raise TracevaultError("the context is entered already: make another one by `tracevault.context(...)`")
        if self._inherit:
            self.outer = current.get()
        self._token = current.set(self)
        return self

    def __exit__(self, *_error: object) -> None:
        """End it."""
        token, self._token = self._token, None
        try:
            current.reset(token)  # type: ignore[arg-type] # it was entered
            return
        except ValueError:
            pass
        raise TracevaultError(
            "the context was left in another task or thread than it was entered in, so what ran in between did not "
            "see it: a framework that runs the two halves of a generator apart wants `set_context` instead"
        )

    def load(self) -> Mapping[str, Any]:
        """Call the function that returns the fields."""
        assert self._load is not None
        return cast("Mapping[str, Any]", self._load())


current: ContextVar[Holder | None] = ContextVar("tracevault_context", default=None)


def set_context(**fields: Unpack[ContextFields]) -> None:
    """Add these fields to the innermost context, until it ends: whatever shares it sees them.

    Raises `TracevaultError` where there is none: nobody would ever take the fields away again.
    """
    holder = current.get()
    if holder is None:
        raise TracevaultError("there is no context to add to: open one by `with tracevault.context(...):`")
    checked = _checked(fields)
    own = holder.own()
    meta, given = own.get("meta"), checked.get("meta")
    if meta is not None and given is not None:
        checked["meta"] = (*meta, *given)
    own.update(checked)


def current_context(*names: str) -> dict[str, Any]:
    """Return the fields that an event gets here, functions called, as plain data: all, or those of these ``names``.

    They are what `context` takes, so that it can travel in a message: ``with context(inherit=False, **received)``.
    """
    values = _gathered(names) or {}
    for name in ("actor", "on_behalf_of"):
        if name in values:
            id_, type_ = identity(values[name], name, Actor)
            values[name] = {"id": id_, "type": type_}
    if "traceparent" in values:
        values["traceparent"] = values["traceparent"][0]
    return values


def propagation_headers() -> dict[str, str]:
    """Return the headers that bring this context's correlation id and trace to the next service.

    They are what `read_correlation_id_header` and `read_traceparent_header` read there.
    """
    values = _gathered(("correlation_id", "traceparent")) or {}
    found = {CORRELATION_ID_HEADER: values.get("correlation_id")}
    if "traceparent" in values:
        found[TRACEPARENT_HEADER] = values["traceparent"][0]
    return {name: value for name, value in found.items() if value is not None}


def ambient(sources: Iterable[Source] = ()) -> dict[str, Any] | None:
    """Return the fields that context and ``sources`` give an event here; None if there are none."""
    values = _gathered()
    if values is None and not sources:
        return None
    values = _sourced(values or {}, sources)
    trace = values.pop("traceparent", None)
    if trace is not None and "trace_id" not in values:
        values["trace_id"], values["span_id"] = trace[1]
    other = values.pop("on_behalf_of", None)
    if other is not None:
        id_, type_ = identity(other, "on_behalf_of", Actor)
        values["meta"] = {**(values.get("meta") or {}), "on_behalf_of": {"id": id_, "type": type_}}
    return values or None


def completed(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event's ``values`` with those of its context that it does not give itself."""
    own = {name: value for name, value in values.items() if value is not None}
    both = {**given, **own}
    meta = own.get("meta")
    if meta is not None and "meta" in given and isinstance(meta, dict):
        both["meta"] = {**given["meta"], **meta}
    if "trace_id" in given and ("trace_id" in own or "span_id" in own):
        for name in ("trace_id", "span_id"):  # a trace and a span of another one make no sense together
            if name not in own:
                both.pop(name, None)
    return both


def _gathered(names: Collection[str] = ()) -> dict[str, Any] | None:
    """Return the fields of all contexts here, functions called; ``traceparent`` as its text and what it names."""
    holder = current.get()
    if holder is None:
        return None
    values: dict[str, Any] = {}
    metas: list[Any] = []
    while holder is not None:
        for name, value in holder.own().items():
            if names and name not in names:
                continue
            if name == "meta":
                metas = [*value, *metas]
            elif name not in values:
                values[name] = value() if callable(value) else value
        holder = holder.outer
    for piece in metas:
        found = piece() if callable(piece) else piece
        if found is not None:
            values["meta"] = {**values.get("meta", {}), **_mapping(found)}
    return {name: value for name, value in values.items() if value is not None}


def _sourced(values: dict[str, Any], sources: Iterable[Source]) -> dict[str, Any]:
    for source in sources:
        found = source()
        if not found:
            continue
        unknown = next((name for name in found if name not in _SOURCED), None)
        if unknown is not None:
            raise ValidationError(
                f"`{rules.printable(unknown)}` is not a field that a context source may give; "
                f"{rules.nearest(unknown, _SOURCED)}",
                field=rules.printable(unknown),
            )
        values = completed(values, {name: value for name, value in found.items() if value is not None})
    return values


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValidationError(f"`meta` of a context must be a dict, got {rules.got(value)}", field="meta")
    return value


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are given, checked as an event's would be; ``meta`` as the pieces that make it."""
    checked: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None:
            continue
        if callable(value) and name != "traceparent":
            if iscoroutinefunction(value):
                raise ValidationError(
                    f"`{name}` must not be a coroutine function: it is called when an event is emitted, in blocking "
                    "code as well; find the value first, and use `set_context`",
                    field=name,
                )
            checked[name] = (value,) if name == "meta" else value
        elif name in _LIMITS:
            checked[name] = rules.text(value, name, _LIMITS[name])
        elif name in {"actor", "on_behalf_of"}:
            identity(value, name, Actor)
            checked[name] = value
        elif name == "meta":
            checked[name] = (_mapping(value),)
        elif name == "traceparent":
            trace = parse_traceparent(value) if isinstance(value, str) else None
            if trace is None:
                raise ValidationError(
                    f"`traceparent` must be as W3C Trace Context has it, got {rules.got(value)}", field=name
                )
            checked[name] = (value, trace)
        else:
            known = ContextFields.__annotations__
            raise ValidationError(
                f"`{rules.printable(name)}` is not a field of a context; {rules.nearest(name, known)}", field=name
            )
    return checked
