"""The PostgreSQL servers that tests run against: 18 out of the embedded wheel, and Debian's 15 where installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tracevault.postgres.embedded import acquire

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
# A folder in memory, used where so many bytes are free there: each test makes a database, which takes far less there.
MEMORY = Path("/dev/shm")
_ROOM = 2 << 30
VERSIONS = ("18", "15") if (DEBIAN_15 / "postgres").exists() else ("18",)

# Of the servers that run.
FOLDERS: set[Path] = set()

# For what does not depend on the server.
one_server = pytest.mark.parametrize("server", VERSIONS[:1], ids=lambda version: f"pg{version}", indirect=True)


@contextmanager
def running(version: str) -> Iterator[str]:
    """Run a server of this version in a new folder; yield a conninfo for its superuser."""
    folder = Path(tempfile.mkdtemp(prefix=f"tracevault-tests-{version}-", dir=_place()))
    FOLDERS.add(folder)
    try:
        with _embedded(folder) if version == "18" else _debian(folder, DEBIAN_15) as conninfo:
            with psycopg.connect(conninfo, autocommit=True) as connection:
                # The data lives for one test run; waiting for its disk would test the disk.
                connection.execute("ALTER SYSTEM SET fsync = off")
                connection.execute("SELECT pg_reload_conf()")
            yield conninfo
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        FOLDERS.remove(folder)


def _place() -> Path | None:
    roomy = os.access(MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(MEMORY).free >= _ROOM
    return MEMORY if roomy else None


@contextmanager
def _embedded(folder: Path) -> Iterator[str]:
    server = acquire(f"embedded:{folder / 'pgdata'}")
    try:
        yield server.conninfo
    finally:
        server.release()


@contextmanager
def _debian(folder: Path, binaries: Path) -> Iterator[str]:
    data = folder / "pgdata"
    sockets = folder / "s"
    sockets.mkdir()
    user = None
    if os.geteuid() == 0:
        user = "postgres"
        account = pwd.getpwnam(user)
        for path in (folder, sockets):
            os.chown(path, account.pw_uid, account.pw_gid)

    def execute(program: str, *arguments: str) -> None:
        subprocess.run(
            [binaries / program, "-D", data, *arguments],
            check=True,
            user=user,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    execute("initdb", "-U", "tracevault", "--auth=trust", "--no-locale", "--encoding=UTF8", "--no-sync")
    execute("pg_ctl", "-w", "-l", str(folder / "log"), "-o", f"-c listen_addresses='' -k {sockets}", "start")
    try:
        yield f"host={sockets} user=tracevault dbname=postgres"
    finally:
        execute("pg_ctl", "-w", "-m", "immediate", "stop")


@contextmanager
def standby(primary: str) -> Iterator[str]:
    """Run a hot standby of a server of Debian's 15; yield a conninfo for its superuser."""
    folder = Path(tempfile.mkdtemp(prefix="tracevault-tests-standby-", dir=_place()))
    data, sockets = folder / "pgdata", folder / "s"
    sockets.mkdir()
    user = "postgres" if os.geteuid() == 0 else None
    if user is not None:
        account = pwd.getpwnam(user)
        for path in (folder, sockets):
            os.chown(path, account.pw_uid, account.pw_gid)

    def execute(program: str, *arguments: str) -> None:
        subprocess.run([DEBIAN_15 / program, "-D", data, *arguments], check=True, user=user, cwd="/",
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

    try:
        execute("pg_basebackup", "-R", "-X", "stream", "-c", "fast", "--no-sync", "-d", primary)
        data.chmod(0o700)
        options = f"-c listen_addresses='' -k {sockets} -c hot_standby=on -c max_standby_streaming_delay=-1"
        execute("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"host={sockets} user=tracevault"
        finally:
            execute("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
