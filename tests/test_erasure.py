"""An erasure reaches what is encrypted, wherever it is, and what waits on a machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.conftest import rows
from tests.sealed import Sealed, Sealing
from tests.test_background import REFUSE_BAD, down, wait_for
from tests.test_cli import Cli, cli
from tests.test_spool import victim
from tracevault import DirectoryKeyStore, Tracevault, UndeliveredError, Verdict
from tracevault.events.data_key import subject_of
from tracevault.writer import inspection

__all__ = ["cli"]  # the fixture

SECRET = "ana@example.com"
ANA = {"id": "ana", "type": "user"}


@pytest.fixture
def log(ready_dsn: str, tmp_path: Path) -> Iterator[Sealed]:
    sealed = Sealed(ready_dsn, tmp_path)
    yield sealed
    sealed.close()


def vault(log: Sealed, keys: Path) -> Tracevault:
    return Tracevault(connection_string=log.dsn, encrypt_fields=["data.email"], key_store=keys)


def emails(dsn: str, keys: Path) -> list[object]:
    with Tracevault(connection_string=dsn, encrypt_fields=["data.email"], key_store=keys) as audit:
        found = audit.query.find_many(event="user.registered", order="asc")
    return [None if record.data is None else record.data["email"] for record in found]


def test_a_destroyed_key_erases_backups_too(log: Sealed, cli: Cli, tmp_path: Path, server: str) -> None:
    keys = tmp_path / "keys"
    with vault(log, keys) as audit:
        audit.emit("user.registered", target=ANA, data={"email": SECRET})
        audit.emit("user.registered", target={"id": "bob", "type": "user"}, data={"email": "bob@example.com"})
    log.seal()
    assert log.verify().verdict is Verdict.OK
    assert emails(log.dsn, keys) == [SECRET, "bob@example.com"]
    name = conninfo_to_dict(log.dsn)["dbname"]
    backup = make_conninfo(log.dsn, dbname=f"{name}_backup")
    log.sealer.close()
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}_backup TEMPLATE {name} STRATEGY file_copy".encode())
    log.sealer = log.another()
    try:
        with Sealing(log):
            done = cli(
                *("erase", "--target", "user/ana", "--reason", "r", "--yes"),
                *("--key-store", str(keys), "--dsn", log.dsn),
            )
        assert (done.code, done.out) == (0, "1 row erased\n1 data key destroyed\n"), done.err
        assert emails(log.dsn, keys) == [None, "bob@example.com"]
        # The backup has the row as it was, and nobody can read it any more; that it was not changed is still shown.
        hers, his = emails(backup, keys)
        assert isinstance(hers, dict)
        assert list(hers) == ["$enc"]
        assert his == "bob@example.com"
        assert SECRET not in str(rows(backup, "SELECT data::text FROM audit_logs"))
    finally:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"DROP DATABASE {name}_backup WITH (FORCE)".encode())
    report = log.verify()
    assert (report.verdict, report.erased) == (Verdict.OK, 1)
    ((said,),) = rows(log.dsn, "SELECT data FROM audit_logs WHERE event = 'tracevault.erased'")
    assert (said["key_destroyed"], said["ranges"]) == (True, [[0, 1]])


def test_destroying_a_key_alone_changes_no_hash(log: Sealed, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    with vault(log, keys) as audit:
        audit.emit("user.registered", target=ANA, data={"email": SECRET})
    log.seal()
    assert len(DirectoryKeyStore(keys).destroy(subject_of("user", "ana"))) == 1
    report = log.verify()
    assert (report.verdict, report.checked) == (Verdict.OK, 1)
    assert list(emails(log.dsn, keys)[0]) == ["$enc"]  # type: ignore[call-overload]


def test_a_key_without_events_is_destroyed_as_well(log: Sealed, cli: Cli, tmp_path: Path) -> None:
    keys = DirectoryKeyStore(tmp_path / "keys")
    keys.create(subject_of("user", "ana"))
    log.seal()
    with Sealing(log):
        done = cli(
            *("erase", "--target", "user/ana", "--reason", "r", "--yes"),
            *("--key-store", str(tmp_path / "keys"), "--dsn", log.dsn),
        )
    assert (done.code, done.out) == (0, "0 rows erased\n1 data key destroyed\n"), done.err
    assert keys.get(subject_of("user", "ana")) is None
    assert log.verify().verdict is Verdict.OK


def test_nothing_is_erased_while_a_spool_has_events_of_it(log: Sealed, cli: Cli, tmp_path: Path) -> None:
    with Tracevault(connection_string=log.dsn) as audit:
        audit.emit("user.registered", target=ANA, data={"email": SECRET})
    log.seal()
    body = "vault.emit('user.moved', target={'id': 'ana', 'type': 'user'}, data={'street': 'x'})\nos._exit(0)\n"
    with down(log.dsn), victim(log.dsn, tmp_path, body) as process:
        assert process.wait(30) == 0
    spool = str(tmp_path / "spool")
    erase = ("erase", "--target", "user/ana", "--reason", "r", "--yes", "--spool", spool, "--dsn", log.dsn)
    done = cli(*erase)
    assert (done.code, "has 1 event of it to deliver" in done.err) == (3, True)
    assert rows(log.dsn, "SELECT count(*) FROM audit_logs WHERE starts_with(event, 'tracevault.')") == [(0,)]
    assert cli("spool", "flush", "--spool", spool, "--dsn", log.dsn).code == 0
    with Sealing(log):
        wait_for(lambda: rows(log.dsn, "SELECT size FROM tracevault_trees") == [(2,)])
        done = cli(*erase)
    assert (done.code, done.out) == (0, "2 rows erased\n")
    # Of others it may hold what it likes.
    assert cli("erase", "--target", "user/bob", "--reason", "r", "--spool", spool, "--dsn", log.dsn).code == 0


def test_dead_letters_of_it_are_dropped(log: Sealed, cli: Cli, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    rows(log.dsn, REFUSE_BAD)
    options = {"connection_string": log.dsn, "default_mode": "async", "bootstrap": {"ensure_schema": False}}
    with suppress(UndeliveredError), Tracevault(**options, spool=spool) as audit:  # type: ignore[arg-type]
        for target in (ANA, {"id": "bob", "type": "user"}):
            audit.emit("bad", target=target, data={"email": SECRET})
        wait_for(lambda: audit.stats().dead == 2)
    rows(log.dsn, "ALTER TABLE audit_logs DISABLE TRIGGER USER")
    log.seal()
    with Sealing(log):
        done = cli(
            *("erase", "--target", "user/ana", "--reason", "request 7", "--yes"),
            *("--spool", str(spool), "--dsn", log.dsn),
        )
    assert (done.code, done.out) == (0, f"0 rows erased\n1 dead letter dropped in {spool}\n"), done.err
    (left,) = inspection.letters(spool)
    assert "bob" in left.prepared.row
    assert cli("spool", "flush", "--spool", str(spool), "--dsn", log.dsn).code == 0
    ((said,),) = rows(log.dsn, "SELECT data FROM audit_logs WHERE event = 'tracevault.dead_letter.dropped'")
    assert said["reason"] == "erased: request 7"


def test_who_has_the_keys_reads(log: Sealed, cli: Cli, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    with vault(log, keys) as audit:
        id_ = str(audit.emit("user.registered", target=ANA, data={"email": SECRET}).id)
    for command in (["find"], ["get", id_]):
        for output in ("json", "table"):
            given = [*command, "-o", output, "--dsn", log.dsn]
            assert SECRET not in cli(*given).out
            if output == "json" or command != ["find"]:  # the table of `find` shows no payload
                assert SECRET in cli(*given, "--key-store", str(keys)).out
    assert cli("find", "--key-store", str(tmp_path / "none"), "--dsn", log.dsn).code == 2


@pytest.mark.parametrize(
    "more",
    [
        ["--resume", "01930000-0000-7000-8000-000000000001", "--spool", "x"],
        ["--resume", "01930000-0000-7000-8000-000000000001", "--key-store", "x"],
        ["--target", "user/u1", "--reason", "r", "--key-store", "missing"],
    ],
    ids=" ".join,
)
def test_wrong_usage(log: Sealed, cli: Cli, more: list[str]) -> None:
    log.seal()
    assert cli("erase", *more, "--dsn", log.dsn).code == 2
