"""A PostgreSQL 18 that a scenario may stop, start, freeze and make difficult."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tracevault.postgres.embedded import acquire

# What victims connect as: it owns nothing, and the limits of roles hold for it.
ROLE = "application"


class Server:
    """One embedded server with a superuser's conninfo, `admin`, and the role `application`."""

    def __init__(self, folder: Path) -> None:
        self._address = f"embedded:{folder / 'pgdata'}"
        self._handles = [acquire(self._address)]
        self.admin = self._handles[0].conninfo
        self.data = self._handles[0].folder
        parts = conninfo_to_dict(self.admin)
        self.socket = Path(str(parts["host"])) / f".s.PGSQL.{parts['port']}"
        # These servers are stopped hard, but their machine goes on: waiting for its disk would test the disk.
        self.sql("ALTER SYSTEM SET fsync = off", "ALTER SYSTEM SET log_checkpoints = off", "SELECT pg_reload_conf()")
        self.sql(f"CREATE ROLE {ROLE} LOGIN")

    def sql(self, *statements: str, dbname: str | None = None) -> list[tuple[Any, ...]]:
        """Run statements as the superuser, each in a transaction of its own; return the rows of the last."""
        conninfo = make_conninfo(self.admin, dbname=dbname) if dbname else self.admin
        with psycopg.connect(conninfo, autocommit=True, connect_timeout=10) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def stop(self) -> None:
        """Stop at once, as ``pg_ctl stop -m immediate`` does: no checkpoint, every session cut."""
        pid = self._postmaster()
        os.kill(pid, signal.SIGQUIT)
        deadline = time.monotonic() + 30
        while Path("/proc", str(pid), "cwd").exists() and _state(pid) != "Z":
            assert time.monotonic() < deadline, "the server does not stop"
            time.sleep(0.02)

    def start(self) -> None:
        """Start it again, with its crash recovery."""
        self._handles.append(acquire(self._address))

    @property
    def running(self) -> bool:
        with contextlib.suppress(OSError, IndexError, ValueError):
            return Path("/proc", str(self._postmaster()), "cwd").samefile(self.data)
        return False

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all its processes with SIGSTOP: connections stay, and nobody answers."""
        processes = [self._postmaster(), *_children(self._postmaster())]
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def read_only(self, dbname: str) -> Iterator[None]:
        """Refuse every write in every session, as a standby does."""
        self.sql("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
        deadline = time.monotonic() + 10
        while self.sql("SHOW default_transaction_read_only", dbname=dbname) != [("on",)]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        try:
            yield
        finally:
            self.sql("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")

    @contextlib.contextmanager
    def locked(self, dbname: str, table: str) -> Iterator[None]:
        """Hold an exclusive lock on a table."""
        with psycopg.connect(make_conninfo(self.admin, dbname=dbname)) as connection:
            connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
            yield
            connection.rollback()

    def kill_backend(self, dbname: str) -> int:
        """End one session of the application in this database; return how many there were to end."""
        return len(
            self.sql(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{dbname}' "
                f"AND usename = '{ROLE}' ORDER BY random() LIMIT 1"
            )
        )

    def release(self) -> None:
        if not self.running:
            self.start()
        for handle in self._handles:
            handle.release()

    def _postmaster(self) -> int:
        return int((self.data / "postmaster.pid").read_text().splitlines()[0])


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def _state(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
