"""One vault over several servers: each scope is where it says, and one that is down does not stop the others."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.conftest import TEMPLATE, database, rows
from tests.faces import OpenVault
from tests.newest import server
from tracevault import ConfigError, DriverError, Tracevault, UndeliveredError
from tracevault.config import config_from
from tracevault.testing import AuditLog

__all__ = ["server"]  # the fixture

NOBODY = "host=127.0.0.1 port=1 connect_timeout=2"


@pytest.fixture
def other_dsn(server: str) -> Iterator[str]:
    """Another database, in place of another server."""
    yield from database(server, TEMPLATE)


def over(here: str, there: str, **options: Any) -> dict[str, Any]:
    far = {"table_name": "audit_logs", "connection_string": there}
    return {"connection_string": here, "scopes": {"default": "audit_logs", "far": far}, **options}


def events(dsn: str) -> list[str]:
    return [event for (event,) in rows(dsn, "SELECT event FROM audit_logs ORDER BY event")]


def test_each_scope_is_where_it_says(ready_dsn: str, other_dsn: str, face: OpenVault) -> None:
    audit = face(**over(ready_dsn, other_dsn))
    far = audit.get_scope("far")
    assert audit.vault.scope_names == ("default", "far")
    id_ = far.emit("far.sync").id
    far.emit("far.async", mode="async")
    far.emit_many(["far.many.1", "far.many.2"])
    audit.emit("here.sync")
    audit.emit("here.async", mode="async")
    assert audit.stats().emitted == 6
    audit.flush()
    assert events(ready_dsn) == ["here.async", "here.sync"]
    assert events(other_dsn) == ["far.async", "far.many.1", "far.many.2", "far.sync"]
    assert far.query.find_by_id(id_).event == "far.sync"
    assert audit.query.find_by_id(id_) is None
    stats = audit.stats()
    assert (stats.delivered, stats.queued, stats.in_flight) == (6, 0, 0)
    assert stats.lanes == {"default": "ok", "far": "ok"}
    assert audit.healthcheck()
    assert other_dsn not in repr(audit.vault)
    assert "far" in repr(audit.vault)
    audit.close()
    assert not audit.healthcheck()


def test_the_default_scope_may_be_the_one_elsewhere(ready_dsn: str, other_dsn: str, face: OpenVault) -> None:
    audit = face(**over(ready_dsn, other_dsn, default_scope="far"))
    audit.emit("far")
    audit.get_scope("default").emit("here")
    assert (events(ready_dsn), events(other_dsn)) == (["here"], ["far"])
    # With a string for each of them the vault needs none.
    alone = face(scopes={"default": {"table_name": "audit_logs", "connection_string": other_dsn}})
    alone.emit("far.too")
    assert events(other_dsn) == ["far", "far.too"]


def test_a_scope_reads_where_it_says(ready_dsn: str, other_dsn: str, server: str, face: OpenVault) -> None:
    for third in database(server, TEMPLATE):
        far = {"table_name": "audit_logs", "connection_string": other_dsn, "read_connection_string": third}
        audit = face(connection_string=ready_dsn, scopes={"default": "audit_logs", "far": far})
        audit.get_scope("far").emit("far")
        assert audit.get_scope("far").query.count() == 0
        assert events(other_dsn) == ["far"]
        audit.close()


def test_a_server_that_is_down_does_not_stop_the_others(
    ready_dsn: str, face: OpenVault, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "tracevault"):
        audit = face(**over(ready_dsn, NOBODY, timeout=1.0))
    assert "scopes far wait for that server, the others go on" in caplog.text
    audit.emit("here")
    with pytest.raises(DriverError):
        audit.get_scope("far").emit("far")
    audit.get_scope("far").emit("far", mode="async")
    audit.emit("here.async", mode="async")
    assert not audit.healthcheck()
    with pytest.raises(UndeliveredError) as caught:
        audit.close(timeout=1.0)
    assert caught.value.lost + caught.value.pending == 1
    assert events(ready_dsn) == ["here", "here.async"]


def test_a_vault_that_reaches_no_server_does_not_start(face: OpenVault) -> None:
    with pytest.raises(DriverError):
        face(**over(NOBODY, NOBODY.replace("port=1", "port=2"), timeout=1.0))


PROGRAM = """
import atexit, sys
from tracevault import Tracevault
far = {"table_name": "audit_logs", "connection_string": sys.argv[2]}
audit = Tracevault(connection_string=sys.argv[1], scopes={"default": "audit_logs", "far": far}, default_mode="async")
atexit.register(audit.close)
audit.emit("here")
audit.get_scope("far").emit("far")
"""


def test_a_program_may_close_it_when_it_ends(ready_dsn: str, other_dsn: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ready_dsn, other_dsn], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (events(ready_dsn), events(other_dsn)) == (["here"], ["far"])


def test_a_unit_of_work_is_of_one_server(ready_dsn: str, other_dsn: str) -> None:
    with Tracevault(**over(ready_dsn, other_dsn)) as audit:
        with audit.unit_of_work() as unit:
            unit.emit("here")
            with pytest.raises(ConfigError, match="`far` is on another server, beyond this transaction"):
                unit.get_scope("far")
        with pytest.raises(ConfigError, match="`fer` is not a scope of this vault; did you mean `far`"):
            audit.get_scope("fer")
        with psycopg.connect(other_dsn) as connection:
            assert audit.get_scope("far").emit("far", connection=connection).stored == "transaction"
    assert (events(ready_dsn), events(other_dsn)) == (["here"], ["far"])


def test_both_logs_are_sealed(ready_dsn: str, other_dsn: str, tmp_path: Any, face: OpenVault) -> None:
    from tracevault.integrity.note import Signer

    key = tmp_path / "seal.key"
    key.touch(0o600)
    key.write_text(f"{Signer.generate('log.example.com/shop').encode()}\n")
    seal = {"key": str(key), "every_ms": 50}
    with pytest.raises(ConfigError, match="`audit_logs` is on two servers, and with `seal`"):
        face(**over(ready_dsn, other_dsn, seal=seal))
    far = {"table_name": "audit_user_events", "connection_string": other_dsn}
    audit = face(connection_string=ready_dsn, scopes={"default": "audit_logs", "far": far}, seal=seal)
    for scope in (audit, audit.get_scope("far")):
        assert scope.await_sealed(scope.emit("sealed").id, timeout=10) == 0
    assert rows(other_dsn, "SELECT name FROM tracevault_trees") == [("audit_user_events",)]


def test_tests_need_neither_server(ready_dsn: str, other_dsn: str) -> None:
    with Tracevault(**over(ready_dsn, other_dsn)) as audit:
        far = audit.get_scope("far")
        with AuditLog() as log:
            log.capture(audit)
            audit.emit("here")
            far.emit("there")
            made = Tracevault(**over("in memory", "in memory too"))
            made.get_scope("far").emit("there")
            assert [record.event for record in log.events] == ["here", "there", "there"]
        far.emit("stored")
        audit.emit("stored")
    assert (events(ready_dsn), events(other_dsn)) == (["stored"], ["stored"])


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ({"connection_string": " "}, "`scopes.far.connection_string` must be a PostgreSQL URL"),
        ({"connection_string": 7}, "`scopes.far.connection_string` must be a PostgreSQL URL"),
        ({"read_connection_string": "host=x"}, "needs a `connection_string` of the scope's own"),
    ],
)
def test_what_cannot_be_is_refused(scope: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from({"connection_string": "host=x", "scopes": {"default": "a", "far": {"table_name": "b", **scope}}})


def test_no_password_is_shown() -> None:
    config = config_from(over("host=x password=hush", "host=y password=hush"))
    assert "hush" not in repr(config) + "".join(map(repr, config.servers))


@pytest.mark.parametrize("value", [0, -1, "5", True, 1e9])
def test_a_staleness_is_a_number_of_seconds(value: Any) -> None:
    with pytest.raises(ConfigError, match="`max_staleness` must be a number of seconds"):
        config_from({"connection_string": "host=x", "max_staleness": value})
