"""A sealed log as a file, which can be verified without its database.

JSON Lines in UTF-8. The first line says which log it is and how many leaves follow. Then comes each leaf in order: its
index as ``leaf``, and the event's columns; beside the payloads what is hashed of them, ``data_text``, ``meta_text`` and
``payload_salt``: as text, since a JSON parser would lose the order of keys and large numbers. In place of a payload
that was erased stands its commitment, ``data_commitment``; of a row that is gone, its leaf's ``hash`` alone. The last
line says that the file is whole, and has the newest signed checkpoint in the database.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from psycopg import Connection, IsolationLevel

from tracevault.errors import SealError
from tracevault.event.payload import iso_utc
from tracevault.event.record import PAYLOAD_SALT
from tracevault.flows.seal import HASH, Tree, find_tree, tables_exist
from tracevault.flows.verify import GONE, newest_checkpoint, prepare, rows_sql, stored_tiles, stream
from tracevault.integrity.leaf import FIELDS, PAYLOADS, statement_of
from tracevault.integrity.tiles import WIDTH
from tracevault.postgres.failures import Place
from tracevault.postgres.run import copied_rows, run
from tracevault.sealing.rows import leaf_row
from tracevault.sealing.verify import CHUNK, Progress

FORMAT = "tracevault/export/v1"
_EXPORTING = Place("exporting")


def export(
    connection: Connection[Any],
    table: str,
    write: Callable[[str], object],
    progress: Progress = lambda _done, _all: None,
) -> int:
    """Write the sealed log of ``table``, line by line, as it is at one moment; return how many leaves it has.

    Rows that are not sealed yet are not in it. Raises `SealError` if the table was never sealed.
    """
    connection.isolation_level = IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    with connection.transaction():
        run(connection, prepare(), _EXPORTING)
        tree = run(connection, find_tree(table), _EXPORTING) if run(connection, tables_exist(), _EXPORTING) else None
        if tree is None:
            raise SealError(f"table `{table}` was never sealed: `tracevault seal --table {table}` begins that")
        head = {"format": FORMAT, "tree": tree.name, "origin": tree.origin, "size": tree.size}
        write(_line({**head, "exported_at": iso_utc(datetime.now(UTC))}))
        run(connection, stream(True), _EXPORTING)
        for first in range(0, tree.size, CHUNK):
            end = min(first + CHUNK, tree.size)
            tiles = run(connection, stored_tiles(tree, 0, first // WIDTH, -(-end // WIDTH)), _EXPORTING)
            for row in copied_rows(connection, rows_sql(tree, first, end), _EXPORTING):
                write(_leaf(tree, row, tiles))
            progress(end, tree.size)
        write(
            _line({"leaves": tree.size, "checkpoint": run(connection, newest_checkpoint(tree, tree.size), _EXPORTING)})
        )
    return tree.size


def _leaf(tree: Tree, row: bytes, tiles: Mapping[int, bytes]) -> str:
    index, id_, state, place, commitments = leaf_row(row)
    if state == GONE:
        start = index % WIDTH * HASH
        hash_ = tiles.get(index // WIDTH, b"")[start : start + HASH]
        return _line({"leaf": index, "id": str(id_), "hash": hash_.hex()})
    values = statement_of(tree.name, row, place, commitments).values
    parts = [f'"leaf": {index}']
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


def _line(values: dict[str, Any]) -> str:
    return f"{_json(values)}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
