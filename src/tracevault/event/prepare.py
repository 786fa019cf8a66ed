"""The pipeline from what a caller says to the row that is stored: validate, mask, encode, stamp.

Pure: it reads the caller's objects, changes none of them, and touches neither database nor disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from operator import itemgetter
from typing import Any, NamedTuple
from uuid import UUID

from tracevault.errors import ValidationError
from tracevault.event import rules
from tracevault.event.diff import compute_diff
from tracevault.event.event import AuditEvent, DiffFields
from tracevault.event.ids import uuid7
from tracevault.event.payload import Encoder, decode, jsonb_text, utf8_length
from tracevault.event.record import (
    BY_NAME,
    GENERATED_COLUMNS,
    IDENTITY_BYTES,
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
_HEX_IDS = tuple((name, limit_of(name)) for name in ("trace_id", "span_id"))
# Every other text column that a caller sets is plain text with a limit.
_TEXTS = tuple(
    (name, limit_of(name))
    for name in INSERT_COLUMNS
    if name in EVENT_FIELDS - {"event", "trace_id", "span_id"} and BY_NAME[name].column.limit is not None
)
_GENERATED_ROOTS = frozenset(stored.column.generated[0] for stored in GENERATED_COLUMNS if stored.column.generated)
_row = itemgetter(*INSERT_COLUMNS)


@dataclass(frozen=True)
class Settings:
    """What the options say about events."""

    encoder: Encoder
    environment: str | None
    default_mode: str


class Prepared(NamedTuple):
    """An event that passed every check. ``row`` holds its values in the order of ``INSERT_COLUMNS``."""

    id: UUID
    mode: str
    row: tuple[Any, ...]
    given_id: bool
    """The caller chose the id: the same id may be in the table already."""
    given_time: bool
    """The caller said when it occurred, so the time is part of the event's content."""


def prepare(event: Any, fields: Mapping[str, Any], settings: Settings, *, mode: str | None = None) -> Prepared:
    """Return ``event`` (its name, or a mapping of all fields) with keyword ``fields``, ready to be stored.

    ``mode``, where given, takes the place of the vault's default, and another one in the event is refused.
    Raises `ValidationError` whose ``field`` is the path of the first offender.
    """
    values = _merge(event, fields, EVENT_FIELDS)
    name = rules.event_name(values.get("event"), "event", _EVENT_LIMIT)
    data = values.get("data")
    data_text = None if data is None else settings.encoder.encode(data, "data")
    if data is not None and not _GENERATED_ROOTS.isdisjoint(data):
        _check_generated(data, settings.encoder)
    return _finish(name, values, data_text, settings, mode)


def prepare_diff(event: Any, fields: Mapping[str, Any], settings: Settings, *, mode: str | None = None) -> Prepared:
    """Like `prepare`, with ``before`` and ``after``, stored as ``data = {before, after, diff}``.

    Differences are found before masking, so that a changed secret shows as a change of masked values.
    """
    values = _merge(event, fields, DIFF_FIELDS)
    name = rules.event_name(values.get("event"), "event", _EVENT_LIMIT)
    encoder = settings.encoder
    sides = {side: {} if values.get(side) is None else values[side] for side in ("before", "after")}
    texts = {side: encoder.encode(value, side) for side, value in sides.items()}
    # The values in it passed at depth 2 of their side; under diff they stand two levels further down.
    texts["diff"] = encoder.encode(compute_diff(sides["before"], sides["after"]), "diff", depth=-1)
    data_text = ", ".join(
        f'"{part}": {encoder.mask_text if encoder.masks(part) else text}' for part, text in texts.items()
    )
    return _finish(name, values, "{" + data_text + "}", settings, mode)


def _merge(event: Any, fields: Mapping[str, Any], known: frozenset[str]) -> Mapping[str, Any]:
    if isinstance(event, Mapping):
        twice = next((key for key in event if key in fields), None)
        if twice is not None:
            raise ValidationError(f"`{twice}` is given twice: in the event and as a keyword", field=twice)
        values: Mapping[str, Any] = {**event, **fields}
    elif event is None:
        values = fields
    else:
        if "event" in fields:
            raise ValidationError("`event` is given twice: first and as a keyword", field="event")
        values = {**fields, "event": event}
    if not known.issuperset(values):
        unknown = next(key for key in values if key not in known)
        raise ValidationError(
            f"`{rules.shorten(str(unknown))}` is not a field of an event; {rules.nearest(unknown, known)}",
            field=rules.shorten(str(unknown)),
        )
    return values


def _finish(
    name: str, values: Mapping[str, Any], data_text: str | None, settings: Settings, forced_mode: str | None
) -> Prepared:
    get = values.get
    row: dict[str, Any] = {"event": name, "data": data_text}
    row["actor_id"], row["actor_type"] = _identity(get("actor"), "actor", Actor)
    row["target_id"], row["target_type"] = _identity(get("target"), "target", Target)

    mode = get("mode")
    if mode is None:
        mode = forced_mode or settings.default_mode
    elif rules.choice(mode, "mode", MODES) != forced_mode and forced_mode is not None:
        raise ValidationError(f'`mode` cannot be "{mode}" here: this call is always {forced_mode}', field="mode")
    row["mode"] = mode

    occurred_at = get("occurred_at")
    row["occurred_at"] = datetime.now(UTC) if occurred_at is None else rules.moment(occurred_at, "occurred_at")
    for field, limit in _TEXTS:
        value = get(field)
        row[field] = None if value is None else rules.text(value, field, limit)
    if row["environment"] is None:
        row["environment"] = settings.environment
    for field, limit in _HEX_IDS:
        value = get(field)
        row[field] = None if value is None else rules.hex_id(value, field, limit)

    meta = get("meta")
    row["meta"] = meta_text = None if meta is None else settings.encoder.encode(meta, "meta")
    _check_size(data_text, meta_text, settings.encoder.max_bytes)

    given_id = get("id")
    row["id"] = uuid7() if given_id is None else rules.uuid(given_id, "id")
    return Prepared(row["id"], mode, _row(row), given_id is not None, occurred_at is not None)


def _identity(value: Any, field: str, kind: Callable[[str, str], Actor | Target]) -> tuple[str | None, str | None]:
    if value is None:
        return None, None
    if isinstance(value, Mapping):
        id_, type_ = value.get("id"), value.get("type")
    elif type(value) is kind:
        id_, type_ = value.id, value.type
    else:
        raise ValidationError(
            f'`{field}` must be {{"id": ..., "type": ...}} or a {field.capitalize()}, got {rules.got(value)}',
            field=field,
        )
    id_ = rules.text(id_, field + ".id", _IDENTITY_LIMIT, blank=False)
    type_ = rules.text(type_, field + ".type", _IDENTITY_LIMIT, blank=False)
    # A character takes four bytes at most, so short ones need not be measured.
    if (len(id_) + len(type_)) * 4 > IDENTITY_BYTES and utf8_length(id_) + utf8_length(type_) > IDENTITY_BYTES:
        raise ValidationError(
            f"`{field}.id` and `{field}.type` together must not exceed {IDENTITY_BYTES:,} bytes of UTF-8: "
            "an index entry holds no more",
            field=field,
        )
    return id_, type_


def _check_size(data_text: str | None, meta_text: str | None, most: int) -> None:
    characters = len(data_text or "") + len(meta_text or "")
    if characters * 4 <= most:
        return
    data_size, meta_size = utf8_length(data_text or ""), utf8_length(meta_text or "")
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
        if not isinstance(value, dict) or key not in value:
            return None
        value = encoder.mask_value if encoder is not None and encoder.masks(key) else value[key]
    if encoder is not None and type(value) is not str:
        value = json.loads(encoder.encode({"": value}, ""), parse_float=Decimal)[""]
    if value is None:
        return None
    return (value if isinstance(value, str) else jsonb_text(value)).strip(" ") or None


def _check_generated(data: dict[str, Any], encoder: Encoder) -> None:
    for stored in GENERATED_COLUMNS:
        path, limit = stored.column.generated, stored.column.limit
        assert path is not None and limit is not None  # noqa: PT018
        text = generated_value(data, path, encoder)
        if text is not None and len(text) > limit:
            field = ".".join(("data", *path))
            raise ValidationError(
                f"`{field}` must have at most {limit} characters, since the column `{stored.name}` is made "
                f"from it, got {len(text)}",
                field=field,
            )


def unstored_record(prepared: Prepared) -> AuditRecord:
    """Return the record that would have been stored, for ``on_error``."""
    values: dict[str, Any] = dict(zip(INSERT_COLUMNS, prepared.row, strict=True))
    for payload in ("data", "meta"):
        values[payload] = None if values[payload] is None else decode(values[payload])
    for stored in GENERATED_COLUMNS:
        assert stored.column.generated is not None
        values[stored.name] = generated_value(values["data"] or {}, stored.column.generated)
    return AuditRecord(**values)
