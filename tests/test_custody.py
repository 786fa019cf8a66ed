"""Rows go, and payloads, only as a sealed event says; the log stays whole, and says what happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import rows
from tests.faces import OpenVault
from tests.sealed import Sealed, Sealing
from tests.test_cli import Cli, cli
from tracevault import Tracevault, Verdict

__all__ = ["cli"]  # the fixture

OLD, NEW = "2020-01-01T00:00:00Z", "2026-01-01T00:00:00Z"


@pytest.fixture
def log(ready_dsn: str, tmp_path: Path) -> Iterator[Sealed]:
    sealed = Sealed(ready_dsn, tmp_path)
    yield sealed
    sealed.close()


def fill(dsn: str, count: int = 30) -> list[str]:
    """Events of three users in turn, the first half of them old."""
    with Tracevault(connection_string=dsn) as audit:
        receipts = audit.emit_many(
            {
                "event": "order.paid",
                "target": {"id": f"u{number % 3}", "type": "user"},
                "actor": {"id": "a1", "type": "staff"},
                "data": {"n": number, "secret": f"hush-{number}"},
                "meta": {"ip": "192.0.2.7"},
                "occurred_at": OLD if number < count / 2 else NEW,
            }
            for number in range(count)
        )
    return [str(receipt.id) for receipt in receipts]


def payloads(dsn: str) -> str:
    return str(rows(dsn, "SELECT string_agg(data::text || coalesce(meta::text, ''), '') FROM audit_logs")[0][0])


def test_pruned_rows_are_gone_and_the_rest_is_proven(log: Sealed, cli: Cli) -> None:
    fill(log.dsn)
    log.seal()
    with Sealing(log):
        result = cli("prune", "--before", "2021-01-01", "--reason", "policy 7", "--yes", "--dsn", log.dsn)
    assert (result.code, result.out) == (0, "15 rows pruned\n"), result.err
    assert rows(log.dsn, "SELECT count(*) FROM audit_logs WHERE occurred_at < '2021-01-01'") == [(0,)]
    ((said,),) = rows(log.dsn, "SELECT data FROM audit_logs WHERE event = 'tracevault.pruned'")
    assert (said["rows"], said["ranges"], said["reason"]) == (15, [[0, 15]], "policy 7")
    report = log.verify()
    assert (report.verdict, report.pruned, report.checked, report.problems) == (Verdict.OK, 15, 16, [])


def test_nothing_goes_before_an_anchor_has_the_event(log: Sealed, cli: Cli) -> None:
    fill(log.dsn)
    log.seal()
    result = cli("prune", "--before", "2021-01-01", "--yes", "--timeout", "300ms", "--dsn", log.dsn)
    assert result.code == 3
    assert "is not sealed after 0.3 seconds" in result.err
    assert rows(log.dsn, "SELECT count(*) FROM audit_logs") == [(31,)]
    # Sealed, but no anchor knows.
    rows(log.dsn, "DELETE FROM tracevault_anchors")
    log.sealer.seal("audit_logs")
    (event,) = rows(log.dsn, "SELECT id::text FROM audit_logs WHERE event = 'tracevault.pruned'")
    result = cli("prune", "--resume", event[0], "--timeout", "300ms", "--dsn", log.dsn)
    assert (result.code, "is not anchored" in result.err) == (3, True)
    assert log.verify().verdict is Verdict.OK
    # Then it goes on where it stopped.
    log.seal()
    result = cli("prune", "--resume", event[0], "--dsn", log.dsn)
    assert (result.code, result.out) == (0, "15 rows pruned\n")
    assert cli("prune", "--resume", event[0], "--dsn", log.dsn).out == "0 rows pruned\n"
    assert log.verify().pruned == 15


def test_erased_payloads_are_gone_and_the_rows_are_proven(log: Sealed, cli: Cli) -> None:
    fill(log.dsn)
    log.seal()
    before = payloads(log.dsn)
    with Sealing(log):
        result = cli("erase", "--target", "user/u1", "--reason", "request 4711", "--yes", "--dsn", log.dsn)
    assert (result.code, result.out) == (0, "10 rows erased\n"), result.err
    left = payloads(log.dsn)
    for number in range(30):
        assert f"hush-{number}" in before
        assert (f'hush-{number}"' in left) == (number % 3 != 1)
    assert rows(log.dsn, "SELECT DISTINCT payload_salt IS NULL, target_id FROM audit_logs WHERE data IS NULL") == [
        (True, "u1")
    ]
    report = log.verify()
    assert (report.verdict, report.erased, report.checked, report.problems) == (Verdict.OK, 10, 21, [])
    ((said,),) = rows(log.dsn, "SELECT data FROM audit_logs WHERE event = 'tracevault.erased'")
    assert (said["target"], said["reason"], said["rows"]) == ({"id": "u1", "type": "user"}, "request 4711", 10)


def test_erasing_what_an_actor_did(log: Sealed, cli: Cli) -> None:
    fill(log.dsn)
    log.seal()
    with Sealing(log):
        assert cli("erase", "--actor", "staff/a1", "--reason", "r", "--yes", "--dsn", log.dsn).out == (
            "30 rows erased\n"
        )
    assert (log.verify().verdict, log.verify().erased) == (Verdict.OK, 30)


def test_pruning_what_was_erased(log: Sealed, cli: Cli) -> None:
    fill(log.dsn)
    log.seal()
    with Sealing(log):
        cli("erase", "--target", "user/u1", "--reason", "r", "--yes", "--dsn", log.dsn)
        cli("prune", "--before", "2021-01-01", "--yes", "--dsn", log.dsn)
    report = log.verify()
    assert (report.verdict, report.pruned, report.erased) == (Verdict.OK, 15, 5)


def test_a_retry_of_an_erased_event_is_no_other_event(log: Sealed, cli: Cli, face: OpenVault) -> None:
    with Tracevault(connection_string=log.dsn) as audit:
        given: dict[str, Any] = {"id": "01930000-0000-7000-8000-000000000001", "data": {"a": 1}}
        audit.emit("order.paid", target={"id": "u1", "type": "user"}, **given)
    log.seal()
    with Sealing(log):
        cli("erase", "--target", "user/u1", "--reason", "r", "--yes", "--dsn", log.dsn)
    vault = face(connection_string=log.dsn)
    vault.emit("order.paid", target={"id": "u1", "type": "user"}, **given)
    assert rows(log.dsn, "SELECT data FROM audit_logs WHERE event = 'order.paid'") == [(None,)]


def test_what_no_event_states_cannot_be_removed(log: Sealed) -> None:
    ids = fill(log.dsn)
    log.seal()
    with psycopg.connect(log.dsn, autocommit=True) as link, pytest.raises(psycopg.Error, match="no sealed event"):
        link.execute("SELECT tracevault_prune('audit_logs', %s, 0, 5)", (ids[0],))
    with Tracevault(connection_string=log.dsn) as audit:
        event = audit.emit("tracevault.erased", data={"ranges": [[3, 5]]}).id
    log.seal()
    with psycopg.connect(log.dsn, autocommit=True) as link:
        with pytest.raises(psycopg.Error, match="does not name the leaves from 3 to 6"):
            link.execute("SELECT tracevault_erase('audit_logs', %s, 3, 6)", (event,))
        with pytest.raises(psycopg.Error, match="no sealed event"):
            link.execute("SELECT tracevault_prune('audit_logs', %s, 3, 5)", (event,))
        assert link.execute("SELECT tracevault_erase('audit_logs', %s, 3, 5)", (event,)).fetchone() == (2,)
        with pytest.raises(psycopg.Error, match="not a sealed audit table"):
            link.execute("SELECT tracevault_erase('pg_class', %s, 3, 5)", (event,))
    report = log.verify()
    assert (report.verdict, report.erased) == (Verdict.OK, 2)


def test_nobody_else_may_call_the_functions(log: Sealed) -> None:
    fill(log.dsn)
    log.seal()
    found = rows(
        log.dsn,
        "SELECT proname, has_function_privilege('pg_monitor', oid, 'EXECUTE') FROM pg_proc "
        "WHERE proname IN ('tracevault_prune', 'tracevault_erase') ORDER BY 1",
    )
    assert found == [("tracevault_erase", False), ("tracevault_prune", False)]


def test_rows_that_wait_for_their_seal_are_named(log: Sealed, cli: Cli) -> None:
    fill(log.dsn)
    log.seal()
    fill(log.dsn, 10)
    result = cli("prune", "--before", "2021-01-01", "--yes", "--dsn", log.dsn)
    assert result.code == 2
    assert "5 more are not sealed yet" in result.err
    assert rows(log.dsn, "SELECT count(*) FROM audit_logs") == [(40,)]


def test_a_dry_run_says_how_many_and_does_nothing(log: Sealed, cli: Cli) -> None:
    fill(log.dsn)
    log.seal()
    for command in (["prune", "--before", "2021-01-01"], ["erase", "--target", "user/u1", "--reason", "r"]):
        result = cli(*command, "--dry-run", "--dsn", log.dsn)
        assert result.code == 0
        assert "sealed rows" in result.err
    assert rows(log.dsn, "SELECT count(*), count(data) FROM audit_logs") == [(30, 30)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune"],
        ["prune", "--before", "2021-01-01", "--resume", "01930000-0000-7000-8000-000000000001"],
        ["prune", "--before", "yesterday"],
        ["erase", "--target", "user/u1"],
        ["erase", "--target", "u1", "--reason", "r"],
        ["erase", "--reason", "r"],
        ["erase", "--target", "user/u1", "--actor", "user/u1", "--reason", "r"],
    ],
    ids=" ".join,
)
def test_wrong_usage(log: Sealed, cli: Cli, arguments: list[str]) -> None:
    log.seal()
    assert cli(*arguments, "--dsn", log.dsn).code == 2


def test_a_table_that_was_never_sealed(ready_dsn: str, cli: Cli) -> None:
    result = cli("prune", "--before", "2021-01-01", "--yes", "--dsn", ready_dsn)
    assert (result.code, "was never sealed" in result.err) == (3, True)
