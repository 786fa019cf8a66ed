"""Hostile writers and dying sealers: every committed row gets one leaf, and every checkpoint extends the earlier ones.

A cursor on time, and one on a serial, follow the same table, and are shown to lose rows that commit late.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.faults.conftest import SEED
from tests.faults.ledger import FaultError, VacuousError
from tests.faults.server import Server
from tracevault import generate_init_sql
from tracevault.events.ids import uuid7
from tracevault.flows.seal import read_tiles
from tracevault.integrity.merkle import consistency_proof, verify_consistency
from tracevault.integrity.note import Note
from tracevault.integrity.report import Verdict
from tracevault.integrity.tiles import tile_reader
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.sealing.keys import generate, verifiers, write_key
from tracevault.sealing.verify import Trust, Witnessed, verify

TABLE = "audit_logs"
NAME = "log.example.com/hostile"
ORIGIN = f"{NAME}/{TABLE}"
WRITERS = 24
SECONDS = 30.0
BATCH = 64
# Transactions that are held open until the naive cursors have passed by.
HELD = 3

# What the reference says; columns of ours take their defaults.
_INSERT = f"""INSERT INTO {TABLE} (id, event, actor_id, actor_type, target_id, target_type, data, meta, mode,
  occurred_at, correlation_id, request_id, environment)
VALUES (%s, %s, 'u1', 'user', NULL, NULL, %s, NULL, 'sync', clock_timestamp(), %s, NULL, 'test')"""


class Writer(threading.Thread):
    """Commits, rolls back and delays; knows which of its rows must be there."""

    def __init__(self, number: int, dsn: str, stop: threading.Event) -> None:
        super().__init__(name=f"writer-{number}")
        self.number = number
        self.committed: set[UUID] = set()
        self.rolled_back: set[UUID] = set()
        self.kinds: dict[str, int] = {}
        self.error: BaseException | None = None
        self._dsn = dsn
        self._halt = stop
        self._random = random.Random(f"{SEED}/{number}")

    def run(self) -> None:
        ways = (self._plain, self._rolled_back, self._savepoints, self._prepared, self._delayed)
        try:
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                while not self._halt.is_set():
                    way = self._random.choices(ways, (10, 2, 3, 2, 1))[0]
                    way(connection)
                    self.kinds[way.__name__] = self.kinds.get(way.__name__, 0) + 1
                    time.sleep(self._random.choice((0, 0, 0.001, 0.01, 0.1)))
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def _insert(self, connection: psycopg.Connection[Any]) -> set[UUID]:
        ids = {uuid7() for _ in range(self._random.choice((1, 1, 1, 2, 5)))}
        for id_ in ids:
            data = json.dumps({"n": self._random.random(), "text": "é" * self._random.randrange(50)})
            connection.execute(_INSERT.encode(), (id_, f"hostile.{self.number}", data, str(id_)))
        return ids

    def _plain(self, connection: psycopg.Connection[Any]) -> None:
        with connection.transaction():
            ids = self._insert(connection)
        self.committed |= ids

    def _rolled_back(self, connection: psycopg.Connection[Any]) -> None:
        with connection.transaction(force_rollback=True):
            self.rolled_back |= self._insert(connection)

    def _savepoints(self, connection: psycopg.Connection[Any]) -> None:
        kept: set[UUID] = set()
        dropped: set[UUID] = set()
        with connection.transaction():
            kept |= self._insert(connection)
            for _ in range(self._random.randrange(1, 4)):
                undone = self._random.random() < 0.5
                with connection.transaction(force_rollback=undone):
                    (dropped if undone else kept).update(self._insert(connection))
                    time.sleep(self._random.choice((0, 0.002)))
        self.committed |= kept
        self.rolled_back |= dropped

    def _prepared(self, connection: psycopg.Connection[Any]) -> None:
        name = f"w{self.number}_{sum(self.kinds.values())}"
        connection.execute("BEGIN")
        ids = self._insert(connection)
        connection.execute(f"PREPARE TRANSACTION '{name}'".encode())
        time.sleep(self._random.choice((0, 0.01, 0.3)))
        if self._random.random() < 0.25:
            connection.execute(f"ROLLBACK PREPARED '{name}'".encode())
            self.rolled_back |= ids
        else:
            connection.execute(f"COMMIT PREPARED '{name}'".encode())
            self.committed |= ids

    def _delayed(self, connection: psycopg.Connection[Any]) -> None:
        with connection.transaction():
            ids = self._insert(connection)
            time.sleep(0.1 * 50 ** self._random.random())  # 0.1 to 5 s
        self.committed |= ids


class NaiveCursor(threading.Thread):
    """Follows the table as many do: what is beyond the last that it saw, by a column that rises."""

    def __init__(self, column: str, dsn: str, stop: threading.Event) -> None:
        super().__init__(name=f"cursor-{column}")
        self.seen: set[UUID] = set()
        self._column = column
        self._dsn = dsn
        self._halt = stop

    def run(self) -> None:
        last = "0" if self._column == "number" else "-infinity"
        query = f"SELECT {self._column}::text, id FROM {TABLE} WHERE {self._column} > %s ORDER BY {self._column}"
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while True:
                ended = self._halt.is_set()  # then once more, for what was committed last
                for value, id_ in connection.execute(query.encode(), (last,)).fetchall():
                    last = value
                    self.seen.add(id_)
                if ended:
                    return
                time.sleep(0.02)


class Doomed:
    """A sealer that is started again whenever it has died, and killed from outside as well."""

    def __init__(self, spec: dict[str, Any], folder: Path) -> None:
        self._command = [sys.executable, "-m", "tests.faults.sealing", json.dumps(spec)]
        self._log = (folder / f"sealer-{spec['chance']}.log").open("ab")
        self.kills = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)

    def revive(self) -> None:
        """Start it again if it is dead."""
        if self.process.poll() is not None:
            if self.process.returncode != -signal.SIGKILL:
                raise FaultError(f"a sealer ended with {self.process.returncode}: {self.tail()}")
            self.kills += 1
            self.process = self._start()

    def tail(self) -> str:
        return Path(self._log.name).read_text()[-3000:]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def close(self) -> None:
        self.kill()
        self._log.close()


@pytest.fixture
def prepared_server() -> Iterator[Server]:
    """A server that lets transactions be prepared."""
    folder = Path(tempfile.mkdtemp(prefix="tracevault-faults-"))
    server = Server(folder)
    try:
        server.sql("ALTER SYSTEM SET max_prepared_transactions = 64", "CREATE DATABASE hostile")
        server.stop()
        server.start()
        server.sql(generate_init_sql(TABLE), dbname="hostile")
        server.sql(f"ALTER TABLE {TABLE} ADD COLUMN number bigint GENERATED ALWAYS AS IDENTITY", dbname="hostile")
        yield server
    finally:
        server.release()
        shutil.rmtree(folder, ignore_errors=True)


def _hold_open(dsn: str, cursors: list[NaiveCursor], committed: set[UUID]) -> UUID:
    """Insert a row, and commit it only when all cursors have passed by its place."""
    held = uuid7()
    with psycopg.connect(dsn) as late, psycopg.connect(dsn, autocommit=True) as early:
        late.execute(_INSERT.encode(), (held, "held.open", "{}", None))
        after = uuid7()
        early.execute(_INSERT.encode(), (after, "passes.by", "{}", None))
        committed.add(after)
        deadline = time.monotonic() + 30
        while not all(after in cursor.seen for cursor in cursors):
            if time.monotonic() > deadline:
                raise VacuousError("the cursors do not follow")
            time.sleep(0.02)
        # That it does not hold the sealers up is part of the promise.
        while not early.execute("SELECT FROM tracevault_leaves WHERE id = %s", (after,)).fetchall():
            if time.monotonic() > deadline:
                raise FaultError("an open transaction holds the sealers up")
            time.sleep(0.02)
        late.commit()
    committed.add(held)
    return held


def _query(dsn: str, query: str, *params: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query.encode(), params).fetchall()


def _prove_all(dsn: str, notes: list[tuple[int, str]], trusted: Trust) -> None:
    """Prove each checkpoint consistent with every earlier one, by the tiles as they are now."""
    points = [trusted.opened(Note.parse(text), ORIGIN) for _, text in notes]
    assert [point.size for point in points] == [size for size, _ in notes]
    with psycopg.connect(dsn, autocommit=True) as connection:
        tree = connection.execute("SELECT tree, size FROM tracevault_trees").fetchone()
        assert tree is not None
        number, size = tree
        read = tile_reader(lambda tiles: run(connection, read_tiles(number, tiles), Place("proving")), size)
        for old, new in combinations(points, 2):
            verify_consistency(old.size, new.size, old.root, new.root, consistency_proof(old.size, new.size, read))


class Run:
    """Writers, cursors and two sealers at work for `SECONDS`, and what became of it."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self.signer = generate(NAME)
        write_key(folder / "key", self.signer)
        spec = {"dsn": dsn, "key": str(folder / "key"), "tables": [TABLE], "batch": BATCH}
        self._stop = threading.Event()
        self.lasting = Doomed({**spec, "every": 0.15, "chance": 0.0}, folder)
        self.dying = Doomed({**spec, "every": 0.01, "chance": 0.02}, folder)
        self.writers = [Writer(number, dsn, self._stop) for number in range(WRITERS)]
        self.cursors = [NaiveCursor(column, dsn, self._stop) for column in ("occurred_at", "number")]
        self.committed: set[UUID] = set()
        self.rolled_back: set[UUID] = set()
        self.held: list[UUID] = []
        self.checkpoints: dict[int, str] = {}

    def carry_out(self) -> None:
        """Let them work, and wait until everything is sealed."""
        try:
            for thread in (*self.cursors, *self.writers):
                thread.start()
            self._disturb()
            self._stop.set()
            for thread in (*self.writers, *self.cursors):
                thread.join(60)
                assert not thread.is_alive()
            for writer in self.writers:
                assert writer.error is None
                self.committed |= writer.committed
                self.rolled_back |= writer.rolled_back
            deadline = time.monotonic() + 60
            while _sealed(self.dsn) < len(self.committed):
                self.dying.revive()
                if time.monotonic() > deadline:
                    raise FaultError(f"sealed {_sealed(self.dsn)} of {len(self.committed)}; {self.lasting.tail()}")
                time.sleep(0.1)
        finally:
            self._stop.set()
            for sealer in (self.dying, self.lasting):
                sealer.close()
        _collect(self.dsn, self.checkpoints)
        for sealer in (self.lasting, self.dying):
            if sealer.tail():
                raise FaultError(f"a sealer complains: {sealer.tail()}")

    def _disturb(self) -> None:
        """Kill a sealer again and again, hold transactions open, and keep every checkpoint that comes by."""
        chosen, began = random.Random(SEED), time.monotonic()
        next_kill = began + 2
        while (now := time.monotonic()) < began + SECONDS:
            time.sleep(0.1)
            self.dying.revive()
            if self.lasting.process.poll() is not None:
                raise FaultError(f"the other sealer ended: {self.lasting.tail()}")
            if now > next_kill:
                self.dying.kill()
                next_kill = now + chosen.uniform(0.5, 2.5)
            if len(self.held) < HELD and now - began > 5 * (len(self.held) + 1):
                self.held.append(_hold_open(self.dsn, self.cursors, self.committed))
            if _query(self.dsn, "SELECT to_regclass('tracevault_checkpoints') IS NOT NULL") == [(True,)]:
                _collect(self.dsn, self.checkpoints)


@pytest.mark.timeout(300)
def test_hostile_writers_and_dying_sealers(prepared_server: Server, tmp_path: Path) -> None:
    dsn = make_conninfo(prepared_server.admin, dbname="hostile")
    work = Run(dsn, tmp_path)
    work.carry_out()
    committed = work.committed

    leaves = _query(dsn, "SELECT index, id FROM tracevault_leaves ORDER BY index")
    assert {id_ for (id_,) in _query(dsn, f"SELECT id FROM {TABLE}")} == committed
    assert [index for index, _ in leaves] == list(range(len(committed)))
    assert {id_ for _, id_ in leaves} == committed

    notes = sorted(work.checkpoints.items())
    known = verifiers([work.signer], ORIGIN)
    _prove_all(dsn, notes, Trust(known))
    outside = Witnessed("the outside", Note.parse(notes[-1][1]))
    with psycopg.connect(dsn, autocommit=True) as connection:
        report = verify(connection, TABLE, Trust(known, outside=[outside]))
    assert report.verdict is Verdict.OK, report.problems
    assert (report.size, report.checked, report.unsealed, report.unsigned) == (len(committed), len(committed), 0, 0)
    assert report.anchor is not None
    assert report.anchor.size == len(committed)

    lost = [committed - cursor.seen for cursor in work.cursors]
    print(
        f"{len(committed):,} rows, {len(work.rolled_back):,} rolled back, {len(leaves):,} sealed; missed by a cursor "
        f"on time {len(lost[0]):,}, by one on a serial {len(lost[1]):,}; {len(notes):,} checkpoints, "
        f"{work.dying.kills} kills"
    )
    kinds = {kind for writer in work.writers for kind in writer.kinds}
    if not all(missed.issuperset(work.held) for missed in lost) or len(work.held) < HELD:
        raise VacuousError("the naive cursors did not lose the rows of transactions that were held open")
    if work.dying.kills < 5 or len(notes) < 20 or len(kinds) < 5 or not work.rolled_back or len(committed) < 1000:
        raise VacuousError(f"{work.dying.kills} kills, {len(notes)} checkpoints, {len(committed)} rows, {kinds}")


def _sealed(dsn: str) -> int:
    return int(_query(dsn, "SELECT coalesce(max(size), 0) FROM tracevault_checkpoints")[0][0])


def _collect(dsn: str, collected: dict[int, str]) -> None:
    """Keep every checkpoint that is stored; one of before may be signed again, and must say the same."""
    for size, text in _query(dsn, "SELECT size, note FROM tracevault_checkpoints ORDER BY size"):
        before = collected.setdefault(size, text)
        if Note.parse(before).text != Note.parse(text).text:
            raise FaultError(f"the checkpoint of size {size} was replaced by another one")
    missing = collected.keys() - {size for (size,) in _query(dsn, "SELECT size FROM tracevault_checkpoints")}
    if missing:
        raise FaultError(f"checkpoints are gone: {sorted(missing)[:5]}")
