"""Writes of models: of Django's and SQLAlchemy's, as far as the code itself says what is written."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

from tracevault.lint.project import Class, Def, Module, Project, last_name

_DJANGO = frozenset({"Model"})
_MANAGER = frozenset(
    {"create", "acreate", "bulk_create", "abulk_create", "bulk_update", "abulk_update", "update", "aupdate", "delete"}
    | {"adelete", "get_or_create", "aget_or_create", "update_or_create", "aupdate_or_create"}
)
_OBJECT = frozenset({"save", "asave", "delete", "adelete"})
_SESSION = frozenset({"add", "add_all", "delete", "merge"})
_STATEMENTS = frozenset({"insert", "update", "delete"})
_FINDERS = frozenset({"get_object_or_404", "aget_object_or_404"})


class Write(NamedTuple):
    """A write of a model: where, by which call, and whether it is audited by itself."""

    node: ast.Call
    what: str
    audited: bool


class Models:
    """The models of a project, and which of them are audited."""

    def __init__(self, project: Project) -> None:
        self._project = project
        classes = [kind for module in project.modules for kind in module.classes.values()]
        self._django = {kind for kind in classes if project.derives(kind, _DJANGO) and not _is_sqlalchemy(kind)}
        self._sqlalchemy = {kind for kind in classes if _is_sqlalchemy(kind)}
        self._audited = {kind for kind in self._django if _is_decorated(kind)}
        self._sessions_audited = False
        for module in project.modules:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Call) and (module.dotted(node.func) or "").endswith("audit_models"):
                    self._sessions_audited = True
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Call) and node.args:
                    # audited(...)(Model), where the class is somebody else's
                    found = self._project.class_(module, node.args[0])
                    if found is not None and (module.dotted(node.func.func) or "").endswith("audited"):
                        self._audited.add(found)

    def is_audited(self, kind: Class) -> bool:
        """Whether every change of a model's objects is an event."""
        if kind in self._sqlalchemy:
            return self._sessions_audited
        return not self._audited.isdisjoint(self._project.lineage(kind))

    def model(self, module: Module, node: ast.AST | None) -> Class | None:
        """Return the model that an expression names."""
        found = self._project.class_(module, node)
        return found if found in self._django or found in self._sqlalchemy else None

    def writes(self, one: Def) -> Iterator[Write]:
        """Yield the writes in a function."""
        types = self._types(one)
        for node in ast.walk(one.node):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                found = self._write(one, node, node.func, types)
                if found is not None:
                    yield found

    def _write(self, one: Def, call: ast.Call, called: ast.Attribute, types: dict[str, Class]) -> Write | None:
        name, owner = called.attr, called.value
        if self._sqlalchemy and _is_session(owner):
            if name in _SESSION:
                return Write(call, f"session.{name}()", self._sessions_audited)
            if name in {"execute", "scalars", "scalar"} and call.args:
                return self._statement(one.module, call)
        if name in _OBJECT:
            kind = self._of_object(one, owner, types)
            if kind is not None and kind in self._django:
                return Write(call, f"{kind.name}.{name}()", self.is_audited(kind))
        if name in _MANAGER:
            kind = self._of_manager(one.module, owner)
            if kind is not None:
                return Write(call, f"{kind.name}.objects.{name}()", self.is_audited(kind))
        return None

    def _statement(self, module: Module, call: ast.Call) -> Write | None:
        for node in ast.walk(call.args[0]):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in _STATEMENTS
                and node.args
            ):
                kind = self.model(module, node.args[0])
                if kind is not None:
                    return Write(call, f"{node.func.id}({kind.name})", self.is_audited(kind))
        return None

    def _of_object(self, one: Def, owner: ast.AST, types: dict[str, Class]) -> Class | None:
        if isinstance(owner, ast.Name):
            if owner.id == "self" and one.owner in self._django and one.node.name not in _OBJECT:
                return one.owner
            return types.get(owner.id)
        return self._made(one.module, owner)

    def _of_manager(self, module: Module, node: ast.AST) -> Class | None:
        """Return the model of ``Model.objects.filter(...)``."""
        while isinstance(node, (ast.Call, ast.Attribute)):
            if isinstance(node, ast.Attribute) and node.attr in {"objects", "_default_manager", "_base_manager"}:
                return self.model(module, node.value)
            node = node.func if isinstance(node, ast.Call) else node.value
        return None

    def _types(self, one: Def) -> dict[str, Class]:
        """Return the models of variables, as far as assignments and annotations say them."""
        types: dict[str, Class] = {}
        arguments = one.node.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            kind = self.model(one.module, argument.annotation)
            if kind is not None:
                types[argument.arg] = kind
        for node in ast.walk(one.node):
            targets: list[ast.expr] = []
            value: ast.expr | None = None
            if isinstance(node, ast.Assign):
                targets, value = node.targets, node.value
            elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
                targets, value = [node.target], node.value
            elif isinstance(node, (ast.For, ast.AsyncFor)):
                targets, value = [node.target], node.iter
            kind = self._made(one.module, value)
            for target in targets:
                # `thing, created = Thing.objects.get_or_create()`
                first = target.elts[0] if isinstance(target, ast.Tuple) and target.elts else target
                if kind is not None and isinstance(first, ast.Name):
                    types[first.id] = kind
        return types

    def _made(self, module: Module, value: ast.AST | None) -> Class | None:
        """Return the model of what ``Model(...)``, ``Model.objects.get(...)`` or ``get_object_or_404(Model)`` give."""
        if isinstance(value, ast.Await):
            value = value.value
        if not isinstance(value, (ast.Call, ast.Attribute)):
            return None
        if isinstance(value, ast.Call):
            kind = self.model(module, value.func)
            if kind is not None:
                return kind
            if (module.dotted(value.func) or "").rpartition(".")[2] in _FINDERS and value.args:
                return self.model(module, value.args[0]) or self._of_manager(module, value.args[0])
        return self._of_manager(module, value)


def _is_sqlalchemy(kind: Class) -> bool:
    return any(
        isinstance(node, (ast.Assign, ast.AnnAssign))
        and any(
            isinstance(target, ast.Name) and target.id == "__tablename__"
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        )
        for node in kind.node.body
    )


def _is_decorated(kind: Class) -> bool:
    for decorator in kind.node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if (kind.module.dotted(called) or "").rpartition(".")[2] == "audited":
            return True
    return False


def _is_session(node: ast.AST) -> bool:
    return last_name(node).lower().endswith("session") or (isinstance(node, ast.Call) and _is_session(node.func))
