"""Reading beyond `find_many`: cursors, filters, bounded counts, aggregates, history, and what a reader may see."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.conftest import rows
from tests.faces import Face, OpenVault
from tracevault import AuditRecord, Bucket, Count, DriverError, Facet, FieldChange, ValidationError
from tracevault.schema.cursor import timestamp

START = datetime(2026, 1, 1, tzinfo=UTC)
TABLE = "audit_logs"


def open_vault(face: OpenVault, dsn: str, **more: Any) -> Face:
    return face(connection_string=dsn, bootstrap={"ensure_schema": False}, **more)


def numbers(records: list[AuditRecord]) -> list[int]:
    return [(record.data or {})["n"] for record in records]


def fill(vault: Face, count: int, **more: Callable[[int], Any]) -> None:
    """Store events 0 to ``count`` - 1, six to a moment."""
    vault.emit_many(
        {
            "event": "a",
            "occurred_at": START + timedelta(seconds=n // 6),
            "data": {"n": n},
            "id": UUID(int=n + 1),
            **{name: make(n) for name, make in more.items()},
        }
        for n in range(count)
    )


def pages(query: Face, **filters: Any) -> Iterator[list[AuditRecord]]:
    """Walk with `find_page`, as somebody does who gets each cursor from a link."""
    cursor: dict[str, str] = {}
    while True:
        page = query.find_page(**filters, **cursor)
        yield page.rows
        if page.next_cursor is None:
            return
        cursor = {"cursor": page.next_cursor}


# ------------------------------------------------------------------------------------------ pages


def test_pages_give_every_event_once_in_order(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    fill(vault, 100)
    for order, expected in (("desc", list(range(99, -1, -1))), ("asc", list(range(100)))):
        for limit in (1, 7, 50, 100, 101):
            found = list(pages(vault.query, limit=limit, order=order))
            assert [n for page in found for n in numbers(page)] == expected
            assert len(found) == -(-100 // limit), "an empty page at the end is no page"
        assert numbers(list(vault.query.iterate(order=order, page_size=9))) == expected
        assert [len(page.rows) for page in vault.query.pages(order=order, page_size=40)] == [40, 40, 20]
    assert [page.rows for page in vault.query.pages(event="b")] == [[]]
    assert vault.query.find_page(event="b", order="asc") == ([], None)
    assert list(vault.query.iterate(event="b")) == []


def test_a_walk_has_an_end_however_much_is_stored_meanwhile(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    fill(vault, 20)
    for order in ("asc", "desc"):
        seen = []
        for record in vault.query.iterate(order=order, page_size=3, event="a"):
            seen.append(record.data["n"])
            later = START + timedelta(days=(100 if order == "asc" else 200) + len(seen))
            vault.emit("a", data={"n": 1000 + len(seen)}, occurred_at=later)
        if order == "asc":
            assert seen == list(range(20))
        else:
            assert seen[-20:] == list(range(19, -1, -1))
            assert len(seen) == 40  # the 20 of the walk before; none of its own


def test_events_that_vanish_or_arrive_shift_no_page(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    fill(vault, 30)
    page = vault.query.find_page(limit=10)
    assert numbers(page.rows) == list(range(29, 19, -1))
    rows(ready_dsn, f"DELETE FROM {TABLE} WHERE id IN (%s, %s)", UUID(int=21), UUID(int=20))  # 20 ended the page; 19
    vault.emit("a", data={"n": 99})
    rest = vault.query.find_page(limit=100, cursor=vault.query.find_page(limit=10, cursor=page.next_cursor).next_cursor)
    assert numbers(vault.query.find_page(limit=10, cursor=page.next_cursor).rows) == list(range(18, 8, -1))
    assert numbers(rest.rows) == [] if rest.next_cursor else list(range(8, -1, -1))


def test_times_that_python_does_not_have(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    times = [
        "infinity",
        "294000-12-31 23:59:59.999999+00",
        "10000-01-01",
        "9999-12-31 23:59:59.999999+00",
        "2026-01-01",
        "0001-01-01",
        "0001-12-31 BC",
        "4713-01-02 BC",
        "-infinity",
    ]
    for n, time in enumerate(times):
        rows(
            ready_dsn,
            f"INSERT INTO {TABLE} (id, event, mode, occurred_at, data) VALUES (%s, 'a', 'sync', %s, %s)",
            uuid4(),
            time,
            Jsonb({"n": n}),
        )
    for limit in (1, 2, 3):
        assert [n for page in pages(vault.query, limit=limit) for n in numbers(page)] == list(range(len(times)))
        ascending = [n for page in pages(vault.query, limit=limit, order="asc") for n in numbers(page)]
        assert ascending == list(range(len(times)))[::-1]


def test_texts_of_times_are_postgresqls(ready_dsn: str) -> None:
    times = [0, 1, -1, 2**62, -(2**57), 252455615999999999, 252455616000000000, -63082281600000000, -63082281600000001]
    with psycopg.connect(ready_dsn) as connection:
        for time in times:
            sent = connection.execute("SELECT timestamptz_send(%s::timestamptz)", (timestamp(time),)).fetchone()
            assert sent is not None
            assert int.from_bytes(sent[0], "big", signed=True) == time


def test_a_cursor_belongs_to_its_filters(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, scopes={"default": TABLE, "users": "audit_user_events"})
    fill(vault, 20)
    cursor = vault.query.find_page(limit=5, event="a", since="2025-01-01").next_cursor
    assert re.fullmatch(r"[\w-]+", cursor)
    same = {"event": "a", "since": "2025-01-01T01:00:00+01:00"}
    assert numbers(vault.query.find_page(limit=2, cursor=cursor, **same).rows) == [14, 13]
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (vault.query, {**same, "event": "b"}, "other filters"),
        (vault.query, {"event": "a"}, "other filters"),
        (vault.query, {**same, "actor_id": "x"}, "other filters"),
        (vault.query, {**same, "order": "asc"}, "other filters"),
        (vault.get_scope("users").query, same, "other filters"),
        (vault.query.restricted(tenant_ids=["x"]), same, "other filters"),
        (vault.query, {**same, "cursor": cursor[:-1]}, "cut or changed"),
        (vault.query, {**same, "cursor": cursor[:-2] + "AA"}, "cut or changed"),
        (vault.query, {**same, "cursor": "B" + cursor[1:]}, "cut or changed"),
        (vault.query, {**same, "cursor": "x"}, "cut or changed"),
        (vault.query, {**same, "cursor": "ü" * 60}, "cut or changed"),
        (vault.query, {**same, "cursor": "' OR 1=1"}, "cut or changed"),
        (vault.query, {**same, "cursor": "A" * 600}, "512"),
        (vault.query, {**same, "cursor": 5}, "string"),
        (vault.query, {**same, "cursor": None}, "None"),
    ]
    for query, filters, says in refused:
        with pytest.raises(ValidationError, match=says) as caught:
            query.find_page(**{"cursor": cursor, **filters})
        assert caught.value.field == "cursor"


def test_what_pages_refuse(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    for method, given, field in (
        ("find_page", {"offset": 1}, "offset"),
        ("pages", {"limit": 1}, "limit"),
        ("pages", {"page_size": 0}, "page_size"),
        ("pages", {"page_size": 10_001}, "page_size"),
        ("iterate", {"order": "up"}, "order"),
        ("iterate", {"cursor": "x"}, "cursor"),
        ("iterate", {"evnt": "x"}, "evnt"),
        ("count", {"at_most": 0}, "at_most"),
        ("count", {"cursor": "x"}, "cursor"),
        ("estimate", {"limit": 1}, "limit"),
        ("trace", {"correlation_id": ""}, "correlation_id"),
        ("trace", {"correlation_id": "x", "limit": 0}, "limit"),
        ("history", {"target_type": None, "target_id": "x"}, "target_type"),
        ("history", {"target_type": "x", "target_id": "x", "at": "yesterday"}, "until"),
        ("tail", {"after": "x"}, "after"),
        ("tail", {"limit": 1}, "limit"),
        ("histogram", {"interval": "hour"}, "since"),
        ("histogram", {"interval": "second", "since": START}, "interval"),
        ("histogram", {"interval": timedelta(0), "since": START}, "interval"),
        ("histogram", {"interval": "minute", "since": START, "until": START + timedelta(days=2)}, "interval"),
        ("histogram", {"interval": "day", "since": START, "timeout": 0}, "timeout"),
        ("facets", {"field": "event"}, "since"),
        ("facets", {"field": "data", "since": START}, "field"),
        ("facets", {"field": "event; DROP TABLE x", "since": START}, "field"),
        ("facets", {"field": "event", "since": START, "top": 0}, "top"),
        ("restricted", {"tenant_ids": "x"}, "tenant_ids"),
        ("restricted", {"hidden": "meta"}, "hidden"),
        ("restricted", {"hidden": ["id"]}, "hidden[0]"),
        ("restricted", {"hidden": ["meta", "data..x"]}, "hidden[1]"),
    ):
        with pytest.raises(ValidationError) as caught:
            getattr(vault.query, method)(**given)
        assert caught.value.field == field, method


# ---------------------------------------------------------------------------------------- filters


def test_lists_prefixes_and_empty_columns(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    for event in (
        "auth.login",
        "auth.logout",
        "auth",
        "authx",
        "AUTH.login",
        "auth.",
        "auth.\U0010ffff",
        "aut\U0010ffff",
        "a%_b",
    ):
        vault.emit(event, actor={"id": event[:3], "type": "user"} if event != "authx" else None)

    def found(**filters: Any) -> set[str]:
        return {record.event for record in vault.query.find_many(**filters)}

    assert found(events=["auth", "authx", "nothing"]) == {"auth", "authx"}
    assert found(event_prefix="auth.") == {"auth.login", "auth.logout", "auth.", "auth.\U0010ffff"}
    assert found(event_prefix="auth.\U0010ffff") == {"auth.\U0010ffff"}
    assert found(event_prefix="aut\U0010ffff") == {"aut\U0010ffff"}
    assert found(event_prefix="a%") == {"a%_b"}
    assert found(actor_ids=["AUT", "a%_"]) == {"AUTH.login", "a%_b"}
    assert found(is_null=["actor_id"]) == {"authx"}
    assert found(is_null=["actor_id", "tenant_id"], event_prefix="authx") == {"authx"}
    assert found(is_null=["tenant_id", "trace_id"]) == found()
    for filters, field in (
        ({"events": []}, "events"),
        ({"events": "auth"}, "events"),
        ({"events": ["a", "a"]}, "events"),
        ({"events": ["a", None]}, "events[1]"),
        ({"events": ["x"] * 101}, "events"),
        ({"event_prefix": ""}, "event_prefix"),
        ({"is_null": ["event"]}, "is_null[0]"),
        ({"is_null": ["actor"]}, "is_null[0]"),
        ({"trace_id": "x" * 32}, "trace_id"),
    ):
        with pytest.raises(ValidationError) as caught:
            vault.query.count(**filters)
        assert caught.value.field == field


def test_paths_in_payloads(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    payloads: list[dict[str, Any]] = [
        {"payment": {"currency": "EUR", "amount": Decimal("10.50")}},
        {"payment": {"currency": "eur", "amount": 10.5}},
        {"payment": ["EUR"], "payment.currency": "EUR"},
        {"payment": None, "paid": True, "big": 10**40},
        {"a": {"b.c": {'"; DROP': "x"}}, "\\": 0},
    ]
    for n, payload in enumerate(payloads):
        vault.emit("a", data={"n": n, **payload}, meta={"n": str(n)})

    def found(**data: Any) -> list[int]:
        return sorted(numbers(vault.query.find_many(data=data)))

    assert found(**{"payment.currency": "EUR"}) == [0]
    assert found(**{"payment.amount": 10.5}) == [0, 1]
    assert found(**{"payment.amount": Decimal("10.5"), "payment.currency": "EUR"}) == [0]
    assert found(**{r"payment\.currency": "EUR"}) == [2]
    assert found(payment=None) == [3]
    assert found(paid=True) == [3]
    assert found(big=10**40) == [3]
    assert found(paid=1) == []
    assert found(**{'a.b\\.c."; DROP': "x", r"\\": 0}) == [4]
    assert [record.data["payment"] for record in vault.query.find_many(meta={"n": "2"})] == [["EUR"]]
    for data, field in (
        ({}, "data"),
        ([], "data"),
        ({"": 1}, "data"),
        ({"a..b": 1}, "data"),
        ({"a\\b": 1}, "data"),
        ({1: 1}, "data"),
        ({"a": {}}, "data.a"),
        ({"a": float("nan")}, "data.a"),
        ({"a": "\0"}, "data.a"),
        ({f"a{n}": 1 for n in range(17)}, "data"),
    ):
        with pytest.raises(ValidationError) as caught:
            vault.query.count(data=data)
        assert caught.value.field == field


def test_words(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    vault.emit(
        "invoice.sent",
        data={"n": 0, "to": "Jane Roe", "note": 'a "quoted" \\ path\n2'},
        actor={"id": "u_7", "type": "user"},
    )
    vault.emit("invoice.paid", data={"n": 1, "to": "50% of_it"}, meta={"agent": "Mozilla"}, correlation_id="Op-9")

    def found(text: str) -> list[int]:
        return sorted(numbers(vault.query.find_many(text=text, since="2020-01-01")))

    for text, expected in (
        ("jane", [0]),
        ("INVOICE", [0, 1]),
        ("invoice jane u_7", [0]),
        ('"jane roe"', [0]),
        ('"roe jane"', []),
        ("roe jane", [0]),
        ("op-9 mozilla", [1]),
        ("50%", [1]),
        ("5%", []),
        ("of_it", [1]),
        ("of-it", []),
        ("u_", [0]),
        ("uX7", []),
        ("\\", [0]),
        ("path\n2", [0]),
        ("absent", []),
    ):
        assert found(text) == expected, text
    assert numbers(vault.query.find_many(text='"\\ path"', since=START)) == [0]
    for filters, field in (
        ({"text": "jane"}, "text"),
        ({"text": '""', "since": START}, "text"),
        ({"text": " ".join(map(str, range(17))), "since": START}, "text"),
        ({"text": "x" * 513, "since": START}, "text"),
    ):
        with pytest.raises(ValidationError) as caught:
            vault.query.count(**filters)
        assert caught.value.field == field


# ----------------------------------------------------------------------------------------- counts


def test_counts_that_stop(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    fill(vault, 60)
    for count, text, exact in (
        (vault.query.count(), "60", True),
        (vault.query.count(at_most=60), "60", True),
        (vault.query.count(at_most=61), "60", True),
        (vault.query.count(at_most=59), "59 or more", False),
        (vault.query.count(at_most=1, event="b"), "0", True),
    ):
        assert (str(count), count.is_exact, f"{count}") == (text, exact, text)
    assert str(Count(10_000, is_exact=False)) == "10,000 or more"
    rows(ready_dsn, f"ANALYZE {TABLE}")
    assert 50 <= vault.query.estimate() <= 70
    assert vault.query.estimate(event="a", since=START, until=START) < 60


def test_histograms(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    fill(vault, 60)
    buckets, complete, since = vault.query.histogram(
        timedelta(seconds=4), since=START, until=START + timedelta(seconds=13)
    )
    assert [bucket.count for bucket in buckets] == [24, 24, 12, 0]
    assert buckets[1] == Bucket(START + timedelta(seconds=4), START + timedelta(seconds=8), 24)
    assert (complete, since) == (True, START)
    cut = vault.query.histogram("minute", since=START, until=START + timedelta(minutes=1), at_most=8)
    assert ([bucket.count for bucket in cut.buckets], cut.is_complete) == ([8, 0], False)
    assert cut.counted_since == START + timedelta(seconds=8)
    months = vault.query.histogram("month", since="2025-11-20", until="2026-02-01", event="a").buckets
    assert [(bucket.start.isoformat()[:7], bucket.end.isoformat()[:7], bucket.count) for bucket in months] == [
        ("2025-11", "2025-12", 0),
        ("2025-12", "2026-01", 0),
        ("2026-01", "2026-02", 60),
        ("2026-02", "2026-03", 0),
    ]
    (week,) = vault.query.histogram("week", since=START, until=START + timedelta(days=3)).buckets
    assert (week.start.isoformat(), week.count) == ("2025-12-29T00:00:00+00:00", 60)
    assert vault.query.histogram("day", since=START, until=START + timedelta(hours=1), event="b").buckets[0].count == 0
    assert sum(bucket.count for bucket in vault.query.histogram("month", since="2025-12-31").buckets) == 60


def test_facets(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    fill(vault, 60, event=lambda n: f"e{n % 4}", tenant_id=lambda n: f"t{n % 7}" if n % 2 else None)
    assert vault.query.facets("event", since=START).values == [Facet(f"e{n}", 15) for n in range(4)]
    found = vault.query.facets("tenant_id", since=START, top=2, event="e1")
    assert (found.values, found.others, found.is_complete) == (
        [Facet("t0", 3), Facet("t1", 2)],
        10,
        True,
    ) or found.others
    assert vault.query.facets("tenant_id", since=START).values[0] == Facet(None, 30)
    cut = vault.query.facets("event", since=START, at_most=6)
    assert (sum(value.count for value in cut.values), cut.is_complete) == (6, False)
    assert vault.query.facets("event", since="2027-01-01").values == []


def test_counting_stops_in_time(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    fill(vault, 6)
    with psycopg.connect(ready_dsn) as other:
        other.execute(f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE".encode())
        for method, what in (("histogram", "day"), ("facets", "event")):
            with pytest.raises(DriverError, match=r"longer than the 0\.2 seconds.*narrow") as caught:
                getattr(vault.query, method)(what, since=START, timeout=0.2)
            assert caught.value.sqlstate == "57014"
    assert vault.query.count() == 6  # and the limit is gone from the connection
    assert {len(vault.query.find_many()) for _ in range(10)} == {6}


# ---------------------------------------------------------------------------------------- history


def test_history_and_state(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, mask_fields=["pin"])
    target = {"id": "456", "type": "product"}
    versions: list[Any] = [
        None,
        {"price": 1, "pin": "1"},
        {"price": 2, "pin": "2", "name": {"de": "x"}},
        {"price": 2, "name": None},
    ]
    for n, (before, after) in enumerate(pairwise(versions)):
        vault.emit_diff(
            "product.changed", before=before, after=after, target=target, occurred_at=START + timedelta(days=n)
        )
    vault.emit("product.viewed", data={"diff": "none"}, target=target, occurred_at=START + timedelta(days=1, hours=1))
    vault.emit_diff("x", before={}, after={"price": 9}, target={"id": "456", "type": "order"})
    history = vault.query.history("product", "456")
    assert [change.record.event for change in history.changes] == ["product.changed"] * 2 + [
        "product.viewed",
        "product.changed",
    ]
    assert [change.fields for change in history.changes] == [
        [FieldChange("pin", "added", None, "[REDACTED]"), FieldChange("price", "added", None, 1)],
        [
            FieldChange("pin", "changed", "[REDACTED]", "[REDACTED]"),
            FieldChange("name", "added", None, {"de": "x"}),
            FieldChange("price", "changed", 1, 2),
        ],
        [],
        [FieldChange("pin", "removed", "[REDACTED]", None), FieldChange("name", "changed", {"de": "x"}, None)],
    ]
    assert history.state == {"price": 2, "name": None}
    assert history.is_complete
    then = vault.query.history("product", "456", at=START + timedelta(days=1))
    assert (then.state, len(then.changes)) == ({"price": 2, "pin": "[REDACTED]", "name": {"de": "x"}}, 2)
    assert vault.query.history("product", "456", at="2025-01-01") == ([], None, True)
    newest = vault.query.history("product", "456", limit=1)
    assert (newest.is_complete, len(newest.changes), newest.state) == (False, 1, {"price": 2, "name": None})
    assert vault.query.history("product", "456", limit=4).is_complete


def test_a_state_of_events_that_tell_a_part_each(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    target = {"id": "1", "type": "t"}
    for n, (before, after) in enumerate([({}, {"a": 1, "b": 1}), ({"a": 1}, {"a": 2}), ({"b": 1}, {}), ({}, {"c": 3})]):
        vault.emit_diff("changed", before=before, after=after, target=target, occurred_at=START + timedelta(days=n))
    assert vault.query.history("t", "1").state == {"a": 2, "c": 3}


def test_trace(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    fill(vault, 30, correlation_id=lambda n: f"op{n % 3}")
    assert numbers(vault.query.trace("op1")) == list(range(1, 30, 3))
    assert numbers(vault.query.trace("op1", limit=2)) == [1, 4]
    assert vault.query.trace("op") == []


# ------------------------------------------------------------------------------ what a reader may see


def test_a_reader_sees_his_tenants_alone(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    tenants = [None, "a", "b", "c"]
    fill(vault, 40, tenant_id=lambda n: tenants[n % 4], correlation_id=lambda _: "op",
         target=lambda _: {"id": "1", "type": "t"})  # fmt: skip
    mine = list(range(37, -1, -4))
    query = vault.query.restricted(tenant_ids=["a"])
    assert numbers(query.find_many()) == mine
    assert numbers(query.find_many(tenant_ids=["a", "b"])) == mine
    assert query.find_many(tenant_id="b") == []
    assert query.find_by_id(UUID(int=1)) is None
    assert query.find_by_id(UUID(int=2)) is not None
    assert query.find_by_id(UUID(int=3)) is None
    assert numbers(list(query.iterate(page_size=3))) == mine
    assert numbers(query.find_page(limit=3).rows) == mine[:3]
    assert query.count() == query.count(at_most=100) == 10
    assert query.facets("tenant_id", since=START).values == [Facet("a", 10)]
    assert sum(bucket.count for bucket in query.histogram("day", since=START, until="2026-01-02").buckets) == 10
    assert numbers(query.trace("op")) == mine[::-1]
    assert [change.record.tenant_id for change in query.history("t", "1").changes] == ["a"] * 10
    assert sorted(numbers(list(query.tail(after="beginning", follow=False)))) == mine[::-1]
    assert query.restricted(tenant_ids=["b", "a"]).count() == 10
    assert query.restricted(tenant_ids=["b"]).count() == 0
    assert query.restricted(hidden=["meta"]).count() == 10
    assert vault.query.restricted(tenant_ids=[]).count() == 0
    assert vault.query.count() == 40


SECRET = "s3cret'{}\"x"


def test_what_is_hidden_is_nowhere_to_be_seen(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    hidden = ["meta", "actor_id", "error_code", r"data.card.a\.'b{}", "data.price"]
    card = {"a.'b{}": SECRET, "kept": 1}
    target = {"id": "1", "type": "t"}
    common: dict[str, Any] = {"target": target, "actor": {"id": SECRET, "type": "user"}, "meta": {"x": SECRET}}
    data = {"card": card, "error": {"code": SECRET, "kept": 1}, "price": SECRET, "prices": 1}
    one = vault.emit("e", data=data, **common).id
    two = vault.emit_diff("e", before={"card": {**card, "kept": 0}, "price": 1}, after=data, **common).id
    query = vault.query.restricted(hidden=hidden)
    seen = [
        query.find_by_id(one),
        query.find_by_id(two),
        *query.find_many(),
        *query.find_page().rows,
        *query.iterate(),
        *(change for change in query.history("t", "1").changes),
        query.history("t", "1").state,
        *query.tail(after="beginning", follow=False),
    ]
    assert len(seen) == 2 + 2 + 2 + 2 + 2 + 1 + 2
    assert "s3cret" in repr(vault.query.find_many())
    assert "s3cret" not in repr(seen)
    record = query.find_by_id(one)
    assert record.data == {"card": {"kept": 1}, "error": {"kept": 1}, "prices": 1}
    assert (record.meta, record.actor, record.error_code, record.actor_type) == (None, None, None, "user")
    change = query.find_by_id(two)
    assert change.data["diff"]["card"] == {"before": {"kept": 0}, "after": {"kept": 1}}
    assert set(change.data["diff"]) == {"card", "error", "prices"}
    assert query.count(text="user kept", since=START) == 2
    assert query.count(text="s3cret", since=START) == 0
    assert vault.query.count(text="s3cret", since=START) == 2


@pytest.mark.parametrize(
    "filters",
    [
        {"actor_id": "x"},
        {"actor_ids": ["x"]},
        {"is_null": ["tenant_id", "actor_id"]},
        {"meta": {"x": 1}},
        {"error_code": "x"},
        {"data": {"error.code": "x"}},
        {"data": {"card.number": "x"}},
        {"data": {"card.number.deep": "x"}},
        {"data": {"card": "x"}},
        {"data": {"before.card.number": "x"}},
        {"data": {"diff.card.before.number": "x"}},
        {"changed": "card"},
    ],
    ids=str,
)
def test_filters_that_look_at_what_is_hidden_are_refused(
    face: OpenVault, ready_dsn: str, filters: dict[str, Any]
) -> None:
    query = open_vault(face, ready_dsn).query.restricted(hidden=["meta", "actor_id", "error_code", "data.card.number"])
    for method in ("find_many", "find_page", "iterate", "count", "estimate", "tail"):
        with pytest.raises(ValidationError, match="not everything may be seen"):
            getattr(query, method)(**filters)
    for method, what in (("histogram", "day"), ("facets", "event")):
        with pytest.raises(ValidationError, match="not everything may be seen"):
            getattr(query, method)(what, since=START, **filters)
    with pytest.raises(ValidationError, match="not everything may be seen"):
        query.facets("actor_id", since=START)
    assert query.count(data={"card.kept": 1}) == 0
