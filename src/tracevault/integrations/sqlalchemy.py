"""SQLAlchemy 2: an event for each object that a flush writes, in the transaction of the flush.

An event of your own in a session's transaction needs nothing of this: ``audit.emit(..., connection=session)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from tracevault import AsyncScope, ConfigError, Scope, TracevaultError, declare
from tracevault.integrations.values import plain

try:
    from sqlalchemy import Column, event, inspect, select
    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Mapper, ORMExecuteState, Session, object_session
    from sqlalchemy.sql.elements import ClauseElement
except ImportError as error:
    message = 'this needs SQLAlchemy 2: pip install "tracevault[sqlalchemy]"'
    raise ImportError(message) from error

Bulk = Literal["raise", "summary", "ignore"]

_KEY = "tracevault"


class BulkChangeError(TracevaultError):
    """A statement would change many rows of an audited model at once, without an event for each; ``bulk`` says so."""


def audit_models(
    session: Any,
    audit: AsyncScope | Scope,
    *,
    models: Iterable[type[Any]] | Mapping[type[Any], str],
    exclude: Iterable[Any] = (),
    bulk: Bulk = "raise",
) -> None:
    """Emit an event for each object of ``models`` that a flush of ``session`` creates, updates or deletes.

    ``session`` is a `Session` class, a `sessionmaker`, an `async_sessionmaker`, or one session; ``audit`` is a vault or
    one of its scopes. ``models`` are mapped classes, their subclasses included; a mapping gives each the name that its
    events begin with, which is otherwise its table's: ``product.created``, ``product.updated``, ``product.deleted``.
    ``exclude`` are attributes that no event holds: ``[User.last_seen]``; an update of nothing else is no event.

    ``bulk`` is what becomes of `update`, `delete` and `insert` statements on these models, which change rows without
    loading them: ``"raise"`` a `BulkChangeError`, ``"summary"`` one event with the count and the condition, or
    ``"ignore"``. Raises `ConfigError` for what is no model or no vault.
    """
    watch = _Watch(audit, models, exclude, bulk)
    target = _target(session)
    event.listen(target, "before_flush", watch.begin)
    event.listen(target, "after_flush", watch.end)
    event.listen(target, "do_orm_execute", watch.execute)
    for name, listener in (
        ("after_insert", _inserted),
        ("before_update", _updating),
        ("after_update", _updated),
        ("before_delete", _deleting),
    ):
        if not event.contains(Mapper, name, listener):
            event.listen(Mapper, name, listener)


def _target(session: Any) -> Any:
    if isinstance(session, async_sessionmaker):
        # Its sessions get a class of their own, so that nobody else's are audited.
        kind = session.kw.get("sync_session_class") or session.class_.sync_session_class
        audited = type(f"Audited{kind.__name__}", (kind,), {})
        session.configure(sync_session_class=audited)
        return audited
    if isinstance(session, AsyncSession):
        return session.sync_session
    if isinstance(session, type) and issubclass(session, AsyncSession):
        raise ConfigError("`session`: pass the async_sessionmaker rather than the class AsyncSession", field="session")
    return session


class _Watch:
    """What one call of `audit_models` watches, and, while a session flushes, the events of that flush."""

    def __init__(self, audit: AsyncScope | Scope, models: Any, exclude: Iterable[Any], bulk: str) -> None:
        if bulk not in {"raise", "summary", "ignore"}:
            raise ConfigError(f'`bulk` must be "raise", "summary" or "ignore", got {bulk!r}', field="bulk")
        if not isinstance(audit, (AsyncScope, Scope)):
            raise ConfigError(f"`audit` must be a vault or a scope, got a {type(audit).__name__}", field="audit")
        names = models if isinstance(models, Mapping) else dict.fromkeys(models)
        self._names: dict[Mapper[Any], str] = {}
        for model, name in names.items():
            mapper = inspect(model, raiseerr=False)
            if not isinstance(mapper, Mapper):
                raise ConfigError(f"`models` must hold mapped classes, got {model!r}", field="models")
            found = self._names[mapper] = name or str(getattr(mapper.local_table, "name", model.__name__))
            verbs = ("created", "updated", "deleted", "bulk_inserted", "bulk_updated", "bulk_deleted")
            declare(*(f"{found}.{verb}" for verb in verbs), description=f"A change of {model.__qualname__}.")
        self._excluded = {(inspect(attribute.class_), attribute.key) for attribute in exclude}
        self._audit = audit
        self._bulk = bulk

    def name_of(self, mapper: Mapper[Any]) -> str | None:
        """Return what events of this mapper begin with; None if it is not watched."""
        return next((self._names[each] for each in mapper.iterate_to_root() if each in self._names), None)

    def columns_of(self, mapper: Mapper[Any]) -> list[str]:
        """Return the keys of the column attributes that events hold."""
        bases = list(mapper.iterate_to_root())
        return [
            attribute.key
            for attribute in mapper.column_attrs
            if isinstance(attribute.columns[0], Column)
            and not any((base, attribute.key) in self._excluded for base in bases)
        ]

    def begin(self, session: Session, _context: Any, _instances: Any) -> None:
        session.info.setdefault(_KEY, {})[self] = {}

    def end(self, session: Session, _context: Any) -> None:
        for connection, events in session.info[_KEY].pop(self).items():
            self.emit(connection, events)

    def emit(self, connection: Connection, events: list[dict[str, Any]]) -> None:
        if isinstance(self._audit, AsyncScope):
            self._audit.emit_many_blocking(events, connection=connection)
        else:
            self._audit.emit_many(events, connection=connection)

    def execute(self, state: ORMExecuteState) -> Any:
        if self._bulk == "ignore" or not (state.is_insert or state.is_update or state.is_delete):
            return None
        verb = "inserted" if state.is_insert else "updated" if state.is_update else "deleted"
        mapper, name = self._meant(state)
        if name is None:
            return None
        if self._bulk == "raise":
            raise BulkChangeError(
                f"a bulk statement would leave no event for each row of `{name}` that is {verb}: change the objects "
                'through the session, or audit_models(..., bulk="summary")'
            )
        # Of an INSERT the count is kept only on request.
        result = state.invoke_statement(execution_options={"preserve_rowcount": True})
        count = getattr(result, "rowcount", -1)
        data: dict[str, Any] = {"count": count if count >= 0 else None}
        where = getattr(state.statement, "whereclause", None)
        if where is not None:
            data["where"] = str(where)  # with placeholders: the values may be secrets
        connection = state.session.connection(bind_arguments={"mapper": mapper})
        self.emit(connection, [{"event": f"{name}.bulk_{verb}", "data": data}])
        return result

    def _meant(self, state: ORMExecuteState) -> tuple[Mapper[Any] | None, str | None]:
        if state.bind_mapper is not None:
            name = self.name_of(state.bind_mapper)
            if name is not None:
                return state.bind_mapper, name
        table = getattr(state.statement, "table", None)
        for mapper, name in self._names.items():
            if any(table in each.tables for each in mapper.self_and_descendants):
                return mapper, name
        return None, None


def _watched(mapper: Mapper[Any], connection: Connection, target: Any) -> Iterable[tuple[_Watch, str, list[Any]]]:
    """Yield who watches this object, what its events begin with, and where they are gathered."""
    session = object_session(target)
    for watch, gathered in (session.info.get(_KEY, {}) if session is not None else {}).items():
        name = watch.name_of(mapper)
        if name is not None:
            yield watch, name, gathered.setdefault(connection, [])


def _inserted(mapper: Mapper[Any], connection: Connection, target: Any) -> None:
    for watch, name, events in _watched(mapper, connection, target):
        after = _values(mapper, connection, target, watch.columns_of(mapper))
        events.append(_event(f"{name}.created", name, mapper.primary_key_from_instance(target), None, after))


def _updating(mapper: Mapper[Any], connection: Connection, target: Any) -> None:
    """Note what changes, and from what, before it is too late: what the database is to compute is forgotten then."""
    state = inspect(target)
    for watch, _, _ in _watched(mapper, connection, target):
        before, unknown = _before(state, watch.columns_of(mapper))
        if unknown:  # set while they were not loaded
            before |= _selected(mapper, connection, state.identity, unknown, lock=True)
        state.info.setdefault(_KEY, {})[watch] = before


def _before(state: Any, keys: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the old values of what has changed, as far as they are known, and which are not."""
    before, unknown = {}, []
    for key in keys:
        history = state.attrs[key].history
        if history.deleted:
            before[key] = history.deleted[0]
        elif history.added:
            unknown.append(key)
    return before, unknown


def _updated(mapper: Mapper[Any], connection: Connection, target: Any) -> None:
    state = inspect(target)
    for watch, name, events in _watched(mapper, connection, target):
        keys = watch.columns_of(mapper)
        before: dict[str, Any] = {**_before(state, keys)[0], **state.info[_KEY].pop(watch, {})}
        before = {key: plain(value) for key, value in before.items()}
        after = _values(mapper, connection, target, list(before))
        after = {key: value for key, value in after.items() if (type(value), value) != (type(before[key]), before[key])}
        before = {key: before[key] for key in after}
        for relationship in mapper.relationships:
            if relationship.secondary is not None and not relationship.viewonly:
                history = state.attrs[relationship.key].history
                if history.added or history.deleted:
                    before[relationship.key] = _identities(history.deleted)
                    after[relationship.key] = _identities(history.added)
        if after:
            events.append(_event(f"{name}.updated", name, state.identity, before, after))


def _deleting(mapper: Mapper[Any], connection: Connection, target: Any) -> None:
    for watch, name, events in _watched(mapper, connection, target):
        state, before = inspect(target), {}
        missing = []
        for key in watch.columns_of(mapper):
            history = state.attrs[key].history
            if history.deleted or history.unchanged:
                before[key] = plain((history.deleted or history.unchanged)[0])
            else:
                missing.append(key)
        if missing:
            before |= {k: plain(v) for k, v in _selected(mapper, connection, state.identity, missing).items()}
        events.append(_event(f"{name}.deleted", name, state.identity, before, None))


def _values(mapper: Mapper[Any], connection: Connection, target: Any, keys: list[str]) -> dict[str, Any]:
    """Return the values as they are in the database now; it is asked for those that it made itself."""
    loaded = inspect(target).dict
    made = [key for key in keys if key not in loaded or isinstance(loaded[key], ClauseElement)]
    asked = _selected(mapper, connection, mapper.primary_key_from_instance(target), made) if made else {}
    return {key: plain(asked[key] if key in asked else loaded.get(key)) for key in keys}


def _selected(
    mapper: Mapper[Any], connection: Connection, identity: Any, keys: list[str], *, lock: bool = False
) -> dict[str, Any]:
    columns = [mapper.column_attrs[key].columns[0].label(key) for key in keys]
    query = select(*columns).select_from(mapper.selectable)
    for column, value in zip(mapper.primary_key, identity, strict=True):
        query = query.where(column == value)
    if lock:  # as the UPDATE that follows will, so that nobody changes the row in between
        query = query.with_for_update(key_share=True)
    row = connection.execute(query).mappings().first()
    return {} if row is None else dict(row)


def _identities(objects: Iterable[Any]) -> list[str]:
    return sorted(_text(inspect(each).mapper.primary_key_from_instance(each)) for each in objects if each is not None)


def _text(identity: Iterable[Any]) -> str:
    return ",".join(str(part) for part in identity)


def _event(event: str, type_: str, identity: Any, before: Any, after: Any) -> dict[str, Any]:
    return {"event": event, "target": {"id": _text(identity), "type": type_}, "before": before, "after": after}
