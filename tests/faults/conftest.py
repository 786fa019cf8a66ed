"""Fixtures of the fault suite, and the table that it prints at its end."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.conftest import TABLES
from tests.faults.server import ROLE, Server
from tests.faults.supervisor import ROWS, Scenario
from tracevault import generate_init_sql

SEED = int(os.environ.get("TRACEVAULT_FAULTS_SEED", random.SystemRandom().randrange(10**6)))
_FAILED = pytest.StashKey[bool]()
_numbers = iter(range(1, 10**6))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


def pytest_report_header() -> str:
    return f"faults: TRACEVAULT_FAULTS_SEED={SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ROWS:
        write = terminalreporter.write_line
        terminalreporter.section(f"faults, seed {SEED}")
        write(f"{'scenario':56}{'acknowledged':>13}{'lost':>6}{'doubled':>8}{'replayed':>9}{'dead':>6}{'seconds':>9}")
        for row in ROWS:
            write(
                f"{row.scenario[:55]:56}{row.acknowledged:>13,}{row.lost:>6}{row.doubled:>8}{row.replayed:>9,}"
                f"{row.dead:>6}{row.seconds:>9.1f}"
            )


@pytest.fixture(scope="session")
def fault_server() -> Iterator[Server]:
    """One server for all scenarios; each leaves it as it was, apart from its own database."""
    yield from _server()


@pytest.fixture(scope="session")
def other_server() -> Iterator[Server]:
    """Another one, for what spans two."""
    yield from _server()


def _server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="tracevault-faults-"))
    server = Server(folder)
    try:
        server.sql("CREATE DATABASE template_faults")
        for table in TABLES:
            server.sql(generate_init_sql(table), dbname="template_faults")
        server.sql(f"GRANT SELECT, INSERT ON {', '.join(TABLES)} TO {ROLE}", dbname="template_faults")
        yield server
    finally:
        server.release()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def scenario(fault_server: Server, request: pytest.FixtureRequest) -> Iterator[Scenario]:
    """A scenario with a database of its own. Its folder is kept if it fails."""
    dbname = f"f{next(_numbers)}"
    fault_server.sql(f"CREATE DATABASE {dbname} TEMPLATE template_faults")
    folder = Path(tempfile.mkdtemp(prefix="tracevault-scenario-"))
    found = Scenario(request.node.name.removeprefix("test_"), fault_server, dbname, folder, SEED)
    yield found
    failed = request.node.stash.get(_FAILED, True)
    found.close(failed=failed)
    if not failed:
        shutil.rmtree(folder, ignore_errors=True)
    fault_server.sql(f"DROP DATABASE {dbname} WITH (FORCE)")
