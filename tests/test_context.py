"""What events take from the context around them, and what they do not."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import servers
from tests.conftest import rows
from tests.faces import OpenVault
from tracevault import (
    Actor,
    ConfigError,
    Tracevault,
    TracevaultError,
    ValidationError,
    context,
    current_context,
    propagation_headers,
    read_correlation_id_header,
    read_traceparent_header,
    set_context,
    start_tracevault,
)

TRACEPARENT = f"00-{'a' * 32}-{'b' * 16}-01"
ANN, BEA = {"id": "ann", "type": "user"}, {"id": "bea", "type": "user"}


@pytest.fixture(scope="session")
def server(running: Callable[[str], str]) -> str:
    """The newest server alone: none of this depends on its version."""
    return running(servers.VERSIONS[0])


def stored(dsn: str, *columns: str) -> list[tuple[Any, ...]]:
    return rows(dsn, f"SELECT {', '.join(columns)} FROM audit_logs ORDER BY occurred_at, id")


def test_an_event_takes_what_it_does_not_say_itself(face: OpenVault, ready_dsn: str) -> None:
    audit = face(connection_string=ready_dsn)
    with context(actor=ANN, tenant_id="t", correlation_id="c", request_id="r", meta={"ip": "1", "a": 1}):
        audit.emit("one")
        audit.emit("two", actor=BEA, tenant_id="t2", correlation_id="c2", request_id="r2", meta={"a": 2, "b": 3})
        audit.emit_diff("three", before={"x": 1}, after={"x": 2})
        audit.emit_many(["four", {"event": "five", "actor": BEA}])
    audit.emit("six")
    found = stored(ready_dsn, "event", "actor_id", "tenant_id", "correlation_id", "request_id", "meta")
    common = ("t", "c", "r", {"ip": "1", "a": 1})
    assert found == [
        ("one", "ann", *common),
        ("two", "bea", "t2", "c2", "r2", {"ip": "1", "a": 2, "b": 3}),
        ("three", "ann", *common),
        ("four", "ann", *common),
        ("five", "bea", *common),
        ("six", None, None, None, None, None),
    ]


def test_contexts_nest_and_end() -> None:
    with context(actor=ANN, correlation_id="outer", meta={"a": 1, "b": 1}):
        with context(correlation_id="inner", meta={"b": 2}):
            assert current_context() == {"actor": ANN, "correlation_id": "inner", "meta": {"a": 1, "b": 2}}
            with context(inherit=False, tenant_id="t"):
                assert current_context() == {"tenant_id": "t"}
        assert current_context("correlation_id", "meta") == {"correlation_id": "outer", "meta": {"a": 1, "b": 1}}
        with pytest.raises(ZeroDivisionError), context(actor=BEA):
            raise ZeroDivisionError
        assert current_context("actor") == {"actor": ANN}
    assert current_context() == {}


def test_the_actor_may_be_known_later(face: OpenVault, ready_dsn: str) -> None:
    audit = face(connection_string=ready_dsn)
    users: list[Any] = [None, Actor("ann", "user"), BEA]
    with context(actor=lambda: users[0], meta=lambda: {"left": len(users)}), context(meta={"more": True}):
        while users:
            audit.emit("seen")
            del users[0]
    assert stored(ready_dsn, "actor_id", "meta") == [
        (None, {"left": 3, "more": True}),
        ("ann", {"left": 2, "more": True}),
        ("bea", {"left": 1, "more": True}),
    ]


def test_impersonation(face: OpenVault, ready_dsn: str) -> None:
    audit = face(connection_string=ready_dsn)
    with context(actor=ANN, on_behalf_of=Actor("bea", "user"), meta={"ip": "1"}):
        audit.emit("one")
        assert current_context()["on_behalf_of"] == BEA
    assert stored(ready_dsn, "actor_id", "meta") == [("ann", {"ip": "1", "on_behalf_of": BEA})]


def test_a_trace_of_the_caller_gives_way_to_a_nearer_one(face: OpenVault, ready_dsn: str) -> None:
    span: dict[str, str] = {}
    audit = face(connection_string=ready_dsn, context_sources=[lambda: span])
    with context(traceparent=TRACEPARENT):
        audit.emit("of the caller")
        span |= {"trace_id": "c" * 32, "span_id": "d" * 16}
        audit.emit("of the span")
        audit.emit("its own", trace_id="e" * 32)
    assert stored(ready_dsn, "trace_id", "span_id") == [
        ("a" * 32, "b" * 16),
        ("c" * 32, "d" * 16),
        ("e" * 32, None),
    ]


def test_sources_stand_in_for_what_nothing_else_gives(face: OpenVault, ready_dsn: str) -> None:
    first = {"actor": BEA, "tenant_id": "first", "meta": {"source": 1, "first": 1}}
    second = {"tenant_id": "second", "request_id": "r", "meta": {"source": 2}}
    audit = face(connection_string=ready_dsn, context_sources=[lambda: first, lambda: None, lambda: second])
    audit.emit("alone")
    with context(actor=ANN, meta={"source": 0}):
        audit.emit("inside")
    meta = {"source": 1, "first": 1}
    assert stored(ready_dsn, "actor_id", "tenant_id", "request_id", "meta") == [
        ("bea", "first", "r", meta),
        ("ann", "first", "r", {**meta, "source": 0}),
    ]


def test_a_source_that_gives_something_else_is_named(face: OpenVault, ready_dsn: str) -> None:
    audit = face(connection_string=ready_dsn, context_sources=[lambda: {"actr": ANN}])
    with pytest.raises(ValidationError, match="did you mean `actor`"):
        audit.emit("one")
    for wrong in ("no", [1], {"a": 1}):
        with pytest.raises(ConfigError) as refusal:
            face(connection_string=ready_dsn, context_sources=wrong)
        assert refusal.value.field == "context_sources"

    async def waits() -> None: ...

    with pytest.raises(ConfigError, match="coroutine"):
        face(connection_string=ready_dsn, context_sources=[waits])


def test_what_the_context_adds_is_masked_and_limited(face: OpenVault, ready_dsn: str) -> None:
    audit = face(connection_string=ready_dsn, mask_fields=["token"], max_event_bytes=200)
    with context(meta={"token": "hunter2"}):
        audit.emit("one")
    assert stored(ready_dsn, "meta") == [({"token": "[REDACTED]"},)]
    with context(meta={"long": "x" * 300}), pytest.raises(ValidationError, match="max_event_bytes"):
        audit.emit("two")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"actor": "ann"}, "actor"),
        ({"actor": {"id": "", "type": "user"}}, "actor.id"),
        ({"on_behalf_of": {"id": "x"}}, "on_behalf_of.type"),
        ({"correlation_id": "x" * 513}, "correlation_id"),
        ({"request_id": ""}, "request_id"),
        ({"tenant_id": "a\0"}, "tenant_id"),
        ({"meta": ["ip"]}, "meta"),
        ({"traceparent": "00-abc"}, "traceparent"),
        ({"traceparent": lambda: TRACEPARENT}, "traceparent"),
        ({"actr": ANN}, "actr"),
    ],
)
def test_a_value_that_no_event_could_have_is_refused_at_once(fields: Any, field: str) -> None:
    for add in (context, set_context):
        with context(), pytest.raises(ValidationError) as refusal:
            add(**fields)
        assert refusal.value.field == field


def test_a_coroutine_function_is_refused() -> None:
    async def user() -> dict[str, str]:
        return ANN

    with pytest.raises(ValidationError, match="set_context"):
        context(actor=user)  # type: ignore[arg-type]


def test_what_is_set_inside_is_seen_outside_and_in_threads() -> None:
    def endpoint() -> None:
        set_context(actor=ANN, meta={"b": 2})

    with context(meta={"a": 1}):
        copied = contextvars.copy_context()
        thread = threading.Thread(target=copied.run, args=(endpoint,))
        thread.start()
        thread.join()
        assert current_context() == {"actor": ANN, "meta": {"a": 1, "b": 2}}
    assert current_context() == {}
    with pytest.raises(TracevaultError, match="there is no context"):
        set_context(actor=ANN)


def test_a_context_of_a_function_is_loaded_once_and_only_if_needed() -> None:
    loads = []

    def load() -> Any:
        loads.append(1)
        return {"actor": ANN, "meta": {"a": 1}}

    with context(load, inherit=False):
        pass
    assert loads == []
    with context(load):
        set_context(meta={"b": 2})
        assert current_context() == {"actor": ANN, "meta": {"a": 1, "b": 2}}
    assert loads == [1]
    with context(lambda: {"actr": ANN}), pytest.raises(ValidationError, match="did you mean `actor`"):  # type: ignore
        current_context()


def test_a_context_that_is_left_elsewhere_is_refused() -> None:
    opened = context(actor=ANN)
    contextvars.copy_context().run(opened.__enter__)
    with pytest.raises(TracevaultError, match="set_context"):
        opened.__exit__(None, None, None)
    with opened, pytest.raises(TracevaultError, match="entered already"):
        opened.__enter__()


def test_a_context_travels_as_plain_data() -> None:
    with context(actor=lambda: Actor("ann", "user"), correlation_id="c", traceparent=TRACEPARENT, meta={"a": 1}):
        message = current_context()
        headers = propagation_headers()
    assert message == {"actor": ANN, "correlation_id": "c", "traceparent": TRACEPARENT, "meta": {"a": 1}}
    with context(inherit=False, **message):
        assert current_context() == message
    assert headers == {"X-Correlation-Id": "c", "traceparent": TRACEPARENT}
    assert read_correlation_id_header(headers) == "c"
    assert read_traceparent_header(headers) == TRACEPARENT
    assert propagation_headers() == {}


@pytest.mark.parametrize(
    ("header", "valid"),
    [
        (TRACEPARENT, True),
        (f" {TRACEPARENT} ", True),
        (f"01-{'a' * 32}-{'b' * 16}-00-more", True),
        (f"{TRACEPARENT}-more", False),
        (f"ff-{'a' * 32}-{'b' * 16}-01", False),
        (f"00-{'0' * 32}-{'b' * 16}-01", False),
        (f"00-{'a' * 32}-{'0' * 16}-01", False),
        (f"00-{'A' * 32}-{'b' * 16}-01", False),
        (f"01-{'a' * 32}-{'b' * 16}-00-{'x' * 600}", False),
        ("", False),
        (None, False),
    ],
)
def test_traceparent_is_read_as_the_standard_has_it(header: str | None, valid: bool) -> None:
    found = read_traceparent_header(lambda _name: header)
    assert found == (header.strip() if valid and header else None)


async def test_hundreds_of_tasks_never_see_each_others_actor(ready_dsn: str) -> None:
    async with start_tracevault(connection_string=ready_dsn, default_mode="async") as audit:

        async def step(name: str, depth: int) -> None:
            with context(meta={f"depth-{depth}": name}):
                await asyncio.sleep(random.random() / 100)
                await audit.emit("task", data={"name": name})
                if depth:
                    await asyncio.gather(step(name, depth - 1), asyncio.create_task(step(name, depth - 1)))

        async def request(number: int) -> None:
            name = f"user-{number}"
            with context(inherit=False):
                await asyncio.sleep(random.random() / 100)
                set_context(actor={"id": name, "type": "user"})
                await step(name, 2)

        await asyncio.gather(*map(request, range(300)))
    found = stored(ready_dsn, "actor_id", "data->>'name'", "array(SELECT value FROM jsonb_each_text(meta))")
    assert len(found) == 300 * 7
    assert all({actor, *metas} == {name} for actor, name, metas in found)


def test_hundreds_of_threads_never_see_each_others_actor(ready_dsn: str) -> None:
    with Tracevault(connection_string=ready_dsn, default_mode="async") as audit:

        def request(number: int) -> None:
            assert current_context() == {}
            with context(actor={"id": f"user-{number}", "type": "user"}):
                audit.emit("task", data={"name": f"user-{number}"})

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(request, range(500)))
    found = stored(ready_dsn, "actor_id", "data->>'name'")
    assert len(found) == 500
    assert all(actor == name for actor, name in found)


def test_an_abandoned_context_says_nothing_when_it_is_collected() -> None:
    contextvars.copy_context().run(context(actor=ANN).__enter__)
    gc.collect()
    assert current_context() == {}


def test_a_unit_of_work_is_one_transaction(ready_dsn: str) -> None:
    rows(ready_dsn, "CREATE TABLE things (name text)")
    with Tracevault(connection_string=ready_dsn, scopes=SCOPES) as audit:

        def work() -> None:
            with audit.unit_of_work() as unit:
                unit.connection.execute("INSERT INTO things VALUES ('x')")
                assert unit.emit("one").stored == "transaction"
                unit.emit_many(["two"])
                unit.get_scope("users").emit_diff("three", before={}, after={"a": 1})
                audit.emit("denied")
                assert rows(ready_dsn, "SELECT event FROM audit_logs") == [("denied",)]
                if fails:
                    raise ZeroDivisionError

        fails = True
        with pytest.raises(ZeroDivisionError):
            work()
        assert nothing_but_the_denial(ready_dsn)
        rows(ready_dsn, "TRUNCATE audit_logs")
        fails = False
        work()
    assert one_transaction(ready_dsn)


async def test_an_async_unit_of_work_is_one_transaction(ready_dsn: str) -> None:
    rows(ready_dsn, "CREATE TABLE things (name text)")
    async with start_tracevault(connection_string=ready_dsn, scopes=SCOPES) as audit:

        async def work() -> None:
            async with audit.unit_of_work() as unit:
                await unit.connection.execute("INSERT INTO things VALUES ('x')")
                assert (await unit.emit("one")).stored == "transaction"
                await unit.emit_many(["two"])
                await unit.get_scope("users").emit_diff("three", before={}, after={"a": 1})
                await audit.emit("denied")
                assert rows(ready_dsn, "SELECT event FROM audit_logs") == [("denied",)]
                if fails:
                    raise ZeroDivisionError

        fails = True
        with pytest.raises(ZeroDivisionError):
            await work()
        assert nothing_but_the_denial(ready_dsn)
        rows(ready_dsn, "TRUNCATE audit_logs")
        fails = False
        await work()
    assert one_transaction(ready_dsn)


SCOPES = {"default": "audit_logs", "users": "audit_user_events"}


def nothing_but_the_denial(dsn: str) -> bool:
    return (
        stored(dsn, "event") == [("denied",)]
        and rows(dsn, "SELECT FROM things") == []
        and rows(dsn, "SELECT FROM audit_user_events") == []
    )


def one_transaction(dsn: str) -> bool:
    """Whether everything but the denial was stored by the transaction that changed the thing."""
    return rows(
        dsn,
        """SELECT event, stored_xid::text = (SELECT xmin::text FROM things)
           FROM (SELECT event, stored_xid FROM audit_logs UNION ALL SELECT event, stored_xid FROM audit_user_events) e
           ORDER BY event""",
    ) == [("denied", False), ("one", True), ("three", True), ("two", True)]
