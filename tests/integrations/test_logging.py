"""logging, structlog and OpenTelemetry: lines of stored events, events of log lines, ids of spans, metrics."""

from __future__ import annotations

import gc
import io
import json
import logging
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg
import pytest
import structlog
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import tracevault
from tests.conftest import rows
from tests.docs.pages import ROOT
from tests.integrations.conftest import Start
from tracevault import ConfigError, DriverError, Tracevault, start_tracevault
from tracevault.integrations import logging as ours
from tracevault.integrations import opentelemetry as otel
from tracevault.integrations import structlog as structured

READY: Any = {"bootstrap": {"ensure_schema": False}}
ANN = {"id": "ann", "type": "user"}
X = sha256(b"x").hexdigest()


def test_the_example(start: Start, ready_dsn: str) -> None:
    app = start("observability", "uvicorn", "app:app", "--port", "{port}")
    answer = app.http.post("/doors/7", headers={"x-user": "ann", "x-correlation-id": "c1"})
    trace_id = answer.json()["trace_id"]
    assert app.await_rows(ready_dsn, "SELECT event, actor_id, trace_id, correlation_id FROM audit_logs") == [
        ("door.opened", "ann", trace_id, "c1")
    ]

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in app.output.splitlines() if line.startswith("{")]

    app.await_true(lambda: '"door.opened"' in app.output)
    mirrored = next(line for line in lines() if line.get("event") == "door.opened")
    assert mirrored["trace_id"] == trace_id
    assert (mirrored["stored"], mirrored["target_id"], mirrored["level"]) == ("database", "7", "info")
    said = next(line for line in lines() if line.get("event") == "the door is open")
    assert (said["user"], said["correlation_id"]) == ("ann", "c1")
    app.await_true(lambda: '"tracevault.events"' in app.output and '"result": "delivered"' in app.output)


# ------------------------------------------------------------------------------------------- on_stored


async def test_each_stored_event_is_told_once(ready_dsn: str) -> None:
    told: list[tuple[str, str]] = []

    def on_stored(record: Any, where: str) -> None:
        told.append((record.event, where))
        if record.event == "bad":
            raise RuntimeError("not the event's fault")

    async with (
        start_tracevault(connection_string=ready_dsn, **READY, on_stored=on_stored) as audit,
        await psycopg.AsyncConnection.connect(ready_dsn) as connection,
    ):
        await audit.emit("sync")
        await audit.emit("bad")
        await audit.emit("queued", mode="async")
        await audit.flush()
        await audit.emit_many(["many-1", "many-2"])
        await audit.emit("inside", connection=connection)
        with pytest.raises(DriverError):
            await audit.emit(
                "lost", data={"outcome": "x"}, tenant_id="\u2603" * 255, connection=await _broken(ready_dsn)
            )
        async with audit.unit_of_work() as unit:
            await unit.emit("unit")
    expected = dict.fromkeys(("sync", "bad", "queued", "many-1", "many-2"), "database")
    assert told == [*expected.items(), ("inside", "transaction"), ("unit", "transaction")]


async def _broken(dsn: str) -> psycopg.AsyncConnection[Any]:
    connection = await psycopg.AsyncConnection.connect(dsn)
    await connection.close()
    return connection


def test_blocking_events_are_told(ready_dsn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[str, str]] = []

    def on_stored(record: Any, where: str) -> None:
        told.append((record.event, where))
        raise RuntimeError("no")

    with Tracevault(connection_string=ready_dsn, **READY, on_stored=on_stored, spool=tmp_path / "spool") as audit:
        audit.emit("sync")
        audit.emit("spooled", mode="async")
        audit.flush()
        audit.emit_many(["many"])
        with psycopg.connect(ready_dsn, autocommit=True) as connection:
            audit.emit("auto", connection=connection, allow_autocommit=True)
    assert told == [(name, "database") for name in ("sync", "spooled", "many", "auto")]
    assert caplog.text.count("on_stored itself failed") == 4
    assert rows(ready_dsn, "SELECT count(*) FROM audit_logs") == [(4,)]


# --------------------------------------------------------------------------------------------- logging


@pytest.fixture
def lines() -> Iterator[tuple[logging.Logger, list[logging.LogRecord]]]:
    """A logger, and what it was told."""
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign, assignment]
    logger = logging.getLogger("tests.audit")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    yield logger, seen
    logger.handlers.clear()


def test_a_line_for_each_event(ready_dsn: str, lines: tuple[logging.Logger, list[logging.LogRecord]]) -> None:
    logger, seen = lines
    with Tracevault(connection_string=ready_dsn, **READY, on_stored=ours.log_stored(logger)) as audit:
        receipt = audit.emit("paid", actor=ANN, target={"id": "a b\nx=1", "type": "bill"}, data={"severity": "error"})
        audit.emit("quiet", data={"severity": "debug"})
    assert [line.getMessage() for line in seen] == [
        f"paid actor=user/ann target=bill/'a b\\nx=1' severity=error id={receipt.id}"
    ]
    assert seen[0].levelno == logging.ERROR
    event = seen[0].__dict__[ours.EVENT]
    assert (event["id"], event["stored"], event["actor_id"]) == (str(receipt.id), "database", "ann")
    assert "data" not in event
    json.dumps(event)


def test_a_handler_for_a_legacy_logger(ready_dsn: str, lines: tuple[logging.Logger, list[logging.LogRecord]]) -> None:
    logger, _ = lines
    with Tracevault(connection_string=ready_dsn, **READY, mask_fields=["password"]) as audit:

        def fields(record: logging.LogRecord) -> dict[str, Any]:
            return {"target": {"id": str(record.__dict__["doc"]), "type": "doc"}} if hasattr(record, "doc") else {}

        handler = ours.AuditHandler(audit, fields=fields)
        logger.addHandler(handler)
        with tracevault.context(actor=ANN):
            # Not by the logger: what pytest keeps of its lines has to be Unicode.
            extra = {"doc": 7, "password": "secret", "what": {b"x"}}
            handler.handle(
                logger.makeRecord(logger.name, 20, "", 1, "deleted %s", ("doc 7\0\ud800",), None, None, extra)
            )
        try:
            raise KeyError("gone")
        except KeyError:
            logger.exception("failed")
    assert rows(ready_dsn, "SELECT event, actor_id, target_id, data, severity FROM audit_logs ORDER BY id") == [
        (
            "tests.audit",
            "ann",
            "7",
            {
                "message": "deleted doc 7\\x00\\ud800",
                "logger": "tests.audit",
                "severity": "info",
                "extra": {
                    "doc": 7,
                    "password": "[REDACTED]",
                    "what": [{"bytes": 1, "sha256": X}],
                },
            },
            "info",
        ),
        (
            "tests.audit",
            None,
            None,
            {
                "message": "failed",
                "logger": "tests.audit",
                "severity": "error",
                "error": {"code": "KeyError", "message": "'gone'"},
            },
            "error",
        ),
    ]


def test_a_handler_does_not_raise_nor_run_in_circles(
    ready_dsn: str, lines: tuple[logging.Logger, list[logging.LogRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, seen = lines
    failed: list[logging.LogRecord] = []
    monkeypatch.setattr(ours.AuditHandler, "handleError", lambda _self, record: failed.append(record))
    chosen = {"one": "chosen.one"}
    with Tracevault(connection_string=ready_dsn, **READY, on_stored=ours.log_stored(logger)) as audit:
        handler = ours.AuditHandler(audit, event=lambda record: chosen.get(record.getMessage()), mode="async")
        logger.addHandler(handler)
        logging.getLogger("tracevault").addHandler(handler)
        logger.info("one")  # its mirror is a line of this logger
        logger.info("two")  # no event
        audit.flush()
        logging.getLogger("tracevault").error("one")
        chosen["bad"] = "x" * 300
        logger.info("bad")
    logging.getLogger("tracevault").removeHandler(handler)
    assert [line.getMessage().split()[0] for line in seen] == ["one", "two", "chosen.one", "bad"]
    assert [line.getMessage() for line in failed] == ["bad"]
    assert rows(ready_dsn, "SELECT event, mode FROM audit_logs") == [("chosen.one", "async")]


async def test_a_handler_needs_a_blocking_vault(ready_dsn: str) -> None:
    async with start_tracevault(connection_string=ready_dsn, **READY) as audit:
        with pytest.raises(ConfigError, match="logging cannot await"):
            ours.AuditHandler(audit)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- structlog


def test_structlog_gives_and_takes(ready_dsn: str) -> None:
    output = io.StringIO()
    logger = structlog.wrap_logger(
        structlog.PrintLogger(output),
        processors=[structured.add_context, structlog.processors.add_log_level, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    source = structured.from_contextvars(actor="user_id", actor_type="person", request_id="req", meta=["ip"])
    with (
        Tracevault(
            connection_string=ready_dsn,
            **READY,
            context_sources=[source],
            on_stored=structured.log_stored(logger, payloads=True),
        ) as audit,
    ):
        audit.emit("bare")
        with structlog.contextvars.bound_contextvars(
            user_id=7, req="r", tenant_id="bad\n", correlation_id="x" * 600, ip="1.2.3.4", other=1
        ):
            audit.emit("bound", data={"severity": "warning"})
            with tracevault.context(actor=ANN):
                audit.emit("both")
                logger.info("said", correlation_id="own")
    assert rows(
        ready_dsn,
        "SELECT event, actor_id, actor_type, request_id, tenant_id, correlation_id, meta FROM audit_logs ORDER BY id",
    ) == [
        ("bare", None, None, None, None, None, None),
        ("bound", "7", "person", "r", None, None, {"ip": "1.2.3.4"}),
        ("both", "ann", "user", "r", None, None, {"ip": "1.2.3.4"}),
    ]
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("bare", "info"),
        ("bound", "warning"),
        ("both", "info"),
        ("said", "info"),
    ]
    assert lines[1]["meta"] == {"ip": "1.2.3.4"}
    assert lines[3] == {"event": "said", "level": "info", "actor": ANN, "correlation_id": "own"}


# --------------------------------------------------------------------------------------- OpenTelemetry


def test_events_have_the_ids_of_the_span(ready_dsn: str) -> None:
    sampled, dropped = TracerProvider().get_tracer("t"), TracerProvider(sampler=ALWAYS_OFF).get_tracer("t")
    expected: list[tuple[str, str | None, str | None]] = [("outside", None, None)]
    with Tracevault(connection_string=ready_dsn, **READY, context_sources=[otel.current_span]) as audit:
        audit.emit("outside")
        for name, tracer in (("sampled", sampled), ("dropped", dropped)):
            with tracer.start_as_current_span("s") as span:
                audit.emit(name)
                ids = span.get_span_context()
                expected.append((name, f"{ids.trace_id:032x}", f"{ids.span_id:016x}"))
    assert rows(ready_dsn, "SELECT event, trace_id, span_id FROM audit_logs ORDER BY id") == expected


def test_the_writers_numbers_are_metrics(ready_dsn: str) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])

    def read() -> dict[tuple[Any, ...], float]:
        data = reader.get_metrics_data()
        return {
            (
                metric.name,
                *(value for key, value in sorted((point.attributes or {}).items()) if key != "vault"),
            ): point.value  # type: ignore[union-attr]
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        }

    audit = Tracevault(connection_string=ready_dsn, **READY)
    otel.instrument(audit, meter_provider=provider, attributes={"vault": "a"})
    audit.emit("one")
    audit.emit("two", mode="async")
    audit.flush()
    found = read()
    assert {name for name, *_ in found} == {metric.name for metric in otel.METRICS}
    assert found["tracevault.emitted",] == found["tracevault.events", "delivered"] == 2
    assert found["tracevault.pending", "queued"] == found["tracevault.events", "dropped"] == 0
    assert found["tracevault.writer.rows",] == found["tracevault.writer.batches",] == 1
    assert found["tracevault.writer.duration",] > 0
    assert found["tracevault.lane", "default", "ok"] == 1
    audit.close()
    assert read()["tracevault.emitted",] == 2
    del audit
    gc.collect()
    assert not read()
    provider.shutdown()


def test_every_metric_is_documented() -> None:
    page = (ROOT / "docs" / "integrations" / "opentelemetry.md").read_text()
    for metric in otel.METRICS:
        assert f"`{metric.name}`" in page
