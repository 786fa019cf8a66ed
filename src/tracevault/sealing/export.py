"""A sealed log as a file, which can be verified without its database.

JSON Lines in UTF-8. The first line says which log it is and how many leaves follow. Then comes each leaf in order: its
index as ``leaf``, and the event's columns; beside the payloads what is hashed of them, ``data_text``, ``meta_text`` and
``payload_salt``: as text, since a JSON parser would lose the order of keys and large numbers. In place of a payload
that was erased stands its commitment, ``data_commitment``; of a row that is gone, its leaf's ``hash`` alone. The last
line says that the file is whole, and has the newest signed checkpoint in the database, which is of just these leaves.

JSON lets one object say two things under one name, and readers differ in which they show. No line has that, and a line
that has it is not believed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from psycopg import Connection, IsolationLevel

from tracevault.errors import ProofError, SealError
from tracevault.events.payload import decode, iso_utc
from tracevault.events.record import PAYLOAD_SALT
from tracevault.flows.seal import HASH, Tree, sealed_tree
from tracevault.flows.verify import GONE, newest_checkpoint, prepare, rows_sql, stored_tiles, stream
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.leaf import FIELDS, PAYLOADS, statement_of
from tracevault.integrity.note import Note
from tracevault.integrity.tiles import WIDTH
from tracevault.postgres.failures import Place
from tracevault.postgres.run import RawRow, raw_rows, run
from tracevault.sealing.rows import leaf_row
from tracevault.sealing.verify import CHUNK, Progress

FORMAT = "tracevault/export/v1"
COMMITMENTS = {f"{name}_commitment": name for name in PAYLOADS}
TEXTS = {f"{name}_text": name for name in PAYLOADS}
_COLUMNS = {stored.name for stored in FIELDS} - set(PAYLOADS)
# The names on a leaf's line.
NAMES = {"leaf", PAYLOAD_SALT, *_COLUMNS, *PAYLOADS, *COMMITMENTS, *TEXTS}
_EXPORTING = Place("exporting")


def export(
    connection: Connection[Any],
    table: str,
    write: Callable[[str], object],
    progress: Progress = lambda _done, _all: None,
) -> int:
    """Write the sealed log of ``table``, line by line, as it is at one moment; return how many leaves it has.

    Rows that are not sealed yet are not in it, nor leaves that no stored checkpoint covers yet: of these the file could
    show nothing. Raises `SealError` if the table was never sealed.
    """
    connection.isolation_level = IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    with connection.transaction():
        run(connection, prepare(), _EXPORTING)
        tree = run(connection, sealed_tree(table), _EXPORTING)
        if tree is None:
            raise SealError(f"table `{table}` was never sealed: `tracevault seal --table {table}` begins that")
        note = run(connection, newest_checkpoint(tree, tree.size), _EXPORTING)
        size = _covered(tree, note)
        head = {"format": FORMAT, "tree": tree.name, "origin": tree.origin, "size": size}
        write(_line({**head, "exported_at": iso_utc(datetime.now(UTC))}))
        run(connection, stream(True), _EXPORTING)
        for first in range(0, size, CHUNK):
            end = min(first + CHUNK, size)
            tiles = run(connection, stored_tiles(tree, 0, first // WIDTH, -(-end // WIDTH)), _EXPORTING)
            for row in raw_rows(connection, rows_sql(tree, first, end), _EXPORTING):
                write(_exported(tree, row, tiles))
            progress(end, size)
        write(_line({"leaves": size, "checkpoint": note}))
    return size


def _covered(tree: Tree, note: str | None) -> int:
    """Return of how many leaves the stored checkpoint is; all, if there is none that says so."""
    try:
        return min(tree.size, Checkpoint.parse(Note.parse(note or "").text).size)
    except ProofError:
        return tree.size


def _exported(tree: Tree, row: RawRow, tiles: Mapping[int, bytes]) -> str:
    index, id_, state, fields, commitments = leaf_row(row)
    if state == GONE:
        start = index % WIDTH * HASH
        hash_ = tiles.get(index // WIDTH, b"")[start : start + HASH]
        return _line({"leaf": index, "id": str(id_), "hash": hash_.hex()})
    return leaf_line(index, statement_of(tree.name, fields, commitments).values)


# ------------------------------------------------------------------------------------------------ lines


def leaf_line(index: Any, values: Mapping[str, Any]) -> str:
    """Return the line of a leaf whose row says ``values``, as `integrity.leaf.Statement` has them."""
    parts = [f'"leaf": {_json(index)}']
    for stored in FIELDS:
        name = stored.name
        if name not in PAYLOADS:
            parts.append(f'"{name}": {_json(values.get(name))}')
            continue
        parts.append(f'"{name}": {values.get(name, "null")}')  # what PostgreSQL prints of jsonb is JSON
        for said, key in ((f"{name}_text", name), (f"{name}_commitment", f"{name}_commitment")):
            if key in values:
                parts.append(f'"{said}": {_json(values[key])}')
    if PAYLOAD_SALT in values:
        parts.append(f'"{PAYLOAD_SALT}": {_json(values[PAYLOAD_SALT])}')
    return f"{{{', '.join(parts)}}}\n"


def said_by(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the row of a leaf's line says, as `integrity.leaf.Statement` takes it: of payloads, their text."""
    said = {name: line[name] for name in (_COLUMNS | set(COMMITMENTS)) & set(line) if line[name] is not None}
    if PAYLOAD_SALT in line:
        said[PAYLOAD_SALT] = line[PAYLOAD_SALT]
    for text, name in TEXTS.items():
        if line.get(text) is not None:
            said[name] = line[text]
    return said


class Line(NamedTuple):
    """A line that was read: its text, and the object on it."""

    text: str
    values: dict[str, Any]
    """Empty if there is none, or not one that can be read in one way only: so nothing that it should say is there."""

    def is_of(self, index: int, said: Mapping[str, Any]) -> bool:
        """Whether it is letter for letter what an export writes: then it says nothing that is not hashed."""
        try:
            return self.text.rstrip("\n") == leaf_line(index, said).rstrip("\n")
        except RecursionError:  # of values that no row has
            return False


def read_line(data: bytes) -> Line:
    """Return a line of an export. What is on it may be anything."""
    text = ""
    try:
        text = data.decode()
        value = STRICT.decode(text)
    except RecursionError:
        value = _deep(text)
    except ValueError:
        value = {}
    return Line(text, value if isinstance(value, dict) else {})


def _deep(text: str) -> Any:
    """Return what is nested deeper than Python's parser goes, as other writers can: only if an export writes it so."""
    try:
        value = decode(text)  # which does not notice everything that is wrong
        return value if Line(text, value).is_of(value["leaf"], said_by(value)) else {}
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError):
        return {}


class Numeral(NamedTuple):
    """A number as it is written: two are the same if all of their digits are."""

    text: str


def _integer(text: str) -> int | Numeral:
    try:
        return int(text)
    except ValueError:  # more digits than Python converts, which a numeric may have
        return Numeral(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"JSON has no {text}")


# Reads JSON that has one meaning.
STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_float=Numeral, parse_int=_integer, parse_constant=_no_number)


def _line(values: dict[str, Any]) -> str:
    return f"{_json(values)}\n"


# `json.dumps` would make one of these each time.
_encode = json.JSONEncoder(ensure_ascii=False).encode


def _json(value: Any) -> str:
    return "null" if value is None else _encode(value)
