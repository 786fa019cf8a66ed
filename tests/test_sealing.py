"""The sealer at work: which rows get leaves, in what order, once; and what it refuses."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests import servers
from tests.conftest import rows
from tests.faults.server import Server
from tests.test_ddl import STAGES, reference_sql
from tracevault import RollbackError, SealError, Tracevault
from tracevault.flows.seal import store_checkpoint, tables_exist
from tracevault.integrity.note import Signer
from tracevault.integrity.report import Report, Verdict
from tracevault.postgres.schema import ensure_schema
from tracevault.sealing import sealer as sealing
from tracevault.sealing.anchors import parse_anchor, read_checkpoints
from tracevault.sealing.keys import generate, verifiers
from tracevault.sealing.publisher import Publisher
from tracevault.sealing.sealer import Round, Sealer
from tracevault.sealing.signer import CheckpointSigner, SigningState
from tracevault.sealing.verify import Trust, verify

TABLE = "audit_logs"
NAME = "log.example.com/shop"
ORIGIN = f"{NAME}/{TABLE}"
_INSERT = "INSERT INTO {0} (id, event, mode, occurred_at, data) VALUES (%s, %s, 'sync', %s, '{{\"n\": 1}}')"
_PARTITIONED = """
ALTER TABLE audit_logs RENAME TO before_partitions;
CREATE TABLE audit_logs (LIKE before_partitions INCLUDING DEFAULTS INCLUDING GENERATED, PRIMARY KEY (occurred_at, id))
  PARTITION BY RANGE (occurred_at);
CREATE TABLE audit_logs_2025 PARTITION OF audit_logs FOR VALUES FROM ('2025-01-01Z') TO ('2026-01-01Z');
CREATE TABLE audit_logs_rest PARTITION OF audit_logs DEFAULT;
"""

MakeSealer = Callable[..., Sealer]


@pytest.fixture(scope="module")
def signer() -> Signer:
    return generate(NAME)


@pytest.fixture
def make_sealer(signer: Signer, tmp_path: Path) -> Iterator[MakeSealer]:
    """A function that makes a sealer of `audit_logs`; all of a test share one state. Closed with the test."""
    made: list[Sealer] = []

    def make(dsn: str, *tables: str, state: str = "state", **options: Any) -> Sealer:
        holder = CheckpointSigner([signer], SigningState(tmp_path / state))
        made.append(Sealer(lambda: psycopg.connect(dsn), tables or (TABLE,), holder, **options))
        return made[-1]

    yield make
    for sealer in made:
        sealer.close()


def insert(connection: psycopg.Connection[Any], count: int = 1, table: str = TABLE) -> list[UUID]:
    """Insert rows; their ids, random, in the order in which one transaction's rows are sealed."""
    ids = sorted(uuid4() for _ in range(count))
    # In another order, so that neither the place in the table nor the time gives it.
    for number, id_ in enumerate(reversed(ids)):
        connection.execute(_INSERT.format(table).encode(), (id_, "x.y", f"2026-01-01T00:00:{number % 60:02}Z"))
    return ids


def add(dsn: str, count: int = 1, table: str = TABLE) -> list[UUID]:
    with psycopg.connect(dsn) as connection:
        return insert(connection, count, table)


def leaves(dsn: str, tree: int = 1) -> list[UUID]:
    """Ids in the order of their leaves, whose indexes have no gap."""
    found = rows(dsn, "SELECT index, id FROM tracevault_leaves WHERE tree = %s ORDER BY index", tree)
    assert [index for index, _ in found] == list(range(len(found)))
    return [id_ for _, id_ in found]


def root(dsn: str, tree: int = 1) -> bytes:
    value = rows(dsn, "SELECT root FROM tracevault_trees WHERE tree = %s", tree)[0][0]
    assert isinstance(value, bytes)
    return value


def sizes(dsn: str) -> list[int]:
    """Sizes of stored checkpoints."""
    return [size for (size,) in rows(dsn, "SELECT size FROM tracevault_checkpoints ORDER BY tree, size")]


def checked(dsn: str, signer: Signer, table: str = TABLE) -> Report:
    """Verify by signatures and rows; nothing may be wrong, nor wait."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        report = verify(connection, table, Trust(verifiers([signer], f"{NAME}/{table}")))
    assert (report.problems, report.unsealed, report.unsigned) == ([], 0, 0)
    assert report.verdict is Verdict.CONSISTENT
    return report


# ------------------------------------------------------------------------------------------- which rows, in what order


def test_rows_get_one_leaf_in_the_order_of_transactions(
    ready_dsn: str, make_sealer: MakeSealer, signer: Signer
) -> None:
    sealer = make_sealer(ready_dsn)
    expected = add(ready_dsn, 3) + add(ready_dsn, 2)
    done = sealer.seal(TABLE)
    assert done is not None
    assert (done.sealed, done.more, done.tree.size) == (5, False, 5)
    expected += add(ready_dsn, 1)
    for _ in range(3):
        sealer.seal(TABLE)
    assert leaves(ready_dsn) == expected
    assert sizes(ready_dsn) == [5, 6]
    assert checked(ready_dsn, signer).checked == 6


def test_an_empty_table_is_sealed_and_signed_only_when_it_has_a_row(ready_dsn: str, make_sealer: MakeSealer) -> None:
    sealer = make_sealer(ready_dsn)
    for _ in range(2):
        done = sealer.seal(TABLE)
        assert done is not None
        assert (done.sealed, done.tree.size) == (0, 0)
    assert sizes(ready_dsn) == []
    only = add(ready_dsn)
    sealer.seal(TABLE)
    assert (leaves(ready_dsn), sizes(ready_dsn)) == (only, [1])


def test_late_commits_are_not_lost_and_hold_nobody_up(ready_dsn: str, make_sealer: MakeSealer, signer: Signer) -> None:
    sealer = make_sealer(ready_dsn)
    with psycopg.connect(ready_dsn) as late, psycopg.connect(ready_dsn) as later:
        first, second = insert(late, 2), insert(later, 2)
        expected = add(ready_dsn, 2)
        sealer.seal(TABLE)
        assert leaves(ready_dsn) == expected
        expected += add(ready_dsn, 1)
        sealer.seal(TABLE)
        later.commit()
        sealer.seal(TABLE)
        expected += second
        assert leaves(ready_dsn) == expected
        # A snapshot that is thousands of transactions newer still knows who was under way.
        rows(ready_dsn, "DO $$ BEGIN FOR n IN 1..2100 LOOP PERFORM txid_current(); COMMIT; END LOOP; END $$")
        sealer.seal(TABLE)
        late.commit()
    sealer.seal(TABLE)
    assert leaves(ready_dsn) == expected + first
    checked(ready_dsn, signer)


def test_what_is_rolled_back_gets_no_leaf(ready_dsn: str, make_sealer: MakeSealer, signer: Signer) -> None:
    sealer = make_sealer(ready_dsn)
    with psycopg.connect(ready_dsn) as connection:
        insert(connection, 2)
        connection.rollback()
        kept = insert(connection, 1)
        with connection.transaction(force_rollback=True):
            insert(connection, 3)
        with connection.transaction():
            kept += insert(connection, 2)
            with connection.transaction(force_rollback=True):
                insert(connection, 1)
        sealer.seal(TABLE)
        assert leaves(ready_dsn) == []
        connection.commit()
    sealer.seal(TABLE)
    assert leaves(ready_dsn) == sorted(kept)
    checked(ready_dsn, signer)


def test_small_batches_make_the_same_tree(ready_dsn: str, make_sealer: MakeSealer, signer: Signer) -> None:
    """Though rows are committed in between, before and behind the place where the walk stands."""
    sealer = make_sealer(ready_dsn, batch=3)
    expected = add(ready_dsn, 4)
    with psycopg.connect(ready_dsn) as late:
        early_number = insert(late, 4)
        expected += add(ready_dsn, 2) + add(ready_dsn, 7)
        found: list[Round] = []
        between: list[UUID] = []

        def announce(done: Round) -> None:
            found.append(done)
            if len(found) == 3:
                late.commit()
                between.extend(add(ready_dsn, 2))

        sealer.seal(TABLE, announce)
    assert len(found) >= 4
    assert leaves(ready_dsn) == expected, "the walk goes to the snapshot in which it began"
    sealer.seal(TABLE)
    expected += early_number + between
    assert leaves(ready_dsn) == expected
    checked(ready_dsn, signer)
    # Another tree of the same rows, in one batch: of one snapshot, hence by transaction alone.
    rows(ready_dsn, "CREATE TABLE first_tree AS SELECT index, id FROM tracevault_leaves")
    with closing(make_sealer(ready_dsn, state="anew")) as whole, closing(make_sealer(ready_dsn, batch=3)) as small:
        trees = []
        for again in (whole, small):
            tree = again.new_epoch(TABLE)
            again.seal(TABLE)
            trees.append((leaves(ready_dsn, tree.number), root(ready_dsn, tree.number)))
    assert trees[0] == trees[1]
    assert trees[0][0] == expected[:4] + early_number + expected[4:13] + between


def test_a_walk_that_was_interrupted_hides_nothing_that_came_since(
    ready_dsn: str, make_sealer: MakeSealer, signer: Signer
) -> None:
    """`seal` means what is committed now, though the walk that it goes on with has another end."""
    expected: list[UUID] = []
    for _ in range(3):  # the first round of a new table looks for rows without a transaction
        expected += add(ready_dsn, 4)
        with closing(make_sealer(ready_dsn, batch=3)) as stopped:
            done = stopped.round(TABLE)
            assert done is not None
            assert done.more
        expected += add(ready_dsn, 2)
        done = make_sealer(ready_dsn, batch=3).seal(TABLE)
        assert done is not None
        assert not done.more
        assert leaves(ready_dsn) == expected
    checked(ready_dsn, signer)


@pytest.mark.parametrize("stage", STAGES)
def test_a_table_of_the_reference_is_adopted_and_resumed(
    dsn: str, make_sealer: MakeSealer, signer: Signer, stage: str
) -> None:
    rows(dsn, reference_sql(stage))
    expected = sorted(id_ for _ in range(4) for id_ in add(dsn, 2))
    with psycopg.connect(dsn, autocommit=True) as connection:
        ensure_schema(connection, [TABLE])
    expected += add(dsn, 2) + add(dsn, 3)
    with closing(make_sealer(dsn, batch=3)) as stopped:
        done = stopped.round(TABLE)
        assert done is not None
        assert (done.sealed, done.more) == (3, True)
    expected += add(dsn, 2)
    for size in (6, 8):
        with closing(make_sealer(dsn, batch=3)) as stopped:
            done = stopped.round(TABLE)
            assert done is not None
            assert (done.more, done.tree.size) == (True, size)
    # From here on it is a walk over transactions.
    with closing(make_sealer(dsn, batch=3)) as stopped:
        done = stopped.round(TABLE)
        assert done is not None
        assert (done.more, done.tree.size) == (True, 11)
    make_sealer(dsn, batch=3).seal(TABLE)
    assert leaves(dsn) == expected
    checked(dsn, signer)


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_a_partitioned_table(ready_dsn: str, make_sealer: MakeSealer, signer: Signer, batch: int) -> None:
    """The same id may stand there twice, at another time; and times that Python does not have."""
    rows(ready_dsn, _PARTITIONED)
    twice = uuid4()
    times = ["2025-06-01Z", "2025-06-01 00:00:00.000001Z", "2027-01-01Z", "20000-01-01Z", "infinity", "-infinity"]
    with psycopg.connect(ready_dsn) as connection:
        for moment in reversed(times):
            connection.execute(_INSERT.format(TABLE).encode(), (twice, "x.y", moment))
    others = add(ready_dsn, 3)
    sealer = make_sealer(ready_dsn, batch=batch)
    sealer.seal(TABLE)
    assert leaves(ready_dsn) == [twice] * 6 + others
    ordered = "SELECT array_agg(occurred_at ORDER BY index) = array_agg(occurred_at ORDER BY occurred_at)"
    assert rows(ready_dsn, f"{ordered} FROM tracevault_leaves WHERE id = %s", twice) == [(True,)]
    last = add(ready_dsn, 1)
    sealer.seal(TABLE)
    assert leaves(ready_dsn)[-1:] == last
    assert checked(ready_dsn, signer).checked == 10


def test_tables_have_trees_of_their_own(ready_dsn: str, make_sealer: MakeSealer, signer: Signer) -> None:
    sealer = make_sealer(ready_dsn, TABLE, "audit_user_events")
    one, other = add(ready_dsn, 2), add(ready_dsn, 3, "audit_user_events")
    for table in sealer.tables:
        sealer.seal(table)
        checked(ready_dsn, signer, table)
    assert (leaves(ready_dsn, 1), leaves(ready_dsn, 2)) == (one, other)


# -------------------------------------------------------------------------------------------- several, and interrupted


@contextmanager
def held(dsn: str, query: str) -> Iterator[None]:
    """Another session in the middle of something."""
    with psycopg.connect(dsn) as connection:
        connection.execute(query.encode())
        yield
        connection.rollback()


def test_of_two_sealers_one_does_nothing(ready_dsn: str, make_sealer: MakeSealer, signer: Signer) -> None:
    sealer = make_sealer(ready_dsn)
    sealer.seal(TABLE)
    ids = add(ready_dsn, 2)
    with held(ready_dsn, "SELECT FROM tracevault_trees FOR UPDATE"):
        assert sealer.round(TABLE) is None
        assert sealer.seal(TABLE) is None
    assert leaves(ready_dsn) == []
    other = make_sealer(ready_dsn)
    assert other.seal(TABLE) is not None
    sealer.seal(TABLE)
    assert leaves(ready_dsn) == ids
    checked(ready_dsn, signer)


def test_a_loser_does_not_seal_the_epoch_before(ready_dsn: str, make_sealer: MakeSealer) -> None:
    sealer = make_sealer(ready_dsn)
    ids = add(ready_dsn, 2)
    sealer.seal(TABLE)
    assert sealer.new_epoch(TABLE).origin == f"{ORIGIN}/2"
    ids += add(ready_dsn, 2)
    with held(ready_dsn, "SELECT FROM tracevault_trees WHERE epoch = 2 FOR UPDATE"):
        assert sealer.round(TABLE) is None
    assert leaves(ready_dsn, 1) == ids[:2]


@pytest.mark.parametrize("round_number", range(3))
def test_sealers_that_begin_at_once(ready_dsn: str, make_sealer: MakeSealer, signer: Signer, round_number: int) -> None:
    """They make the tables, plant the tree, sign and store the same, and none of them fails."""
    ids = add(ready_dsn, 40)
    sealers = [make_sealer(ready_dsn, batch=3 + round_number) for _ in range(6)]
    barrier, errors = threading.Barrier(len(sealers)), []

    def work(sealer: Sealer) -> None:
        barrier.wait()
        try:
            for _ in range(12):
                sealer.round(TABLE)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(sealer,)) for sealer in sealers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    sealers[0].seal(TABLE)
    assert leaves(ready_dsn) == ids
    checked(ready_dsn, signer)


def test_the_same_checkpoint_stored_at_once(
    ready_dsn: str, make_sealer: MakeSealer, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sealer whose transaction began before another one stored the note is not told off for it."""
    first, second = make_sealer(ready_dsn), make_sealer(ready_dsn)
    first.seal(TABLE)
    add(ready_dsn, 2)
    real: Callable[..., Any] = store_checkpoint
    calls: list[str] = []

    def slow(tree: Any, note: str) -> Any:
        calls.append(note)
        yield from tables_exist()  # its snapshot is taken
        if len(calls) == 1:
            second.round(TABLE)
        yield from real(tree, note)

    monkeypatch.setattr(sealing, "store_checkpoint", slow)
    first.seal(TABLE)
    assert len(calls) == 3
    assert sizes(ready_dsn) == [2]
    checked(ready_dsn, signer)


class _CrashError(BaseException):
    """Stands for a process that ends here."""


def _crash(*_args: Any, **_kwargs: Any) -> Any:
    raise _CrashError


@pytest.mark.parametrize("point", ["before the signature", "before the state", "after the state", "before the note"])
def test_a_crash_between_two_steps(
    ready_dsn: str, make_sealer: MakeSealer, signer: Signer, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    sealer = make_sealer(ready_dsn)
    ids = add(ready_dsn, 2)
    sealer.seal(TABLE)
    ids += add(ready_dsn, 2)
    with monkeypatch.context() as patch:
        match point:
            case "before the signature":
                patch.setattr(Sealer, "sign", _crash)
            case "before the state":
                patch.setattr(SigningState, "write", _crash)
            case "after the state":
                real = SigningState.write
                patch.setattr(SigningState, "write", lambda *given: _crash(real(*given)))
            case _:
                patch.setattr(sealing, "store_checkpoint", _crash)
        with pytest.raises(_CrashError):
            sealer.seal(TABLE)
    assert (leaves(ready_dsn), sizes(ready_dsn)) == (ids, [2])
    more = add(ready_dsn, 1) if point == "before the note" else []
    make_sealer(ready_dsn).seal(TABLE)
    assert (leaves(ready_dsn), sizes(ready_dsn)) == (ids + more, [2, 4 + len(more)])
    checked(ready_dsn, signer)


# ------------------------------------------------------------------------------------------------------------- refused


@contextmanager
def copied(server: str, dsn: str) -> Iterator[str]:
    """A copy of a database as it is now: what a backup would bring back."""
    name = f"copy_{uuid4().hex[:8]}"
    source = conninfo_to_dict(dsn)["dbname"]
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {source} STRATEGY file_copy".encode())
        try:
            yield make_conninfo(server, dbname=name)
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_a_database_of_before_is_not_signed(
    server: str, ready_dsn: str, make_sealer: MakeSealer, signer: Signer, tmp_path: Path
) -> None:
    add(ready_dsn, 3)
    with closing(make_sealer(ready_dsn)) as sealer:
        sealer.seal(TABLE)
    with copied(server, ready_dsn) as backup:
        add(ready_dsn, 2)
        with closing(make_sealer(ready_dsn)) as sealer:
            sealer.seal(TABLE)
        state = (tmp_path / "state").read_bytes()
        # Smaller than what was signed, of the same size, and larger, but another log.
        for count in (0, 2, 1):
            add(backup, count)
            with closing(make_sealer(backup)) as late, pytest.raises(RollbackError, match="ROLLBACK DETECTED"):
                late.seal(TABLE)
            assert sizes(backup) == [3]
            assert (tmp_path / "state").read_bytes() == state
        late = make_sealer(backup)
        tree = late.new_epoch(TABLE)
        late.seal(TABLE)
        assert (tree.origin, tree.epoch) == (f"{ORIGIN}/2", 2)
        assert len(leaves(backup, tree.number)) == 6
        assert sizes(backup) == [3, 6]
        add(backup, 1)
        late.seal(TABLE)
        with psycopg.connect(backup, autocommit=True) as connection:
            report = verify(connection, TABLE, Trust(verifiers([signer], tree.origin)))
        assert (report.problems, report.checked, report.unsigned) == ([], 7, 0)


def test_a_root_of_the_same_size_is_noticed_by_who_signed_the_other(ready_dsn: str, make_sealer: MakeSealer) -> None:
    sealer = make_sealer(ready_dsn)
    add(ready_dsn, 2)
    sealer.seal(TABLE)
    rows(ready_dsn, "UPDATE tracevault_trees SET root = sha256('another')")
    with pytest.raises(RollbackError, match="another root"):
        sealer.seal(TABLE)


def test_hashes_that_were_changed_are_not_built_upon(ready_dsn: str, make_sealer: MakeSealer) -> None:
    sealer = make_sealer(ready_dsn)
    add(ready_dsn, 2)
    sealer.seal(TABLE)
    rows(ready_dsn, "UPDATE tracevault_tiles SET hashes = sha256('a') || sha256('b')")
    add(ready_dsn, 1)
    with pytest.raises(SealError, match="do not make its root"):
        sealer.seal(TABLE)
    rows(ready_dsn, "DELETE FROM tracevault_tiles")
    with pytest.raises(SealError, match="missing"):
        sealer.seal(TABLE)
    assert (len(leaves(ready_dsn)), sizes(ready_dsn)) == (2, [2])


def test_keys_have_states_of_their_own(ready_dsn: str, make_sealer: MakeSealer) -> None:
    add(ready_dsn, 2)
    make_sealer(ready_dsn).seal(TABLE)
    elsewhere = make_sealer(ready_dsn, state="lost")
    with pytest.raises(SealError, match="--adopt-state"):
        elsewhere.seal(TABLE)
    elsewhere.adopt_state(TABLE)
    add(ready_dsn, 1)
    elsewhere.seal(TABLE)
    assert sizes(ready_dsn) == [2, 3]


def restore(source: str, target: str) -> None:
    """Bring the rows of all our tables to another database, as dump and restore do."""
    tables = [
        name
        for (name,) in rows(source, "SELECT relname FROM pg_class WHERE relname ~ '^tracevault_.*s$' AND relkind = 'r'")
    ]
    with psycopg.connect(source) as old, psycopg.connect(target) as new:
        for table in (*tables, TABLE):
            columns = sql.SQL(", ").join(
                sql.Identifier(name)
                for (name,) in old.execute(
                    "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 "
                    "AND NOT attisdropped AND attgenerated = ''",
                    (table,),
                )
            )
            name = sql.Identifier(table)
            with (
                old.cursor().copy(sql.SQL("COPY {} ({}) TO STDOUT").format(name, columns)) as reading,
                new.cursor().copy(sql.SQL("COPY {} ({}) FROM STDIN").format(name, columns)) as writing,
            ):
                for piece in reading:
                    writing.write(piece)


@servers.one_server
def test_a_restore_onto_another_server(ready_dsn: str, make_sealer: MakeSealer, signer: Signer) -> None:
    """Its transactions are numbered anew, so that new rows have the numbers of old ones."""
    sealer = make_sealer(ready_dsn)
    expected = add(ready_dsn, 5)
    sealer.seal(TABLE)
    rows(ready_dsn, "DO $$ BEGIN FOR n IN 1..3000 LOOP PERFORM txid_current(); COMMIT; END LOOP; END $$")
    waiting = add(ready_dsn, 3)
    with closing(make_sealer(ready_dsn)) as before, psycopg.connect(ready_dsn) as late:
        insert(late, 1)
        more = add(ready_dsn, 1)
        before.round(TABLE)
        expected += waiting + more
        waiting = add(ready_dsn, 4)
        with servers.running("18") as other:
            target = make_conninfo(other, dbname="elsewhere")
            rows(other, "CREATE DATABASE elsewhere")
            with psycopg.connect(target, autocommit=True) as connection:
                ensure_schema(connection, [TABLE])
            make_sealer(target).estimate(TABLE)  # makes the tables
            rows(target, "DELETE FROM tracevault_trees")
            restore(ready_dsn, target)
            after = make_sealer(target, batch=3)
            new = add(target, 2)
            highest = "SELECT max(stored_xid::text::bigint) FROM audit_logs WHERE id = ANY(%s)"
            assert rows(target, highest, new) < rows(target, highest, waiting), "no number collides"
            with pytest.raises(SealError, match="--resume"):
                after.seal(TABLE)
            assert leaves(target) == expected
            after.resume(TABLE)
            done = after.round(TABLE)
            assert done is not None
            assert done.more
            late_here = add(target, 5)
            with psycopg.connect(target) as open_there:
                last = insert(open_there, 2)
                after.seal(TABLE)
                late_here += add(target, 1)
                after.seal(TABLE)
            after.seal(TABLE)
            found = leaves(target)
            assert found[: len(expected)] == expected
            assert sorted(found[len(expected) :]) == sorted(waiting + new + late_here + last)
            checked(target, signer)


@pytest.fixture
def stranger(server: str, ready_dsn: str) -> Iterator[str]:
    """Connection string of a role without rights."""
    name = f"stranger_{uuid4().hex[:8]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {name} LOGIN".encode())
        yield make_conninfo(ready_dsn, options=f"-c role={name}")
        with psycopg.connect(ready_dsn, autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {name}".encode())
        admin.execute(f"DROP ROLE {name}".encode())


def test_a_role_without_rights_is_told_what_to_do(ready_dsn: str, stranger: str, make_sealer: MakeSealer) -> None:
    add(ready_dsn, 1)
    sealer = make_sealer(stranger)
    rows(ready_dsn, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    with pytest.raises(SealError, match="run `tracevault roles`"):
        sealer.round(TABLE)
    make_sealer(ready_dsn).seal(TABLE)
    with pytest.raises(SealError, match=r"permission denied .*`tracevault roles --sealer"):
        sealer.round(TABLE)
    assert sizes(ready_dsn) == [1]


# ------------------------------------------------------------------------------------------------------ hour after hour


def test_an_idle_log_writes_next_to_nothing(ready_dsn: str, make_sealer: MakeSealer) -> None:
    sealer = make_sealer(ready_dsn)
    add(ready_dsn, 2)
    sealer.seal(TABLE)

    def look() -> tuple[str, int, int]:
        query = "SELECT ctid::text, txid_snapshot_xmax(txid_current_snapshot()) FROM tracevault_trees"
        ((row, xid),) = rows(ready_dsn, query)
        return row, xid, rows(ready_dsn, "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint")[0][0]

    before = look()
    for _ in range(50):
        sealer.seal(TABLE)
    after = look()
    assert after[0] == before[0], "its row was written anew"
    assert after[1] - before[1] <= 60, "more than one transaction a round"
    assert after[2] - before[2] < 50 * 500


def test_an_open_transaction_makes_no_round_read_what_is_sealed(ready_dsn: str, make_sealer: MakeSealer) -> None:
    """However many rows were stored since it began; nor is a backlog read anew for each batch."""

    def read() -> int:
        query = "SELECT coalesce(idx_tup_fetch, 0) + seq_tup_read FROM pg_stat_user_tables WHERE relname = 'audit_logs'"
        return int(rows(ready_dsn, query)[0][0])

    sessions = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"
    )

    def reads_of(sealer: Sealer) -> int:
        before = read()
        for _ in range(20):
            sealer.round(TABLE)
        sealer.close()  # then the statistics of its session are told
        wait_until(lambda: rows(ready_dsn, sessions) == [(2,)])  # the held one, and the one that looks
        return read() - before

    with held(ready_dsn, "SELECT pg_current_xact_id()"):
        for _ in range(4):
            rows(
                ready_dsn,
                "INSERT INTO audit_logs (id, event, mode, occurred_at) "
                "SELECT gen_random_uuid(), 'x.y', 'sync', now() FROM generate_series(1, 500)",
            )
        backlog = make_sealer(ready_dsn, batch=100)
        backlog.round(TABLE)
        assert reads_of(backlog) < 20 * 300
        with closing(make_sealer(ready_dsn)) as sealer:
            sealer.seal(TABLE)
        assert len(leaves(ready_dsn)) == 2000
        assert reads_of(make_sealer(ready_dsn)) < 100


def wait_until(reached: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def sealing_in_background(sealer: Sealer, every: float = 0.02) -> Iterator[threading.Thread]:
    stop = threading.Event()
    thread = threading.Thread(target=sealer.run, args=(stop, every))
    thread.start()
    yield thread
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_its_sessions_are_ended(
    server: str, ready_dsn: str, make_sealer: MakeSealer, signer: Signer, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on with another one, also where for a while there is none to be had; and says so once."""
    caplog.set_level(logging.INFO, "tracevault")
    expected = add(ready_dsn, 2)
    name = conninfo_to_dict(ready_dsn)["dbname"]
    with sealing_in_background(make_sealer(ready_dsn)):
        wait_until(lambda: rows(ready_dsn, "SELECT to_regclass('tracevault_leaves') IS NOT NULL")[0][0])
        wait_until(lambda: leaves(ready_dsn) == expected)
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
            admin.execute(b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
            wait_until(lambda: "is not sealed" in caplog.text)
            time.sleep(0.3)
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
        expected += add(ready_dsn, 3)
        wait_until(lambda: leaves(ready_dsn) == expected)
        wait_until(lambda: "is sealed again" in caplog.text)
    checked(ready_dsn, signer)


def test_the_server_crashes_without_synchronous_commit(
    tmp_path: Path, make_sealer: MakeSealer, signer: Signer, caplog: pytest.LogCaptureFixture
) -> None:
    """What was signed is on the disk all the same, so that nothing looks like a rollback."""
    crashing = Server(tmp_path)
    try:
        crashing.sql("CREATE DATABASE lossy", "ALTER DATABASE lossy SET synchronous_commit = off")
        crashing.sql("ALTER SYSTEM SET wal_writer_delay = '10s'", "SELECT pg_reload_conf()")
        dsn = make_conninfo(crashing.admin, dbname="lossy")
        with psycopg.connect(dsn, autocommit=True) as connection:
            ensure_schema(connection, [TABLE])
        sealer = make_sealer(dsn)
        sealer.seal(TABLE)
        with sealing_in_background(sealer):
            for _ in range(2):
                count = len(leaves(dsn)) + len(add(dsn, 3))
                wait_until(lambda count=count: sizes(dsn)[-1:] == [count])  # type: ignore[misc]
                crashing.stop()
                crashing.start()
        assert "ROLLBACK" not in caplog.text
        assert len(leaves(dsn)) == 6
        checked(dsn, signer)
    finally:
        crashing.release()


def test_a_vault_and_its_sealer(ready_dsn: str, make_sealer: MakeSealer, signer: Signer) -> None:
    """Events as applications emit them, one by one and many at once."""
    with Tracevault(connection_string=ready_dsn, bootstrap={"ensure_schema": False}) as vault:
        first = vault.emit("user.created", actor={"id": "u", "type": "user"}, data={"n": 1})
        many = vault.emit_many([{"event": "user.seen", "data": {"n": n}} for n in range(5)])
    make_sealer(ready_dsn).seal(TABLE)
    assert leaves(ready_dsn) == [first.id, *(receipt.id for receipt in many)]
    assert checked(ready_dsn, signer).checked == 6


def test_an_idle_log_tells_its_anchors_again(ready_dsn: str, make_sealer: MakeSealer, tmp_path: Path) -> None:
    anchor = tmp_path / "anchor"
    publisher = Publisher([parse_anchor(f"file:{anchor}")], interval=0.0)
    sealer = make_sealer(ready_dsn, publisher=publisher, heartbeat=0.2)
    rows(ready_dsn, _INSERT.format(TABLE), uuid4(), "a", "2026-01-01Z")
    sealer.seal(TABLE)
    sealer.beat()
    assert publisher.settle(10)
    assert len(list(read_checkpoints(anchor))) == 1
    time.sleep(0.3)
    sealer.beat()
    assert publisher.settle(10)
    first, second = (note for _, note in read_checkpoints(anchor))
    assert first == second
    publisher.close()
    # What both were answered is in the database, once the sealer looks again.
    sealer.beat()
    assert rows(ready_dsn, "SELECT size, attempts, error FROM tracevault_anchors") == [(1, 2, None)]
