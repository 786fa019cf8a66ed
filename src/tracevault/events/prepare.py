"""The pipeline from what a caller says to the row that is stored: validate, mask, encode, stamp.

Pure: it reads the caller's objects, changes none of them, and touches neither database nor disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, overload
from uuid import UUID

from tracevault.errors import ValidationError
from tracevault.events import rules
from tracevault.events.catalog import DeclaredEvent, Payload, check_data, check_side, typed
from tracevault.events.context import Source, ambient, completed
from tracevault.events.data_key import subject_of
from tracevault.events.diff import compute_diff
from tracevault.events.encrypt import Encryption, EventCipher
from tracevault.events.event import AuditEvent, DiffFields
from tracevault.events.identity import identity
from tracevault.events.ids import uuid7
from tracevault.events.payload import EXACT, Encoder, decode, jsonb_text, utf8_length
from tracevault.events.record import (
    BY_NAME,
    GENERATED_COLUMNS,
    INSERT_COLUMNS,
    MODES,
    Actor,
    AuditRecord,
    Target,
    limit_of,
)

EVENT_FIELDS = frozenset(AuditEvent.__annotations__)
DIFF_FIELDS = frozenset({"event", *DiffFields.__annotations__})

_EVENT_LIMIT = limit_of("event")
_IDENTITY_LIMIT = limit_of("actor_id")
_place = INSERT_COLUMNS.index
_ID, _EVENT, _MODE, _OCCURRED_AT, _ENVIRONMENT = map(_place, ("id", "event", "mode", "occurred_at", "environment"))
_ACTOR_ID, _ACTOR_TYPE, _TARGET_ID, _TARGET_TYPE = map(_place, ("actor_id", "actor_type", "target_id", "target_type"))
_DATA, _META = map(_place, ("data", "meta"))
_HEX_IDS = tuple((name, _place(name), limit_of(name)) for name in ("trace_id", "span_id"))
# Every other text column that a caller sets is plain text with a limit.
_TEXTS = tuple(
    (name, place, limit_of(name))
    for place, name in enumerate(INSERT_COLUMNS)
    if name in EVENT_FIELDS - {"event", "trace_id", "span_id"} and BY_NAME[name].column.limit is not None
)
_GENERATED_ROOTS = frozenset(stored.column.generated[0] for stored in GENERATED_COLUMNS if stored.column.generated)
_NOTHING_GIVEN: list[Any] = [None] * len(INSERT_COLUMNS)


@dataclass(frozen=True)
class Settings:
    """What the options say about events."""

    encoder: Encoder
    environment: str | None
    default_mode: str
    encryption: Encryption | None = None
    sources: tuple[Source, ...] = ()
    closed: bool = False
    """Events that the catalog does not have are refused."""


class Prepared(NamedTuple):
    """An event that passed every check. ``row`` holds its values in the order of ``INSERT_COLUMNS``."""

    id: UUID
    mode: str
    row: tuple[Any, ...]
    given_id: bool
    """The caller chose the id: the same id may be in the table already."""
    given_time: bool
    """The caller said when it occurred, so the time is part of the event's content."""


# A NamedTuple's own constructor takes twice the time.
_prepared = partial(tuple.__new__, Prepared)


def prepare(
    event: Any,
    fields: Mapping[str, Any],
    settings: Settings,
    *,
    mode: str | None = None,
    context: Mapping[str, Any] | None = None,
) -> Prepared:
    """Return ``event`` (its name, or a mapping of all fields) with keyword ``fields``, ready to be stored.

    ``mode``, where given, takes the place of the vault's default, and another one in the event is refused. What the
    event does not give comes from ``context``, by default the one that is current here.
    Raises `ValidationError` whose ``field`` is the path of the first offender.
    """
    given, values = _merge(event, fields, EVENT_FIELDS)
    context = ambient(settings.sources) if context is None else context
    values = completed(values, context) if context else values
    name = rules.event_name(given, "event", _EVENT_LIMIT)
    cipher = None if settings.encryption is None else _cipher(values, settings.encryption)
    data, encoder = check_data(name, values.get("data"), closed=settings.closed), settings.encoder
    walk = None if cipher is None else cipher.walk(encoder, "data")
    data_text = None if data is None else encoder.encode(data, "data", walk=walk)
    if data is not None and not _GENERATED_ROOTS.isdisjoint(data):
        if walk is None or data_text is None:
            _check_generated(data, encoder)
        else:  # what is stored, not what the caller gave
            _check_generated(EXACT.decode(data_text), None)
    return _finish(name, values, data_text, settings, mode, cipher)


def prepare_diff(
    event: Any,
    fields: Mapping[str, Any],
    settings: Settings,
    *,
    mode: str | None = None,
    context: Mapping[str, Any] | None = None,
) -> Prepared:
    """Like `prepare`, with ``before`` and ``after``, stored as ``data = {before, after, diff}``.

    Differences are found before masking, so that a changed secret shows as a change of masked values.
    """
    given, values = _merge(event, fields, DIFF_FIELDS)
    context = ambient(settings.sources) if context is None else context
    values = completed(values, context) if context else values
    name = rules.event_name(given, "event", _EVENT_LIMIT)
    encoder = settings.encoder
    cipher = None if settings.encryption is None else _cipher(values, settings.encryption)
    walks = dict.fromkeys(("before", "after", "diff"), None) if cipher is None else cipher.diff_walks(encoder)
    sides = {side: check_side(name, values.get(side), side, closed=settings.closed) for side in ("before", "after")}
    sides = {side: {} if value is None else value for side, value in sides.items()}
    texts = {
        side: encoder.encode(value, side, hidden=encoder.masks(side), walk=walks[side]) for side, value in sides.items()
    }
    # The values in it passed at depth 2 of their side; under diff they stand two levels further down.
    diff = compute_diff(sides["before"], sides["after"])
    texts["diff"] = encoder.encode(diff, "diff", depth=-1, hidden=encoder.masks("diff"), walk=walks["diff"])
    data_text = ", ".join(f'"{part}": {text}' for part, text in texts.items())
    return _finish(name, values, "{" + data_text + "}", settings, mode, cipher)


class Batch(Sequence[Prepared]):
    """The events of one `emit_many`, prepared when they are first asked for, and once; those with ``before`` or
    ``after`` as `emit_diff` takes them.

    So the database stores the first ones while the last ones are still prepared. The first few are prepared at
    once, unless ``now`` is False, and all of them where one has an id, as they then go another way. A refusal names
    the event's place: ``events[3].data.price``.
    """

    _AT_ONCE = 64

    def __init__(self, events: Any, settings: Settings, *, now: bool = True) -> None:
        if isinstance(events, (str, bytes, Mapping)) or not isinstance(events, Iterable):
            raise ValidationError(f"`events` must be a list of events, got {rules.got(events)}", field="events")
        self._events = list(events)
        self._settings = settings
        self._context = ambient(settings.sources) or {}
        self._prepared: list[Prepared] = []
        self.given_ids = any(isinstance(event, Mapping) and event.get("id") is not None for event in self._events)
        if now:
            self.prepare(None if self.given_ids else self._AT_ONCE)

    def prepare(self, count: int | None = None) -> None:
        """Prepare the first ``count`` events, or all."""
        prepared, settings = self._prepared, self._settings
        for place in range(len(prepared), len(self._events) if count is None else min(count, len(self._events))):
            event = self._events[place]
            changes = isinstance(event, Mapping) and ("before" in event or "after" in event)
            try:
                one = prepare_diff if changes else prepare
                prepared.append(one(event, {}, settings, mode="sync", context=self._context))
            except ValidationError as error:
                field = f"events[{place}]" + (f".{error.field}" if error.field else "")
                failure = ValidationError(f"events[{place}]: {error}", field=field)
            else:
                continue
            raise failure

    def __len__(self) -> int:
        """How many events there are."""
        return len(self._events)

    @overload
    def __getitem__(self, place: int) -> Prepared: ...
    @overload
    def __getitem__(self, place: slice) -> list[Prepared]: ...
    def __getitem__(self, place: int | slice) -> Prepared | list[Prepared]:
        """Return what is at ``place``, prepared."""
        stop = place.indices(len(self))[1] if isinstance(place, slice) else range(len(self))[place] + 1
        self.prepare(stop)
        return self._prepared[place]

    def __iter__(self) -> Iterator[Prepared]:
        """Prepare one after another."""
        for place in range(len(self)):
            if place >= len(self._prepared):
                self.prepare(place + 1)
            yield self._prepared[place]


def _merge(event: Any, fields: Mapping[str, Any], known: frozenset[str]) -> tuple[Any, Mapping[str, Any]]:
    """Return the name that is given, and the fields."""
    # The types that nearly every event has come first: an abstract class takes its time to say no.
    values = fields
    if type(event) is not str and (type(event) is dict or isinstance(event, Mapping)):
        values = _joined(event, fields) if fields else event
        event = values.get("event")
    elif event is None:
        event = fields.get("event")
    else:
        if fields.get("event") is not None:
            raise ValidationError("`event` is given twice: first and as a keyword", field="event")
        found = None if type(event) is str else typed(event)
        if found is not None:
            event, values = _of_typed(*found, fields, known)
    if not known.issuperset(values):
        unknown = next(key for key in values if key not in known)
        field = rules.printable(unknown)
        raise ValidationError(f"`{field}` is not a field of an event; {rules.nearest(unknown, known)}", field=field)
    return event, values


def _of_typed(
    declared: DeclaredEvent, payload: Payload | None, fields: Mapping[str, Any], known: frozenset[str]
) -> tuple[str, Mapping[str, Any]]:
    """Return name and fields of an event that is given as a class, or as an instance, which is its payload."""
    if payload is None:
        return declared.name, fields
    if "data" not in known:
        raise ValidationError(
            f"`event`: pass the class, and instances of it as `before` and `after`: emit_diff({declared.source}, ...)",
            field="event",
        )
    if fields.get("data") is not None:
        raise ValidationError("`data` is given twice: by the instance and as a keyword", field="data")
    return declared.name, {**fields, "data": payload}


def _joined(event: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in fields.items() if value is not None}
    twice = next((name for name in given if event.get(name) is not None), None)
    if twice is not None:
        field = rules.printable(twice)
        raise ValidationError(f"`{field}` is given twice: in the event and as a keyword", field=field)
    return {**fields, **event, **given}


def _finish(
    name: str,
    values: Mapping[str, Any],
    data_text: str | None,
    settings: Settings,
    forced_mode: str | None,
    cipher: EventCipher | None,
) -> Prepared:
    get = values.get
    row = _NOTHING_GIVEN.copy()
    row[_EVENT], row[_DATA] = name, data_text
    row[_ACTOR_ID], row[_ACTOR_TYPE] = identity(get("actor"), "actor", Actor)
    row[_TARGET_ID], row[_TARGET_TYPE] = identity(get("target"), "target", Target)

    mode = get("mode")
    if mode is None:
        mode = forced_mode or settings.default_mode
    else:
        mode = rules.choice(mode, "mode", MODES)
        if forced_mode is not None and mode != forced_mode:
            raise ValidationError(f'`mode` cannot be "{mode}" here: this call is always {forced_mode}', field="mode")
    row[_MODE] = mode

    occurred_at = get("occurred_at")
    row[_OCCURRED_AT] = datetime.now(UTC) if occurred_at is None else rules.moment(occurred_at, "occurred_at")
    for field, place, limit in _TEXTS:
        value = get(field)
        if value is not None:
            row[place] = rules.text(value, field, limit)
    if row[_ENVIRONMENT] is None:
        row[_ENVIRONMENT] = settings.environment
    for field, place, limit in _HEX_IDS:
        value = get(field)
        if value is not None:
            row[place] = rules.hex_id(value, field, limit)

    meta = get("meta")
    walk = None if cipher is None else cipher.walk(settings.encoder, "meta")
    row[_META] = meta_text = None if meta is None else settings.encoder.encode(meta, "meta", walk=walk)
    _check_size(data_text or "", meta_text or "", settings.encoder.max_bytes)

    given_id = get("id")
    if cipher is not None:
        row[_ID] = cipher.id
    else:
        row[_ID] = uuid7() if given_id is None else rules.uuid(given_id, "id")
        if get("subject") is not None:
            _subject(values)  # nothing is encrypted here, but it is checked all the same
    return _prepared((row[_ID], mode, tuple(row), given_id is not None, occurred_at is not None))


def _cipher(values: Mapping[str, Any], encryption: Encryption) -> EventCipher:
    given = values.get("id")
    id_ = uuid7() if given is None else rules.uuid(given, "id")
    return EventCipher(encryption, id_, _subject(values))


def _subject(values: Mapping[str, Any]) -> str | None:
    """Return by whose key the event is encrypted: the subject's if one is given, else the target's."""
    value = values.get("subject")
    if not isinstance(value, str):
        field = "target" if value is None else "subject"
        id_, type_ = identity(values.get(field), field, Target)
        return None if id_ is None or type_ is None else subject_of(type_, id_)
    value = rules.text(value, "subject", 2 * _IDENTITY_LIMIT + 1)
    type_, slash, id_ = value.partition("/")
    if not slash or rules.is_blank(type_) or rules.is_blank(id_):
        raise ValidationError(
            f"`subject` must be a type and an id with a slash between, as user/42, got {rules.got(value)}",
            field="subject",
        )
    return value


def awaits_no_key(event: Any, fields: Mapping[str, Any], encryption: Encryption) -> bool:
    """Whether `prepare` and `prepare_diff` need not ask the key store, which may take long, for this event."""
    try:
        subject = _subject(_merge(event, fields, EVENT_FIELDS | DIFF_FIELDS)[1])
    except ValidationError:
        return True
    return subject is None or encryption.keys.has(subject)


def _check_size(data_text: str, meta_text: str, most: int) -> None:
    if (len(data_text) + len(meta_text)) * 4 <= most:
        return
    data_size, meta_size = utf8_length(data_text), utf8_length(meta_text)
    if data_size + meta_size > most:
        field = "data" if data_size >= meta_size else "meta"
        raise ValidationError(
            f"`{field}` is too large: `data` and `meta` take {data_size + meta_size:,} bytes as JSON, "
            f"`max_event_bytes` allows {most:,}; store large content elsewhere and log its id and hash",
            field=field,
        )


def generated_value(data: dict[str, Any], path: tuple[str, ...], encoder: Encoder | None = None) -> str | None:
    """Return what PostgreSQL will extract from ``data`` at ``path``: its text, trimmed of spaces, or None.

    With ``encoder``, ``data`` is a caller's payload, still to be masked.
    """
    value: Any = data
    for key in path:
        while isinstance(value, Enum):
            value = value.value
        if not isinstance(value, dict) or key not in value:
            return None
        value = encoder.mask_value if encoder is not None and encoder.masks(key) else value[key]
    if encoder is not None and type(value) is not str:
        value = EXACT.decode(encoder.encode({"": value}, ""))[""]
    if value is None:
        return None
    return (value if isinstance(value, str) else jsonb_text(value)).strip(" ") or None


def _check_generated(data: dict[str, Any], encoder: Encoder | None) -> None:
    for stored in GENERATED_COLUMNS:
        path, limit = stored.column.generated, stored.column.limit
        assert path is not None and limit is not None  # noqa: PT018
        text = generated_value(data, path, encoder)
        if text is not None and len(text) > limit:
            field = ".".join(("data", *path))
            raise ValidationError(
                f"`{field}` must have at most {limit} characters, since the column `{stored.name}` is made "
                f"from it, got {len(text)}: {rules.got(text)}",
                field=field,
            )


def unstored_record(prepared: Prepared) -> AuditRecord:
    """Return the record that would have been stored, for ``on_error``."""
    values: dict[str, Any] = dict(zip(INSERT_COLUMNS, prepared.row, strict=True))
    data = EXACT.decode(values["data"] or "{}")
    for stored in GENERATED_COLUMNS:
        assert stored.column.generated is not None
        values[stored.name] = generated_value(data, stored.column.generated)
    for payload in ("data", "meta"):
        values[payload] = None if values[payload] is None else decode(values[payload])
    return AuditRecord(**values)
