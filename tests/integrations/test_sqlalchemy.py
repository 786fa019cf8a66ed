"""SQLAlchemy: the example over HTTP, and what is seen of the ways in which a session changes rows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Table, create_engine, delete, insert, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker
from sqlalchemy.pool import NullPool

import tracevault
from tests.conftest import rows
from tests.integrations.conftest import Start
from tests.integrations.test_connections import NOTHING_BUT_THE_LOG, _url
from tracevault import ConfigError, Tracevault, start_tracevault
from tracevault.integrations.sqlalchemy import BulkChangeError, audit_models

ROWS = "SELECT event, target_id, data FROM audit_logs ORDER BY occurred_at, id"


class Base(DeclarativeBase):
    pass


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


item_tags = Table(
    "item_tags",
    Base.metadata,
    Column("item_id", ForeignKey("item.id"), primary_key=True),
    Column("tag_id", ForeignKey("tag.id"), primary_key=True),
)


class Tag(Base):
    __tablename__ = "tag"
    id: Mapped[int] = mapped_column(primary_key=True)


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    price: Mapped[Decimal | None]
    colour: Mapped[Colour | None]
    day: Mapped[date | None]
    password: Mapped[str | None]
    seen: Mapped[int] = mapped_column(default=0)
    state: Mapped[str] = mapped_column(server_default="new")
    note: Mapped[str | None] = mapped_column(deferred=True)
    kind: Mapped[str] = mapped_column(default="item")
    tags: Mapped[list[Tag]] = relationship(secondary=item_tags)
    parts: Mapped[list[Part]] = relationship(cascade="all, delete-orphan")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item"}  # noqa: RUF012


class Book(Item):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(ForeignKey("item.id"), primary_key=True)
    pages: Mapped[int | None]
    __mapper_args__ = {"polymorphic_identity": "book"}  # noqa: RUF012


class Part(Base):
    __tablename__ = "part"
    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("item.id"))
    size: Mapped[int]


class Stranger(Base):
    __tablename__ = "stranger"
    id: Mapped[int] = mapped_column(primary_key=True)


class Shop:
    """A sessionmaker whose sessions are audited, and the events that came of them."""

    def __init__(self, dsn: str, audit: Tracevault) -> None:
        self.dsn = dsn
        self.audit = audit
        engine = create_engine(_url(dsn, "psycopg"), poolclass=NullPool)
        Base.metadata.create_all(engine)
        self.engine = engine
        self.sessions = sessionmaker(engine)

    def audited(self, **options: Any) -> sessionmaker[Session]:
        audit_models(self.sessions, self.audit, **{"models": [Item, Part], **options})
        return self.sessions

    def events(self) -> list[tuple[str, str | None, Any]]:
        """The events since the last call."""
        found = rows(self.dsn, ROWS)
        rows(self.dsn, "TRUNCATE audit_logs")
        return found

    def make(self, **values: Any) -> int:
        """Store an item and forget its events."""
        with self.sessions.begin() as session:
            item = Item(**{"name": "one", "price": Decimal("1.50"), **values})
            session.add(item)
            session.flush()
            id_ = item.id
        self.events()
        return id_


@pytest.fixture
def shop(ready_dsn: str) -> Iterator[Shop]:
    with Tracevault(connection_string=ready_dsn, mask_fields=["password"], **NOTHING_BUT_THE_LOG) as audit:
        yield Shop(ready_dsn, audit)


def test_the_example_over_http(start: Start, ready_dsn: str) -> None:
    catalogue = start("sqlalchemy", "uvicorn", "app:app", "--port", "{port}")
    ann = {"x-user": "ann", "x-correlation-id": "c-1"}
    id_ = catalogue.http.post("/products/tea", headers=ann).json()["id"]
    answer = catalogue.http.put(f"/products/{id_}/120", headers=ann)
    assert answer.status_code == 200, catalogue.output
    assert answer.json() == {"price": 120}
    assert catalogue.http.put(f"/products/{id_}/2000", headers={"x-user": "bea"}).status_code == 422
    assert "bulk statement" in catalogue.http.post("/sale", headers={"x-user": "bea"}).json()["error"]
    found = rows(ready_dsn, "SELECT event, actor_id, target_id, data FROM audit_logs ORDER BY occurred_at, id")
    created = {"id": id_, "name": "tea", "price": 100}
    changed = {"before": {"price": 100}, "after": {"price": 120}, "diff": {"price": {"before": 100, "after": 120}}}
    assert found == [
        (
            "product.created",
            "ann",
            str(id_),
            {"before": {}, "after": created, "diff": {key: {"after": value} for key, value in created.items()}},
        ),
        ("price.approved", "ann", str(id_), None),
        ("product.updated", "ann", str(id_), changed),
        ("price.denied", "bea", None, {"price": 2000}),
    ]
    xids = rows(
        ready_dsn,
        "SELECT DISTINCT stored_xid::text FROM audit_logs WHERE event IN ('price.approved', 'product.updated')",
    )
    assert xids == rows(ready_dsn, "SELECT xmin::text FROM product")
    assert rows(ready_dsn, "SELECT DISTINCT correlation_id FROM audit_logs WHERE actor_id = 'ann'") == [("c-1",)]


def test_a_created_object_with_what_the_database_made(shop: Shop) -> None:
    with shop.audited().begin() as session:
        session.add(
            Item(name="one", price=Decimal("1.50"), colour=Colour.RED, day=date(2026, 1, 2), password="hunter2")
        )
        session.add(Stranger())
    ((event, target, data),) = shop.events()
    assert (event, target) == ("item.created", "1")
    assert data["after"] == {
        "id": 1,
        "name": "one",
        "price": 1.5,
        "colour": "red",
        "day": "2026-01-02",
        "password": "[REDACTED]",
        "seen": 0,
        "state": "new",
        "note": None,
        "kind": "item",
    }


def test_an_update_has_old_and_new_values_of_what_changed(shop: Shop) -> None:
    sessions, id_ = shop.audited(), shop.make(colour=Colour.RED, password="a")
    with sessions.begin() as session:
        item = session.get_one(Item, id_)
        item.price, item.colour, item.password, item.name = Decimal(2), None, "b", "one"
    ((event, _, data),) = shop.events()
    assert event == "item.updated"
    assert data["before"] == {"price": 1.5, "colour": "red", "password": "[REDACTED]"}
    assert data["after"] == {"price": 2, "colour": None, "password": "[REDACTED]"}
    assert set(data["diff"]) == {"price", "colour", "password"}
    assert "hunter2" not in str(data)


def test_expired_and_deferred_attributes_have_their_old_values(shop: Shop) -> None:
    sessions, id_ = shop.audited(), shop.make(note="old")
    with sessions() as session:
        item = session.get_one(Item, id_)
        session.commit()  # which expires it
        item.price = Decimal(3)
        item.note = "new"
        session.commit()
    ((_, _, data),) = shop.events()
    assert data["before"] == {"price": 1.5, "note": "old"}
    assert data["after"] == {"price": 3, "note": "new"}


def test_a_value_that_the_database_computes(shop: Shop) -> None:
    sessions, id_ = shop.audited(), shop.make()
    with sessions.begin() as session:
        item = session.get_one(Item, id_)
        item.price = Item.price + 1
    ((_, _, data),) = shop.events()
    assert (data["before"], data["after"]) == ({"price": 1.5}, {"price": 2.5})


def test_nothing_changed_is_no_event(shop: Shop) -> None:
    sessions, id_ = shop.audited(exclude=[Item.seen]), shop.make()
    with sessions.begin() as session:
        item = session.get_one(Item, id_)
        item.name = "one"
        item.seen = 7
    assert shop.events() == []


def test_a_deleted_object_and_what_goes_with_it(shop: Shop) -> None:
    sessions, id_ = shop.audited(), shop.make(note="n")
    with sessions.begin() as session:
        item = session.get_one(Item, id_)
        item.parts.extend([Part(size=1), Part(size=2)])
    assert [event for event, *_ in shop.events()] == ["part.created", "part.created"]
    with sessions.begin() as session:
        item = session.get_one(Item, id_)
        item.parts.pop()  # an orphan
    ((event, target, data),) = shop.events()
    assert (event, target, data["before"]) == ("part.deleted", "2", {"id": 2, "item_id": id_, "size": 2})
    assert data["after"] == {}
    with sessions() as session:
        item = session.get_one(Item, id_)
        session.commit()
        session.delete(item)
        session.commit()
    found = {event: data for event, _, data in shop.events()}
    assert found.keys() == {"part.deleted", "item.deleted"}
    assert found["item.deleted"]["before"]["note"] == "n"
    assert found["item.deleted"]["before"]["price"] == 1.5


def test_many_to_many_collections(shop: Shop) -> None:
    with shop.sessions.begin() as session:
        session.add_all([Tag(id=1), Tag(id=2)])
    sessions, id_ = shop.audited(), shop.make()
    with sessions.begin() as session:
        item, tag = session.get_one(Item, id_), session.get_one(Tag, 1)
        item.tags.append(tag)
    with sessions.begin() as session:
        item, tag = session.get_one(Item, id_), session.get_one(Tag, 2)
        item.tags[:] = [tag]
    found = [(event, data["before"], data["after"]) for event, _, data in shop.events()]
    assert found == [
        ("item.updated", {"tags": []}, {"tags": ["1"]}),
        ("item.updated", {"tags": ["1"]}, {"tags": ["2"]}),
    ]


def test_a_subclass_and_a_name_of_ones_own(shop: Shop) -> None:
    sessions = shop.audited(models={Item: "goods", Book: "book"})
    with sessions.begin() as session:
        session.add(Book(name="b", pages=10))
        session.add(Item(name="i"))
    with sessions() as session:
        book = session.query(Book).one()
        session.commit()
        book.pages = 20
        book.name = "c"
        session.commit()
    found = [(event, data["before"]) for event, _, data in shop.events()]
    assert {event for event, _ in found[:2]} == {"book.created", "goods.created"}
    assert found[2:] == [("book.updated", {"name": "b", "pages": 10})]


def test_a_rollback_takes_events_back_and_a_savepoint_its_own(shop: Shop) -> None:
    sessions = shop.audited()
    with sessions() as session:
        session.add(Item(name="kept"))
        session.flush()
        with pytest.raises(IntegrityError), session.begin_nested():  # noqa: PT012
            session.add(Item(name="lost"))
            session.flush()
            session.execute(text("INSERT INTO part (item_id, size) VALUES (99, 1)"))
        session.commit()
    assert [data["after"]["name"] for _, _, data in shop.events()] == ["kept"]
    with sessions() as session:
        session.add(Item(name="lost"))
        session.flush()
        session.rollback()
    assert shop.events() == []


def test_a_failed_flush_leaves_nothing_for_the_next(shop: Shop) -> None:
    sessions = shop.audited()
    with sessions() as session:
        session.add(Item(name="one"))
        session.add(Part(item_id=99, size=1))
        with pytest.raises(IntegrityError):
            session.flush()
        session.rollback()
        session.add(Item(name="two"))
        session.commit()
    assert [data["after"]["name"] for _, _, data in shop.events()] == ["two"]


def test_no_change_without_its_event(shop: Shop) -> None:
    sessions = shop.audited()
    rows(shop.dsn, "ALTER TABLE audit_logs ADD CHECK (event <> 'item.created')")
    with sessions() as session:
        session.add(Item(name="one"))
        with pytest.raises(tracevault.DriverError):
            session.commit()
    assert rows(shop.dsn, "SELECT FROM item") == []


BULK: dict[str, tuple[Any, str, int]] = {
    "update": (lambda: update(Item).where(Item.name == "secret").values(price=1), "item.bulk_updated", 0),
    "core update": (lambda: update(Item.metadata.tables["item"]).values(price=1), "item.bulk_updated", 1),
    "delete": (lambda: delete(Item).where(Item.price > 0), "item.bulk_deleted", 1),
    "insert": (lambda: insert(Item).values(name="x"), "item.bulk_inserted", 1),
}


@pytest.mark.parametrize("kind", BULK)
def test_bulk_statements_are_refused(shop: Shop, kind: str) -> None:
    sessions, _ = shop.audited(), shop.make()
    statement, _, _ = BULK[kind]
    with sessions() as session, pytest.raises(BulkChangeError, match="`item`"):
        session.execute(statement())
    with sessions() as session, pytest.raises(BulkChangeError):
        session.query(Item).update({"price": 1})
    with sessions.begin() as session:
        session.execute(delete(Stranger))


@pytest.mark.parametrize("kind", BULK)
def test_bulk_statements_are_summed_up(shop: Shop, kind: str) -> None:
    sessions, _ = shop.audited(bulk="summary"), shop.make()
    statement, name, count = BULK[kind]
    with sessions.begin() as session:
        session.execute(statement())
    ((event, _, data),) = shop.events()
    assert (event, data["count"]) == (name, count)
    assert "secret" not in str(data)
    assert ("where" in data) == (kind in {"update", "delete"})


@pytest.mark.parametrize("kind", BULK)
def test_bulk_statements_are_ignored(shop: Shop, kind: str) -> None:
    sessions, _ = shop.audited(bulk="ignore"), shop.make()
    with sessions.begin() as session:
        session.execute(BULK[kind][0]())
    assert shop.events() == []


def test_sessions_of_others_are_not_audited(shop: Shop) -> None:
    shop.audited()
    with Session(shop.engine) as session, session.begin():
        session.add(Item(name="one"))
        session.execute(update(Item).values(price=1))
    assert shop.events() == []


def test_wrong_arguments_are_named(shop: Shop) -> None:
    for options, field in (
        ({"models": [int]}, "models"),
        ({"models": [Item], "bulk": "no"}, "bulk"),
    ):
        with pytest.raises(ConfigError) as refusal:
            audit_models(shop.sessions, shop.audit, **options)
        assert refusal.value.field == field
    with pytest.raises(ConfigError, match="a vault or a scope"):
        audit_models(shop.sessions, "audit", models=[Item])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="async_sessionmaker"):
        audit_models(AsyncSession, shop.audit, models=[Item])


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_an_async_session(ready_dsn: str, driver: str) -> None:
    engine = create_async_engine(_url(ready_dsn, driver), poolclass=NullPool)
    async with start_tracevault(connection_string=ready_dsn, **NOTHING_BUT_THE_LOG) as audit:
        sessions = async_sessionmaker(engine)
        audit_models(sessions, audit, models=[Item])
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        with tracevault.context(actor={"id": "ann", "type": "user"}):
            async with sessions() as session:
                item = Item(name="one", price=Decimal(1))
                session.add(item)
                await session.commit()
                item.price = Decimal(2)  # expired, and not loaded again
                await session.commit()
                with pytest.raises(BulkChangeError):
                    await session.execute(update(Item).values(price=3))
    found = rows(ready_dsn, "SELECT event, actor_id, data->'before'->'price' FROM audit_logs ORDER BY occurred_at, id")
    assert found == [("item.created", "ann", None), ("item.updated", "ann", 1)]
    await engine.dispose()
