"""Models whose changes are events: one for each object that is saved or deleted, in the transaction of the change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from typing import Any, Literal, NamedTuple, TypeVar

from django.core.exceptions import EmptyResultSet, FullResultSet
from django.db import connections, models, router, transaction
from django.db.models import signals
from django.db.models.deletion import Collector
from django.db.models.fields import NOT_PROVIDED
from django.db.models.query import QuerySet

from tracevault import ConfigError, TracevaultError, declare
from tracevault.integrations.django.conf import conf
from tracevault.integrations.django.vault import emit, emit_diff, get_audit
from tracevault.integrations.values import plain

M = TypeVar("M", bound=type[models.Model])
Bulk = Literal["raise", "summary", "ignore"]

_STATE = "tracevault_before"


class BulkChangeError(TracevaultError):
    """A bulk operation would change many rows of an audited model at once, without an event for each."""


class _Audited(NamedTuple):
    model: type[models.Model]
    name: str
    fields: frozenset[str] | None
    exclude: frozenset[str]
    bulk: str

    def columns(self, model: type[models.Model]) -> list[models.Field[Any, Any]]:
        """Return the fields of the model, or of one derived from it, that events hold."""
        return [
            field
            for field in model._meta.concrete_fields
            if (self.fields is None or field.name in self.fields) and field.name not in self.exclude
        ]


_audited: dict[type[models.Model], _Audited] = {}
# Whether a bulk operation is one that Django makes on its own, for one that was seen already or for a cascade.
_inner: ContextVar[str | None] = ContextVar("tracevault_bulk", default=None)


def audited(
    model: M | None = None,
    *,
    fields: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    name: str | None = None,
    bulk: Bulk = "raise",
) -> Any:
    """Emit an event for each object of a model, or of one derived from it, that is created, updated or deleted.

    As a decorator, ``@audited`` or ``@audited(exclude=["last_login"])``. Events are ``NAME.created``, ``NAME.updated``
    and ``NAME.deleted``, stored as `emit_diff` does, with the object as target; ``name`` is by default ``app.model``.
    ``fields`` are those that events hold (default: all), less ``exclude``; many-to-many fields count as well.

    ``bulk`` is what becomes of ``update``, ``bulk_create`` and ``bulk_update``, which change rows without loading them:
    ``"raise"`` a `BulkChangeError`, ``"summary"`` one event with the count and what is set, or ``"ignore"``.
    ``QuerySet.delete`` is none of them: each object has its event. Raises `ConfigError`.
    """
    if bulk not in {"raise", "summary", "ignore"}:
        raise ConfigError(f'`bulk` must be "raise", "summary" or "ignore", got {bulk!r}', field="bulk")

    def decorate(model: M) -> M:
        chosen = None if fields is None else frozenset(fields)
        known = {field.name for field in (*model._meta.fields, *model._meta.many_to_many)}
        for field in (*(chosen or ()), *exclude):
            if field not in known:
                raise ConfigError(f"`{field}` is not a field of {model._meta.label}", field="fields")
        found = _Audited(model, name or model._meta.label_lower, chosen, frozenset(exclude), bulk)
        _audited[model] = found
        verbs = ("created", "updated", "deleted", "bulk_created", "bulk_updated")
        declare(*(f"{found.name}.{verb}" for verb in verbs), description=f"A change of {model._meta.label}.")
        _wrap(model)
        return model

    return decorate if model is None else decorate(model)


def _of(model: type[Any]) -> _Audited | None:
    return next((_audited[each] for each in model.__mro__ if each in _audited), None)


def _wrap(model: Any) -> None:
    """Make a save one transaction with its event."""
    save_base = model.save_base

    @wraps(save_base)
    def save(self: Any, *args: Any, **kwargs: Any) -> None:
        using = kwargs.get("using") or router.db_for_write(type(self), instance=self)
        with transaction.atomic(using=using, savepoint=False):
            save_base(self, *args, **kwargs)

    model.save_base = save


def watch() -> None:
    """Connect to what Django says of changes; once, when the app is ready."""
    for signal, receiver in (
        (signals.pre_save, _saving),
        (signals.post_save, _saved),
        (signals.pre_delete, _deleting),
        (signals.m2m_changed, _related),
    ):
        signal.connect(receiver, dispatch_uid=f"tracevault.{receiver.__name__}")
    if getattr(QuerySet.update, "__module__", "") == __name__:
        return
    QuerySet.update = _guarded(QuerySet.update, "updated", _updated_values)
    QuerySet.bulk_create = _guarded(QuerySet.bulk_create, "created", _created_values)
    QuerySet.bulk_update = _guarded(QuerySet.bulk_update, "updated", _bulk_updated_values)
    Collector.delete = _cascading(Collector.delete)


# ----------------------------------------------------------------------------------------- one object


def _saving(sender: Any, instance: Any, raw: bool, using: str, update_fields: Any, **_: Any) -> None:
    """Look at the row before it changes: what the object was loaded with may be older, or may have been rolled back."""
    found = _of(sender)
    if found is None:
        return
    key = sender._meta.pk
    makes_key = key.default is not NOT_PROVIDED or getattr(key, "db_default", NOT_PROVIDED) is not NOT_PROVIDED
    is_new = instance.pk is None or (instance._state.adding and makes_key and not raw)
    columns = _chosen(found.columns(sender), update_fields)
    setattr(instance._state, _STATE, {} if is_new else _stored(instance, using, columns, lock=True))


def _saved(sender: Any, instance: Any, created: bool, using: str, update_fields: Any, **_: Any) -> None:
    found = _of(sender)
    if found is None:
        return
    known: dict[str, Any] = instance._state.__dict__.pop(_STATE, {})
    columns = [each for each in _chosen(found.columns(sender), update_fields) if each.attname in instance.__dict__]
    computed = [field for field in columns if hasattr(instance.__dict__[field.attname], "resolve_expression")]
    asked = _stored(instance, using, computed)
    after = {
        field.name: plain(asked[field.attname] if field.attname in asked else field.to_python(_raw(instance, field)))
        for field in columns
    }
    if created:
        _emit(found, using, "created", instance.pk, {}, after)
        return
    before = {field.name: plain(known[field.attname]) for field in columns if field.attname in known}
    changed = [name for name, value in after.items() if name not in before or not _same(before[name], value)]
    if changed:
        before = {name: before[name] for name in changed if name in before}
        _emit(found, using, "updated", instance.pk, before, {name: after[name] for name in changed})


def _chosen(columns: list[models.Field[Any, Any]], names: Any) -> list[models.Field[Any, Any]]:
    return columns if names is None else [each for each in columns if each.name in names or each.attname in names]


def _deleting(sender: Any, instance: Any, using: str, **_: Any) -> None:
    found = _of(sender)
    if found is None:
        return
    columns = found.columns(sender)
    known = _stored(instance, using, [each for each in columns if each.attname not in instance.__dict__])
    before = {
        field.name: plain(known[field.attname] if field.attname in known else _raw(instance, field))
        for field in columns
    }
    _emit(found, using, "deleted", instance.pk, before, {})


def _raw(instance: Any, field: models.Field[Any, Any]) -> Any:
    value = field.value_from_object(instance)
    return str(value) if isinstance(field, models.FileField) else value


def _stored(instance: Any, using: str, fields: list[models.Field[Any, Any]], *, lock: bool = False) -> dict[str, Any]:
    if not fields:
        return {}
    query = type(instance)._base_manager.using(using).filter(pk=instance.pk)
    if lock and connections[using].in_atomic_block:  # as the UPDATE that follows will
        query = query.select_for_update(no_key=True)
    return query.values(*(field.attname for field in fields)).first() or {}


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _related(
    sender: Any, instance: Any, action: str, reverse: bool, model: Any, pk_set: Any, using: str, **_: Any
) -> None:
    """Note whom a many-to-many field has gained or lost, on the side that has the field."""
    if action not in {"post_add", "post_remove", "pre_clear"}:
        return
    owner = model if reverse else type(instance)
    found = _of(owner)
    field = next((each for each in owner._meta.many_to_many if each.remote_field.through is sender), None)
    if found is None or field is None or field.name in found.exclude:
        return
    if found.fields is not None and field.name not in found.fields:
        return
    if action == "pre_clear":
        manager = getattr(instance, field.remote_field.get_accessor_name() if reverse else field.name)
        pk_set = set(manager.using(using).values_list("pk", flat=True))
    gained, lost = (pk_set, ()) if action == "post_add" else ((), pk_set)
    for owner_pk, other_pks in _sides(instance.pk, pk_set, reverse):
        before = sorted(str(pk) for pk in other_pks if pk in lost or owner_pk in lost)
        after = sorted(str(pk) for pk in other_pks if pk in gained or owner_pk in gained)
        _emit(found, using, "updated", owner_pk, {field.name: before}, {field.name: after})


def _sides(pk: Any, pk_set: Any, reverse: bool) -> Iterator[tuple[Any, list[Any]]]:
    if not pk_set:
        return
    if reverse:
        yield from ((other, [pk]) for other in sorted(pk_set, key=str))
    else:
        yield pk, list(pk_set)


# --------------------------------------------------------------------------------------------- in bulk


def _guarded(method: Any, verb: str, values_of: Callable[..., dict[str, Any]]) -> Any:
    @wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = _of(self.model)
        inner = _inner.get()
        if found is None or found.bulk == "ignore" or inner == "seen":
            return method(self, *args, **kwargs)
        if found.bulk == "raise" and inner != "cascade":
            raise BulkChangeError(
                f"a bulk operation would leave no event for each {found.name} that is {verb}: save the objects one by "
                'one, or use @audited(bulk="summary")'
            )
        data = values_of(self, *args, **kwargs)
        with transaction.atomic(using=self.db, savepoint=False), _marked("seen"):
            result = method(self, *args, **kwargs)
            count = len(result) if isinstance(result, list) else result
            _emit_on(self.db, f"{found.name}.bulk_{verb}", data={"count": count, **data})
        return result

    # Django asks these of its methods.
    guarded.__module__ = __name__
    return guarded


def _updated_values(queryset: Any, **values: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"values": {name: _value(value) for name, value in values.items()}}
    if queryset.query.where:
        with suppress(EmptyResultSet, FullResultSet):
            compiler = queryset.query.get_compiler(queryset.db)
            data["where"] = compiler.compile(queryset.query.where)[0]  # with placeholders: the values may be secrets
    return data


def _created_values(_queryset: Any, objs: Iterable[Any], *_: Any, **__: Any) -> dict[str, Any]:
    return {}


def _bulk_updated_values(_queryset: Any, _objs: Any, fields: Iterable[str], *_: Any, **__: Any) -> dict[str, Any]:
    return {"fields": list(fields)}


def _value(value: Any) -> Any:
    if isinstance(value, models.Model):
        return plain(value.pk)
    return str(value) if hasattr(value, "resolve_expression") else plain(value)


def _cascading(delete: Any) -> Any:
    @wraps(delete)
    def cascading(self: Any) -> Any:
        # SET_NULL and its like are updates that Django makes itself: summed up, since nobody could avoid them.
        with _marked("cascade"):
            return delete(self)

    return cascading


@contextmanager
def _marked(mark: str) -> Iterator[None]:
    token = _inner.set(mark)
    try:
        yield
    finally:
        _inner.reset(token)


# ------------------------------------------------------------------------------------------------ emit


def _emit(found: _Audited, using: str, verb: str, pk: Any, before: Any, after: Any) -> None:
    target = {"id": str(pk), "type": found.name}
    _emit_on(using, f"{found.name}.{verb}", target=target, before=before, after=after)


def _emit_on(using: str, event: str, **fields: Any) -> None:
    kind = "emit" if "data" in fields else "emit_diff"
    if using == conf().database:
        (emit if kind == "emit" else emit_diff)(event, **fields)
        return
    # The change is in another database than the log: no transaction spans both, so the event follows the commit.
    transaction.on_commit(lambda: getattr(get_audit(), kind)(event, **fields), using=using)
