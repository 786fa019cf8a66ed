"""Django: the example over HTTP, and what is seen of the ways in which models change."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from datetime import UTC
from decimal import Decimal
from typing import Any, ClassVar
from uuid import uuid4

import django
import httpx
import pytest
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

from tests.conftest import rows
from tests.integrations.conftest import EXAMPLES, Start, run_example
from tracevault import ConfigError, DriverError, set_context

with pytest.MonkeyPatch.context() as environment:
    environment.setenv("DATABASE_URL_WRITE", "dbname=none")
    environment.setenv("DJANGO_SETTINGS_MODULE", "shop.settings")
    environment.syspath_prepend(EXAMPLES / "django")
    django.setup()
    settings.DEBUG = False  # as Django's own runner of tests has it
    from shop.models import Product, Tag

from django.core import checks
from django.core.management import call_command
from django.db import connection, connections, models, transaction
from django.db.models import F
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, Client
from django.test.utils import override_settings
from django.urls import path

from tracevault.integrations.django import BulkChangeError, audited, emit, emit_diff, get_audit
from tracevault.integrations.django.vault import close

ROWS = "SELECT event, target_id, data FROM audit_logs ORDER BY occurred_at, id"


@audited(bulk="summary")
class Shelf(models.Model):
    id: Any = models.UUIDField(primary_key=True, default=uuid4)
    label: Any = models.CharField(max_length=50, default="")
    note: Any = models.TextField(null=True)
    owner: Any = models.ForeignKey(Tag, null=True, on_delete=models.SET_NULL)

    class Meta:
        app_label = "shop"


class Box(Shelf):
    size: Any = models.IntegerField(default=1)

    class Meta:
        app_label = "shop"


class Lid(Shelf):
    class Meta:
        app_label = "shop"
        proxy = True


@audited(fields=["name", "shelf"], name="part", bulk="ignore")
class Part(models.Model):
    name: Any = models.CharField(max_length=50)
    secret: Any = models.CharField(max_length=50, default="")
    shelf: Any = models.ForeignKey(Shelf, on_delete=models.CASCADE)

    class Meta:
        app_label = "shop"


class Log:
    """The events in a test's database."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn

    def take(self) -> list[tuple[str, str, Any]]:
        """The events since the last call."""
        found = rows(self.dsn, ROWS)
        rows(self.dsn, "TRUNCATE audit_logs")
        return found

    def changes(self) -> list[tuple[str, Any, Any]]:
        """The same, with what was and what is."""
        return [(event, data.get("before"), data.get("after")) for event, _, data in self.take()]


@pytest.fixture
def log(ready_dsn: str) -> Iterator[Log]:
    """The log of a database that Django is connected to, with the tables of the models above."""
    given = conninfo_to_dict(ready_dsn)
    close()
    connections.databases["default"].update(
        NAME=given["dbname"], USER=given["user"], HOST=given["host"], PORT=given.get("port")
    )
    connection.close()
    connection.settings_dict = connections.databases["default"]
    call_command("migrate", verbosity=0)
    with connection.schema_editor() as editor:
        for model in (Shelf, Box, Part):
            editor.create_model(model)
    yield Log(ready_dsn)
    close()
    connection.close()


def manage(url: str, *command: str) -> str:
    return run_example("django", "python", "manage.py", *command, url=url, DJANGO_SETTINGS_MODULE="shop.settings")


def test_the_example_over_http(start: Start, ready_dsn: str, url: str) -> None:
    assert "does not exist" not in manage(url, "migrate", "-v0")
    assert "no issues" in manage(url, "check", "--database", "default")
    assert "No changes detected" in manage(url, "makemigrations", "--check", "--dry-run")
    manage(
        url,
        "shell",
        "-c",
        "from django.contrib.auth.models import User; from shop.models import Product; "
        "User.objects.create_superuser('ann', password='hunter2'); Product.objects.create(name='tea', price=100)",
    )
    assert [row[0] for row in rows(ready_dsn, ROWS)] == ["shop.product.created"]
    rows(ready_dsn, "TRUNCATE audit_logs")

    shop = start(
        "django", "python", "manage.py", "runserver", "--noreload", "{port}", DJANGO_SETTINGS_MODULE="shop.settings"
    )
    ids = {"x-correlation-id": "c-1"}
    assert shop.http.post("/login", json={"username": "ann", "password": "no"}, headers=ids).status_code == 401
    welcome = shop.http.post("/login", json={"username": "ann", "password": "hunter2"}, headers=ids)
    assert welcome.headers["x-correlation-id"] == "c-1"
    assert shop.http.put("/products/1", json={"price": "120.00"}, headers=ids).json() == {"price": "120.00"}
    assert shop.http.put("/products/1", json={"price": "-1"}, headers=ids).status_code == 422
    assert shop.http.get("/visit", headers=ids).status_code == 200
    user = rows(ready_dsn, "SELECT id::text FROM auth_user")[0][0]
    found = rows(
        ready_dsn, "SELECT event, actor_id, correlation_id, target_id, data FROM audit_logs ORDER BY occurred_at, id"
    )
    changed = {"before": {"price": 100}, "after": {"price": 120}, "diff": {"price": {"before": 100, "after": 120}}}
    assert found == [
        ("login.failed", None, "c-1", None, {"username": "ann", "outcome": "failure"}),
        ("login", user, "c-1", None, None),
        ("shop.product.updated", user, "c-1", "1", changed),
        ("price.approved", user, "c-1", "1", None),
        ("price.denied", user, "c-1", None, {"price": -1, "why": "no price is below nothing"}),
        ("shop.visited", user, "c-1", None, None),
    ]
    xids = rows(
        ready_dsn,
        "SELECT DISTINCT stored_xid::text FROM audit_logs WHERE event IN ('shop.product.updated', 'price.approved')",
    )
    assert xids == rows(ready_dsn, "SELECT xmin::text FROM shop_product")
    assert rows(ready_dsn, "SELECT DISTINCT meta->>'ip' FROM audit_logs") == [("127.0.0.1",)]

    listed = shop.http.get("/admin/tracevault/auditevent/?q=price.denied")
    assert listed.status_code == 200
    assert "price.denied" in listed.text
    assert "shop.visited" not in listed.text
    moment = rows(ready_dsn, "SELECT occurred_at FROM audit_logs WHERE event = 'price.denied'")[0][0]
    assert moment.astimezone(UTC).isoformat(" ", "seconds") in listed.text
    id_ = rows(ready_dsn, "SELECT id::text FROM audit_logs WHERE event = 'price.denied'")[0][0]
    assert "no price is below nothing" in shop.http.get(f"/admin/tracevault/auditevent/{id_}/change/").text
    assert shop.http.get("/admin/tracevault/auditevent/?outcome=failure").status_code == 200
    page = shop.http.get("/audit/", follow_redirects=True)
    assert page.status_code == 200
    assert "price.denied" in page.text
    sheet = next(piece for piece in page.text.split('"') if piece.endswith(".css"))
    assert shop.http.get(sheet).headers["content-type"].startswith("text/css")
    assert httpx.get(f"{shop.http.base_url}/audit/", trust_env=False).status_code == 403
    for refused in ("add/", f"{id_}/delete/"):
        assert shop.http.get(f"/admin/tracevault/auditevent/{refused}").status_code == 403


def test_create_update_delete(log: Log) -> None:
    product = Product.objects.create(name="tea", price="1.50")
    product.price = Decimal("2")
    product.save()
    product.seen = 9
    product.save()
    product.save()
    product.delete()
    whole = {"id": 1, "name": "tea", "price": 1.5}
    assert log.changes() == [
        ("shop.product.created", {}, whole),
        ("shop.product.updated", {"price": 1.5}, {"price": 2}),
        ("shop.product.deleted", {**whole, "price": 2}, {}),
    ]


def test_what_the_row_was_not_what_the_object_remembers(log: Log) -> None:
    Product.objects.create(name="tea", price=1)
    old, new = Product.objects.get(), Product.objects.get()
    new.price = 2
    new.save()
    log.take()
    old.name = "coffee"
    old.save()  # and takes the price back with it
    assert log.changes() == [("shop.product.updated", {"name": "tea", "price": 2}, {"name": "coffee", "price": 1})]
    with pytest.raises(ZeroDivisionError), transaction.atomic():  # noqa: PT012
        old.price = 5
        old.save()
        raise ZeroDivisionError
    old.save()
    assert log.changes() == [("shop.product.updated", {"price": 1}, {"price": 5})]


def test_deferred_fields_update_fields_and_expressions(log: Log) -> None:
    Product.objects.create(name="tea", price=1)
    log.take()
    product = Product.objects.only("name").get()
    product.price = 3
    product.save()
    product = Product.objects.get()
    product.name, product.price = "coffee", 9
    product.save(update_fields=["name"])
    product = Product.objects.get()
    product.price = F("price") + 1
    product.save()
    Product(pk=1, name="again", price=4).save()
    assert log.changes() == [
        ("shop.product.updated", {"price": 1}, {"price": 3}),
        ("shop.product.updated", {"name": "tea"}, {"name": "coffee"}),
        ("shop.product.updated", {"price": 3}, {"price": 4}),
        ("shop.product.updated", {"name": "coffee"}, {"name": "again"}),
    ]


def test_inheritance_proxies_and_chosen_fields(log: Log) -> None:
    box = Box.objects.create(label="b", size=2)
    box.size, box.label = 3, "c"
    box.save()
    lid = Lid.objects.create(label="l")
    Part.objects.create(name="p", secret="hunter2", shelf=lid)
    found = log.changes()
    assert [event for event, *_ in found] == [
        "shop.shelf.created",
        "shop.shelf.updated",
        "shop.shelf.created",
        "part.created",
    ]
    assert found[0][2]["size"] == 2
    assert found[1][1:] == ({"label": "b", "size": 2}, {"label": "c", "size": 3})
    assert found[3][2] == {"name": "p", "shelf": str(lid.pk)}


def test_deletes_in_all_ways(log: Log) -> None:
    shelf = Shelf.objects.create(label="s")
    for name in "ab":
        Part.objects.create(name=name, shelf=shelf)
    log.take()
    Shelf.objects.all().delete()
    found = log.take()
    assert sorted(event for event, *_ in found) == ["part.deleted", "part.deleted", "shop.shelf.deleted"]
    assert next(data for event, _, data in found if event == "shop.shelf.deleted")["before"]["label"] == "s"
    tag = Tag.objects.create(name="t")
    Shelf.objects.create(owner=tag)
    log.take()
    tag.delete()  # SET_NULL: Django's own bulk update
    ((event, _, data),) = log.take()
    assert (event, data["count"], data["values"]) == ("shop.shelf.bulk_updated", 1, {"owner": None})


def test_many_to_many(log: Log) -> None:
    one, two = Tag.objects.create(name="1"), Tag.objects.create(name="2")
    product = Product.objects.create(name="tea", price=1)
    log.take()
    product.tags.add(one, two)
    product.tags.add(one)
    product.tags.remove(one)
    two.product_set.add(product)
    two.product_set.clear()
    product.tags.set([one])
    product.tags.clear()
    assert log.changes() == [
        ("shop.product.updated", {"tags": before}, {"tags": after})
        for before, after in (
            ([], ["1", "2"]),
            (["1"], []),
            (["2"], []),
            ([], ["1"]),
            (["1"], []),
        )
    ]


def test_bulk_operations_are_refused(log: Log) -> None:
    Product.objects.create(name="tea", price=1)
    log.take()
    changes: list[Callable[[], Any]] = [
        lambda: Product.objects.update(price=2),
        lambda: Product.objects.filter(name="tea").update(price=2),
        lambda: Product.objects.bulk_create([Product(name="x", price=1)]),
        lambda: Product.objects.bulk_update(Product.objects.all(), ["price"]),
    ]
    for change in changes:
        with pytest.raises(BulkChangeError, match=r"shop\.product"):
            change()
    assert rows(log.dsn, "SELECT name, price FROM shop_product") == [("tea", Decimal("1.00"))]
    assert log.take() == []


def test_bulk_operations_are_summed_up_or_ignored(log: Log) -> None:
    Shelf.objects.bulk_create([Shelf(label="a"), Shelf(label="secret")])
    assert Shelf.objects.filter(label="secret").update(note="n") == 1
    assert Shelf.objects.filter(label__in=[]).update(note="n") == 0
    shelves = list(Shelf.objects.all())
    Shelf.objects.bulk_update(shelves, ["label"], batch_size=1)
    found = [(event, data) for event, _, data in log.take()]
    assert found == [
        ("shop.shelf.bulk_created", {"count": 2}),
        (
            "shop.shelf.bulk_updated",
            {"count": 1, "values": {"note": "n"}, "where": '"shop_shelf"."label" = %s'},
        ),
        ("shop.shelf.bulk_updated", {"count": 0, "values": {"note": "n"}}),
        ("shop.shelf.bulk_updated", {"count": 2, "fields": ["label"]}),
    ]
    Part.objects.bulk_create([Part(name="p", shelf=shelves[0])])
    Part.objects.update(name="q")
    assert log.take() == []
    with pytest.raises(ZeroDivisionError), transaction.atomic():  # noqa: PT012
        Shelf.objects.update(note="lost")
        raise ZeroDivisionError
    assert log.take() == []


def test_fixtures(log: Log) -> None:
    product = Product.objects.create(name="tea", price=1)
    saved = io.StringIO()
    call_command("dumpdata", "shop.product", stdout=saved)
    product.price = 2
    product.save()
    log.take()
    from django.core import serializers

    for restored in serializers.deserialize("json", saved.getvalue()):
        restored.save()
    assert log.changes()[0] == ("shop.product.updated", {"price": 2}, {"price": 1})


def test_no_change_without_its_event(log: Log) -> None:
    rows(log.dsn, "ALTER TABLE audit_logs ADD CHECK (event <> 'shop.product.created')")
    with pytest.raises(DriverError):
        Product.objects.create(name="tea", price=1)
    assert not Product.objects.exists()


def test_emit_shares_the_fate_of_the_transaction(log: Log) -> None:
    assert emit("outside").stored == "database"
    with transaction.atomic():
        assert emit("inside").stored == "transaction"
        assert emit_diff("changed", before={"a": 1}, after={"a": 2}).stored == "transaction"
        assert rows(log.dsn, "SELECT event FROM audit_logs") == [("outside",)]
    with pytest.raises(ZeroDivisionError), transaction.atomic():  # noqa: PT012
        emit("lost")
        get_audit().emit("independent")
        raise ZeroDivisionError
    assert [event for event, *_ in log.take()] == ["outside", "inside", "changed", "independent"]


class Site:
    """Views of a small site, as its own urlconf."""

    @staticmethod
    def streams(_request: HttpRequest) -> StreamingHttpResponse:
        def pieces() -> Iterator[str]:
            yield "one"
            emit("streamed")
            yield "two"

        return StreamingHttpResponse(pieces())

    @staticmethod
    def fails(_request: HttpRequest) -> HttpResponse:
        raise RuntimeError("no")

    @staticmethod
    def handler500(_request: HttpRequest) -> HttpResponse:
        emit("failed")
        return HttpResponse("failed", status=500)

    @staticmethod
    def sets(_request: HttpRequest) -> HttpResponse:
        set_context(correlation_id="mine", actor={"id": "x", "type": "service"})
        emit("set")
        return HttpResponse("")

    @staticmethod
    async def waits(_request: HttpRequest) -> HttpResponse:
        from tracevault.integrations.django import aemit

        await aemit("waited")
        return HttpResponse("")

    urlpatterns: ClassVar[list[Any]] = []


Site.urlpatterns = [path(name, getattr(Site, name)) for name in ("streams", "fails", "sets", "waits")]


@override_settings(ROOT_URLCONF=Site)
def test_requests_have_a_context(log: Log) -> None:
    client = Client(raise_request_exception=False, headers={"x-correlation-id": "c"})
    streamed = client.get("/streams")
    assert b"".join(streamed) == b"onetwo"
    assert client.get("/fails").status_code == 500
    assert client.get("/sets")["X-Correlation-Id"] == "mine"
    assert client.get("/waits")["X-Correlation-Id"] == "c"
    found = rows(log.dsn, "SELECT event, correlation_id, actor_id FROM audit_logs ORDER BY occurred_at, id")
    assert found == [
        ("streamed", "c", None),
        ("failed", "c", None),
        ("set", "mine", "x"),
        ("waited", "c", None),
    ]


@override_settings(ROOT_URLCONF=Site)
async def test_async_requests_have_a_context(ready_dsn: str, log: Log) -> None:
    client = AsyncClient()
    assert (await client.get("/waits", headers={"x-correlation-id": "c"}))["X-Correlation-Id"] == "c"
    answer = await client.get("/sets")
    assert answer["X-Correlation-Id"] == "mine"
    found = rows(ready_dsn, "SELECT event, correlation_id FROM audit_logs ORDER BY occurred_at, id")
    assert found == [("waited", "c"), ("set", "mine")]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"MASK_FIELD": []}, "did you mean `mask_fields`"),
        ({"DATABASE": "defualt"}, "did you mean 'default'"),
        ({"ACTOR": "no.such.thing"}, "cannot be imported"),
        ({"ACTOR": 3}, "must be a function"),
        ({"TRUSTED_PROXIES": ["x"]}, "trusted_proxies"),
        ([], "must be a dict"),
    ],
)
def test_wrong_settings_are_found_by_the_checks(setting: Any, says: str) -> None:
    with override_settings(TRACEVAULT=setting):
        (found,) = checks.run_checks(tags=["tracevault"])
    assert found.id == "tracevault.E001"
    assert says in found.msg


def test_missing_middleware_and_tables_are_found_by_the_checks(log: Log) -> None:
    with override_settings(MIDDLEWARE=[]):
        assert [each.id for each in checks.run_checks(tags=["tracevault"])] == ["tracevault.W001"]
    rows(log.dsn, "DROP TABLE audit_logs")
    found = checks.run_checks(tags=["tracevault"], databases=["default"])
    assert [each.id for each in found] == ["tracevault.W002"]
    assert "audit_logs" in found[0].msg


def test_wrong_use_of_audited_is_refused() -> None:
    with pytest.raises(ConfigError, match="nmae"):
        audited(fields=["nmae"])(Tag)
    with pytest.raises(ConfigError, match="bulk"):
        audited(bulk="no")  # type: ignore[arg-type]
