"""How events are found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from tracevault.event.payload import decode
from tracevault.event.record import BY_NAME, RECORD_COLUMNS, AuditRecord
from tracevault.event.rules import uuid
from tracevault.flows import Flow, Query
from tracevault.schema.filters import count_condition, find_condition

_PAYLOADS = tuple(name for name in RECORD_COLUMNS if BY_NAME[name].column.sql_type == "jsonb")
# Payloads come as text: only then are their numbers exact.
_SELECT = "SELECT " + ", ".join(f"{name}::text" if name in _PAYLOADS else name for name in RECORD_COLUMNS)


def find_many(table: str, filters: Mapping[str, Any]) -> Flow[list[AuditRecord]]:
    """Check ``filters``, and return the flow that finds the page of events for which all of them hold."""
    condition, page = find_condition(filters)
    order = page.order.upper()
    places = len(condition.params)
    return _find(
        f'{_SELECT} FROM "{table}" {condition.where} ORDER BY occurred_at {order}, id {order} '
        f"LIMIT ${places + 1} OFFSET ${places + 2}",
        (*condition.params, page.limit, page.offset),
    )


def find_by_id(table: str, id_: Any) -> Flow[AuditRecord | None]:
    """Check the id, and return the flow that finds its event, or None."""
    return _find_one(f'{_SELECT} FROM "{table}" WHERE id = $1', uuid(id_, "id"))


def count(table: str, filters: Mapping[str, Any]) -> Flow[int]:
    """Check ``filters``, and return the flow that counts the events for which all of them hold."""
    condition = count_condition(filters)
    return _count(f'SELECT count(*) FROM "{table}" {condition.where}', condition.params)


def _find(sql: str, params: tuple[Any, ...]) -> Flow[list[AuditRecord]]:
    result = yield Query(sql, params)
    return [_record(row) for row in result.rows]


def _find_one(sql: str, id_: UUID) -> Flow[AuditRecord | None]:
    result = yield Query(sql, (id_,))
    return _record(result.rows[0]) if result.rows else None


def _count(sql: str, params: tuple[Any, ...]) -> Flow[int]:
    result = yield Query(sql, params)
    return int(result.rows[0][0])


def _record(row: tuple[Any, ...]) -> AuditRecord:
    values = dict(zip(RECORD_COLUMNS, row, strict=True))
    for name in _PAYLOADS:
        if values[name] is not None:
            values[name] = decode(values[name])
    return AuditRecord(**values)
