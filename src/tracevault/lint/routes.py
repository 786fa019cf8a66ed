"""Routes of Starlette, FastAPI, Django and Flask that take a request which changes something."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tracevault.lint.project import Class, Def, Module, Project, last_name

UNSAFE = ("POST", "PUT", "PATCH", "DELETE")

_VERBS = {method.lower(): method for method in UNSAFE}
_METHOD_CLASSES = frozenset(
    {"HTTPEndpoint", "MethodView", "View", "APIView", "GenericAPIView", "TemplateView", "FormView"}
)
_SETS = frozenset(
    {"ViewSet", "GenericViewSet", "ModelViewSet", "CreateModelMixin", "UpdateModelMixin", "DestroyModelMixin"}
)
_SET_METHODS = {"create": "POST", "update": "PUT", "partial_update": "PATCH", "destroy": "DELETE"}
_GENERIC = {
    "CreateView": "POST",
    "UpdateView": "POST",
    "DeleteView": "POST",
    "ModelViewSet": "POST",
    "CreateAPIView": "POST",
    "UpdateAPIView": "PUT",
    "DestroyAPIView": "DELETE",
    "ListCreateAPIView": "POST",
    "RetrieveUpdateAPIView": "PUT",
    "RetrieveDestroyAPIView": "DELETE",
    "RetrieveUpdateDestroyAPIView": "PUT",
}


class Route(NamedTuple):
    """A route that changes something: its methods, its path as far as it is known, and who serves it."""

    methods: tuple[str, ...]
    path: str
    handler: Def | Class


def routes(project: Project) -> Iterator[Route]:
    """Yield the routes of a project whose methods are not safe."""
    for module in project.modules:
        prefixes = _prefixes(module)
        for one in (
            *module.functions.values(),
            *(m for kind in module.classes.values() for m in kind.methods.values()),
        ):
            yield from _decorated(one, prefixes)
        for kind in module.classes.values():
            yield from _of_class(project, kind)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call):
                yield from _registered(project, module, node)


def _decorated(one: Def, prefixes: dict[str, str]) -> Iterator[Route]:
    for decorator in one.node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = last_name(called)
        if name == "require_POST":
            yield Route(("POST",), "", one)
        elif not isinstance(decorator, ast.Call):
            continue
        elif name in ("require_http_methods", "api_view"):
            methods = _unsafe(_texts(decorator.args[0] if decorator.args else None))
            if methods:
                yield Route(methods, "", one)
        elif isinstance(called, ast.Attribute) and (name in _VERBS or name in ("route", "api_route")):
            path = _path(decorator)
            if path is None:
                continue
            methods = (_VERBS[name],) if name in _VERBS else _unsafe(_texts(_keyword(decorator, "methods")))
            owner = called.value.id if isinstance(called.value, ast.Name) else ""
            if methods:
                yield Route(methods, prefixes.get(owner, "") + path, one)


def _registered(project: Project, module: Module, call: ast.Call) -> Iterator[Route]:
    """Yield the route of `Route("/x", view, methods=...)`, and of what adds one."""
    name = last_name(call.func)
    if name not in {"Route", "add_route", "add_api_route", "add_url_rule"}:
        return
    path = _path(call)
    places = 2 if name == "add_url_rule" else 1
    given = call.args[places] if len(call.args) > places else None
    view = _keyword(call, "view_func") or _keyword(call, "endpoint") or given
    methods = _unsafe(_texts(_keyword(call, "methods")))
    handler = project.function(module, view)
    if path is not None and handler is not None and methods:
        yield Route(methods, path, handler)


def _of_class(project: Project, kind: Class) -> Iterator[Route]:
    if project.derives(kind, _METHOD_CLASSES):
        for name, method in _VERBS.items():
            if name in kind.methods:
                yield Route((method,), "", kind.methods[name])
    if project.derives(kind, _SETS):
        for name, method in _SET_METHODS.items():
            if name in kind.methods:
                yield Route((method,), "", kind.methods[name])
    generic = next((base for base in (base.rpartition(".")[2] for base in kind.bases) if base in _GENERIC), None)
    if generic is not None and not {*_VERBS, *_SET_METHODS} & kind.methods.keys():
        yield Route((_GENERIC[generic],), "", kind)


def _prefixes(module: Module) -> dict[str, str]:
    """Return the prefix of each router or blueprint that a module makes."""
    found = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            prefix = _keyword(node.value, "prefix") or _keyword(node.value, "url_prefix")
            if isinstance(prefix, ast.Constant) and isinstance(prefix.value, str):
                found.update({target.id: prefix.value for target in node.targets if isinstance(target, ast.Name)})
    return found


def _path(call: ast.Call) -> str | None:
    node = call.args[0] if call.args else _keyword(call, "path") or _keyword(call, "rule")
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and (not node.value or node.value[0] == "/"):
        return node.value
    return None


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in call.keywords if each.arg == name), None)


def _texts(node: ast.AST | None) -> list[str]:
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return [each.value for each in node.elts if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return []


def _unsafe(methods: Iterable[str]) -> tuple[str, ...]:
    return tuple(method for method in map(str.upper, methods) if method in UNSAFE)


def audited_requests(project: Project) -> tuple[frozenset[str], tuple[str, ...], bool]:
    """Return what ``audit_requests`` says: methods, paths, and whether it is more than can be read here."""
    found: set[str] = set()
    unknown = False
    for module in project.modules:
        for node in ast.walk(module.tree):
            given = _keyword(node, "audit_requests") if isinstance(node, ast.Call) else None
            if given is not None:
                found.update(_texts(given))
                unknown = unknown or not isinstance(given, (ast.List, ast.Tuple, ast.Set))
    paths = tuple(each for each in found if each.startswith("/"))
    return frozenset(found - set(paths)), paths, unknown
