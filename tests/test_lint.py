"""The linter, on small projects: each line that it shall find says so in a comment, `#! TV001`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tests.docs.pages import ROOT
from tracevault.lint import find

EXPECTED = re.compile(r"#! (TV\d+)")


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))


def expected(folder: Path) -> set[tuple[str, int, str]]:
    return {
        (path.relative_to(folder).as_posix(), number, code)
        for path in folder.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for code in EXPECTED.findall(line)
    }


FASTAPI = {
    "app.py": """
        from fastapi import APIRouter, Depends, FastAPI
        from tracevault import start_tracevault
        import helpers
        from helpers import changed as noted, quiet

        app = FastAPI()
        router = APIRouter(prefix="/prices")
        audit = start_tracevault(connection_string="")

        @app.get("/")
        async def index(): ...

        @app.put("/a")
        async def direct():
            await audit.emit("a")

        @app.put("/b")
        async def silent(): #! TV001
            print("b")

        @router.delete("/{item}", status_code=204)
        async def through_a_helper(item):
            await noted(item)

        @router.patch("/c")
        async def through_a_module(item):
            helpers.quiet()
            await helpers.changed(item)

        @router.post("/d")
        async def through_a_silent_helper(): #! TV001
            quiet()
            await app.sio.emit("message")

        @router.post("/e")
        async def by_dependency(item=Depends(noted)): ...

        @router.post("/f")  # tracevault: no-audit, a health check
        async def marked(): ...

        @app.api_route("/g", methods=["GET", "POST"])
        def both(): ... #! TV001

        @app.api_route("/h", methods=["GET"])
        def reading(): ...

        def create(app):
            @app.post("/i")
            def inner(): ... #! TV001

        class Service:
            def change_it_all(self):
                return self._inner()

            def _inner(self):
                audit.emit_many([])

        @app.post("/j")
        def by_a_method(service: Service):
            service.change_it_all()

        @app.post("/k")
        def in_background(tasks):
            tasks.add_task(noted, 1)
    """,
    "helpers.py": """
        from vaults import audit

        async def changed(item):
            await deeper(item)

        async def deeper(item):
            async with audit.unit_of_work() as unit:
                await unit.emit("changed")

        def quiet():
            return quiet()
    """,
}

STARLETTE = {
    "src/shop/app.py": """
        from starlette.endpoints import HTTPEndpoint
        from starlette.routing import Route
        from .views import change, look
        from shop import views

        class Thing(HTTPEndpoint):
            async def get(self, request): ...
            async def post(self, request): ... #! TV001
            async def delete(self, request):
                await self.audit.emit("x")

        routes = [
            Route("/a", change, methods=["POST"]),
            Route("/b", look),
            Route("/c", views.other, methods=["GET", "PUT"]),
            Route("/d", Thing),
        ]
    """,
    "src/shop/views.py": """
        async def change(request): ... #! TV001
        async def look(request): ...
        async def other(request): ... #! TV001
    """,
    "src/shop/__init__.py": "",
}

FLASK = {
    "app.py": """
        from flask import Blueprint, Flask
        from flask.views import MethodView
        app = Flask(__name__)
        shop = Blueprint("shop", __name__, url_prefix="/shop")

        @app.route("/")
        def index(): ...

        @app.route("/a", methods=("POST",))
        def silent(): ... #! TV001

        @shop.post("/b")
        def covered_by_its_path(): ...

        @app.delete("/c")
        def covered_by_its_method(): ...

        class Items(MethodView):
            def post(self): ... #! TV001
            # tracevault: no-audit
            def put(self): ...

        app.add_url_rule("/d", "d", view_func=added, methods=["PATCH"])

        def added(): ... #! TV001

        Audit(app, audit_requests=["DELETE", "/shop/*"])
    """
}

DJANGO = {
    "shop/models.py": """
        from django.db import models
        from tracevault.integrations.django import audited

        class Base(models.Model):
            class Meta:
                abstract = True

        @audited(exclude=["seen"])
        class Product(Base): ...

        class Special(Product): ...

        class Tag(Base):
            def rename(self, name):
                self.name = name
                self.save() #! TV002
    """,
    "shop/views.py": """
        from django.shortcuts import get_object_or_404
        from django.views.decorators.http import require_POST, require_http_methods
        from django.views.generic import CreateView, UpdateView, View
        from django.contrib.auth.decorators import login_required
        from rest_framework.viewsets import ModelViewSet
        from tracevault.integrations.django import emit
        from shop.models import Product, Special, Tag
        from shop import models as m

        @require_POST
        def silent(request): ... #! TV001

        @login_required
        @require_http_methods(["PUT", "GET"])
        def saves_an_audited_model(request, id):
            product = get_object_or_404(Product, pk=id)
            product.save()

        @require_POST
        def emits(request):
            emit("x")
            Tag.objects.create(name="x")

        def writes_in_any_view(request, id):
            tag = m.Tag.objects.select_related("x").get(pk=id)
            tag.save() #! TV002
            Tag.objects.filter(x=1).update(y=2) #! TV002
            Tag.objects.create()  # tracevault: no-audit
            tag, _ = Tag.objects.get_or_create(name="x") #! TV002
            for each in Tag.objects.all():
                each.delete() #! TV002
            Tag(name="y").save() #! TV002
            request.session.save()
            Special.objects.create()

        async def asynchronous(request):
            tag = await Tag.objects.aget(pk=1)
            await tag.asave() #! TV002

        def typed(tag: Tag):
            tag.delete() #! TV002

        class Edit(View):
            def post(self, request): ... #! TV001
            def get(self, request): ...

        class NewProduct(CreateView):
            model = Product

        class NewTag(CreateView): #! TV001
            model = Tag

        class ChangedTag(UpdateView):
            model = Tag
            def form_valid(self, form):
                emit("tag.changed")

        class Tags(ModelViewSet): #! TV001
            queryset = Tag.objects.all()

        class Products(ModelViewSet):
            queryset = Product.objects.all()
            def destroy(self, request): ... #! TV001
    """,
    "shop/migrations/0001.py": "def x():\n    Tag.objects.create()\n",
    "tests/test_shop.py": "from shop.models import Tag\ndef test(): Tag.objects.create()\n",
}

SQLALCHEMY = {
    "models.py": """
        class Product(Base):
            __tablename__ = "product"

        class Unit(Base):
            __tablename__: str = "unit"
    """,
    "work.py": """
        from sqlalchemy import delete, select, update
        from models import Product

        async def silent(session, product):
            session.add(product) #! TV002
            await session.execute(update(Product).values(price=1)) #! TV002
            await session.execute(select(Product))
            await session.delete(product) #! TV002

        def emits(db, audit):
            db.session.add(Product())
            audit.emit("x", connection=db.session)

        def a_set():
            seen = set()
            seen.add(1)
    """,
}


@pytest.mark.parametrize(
    "files",
    [FASTAPI, STARLETTE, FLASK, DJANGO, SQLALCHEMY],
    ids=["fastapi", "starlette", "flask", "django", "sqlalchemy"],
)
def test_what_is_found(tmp_path: Path, files: dict[str, str]) -> None:
    write(tmp_path, files)
    found = find([tmp_path])
    assert {(each.path.relative_to(tmp_path).as_posix(), each.line, each.code) for each in found.found} == expected(
        tmp_path
    )
    assert len(found.found) == len(expected(tmp_path))


def test_audited_sessions(tmp_path: Path) -> None:
    audited = "from tracevault.integrations.sqlalchemy import audit_models\naudit_models(s, a, models=[Product])\n"
    write(tmp_path, {**SQLALCHEMY, "db.py": audited})
    assert find([tmp_path]).found == []


def test_requests_that_are_audited_by_a_name_we_cannot_read(tmp_path: Path) -> None:
    write(tmp_path, {"app.py": FLASK["app.py"].replace('["DELETE", "/shop/*"]', "settings.AUDITED")})
    assert find([tmp_path]).found == []


def test_the_examples_are_clean() -> None:
    found = find([ROOT / "examples"])
    assert found.found == []
    assert found.routes >= 6


def test_names_that_run_in_circles(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.py": "from b import B\nclass A(B):\n    def post(self): self.missing()\n@app.post('/')\ndef f(): g()\n",
            "b.py": "from a import A\nfrom b import B as C\nclass B(A): ...\nclass C(C): ...\ndef g(): f()\n",
        },
    )
    assert [each.message for each in find([tmp_path]).found] == ["POST /: f() emits no audit event"]


def test_models_that_run_in_circles(tmp_path: Path) -> None:
    models = "class A(B, Model): ...\nclass B(A): ...\ndef f():\n    A.objects.create()\n"
    write(tmp_path, {"models.py": models})
    assert [(each.line, each.code) for each in find([tmp_path]).found] == [(4, "TV002")]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tracevault", "lint", *arguments],
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command(tmp_path: Path) -> None:
    write(tmp_path, {"app.py": "@app.post('/x')\ndef f(): ...\n", "scripts/y.py": "@app.put('/y')\ndef g(): ...\n"})
    done = run("-o", "table", ".", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()) == (
        1,
        [
            "app.py:2:1: TV001 POST /x: f() emits no audit event",
            "scripts/y.py:2:1: TV001 PUT /y: g() emits no audit event",
        ],
    )
    assert done.stderr == "2 findings; looked at 2 files, 2 routes, 0 writes\n"
    done = run("app.py", "scripts", "--exclude", "y.py", cwd=tmp_path)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"path": "app.py", "line": 2, "column": 1, "code": "TV001", "message": "POST /x: f() emits no audit event"}
    ]
    write(tmp_path, {"app.py": "def f(:\n"})
    done = run("-o", "table", "app.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "app.py:1:1: TV000 it cannot be read: invalid syntax\n")
    write(tmp_path, {"app.py": "x = 1\n"})
    assert run("app.py", cwd=tmp_path).returncode == 0
    assert run("nowhere", cwd=tmp_path).returncode == 2
