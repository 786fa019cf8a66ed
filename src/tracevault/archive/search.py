"""Archived events, found by the filters of the live table: DuckDB reads the files that may have some."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Unpack
from uuid import UUID

from tracevault.archive.manifest import ArchivedFile, ArchiveManifest
from tracevault.archive.rows import FROM_2000, INFINITY, NAMES
from tracevault.archive.store import Store
from tracevault.archive.verify import micros, verify_archive
from tracevault.config import DEFAULT_TABLE, check_table_name
from tracevault.errors import ArchiveError, ConfigError
from tracevault.events.data_key import KeyCache
from tracevault.events.encrypt import Decryption
from tracevault.events.payload import jsonb_text
from tracevault.events.record import BY_NAME, GENERATED_COLUMNS, RECORD_COLUMNS, AuditRecord
from tracevault.events.rules import uuid
from tracevault.flows.read import Count, Page, Walk, long_walk, next_walk, record, walk, write_walk
from tracevault.integrity.report import Report
from tracevault.schema.cursor import Place
from tracevault.schema.filters import COUNT_FILTERS, CountFilters, Filter, PageFilters, check
from tracevault.schema.restriction import EVERYTHING
from tracevault.sealing.key_store import open_key_store

try:
    import duckdb
except ImportError as error:
    message = 'an archive needs the extra "archive": pip install "tracevault[archive]"'
    raise ConfigError(message) from error

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Archive:
    """The archived events of one table, to be read as `audit.query` reads the live ones.

    ``location`` is a folder or an address as fsspec takes it; with ``key_store``, as the option of the vault, what was
    encrypted is decrypted. What is read is not verified, see `verify_archive`. Used from one thread at a time;
    ``close()`` it, or use it in a ``with``. Raises `ArchiveError` where there is no archive, or it cannot be read.
    """

    def __init__(self, location: str | os.PathLike[str], table: str = DEFAULT_TABLE, *, key_store: Any = None) -> None:
        self.table = check_table_name(table, "table")
        self._store = Store(location, self.table)
        self._manifests = self._store.manifests()
        if not self._manifests:
            raise ArchiveError(f"there is no archive of table `{table}` in {self._store.location!r}")
        self._decryption = None if key_store is None else Decryption(KeyCache(open_key_store(key_store, create=False)))
        self._duckdb = duckdb.connect(config={"autoinstall_known_extensions": "false"})
        self._duckdb.create_function("at_path", at_path, ["varchar", "varchar"], "boolean")
        if not self._store.local:
            self._duckdb.register_filesystem(self._store.filesystem)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        self._duckdb.close()

    def find_page(self, **filters: Unpack[PageFilters]) -> Page:
        """Return events, newest first, and the cursor of the page after them: as `audit.query.find_page`."""
        return self._page(walk(self.table, filters), check_page(filters))

    def iterate(
        self, *, page_size: int = 1000, order: str = "desc", **filters: Unpack[CountFilters]
    ) -> Iterator[AuditRecord]:
        """Yield all events for which the filters hold, page by page: as `audit.query.iterate`."""
        at = long_walk(self.table, filters, page_size, order, EVERYTHING)
        checked = check(filters, COUNT_FILTERS, "iterate")
        while True:
            rows, cursor = self._page(at, checked)
            yield from rows
            if cursor is None:
                return
            at = next_walk(at, cursor)

    def count(self, **filters: Unpack[CountFilters]) -> Count:
        """Return how many events there are for which the filters hold."""
        checked = check(filters, COUNT_FILTERS, "count")
        found = self._ask("count(*)", checked, [], "")
        return Count(found[0][0] if found else 0)

    def find_by_id(self, id: UUID | str) -> AuditRecord | None:  # noqa: A002
        """Return the event with this id, or None."""
        found = self._ask(_COLUMNS, {}, [("id = ?", (str(uuid(id, "id")),))], "LIMIT 1")
        return self._records(found)[0] if found else None

    def verify(self, *, keys: Sequence[str] = (), anchors: Sequence[str] = ()) -> Report:
        """Verify all of it, as ``tracevault verify --archive``; the arguments are those of `Scope.verify`."""
        return verify_archive(self._store, keys=keys, anchors=anchors)

    def _page(self, at: Walk, checked: Mapping[str, Any]) -> Page:
        order = at.order.upper()
        clauses = []
        if at.last is not None:
            sign = ">" if at.order == "asc" else "<"
            clauses.append((f"(epoch_us(occurred_at), id) {sign} (?, ?)", _after(at.last)))
        found = self._ask(
            f"{_COLUMNS}, epoch_us(occurred_at)",
            checked,
            clauses,
            f"ORDER BY occurred_at {order}, id {order} LIMIT {at.limit + 1}",
        )
        rows = self._records(found[: at.limit])
        if len(found) <= at.limit:
            return Page(rows, None)
        last = Place(found[at.limit - 1][-1] - FROM_2000, rows[-1].id)
        return Page(rows, write_walk(replace(at, last=last)))

    def _ask(
        self, columns: str, checked: Mapping[str, Any], more: Sequence[tuple[str, tuple[Any, ...]]], end: str
    ) -> list[tuple[Any, ...]]:
        files = [self._store.full(one.path) for one in files_of(self._manifests, checked)]
        if not files:
            return []
        clauses = [*_conditions(checked), *more]
        where = " AND ".join(f"({sql})" for sql, _ in clauses) or "true"
        params = [value for _, values in clauses for value in values]
        sql = f"SELECT {columns} FROM ({_source(files)}) AS events WHERE {where} {end}"
        try:
            return self._duckdb.execute(sql, params).fetchall()
        except duckdb.Error as error:
            raise ArchiveError(f"the archive {self._store.location!r} cannot be read: {error}") from error

    def _records(self, found: Sequence[tuple[Any, ...]]) -> list[AuditRecord]:
        rows = [_record(row) for row in found]
        if self._decryption is not None and rows:
            self._decryption.open_all(rows)
        return rows


def files_of(manifests: Sequence[ArchiveManifest], checked: Mapping[str, Any]) -> Iterator[ArchivedFile]:
    """Yield the files whose times the checked filters leave."""
    for manifest in manifests:
        for file in manifest.files:
            if "since" in checked and file.last < checked["since"]:
                continue
            if "until" in checked and file.first > checked["until"]:
                continue
            yield file


def merged(table: str, filters: Mapping[str, Any], *pages: Page) -> Page:
    """Return one page of several, which the same filters gave; what is in more than one comes once."""
    at = walk(table, filters)
    places = {(row.occurred_at, row.id): row for page in pages for row in page.rows}
    rows = [places[place] for place in sorted(places, reverse=at.order == "desc")]
    kept = rows[: at.limit]
    if len(kept) == len(rows) and all(page.next_cursor is None for page in pages):
        return Page(kept, None)
    last = Place(micros(kept[-1].occurred_at) - FROM_2000, kept[-1].id)
    return Page(kept, write_walk(replace(at, last=last)))


def check_page(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked filters among the arguments of `find_page`, which `walk` has checked already."""
    return check({name: value for name, value in filters.items() if name in COUNT_FILTERS}, COUNT_FILTERS, "find_page")


def _after(place: Place) -> tuple[int, str]:
    return place.time + FROM_2000, str(place.id)


_COLUMNS = ", ".join(
    f"CASE WHEN isfinite({name}) THEN epoch_us({name}) WHEN {name} > now() THEN {INFINITY} ELSE -{INFINITY} END"
    if BY_NAME[name].column.sql_type == "timestamp with time zone"
    else name
    for name in RECORD_COLUMNS
)


def _source(files: Sequence[str]) -> str:
    """Return the SELECT of the files' rows, with the columns that PostgreSQL takes out of `data`."""
    listed = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
    taken = ", ".join(
        f"nullif(trim(json_extract_string(data, '$.{'.'.join(stored.column.generated or ())}'), ' '), '') "
        f"AS {stored.name}"
        for stored in GENERATED_COLUMNS
    )
    return f"SELECT {', '.join(NAMES)}, {taken} FROM read_parquet([{listed}], hive_partitioning = false)"


def _record(row: Sequence[Any]) -> AuditRecord:
    values: list[Any] = []
    for name, value in zip(RECORD_COLUMNS, row, strict=False):
        match BY_NAME[name].column.sql_type:
            case "uuid":
                values.append(UUID(value))
            case "timestamp with time zone":
                values.append(_moment(value))
            case _:
                values.append(value)
    return record(values)


def _moment(microseconds: int) -> datetime:
    """Return the moment; one that Python has no name for is its first or last, as `AuditRecord` says."""
    try:
        if abs(microseconds) >= INFINITY:
            raise OverflowError
        return _EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        return (datetime.max if microseconds > 0 else datetime.min).replace(tzinfo=UTC)


# ------------------------------------------------------------------------------------------------- filters


def _conditions(checked: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield what checked filters are in DuckDB's SQL: the same as in PostgreSQL's, to the comparison of numbers."""
    for name, value in checked.items():
        spec = COUNT_FILTERS[name]
        if value is not False:
            yield from _clauses(spec, value)


def _clauses(spec: Filter, value: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    assert spec.sql is not None
    column = spec.columns[0] if spec.columns else ""
    match spec.kind:
        case "flag":
            yield spec.sql, ()
        case "prefix":
            yield f"starts_with({column}, ?)", (value,)
        case "list":
            yield f"list_contains(?, {column})", (value,)
        case "columns":
            for each in value:
                yield f"{each} IS NULL", ()
        case "paths" | "key":
            for text, wanted in needles(spec, value):
                yield f"contains({column}, ?) AND at_path({column}, ?)", (text, wanted)
        case "words":
            for word in value:
                yield _holds(word)
        case _:
            yield spec.sql.replace("{}", "?"), (value,)


def needles(spec: Filter, value: Any) -> Iterator[tuple[str, str]]:
    """Yield, for a filter of paths or of a key, what stands in the text of what it finds, and what `at_path` takes.

    The last key and its value stand there as jsonb writes them: so most rows need no closer look.
    """
    if spec.kind == "key":
        yield f"{jsonb_text(value)}:", json.dumps([["diff", value], None])
        return
    for keys, text in value:
        number = isinstance(json.loads(text), (int, float)) and text not in ("true", "false")
        yield f"{jsonb_text(keys[-1])}: {'' if number else text}", json.dumps([keys, text])


def _holds(word: str) -> tuple[str, tuple[Any, ...]]:
    clauses, params = [], []
    plain, payloads = EVERYTHING.searched()
    for searched, text in ((plain, word), (payloads, jsonb_text(word)[1:-1])):
        clauses.append(f"contains(lower(concat_ws(chr(10), {', '.join(searched)})), lower(?))")
        params.append(text)
    return " OR ".join(clauses), tuple(params)


def at_path(document: str, wanted: str) -> bool:
    """Whether a document of JSON has a value at a path of keys; with None for the value, whether it has the key."""
    keys, text = json.loads(wanted)
    value = json.loads(document, parse_float=Decimal, parse_int=Decimal)
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    if text is None:
        return True
    asked = json.loads(text, parse_float=Decimal, parse_int=Decimal)
    return type(value) is type(asked) and bool(value == asked)
