"""What the linter finds."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tracevault.lint.project import Class, Def, Project
from tracevault.lint.routes import Route, audited_requests, routes
from tracevault.lint.writes import Models


class Finding(NamedTuple):
    """Something that changes without an event. ``line`` and ``column`` count from 1."""

    path: Path
    line: int
    column: int
    code: str
    message: str


class Findings(NamedTuple):
    """All findings, in order, and how much was looked at."""

    found: list[Finding]
    files: int
    routes: int
    writes: int


def find(paths: Iterable[Path], exclude: Iterable[str] = ()) -> Findings:
    """Read the files and folders, and return what is found in them. ``exclude`` are patterns of paths inside.

    Raises `OSError` for a path that is not there.
    """
    paths = list(paths)
    for path in paths:
        path.stat()
    project = Project(paths, exclude)
    models = Models(project)
    writes = {one: list(models.writes(one)) for one in project.defs}
    for one, made in writes.items():
        one.audits = any(write.audited for write in made)
    project.link()
    found = [Finding(each.path, each.line, 1, "TV000", f"it cannot be read: {each}") for each in project.unreadable]
    seen = list(dict.fromkeys(routes(project)))
    methods, prefixes, unknown = audited_requests(project)
    told: set[Def] = set()
    for route in seen:
        covered = unknown or methods.issuperset(route.methods) or _is_under(route.path, prefixes)
        if covered:
            continue
        handler = route.handler
        if _is_silent(models, handler):
            found.append(_of_route(route))
            if isinstance(handler, Def):
                told.add(handler)
    for one, made in writes.items():
        if one.emits or one in told or one.is_marked:
            continue
        for write in made:
            if not write.audited and not one.module.is_marked(write.node.lineno, write.node.end_lineno or 0):
                message = f"{write.what} in {one.qualname}() leaves no audit event"
                found.append(_at(one.module.path, write.node, "TV002", message))
    return Findings(sorted(found), len(project.modules), len(seen), sum(map(len, writes.values())))


def _is_silent(models: Models, handler: Def | Class) -> bool:
    if handler.is_marked:
        return False
    if isinstance(handler, Def):
        return not handler.audits
    # A generic view, which writes its model by itself.
    if any(method.audits for method in handler.methods.values()):
        return False
    for node in handler.node.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id in {"model", "queryset"} for target in node.targets
        ):
            for name in ast.walk(node.value):
                kind = models.model(handler.module, name) if isinstance(name, (ast.Name, ast.Attribute)) else None
                if kind is not None:
                    return not models.is_audited(kind)
    return True


def _is_under(path: str, patterns: Iterable[str]) -> bool:
    if not path:
        return False
    return any(path.startswith(each[:-1]) if each.endswith("*") else path == each for each in patterns)


def _of_route(route: Route) -> Finding:
    handler = route.handler
    words = "/".join(route.methods) + (f" {route.path}" if route.path else "")
    name = f"{handler.qualname}()" if isinstance(handler, Def) else handler.name
    return _at(handler.module.path, handler.node, "TV001", f"{words}: {name} emits no audit event")


def _at(path: Path, node: ast.stmt | ast.expr, code: str, message: str) -> Finding:
    return Finding(path, node.lineno, node.col_offset + 1, code, message)


def lines(found: Iterable[Finding], root: Path) -> Iterator[str]:
    """Yield findings as other linters write them; paths are relative to ``root`` where they are under it."""
    for each in found:
        path = each.path.relative_to(root) if each.path.is_relative_to(root) else each.path
        yield f"{path}:{each.line}:{each.column}: {each.code} {each.message}"
