"""Who, and to what: an id and a type that go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracevault.errors import ValidationError
from tracevault.events import rules
from tracevault.events.payload import utf8_length
from tracevault.events.record import IDENTITY_BYTES, Actor, Target, limit_of

_LIMIT = limit_of("actor_id")


def identity(value: Any, field: str, kind: type[Actor | Target]) -> tuple[str | None, str | None]:
    """Return id and type of an actor or a target, ``None, None`` for None; `ValidationError` names what is wrong."""
    if value is None:
        return None, None
    if type(value) is dict or isinstance(value, Mapping):
        id_, type_ = value.get("id"), value.get("type")
    elif isinstance(value, kind):
        id_, type_ = value.id, value.type
    else:
        raise ValidationError(
            f'`{field}` must be {{"id": ..., "type": ...}} or {kind.__name__}(id, type), got {rules.got(value)}',
            field=field,
        )
    if type(id_) is str and type(type_) is str and 0 < len(id_) <= _LIMIT and 0 < len(type_) <= _LIMIT:
        both = id_ + type_  # what nearly all are; the rest is looked at in turn
        if (
            len(both) <= IDENTITY_BYTES
            and both.isascii()
            and both.isprintable()
            and not (id_.isspace() or type_.isspace())
        ):
            return id_, type_
    id_ = rules.text(id_, field + ".id", _LIMIT, blank=False)
    type_ = rules.text(type_, field + ".type", _LIMIT, blank=False)
    # A character takes four bytes at most, so short ones need not be measured.
    if (len(id_) + len(type_)) * 4 > IDENTITY_BYTES and utf8_length(id_) + utf8_length(type_) > IDENTITY_BYTES:
        raise ValidationError(
            f"`{field}.id` and `{field}.type` together must not exceed {IDENTITY_BYTES:,} bytes of UTF-8: "
            "an index entry holds no more",
            field=field,
        )
    return id_, type_
