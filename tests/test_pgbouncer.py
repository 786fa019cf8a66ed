"""PgBouncer in transaction mode: a session belongs to nobody, each transaction may run on another one."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree, which
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.conftest import rows
from tests.faces import OpenVault
from tracevault import DriverError, DuplicateIdError, Tracevault

# Debian keeps it where only root's PATH leads.
PGBOUNCER = which("pgbouncer") or which("pgbouncer", path="/usr/sbin")
pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")
PORT = 6432
CONFIGURATION = """\
[databases]
* = host={host} port={port} user={user}
[pgbouncer]
listen_addr =
listen_port = {listen_port}
unix_socket_dir = {folder}
auth_type = any
pool_mode = transaction
default_pool_size = 2
logfile = {folder}/log
"""


@pytest.fixture
def through(ready_dsn: str) -> Iterator[str]:
    """Connection string of the test's database through a PgBouncer that has two sessions for everybody."""
    assert PGBOUNCER is not None
    server = conninfo_to_dict(ready_dsn)
    folder = Path(tempfile.mkdtemp(prefix="tracevault-pgbouncer-"))
    (folder / "ini").write_text(
        CONFIGURATION.format(
            host=server["host"],
            port=server.get("port", "5432"),
            user=server["user"],
            listen_port=PORT,
            folder=folder,
        )
    )
    owner = None
    if os.geteuid() == 0:
        # It refuses to run as root. Whoever owns the server's socket may reach it.
        owner = next(Path(str(server["host"])).glob(".s.PGSQL.*[0-9]")).stat()
        for path in (folder, folder / "ini"):
            os.chown(path, owner.st_uid, owner.st_gid)
    process = subprocess.Popen(
        [PGBOUNCER, folder / "ini"],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        user=owner.st_uid if owner else None,
        group=owner.st_gid if owner else None,
        extra_groups=[] if owner else None,
    )
    try:
        deadline = time.monotonic() + 20
        while not (folder / f".s.PGSQL.{PORT}").exists():
            assert process.poll() is None, "pgbouncer ended"
            assert time.monotonic() < deadline, "pgbouncer did not start"
            time.sleep(0.02)
        yield f"host={folder} port={PORT} user={server['user']} dbname={server['dbname']}"
    finally:
        process.kill()
        process.wait()
        rmtree(folder, ignore_errors=True)


def stored(dsn: str) -> list[UUID]:
    return sorted(row[0] for row in rows(dsn, "SELECT id FROM audit_logs"))


def test_one_emit_after_another(face: OpenVault, through: str, ready_dsn: str) -> None:
    vault = face(connection_string=through)
    ids = [vault.emit("one", data={"n": number}).id for number in range(20)]
    assert stored(ready_dsn) == sorted(ids)


def test_vaults_side_by_side(through: str, ready_dsn: str) -> None:
    # Six clients, two sessions: each of them meets what the others left there.
    scopes = {"default": "audit_logs", "users": "audit_user_events"}

    def work(_number: int) -> list[UUID]:
        with Tracevault(connection_string=through, scopes=scopes) as vault:
            users, ids = vault.get_scope("users"), []
            for number in range(15):
                ids.append(vault.emit("here", data={"n": number}).id)
                users.emit("there")
                assert vault.query.find_by_id(ids[-1]) is not None
            return ids

    with ThreadPoolExecutor(6) as threads:
        ids = [id_ for found in threads.map(work, range(6)) for id_ in found]
    assert stored(ready_dsn) == sorted(ids)
    assert rows(ready_dsn, "SELECT event, count(*) FROM audit_user_events GROUP BY event") == [("there", 90)]


def test_many_in_one_transaction(face: OpenVault, through: str, ready_dsn: str) -> None:
    vault = face(connection_string=through)
    for size in (3, 500):
        ids = [receipt.id for receipt in vault.emit_many([{"event": "many"} for _ in range(size)])]
        assert set(ids) <= set(stored(ready_dsn))
    assert vault.query.count() == 503


def test_async_batches(face: OpenVault, through: str, ready_dsn: str) -> None:
    vault = face(connection_string=through, default_mode="async")
    ids = [vault.emit("batch", data={"n": number}).id for number in range(2_000)]
    vault.flush(timeout=30)
    assert stored(ready_dsn) == sorted(ids)


def test_the_same_id_again(face: OpenVault, through: str, ready_dsn: str) -> None:
    vault = face(connection_string=through)
    id_ = UUID("018f4e5c-7a1b-7c3d-9e2f-1a2b3c4d5e6f")
    for _ in range(10):
        vault.emit("again", id=id_, data={"n": 1})
        vault.emit_many([{"event": "again", "id": id_, "data": {"n": 1}}])
    with pytest.raises(DuplicateIdError):
        vault.emit("again", id=id_, data={"n": 2})
    assert stored(ready_dsn) == [id_]


def test_in_the_transaction_of_the_caller(face: OpenVault, through: str, ready_dsn: str) -> None:
    vault = face(connection_string=through)
    connection = vault.connect(through, prepare_threshold=None)
    kept = []
    for number in range(10):
        receipt = vault.emit("mine", connection=connection.vault)
        assert receipt.stored == "transaction"
        if number % 2:
            connection.commit()
            kept.append(receipt.id)
        else:
            connection.rollback()
    connection.close()
    assert stored(ready_dsn) == sorted(kept)


def test_nothing_is_left_in_the_shared_sessions(face: OpenVault, through: str) -> None:
    vault = face(connection_string=through)
    for _ in range(10):
        vault.emit("sync")
        vault.emit("async", mode="async")
        vault.query.count()
    vault.flush()
    with (
        psycopg.connect(through, prepare_threshold=None) as one,
        psycopg.connect(through, prepare_threshold=None) as other,
    ):
        for connection in (one, other):  # in a transaction each, so that both sessions are looked at
            limit = connection.execute("SELECT current_setting('statement_timeout')").fetchone()
            assert limit == ("0",)
            assert connection.execute("SELECT name FROM pg_prepared_statements").fetchall() == []


def test_a_locked_table_still_ends_in_time(face: OpenVault, through: str, ready_dsn: str) -> None:
    vault = face(connection_string=through, timeout=1.0)
    with psycopg.connect(ready_dsn) as holder:
        holder.execute("LOCK TABLE audit_logs")
        started = time.monotonic()
        with pytest.raises(DriverError):
            vault.emit("blocked")
        assert time.monotonic() - started < 10
    assert vault.emit("after").stored == "database"
    assert [row[0] for row in rows(ready_dsn, "SELECT event FROM audit_logs")] == ["after"]
