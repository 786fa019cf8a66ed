"""Whoever owns the database changes the log, and what a verification says of it: each attack with its verdict.

All of it is done by the superuser, in SQL, past every guard. Each attack is judged twice: with what is in the database
and the log's public key alone, and with a checkpoint of the log's beginning that was kept outside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.conftest import TEMPLATE
from tracevault import Tracevault
from tracevault.event.record import COLUMNS, STORED_XID
from tracevault.integrity.note import Note, Signer
from tracevault.integrity.report import Report, Verdict
from tracevault.integrity.tiles import Growth
from tracevault.sealing import rows as rows_module
from tracevault.sealing.sealer import Sealer
from tracevault.sealing.signer import CheckpointSigner, SigningState
from tracevault.sealing.verify import Trust, Witnessed, verify

NAME = "log.example.com/shop"
ORIGIN = f"{NAME}/audit_logs"
KEY = Signer(NAME, b"\x01" * 32)
OTHER_KEY = Signer(NAME, b"\x02" * 32)
BEGIN = datetime(2026, 3, 1, 12, tzinfo=UTC)
# Of 300 leaves the lowest level has a full tile and a partial one, and the next a partial one.
WITNESSED, SIZE = 200, 300
# A leaf that the outside checkpoint covers, as do all that are attacked unless it says otherwise.
ATTACKED = 41
THE_ROW = f"id = (SELECT id FROM tracevault_leaves WHERE index = {ATTACKED})"
GRACE = 30.0

one_of_each = pytest.mark.parametrize("witnessed", [False, True], ids=["inside", "outside"])


def sealer_of(dsn: str, state: Path, key: Signer = KEY) -> Sealer:
    return Sealer(partial(psycopg.connect, dsn), ["audit_logs"], CheckpointSigner([key], SigningState(state)))


def seal(dsn: str, state: Path, key: Signer = KEY) -> None:
    sealer = sealer_of(dsn, state, key)
    try:
        sealer.seal("audit_logs")
    finally:
        sealer.close()


def event(number: int) -> dict[str, Any]:
    return {
        "event": f"product.updated.{number}",
        "actor": {"id": f"user_{number}", "type": "user"},
        "target": {"id": f"product_{number}", "type": "product"},
        "data": {"amount": 1, "outcome": "success", "severity": "info", "error": {"code": "E1"}, "number": number},
        "meta": {"address": "127.0.0.1"},
        "correlation_id": "c1",
        "request_id": "r1",
        "environment": "production",
        "tenant_id": "t1",
        "trace_id": "a" * 32,
        "span_id": "b" * 16,
        "occurred_at": BEGIN + timedelta(seconds=number),
    }


@dataclass(frozen=True)
class Original:
    """A sealed log as it was: a database to copy, the signer's state, and what was signed."""

    server: str
    database: str
    state: bytes
    notes: dict[int, str]


@dataclass(frozen=True)
class Copy:
    """A copy of the log for one test to change."""

    dsn: str
    state: Path
    original: Original

    def execute(self, *statements: str) -> None:
        with psycopg.connect(self.dsn) as connection:
            connection.execute("SET session_replication_role = replica")  # past every trigger
            for statement in statements:
                connection.execute(statement.encode())

    def ask(self, query: str) -> Any:
        with psycopg.connect(self.dsn) as connection:
            row = connection.execute(query.encode()).fetchone()
            return row[0] if row and len(row) == 1 else row

    def id_of(self, index: int = ATTACKED) -> UUID:
        found = self.ask(f"SELECT id FROM tracevault_leaves WHERE index = {index}")
        assert isinstance(found, UUID)
        return found

    def outside(self, size: int = WITNESSED) -> Witnessed:
        return Witnessed("the notary", Note.parse(self.original.notes[size]), BEGIN)

    def verify(self, witnessed: bool = False, **changed: Any) -> Report:
        trust = Trust(keys=[KEY.renamed(ORIGIN).verifier], outside=[self.outside()] if witnessed else [])
        return self.verify_with(changed.pop("trust", trust), **changed)

    def verify_with(self, trust: Trust, **options: Any) -> Report:
        with psycopg.connect(self.dsn) as connection:
            report = verify(connection, "audit_logs", trust, grace=GRACE, **options)
        json.dumps(report.as_dict())  # whatever is found can be printed
        return report


@pytest.fixture(scope="module")
def original(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Original]:
    database, state = "attacked", tmp_path_factory.mktemp("state") / "seal.key.state"
    dsn = make_conninfo(server, dbname=database)
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {database} TEMPLATE {TEMPLATE} STRATEGY file_copy".encode())
    with Tracevault(connection_string=dsn) as audit:
        for first, end in ((0, WITNESSED), (WITNESSED, SIZE)):
            audit.emit_many([event(number) for number in range(first, end)])
            seal(dsn, state)
    with psycopg.connect(dsn) as connection:
        notes = dict(connection.execute("SELECT size, note FROM tracevault_checkpoints").fetchall())
    assert sorted(notes) == [WITNESSED, SIZE]
    yield Original(server, database, state.read_bytes(), notes)
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {database} WITH (FORCE)".encode())


@pytest.fixture
def log(original: Original, tmp_path: Path) -> Iterator[Copy]:
    state = tmp_path / "seal.key.state"
    state.write_bytes(original.state)
    state.chmod(0o600)
    with psycopg.connect(original.server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE copied TEMPLATE {original.database} STRATEGY file_copy".encode())
    yield Copy(make_conninfo(original.server, dbname="copied"), state, original)
    with psycopg.connect(original.server, autocommit=True) as admin:
        admin.execute(b"DROP DATABASE copied WITH (FORCE)")


def kinds(report: Report) -> set[str]:
    return {problem.kind for problem in report.problems}


def untouched(witnessed: bool) -> Verdict:
    return Verdict.OK if witnessed else Verdict.CONSISTENT


@one_of_each
def test_an_untouched_log(log: Copy, witnessed: bool) -> None:
    report = log.verify(witnessed)
    assert report.problems == []
    assert report.verdict is untouched(witnessed)
    assert (report.checked, report.size, report.unsealed, report.unsigned) == (SIZE, SIZE, 0, 0)
    assert report.signatures_checked
    assert (report.anchor is not None and report.anchor.size == WITNESSED) is witnessed


# ---------------------------------------------------------------------------------------------------- columns

CHANGES = {
    "uuid": "{0} = overlay({0}::text PLACING CASE right({0}::text, 1) WHEN 'a' THEN 'b' ELSE 'a' END FROM 36)::uuid",
    "character varying": "{0} = overlay({0} PLACING '~' FROM 1 FOR 1)",
    "timestamp with time zone": "{0} = {0} + interval '1 microsecond'",
    "jsonb": "{0} = replace({0}::text, '1', '2')::jsonb",
}
HASHED = [stored for stored in COLUMNS if stored.column.leaf or stored.name == "payload_salt"]


def test_every_column_is_attacked_here() -> None:
    others = {stored.name for stored in COLUMNS} - {stored.name for stored in HASHED}
    assert others == {STORED_XID, "outcome", "error_code", "severity"}


@one_of_each
@pytest.mark.parametrize("column", [stored.name for stored in HASHED])
def test_one_byte_of_a_column_is_changed(log: Copy, column: str, witnessed: bool) -> None:
    id_, sql_type = log.id_of(), next(stored.column.sql_type for stored in HASHED if stored.name == column)
    change = "mode = 'async'" if column == "mode" else CHANGES[sql_type].format(column)
    log.execute(f"UPDATE audit_logs SET {change} WHERE {THE_ROW}")
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    assert (ATTACKED, id_) in [(problem.index, problem.id) for problem in report.problems]
    assert kinds(report) == ({"deleted", "inserted"} if column == "id" else {"changed"})
    assert report.checked == SIZE - 1


@one_of_each
@pytest.mark.parametrize(
    ("column", "wrong"), [("outcome", "failure"), ("error_code", "E2"), ("severity", "critical"), ("severity", None)]
)
def test_a_generated_column_is_made_a_plain_one_and_changed(
    log: Copy, column: str, wrong: str | None, witnessed: bool
) -> None:
    value = "NULL" if wrong is None else f"'{wrong}'"
    log.execute(
        f"ALTER TABLE audit_logs ALTER COLUMN {column} DROP EXPRESSION",
        f"UPDATE audit_logs SET {column} = {value} WHERE {THE_ROW}",
    )
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    (problem,) = report.problems
    assert (problem.kind, problem.index, problem.id) == ("changed", ATTACKED, log.id_of())
    assert "do not all say what its data says" in problem.detail


@one_of_each
def test_the_transaction_of_a_sealed_row_is_no_part_of_the_event(log: Copy, witnessed: bool) -> None:
    # It says which snapshot a row is sealed with. Once it is, the leaf speaks for the row.
    log.execute(f"UPDATE audit_logs SET stored_xid = '7'::xid8 WHERE {THE_ROW}")
    assert log.verify(witnessed).verdict is untouched(witnessed)


@one_of_each
@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ('{"amount": 1.0, "outcome": "success", "severity": "info", "error": {"code": "E1"}, "number": 41}', "changed"),
        ('{"amount": 1, "outcome": "success", "severity": "info", "error": {"code": "E1"}, "number": "41"}', "changed"),
        ('{"number":41,  "error":{"code":"E1"},"severity":"info","outcome":"success","amount":1}', None),
        ("null", "changed"),
    ],
    ids=["1.0 for 1", "text for a number", "keys in another order", "a JSON null"],
)
def test_the_data_is_written_anew(log: Copy, new: str, verdict: str | None, witnessed: bool) -> None:
    log.execute(f"UPDATE audit_logs SET data = '{new}' WHERE {THE_ROW}")
    report = log.verify(witnessed)
    assert report.verdict is (Verdict.TAMPERED if verdict else untouched(witnessed))
    assert kinds(report) == ({verdict} if verdict else set())


# ------------------------------------------------------------------------------------------------ rows and leaves

FORGED = (
    "INSERT INTO audit_logs (id, event, mode, occurred_at, created_at, stored_xid) "
    "VALUES ('00000000-0000-7000-8000-00000000beef', 'forged', 'sync', {time}, {time}, {xid})"
)
BEEF = UUID("00000000-0000-7000-8000-00000000beef")


@one_of_each
@pytest.mark.parametrize(
    ("statements", "found"),
    [
        ([f"DELETE FROM audit_logs WHERE {THE_ROW}"], [("deleted", ATTACKED, True)]),
        ([f"DELETE FROM tracevault_leaves WHERE index = {ATTACKED}"], [("leaf", ATTACKED, True)]),
        (
            [
                f"DELETE FROM audit_logs WHERE {THE_ROW}",
                f"DELETE FROM tracevault_leaves WHERE index = {ATTACKED}",
            ],
            [("leaf", ATTACKED, False)],
        ),
        (
            [
                "UPDATE tracevault_leaves SET index = -1 WHERE index = 41",
                "UPDATE tracevault_leaves SET index = 41 WHERE index = 42",
                "UPDATE tracevault_leaves SET index = 42 WHERE index = -1",
            ],
            [("moved", 41, True), ("moved", 42, True)],
        ),
        (
            [f"UPDATE tracevault_leaves SET occurred_at = now() WHERE index = {ATTACKED}"],
            [("leaf", ATTACKED, True)],
        ),
        (
            # The row under another id, and its leaf with it.
            [
                f"UPDATE audit_logs SET id = '{BEEF}' WHERE {THE_ROW}",
                f"UPDATE tracevault_leaves SET id = '{BEEF}' WHERE index = {ATTACKED}",
            ],
            [("changed", ATTACKED, True)],
        ),
        (
            # Two leaves of one row.
            [
                "ALTER TABLE tracevault_leaves DROP CONSTRAINT tracevault_leaves_tree_id_occurred_at_key",
                f"UPDATE tracevault_leaves AS l SET id = o.id, occurred_at = o.occurred_at FROM tracevault_leaves AS o "
                f"WHERE l.index = {ATTACKED} AND o.index = 7",
            ],
            [("changed", ATTACKED, True), ("inserted", None, True)],
        ),
        (
            # Two rows of one id, of which one says something else.
            [
                "ALTER TABLE audit_logs DROP CONSTRAINT audit_logs_pkey",
                "INSERT INTO audit_logs (id, event, mode, occurred_at) SELECT id, 'other', mode, occurred_at "
                f"FROM audit_logs WHERE {THE_ROW}",
            ],
            [("doubled", ATTACKED, True)],
        ),
        (
            # Even where both say the same: it happened once.
            [
                "ALTER TABLE audit_logs DROP CONSTRAINT audit_logs_pkey",
                "CREATE TEMP TABLE copied ON COMMIT DROP AS SELECT * FROM audit_logs WHERE " + THE_ROW,
                "INSERT INTO audit_logs (id, event, actor_id, actor_type, target_id, target_type, data, meta, mode, "
                "occurred_at, created_at, correlation_id, request_id, environment, tenant_id, trace_id, span_id, "
                "stored_xid, payload_salt) SELECT id, event, actor_id, actor_type, target_id, target_type, data, meta, "
                "mode, occurred_at, created_at, correlation_id, request_id, environment, tenant_id, trace_id, span_id, "
                "stored_xid, payload_salt FROM copied",
            ],
            [("doubled", ATTACKED, True)],
        ),
    ],
    ids=[
        "row deleted",
        "leaf deleted",
        "row and leaf deleted",
        "leaves exchanged",
        "leaf's time changed",
        "id changed in both",
        "two leaves of one row",
        "two rows of one id",
        "a row twice",
    ],
)
def test_rows_and_leaves_are_moved_about(
    log: Copy, statements: list[str], found: list[tuple[str, int | None, bool]], witnessed: bool
) -> None:
    log.execute(*statements)
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    told = sorted((problem.kind, problem.index, problem.id is not None) for problem in report.problems)
    if found[0][0] == "doubled" and {kind for kind, _, _ in told} == {"doubled", "changed"}:
        told = [one for one in told if one[0] == "doubled"]  # which of the two is met first is PostgreSQL's choice
    assert told == found


@one_of_each
def test_a_row_is_stored_again_under_another_id(log: Copy, witnessed: bool) -> None:
    log.execute(
        "INSERT INTO audit_logs (id, event, actor_id, mode, occurred_at, created_at, stored_xid) SELECT "
        f"'{BEEF}', event, actor_id, mode, occurred_at, created_at, stored_xid FROM audit_logs WHERE {THE_ROW}"
    )
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    (problem,) = report.problems
    assert (problem.kind, problem.index, problem.id) == ("inserted", None, BEEF)


@one_of_each
@pytest.mark.parametrize(
    ("xid", "said"),
    [
        ("'3'::xid8", "was sealed without it"),
        (f"(SELECT stored_xid FROM audit_logs WHERE {THE_ROW})", "was sealed without it"),
        ("NULL", "names no transaction"),
        ("'4000000000'::xid8", "has not begun"),
    ],
    ids=["past", "another row's", "none", "future"],
)
def test_a_row_is_put_in_with_a_forged_transaction(log: Copy, xid: str, said: str, witnessed: bool) -> None:
    log.execute(FORGED.format(time="now()", xid=xid))
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    (problem,) = report.problems
    assert (problem.kind, problem.id) == ("inserted", BEEF)
    assert said in problem.detail


@one_of_each
@pytest.mark.parametrize(
    ("time", "age"),
    [
        ("now() - interval '1 hour'", 3600.0),
        ("now() + interval '1 hour'", 3600.0),
        ("'infinity'", 1e15),
        ("'-infinity'", 1e15),
    ],
)
def test_a_back_dated_row_waits_for_its_seal(log: Copy, time: str, age: float, witnessed: bool) -> None:
    log.execute(FORGED.format(time=time, xid="pg_current_xact_id()"))
    report = log.verify(witnessed)
    assert report.verdict is Verdict.INCOMPLETE
    assert report.unsealed == 1
    assert report.oldest_unsealed_seconds == pytest.approx(age, abs=60)
    # Once it is sealed it is an event like any other: that it is a false one cannot be seen. It stands at the end.
    seal(log.dsn, log.state)
    assert log.verify(witnessed).verdict is untouched(witnessed)
    assert log.id_of(SIZE) == BEEF


@one_of_each
def test_rows_that_were_stored_just_now_may_wait(log: Copy, witnessed: bool) -> None:
    log.execute(FORGED.format(time="now()", xid="pg_current_xact_id()"))
    report = log.verify(witnessed)
    assert report.verdict is untouched(witnessed)
    assert report.unsealed == 1


@one_of_each
@pytest.mark.parametrize("walk", ["walk = 'legacy'", "walk = 'scan'", "target = snapshot", "system_identifier = 1"])
def test_a_walk_that_seems_under_way_hides_nothing(log: Copy, walk: str, witnessed: bool) -> None:
    log.execute(FORGED.format(time="now() - interval '1 hour'", xid="NULL"), f"UPDATE tracevault_trees SET {walk}")
    assert log.verify(witnessed).verdict is Verdict.INCOMPLETE


# ------------------------------------------------------------------------------------------------------ history

CUT = [
    f"DELETE FROM audit_logs WHERE id IN (SELECT id FROM tracevault_leaves WHERE index >= {WITNESSED - 10})",
    f"DELETE FROM tracevault_leaves WHERE index >= {WITNESSED - 10}",
    f"DELETE FROM tracevault_checkpoints WHERE size >= {WITNESSED - 10}",
]


def thorough(log: Copy, statements: list[str], size: int) -> None:
    """Change rows, and then whatever can be computed without the key: tiles, root and size."""
    log.execute(*statements)
    with psycopg.connect(log.dsn) as connection:
        from tracevault.flows.seal import find_tree
        from tracevault.flows.verify import rows_sql
        from tracevault.integrity.leaf import Encoder
        from tracevault.postgres.failures import Place
        from tracevault.postgres.run import copied_rows, run

        tree = run(connection, find_tree("audit_logs"), Place("attacking"))
        assert tree is not None
        encoder = Encoder(tree.name)
        growth = Growth()
        growth.add(
            encoder.hash(row, rows_module._PLAIN_ROW)
            for row in copied_rows(connection, rows_sql(tree, 0, size), Place("attacking"))
        )
        connection.execute("DELETE FROM tracevault_tiles")
        for level, number, hashes in growth.changes():
            connection.execute(
                "INSERT INTO tracevault_tiles (tree, level, number, hashes) VALUES (%s, %s, %s, %s)",
                (tree.number, level, number, hashes),
            )
        connection.execute("UPDATE tracevault_trees SET size = %s, root = %s", (growth.size, growth.root))


@one_of_each
def test_the_tail_is_cut_off(log: Copy, witnessed: bool) -> None:
    thorough(log, CUT, WITNESSED - 10)
    # No checkpoint is left that the log had so early. Who looks from inside sees a log that nobody signed.
    report = log.verify(witnessed)
    if witnessed:
        assert report.verdict is Verdict.TAMPERED
        assert kinds(report) == {"rolled back"}
        assert "its end was cut off" in report.problems[0].detail
    else:
        assert report.verdict is Verdict.CONSISTENT
        assert report.problems == []


@one_of_each
def test_the_tail_is_cut_off_at_a_checkpoint(log: Copy, witnessed: bool) -> None:
    thorough(log, [statement.replace(str(WITNESSED - 10), str(WITNESSED)) for statement in CUT[:2]], WITNESSED)
    log.execute(f"DELETE FROM tracevault_checkpoints WHERE size > {WITNESSED}")
    trust = Trust(keys=[KEY.renamed(ORIGIN).verifier], outside=[log.outside(SIZE)] if witnessed else [])
    report = log.verify(trust=trust)
    assert report.verdict is (Verdict.TAMPERED if witnessed else Verdict.CONSISTENT)
    assert kinds(report) == ({"rolled back"} if witnessed else set())
