"""The catalog: which events a program declares, and what their payloads hold.

A class that is declared as an event describes its ``data``, whether the event is emitted by the class, by an instance
or by its name. Dataclasses and TypedDicts are checked by the names of their fields, pydantic models by their own rules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import (
    Any,
    ClassVar,
    NotRequired,
    Protocol,
    Required,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from tracevault.errors import ConfigError, ValidationError
from tracevault.events import rules
from tracevault.events.record import limit_of

C = TypeVar("C", bound=type[Any])


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


class _Model(Protocol):
    def model_dump(self, *, mode: str = ...) -> dict[str, Any]: ...


TypedEvent = _Dataclass | _Model | type[Any]
"""What `emit` takes in place of a name: an instance of a declared dataclass or model, or a declared class."""


@dataclass(frozen=True)
class DeclaredField:
    """A field of a payload: its name, its type as written, and whether it has to be there."""

    name: str
    type: str
    required: bool


@dataclass(frozen=True)
class DeclaredEvent:
    """An event of the catalog. ``fields`` is None where its payload is free."""

    name: str
    description: str | None = None
    fields: tuple[DeclaredField, ...] | None = None
    source: str | None = None
    """Where it was declared: ``shop.events.PriceUpdated``, or the module."""
    kind: str = "name"
    """``dataclass``, ``TypedDict``, ``pydantic``, or ``name``."""
    cls: type[Any] | None = None

    def is_made_by(self, value: Any) -> bool:
        """Whether ``value`` is an instance of the class; one of a TypedDict is a plain dict."""
        return self.cls is not None and self.kind != "TypedDict" and isinstance(value, self.cls)


class Payload(dict[str, Any]):
    """The payload that an instance was turned into: it needs no further check."""


_by_name: dict[str, DeclaredEvent] = {}
_by_class: dict[type[Any], DeclaredEvent] = {}


def event(name: str, *, description: str | None = None) -> Callable[[C], C]:
    """Declare a dataclass, a TypedDict or a pydantic model as the payload of the event ``name``; a decorator.

    From then on every event of this name is checked: ``data`` has the class's fields, and no others. ``description`` is
    by default the first line of the class's docstring. Raises `ConfigError` for a class of another kind, and for a name
    that another class has; `ValidationError` for what cannot name an event.
    """
    name = _checked_name(name)

    def declare_class(cls: C) -> C:
        kind = _kind_of(cls)
        source = f"{cls.__module__}.{cls.__qualname__}"
        known = _by_name.get(name)
        if known is not None and known.cls is not None and known.source != source:  # else a module is loaded anew
            raise ConfigError(f"the event {name!r} is declared twice: by {known.source} and by {source}", field="event")
        found = DeclaredEvent(name, description or _summary(cls, kind), _fields_of(cls, kind), source, kind, cls)
        _by_name[name] = _by_class[cls] = found
        return cls

    return declare_class


def declare(*names: str, description: str | None = None) -> None:
    """Declare events by their names alone: their payloads are free.

    A name that is declared already stays what it is. Raises `ValidationError` for what cannot name an event.
    """
    source = sys._getframe(1).f_globals.get("__name__")
    for name in names:
        _by_name.setdefault(_checked_name(name), DeclaredEvent(name, description, source=source))


def catalog() -> tuple[DeclaredEvent, ...]:
    """Return the events that are declared in this process, by name: those of the modules that were imported."""
    return tuple(_by_name[name] for name in sorted(_by_name))


def typed(given: Any) -> tuple[DeclaredEvent, Payload | None] | None:
    """Return the declared event that a class or an instance stands for, and the instance's payload; None for others."""
    cls = given if isinstance(given, type) else type(given)
    found = _by_class.get(cls)
    if found is not None:
        return found, None if cls is given else payload_of(given)
    if cls is given or has_fields(given):
        raise ValidationError(
            f"`event` must be a string, or what is declared as an event: {cls.__name__} is not, decorate it with "
            '@tracevault.event("...")',
            field="event",
        )
    return None


def has_fields(value: Any) -> bool:
    """Whether a value is an instance of a dataclass or of a pydantic model, which `payload_of` takes."""
    return not isinstance(value, type) and (is_dataclass(value) or hasattr(value, "model_dump"))


def payload_of(instance: Any) -> Payload:
    """Return what an instance of a declared class holds, nested ones included."""
    if hasattr(instance, "model_dump"):
        return Payload(instance.model_dump(mode="python"))
    return Payload((field.name, _plain(getattr(instance, field.name))) for field in fields(instance))


def _plain(value: Any) -> Any:
    if has_fields(value):
        return dict(payload_of(value))
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [_plain(item) for item in value]
    return value


def check_data(name: str, data: Any, *, closed: bool) -> Any:
    """Return the payload of an event, checked by what is declared of it; with ``closed`` it has to be declared."""
    found = _declared(name, closed=closed)
    if found is None or found.fields is None or type(data) is Payload:
        return data
    if found.is_made_by(data):
        return payload_of(data)
    if data is not None and not isinstance(data, Mapping):
        return data  # which is refused as that of any event
    given = {} if data is None else data
    if found.kind == "pydantic":
        return _validated(found, given)
    _check_names(found, given, "data")
    missing = next((field.name for field in found.fields if field.required and field.name not in given), None)
    if missing is not None:
        raise ValidationError(f"`data.{missing}` is missing: {_says(found)}", field=f"data.{missing}")
    return data


def check_side(name: str, side: Any, field: str, *, closed: bool) -> Any:
    """Return ``before`` or ``after`` of an event, checked: what is declared of it may be there, and nothing else."""
    found = _declared(name, closed=closed)
    if found is None or found.fields is None:
        return side
    if found.is_made_by(side):
        return dict(payload_of(side))
    if isinstance(side, Mapping):
        _check_names(found, side, field)
    return side


def _declared(name: str, *, closed: bool) -> DeclaredEvent | None:
    found = _by_name.get(name)
    if found is None and closed:
        hint = "no event is declared: are the modules imported that do?"
        raise ValidationError(
            f"`event` {rules.shorten(repr(name))} is not in the catalog, which is closed; "
            f"{rules.nearest(name, _by_name) if _by_name else hint}",
            field="event",
        )
    return found


def _check_names(found: DeclaredEvent, given: Mapping[str, Any], path: str) -> None:
    assert found.fields is not None
    known = {field.name for field in found.fields}
    unknown = next((key for key in given if key not in known), None)
    if unknown is not None:
        shown = rules.printable(unknown)
        hint = rules.nearest(shown, known) if known else "it has none"
        raise ValidationError(f"`{path}.{shown}` is not declared: {_says(found)}; {hint}", field=f"{path}.{shown}")


def _says(found: DeclaredEvent) -> str:
    return f"{found.source} says what {found.name!r} holds"


def _validated(found: DeclaredEvent, given: Mapping[str, Any]) -> Payload:
    assert found.cls is not None
    try:
        return payload_of(found.cls.model_validate(dict(given)))
    except ValueError as error:  # pydantic's ValidationError, whose own text quotes the value
        if not hasattr(error, "errors"):
            raise
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(["data", *map(str, first["loc"])])
    raise ValidationError(f"`{field}`: {first['msg']}; {_says(found)}", field=field)


def _checked_name(name: Any) -> str:
    return rules.event_name(name, "event", limit_of("event"))


def _kind_of(cls: Any) -> str:
    if isinstance(cls, type):
        if is_typeddict(cls):
            return "TypedDict"
        if hasattr(cls, "model_fields") and hasattr(cls, "model_validate"):
            return "pydantic"
        if is_dataclass(cls):
            return "dataclass"
    raise ConfigError(
        f"@tracevault.event takes a dataclass, a TypedDict or a pydantic model, got {getattr(cls, '__name__', cls)!r}; "
        "it stands above @dataclass",
        field="event",
    )


def _fields_of(cls: Any, kind: str) -> tuple[DeclaredField, ...]:
    if kind == "pydantic":
        return tuple(
            DeclaredField(name, _shown(field.annotation), field.is_required())
            for name, field in cls.model_fields.items()
        )
    if kind == "TypedDict":
        try:
            hints = get_type_hints(cls, include_extras=True)
        except NameError:  # of a name that only type checkers know
            hints = cls.__annotations__
        return tuple(_typed_dict_field(name, hint, name in cls.__required_keys__) for name, hint in hints.items())
    return tuple(
        DeclaredField(field.name, _shown(field.type), field.default is MISSING and field.default_factory is MISSING)
        for field in fields(cls)
    )


def _typed_dict_field(name: str, hint: Any, required: bool) -> DeclaredField:
    """Return a TypedDict's field; where annotations are text, Python itself does not see ``NotRequired`` in them."""
    text = str(getattr(hint, "__forward_arg__", hint)) if get_origin(hint) is None else ""
    if get_origin(hint) in (Required, NotRequired):
        required, (hint,) = get_origin(hint) is Required, get_args(hint)
    elif text.startswith(("NotRequired[", "typing.NotRequired[")):
        required = False
    return DeclaredField(name, _shown(hint), required)


def _shown(hint: Any) -> str:
    if isinstance(hint, str):
        return hint
    return (
        hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint).replace("typing.", "")
    )


def _summary(cls: Any, kind: str) -> str | None:
    doc = (cls.__doc__ or "").strip()
    if kind == "dataclass" and doc.startswith(f"{cls.__name__}("):  # made by @dataclass
        return None
    return doc.splitlines()[0].strip() if doc else None
