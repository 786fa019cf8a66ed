"""Following the log: no row is skipped, however late it commits, none comes twice, and a text says where to go on."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.conftest import rows
from tests.faces import Face, OpenVault
from tracevault import AuditRecord, Tracevault, ValidationError
from tracevault.flows.tail import channel
from tracevault.schema.position import Position, Snapshot, read_position

TABLE = "audit_logs"
SYSTEM = "7000000000000000000"


def open_vault(face: OpenVault, dsn: str, **more: Any) -> Face:
    return face(connection_string=dsn, bootstrap={"ensure_schema": False}, **more)


def names(records: Iterator[AuditRecord] | list[AuditRecord]) -> list[str]:
    return [record.event for record in records]


def insert(connection: psycopg.Connection[Any], event: str, id_: UUID | None = None) -> None:
    connection.execute(
        b"INSERT INTO audit_logs (id, event, mode, occurred_at) "
        b"VALUES (coalesce(%s, gen_random_uuid()), %s, 'sync', now())",
        (id_, event),
    )


def now_on(query: Face) -> Any:
    tail = query.tail(follow=False)
    tail.start()
    return tail


def test_it_begins_now_or_at_the_beginning_or_where_one_ended(face: OpenVault, ready_dsn: str) -> None:
    query = open_vault(face, ready_dsn).query
    vault = open_vault(face, ready_dsn)
    for n in range(5):
        vault.emit(f"old.{n}")
    tail = query.tail(follow=False)
    assert tail.position is None
    assert names(tail) == []
    begun = tail.position
    vault.emit_many(f"new.{n}" for n in range(1200))
    assert names(query.tail(after="beginning", follow=False)) == [f"old.{n}" for n in range(5)] + [
        f"new.{n}" for n in range(1200)
    ]
    tail = query.tail(after=begun, follow=False)
    first = [next(tail) for _ in range(700)]
    assert names(first) == [f"new.{n}" for n in range(700)]
    # By the text alone, in the middle of a transaction's rows, as another process does.
    assert names(query.tail(after=str(tail.position), follow=False)) == [f"new.{n}" for n in range(700, 1200)]
    assert names(tail) == [f"new.{n}" for n in range(700, 1200)]
    end = tail.position
    assert names(query.tail(after=end, follow=False)) == []
    vault.emit("newest")
    assert names(tail) == ["newest"], "a tail that has ended goes on"
    assert names(query.tail(after=end, follow=False)) == ["newest"]
    assert names(query.tail(after=begun, follow=False, event="new.7")) == ["new.7"]
    assert names(query.tail(after=begun, follow=False, event_prefix="new", data={"x": 1})) == []


def test_a_place_that_is_kept_before_the_first_event(face: OpenVault, ready_dsn: str) -> None:
    """What was only looked at was not had: whoever keeps the place of a tail that has begun loses nothing."""
    vault = open_vault(face, ready_dsn)
    query = vault.query
    begun = now_on(query).position
    vault.emit_many(f"e.{n}" for n in range(700))
    for after in ("beginning", begun):
        tail = query.tail(after=after, follow=False)
        tail.start()
        assert len(list(query.tail(after=tail.position, follow=False))) == 700
        next(tail)
        assert len(list(query.tail(after=tail.position, follow=False))) == 699
        for _ in range(499):
            next(tail)
        assert len(list(query.tail(after=tail.position, follow=False))) == 200
        next(tail)
        assert len(list(query.tail(after=tail.position, follow=False))) == 199


def test_a_transaction_that_commits_late_is_not_skipped(face: OpenVault, ready_dsn: str) -> None:
    """A cursor over ids or times skips it: shown here, with a transaction that is held open."""
    vault = open_vault(face, ready_dsn)
    tail = now_on(vault.query)
    late_id = UUID("018f0000-0000-7000-8000-000000000001")
    with psycopg.connect(ready_dsn) as late, psycopg.connect(ready_dsn) as never:
        insert(late, "late", late_id)
        insert(never, "never")
        vault.emit("early")
        assert names(tail) == ["early"]  # and it waits for nobody
        naive = rows(ready_dsn, f"SELECT max(created_at) FROM {TABLE}")[0][0]
        kept = tail.position
        vault.emit("next")
        assert names(vault.query.tail(after=kept, follow=False)) == ["next"]
        assert names(tail) == ["next"]
        kept = tail.position
        late.commit()
        never.rollback()
    missed = rows(ready_dsn, f"SELECT event FROM {TABLE} WHERE created_at > %s ORDER BY created_at", naive)
    assert missed == [("next",)], "the naive cursor has not skipped the late one, so this test shows nothing"
    assert names(vault.query.tail(after=kept, follow=False)) == ["late"]
    assert names(tail) == ["late"]
    assert names(tail) == []


def test_savepoints_and_prepared_transactions(face: OpenVault, dsn: str, ready_dsn: str) -> None:
    query = open_vault(face, ready_dsn).query
    tail = now_on(query)
    with psycopg.connect(ready_dsn) as connection:
        insert(connection, "kept")
        connection.execute("SAVEPOINT s")
        insert(connection, "undone")
        connection.execute("ROLLBACK TO s")
        connection.execute("SAVEPOINT s")
        insert(connection, "kept too")
        assert names(tail) == []
    assert sorted(names(tail)) == ["kept", "kept too"]
    (most,) = rows(ready_dsn, "SHOW max_prepared_transactions")[0]
    if most != "0":
        with psycopg.connect(ready_dsn) as connection:
            insert(connection, "prepared")
            connection.execute("PREPARE TRANSACTION 'p'")
        assert names(tail) == []
        rows(ready_dsn, "COMMIT PREPARED 'p'")
        assert names(tail) == ["prepared"]


def test_rows_of_no_known_transaction_come_first(face: OpenVault, ready_dsn: str) -> None:
    query = open_vault(face, ready_dsn).query
    with psycopg.connect(ready_dsn, autocommit=True) as connection:
        for n in range(1100):
            insert(connection, f"old.{n}", UUID(int=n))
        connection.execute(f"UPDATE {TABLE} SET stored_xid = NULL".encode())
        insert(connection, "new", UUID(int=5000))
    expected = [f"old.{n}" for n in range(1100)] + ["new"]
    assert names(query.tail(after="beginning", follow=False)) == expected
    for stop in (1, 499, 500, 501, 1100):
        tail = query.tail(after="beginning", follow=False)
        assert names([next(tail) for _ in range(stop)]) == expected[:stop]
        assert names(query.tail(after=tail.position, follow=False)) == expected[stop:]


def test_an_id_that_stands_twice_in_a_partitioned_table(face: OpenVault, dsn: str) -> None:
    vault = face(connection_string=dsn)
    ids = [UUID(int=n // 3 + 1) for n in range(1500)]
    with psycopg.connect(dsn) as connection:
        columns = rows(dsn, f"SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = '{TABLE}'::regclass")
        assert columns
        connection.execute(f"ALTER TABLE {TABLE} DROP CONSTRAINT {TABLE}_pkey".encode())
        for n, id_ in enumerate(ids):
            insert(connection, f"e{n}", id_)
    query = vault.query
    for stop in (1, 2, 3, 499, 500, 501, 502):
        tail = query.tail(after="beginning", follow=False)
        first = [next(tail) for _ in range(stop)]
        rest = list(query.tail(after=tail.position, follow=False))
        assert {*names(first), *names(rest)} == {f"e{n}" for n in range(1500)}
        assert len(first) + len(rest) <= 1502
    assert len(names(query.tail(after="beginning", follow=False))) == 1500


def test_a_tail_follows(face: OpenVault, ready_dsn: str) -> None:
    vault, writer = open_vault(face, ready_dsn), Tracevault(connection_string=ready_dsn)
    tail = vault.query.tail()
    tail.start()
    with closing(writer):
        timer = threading.Timer(0.7, lambda: writer.emit("later"))
        timer.start()
        began = time.monotonic()
        assert next(tail).event == "later"
        assert 0.6 < time.monotonic() - began < 5
        timer.join()


def test_followers_are_told(face: OpenVault, ready_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without being told, they would look only after minutes."""
    monkeypatch.setattr("tracevault.query._LOOK", 100.0)
    vault = open_vault(face, ready_dsn, notify=True)
    with Tracevault(connection_string=ready_dsn, notify=True) as writer:
        tail = vault.query.tail()
        tail.start()
        for n in range(3):
            timer = threading.Timer(0.5, lambda n=n: writer.emit(f"later.{n}"))
            timer.start()
            began = time.monotonic()
            assert next(tail).event == f"later.{n}"
            assert time.monotonic() - began < 10
            timer.join()


def test_followers_are_told_ten_times_a_second_at_most(ready_dsn: str) -> None:
    with psycopg.connect(ready_dsn, autocommit=True) as listening:
        listening.execute(f'LISTEN "{channel(TABLE)}"'.encode())
        with Tracevault(connection_string=ready_dsn, notify=True) as vault:
            until = time.monotonic() + 1.5
            count = 0
            while time.monotonic() < until:
                vault.emit("a")
                count += 1
        told = list(listening.notifies(timeout=1.0))
    assert count > 30
    assert 2 <= len(told) <= 17


def test_without_the_right_to_listen_it_looks_by_itself(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn, notify=True)
    vault.vault._engine._connect = vault.vault._engine._conninfo = None
    with Tracevault(connection_string=ready_dsn) as writer:
        tail = vault.query.tail()
        tail.start()
        timer = threading.Timer(0.2, lambda: writer.emit("later"))
        timer.start()
        assert next(tail).event == "later"
        timer.join()


def test_close_ends_a_waiting_tail(ready_dsn: str) -> None:
    with Tracevault(connection_string=ready_dsn) as vault:
        tail = vault.query.tail()
        threading.Timer(0.3, tail.close).start()
        assert list(tail) == []


def test_positions_that_are_none(face: OpenVault, ready_dsn: str) -> None:
    query = open_vault(face, ready_dsn).query
    tail = query.tail(follow=False, after="beginning")
    list(tail)
    position = str(tail.position)
    for text in (
        "",
        "now",
        position[:-1],
        position.replace(":", ";", 1),
        "9" + position[1:],
        position + "\n",
        5,
        b"x",
        "x" * 10**6,
    ):
        with pytest.raises(ValidationError) as caught:
            query.tail(after=text)
        assert caught.value.field == "after"
    parsed = read_position(position, "after")
    elsewhere = str(Position(SYSTEM, parsed.done))
    with pytest.raises(ValidationError, match="another server"):
        list(query.tail(after=elsewhere, follow=False))


def test_a_table_that_was_restored_elsewhere(face: OpenVault, ready_dsn: str) -> None:
    vault = open_vault(face, ready_dsn)
    vault.emit("restored")
    rows(ready_dsn, f"UPDATE {TABLE} SET stored_xid = '900000000'")
    with pytest.raises(ValidationError, match="restored from another server"):
        list(vault.query.tail(after="beginning", follow=False))
    tail = now_on(vault.query)
    vault.emit("new")
    assert names(tail) == ["new"]
    foreign = f"UPDATE {TABLE} SET stored_xid = NULL WHERE stored_xid >= pg_snapshot_xmax(pg_current_snapshot())"
    rows(ready_dsn, foreign)
    assert names(vault.query.tail(after="beginning", follow=False)) == ["restored", "new"]


def test_snapshots_of_a_standby_that_lags() -> None:
    primary = Snapshot.parse("10:20:10,15")
    assert not primary.sees(15)
    assert primary.sees(19)
    assert not primary.sees(20)
    assert primary.union(Snapshot.parse("12:12:")) == Snapshot(15, 20, (15,))
    assert Snapshot.parse("12:12:").union(primary) == Snapshot(15, 20, (15,))
    assert primary.union(Snapshot.parse("30:30:")) == Snapshot(30, 30, ())
    assert str(Snapshot.parse("10:20:10,15")) == "10:20:10,15"


@pytest.mark.parametrize("seed", range(20))
def test_unions_see_what_either_sees(seed: int) -> None:
    chance = random.Random(seed)

    def some() -> Snapshot:
        xmax = chance.randint(3, 30)
        running = tuple(sorted(chance.sample(range(3, xmax), chance.randint(0, min(5, xmax - 3)))))
        return Snapshot(running[0] if running else xmax, xmax, running)

    one, other = some(), some()
    both = one.union(other)
    assert [both.sees(xid) for xid in range(3, 40)] == [one.sees(xid) or other.sees(xid) for xid in range(3, 40)]
    assert Snapshot.parse(str(both)) == both
    assert both.xmin == (both.running[0] if both.running else both.xmax)


class Writer(threading.Thread):
    """Stores rows in transactions that take their time, and that are partly undone."""

    def __init__(self, dsn: str, number: int, seconds: float) -> None:
        super().__init__()
        self.committed: list[str] = []
        self.undone = 0
        self._dsn, self._number = dsn, number
        self._stop_at = time.monotonic() + seconds

    def run(self) -> None:
        chance = random.Random(self._number)
        count = 0
        with psycopg.connect(self._dsn) as connection:
            while time.monotonic() < self._stop_at:
                mine = []
                for _ in range(chance.randint(1, 5)):
                    count += 1
                    mine += self._insert(connection, chance, f"{self._number}.{count}")
                if chance.random() < 0.2:
                    connection.rollback()
                    self.undone += len(mine)
                else:
                    connection.commit()
                    self.committed += mine

    def _insert(self, connection: psycopg.Connection[Any], chance: random.Random, event: str) -> list[str]:
        connection.execute("SAVEPOINT s")
        insert(connection, event)
        undone = chance.random() < 0.2
        if undone:
            connection.execute("ROLLBACK TO s")
            self.undone += 1
        time.sleep(chance.choice((0, 0, 0.002, 0.05)))
        return [] if undone else [event]


def test_hostile_writers(ready_dsn: str) -> None:
    """A follower that begins anew from its text again and again, beside a cursor over the time of storing."""
    seen: list[str] = []
    naive: set[str] = set()
    chance = random.Random(99)
    with Tracevault(connection_string=ready_dsn) as vault, psycopg.connect(ready_dsn, autocommit=True) as connection:
        position = vault.query.tail(follow=False).start().position
        last = rows(ready_dsn, "SELECT now()")[0][0]
        writers = [Writer(ready_dsn, number, 5.0) for number in range(12)]
        for writer in writers:
            writer.start()
        rounds_after = 0
        while rounds_after < 200:
            rounds_after += not any(writer.is_alive() for writer in writers)
            tail = vault.query.tail(after=position, follow=False)
            for record in tail:
                seen.append(record.event)
                if chance.random() < 0.01:
                    break
            position = tail.position
            found = connection.execute(
                f"SELECT event, created_at FROM {TABLE} WHERE created_at > %s ORDER BY created_at".encode(), (last,)
            ).fetchall()
            naive.update(event for event, _ in found)
            last = found[-1][1] if found else last
    expected = sorted(event for writer in writers for event in writer.committed)
    assert sorted(seen) == expected
    assert len(expected) > 200
    assert sum(writer.undone for writer in writers) > 20
    assert set(expected) - naive, "the naive cursor missed nothing, so this test shows nothing"


def test_a_step_costs_as_much_with_an_old_transaction_open(server: str, ready_dsn: str) -> None:
    """Rows that were had are not read again, although the oldest transaction is older than they."""
    with Tracevault(connection_string=ready_dsn) as vault, psycopg.connect(ready_dsn) as old:
        insert(old, "old")
        vault.emit_many(f"e{n}" for n in range(5000))
        tail = vault.query.tail(after="beginning", follow=False)
        assert len(list(tail)) == 5000
        vault.emit("new")
        rows(ready_dsn, f"ANALYZE {TABLE}")
        before = rows_read(vault, ready_dsn)
        assert names(tail) == ["new"]
        assert 1 <= rows_read(vault, ready_dsn) - before < 100


def rows_read(vault: Tracevault, dsn: str) -> int:
    """Return how many entries of the index were read so far; a session tells that at most once a second."""
    time.sleep(1.2)
    vault.query.find_by_id(UUID(int=0))
    found = rows(dsn, f"SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'idx_{TABLE}_stored'")
    return int(found[0][0])
