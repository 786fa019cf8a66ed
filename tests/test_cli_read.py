"""The commands that read: tail, trace, history, diff, histogram, facets, cursors, counts, and the query text."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.conftest import rows
from tests.servers import one_server
from tests.test_cli import Cli, cli, command, emit, environment, found, in_terminal, plain
from tracevault import Tracevault

__all__ = ["cli"]  # the fixture

pytestmark = one_server
EVIL = "\x1b[31mred\u202e"


def product(dsn: str) -> list[str]:
    """Store what became of one product, and return the ids."""
    target = {"id": "456", "type": "product"}
    with Tracevault(connection_string=dsn) as audit:
        versions: list[Any] = [{}, {"price": 1, "name": EVIL}, {"price": 2, "name": EVIL}, {"price": 2}]
        ids = [
            audit.emit_diff("product.changed", before=before, after=after, target=target, correlation_id="op").id
            for before, after in itertools.pairwise(versions)
        ]
        ids.append(
            audit.emit("product.viewed", target=target, data={"price": 5}, actor={"id": EVIL, "type": "user"}).id
        )
    return list(map(str, ids))


def test_find_walks_by_cursor(cli: Cli, ready_dsn: str) -> None:
    emit(ready_dsn, *({"event": f"e{n}", "occurred_at": f"2026-01-0{n}"} for n in range(1, 8)))
    seen: list[str] = []
    more: list[str] = []
    while True:
        done = cli("find", "--dsn", ready_dsn, "--limit", "3", "--event-prefix", "e", *more)
        seen += [record["event"] for record in found(done)]
        if not done.err:
            break
        assert done.err.startswith("more: --cursor ")
        more = done.err.removeprefix("more: ").split()
    assert seen == [f"e{n}" for n in range(7, 0, -1)]
    assert cli("find", "--dsn", ready_dsn, *more).code == 2
    # What is asked back from now is asked from a moment on, on the next page.
    emit(ready_dsn, *({"event": f"now {n}"} for n in range(5)))
    done = cli("find", "--dsn", ready_dsn, "--limit", "3", "--where", 'since:1d event:"now "*')
    assert done.err.startswith("more: --where ")
    rest = cli("find", "--dsn", ready_dsn, "--limit", "3", *shlex.split(done.err.removeprefix("more: ")))
    assert [record["event"] for record in found(rest)] == ["now 1", "now 0"]
    assert rest.err == ""
    assert cli("find", "--dsn", ready_dsn, "--offset", "1", *more).code == 2


def test_counts(cli: Cli, ready_dsn: str) -> None:
    emit(ready_dsn, *({"event": "a"} for _ in range(5)))
    assert cli("count", "--dsn", ready_dsn, "--at-most", "3").out == "3 or more\n"
    assert cli("count", "--dsn", ready_dsn, "--at-most", "5").out == "5\n"
    assert cli("count", "--dsn", ready_dsn, "--estimate").out.startswith("about ")
    assert cli("count", "--dsn", ready_dsn, "--estimate", "--at-most", "5").code == 2


def test_where(cli: Cli, ready_dsn: str) -> None:
    product(ready_dsn)
    assert cli("count", "--dsn", ready_dsn, "--where", "event:product.* target:product/456").out == "4\n"
    assert cli("count", "--dsn", ready_dsn, "--where", "data.price:5", "--target-id", "456").out == "1\n"
    done = cli("count", "--dsn", ready_dsn, "--where", "event:a acter:b")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[1:] == ["  event:a acter:b", "          ^^^^^"]
    twice = cli("count", "--dsn", ready_dsn, "--where", "event:a", "--event", "b")
    assert (twice.code, "twice" in twice.err) == (2, True)


@pytest.mark.parametrize("value", ["n", "=1", "a..b=1", "n=1,n"])
def test_paths_of_payloads_are_checked(cli: Cli, ready_dsn: str, value: str) -> None:
    code = cli("count", "--dsn", ready_dsn, "--data", value).code
    assert code == (0 if value == "n=1,n" else 2)
    assert cli("count", "--dsn", ready_dsn, "--data", "n=1", "--data", "n=2").code == 2


def test_history(cli: Cli, ready_dsn: str) -> None:
    ids = product(ready_dsn)
    *changes, last = found(cli("history", "product", "456", "--dsn", ready_dsn))
    assert [change["record"]["id"] for change in changes] == ids
    assert changes[1]["fields"] == [{"name": "price", "kind": "changed", "before": 1, "after": 2}]
    assert last == {"state": {"price": 2}, "is_complete": True}
    newest = cli("history", "product", "456", "--dsn", ready_dsn, "--limit", "1")
    assert (newest.code, newest.err) == (0, "older changes were not read: --limit 1\n")
    none = cli("history", "product", "7", "--dsn", ready_dsn)
    assert (none.code, none.err) == (1, "no events\n")
    shown = in_terminal("history", "product", "456", "--dsn", ready_dsn, columns=120)
    assert "\x1b[31mred" not in shown.out
    assert "\u202e" not in shown.out
    assert "price  1 → 2" in plain(shown.out)
    assert '{"price": 2}' in plain(shown.out)


def test_trace_and_diff(cli: Cli, ready_dsn: str) -> None:
    ids = product(ready_dsn)
    assert [record["id"] for record in found(cli("trace", "op", "--dsn", ready_dsn))] == ids[:3]
    assert cli("trace", "op", "--dsn", ready_dsn, "--limit", "2").err == "perhaps more: --limit 2\n"
    assert cli("trace", "none", "--dsn", ready_dsn).code == 1
    assert found(cli("diff", ids[1], "--dsn", ready_dsn)) == [
        {"name": "price", "kind": "changed", "before": 1, "after": 2}
    ]
    two = found(cli("diff", ids[0], ids[3], "--dsn", ready_dsn))
    assert [(field["name"], field["kind"]) for field in two] == [("name", "removed"), ("price", "changed")]
    for arguments, says in (
        ([ids[3]], "tells of no change"),
        ([ids[1], ids[1]], "nothing differs"),
        ([str(uuid4())], "not found"),
        ([ids[0], str(uuid4())], "not found"),
    ):
        done = cli("diff", *arguments, "--dsn", ready_dsn)
        assert (done.code, says in done.err) == (1, True)
    assert plain(in_terminal("diff", ids[1], "--dsn", ready_dsn).out).strip() == "price  1 → 2"


def test_histogram_and_facets(cli: Cli, ready_dsn: str) -> None:
    emit(
        ready_dsn,
        *({"event": f"e{n % 3}", "occurred_at": f"2026-01-01T0{n}:30:00Z", "environment": EVIL} for n in range(8)),
    )
    window = ["--since", "2026-01-01", "--until", "2026-01-01T05:59:00Z", "--dsn", ready_dsn]
    assert [bucket["count"] for bucket in found(cli("histogram", "2h", *window))] == [2, 2, 2]
    assert found(cli("histogram", "day", *window))[0] == {
        "start": "2026-01-01T00:00:00.000Z",
        "end": "2026-01-02T00:00:00.000Z",
        "count": 6,
    }
    cut = cli("histogram", "hour", *window, "--at-most", "2")
    assert cut.err == "counted since 2026-01-01T04:30:00.000Z: more than 2 events\n"
    assert cli("histogram", "hour", "--dsn", ready_dsn).code == 2
    assert cli("histogram", "2y", *window).code == 2
    assert found(cli("facets", "event", *window)) == [{"value": f"e{n}", "count": 2} for n in range(3)]
    top = cli("facets", "event", *window, "--top", "1")
    assert (len(found(top)), top.err) == (1, "4 events have other values: --top 1\n")
    assert cli("facets", "data", *window).code == 2
    shown = in_terminal("facets", "environment", *window)
    assert "\x1b[31mred" not in shown.out
    assert "██" in shown.out
    assert "██" in in_terminal("histogram", "2h", *window).out


def test_tail_goes_on_where_it_ended(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    emit(ready_dsn, {"event": "old"})
    state = ["--state", str(tmp_path / "place"), "--once", "--dsn", ready_dsn]
    assert found(cli("tail", *state)) == []
    emit(ready_dsn, {"event": "a"}, {"event": "b"})
    assert [record["event"] for record in found(cli("tail", *state))] == ["a", "b"]
    assert found(cli("tail", *state)) == []
    emit(ready_dsn, {"event": "c"})
    assert [record["event"] for record in found(cli("tail", *state, "--event", "c"))] == ["c"]
    everything = cli("tail", "--once", "--from-beginning", "--dsn", ready_dsn)
    assert [record["event"] for record in found(everything)] == ["old", "a", "b", "c"]
    (tmp_path / "place").write_text("nonsense")
    assert cli("tail", *state).code == 2


def test_tail_follows_until_it_is_interrupted(ready_dsn: str, tmp_path: Path) -> None:
    state = tmp_path / "place"
    process = subprocess.Popen(
        command("tail", "--state", str(state), "--dsn", ready_dsn), env=environment(), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        deadline = time.monotonic() + 20
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for event in ("one", "two"):
            emit(ready_dsn, {"event": event})
            assert json.loads(process.stdout.readline())["event"] == event
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stdout.read() == b""
    finally:
        process.kill()
        process.stdout.close()
    with Tracevault(connection_string=ready_dsn) as audit:
        assert list(audit.query.tail(after=state.read_text().strip(), follow=False)) == []


def test_tail_waits_for_a_database_that_is_away(ready_dsn: str) -> None:
    with Tracevault(connection_string=ready_dsn) as audit:
        process = subprocess.Popen(
            command("tail", "--from-beginning", "--dsn", ready_dsn),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            audit.emit("before")
            assert json.loads(process.stdout.readline())["event"] == "before"
            name = ready_dsn.split("dbname=")[1].split(maxsplit=1)[0]
            admin = ready_dsn.replace(f"dbname={name}", "dbname=postgres")
            rows(admin, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            rows(admin, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            assert process.stderr.readline().startswith(b"waiting: ")
            rows(admin, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            assert process.stderr.readline() == b"following again\n"
            audit.emit("after")
            assert json.loads(process.stdout.readline())["event"] == "after"
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()


def test_bench_cleans_up(cli: Cli, dsn: str) -> None:
    measured = found(cli("bench", "--events", "100", "--dsn", dsn))
    assert [line["what"] for line in measured][-2:] == ["find_page, 50 events", "iterate"]
    assert all(line["per_second"] > 0 for line in measured)
    left = (
        "SELECT relname FROM pg_class WHERE relname ~ 'bench' UNION SELECT proname FROM pg_proc WHERE proname ~ 'bench'"
    )
    assert rows(dsn, left) == []
    assert "per second" in in_terminal("bench", "--events", "100", "--dsn", dsn).out
