"""A row as bytes: a tuple of PostgreSQL's binary COPY format, which is also how the spool keeps it.

One that is spooled is made when the event is emitted, and whoever writes a batch joins them; others are made batch by
batch. The format is that of the documentation of COPY, section "Binary Format", with each type's own send format: 16
bytes of a ``uuid``, UTF-8 of text, a version byte and text of ``jsonb``, microseconds since 2000 of ``timestamptz``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain, repeat
from operator import attrgetter
from struct import Struct
from typing import Any
from uuid import UUID

from tracevault.events.record import BY_NAME, INSERT_COLUMNS

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LENGTH = Struct("!i")
_TIME = Struct("!iq")
_NULL = _LENGTH.pack(-1)
_UUID_LENGTH = _LENGTH.pack(16)
_COUNT = Struct("!h")
# Bytes after which a batch is handed to the socket.
_CHUNK = 65_536

_TYPES = tuple(BY_NAME[name].column.sql_type for name in INSERT_COLUMNS)
_TEXT, _JSONB, _TIMESTAMP, _UUID = range(4)
_KINDS_OF_TYPES = {"jsonb": _JSONB, "timestamp with time zone": _TIMESTAMP, "uuid": _UUID}
_KINDS = tuple(_KINDS_OF_TYPES.get(kind, _TEXT) for kind in _TYPES)
_NONE = type(None)
_int_of = attrgetter("int")
_BEGIN = _COUNT.pack(len(INSERT_COLUMNS))


class _Heads(dict[int, bytes]):
    """What is sent before a text of some length; of short ones ready made, which takes a third of the time."""

    def __init__(self, version: bytes) -> None:
        super().__init__()
        self._version = version
        self.update((length, self[length]) for length in range(4096))

    def __missing__(self, length: int) -> bytes:
        return _LENGTH.pack(len(self._version) + length) + self._version


# Of the kinds that are text, by the number of bytes.
_HEADS = {_TEXT: _Heads(b""), _JSONB: _Heads(b"\x01")}


def encode_row(row: Sequence[Any]) -> bytes:
    """Return ``row``, values in the order of ``INSERT_COLUMNS``, as one tuple of binary COPY."""
    return b"".join([_BEGIN, *map(_encode, row, _KINDS)])


def _encode(value: Any, kind: int) -> bytes:
    if value is None:
        return _NULL
    heads = _HEADS.get(kind)
    if heads is not None:
        text: bytes = value.encode()
        return heads[len(text)] + text
    if kind == _TIMESTAMP:
        return _TIME.pack(8, (value - _EPOCH) // _MICROSECOND)
    number: int = value.int
    return _UUID_LENGTH + number.to_bytes(16)


def encode_rows(rows: Sequence[Sequence[Any]]) -> bytes:
    """Return ``rows`` as `encode_row` would, one after another: by columns, in three fifths of the time."""
    columns = chain.from_iterable(map(_encode_column, zip(*rows, strict=True), _KINDS))
    return b"".join(chain.from_iterable(zip(repeat(_BEGIN, len(rows)), *columns, strict=False)))


def _encode_column(values: Sequence[Any], kind: int) -> tuple[Iterable[bytes], ...]:
    """Return what is sent of each value: one piece of each, or two."""
    if kind == _TEXT and 4 * len(different := set(values)) <= len(values):  # names, types, and what nobody gave
        known = {value: _encode(value, kind) for value in different}
        return (repeat(*known.values()) if len(known) == 1 else map(known.__getitem__, values),)
    if kind == _TIMESTAMP or _NONE in set(map(type, values)):
        return (map(_encode, values, repeat(kind)),)
    if kind == _UUID:
        return repeat(_UUID_LENGTH), map(int.to_bytes, map(_int_of, values), repeat(16))
    texts = list(map(str.encode, values))
    return map(_HEADS[kind].__getitem__, map(len, texts)), texts


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "uuid": lambda value: UUID(bytes=value),
    "jsonb": lambda value: value[1:].decode(),
    "timestamp with time zone": lambda value: _EPOCH + int.from_bytes(value, signed=True) * _MICROSECOND,
    "character varying": bytes.decode,
}


def decode_row(data: bytes, columns: Sequence[str] = INSERT_COLUMNS) -> tuple[Any, ...]:
    """Return the values of a tuple that was written with ``columns``, in the order of ``INSERT_COLUMNS``.

    A column that the writer did not know is None. Raises `ValueError` for one that we do not know, and for bytes
    that are no such tuple.
    """
    unknown = set(columns) - set(INSERT_COLUMNS)
    if unknown:
        raise ValueError(f"columns of another version: {', '.join(sorted(unknown))}")
    values = dict.fromkeys(INSERT_COLUMNS)
    values.update(zip(columns, _fields(data, columns), strict=True))
    return tuple(values.values())


def _fields(data: bytes, columns: Sequence[str]) -> Iterator[Any]:
    if data[:2] != _COUNT.pack(len(columns)):
        raise ValueError("not a row with these columns")
    place = 2
    for name in columns:
        length = int.from_bytes(data[place : place + 4], signed=True)
        place += 4
        if length < 0:
            yield None
            continue
        value = data[place : place + length]
        place += length
        if len(value) != length:
            raise ValueError("a row that is cut off")
        yield _DECODERS[BY_NAME[name].column.sql_type](value)
    if place != len(data):
        raise ValueError("a row with more than its columns")


def copy_stream(rows: Iterable[bytes]) -> Iterator[bytes]:
    """Return what binary COPY expects for ``rows``: header, tuples, trailer; in pieces of about 64 KiB."""
    parts, size = [HEADER], 0
    for row in rows:
        parts.append(row)
        size += len(row)
        if size >= _CHUNK:
            yield b"".join(parts)
            parts, size = [], 0
    parts.append(TRAILER)
    yield b"".join(parts)
