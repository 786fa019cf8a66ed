"""Process models: in each, what was acknowledged is stored, once; what is in memory goes at an exit in good order.

The applications are in ``tests/apps``. Their background writers would wait for a minute, so that what async mode has
kept is stored by the exit, or by the successor that adopts the spool, and by nothing else.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import TimeoutError  # noqa: A004

from tests.apps import broker
from tests.apps.vaults import KINDS, Receipts
from tests.conftest import rows
from tests.test_background import locked, wait_for
from tracevault import Tracevault
from tracevault.writer import process as own_process

# What is tested here are processes, not servers.
pytestmark = [
    pytest.mark.parametrize("server", ["18"], indirect=True, ids=["pg18"]),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
ROOT = Path(__file__).resolve().parents[1]
# An exit may take 2 s, and what it takes to end an interpreter.
EXIT_SECONDS = 2.0 + 3.0
# Celery takes that long by itself.
CELERY_SECONDS = 6.0


class Application:
    """A process under test, its database and its spool."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self.folder = folder
        self.spool = folder / "spool"
        self.socket = folder / "s"
        self.receipts: Receipts = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        settings = {"TEST_DSN": self.dsn, "TEST_SPOOL": str(self.spool), "TEST_FOLDER": str(self.folder)}
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if command[1] == "tests.apps.script" else log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
                env={**os.environ, **settings, **environment},
            )
        return self.process

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def get(self, *kinds: str) -> dict[str, Any]:
        """Send one request, which emits one event of each of ``kinds``; note the receipts."""
        connection = http.client.HTTPConnection("application", timeout=20)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(20)
        try:
            connection.sock.connect(str(self.socket))
            connection.request("GET", "/?" + "&".join(f"kind={kind}" for kind in kinds))
            response = connection.getresponse()
            assert response.status == 200, self.log
            answer: dict[str, Any] = json.loads(response.read())
        finally:
            connection.close()
        self.note(answer["receipts"])
        return answer

    def get_twice(self, *kinds: str) -> list[dict[str, Any]]:
        """Send two requests at once, so that both workers have something to do."""
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(lambda _: self.get(*kinds), range(2)))

    def note(self, receipts: Receipts) -> None:
        self.receipts += [(id_, stored) for id_, stored in receipts]

    def serving(self) -> None:
        """Wait until it answers."""

        def answers() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            try:
                self.get()
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            return True

        wait_for(answers)

    def stop(self, code: int = 0, *, within: float = EXIT_SECONDS) -> None:
        """Ask it to exit, by SIGTERM, and wait until it has done so, in time."""
        assert self.process is not None
        self.process.terminate()
        self.ended(code, within=within)

    def ended(self, code: int, *, within: float = EXIT_SECONDS) -> None:
        assert self.process is not None
        started = time.monotonic()
        assert self.process.wait(30) == code, self.log
        assert time.monotonic() - started < within

    # -- what is stored ------------------------------------------------------------------------------------

    def stored(self) -> Counter[str]:
        """Count the events that are in the table, by where their receipts say that they were."""
        ids = {str(id_) for (id_,) in rows(self.dsn, "SELECT id FROM audit_logs")}
        return Counter(stored for id_, stored in self.receipts if id_ in ids)

    def acknowledged(self) -> Counter[str]:
        return Counter(stored for _, stored in self.receipts)

    def check(self, *kinds: str) -> None:
        """See that what was acknowledged so is stored, once, and that nothing else is."""
        acknowledged, stored = self.acknowledged(), self.stored()
        assert {kind: stored[kind] for kind in kinds} == {kind: acknowledged[kind] for kind in kinds}, self.log
        assert all(acknowledged[kind] for kind in kinds), "nothing was shown"
        assert rows(self.dsn, "SELECT count(*) FROM audit_logs") == [(stored.total(),)]

    def succeed(self) -> int:
        """Let another process's vault deliver what is left in the spool; return how much that was."""
        with Tracevault(
            connection_string=self.dsn, bootstrap={"ensure_schema": False}, default_mode="async", spool=self.spool
        ) as vault:
            vault.flush(timeout=10)
            adopted = vault.stats().adopted
        assert not list(self.spool.glob("*")), "something is left in the spool"
        return adopted


@pytest.fixture
def application(ready_dsn: str) -> Iterator[Application]:
    folder = Path(tempfile.mkdtemp(prefix="tracevault-application-"))  # short: a socket's path must be
    application = Application(ready_dsn, folder)
    try:
        yield application
    finally:
        if application.process is not None:
            if application.process.poll() is None:
                os.killpg(application.process.pid, signal.SIGKILL)
            application.process.wait(30)
            if application.process.stdout is not None:
                application.process.stdout.close()
        rmtree(folder, ignore_errors=True)


# --- servers ------------------------------------------------------------------------------------------------


def serve(application: Application, *command: str, one_load: bool) -> None:
    """Have two workers emit, kill one, have them emit again, and let the server exit."""
    application.start(*command)
    application.serving()
    by_pid: dict[int, int] = {}
    loads: dict[int, Receipts] = {}

    def two_workers_have_emitted() -> bool:
        for answer in application.get_twice("database", "spool"):
            by_pid[answer["pid"]] = by_pid.get(answer["pid"], 0) + 1
            loads[answer["loaded_by"]] = answer["at_load"]
            assert (answer["loaded_by"] != answer["pid"]) == one_load
        return len(by_pid) == 2

    wait_for(two_workers_have_emitted)
    assert application.stored()["spool"] == 0, "the exit has nothing to deliver"
    killed = next(iter(by_pid))
    os.kill(killed, signal.SIGKILL)
    kept = by_pid[killed]
    if not one_load:  # of what it emitted when it was loaded, it loses what was in its memory alone
        application.note([receipt for receipt in loads[killed] if receipt[1] != "memory"])
        kept += sum(receipt[1] == "spool" for receipt in loads.pop(killed))
    wait_for(lambda: application.stored()["spool"] >= kept)
    assert application.stored()["spool"] == kept

    living: set[int] = set()

    def two_living_workers_have_emitted() -> bool:
        for answer in application.get_twice(*KINDS):
            living.add(answer["pid"])
            loads[answer["loaded_by"]] = answer["at_load"]
        return len(living) == 2

    wait_for(two_living_workers_have_emitted)
    for receipts in loads.values():
        application.note(receipts)
    assert application.stored()["memory"] == 0, "the exit has nothing to deliver"
    application.stop()


@pytest.mark.parametrize("preload", [False, True], ids=["prefork", "preload"])
def test_gunicorn(application: Application, *, preload: bool) -> None:
    command = ["-m", "gunicorn", "--workers=2", f"--bind=unix:{application.socket}", "--no-control-socket"]
    command += ["--preload", "tests.apps.wsgi"] if preload else ["tests.apps.wsgi"]
    serve(application, *command, one_load=preload)
    application.check("database", "spool", "memory")
    assert not list(application.spool.glob("*"))


UWSGI = ("-c", "import pyuwsgi; pyuwsgi.run()", "--master", "--processes=2", "--need-app", "--die-on-term")


@pytest.mark.parametrize("options", ["--lazy-apps", "--lazy-apps --enable-threads", ""])
def test_uwsgi(application: Application, options: str) -> None:
    lazy = "--lazy-apps" in options
    command = [*UWSGI, f"--http-socket={application.socket}", "--wsgi=tests.apps.wsgi", *options.split()]
    serve(application, *command, one_load=not lazy)
    if not lazy:
        # The master ends without Python's functions of exit, and while it lives no thread of Python's runs in it.
        at_load = application.receipts[-9:]
        application.receipts[-9:] = [(id_, f"{stored} of the master") for id_, stored in at_load]
        assert application.stored()["database of the master"] == 3
        assert application.stored()["spool of the master"] == 0
        assert application.succeed() == 3
        assert application.stored()["spool of the master"] == 3
    application.check("database", "spool", "memory")
    assert not list(application.spool.glob("*"))


@pytest.mark.parametrize(
    ("version", "options", "warned"),
    [
        ((2, 0, 26, 0, ""), {}, True),
        ((2, 0, 26, 0, ""), {"enable-threads": True}, False),
        ((2, 0, 26, 0, ""), {b"threads": b"2"}, False),
        ((2, 0, 27, 0, ""), {}, False),
    ],
)
def test_a_warning_where_uwsgi_runs_no_threads(
    ready_dsn: str,
    version: tuple[Any, ...],
    options: dict[Any, Any],
    *,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(version_info=version, opt=options))
    monkeypatch.setattr(own_process, "_warned", set())
    for _ in range(2):
        Tracevault(connection_string=ready_dsn, bootstrap={"ensure_schema": False}).close()
    assert caplog.text.count("set `enable-threads`") == warned


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "left open"])
def test_celery(application: Application, *, closes: bool) -> None:
    """The processes of its pool end by `os._exit`, where nothing is delivered: the spool keeps it."""
    celery = broker.application(application.folder, out="outbox")
    application.start(
        "-m", "celery", "--app=tests.apps.tasks", "worker", "--pool=prefork", "--concurrency=2",
        "--without-gossip", "--without-mingle", "--without-heartbeat",
        **({"TEST_CLOSES": "1"} if closes else {}),
    )  # fmt: skip

    def result(task: Any) -> Any:
        try:
            return task.get(timeout=20, interval=0.02)
        except TimeoutError:
            pytest.fail(f"no result:\n{application.log}")

    application.note(result(broker.send(celery, application.folder, "tests.apps.tasks.loaded")))
    tasks = [broker.send(celery, application.folder, "tests.apps.tasks.emit") for _ in range(8)]
    for task in tasks:
        application.note(result(task)[1])
    assert application.acknowledged() == {"database": 11, "spool": 11, "memory": 11}
    assert application.stored() == {"database": 11}, "the exit has nothing to deliver"
    application.stop(within=CELERY_SECONDS + EXIT_SECONDS)
    if closes:
        application.check("database", "spool", "memory")
    else:
        assert application.stored()["memory"] == 3, "what the main process had"
        application.succeed()
        application.check("database", "spool")
    assert not list(application.spool.glob("*"))


# --- scripts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "code"),
    [
        ("returns", 0),
        ("exits", 3),
        ("raises", 1),
        ("terminated", 143),
        ("leaves_a_thread", 0),
        ("closes_the_loop", 0),
        ("mixes", 0),
        ("forks", 0),
        ("spawns", 0),
    ],
)
def test_an_exit_in_good_order(application: Application, way: str, code: int) -> None:
    run(application, way, code)
    application.check("database", "spool", "memory")
    assert not list(application.spool.glob("*"))


def test_sigterm_without_a_handler(application: Application) -> None:
    """Which is no exit in good order: what is in memory is lost, the spool is kept."""
    run(application, "terminated_at_once", -signal.SIGTERM)
    assert application.stored() == {"database": 3}
    assert application.succeed() == 3
    application.check("database", "spool")


def test_an_exit_while_the_database_is_stuck(application: Application) -> None:
    with locked(application.dsn):
        run(application, "returns", 0, TEST_KINDS="spool")
    assert application.stored().total() == 0
    assert application.succeed() == 3
    application.check("spool")


def run(application: Application, way: str, code: int, **environment: str) -> None:
    """Run the script, which ends in this way, and note what it says."""
    process = application.start("-m", "tests.apps.script", way, **environment)
    assert process.stdout is not None
    for line in process.stdout:
        application.note(json.loads(line))
    application.ended(code)
