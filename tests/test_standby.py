"""Following the log on a standby: nothing is skipped there either, and a place reached on the primary holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests import servers
from tests.conftest import TEMPLATE, database, rows
from tests.faces import Face, opener
from tracevault import AuditRecord, Tail, Tracevault
from tracevault.flows import Flow, Query
from tracevault.postgres.failures import Place

pytestmark = pytest.mark.skipif("15" not in servers.VERSIONS, reason="needs Debian's PostgreSQL 15")


@pytest.fixture(scope="module")
def pair(running: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Conninfos of one database on a primary, and on its standby."""
    primary = running("15")
    for dsn in database(primary, TEMPLATE):
        name = psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
        with servers.standby(primary) as copy:
            yield dsn, make_conninfo(copy, dbname=str(name))


def insert(connection: psycopg.Connection[Any], event: str) -> None:
    connection.execute(
        b"INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), %s, 'sync', now())", (event,)
    )


def follow(tail: Tail, until: str, seconds: float = 20) -> list[str]:
    """Return the events that come until one is there; replication takes its time."""
    seen: list[AuditRecord] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        seen += list(tail)
        if until in {record.event for record in seen}:
            return [record.event for record in seen]
        time.sleep(0.1)
    raise AssertionError(f"{until} has not come; there were {[record.event for record in seen]}")


def reading(primary: str, copy: str) -> Tracevault:
    """A vault that writes to the primary, and reads from the standby."""
    return Tracevault(connection_string=primary, read_connection_string=copy, bootstrap={"ensure_schema": False})


def test_nothing_is_skipped_on_a_standby(pair: tuple[str, str]) -> None:
    primary, copy = pair
    with reading(primary, copy) as audit, Tracevault(connection_string=primary) as at_primary:
        tail = audit.query.tail(follow=False).start()
        there = at_primary.query.tail(follow=False).start()
        with psycopg.connect(primary) as late, psycopg.connect(primary) as never:
            insert(never, "never")
            insert(late, "late")
            at_primary.emit("early")
            time.sleep(1.0)
            # What is under way cannot be told on a standby, so what came after it waits for it.
            assert list(tail) == []
            assert [record.event for record in there] == ["early"]
            reached = there.position
            late.commit()
            never.rollback()
        at_primary.emit("last")
        assert sorted(follow(tail, "last")) == ["early", "last", "late"]
        # From the place that was reached on the primary, nothing comes twice.
        moved = audit.query.tail(after=reached, follow=False)
        assert sorted(follow(moved, "last")) == ["last", "late"]
        at_primary.emit("newest")
        assert follow(moved, "newest") == ["newest"]
        # And back again.
        assert list(at_primary.query.tail(after=moved.position, follow=False)) == []
        at_primary.emit("after all")
        assert [r.event for r in at_primary.query.tail(after=moved.position, follow=False)] == ["after all"]


def test_pages_and_counts_on_a_standby(pair: tuple[str, str]) -> None:
    primary, copy = pair
    with reading(primary, copy) as audit:
        audit.emit_many(f"page.{n}" for n in range(30))
        follow(audit.query.tail(after="beginning", follow=False, event="page.29"), "page.29")
        assert len(list(audit.query.iterate(event_prefix="page.", page_size=7, order="asc"))) == 30
        assert sum(b.count for b in audit.query.histogram("day", since="2020-01-01", until="2020-01-02").buckets) == 0
        assert audit.query.facets("event", since="2020-01-01", event_prefix="page.", top=1).others == 29


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_a_replica_that_is_too_far_behind_is_not_read_from(pair: tuple[str, str], kind: str) -> None:
    primary, copy = pair
    options = {"connection_string": primary, "read_connection_string": copy, "bootstrap": {"ensure_schema": False}}
    opened: list[Face] = []
    with opener(kind, opened) as open_vault:
        fresh, any_age = open_vault(**options, max_staleness=0.4), open_vault(**options)
        unreached = open_vault(**{**options, "read_connection_string": f"{copy} port=1"}, max_staleness=0.4)

        def found(audit: Face, event: str, seconds: float = 10) -> bool:
            deadline = time.monotonic() + seconds
            while audit.query.count(event=event) == 0:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)
            return True

        # Nothing happens for a while: the replica is not behind, however old its last transaction is.
        time.sleep(1.0)
        fresh.emit(f"{kind}.one")
        assert found(any_age, f"{kind}.one")
        assert in_recovery(fresh)
        rows(copy, "SELECT pg_wal_replay_pause()")
        try:
            fresh.emit(f"{kind}.two")
            time.sleep(1.0)
            assert not in_recovery(fresh)
            assert fresh.query.count(event=f"{kind}.two") == 1
            assert any_age.query.count(event=f"{kind}.two") == 0
            assert len(list(fresh.query.iterate(event=f"{kind}.two"))) == 1
        finally:
            rows(copy, "SELECT pg_wal_replay_resume()")
        assert found(any_age, f"{kind}.two")
        time.sleep(0.5)
        assert in_recovery(fresh)
        assert unreached.query.count(event=f"{kind}.two") == 1
        for vault in opened:
            vault.close_quietly()


def in_recovery(audit: Face) -> bool:
    """Whether a vault reads from a replica now."""

    def ask() -> Flow[bool]:
        found = yield Query("SELECT pg_is_in_recovery()")
        return bool(found.rows[0][0])

    found: bool = audit._call(audit.vault._engine, "read", ask, Place("testing"))
    return found
