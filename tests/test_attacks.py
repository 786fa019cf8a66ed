"""Whoever owns the database changes the log, and what a verification says of it: each attack with its verdict.

All of it is done by the superuser, in SQL, past every guard. Each attack is judged twice: with what is in the database
and the log's public key alone, and with a checkpoint of the log's beginning that was kept outside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.conftest import TEMPLATE
from tracevault import ConfigError, RollbackError, SealError, Tracevault
from tracevault.events.record import COLUMNS, STORED_XID
from tracevault.flows.seal import find_tree
from tracevault.flows.verify import rows_sql
from tracevault.integrity import report as report_module
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.leaf import Encoder
from tracevault.integrity.note import Note, Signer
from tracevault.integrity.report import Report, Verdict
from tracevault.integrity.tiles import Growth
from tracevault.postgres.failures import Place
from tracevault.postgres.run import raw_rows, run
from tracevault.sealing import explain as explain_module
from tracevault.sealing import findings as findings_module
from tracevault.sealing import rows as rows_module
from tracevault.sealing import verify as verify_module
from tracevault.sealing.sealer import Sealer
from tracevault.sealing.signer import CheckpointSigner, SigningState
from tracevault.sealing.verify import Trust, Witnessed, origin_of, verify

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
        notes: dict[int, str] = dict(connection.execute("SELECT size, note FROM tracevault_checkpoints").fetchall())
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
        tree = run(connection, find_tree("audit_logs"), Place("attacking"))
        assert tree is not None
        encoder = Encoder(tree.name)
        growth = Growth()
        growth.add(
            encoder.hash(row[rows_module._ROW :])
            for row in raw_rows(connection, rows_sql(tree, 0, size), Place("attacking"))
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


@one_of_each
@pytest.mark.parametrize(
    ("statements", "found"),
    [
        (CUT[:1], "deleted"),
        (CUT[:2], "leaf"),
        ([f"UPDATE tracevault_trees SET size = {WITNESSED}"], "rolled back"),
        ([*CUT, f"UPDATE tracevault_trees SET size = {WITNESSED - 10}"], "tile"),
        ([CUT[0], CUT[2], f"UPDATE tracevault_trees SET size = {WITNESSED - 10}"], "leaf"),
    ],
    ids=["rows", "rows and leaves", "size alone", "all but the tiles", "all but leaves and tiles"],
)
def test_the_tail_is_cut_off_carelessly(log: Copy, statements: list[str], found: str, witnessed: bool) -> None:
    log.execute(*statements)
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    assert found in kinds(report)


@one_of_each
def test_the_backup_of_yesterday_is_restored(log: Copy, original: Original, witnessed: bool) -> None:
    with Tracevault(connection_string=log.dsn) as audit:
        audit.emit_many([event(number) for number in range(SIZE, SIZE + 20)])
    seal(log.dsn, log.state)
    note = Note.parse(log.ask(f"SELECT note FROM tracevault_checkpoints WHERE size = {SIZE + 20}"))
    with psycopg.connect(original.server, autocommit=True) as admin:
        admin.execute(b"DROP DATABASE copied WITH (FORCE)")
        admin.execute(f"CREATE DATABASE copied TEMPLATE {original.database} STRATEGY file_copy".encode())
    outside = [Witnessed("the notary", note, BEGIN)] if witnessed else []
    report = log.verify(trust=Trust(keys=[KEY.renamed(ORIGIN).verifier], outside=outside))
    assert report.verdict is (Verdict.TAMPERED if witnessed else Verdict.CONSISTENT)
    assert kinds(report) == ({"rolled back"} if witnessed else set())
    # The sealer, whose state knows better, does not go on from there.
    with pytest.raises(RollbackError, match="ROLLBACK DETECTED"):
        seal(log.dsn, log.state)


REBUILT = [
    f"UPDATE audit_logs SET actor_id = 'somebody else' WHERE {THE_ROW}",
    "DROP TABLE tracevault_trees, tracevault_leaves, tracevault_tiles, tracevault_checkpoints, tracevault_anchors, "
    "tracevault_erasures",
    "UPDATE audit_logs SET stored_xid = NULL",
]


@one_of_each
@pytest.mark.parametrize("key", [OTHER_KEY, KEY], ids=["another key", "the stolen key"])
def test_the_whole_tree_is_made_anew(log: Copy, tmp_path: Path, key: Signer, witnessed: bool) -> None:
    log.execute(*REBUILT)
    seal(log.dsn, tmp_path / "another.state", key)
    report = log.verify(witnessed)
    if key is OTHER_KEY:
        assert report.verdict is Verdict.TAMPERED
        assert any("no key that is trusted signed it" in problem.detail for problem in report.problems)
    elif witnessed:
        assert report.verdict is Verdict.TAMPERED
        assert kinds(report) == {"root"}
        assert "the notary" in report.problems[0].detail
    else:  # from inside, what was signed with the key is what the key's owner signed
        assert report.verdict is Verdict.CONSISTENT


def test_the_sealer_does_not_sign_another_history(log: Copy) -> None:
    log.execute(*REBUILT)
    with pytest.raises(RollbackError, match="ROLLBACK DETECTED"):
        seal(log.dsn, log.state)


@one_of_each
def test_the_thorough_owner_without_the_key(log: Copy, witnessed: bool) -> None:
    thorough(log, [f"UPDATE audit_logs SET actor_id = 'somebody else' WHERE {THE_ROW}"], SIZE)
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    assert kinds(report) == {"root"}  # which row it was nobody knows now
    assert report.problems_left_out == 1  # the later checkpoint says the same
    # Without the log's key the stored checkpoints could be anybody's, and be changed as well.
    text = log.ask("SELECT encode(root, 'base64') FROM tracevault_trees")
    log.execute(
        f"DELETE FROM tracevault_checkpoints WHERE size < {SIZE}",
        f"UPDATE tracevault_checkpoints SET note = '{ORIGIN}\n{SIZE}\n{text}\n\n\u2014 {ORIGIN} AAAAAAA=\n'",
    )
    assert log.verify(trust=Trust()).verdict is Verdict.CONSISTENT
    assert "checkpoint" in kinds(log.verify())


@one_of_each
def test_a_row_and_the_hash_of_its_leaf_are_changed(log: Copy, witnessed: bool) -> None:
    log.execute("UPDATE tracevault_tiles SET hashes = set_byte(hashes, 41 * 32, 255 - get_byte(hashes, 41 * 32)) "
                "WHERE level = 0 AND number = 0")  # fmt: skip
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    assert {"changed", "root", "tile"} <= kinds(report)


@one_of_each
@pytest.mark.parametrize(("level", "number"), [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize(
    "change",
    [
        "hashes = set_byte(hashes, 3, 255 - get_byte(hashes, 3))",
        "hashes = substr(hashes, 1, 31)",
        "hashes = ''",
        "hashes = hashes || '\\x00'",
        "number = number + 1000",
        "hashes = NULL",
    ],
    ids=["byte", "short", "empty", "long", "elsewhere", "null"],
)
def test_a_tile_is_changed(log: Copy, level: int, number: int, change: str, witnessed: bool) -> None:
    log.execute(
        "ALTER TABLE tracevault_tiles ALTER COLUMN hashes DROP NOT NULL",
        f"UPDATE tracevault_tiles SET {change} WHERE level = {level} AND number = {number}",
    )
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    assert kinds(report) & {"tile", "root", "changed"}


@one_of_each
def test_the_root_is_changed(log: Copy, witnessed: bool) -> None:
    log.execute("UPDATE tracevault_trees SET root = sha256('')")
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    assert [(problem.kind, problem.detail.partition(" of size")[0]) for problem in report.problems] == [
        ("root", "the tree's own row")
    ]


# -------------------------------------------------------------------------------------------------- checkpoints


@one_of_each
@pytest.mark.parametrize(
    "change",
    [
        f"note = replace(note, '\n{SIZE}\n', '\n{SIZE - 1}\n')",
        "note = overlay(note PLACING CASE substr(note, length(note) - 30, 1) WHEN 'A' THEN 'B' ELSE 'A' END "
        "FROM length(note) - 30)",
        "note = ''",
        "note = 'rubbish'",
        "note = NULL",
        f"size = {SIZE - 1}",
        f"note = (SELECT note FROM tracevault_checkpoints WHERE size = {WITNESSED})",
    ],
    ids=["text", "signature", "empty", "rubbish", "null", "size", "another's"],
)
def test_a_stored_checkpoint_is_changed(log: Copy, change: str, witnessed: bool) -> None:
    log.execute(
        "ALTER TABLE tracevault_checkpoints ALTER COLUMN note DROP NOT NULL",
        f"UPDATE tracevault_checkpoints SET {change} WHERE size = {SIZE}",
    )
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    assert kinds(report) == {"checkpoint"}


@one_of_each
def test_stored_checkpoints_are_removed(log: Copy, witnessed: bool) -> None:
    log.execute("DELETE FROM tracevault_checkpoints")
    report = log.verify(witnessed)
    assert report.unsigned == (SIZE - WITNESSED if witnessed else SIZE)
    assert report.verdict is untouched(witnessed)  # for as long as a signature may take
    log.execute("UPDATE tracevault_trees SET sealed_at = now()")
    with psycopg.connect(log.dsn) as connection:
        trust = Trust(keys=[KEY.renamed(ORIGIN).verifier], outside=[log.outside()] if witnessed else [])
        report = verify(connection, "audit_logs", trust, grace=0.0)
    assert report.verdict is Verdict.INCOMPLETE
    assert report.oldest_unsigned_seconds > 0
    assert log.verify(trust=replace(trust, outside=[log.outside(SIZE)]), first=None).unsigned == 0


def test_a_checkpoint_of_another_log_is_given(log: Copy) -> None:
    checkpoint = Checkpoint(f"{NAME}/other", WITNESSED, b"\1" * 32)
    signer = KEY.renamed(checkpoint.origin)
    note = Note(str(checkpoint), [signer.sign(str(checkpoint))])
    report = log.verify(
        trust=Trust(keys=[KEY.renamed(ORIGIN).verifier, signer.verifier], outside=[Witnessed("a friend", note)])
    )
    assert report.verdict is Verdict.TAMPERED
    assert "a friend" in report.problems[0].detail
    assert f"{NAME}/other" in report.problems[0].detail


def test_a_checkpoint_of_the_log_with_another_root_is_given(log: Copy) -> None:
    checkpoint = Checkpoint(ORIGIN, WITNESSED, b"\1" * 32)
    note = Note(str(checkpoint), [KEY.renamed(ORIGIN).sign(str(checkpoint))])
    report = log.verify(trust=Trust(keys=[KEY.renamed(ORIGIN).verifier], outside=[Witnessed("a friend", note)]))
    assert report.verdict is Verdict.TAMPERED
    assert kinds(report) == {"root"}
    assert report.anchor is None


@pytest.mark.parametrize(
    ("size", "verdict"),
    [(SIZE, Verdict.CONSISTENT), (SIZE + 1, Verdict.CONSISTENT), (SIZE - 1, Verdict.TAMPERED)],
)
def test_a_key_is_revoked_from_a_size(log: Copy, size: int, verdict: Verdict) -> None:
    report = log.verify(trust=Trust(revoked=((KEY.renamed(ORIGIN).verifier, size),)))
    assert report.verdict is verdict
    assert kinds(report) == ({"checkpoint"} if verdict is Verdict.TAMPERED else set())


@one_of_each
def test_the_wrong_key_is_given(log: Copy, witnessed: bool) -> None:
    keys = [OTHER_KEY.renamed(ORIGIN).verifier]
    report = log.verify(trust=Trust(keys, outside=[log.outside()] if witnessed else []))
    assert report.verdict is Verdict.TAMPERED
    assert kinds(report) == {"checkpoint"}
    assert len(report.problems) == (3 if witnessed else 2)


def test_the_key_of_another_log_is_given(log: Copy) -> None:
    report = log.verify(trust=Trust([KEY.renamed(f"{NAME}/other").verifier]))
    assert report.verdict is Verdict.TAMPERED
    assert report.problems[0].kind == "origin"


def test_no_key_is_given(log: Copy) -> None:
    report = log.verify(trust=Trust())
    assert report.verdict is Verdict.CONSISTENT
    assert not report.signatures_checked
    with pytest.raises(ConfigError, match="takes the log's verifier key"):
        log.verify(trust=Trust(outside=[log.outside()]))


# ------------------------------------------------------------------------------------ prunings and erasures


def forge(log: Copy, name: str, ranges: str) -> UUID:
    """Store an event as an application can, and seal it."""
    with Tracevault(connection_string=log.dsn) as audit:
        return audit.emit(name, data={"ranges": json.loads(ranges)}).id


ERASE = [
    "INSERT INTO tracevault_erasures (tree, index, data_commitment, meta_commitment, event_id) SELECT 1, 41, "
    r"sha256('tracevault/payload/v1\012'::bytea || uuid_send(payload_salt) || convert_to(data::text, 'UTF8')), "
    r"sha256('tracevault/payload/v1\012'::bytea || uuid_send(payload_salt) || convert_to(meta::text, 'UTF8')), "
    f"'{BEEF}' FROM audit_logs WHERE {THE_ROW}",
    f"UPDATE audit_logs SET data = NULL, meta = NULL, payload_salt = NULL WHERE {THE_ROW}",
]


@one_of_each
@pytest.mark.parametrize("name", ["tracevault.pruned", "tracevault.erased"])
def test_an_event_that_nobody_sealed_allows_nothing(log: Copy, name: str, witnessed: bool) -> None:
    forge(log, name, "[[0, 300]]")
    log.execute(*([f"DELETE FROM audit_logs WHERE {THE_ROW}"] if name.endswith("pruned") else ERASE))
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    (problem,) = report.problems
    assert (problem.kind, problem.index) == ("deleted" if name.endswith("pruned") else "erased", ATTACKED)


@one_of_each
@pytest.mark.parametrize("name", ["tracevault.pruned", "tracevault.erased"])
def test_a_sealed_event_tells_of_what_went(log: Copy, name: str, witnessed: bool) -> None:
    forge(log, name, "[[41, 42]]")
    seal(log.dsn, log.state)
    log.execute(*([f"DELETE FROM audit_logs WHERE {THE_ROW}"] if name.endswith("pruned") else ERASE))
    report = log.verify(witnessed)
    assert report.problems == []
    assert report.verdict is untouched(witnessed)
    assert (report.pruned, report.erased) == ((1, 0) if name.endswith("pruned") else (0, 1))
    # Changed afterwards so that it allows more, it allows nothing.
    log.execute(
        f"""UPDATE audit_logs SET data = '{{"ranges": [[0, 300]]}}' WHERE event = '{name}'""",
        "DELETE FROM audit_logs WHERE id = (SELECT id FROM tracevault_leaves WHERE index = 50)",
    )
    report = log.verify(witnessed)
    assert {(problem.index, problem.kind) for problem in report.problems} >= {
        (50, "deleted"),
        (ATTACKED, "deleted" if name.endswith("pruned") else "erased"),
        (SIZE, "changed"),
    }


@one_of_each
def test_an_event_tells_of_nothing_that_comes_after_it(log: Copy, witnessed: bool) -> None:
    forge(log, "tracevault.pruned", "[[0, 1000000]]")
    seal(log.dsn, log.state)
    with Tracevault(connection_string=log.dsn) as audit:
        id_ = audit.emit("later").id
    seal(log.dsn, log.state)
    log.execute(f"DELETE FROM audit_logs WHERE id = '{id_}'")
    report = log.verify(witnessed)
    assert [(problem.kind, problem.index, problem.id) for problem in report.problems] == [("deleted", SIZE + 1, id_)]


@one_of_each
@pytest.mark.parametrize("ranges", ['"no ranges"', "[1, 2]", "[[1e999, 2]]", '{"a": 1}', "[[null, 7]]", "null"])
def test_an_event_with_rubbish_tells_of_nothing(log: Copy, ranges: str, witnessed: bool) -> None:
    log.execute(
        "INSERT INTO audit_logs (id, event, mode, occurred_at, data) "
        f"VALUES ('{BEEF}', 'tracevault.pruned', 'sync', now(), '{{\"ranges\": {ranges}}}')"
    )
    seal(log.dsn, log.state)
    assert log.verify(witnessed).verdict is untouched(witnessed)
    log.execute(f"DELETE FROM audit_logs WHERE {THE_ROW}")
    assert kinds(log.verify(witnessed)) == {"deleted"}


@one_of_each
def test_an_erasure_is_noted_of_a_row_that_has_its_payload(log: Copy, witnessed: bool) -> None:
    forge(log, "tracevault.erased", "[[41, 42]]")
    seal(log.dsn, log.state)
    log.execute(ERASE[0])
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    (problem,) = report.problems
    assert (problem.kind, problem.index, problem.id) == ("erased", ATTACKED, log.id_of())
    assert "its payload is still there" in problem.detail
    # And of one whose commitments are not those that were sealed.
    log.execute(ERASE[1], "UPDATE tracevault_erasures SET data_commitment = '\\x00'")
    assert [(problem.kind, problem.index) for problem in log.verify(witnessed).problems] == [("changed", ATTACKED)]


# --------------------------------------------------------------------------------------------------- the tables


@one_of_each
@pytest.mark.parametrize(
    "statements",
    [
        ["UPDATE tracevault_trees SET size = NULL"],
        ["UPDATE tracevault_trees SET root = NULL"],
        ["UPDATE tracevault_trees SET root = '\\x00'"],
        ["UPDATE tracevault_trees SET name = NULL"],
        ["UPDATE tracevault_trees SET name = 'other'"],
        ["UPDATE tracevault_trees SET origin = NULL"],
        ["UPDATE tracevault_trees SET origin = 'log.example.com/other'"],
        ["UPDATE tracevault_trees SET snapshot = NULL"],
        ["UPDATE tracevault_trees SET walk = NULL"],
        ["UPDATE tracevault_trees SET epoch = NULL"],
        ["UPDATE tracevault_trees SET size = -1"],
        ["UPDATE tracevault_trees SET size = 0"],
        ["UPDATE tracevault_trees SET size = 301"],
        ["UPDATE tracevault_trees SET size = 9223372036854775807"],
        ["UPDATE tracevault_trees SET tree = 2"],
        ["UPDATE tracevault_trees SET table_name = 'audit_user_events'"],
        ["UPDATE tracevault_trees SET snapshot = '1:1:'", "DELETE FROM tracevault_leaves WHERE index = 41"],
        ["DELETE FROM tracevault_trees"],
        ["DELETE FROM tracevault_leaves"],
        ["DELETE FROM tracevault_tiles"],
        ["ALTER TABLE tracevault_trees ALTER COLUMN size TYPE text"],
        ["ALTER TABLE tracevault_tiles ALTER COLUMN hashes TYPE text USING 'rubbish'"],
        ["ALTER TABLE tracevault_leaves DROP COLUMN occurred_at"],
        ["ALTER TABLE audit_logs DROP COLUMN payload_salt"],
        ["ALTER TABLE audit_logs DROP COLUMN tenant_id"],
        ["UPDATE tracevault_leaves SET id = NULL WHERE index = 41"],
        *([f"DROP TABLE tracevault_{name}"] for name in ("trees", "leaves", "tiles", "checkpoints", "erasures")),
        ["DROP TABLE audit_logs CASCADE"],
        ["TRUNCATE audit_logs"],
    ],
    ids=lambda statements: statements[0][:60],
)
def test_what_was_stored_is_not_what_it_should_be(log: Copy, statements: list[str], witnessed: bool) -> None:
    """A traceback is no verdict: it says what is wrong, or that it cannot be checked."""
    log.execute(
        *(
            f"ALTER TABLE tracevault_trees ALTER COLUMN {column} DROP NOT NULL"
            for column in ("size", "root", "name", "origin", "snapshot", "walk", "epoch")
        ),
        "ALTER TABLE tracevault_leaves ALTER COLUMN id DROP NOT NULL",
        *statements,
    )
    try:
        report = log.verify(witnessed)
    except SealError as error:
        said = str(error)
        if "cannot be checked" not in said and "was never sealed, or what was stored of it is gone" not in said:
            raise
    else:
        harmless = "SET epoch" in statements[0]
        assert report.verdict is (untouched(witnessed) if harmless else Verdict.TAMPERED)


@one_of_each
def test_a_view_stands_in_place_of_the_table(log: Copy, witnessed: bool) -> None:
    log.execute(
        "ALTER TABLE audit_logs RENAME TO hidden",
        "CREATE VIEW audit_logs AS SELECT * FROM hidden",
    )
    report = log.verify(witnessed)
    assert report.verdict is Verdict.TAMPERED
    assert kinds(report) == {"table"}


def test_a_policy_hides_rows_from_whoever_verifies(log: Copy) -> None:
    log.execute(
        "DROP ROLE IF EXISTS auditor",
        "CREATE ROLE auditor LOGIN",
        "GRANT SELECT ON ALL TABLES IN SCHEMA public TO auditor",
    )
    try:
        trust = Trust(keys=[KEY.renamed(ORIGIN).verifier])
        with psycopg.connect(log.dsn) as connection:
            connection.execute("SET SESSION AUTHORIZATION auditor")
            connection.commit()
            assert verify(connection, "audit_logs", trust).verdict is Verdict.CONSISTENT
        log.execute(
            "INSERT INTO audit_logs (id, event, mode, occurred_at, stored_xid) "
            f"VALUES ('{BEEF}', 'forged', 'sync', now(), '3')",
            "ALTER TABLE audit_logs ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY honest ON audit_logs TO auditor USING (event <> 'forged')",
        )
        with psycopg.connect(log.dsn) as connection:
            connection.execute("SET SESSION AUTHORIZATION auditor")
            connection.commit()
            with pytest.raises(SealError, match=r"cannot be checked.*row-level security"):
                verify(connection, "audit_logs", trust)
        assert log.verify().verdict is Verdict.TAMPERED
    finally:
        log.execute("DROP OWNED BY auditor", "DROP ROLE auditor")


# --------------------------------------------------------------------------------------------------- the report


def test_an_incremental_verification_looks_at_what_is_new(log: Copy) -> None:
    first = Checkpoint.parse(Note.parse(log.original.notes[WITNESSED]).text)
    report = log.verify(first=first)
    assert report.verdict is Verdict.CONSISTENT
    assert (report.first, report.checked) == (WITNESSED, SIZE - WITNESSED)
    # It is blind to what comes before, which is what makes it quick. A full one is not.
    log.execute(f"UPDATE audit_logs SET actor_id = 'x' WHERE {THE_ROW}", FORGED.format(time="now()", xid="'3'"))
    assert log.verify(first=first).verdict is Verdict.CONSISTENT
    assert kinds(log.verify()) == {"changed", "inserted"}
    log.execute("UPDATE audit_logs SET actor_id = 'x' WHERE id = (SELECT id FROM tracevault_leaves WHERE index = 250)")
    assert [problem.index for problem in log.verify(first=first).problems] == [250]
    # Nor does it look further on another server, whose transactions say nothing of what waits.
    log.execute("UPDATE tracevault_trees SET system_identifier = 1")
    assert (log.verify(first=first).unsealed, log.verify().unsealed) == (0, 1)


@pytest.mark.parametrize("size", [1, 255, 256, 257, WITNESSED, SIZE])
def test_an_incremental_verification_begins_with_what_was_verified(log: Copy, size: int) -> None:
    hashes = log.ask("SELECT string_agg(hashes, '' ORDER BY number) FROM tracevault_tiles WHERE level = 0")
    growth = Growth()
    growth.add(hashes[place * 32 : place * 32 + 32] for place in range(size))
    assert log.verify(first=Checkpoint(ORIGIN, size, growth.root)).problems == []
    report = log.verify(first=Checkpoint(ORIGIN, size, b"\1" * 32))
    assert report.verdict is Verdict.TAMPERED
    assert "what was verified before" in report.problems[0].detail
    log.execute("DELETE FROM tracevault_tiles WHERE level = 0 AND number = (SELECT max(number) FROM tracevault_tiles)")
    assert log.verify(first=Checkpoint(ORIGIN, SIZE, growth.root)).verdict is Verdict.TAMPERED


def test_an_incremental_verification_of_a_log_that_was_cut_or_is_another(log: Copy) -> None:
    assert kinds(log.verify(first=Checkpoint(ORIGIN, SIZE + 1, b"\1" * 32))) == {"rolled back"}
    root = log.ask("SELECT root FROM tracevault_trees")
    assert kinds(log.verify(first=Checkpoint(f"{NAME}/other", SIZE, root))) == {"checkpoint"}


def test_an_old_event_that_was_changed_allows_nothing_new(log: Copy) -> None:
    id_ = forge(log, "tracevault.pruned", "[[0, 1]]")
    seal(log.dsn, log.state)
    with Tracevault(connection_string=log.dsn) as audit:
        late = audit.emit("later").id
    seal(log.dsn, log.state)
    first = Checkpoint.parse(
        Note.parse(log.ask(f"SELECT note FROM tracevault_checkpoints WHERE size = {SIZE + 1}")).text
    )
    log.execute(
        f"""UPDATE audit_logs SET data = '{{"ranges": [[0, 400]]}}' WHERE id = '{id_}'""",
        f"DELETE FROM audit_logs WHERE id = '{late}'",
    )
    report = log.verify(first=first)
    assert [(problem.kind, problem.index, problem.id) for problem in report.problems] == [("deleted", SIZE + 1, late)]


def test_a_report_names_so_many_bad_places(log: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (report_module, findings_module, explain_module):
        monkeypatch.setattr(module, "MOST_PROBLEMS", 10)
    for change in (
        "UPDATE audit_logs SET actor_id = 'x'",
        "UPDATE audit_logs SET id = gen_random_uuid()",
        "DELETE FROM tracevault_leaves",
        "DELETE FROM audit_logs",
    ):
        log.execute(change)
        report = log.verify()
        assert report.verdict is Verdict.TAMPERED
        assert len(report.problems) == 10
        assert report.problems_left_out >= SIZE - 10


def test_progress_is_told(log: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "CHUNK", 128 * 2)
    told: list[tuple[int, int]] = []
    assert log.verify(progress=lambda done, total: told.append((done, total))).problems == []
    assert told == [(256, SIZE), (SIZE, SIZE)]


def test_a_report_in_json(log: Copy) -> None:
    log.execute(f"UPDATE audit_logs SET actor_id = 'x' WHERE {THE_ROW}")
    values = json.loads(json.dumps(log.verify(witnessed=True).as_dict()))
    assert values["verdict"] == "TAMPERED"
    assert values["anchor"] == {"source": "the notary", "size": WITNESSED, "at": BEGIN.isoformat()}
    assert values["problems"] == [
        {"kind": "changed", "detail": "its row is not what was sealed", "index": ATTACKED, "id": str(log.id_of())}
    ]
    assert values["root"] == log.ask("SELECT encode(root, 'hex') FROM tracevault_trees")


def test_each_verdict_has_an_exit_code_of_its_own() -> None:
    codes = {verdict.name: verdict.value for verdict in Verdict}
    assert codes == {"OK": 0, "TAMPERED": 1, "UNKNOWN": 3, "CONSISTENT": 4, "INCOMPLETE": 5}


def test_a_table_that_was_never_sealed(ready_dsn: str) -> None:
    with psycopg.connect(ready_dsn) as connection:
        with pytest.raises(SealError, match="was never sealed"):
            verify(connection, "audit_logs", Trust())
        with pytest.raises(SealError, match="was never sealed"):
            origin_of(connection, "audit_logs")


def test_a_partitioned_table(ready_dsn: str, tmp_path: Path) -> None:
    with psycopg.connect(ready_dsn, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE parted (LIKE audit_logs INCLUDING DEFAULTS INCLUDING GENERATED) "
            "PARTITION BY RANGE (occurred_at)"
        )
        connection.execute("ALTER TABLE parted ADD PRIMARY KEY (occurred_at, id)")
        connection.execute("CREATE TABLE parted_rest PARTITION OF parted DEFAULT")
        connection.execute(
            "INSERT INTO parted (id, event, mode, occurred_at) SELECT gen_random_uuid(), 'x', 'sync', "
            "now() - n * interval '1 minute' FROM generate_series(1, 20) AS n"
        )
        signer = CheckpointSigner([KEY], SigningState(tmp_path / "state"))
        sealer = Sealer(partial(psycopg.connect, ready_dsn), ["parted"], signer)
        sealer.seal("parted")
        sealer.close()
        trust = Trust([KEY.renamed(f"{NAME}/parted").verifier])
        with psycopg.connect(ready_dsn) as reader:
            assert verify(reader, "parted", trust).verdict is Verdict.CONSISTENT
        # The time is half of the key there: the row is found by its id alone.
        connection.execute(
            "UPDATE parted SET occurred_at = occurred_at + interval '1 microsecond' "
            "WHERE id = (SELECT id FROM tracevault_leaves WHERE index = 7)"
        )
        (id_,) = connection.execute("SELECT id FROM tracevault_leaves WHERE index = 7").fetchone() or (None,)
        with psycopg.connect(ready_dsn) as reader:
            report = verify(reader, "parted", trust)
    assert report.verdict is Verdict.TAMPERED
    told = [(problem.kind, problem.index, problem.id) for problem in report.problems]
    assert told == [("deleted", 7, id_), ("changed", 7, id_)]
    assert "another `occurred_at`" in report.problems[1].detail
