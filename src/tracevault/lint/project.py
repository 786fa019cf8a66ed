"""A project as the linter sees it: modules, functions and classes, what each of them refers to, and which emit."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef

MARK = "tracevault: no-audit"

_SKIPPED = frozenset(
    {"tests", "test", "migrations", "versions", "node_modules", "site-packages", "venv", "build", "dist", "__pycache__"}
)
_EMITS = frozenset({"emit", "emit_diff", "emit_many", "emit_many_blocking", "aemit", "aemit_diff"})
# Other things that emit: sockets, signals, handlers of logging.
_OTHERS = re.compile(r"sock|sio|signal|handler|bus|queue", re.IGNORECASE)


@dataclass
class Def:
    """A function or a method, with what it refers to."""

    module: Module
    node: Function
    qualname: str
    owner: Class | None = None
    emits: bool = False
    """It emits an event, or calls what does."""
    audits: bool = False
    """It emits, or writes a model that is audited, or calls what does."""
    refers: set[Def] = field(default_factory=set)

    def __hash__(self) -> int:
        """Each is one of its own."""
        return id(self)

    @property
    def is_marked(self) -> bool:
        """Whether a comment says that it needs no event."""
        return self.module.marks(self.node) or (self.owner is not None and self.owner.is_marked)


@dataclass
class Class:
    """A class: its bases as dotted names, and its methods."""

    module: Module
    node: ast.ClassDef
    bases: list[str] = field(default_factory=list)
    methods: dict[str, Def] = field(default_factory=dict)

    def __hash__(self) -> int:
        """Each is one of its own."""
        return id(self)

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def is_marked(self) -> bool:
        """Whether a comment says that it needs no event."""
        return self.module.marks(self.node)


@dataclass
class Module:
    """A file of Python: its tree, what its names stand for, and the lines that carry the mark."""

    path: Path
    name: str
    tree: ast.Module
    marked: set[int]
    imports: dict[str, str] = field(default_factory=dict)
    functions: dict[str, Def] = field(default_factory=dict)
    classes: dict[str, Class] = field(default_factory=dict)

    def is_marked(self, first: int, last: int) -> bool:
        """Whether one of these lines has the mark."""
        return any(first <= line <= last for line in self.marked)

    def marks(self, node: Function | ast.ClassDef) -> bool:
        """Whether the mark stands at a definition: above it, or in a line before its body."""
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        return self.is_marked(first - 1, node.body[0].lineno - 1)

    def dotted(self, node: ast.AST | None) -> str | None:
        """Return what a name, or a chain of attributes, stands for: ``django.db.models.Model``; None for others."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        return ".".join([self.imports.get(node.id, node.id), *reversed(parts)])


class Unreadable(Exception):  # noqa: N818 - it is a finding, no error of ours
    """A file that is no Python; ``line`` says where."""

    def __init__(self, path: Path, message: str, line: int) -> None:
        super().__init__(message)
        self.path = path
        self.line = line


class Project:
    """The modules under some paths. Names are resolved among them; what is imported from elsewhere is only a name."""

    def __init__(self, paths: Iterable[Path], exclude: Iterable[str] = ()) -> None:
        self.modules: list[Module] = []
        self.unreadable: list[Unreadable] = []
        for path, root in sorted(set(_files(paths, tuple(exclude)))):
            try:
                self.modules.append(_module(path, root))
            except Unreadable as error:
                self.unreadable.append(error)
        # By the last part of their names, which is what most of an import names.
        self._by_tail: dict[str, list[Module]] = {}
        for module in self.modules:
            self._by_tail.setdefault(module.name.rpartition(".")[2], []).append(module)
        self._methods: dict[str, list[Def]] = {}
        for module in self.modules:
            for kind in module.classes.values():
                for name, method in kind.methods.items():
                    self._methods.setdefault(name, []).append(method)

    @property
    def defs(self) -> Iterator[Def]:
        """All functions and methods."""
        for module in self.modules:
            yield from module.functions.values()
            for kind in module.classes.values():
                yield from kind.methods.values()

    def function(self, module: Module, node: ast.AST | None) -> Def | None:
        """Return the project's function that an expression names."""
        if isinstance(node, ast.Call):  # a decorator's, or `View.as_view()`
            return None
        found = self._resolved(module, node, "functions")
        return found if isinstance(found, Def) else None

    def class_(self, module: Module, node: ast.AST | str | None) -> Class | None:
        """Return the project's class that an expression, or a dotted name, names."""
        found = self._resolved(module, node, "classes")
        return found if isinstance(found, Class) else None

    def _resolved(self, module: Module, node: ast.AST | str | None, kind: str) -> Def | Class | None:
        dotted = node if isinstance(node, str) else module.dotted(node)
        if dotted is None:
            return None
        own = getattr(module, kind).get(dotted)
        if own is not None:
            return own  # type: ignore[no-any-return]
        where, _, name = dotted.rpartition(".")
        if where:
            for other in self._by_tail.get(where.rpartition(".")[2], ()):
                if other.name == where or other.name.endswith(f".{where}"):
                    found = getattr(other, kind).get(name)
                    if found is not None:
                        return found  # type: ignore[no-any-return]
        return None

    def lineage(self, kind: Class) -> Iterator[Class]:
        """Yield a class, its first base that the project has, and so on; what is read may run in a circle."""
        seen: set[Class] = set()
        found: Class | None = kind
        while found is not None and found not in seen:
            seen.add(found)
            yield found
            bases = (self.class_(found.module, base) for base in found.bases)
            found = next((base for base in bases if base is not None), None)

    def derives(self, kind: Class, names: frozenset[str]) -> bool:
        """Whether a class has one of these bases, by the last word of its name, at any depth within the project."""
        seen: set[Class] = set()
        waiting = [kind]
        while waiting:
            one = waiting.pop()
            if one in seen:
                continue
            seen.add(one)
            for base in one.bases:
                if base.rpartition(".")[2] in names:
                    return True
                found = self.class_(one.module, base)
                if found is not None:
                    waiting.append(found)
        return False

    def link(self) -> None:
        """Find out what each function refers to, and so which of them emit, at any depth."""
        for one in self.defs:
            one.emits = any(is_emit(one.module, node) for node in ast.walk(one.node))
            one.audits = one.audits or one.emits
            one.refers = set(self._references(one))
        changed = True
        while changed:
            changed = False
            for one in self.defs:
                emits = one.emits or any(other.emits for other in one.refers)
                audits = one.audits or any(other.audits for other in one.refers)
                if (emits, audits) != (one.emits, one.audits):
                    one.emits, one.audits, changed = emits, audits, True

    def _references(self, one: Def) -> Iterator[Def]:
        """Yield the functions that one names: it may call them, pass them on, depend on them, be decorated by them."""
        for node in ast.walk(one.node):
            if isinstance(node, ast.Name):
                found = self.function(one.module, node)
                if found is not None and found is not one:
                    yield found
            elif isinstance(node, ast.Attribute):
                found = self._of_attribute(one, node)
                if found is not None and found is not one:
                    yield found

    def _of_attribute(self, one: Def, node: ast.Attribute) -> Def | None:
        found = self.function(one.module, node)
        if found is not None:
            return found
        if isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"} and one.owner is not None:
            return self.method(one.owner, node.attr)
        # A method of an object that nobody knows: that of the one class that has it.
        known = self._methods.get(node.attr, [])
        return known[0] if len(known) == 1 and node.attr not in _COMMON else None

    def method(self, kind: Class, name: str) -> Def | None:
        """Return a method of a class, or of a base of it that the project has."""
        return next((each.methods[name] for each in self.lineage(kind) if name in each.methods), None)


# Names of methods that everything has: to call one says nothing about whose it is.
_COMMON = frozenset(
    {"save", "create", "update", "delete", "add", "get", "post", "put", "patch", "set", "run", "call", "execute"}
    | {"commit", "filter", "all", "close", "open", "read", "write", "send", "start", "stop", "append", "remove", "pop"}
    | {"items"}
)


def is_emit(module: Module, node: ast.AST) -> bool:
    """Whether a node is a call that emits an audit event."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    if isinstance(called, ast.Name):
        return called.id in _EMITS and module.imports.get(called.id, "").startswith("tracevault.")
    if isinstance(called, ast.Attribute) and called.attr in _EMITS:
        return not _OTHERS.search(last_name(called.value))
    return False


def last_name(node: ast.AST) -> str:
    """Return the last word of a name or of a chain of attributes; empty for other expressions."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _files(paths: Iterable[Path], exclude: tuple[str, ...]) -> Iterator[tuple[Path, Path]]:
    for path in paths:
        if path.is_file():
            yield path, path.parent
            continue
        for file in path.rglob("*.py"):
            inside = file.relative_to(path)
            if any(part in _SKIPPED or part.startswith(".") for part in inside.parts[:-1]):
                continue
            if (
                file.name.startswith("test_")
                or file.name == "conftest.py"
                or any(inside.match(each) for each in exclude)
            ):
                continue
            if not (path / inside.parts[0] / "pyvenv.cfg").exists():
                yield file, path


def _module(path: Path, root: Path) -> Module:
    try:
        source = path.read_bytes()
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise Unreadable(path, getattr(error, "msg", str(error)), getattr(error, "lineno", None) or 1) from None
    parts = list(path.relative_to(root).with_suffix("").parts)
    package = parts[:-1]
    if parts[-1] == "__init__":
        parts.pop()
    module = Module(path, ".".join(parts), tree, _marked(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module.imports[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            where = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                module.imports[alias.asname or alias.name] = f"{where}.{alias.name}" if where else alias.name
    _define(module, tree.body, "", None)
    return module


def _define(module: Module, body: Iterable[ast.stmt], prefix: str, owner: Class | None) -> None:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found = Def(module, node, f"{prefix}{node.name}", owner)
            if owner is not None:
                owner.methods[node.name] = found
            else:
                if module.functions.setdefault(node.name, found) is not found:
                    module.functions[f"{found.qualname}:{node.lineno}"] = found
                # Of a factory such as create_app(), what is defined inside of it counts as the module's.
                _define(module, node.body, f"{prefix}{node.name}.", None)
        elif isinstance(node, ast.ClassDef):
            kind = Class(module, node, [name for base in node.bases if (name := module.dotted(base)) is not None])
            module.classes.setdefault(node.name, kind)
            _define(module, node.body, f"{prefix}{node.name}.", kind)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.AsyncWith)):
            for inner in (getattr(node, part, []) for part in ("body", "orelse", "finalbody")):
                _define(module, inner, prefix, owner)


def _marked(source: bytes) -> set[int]:
    if MARK.encode() not in source:
        return set()
    tokens = tokenize.tokenize(io.BytesIO(source).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT and MARK in token.string}
