r"""The query text of the command line, the viewer and Python: filters as people type them.

::

    event:auth.* actor:user/42 outcome:failure since:7d data.payment.currency:EUR "free words"

Terms stand between white space, and all of them must hold. Within double quotes white space and every sign stand for
themselves; ``\"`` is a quote there, and ``\\`` a backslash. Keys are the names of THE filter table, and the short ones
below. What values may be is the filter table's to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

from tracevault.errors import QueryError, ValidationError
from tracevault.events import rules
from tracevault.events.payload import jsonb_text
from tracevault.schema.filters import COUNT_FILTERS, check

MAX_TEXT = 4096
# Short forms of filters' names.
SHORT = {
    "tenant": "tenant_id",
    "correlation": "correlation_id",
    "request": "request_id",
    "trace": "trace_id",
    "env": "environment",
    "code": "error_code",
}
# Keys that stand for several filters.
IDENTITIES = ("actor", "target")
FLAGS = {"error": "errors_only"}
_PATHS = tuple(name for name, spec in COUNT_FILTERS.items() if spec.kind == "paths")
# Which filter takes a list of what another takes one of: `event` and `events`.
_LISTS = {
    spec.columns[0]: name
    for name, spec in COUNT_FILTERS.items()
    if spec.kind == "list" and spec.columns[0] in COUNT_FILTERS
}
_NEGATED = re.compile(r"-\w+:")
# In a path, a backslash stands before a sign that would end it.
_KEY = re.compile(rf'(?:(?:{"|".join(_PATHS)})\.(?:[^\s":\\]|\\.)*|[^\s":\\]+)(?=:)', re.DOTALL)
_SPAN = re.compile(r"(\d{1,6})([mhdw])", re.ASCII)
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d{1,4})?", re.ASCII)
# What needs no quotes, as a value and as a word.
_BARE = re.compile(r"[^\s\"\\,/*:-][^\s\"\\,/*]*")
_BARE_WORD = re.compile(r"[^\s\":\\-][^\s\":\\]*")


class _Char(NamedTuple):
    """A character of a value, and whether it stands for itself whatever it is."""

    char: str
    quoted: bool


@dataclass(frozen=True)
class _Term:
    """A term: ``key`` is None for a free word. It stands at ``start`` to ``end``."""

    key: str | None
    value: tuple[_Char, ...]
    start: int
    end: int

    @property
    def text(self) -> str:
        return "".join(char.char for char in self.value)

    @property
    def plain(self) -> bool:
        """Whether nothing of it is quoted."""
        return not any(char.quoted for char in self.value)

    def split(self, sign: str, most: int = -1) -> list[str]:
        """Split the value at a sign that is not quoted."""
        parts: list[list[str]] = [[]]
        for char in self.value:
            if char == (sign, False) and len(parts) != most:
                parts.append([])
            else:
                parts[-1].append(char.char)
        return ["".join(part) for part in parts]

    def ends_with(self, sign: str) -> bool:
        """Whether the value ends with a sign that is not quoted."""
        return bool(self.value) and self.value[-1] == (sign, False)


def parse_query(text: str, *, now: datetime | None = None) -> dict[str, Any]:
    """Return the filters that a query text stands for, as `find_many` takes them.

    ``since:7d`` counts back from ``now`` (default: the present): ``15m``, ``24h``, ``7d``, ``4w``. Raises `QueryError`,
    which says at which column and why, for a text of more than 4,096 characters as well.
    """
    if not isinstance(text, str):
        raise ValidationError(f"a query must be a string, got {rules.got(text)}", field="query")
    if len(text) > MAX_TEXT:
        message = f"a query has at most {MAX_TEXT:,} characters, this one has {len(text):,}"
        raise QueryError(message, text=text, column=MAX_TEXT + 1, length=1)
    filters: dict[str, Any] = {}
    places: dict[str, _Term] = {}
    words: list[str] = []
    for term in _terms(text):
        if term.key is None:
            words.append(_phrase(term, text))
            _note(places, "text", term, text, again=len(words) > 1)
            continue
        for name, value in _filters(term, text, now or datetime.now(UTC)):
            if name in _PATHS:
                path, scalar = value
                _note(places, f"{name}.{path}", term, text)
                places.setdefault(name, term)
                filters.setdefault(name, {})[path] = scalar
            else:
                _note(places, name, term, text)
                filters[name] = value
    if words:
        filters["text"] = " ".join(words)
    _check(filters, places, text)
    return filters


def format_query(filters: Mapping[str, Any]) -> str:
    """Return a query text that stands for these filters, which are those of `count`; `parse_query` returns them again.

    Raises `ValidationError` for filters that are wrong.
    """
    check(filters, COUNT_FILTERS, "a query")
    given = dict(filters)
    terms = []
    for identity in IDENTITIES:
        id_, type_ = given.get(f"{identity}_id"), given.get(f"{identity}_type")
        if type_ is not None:
            terms.append(f"{identity}:{_written(type_)}/{'' if id_ is None else _written(id_)}")
        elif id_ is not None:
            terms.append(f"{identity}:{_written(id_)}")
        given.pop(f"{identity}_id", None)
        given.pop(f"{identity}_type", None)
    short = {name: key for key, name in SHORT.items()}
    single = {plural: name for name, plural in _LISTS.items()}
    words = given.pop("text", None)
    for name, value in given.items():
        match COUNT_FILTERS[name].kind:
            case "paths":
                terms += [f"{name}.{_written_path(path)}:{_written_scalar(item)}" for path, item in value.items()]
            case "list" if len(value) > 1 and name in single:
                terms.append(f"{single[name]}:{','.join(map(_written, value))}")
            case "list":
                terms.append(f"{name}:{','.join(map(_written, value))}")
            case "columns":
                terms.append(f"no:{','.join(map(_written, value))}")
            case "prefix":
                terms.append(f"event:{_written(value, ends=False)}*")
            case "flag":
                terms.append("is:error" if value else f"{name}:false")
            case "time":
                terms.append(f"{name}:{_written_time(value)}")
            case _:
                terms.append(f"{short.get(name, name)}:{_written(value)}")
    if words is not None:
        bare = words.split(" ")
        terms.append(words if all(map(_BARE_WORD.fullmatch, bare)) else f"text:{_quoted(words)}")
    return " ".join(terms)


def complete_query(text: str, place: int) -> list[str]:
    """Return what the term that ends at ``place`` could become: keys, or values of a key that has few of them."""
    begin = place
    while begin and not text[begin - 1].isspace():
        begin -= 1
    typed = text[begin:place]
    key, colon, value = typed.partition(":")
    if not colon:
        return [f"{name}:" for name in keys() if name.startswith(typed)] if typed else [f"{name}:" for name in keys()]
    name = SHORT.get(key, key)
    choices: Iterable[str] = COUNT_FILTERS[name].choices if name in COUNT_FILTERS else ()
    if key in ("is", "no"):
        choices = FLAGS if key == "is" else COUNT_FILTERS["is_null"].choices
    return [f"{key}:{choice}" for choice in choices if choice.startswith(value)]


def keys() -> list[str]:
    """Return the keys that people use: the shortest for each filter."""
    short = {name: key for key, name in SHORT.items()}
    hidden = {"event_prefix", "errors_only", "is_null", "text", *_LISTS.values()}
    hidden |= {f"{identity}_{part}" for identity in IDENTITIES for part in ("id", "type")}
    names = [short.get(name, name) for name in COUNT_FILTERS if name not in hidden]
    names = [f"{name}." if name in _PATHS else name for name in names]
    return sorted([*names, *IDENTITIES, "is", "no"])


# ----------------------------------------------------------------------------------------- to terms


def _terms(text: str) -> Iterable[_Term]:
    place = 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        if _NEGATED.match(text, place):
            raise _wrong(text, place, place + 1, "a query has no `not`: ask for what shall be there")
        start, key = place, None
        match = _KEY.match(text, place)
        if match is not None:
            key, place = match[0], match.end() + 1
        value, place = _value(text, place)
        yield _Term(key, tuple(value), start, place)


def _value(text: str, place: int) -> tuple[list[_Char], int]:
    """Return the value that begins at ``place``, and where it ends."""
    value: list[_Char] = []
    opened: int | None = None
    while place < len(text):
        char = text[place]
        if char == '"':
            opened = place if opened is None else None
            if opened is None or text[place + 1 : place + 2] == '"':
                value.append(_Char("", quoted=True))  # that there were quotes is told, also of nothing
        elif opened is not None and char == "\\":
            place += 1
            if place == len(text) or text[place] not in '"\\':
                raise _wrong(
                    text,
                    place - 1,
                    min(place + 1, len(text)),
                    'within quotes a backslash stands before " or another backslash',
                )
            value.append(_Char(text[place], quoted=True))
        elif opened is None and char.isspace():
            break
        else:
            value.append(_Char(char, quoted=opened is not None))
        place += 1
    if opened is not None:
        raise _wrong(text, opened, len(text), "these quotes are not closed")
    return value, place


def _phrase(term: _Term, text: str) -> str:
    """Return a free word as the filter `text` wants it."""
    if term.plain:
        return term.text
    if '"' in term.text:
        raise _wrong(text, term.start, term.end, "a phrase cannot hold a quote: search for the words around it")
    if not term.text.strip():
        raise _wrong(text, term.start, term.end, "there is nothing between the quotes")
    return f'"{term.text}"'


# --------------------------------------------------------------------------------------- to filters


def _filters(term: _Term, text: str, now: datetime) -> list[tuple[str, Any]]:
    """Return the filters that a term stands for."""
    key = term.key or ""
    column, dot, path = key.partition(".")
    if dot and column in _PATHS:
        return [(column, (_read_path(path), _read_scalar(term)))]
    if not term.value:
        raise _wrong(text, term.start, term.end, f"`{rules.printable(key)}:` has no value")
    if key in IDENTITIES:
        return _identity(key, term)
    if key == "is":
        if term.text not in FLAGS:
            raise _wrong(text, term.start, term.end, f"`is:` is followed by {' or '.join(FLAGS)}")
        return [(FLAGS[term.text], True)]
    if key == "no":
        return [("is_null", term.split(","))]
    name = SHORT.get(key, key)
    if name not in COUNT_FILTERS or name in _PATHS:
        hint = rules.nearest(key, [*keys(), *COUNT_FILTERS])
        advice = f'; to search for such a text, quote it: "{rules.printable(text[term.start : term.end])}"'
        raise _wrong(text, term.start, term.start + len(key), f"`{rules.printable(key)}` is no key; {hint}{advice}")
    return [_READERS.get(COUNT_FILTERS[name].kind, _one_or_several)(name, term, text, now)]


def _identity(key: str, term: _Term) -> list[tuple[str, Any]]:
    parts = term.split("/", 2)
    if len(parts) == 1:
        several = term.split(",")
        return [(f"{key}_id", parts[0]) if len(several) == 1 else (_LISTS[f"{key}_id"], several)]
    type_, id_ = parts
    # An empty one is a filter's error, unless it is left out on purpose.
    return [(f"{key}_type", type_)] if not id_ else [(f"{key}_type", type_), (f"{key}_id", id_)]


def _one_or_several(name: str, term: _Term, text: str, _now: datetime) -> tuple[str, Any]:
    several = term.split(",")
    if name == "event" and term.ends_with("*"):
        if len(several) > 1:
            raise _wrong(text, term.start, term.end, "a list of events cannot hold a beginning")
        return "event_prefix", term.text[:-1]
    if len(several) == 1:
        return name, term.text
    if name not in _LISTS:
        advice = f'`{name}` takes one value; if the comma is part of it, quote it: {name}:"a,b"'
        raise _wrong(text, term.start, term.end, advice)
    return _LISTS[name], several


def _list(name: str, term: _Term, _text: str, _now: datetime) -> tuple[str, Any]:
    return name, term.split(",")


def _prefix(name: str, term: _Term, _text: str, _now: datetime) -> tuple[str, Any]:
    return name, term.text[:-1] if term.ends_with("*") else term.text


def _flag(name: str, term: _Term, text: str, _now: datetime) -> tuple[str, Any]:
    if term.text not in ("true", "false"):
        raise _wrong(text, term.start, term.end, f"`{name}` is true or false")
    return name, term.text == "true"


def _time(name: str, term: _Term, text: str, now: datetime) -> tuple[str, Any]:
    span = _SPAN.fullmatch(term.text)
    if span is None:
        return name, term.text
    try:
        return name, now - timedelta(**{_UNITS[span[2]]: int(span[1])})
    except OverflowError:
        raise _wrong(text, term.start, term.end, "that is before the year 1") from None


def _whole(name: str, term: _Term, _text: str, _now: datetime) -> tuple[str, Any]:
    return name, term.text


_READERS: dict[str, Callable[[str, _Term, str, datetime], tuple[str, Any]]] = {
    "list": _list,
    "columns": _list,
    "prefix": _prefix,
    "flag": _flag,
    "time": _time,
    "words": _whole,
    "key": _whole,
}


def _read_path(path: str) -> str:
    r"""Return a path as the filter wants it: ``\.`` and ``\\`` stay, another sign is what stands behind a backslash."""
    return re.sub(r"\\(.)", lambda escape: escape[0] if escape[1] in ".\\" else escape[1], path, flags=re.DOTALL)


def _read_scalar(term: _Term) -> Any:
    text = term.text
    if not term.plain:
        return text
    if text in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[text]
    if _NUMBER.fullmatch(text):
        number = Decimal(text)
        return int(text) if text.lstrip("-").isdigit() and len(text) <= 1001 else number
    return text


def _note(places: dict[str, _Term], name: str, term: _Term, text: str, *, again: bool = False) -> None:
    before = places.setdefault(name, term)
    if before is term or (again and before.key is None):
        return
    one = term.key if term.key is not None else "a word"
    key = rules.printable(one)
    several = name in _LISTS or name in _LISTS.values()
    advice = f"say {key}:a,b for one of several" if several else "all terms must hold, so one of them is enough"
    raise _wrong(text, term.start, term.end, f"`{key}` is given twice; {advice}")


def _check(filters: dict[str, Any], places: dict[str, _Term], text: str) -> None:
    try:
        check(filters, COUNT_FILTERS, "a query")
    except ValidationError as error:
        field = error.field or ""
        term = places.get(field) or places.get(re.split(r"[.\[]", field)[0])
        message = str(error)
    else:
        return
    if term is None:
        raise ValidationError(message, field="query")
    raise _wrong(text, term.start, term.end, message)


def _wrong(text: str, start: int, end: int, message: str) -> QueryError:
    return QueryError(message, text=text, column=start + 1, length=end - start)


# ------------------------------------------------------------------------------------------ to text


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _written(value: Any, *, ends: bool = True) -> str:
    text = str(value)
    return text if _BARE.fullmatch(text) and (ends or text) else _quoted(text)


def _written_path(path: Any) -> str:
    return re.sub(r'([\s":])', r"\\\1", str(path))


def _written_scalar(value: Any) -> str:
    if isinstance(value, str):
        text = str.__str__(value)
        bare = _BARE.fullmatch(text) and not _NUMBER.fullmatch(text) and text not in ("true", "false", "null")
        return text if bare else _quoted(text)
    return jsonb_text(value)


def _written_time(value: Any) -> str:
    if isinstance(value, (datetime, date)):
        moment = rules.moment(value, "since")
        return moment.isoformat().replace("+00:00", "Z")
    return _written(value)
