"""Fixtures: a server, a database per test, and both vaults behind one face."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests import servers
from tests.faces import Face, OpenVault, opener
from tracevault import generate_init_sql
from tracevault.writer import delivery, upkeep

_numbers = itertools.count(1)
TEMPLATE = "tracevault_template"
TABLES = ("audit_logs", "audit_user_events")
HERE = Path(__file__).parent
LONG = (
    *("docs/", "integrations/", "web/", "test_transfer", "test_retention", "test_partitions", "test_processes"),
    *("test_embedded", "test_verify_jobs", "test_sealing", "test_concurrency", "test_cli_"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give this run a temporary folder of its own.

    Another run of the same user closes pytest's usual one to other users, under the servers that root started.
    """
    if config.option.basetemp is None:
        config.option.basetemp = tempfile.mkdtemp(prefix="tracevault-tests-")
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of few and long tests, so that two workers have about the same to do until the end."""
    items.sort(key=lambda item: not item.path.relative_to(HERE).as_posix().startswith(LONG))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine function in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture(scope="session")
def running() -> Iterator[Callable[[str], str]]:
    """A function that starts a server of a version when it is first asked for, and returns its superuser's conninfo."""
    started: dict[str, str] = {}
    with ExitStack() as stack:

        def start(version: str) -> str:
            if version not in started:
                started[version] = stack.enter_context(servers.running(version))
                _make_template(started[version])
            return started[version]

        yield start


def _make_template(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {TEMPLATE}".encode())
    with psycopg.connect(make_conninfo(conninfo, dbname=TEMPLATE), autocommit=True) as connection:
        for table in TABLES:
            connection.execute(generate_init_sql(table).encode())


@pytest.fixture(scope="session", params=servers.VERSIONS, ids=lambda version: f"pg{version}")
def server(request: pytest.FixtureRequest, running: Callable[[str], str]) -> str:
    """Conninfo of a running server's superuser; each supported server in turn."""
    return running(request.param)


def database(server: str, template: str) -> Iterator[str]:
    name = f"t{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy".encode())
    yield make_conninfo(server, dbname=name)
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def dsn(server: str) -> Iterator[str]:
    """Connection string of an empty database of the test's own."""
    yield from database(server, "template0")


@pytest.fixture
def ready_dsn(server: str) -> Iterator[str]:
    """Connection string of a database of the test's own, with audit_logs and audit_user_events in it."""
    yield from database(server, TEMPLATE)


@pytest.fixture(params=["blocking", "async"])
def face(request: pytest.FixtureRequest) -> Iterator[OpenVault]:
    """A function that opens a vault of either kind, behind one blocking face; closed with the test."""
    opened: list[Face] = []
    with opener(request.param, opened) as open_vault:
        yield open_vault
        for vault in opened:
            vault.close_quietly()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a vault looks at every few seconds it looks at more often, so that the test need not wait as long."""
    monkeypatch.setattr(delivery, "PROBE_INTERVAL", 1.5)
    monkeypatch.setattr(upkeep, "ADOPTION_INTERVAL", 0.2)


def rows(dsn: str, query: str, *params: Any) -> list[tuple[Any, ...]]:
    """Run one query on a connection of its own and return its rows."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(query.encode(), params)
        return cursor.fetchall() if cursor.description else []
