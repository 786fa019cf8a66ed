"""The query text: what it stands for, that it round trips, and that errors point at the place."""

from __future__ import annotations

import pickle
import re
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tracevault import QueryError, ValidationError, format_query, parse_query
from tracevault.schema.filters import COUNT_FILTERS, NULLABLE, check
from tracevault.schema.query_text import MAX_TEXT, SHORT, complete_query, keys

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SINCE = {"since": "2026-01-01"}


@pytest.mark.parametrize(
    ("text", "filters"),
    [
        ("", {}),
        (" \t\n ", {}),
        ("event:auth.login", {"event": "auth.login"}),
        ("event:auth.*", {"event_prefix": "auth."}),
        ('event:"auth.*"', {"event": "auth.*"}),
        ('event:"a b"*', {"event_prefix": "a b"}),
        ("event:a,b", {"events": ["a", "b"]}),
        ('event:"a,b"', {"event": "a,b"}),
        ('event:"a,b",c', {"events": ["a,b", "c"]}),
        ("events:a", {"events": ["a"]}),
        ("event_prefix:auth.", {"event_prefix": "auth."}),
        ("actor:user/42", {"actor_type": "user", "actor_id": "42"}),
        ("actor:42", {"actor_id": "42"}),
        ("actor:user/", {"actor_type": "user"}),
        ("actor:user/a/b", {"actor_type": "user", "actor_id": "a/b"}),
        ('actor:"a/b"', {"actor_id": "a/b"}),
        ("actor:1,2", {"actor_ids": ["1", "2"]}),
        ('target:"my type"/"x y"', {"target_type": "my type", "target_id": "x y"}),
        ("actor_id:a", {"actor_id": "a"}),
        ("tenant:t env:prod code:E1 request:r correlation:c", {
            "tenant_id": "t", "environment": "prod", "error_code": "E1", "request_id": "r", "correlation_id": "c"}),
        ("severity:error,fatal outcome:failure", {"severities": ["error", "fatal"], "outcome": "failure"}),
        ("is:error no:actor_id,tenant_id", {"errors_only": True, "is_null": ["actor_id", "tenant_id"]}),
        ("errors_only:false", {"errors_only": False}),
        ("data.payment.currency:EUR", {"data": {"payment.currency": "EUR"}}),
        ("data.a:1 data.b:1.50 data.c:true data.d:null meta.e:x", {
            "data": {"a": 1, "b": Decimal("1.50"), "c": True, "d": None}, "meta": {"e": "x"}}),
        ('data.a:"1" data.b:"true" data.c:""', {"data": {"a": "1", "b": "true", "c": ""}}),
        ("data.a:1e3 data.b:01 data.c:-0 data.d:+1", {"data": {"a": Decimal("1e3"), "b": "01", "c": 0, "d": "+1"}}),
        (r'data.a\.b.c\:d\ e\"f\\g:1', {"data": {r'a\.b.c:d e"f\\g': 1}}),
        ("data.url:http://x/y?a,b*", {"data": {"url": "http://x/y?a,b*"}}),
        ("changed:price", {"changed": "price"}),
        ("since:2026-01-01 until:2026-02-01T00:00:00Z", {"since": "2026-01-01", "until": "2026-02-01T00:00:00Z"}),
        ("since:90m", {"since": NOW - timedelta(minutes=90)}),
        ("since:7d until:1h", {"since": NOW - timedelta(days=7), "until": NOW - timedelta(hours=1)}),
        ("since:2w", {"since": NOW - timedelta(weeks=2)}),
        ('jane "two words" since:2026-01-01', {"text": 'jane "two words"', **SINCE}),
        ('text:"a \\"b c\\"" since:2026-01-01', {"text": 'a "b c"', **SINCE}),
        ('"http://x" - -5 since:2026-01-01', {"text": '"http://x" - -5', **SINCE}),
        ("5\\ since:2026-01-01", {"text": "5\\", **SINCE}),
    ],
)  # fmt: skip
def test_what_a_text_stands_for(text: str, filters: dict[str, Any]) -> None:
    parsed = parse_query(text, now=NOW)
    assert parsed == filters
    for name in ("data", "meta"):
        assert {key: type(item) for key, item in parsed.get(name, {}).items()} == {
            key: type(item) for key, item in filters.get(name, {}).items()
        }
    again = format_query(parsed)
    assert check(parse_query(again), COUNT_FILTERS, "") == check(filters, COUNT_FILTERS, "")
    assert format_query(parse_query(again)) == again


@pytest.mark.parametrize(
    ("text", "column", "length", "says"),
    [
        ("acter:x", 1, 5, "did you mean `actor`"),
        ("event:a  acter:x", 10, 5, "no key"),
        ("event:a http://x", 9, 4, 'quote it: "http://x"'),
        ("event:", 1, 6, "no value"),
        ('event:"', 7, 1, "not closed"),
        ('a "b', 3, 2, "not closed"),
        ('event:"\\n"', 8, 2, "backslash"),
        ('event:"\\', 8, 1, "backslash"),
        ("event:a event:b", 9, 7, "event:a,b"),
        ("data.a:1 data.a:2", 10, 8, "twice"),
        ("since:1d since:2d", 10, 8, "twice"),
        ("actor:user/1 actor_type:x", 14, 12, "twice"),
        ("-event:x", 1, 1, "no `not`"),
        ("event:a -outcome:x", 9, 1, "no `not`"),
        ("since:yesterday", 1, 15, "ISO 8601"),
        ("since:999999w", 1, 13, "year 1"),
        ("since:1d until:2d", 1, 8, "later"),
        ("mode:x", 1, 6, "sync"),
        ("mode:sync,async", 1, 15, "one value"),
        ("is:nice", 1, 7, "error"),
        ("no:event", 1, 8, "may be empty"),
        ("errors_only:1", 1, 13, "true or false"),
        ("event:a,b*", 1, 10, "beginning"),
        ("event:*", 1, 7, "empty"),
        ("event:a,", 1, 8, "empty"),
        ("trace:xyz", 1, 9, "hex"),
        ("data:x", 1, 4, "no key"),
        ("data.:x", 1, 7, "data"),
        ("data.a..b:x", 1, 11, "dots"),
        ("free words", 1, 4, "since"),
        ('"" since:1d', 1, 2, "nothing between"),
        ('"a \\" b" since:1d', 1, 8, "quote"),
        ("event:" + "x" * 256, 1, 262, "255"),
        ("actor:" + ",".join(map(str, range(101))), 1, None, "100"),
        ("x" * 5000, 4097, 1, "4,096"),
    ],
)
def test_errors_point_at_the_place(text: str, column: int, length: int | None, says: str) -> None:
    with pytest.raises(QueryError) as caught:
        parse_query(text, now=NOW)
    error = caught.value
    assert (error.column, error.field) == (column, "query")
    assert str(error).startswith(f"column {column}: ")
    assert says in str(error)
    assert length is None or error.length == length
    shown, carets = error.pointer.split("\n")
    assert set(carets) <= {" ", "^"}
    begin, end = carets.index("^"), len(carets)
    assert text[column - 1 : column - 1 + end - begin].startswith(shown[begin:end])
    assert pickle.loads(pickle.dumps(error)).pointer == error.pointer


def test_an_error_shows_nothing_that_acts_on_a_terminal() -> None:
    with pytest.raises(QueryError) as caught:
        parse_query("x\x1b[31m\u202ey:1")
    assert caught.value.pointer.isascii()
    assert str(caught.value).replace("\n", "").isprintable()


def test_now_is_now() -> None:
    since = parse_query("since:1h")["since"]
    assert timedelta(minutes=59) < datetime.now(UTC) - since < timedelta(minutes=61)


def test_only_text_is_parsed() -> None:
    with pytest.raises(ValidationError, match="string"):
        parse_query(None)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- round trips

_texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda text: bool(text.replace("\ufeff", "").strip())
)
_lines = _texts.filter(lambda text: not re.search(r"[\n\r\t]", text))
_path = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=5).map(
        lambda key: key.replace("\\", "\\\\").replace(".", "\\.")
    ),
    min_size=1,
    max_size=3,
).map(".".join).filter(lambda path: bool(path.replace("\ufeff", "").strip()))  # fmt: skip
_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.decimals(allow_nan=False, allow_infinity=False, places=3)
    | _texts
    | st.sampled_from(["true", "null", "1", "1e5", "", "a b", "*", "/"])
)
_times = st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1), timezones=st.just(UTC))


def _strategy(name: str) -> st.SearchStrategy[Any]:
    spec = COUNT_FILTERS[name]
    limit = spec.limit or 0
    match spec.kind:
        case "event":
            return _lines
        case "text" | "prefix" | "key":
            return _texts.map(lambda text: text[:limit]).filter(lambda text: bool(text.replace("\ufeff", "").strip()))
        case "hex":
            return st.just("ab" * 16)
        case "choice":
            return st.sampled_from(spec.choices)
        case "list":
            return st.lists(_texts, min_size=1, max_size=4, unique=True)
        case "columns":
            return st.lists(st.sampled_from(NULLABLE), min_size=1, max_size=4, unique=True)
        case "flag":
            return st.booleans()
        case "time":
            return _times | st.dates(min_value=datetime(2, 1, 1).date(), max_value=datetime(9998, 1, 1).date())
        case "paths":
            return st.dictionaries(_path, _scalars, min_size=1, max_size=4)
        case "words":
            return _texts.filter(lambda text: 1 <= len(text.split()) <= 16 and bool(text.replace('"', "").strip()))
        case _:
            raise AssertionError(f"{name} has no form in a query text")


_filters = st.fixed_dictionaries({}, optional={name: _strategy(name) for name in COUNT_FILTERS})


@settings(max_examples=600, deadline=None)
@given(_filters)
@example({"actor_id": "/", "actor_type": "a/b", "target_type": "x"})
@example({"event_prefix": "*", "events": ["*", ",", '"', "\\"]})
def test_filters_round_trip(filters: dict[str, Any]) -> None:
    try:
        expected = check(filters, COUNT_FILTERS, "")
    except ValidationError:
        with pytest.raises(ValidationError):
            format_query(filters)
        return
    text = format_query(filters)
    if len(text) <= MAX_TEXT:
        assert check(parse_query(text), COUNT_FILTERS, "") == expected
        assert format_query(parse_query(text)) == text


@settings(max_examples=1500, deadline=None)
@given(
    st.text(max_size=80)
    | st.lists(
        st.sampled_from([
            "event:", "actor:", "data.", "a", "b.c", ":", '"', "\\", "/", ",", "*", " ", "-", "is:error", "since:1d",
            "no:", "x y", "\\.", "1", "meta.k:", "until:2026-01-01", "text:", "\u202e", "events:", "\0",
        ]),
        max_size=12,
    ).map("".join)
)  # fmt: skip
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        filters = parse_query(text, now=NOW)
    except QueryError as caught:
        error = caught
    else:
        again = format_query(filters)
        assert check(parse_query(again), COUNT_FILTERS, "") == check(filters, COUNT_FILTERS, "")
        return
    assert 1 <= error.column <= len(text) + 1
    assert error.pointer.count("\n") == 1


@pytest.mark.parametrize(
    "piece", ['"', "\\", '\\"', 'a"', "a:", ":", "data.", "a.b", "\\.", "-a", "actor:", "x ", '"" ']
)
def test_it_takes_no_longer_than_it_should(piece: str) -> None:
    began = time.process_time()
    for text in (piece * (MAX_TEXT // len(piece)), "data." + piece * (4000 // len(piece)), "event:" + piece * 1000):
        try:
            parse_query(text)
        except QueryError:
            continue
    assert time.process_time() - began < 1


# ------------------------------------------------------------------------------------- suggestions


def test_suggestions() -> None:
    assert complete_query("", 0) == [f"{key}:" for key in keys()]
    assert complete_query("event:a ac", 10) == ["actor:"]
    assert complete_query("mode:", 5) == ["mode:sync", "mode:async"]
    assert complete_query("no:ten", 6) == ["no:tenant_id"]
    assert complete_query("is:", 3) == ["is:error"]
    assert complete_query("event:x", 7) == []
    assert "event" in keys()
    assert set(SHORT) <= set(keys())
    for key in keys():
        if not key.endswith(".") and key not in ("is", "no", "actor", "target"):
            assert SHORT.get(key, key) in COUNT_FILTERS
