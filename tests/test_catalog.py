"""Typed events: what a declared class says of an event's payload, however the event is emitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NotRequired, TypedDict

import pydantic
import pytest

import tracevault
from tests.conftest import rows
from tests.faces import Face, OpenVault
from tracevault import ConfigError, Tracevault, ValidationError
from tracevault.events import catalog as rooms

READY: Any = {"bootstrap": {"ensure_schema": False}}


@pytest.fixture(autouse=True)
def own_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalog of the test's own, with what is declared here."""
    monkeypatch.setattr(rooms, "_by_name", {})
    monkeypatch.setattr(rooms, "_by_class", {})
    tracevault.event("price.updated")(PriceUpdated)
    tracevault.event("doc.shared", description="A document was shared.")(DocShared)
    tracevault.event("order.paid")(OrderPaid)


@dataclass
class Money:
    amount: Decimal
    currency: str = "EUR"


@dataclass
class PriceUpdated:
    """A product's price changed.

    More of it.
    """

    old: Money
    new: Money
    tags: list[str] = field(default_factory=list)
    at: datetime | None = None


class DocShared(TypedDict):
    with_: str
    note: NotRequired[str]


class Line(pydantic.BaseModel):
    sku: str
    count: int = pydantic.Field(gt=0)


class OrderPaid(pydantic.BaseModel):
    """An order was paid."""

    lines: list[Line]
    secret: str | None = None


@pytest.fixture
def audit(face: OpenVault, ready_dsn: str) -> Face:
    return face(connection_string=ready_dsn, **READY, mask_fields=["secret"])


def stored(dsn: str) -> list[tuple[Any, ...]]:
    return rows(dsn, "SELECT event, actor_id, data FROM audit_logs ORDER BY id")


def test_an_instance_is_an_event(audit: Face, ready_dsn: str) -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    audit.emit(PriceUpdated(Money(Decimal("1.50")), Money(Decimal(2)), ["x"], at), actor={"id": "a", "type": "user"})
    audit.emit(OrderPaid(lines=[Line(sku="s", count=2)], secret="x"))
    audit.emit(DocShared, data={"with_": "bea"})
    audit.emit_many([OrderPaid(lines=[]), {"event": "free", "data": {"x": 1}}])
    audit.emit("price.updated", data=PriceUpdated(Money(Decimal(1)), Money(Decimal(2))))
    old, new = {"amount": Decimal("1.50"), "currency": "EUR"}, {"amount": 2, "currency": "EUR"}
    found = stored(ready_dsn)
    assert found[0] == (
        "price.updated",
        "a",
        {"old": {**old, "amount": 1.5}, "new": new, "tags": ["x"], "at": "2026-01-02T00:00:00.000Z"},
    )
    assert found[1] == ("order.paid", None, {"lines": [{"sku": "s", "count": 2}], "secret": "[REDACTED]"})
    assert [event for event, *_ in found[2:]] == ["doc.shared", "order.paid", "free", "price.updated"]
    assert found[2][2] == {"with_": "bea"}
    assert found[5][2] == {"old": {**new, "amount": 1}, "new": new, "tags": [], "at": None}


@pytest.mark.parametrize(
    ("event", "fields", "path", "says"),
    [
        (
            DocShared,
            {"data": {}},
            "data.with_",
            "is missing: tests.test_catalog.DocShared says what 'doc.shared' holds",
        ),
        ("doc.shared", {}, "data.with_", "is missing"),
        ("doc.shared", {"data": {"with_": "b", "nota": 1}}, "data.nota", "is not declared: .* did you mean `note`?"),
        ({"event": "doc.shared", "data": {"x": 1}}, {}, "data.x", "is not declared"),
        ("price.updated", {"data": {"old": 1}}, "data.new", "is missing"),
        (PriceUpdated, {"data": 5}, "data", "must be a dict"),
        (OrderPaid, {"data": {"lines": [{"sku": "s", "count": 0}]}}, "data.lines.0.count", "greater than 0"),
        (OrderPaid, {"data": {"lines": "geheim"}}, "data.lines", "valid list"),
        (OrderPaid(lines=[]), {"data": {}}, "data", "given twice: by the instance and as a keyword"),
        (OrderPaid(lines=[]), {"event": "other"}, "event", "given twice"),
        (
            Money(Decimal(1)),
            {},
            "event",
            "must be a string, or what is declared as an event: Money is not, decorate it",
        ),
        (Line(sku="s", count=1), {}, "event", "Line is not"),
        (Money, {}, "event", "Money is not"),
        (5, {}, "event", "must be a string, got 5"),
    ],
)
def test_what_does_not_fit_is_refused(
    audit: Face, ready_dsn: str, event: Any, fields: dict[str, Any], path: str, says: str
) -> None:
    with pytest.raises(ValidationError, match=says) as caught:
        audit.emit(event, **fields)
    assert caught.value.field == path
    assert "geheim" not in str(caught.value)
    assert caught.value.__context__ is None
    assert stored(ready_dsn) == []


def test_diffs_of_declared_events(audit: Face, ready_dsn: str) -> None:
    before, after = (
        PriceUpdated(Money(Decimal(1)), Money(Decimal(2))),
        PriceUpdated(Money(Decimal(1)), Money(Decimal(3))),
    )
    audit.emit_diff(PriceUpdated, before=before, after=after)
    audit.emit_diff("doc.shared", before={"note": "a"}, after={"note": "b"})
    assert [data["diff"] for *_, data in stored(ready_dsn)] == [
        {"new": {"before": {"amount": 2, "currency": "EUR"}, "after": {"amount": 3, "currency": "EUR"}}},
        {"note": {"before": "a", "after": "b"}},
    ]
    with pytest.raises(ValidationError, match=r"`after.nota` is not declared") as caught:
        audit.emit_diff("doc.shared", after={"nota": 1})
    assert caught.value.field == "after.nota"
    with pytest.raises(ValidationError, match="pass the class, and instances of it as `before` and `after`"):
        audit.emit_diff(before)


def test_a_closed_catalog(ready_dsn: str) -> None:
    tracevault.declare("user.signed_in", "user.signed_out", description="Sessions.")
    with Tracevault(connection_string=ready_dsn, **READY, catalog="closed") as audit:
        audit.emit("user.signed_in", data={"anything": 1})
        audit.emit(DocShared, data={"with_": "b"})
        for emit in (audit.emit, audit.emit_diff):
            with pytest.raises(
                ValidationError, match=r"is not in the catalog, which is closed; did you mean `user.sign"
            ):
                emit("user.signed_on")
        with pytest.raises(ValidationError, match=r"events\[1\]: `event` 'x' is not in the catalog"):
            audit.emit_many(["user.signed_out", "x"])
    assert [event for event, *_ in stored(ready_dsn)] == ["user.signed_in", "doc.shared"]


def test_the_catalog() -> None:
    tracevault.declare("user.signed_in", "doc.shared", description="Sessions.")
    shown = {event.name: event for event in tracevault.catalog()}
    assert list(shown) == ["doc.shared", "order.paid", "price.updated", "user.signed_in"]
    price = shown["price.updated"]
    assert (price.kind, price.description) == ("dataclass", "A product's price changed.")
    assert price.source == "tests.test_catalog.PriceUpdated"
    assert [(f.name, f.type, f.required) for f in price.fields or ()] == [
        ("old", "Money", True),
        ("new", "Money", True),
        ("tags", "list[str]", False),
        ("at", "datetime | None", False),
    ]
    doc = shown["doc.shared"]
    assert (doc.kind, doc.description, [(f.name, f.required) for f in doc.fields or ()]) == (
        "TypedDict",
        "A document was shared.",
        [("with_", True), ("note", False)],
    )
    paid = shown["order.paid"]
    assert [(f.name, f.type, f.required) for f in paid.fields or ()] == [
        ("lines", "list[tests.test_catalog.Line]", True),
        ("secret", "str | None", False),
    ]
    name = shown["user.signed_in"]
    assert (name.kind, name.fields, name.source, name.description) == ("name", None, "tests.test_catalog", "Sessions.")


def test_what_cannot_be_declared() -> None:
    @dataclass
    class Other:
        x: int

    with pytest.raises(ConfigError, match=r"'price.updated' is declared twice: by tests.test_catalog.PriceUpdated and"):
        tracevault.event("price.updated")(Other)
    for wrong in (int, print, "x"):
        with pytest.raises(ConfigError, match="takes a dataclass, a TypedDict or a pydantic model"):
            tracevault.event("other")(wrong)  # type: ignore[type-var]
    for name in ("", "a\nb", None, "x" * 256):
        with pytest.raises(ValidationError):
            tracevault.event(name)  # type: ignore[arg-type]
        with pytest.raises(ValidationError):
            tracevault.declare(name)  # type: ignore[arg-type]
    tracevault.event("price.updated")(PriceUpdated)  # loaded anew: the same
