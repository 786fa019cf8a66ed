"""The changes of one thing, as its `emit_diff` events tell them, and what it was like after them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from tracevault.events.record import AuditRecord


class FieldChange(NamedTuple):
    """What became of one top-level field. ``before`` is None where it was added, ``after`` where it was removed."""

    name: str
    kind: Literal["added", "removed", "changed"]
    before: Any
    after: Any


class Change(NamedTuple):
    """One event of a thing's history; ``fields`` is empty where it was not `emit_diff`'s."""

    record: AuditRecord
    fields: list[FieldChange]


class History(NamedTuple):
    """The changes of one target, oldest first, and its ``state`` after the last of them.

    ``state`` puts together the fields that `emit_diff` events saw, masked as they were stored; None where there is no
    such event. Where not ``is_complete``, there are older changes, which were not read.
    """

    changes: list[Change]
    state: dict[str, Any] | None
    is_complete: bool


def history(records: Iterable[AuditRecord], *, is_complete: bool) -> History:
    """Return the history that ``records``, oldest first, tell."""
    changes = []
    state: dict[str, Any] | None = None
    for record in records:
        changes.append(Change(record, field_changes(record.data)))
        before, after = _versions(record.data)
        if after is not None:
            kept = {} if state is None else state
            state = {key: value for key, value in kept.items() if key in after or key not in (before or {})} | after
    return History(changes, state, is_complete)


def field_changes(data: dict[str, Any] | None) -> list[FieldChange]:
    """Return the changes in what `emit_diff` stored; none if ``data`` is something else."""
    # By the two versions: of a masked field, the difference itself is masked.
    before, after = _versions(data)
    if before is None or after is None:
        return []
    changes = []
    for name in (data or {})["diff"]:
        kind: Literal["added", "removed", "changed"] = (
            "changed" if (name in before) == (name in after) else "added" if name in after else "removed"
        )
        changes.append(FieldChange(name, kind, before.get(name), after.get(name)))
    return changes


def _versions(data: dict[str, Any] | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    if not data or not isinstance(data.get("diff"), dict):
        return None, None
    before, after = data.get("before"), data.get("after")
    return before if isinstance(before, dict) else None, after if isinstance(after, dict) else None
