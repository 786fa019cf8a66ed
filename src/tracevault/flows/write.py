"""How events are stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from tracevault.errors import DriverError, DuplicateIdError
from tracevault.events.binary import copy_stream, encode_rows
from tracevault.events.prepare import Batch, Prepared
from tracevault.events.record import BY_NAME, INSERT_COLUMNS
from tracevault.flows import Copy, Flow, Query
from tracevault.schema.comparison import ARGUMENTS, CONTENT, RIGHTS, call, function_name, says_the_same, signature

# Below this many rows one INSERT is faster than the extra messages of a COPY.
COPY_FROM = 8
# PostgreSQL takes at most 65,535 parameters in one statement.
ROWS_PER_INSERT = 1000
# Rows that are encoded, and of a `Batch` prepared, before they are sent.
_ROWS_AT_ONCE = 128

_COLUMNS = ", ".join(INSERT_COLUMNS)


@lru_cache(maxsize=1024)
def insert_sql(table: str, rows: int, *, taken: bool) -> str:
    """Return the INSERT for ``rows`` events; where an id may be ``taken``, that event is left as it is.

    An id that `emit` just made is not taken, and to insert speculatively costs the server a few microseconds.
    """
    values = []
    for first in range(1, rows * len(INSERT_COLUMNS) + 1, len(INSERT_COLUMNS)):
        places = (f"${first + place}{_cast(name)}" for place, name in enumerate(INSERT_COLUMNS))
        values.append(f"({', '.join(places)})")
    skip = " ON CONFLICT DO NOTHING" if taken else ""
    return f'INSERT INTO "{table}" ({_COLUMNS}) VALUES {", ".join(values)}{skip}'


def _cast(name: str) -> str:
    return "::jsonb" if BY_NAME[name].column.sql_type == "jsonb" else ""


def insert(table: str, prepared: Prepared) -> Flow[None]:
    """Store one event. An id that is taken: nothing if the content is the same, else `DuplicateIdError`."""
    result = yield Query(insert_sql(table, 1, taken=prepared.given_id), prepared.row, reads=False)
    if result.touched == 0:
        yield from confirm_same(table, prepared)


def _kept_out(table: str) -> DriverError:
    return DriverError(
        f"table `{table}` did not store the event, though PostgreSQL reports no error: a trigger or a rule of the "
        "table keeps rows out; drop it, or have it raise an exception that says why"
    )


def copy_encoded(table: str, rows: Sequence[bytes]) -> Flow[int]:
    """Store rows as `encode_row` returns them, with ids that cannot be taken yet. Return 0, as `insert_many`."""
    return _copy(table, rows, len(rows))


def copy_many(table: str, batch: Sequence[Prepared]) -> Flow[int]:
    """Store a batch by one COPY; no id may be taken yet. Return 0, as `insert_many`."""
    encoded = (encode_rows([prepared.row for prepared in chunk]) for chunk in _chunks(batch, _ROWS_AT_ONCE))
    return _copy(table, encoded, len(batch))


def _copy(table: str, rows: Iterable[bytes], count: int) -> Flow[int]:
    result = yield Copy(f'COPY "{table}" ({_COLUMNS}) FROM STDIN (FORMAT binary)', copy_stream(rows))
    if result.touched < count:
        raise _kept_out(table)
    return 0


def insert_many(table: str, batch: Sequence[Prepared], *, replay: bool = False, copies: bool = True) -> Flow[int]:
    """Store a batch: by COPY where no id can be taken yet, else by INSERT. Return how many were there already.

    ``replay``: an earlier attempt may have stored some or all of it. ``copies``: the connection can be said COPY to.
    Where `needs_transaction` says so, the caller makes it one transaction.
    """
    taken = needs_transaction(batch, replay=replay)
    if len(batch) >= COPY_FROM and copies and not taken:
        return (yield from copy_many(table, batch))
    found = 0
    for chunk in _chunks(batch, ROWS_PER_INSERT):
        values = tuple(value for prepared in chunk for value in prepared.row)
        result = yield Query(insert_sql(table, len(chunk), taken=taken), values, reads=False)
        if result.touched < len(chunk):
            if not taken:
                raise _kept_out(table)
            found += len(chunk) - result.touched
            for prepared in chunk:
                if prepared.given_id or not replay:
                    yield from confirm_same(table, prepared)
            if replay:
                yield from _confirm_present(table, [prepared for prepared in chunk if not prepared.given_id])
    return found


def _confirm_present(table: str, batch: Sequence[Prepared]) -> Flow[None]:
    """Make sure of replayed records that an INSERT passed over: their ids are there, or something refuses them."""
    allowed = yield Query("SELECT has_table_privilege(to_regclass(quote_ident($1))::oid, 'SELECT')", (table,))
    if not batch or not allowed.rows[0][0]:
        return  # a role that only inserts cannot look; it was its own id that was taken
    found = yield Query(f'SELECT id FROM "{table}" WHERE id = ANY($1)', ([prepared.id for prepared in batch],))
    present = {row[0] for row in found.rows}
    for prepared in batch:
        if prepared.id not in present:
            # A unique index of the user's own kept it out: say it again, to hear which.
            yield from insert(table, prepared)


def needs_transaction(batch: Sequence[Prepared], *, replay: bool = False) -> bool:
    """Whether `insert_many` says more than one statement, so that only a transaction makes it all or nothing."""
    if isinstance(batch, Batch):
        return replay or batch.given_ids
    return replay or any(prepared.given_id for prepared in batch)


def _chunks(batch: Sequence[Prepared], size: int) -> Iterator[Sequence[Prepared]]:
    for start in range(0, len(batch), size):
        yield batch[start : start + size]


def confirm_same(table: str, prepared: Prepared) -> Flow[None]:
    """Return if the stored event of this id says the same as ``prepared``; else raise `DuplicateIdError`.

    A role that may not read the table asks its function; see ``schema.comparison``.
    """
    rights = yield Query(RIGHTS, (table, signature(table)))
    reads, partitioned, schema, has_function = rights.rows[0]
    values = dict(zip(INSERT_COLUMNS, prepared.row, strict=True))
    if reads:
        compared = (*CONTENT, "occurred_at") if prepared.given_time else CONTENT
        # In a partitioned table only a row of the same time can be in the way, and only with it is there an index.
        place = f" AND stored.occurred_at = ${len(compared) + 2}" if partitioned else ""
        found = yield Query(
            f'SELECT {says_the_same(compared, 2)} FROM "{table}" AS stored WHERE stored.id = $1{place}',
            (prepared.id, *(values[name] for name in compared), *([values["occurred_at"]] if partitioned else [])),
        )
        answer = "absent" if not found.rows else "same" if any(row[0] for row in found.rows) else "different"
    elif has_function:
        given = {**values, "given_time": prepared.given_time}
        asked = yield Query(f"SELECT {call(schema, table)}", tuple(given[name] for name, _ in ARGUMENTS))
        answer = asked.rows[0][0]
    else:
        raise DriverError(
            f"the id {prepared.id} is taken in table `{table}`, and this role may not read the table to see "
            f"whether by the same event: run `tracevault migrate --table {table}` as the table's owner, which makes "
            f"a function `{function_name(table)}` that this role can ask, or grant it SELECT",
            sqlstate="42501",
        )
    if answer == "absent":
        # Something else kept it out, such as a unique index of the user's: say it again, to hear what.
        again = yield Query(insert_sql(table, 1, taken=False), prepared.row, reads=False)
        if again.touched == 0:
            raise _kept_out(table)
    elif answer != "same":
        raise DuplicateIdError(
            f"`id` {prepared.id} is taken in table `{table}` by an event with other content; an id identifies "
            "one event for ever: leave it out, or retry with the same content",
            id=prepared.id,
        )


def savepointed(flow: Flow[Any]) -> Flow[None]:
    """Run ``flow`` inside a savepoint, so that a refusal leaves the caller's transaction alive."""
    yield Query("SAVEPOINT tracevault")
    try:
        yield from flow
    except Exception:
        yield Query("ROLLBACK TO SAVEPOINT tracevault")
        yield Query("RELEASE SAVEPOINT tracevault")
        raise
    yield Query("RELEASE SAVEPOINT tracevault")
