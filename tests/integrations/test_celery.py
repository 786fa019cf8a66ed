"""Celery: real workers over a folder and over Redis, and what becomes of strange headers."""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.contrib.testing.worker import start_worker

import tracevault
from tests.conftest import rows
from tests.integrations.conftest import Start, free_port, run_example
from tracevault.integrations.celery import HEADER, MOST, install

REDIS = shutil.which("redis-server")


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """A Redis of the test's own."""
    if REDIS is None:
        pytest.skip("needs Debian's redis-server")
    port = free_port()
    command = [REDIS, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with closing(redis.Redis(port=port)) as client:
        for _ in range(100):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        else:
            pytest.fail("redis-server does not answer")
    yield f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait()


WORKER = ("celery", "-A", "app", "worker", "--pool", "prefork", "--concurrency", "2", "--loglevel", "info")


def test_the_example_over_a_folder(start: Start, ready_dsn: str, url: str, tmp_path: Path) -> None:
    folder = {"BROKER_FOLDER": str(tmp_path / "broker")}
    # Before the worker starts: it would lose a message that it sees half written.
    run_example(
        "celery",
        "python",
        "order.py",
        "ann",
        "tea",
        "120",
        "bea",
        "coffee",
        "-1",
        "cid",
        "milk",
        "90",
        url=url,
        **folder,
    )
    worker = start("celery", *WORKER, http=False, **folder)
    found = worker.await_rows(
        ready_dsn,
        "SELECT event, actor_id, correlation_id, target_id, meta FROM audit_logs ORDER BY actor_id",
        count=2,
    )
    worker.await_true(lambda: "no price is below nothing" in worker.output)
    assert found == [
        ("price.changed", user, f"order-of-{user}", item, {"task": "app.change_price"})
        for user, item in (("ann", "tea"), ("cid", "milk"))
    ]
    assert rows(ready_dsn, "SELECT item FROM prices ORDER BY 1") == [("milk",), ("tea",)]
    assert rows(
        ready_dsn, "SELECT count(*) FROM audit_logs WHERE stored_xid::text NOT IN (SELECT xmin::text FROM prices)"
    ) == [(0,)]


def test_many_users_do_not_cross_and_tasks_pass_it_on(start: Start, ready_dsn: str, url: str, redis_url: str) -> None:
    users = [f"user-{number}" for number in range(60)]
    broker = {"BROKER_URL": redis_url}
    worker = start("celery", *WORKER, http=False, **broker)
    run_example(
        "celery",
        "python",
        "order.py",
        *(word for user in users for word in (user, f"item-of-{user}", "7")),
        url=url,
        **broker,
    )
    query = "SELECT event, actor_id, correlation_id, target_id, meta FROM audit_logs"
    worker.await_rows(ready_dsn, query, count=3 * len(users))
    found = rows(ready_dsn, query)
    assert all(
        (correlation, target) == (f"order-of-{actor}", f"item-of-{actor}") for _, actor, correlation, target, _ in found
    )
    told = sorted(
        (actor, meta["task"], meta.get("retries", 0)) for event, actor, _, _, meta in found if event != "price.changed"
    )
    assert told == sorted((user, "app.tell", retry) for user in users for retry in (0, 1))
    requests = rows(ready_dsn, "SELECT count(DISTINCT request_id) FROM audit_logs")
    assert requests == [(2 * len(users),)]  # a task's id; a retry keeps it


class Worker:
    """A Celery app in memory with a worker in a thread, whose tasks tell what they see."""

    def __init__(self) -> None:
        self.app = Celery("tests", broker="memory://", backend="cache+memory://")
        self.app.conf.update(worker_hijack_root_logger=False, task_store_eager_result=False)
        install()
        install()  # twice is once
        app = self.app

        @app.task(name="see", shared=False)
        def see() -> Any:
            return {**tracevault.current_context(), "thread": threading.get_ident()}

        @app.task(name="fail", shared=False)
        def fail() -> None:
            tracevault.set_context(actor={"id": "failed", "type": "user"})
            raise RuntimeError("no")

        @app.task(name="outer", shared=False)
        def outer() -> Any:
            inner = see.apply().get()
            return [inner, tracevault.current_context()]

        self.see, self.fail, self.outer = see, fail, outer


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made, level = Worker(), logging.root.level
    with start_worker(made.app, perform_ping_check=False, pool="solo", shutdown_timeout=20):
        yield made
    logging.root.setLevel(level)  # which the worker has set


ANN = {"id": "ann", "type": "user"}


def test_the_context_is_restored_and_cleared(worker: Worker) -> None:
    with tracevault.context(
        actor=ANN,
        on_behalf_of={"id": "bea", "type": "user"},
        tenant_id="t",
        correlation_id="c",
        request_id="of the web request",
        meta={"ip": "1", "price": Decimal("1.50"), "at": datetime(2026, 1, 1, tzinfo=UTC)},
    ):
        result = worker.see.delay()
        seen = result.get(timeout=20, interval=0.02)
    del seen["thread"]
    assert seen == {
        "actor": ANN,
        "on_behalf_of": {"id": "bea", "type": "user"},
        "tenant_id": "t",
        "correlation_id": "c",
        "request_id": result.id,
        "meta": {"ip": "1", "price": "1.50", "at": "2026-01-01 00:00:00+00:00", "task": "see"},
    }
    with pytest.raises(RuntimeError):
        worker.fail.delay().get(timeout=20, interval=0.02)
    alone = worker.see.delay()
    seen = alone.get(timeout=20, interval=0.02)
    del seen["thread"]
    assert seen == {"correlation_id": alone.id, "request_id": alone.id, "meta": {"task": "see"}}


STRANGE = (
    "no JSON",
    "[1]",
    7,
    '{"actor": "ann"}',
    '{"correlation_id": ""}',
    '{"meta": {"a": NaN}, "tenant_id": "' + "x" * MOST + '"}',
    "[" * 5000,
)


def test_a_strange_header_does_not_fail_the_task(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    from celery import signals

    def forge(headers: dict[str, Any], **_: Any) -> None:
        headers[HEADER] = header

    signals.before_task_publish.connect(forge, weak=False)
    try:
        for header in STRANGE:
            with caplog.at_level(logging.WARNING, "tracevault"):
                result = worker.see.delay()
                seen = result.get(timeout=20, interval=0.02)
            assert seen["correlation_id"] == result.id, header
            assert "actor" not in seen, header
            assert "ignored" in caplog.text, header
            caplog.clear()
    finally:
        signals.before_task_publish.disconnect(forge)


def test_a_meta_that_cannot_travel_is_left_behind(worker: Worker) -> None:
    for meta in ({"long": "x" * MOST}, {"nan": float("nan")}):
        with tracevault.context(actor=ANN, meta=meta):
            seen = worker.see.delay().get(timeout=20, interval=0.02)
        assert (seen["actor"], seen["meta"]) == (ANN, {"task": "see"})


def test_eager_tasks_run_in_the_callers_context(worker: Worker) -> None:
    with tracevault.context(actor=ANN, correlation_id="c"):
        inner = worker.see.apply().get()
        assert (inner["actor"], inner["correlation_id"], inner["meta"]) == (ANN, "c", {"task": "see"})
        assert tracevault.current_context() == {"actor": ANN, "correlation_id": "c"}
        inner, outer = worker.outer.delay().get(timeout=20, interval=0.02)
        assert (inner["actor"], inner["meta"]) == (ANN, {"task": "see"})
        assert outer["meta"] == {"task": "outer"}
