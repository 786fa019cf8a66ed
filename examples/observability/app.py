"""A door, with structlog and OpenTelemetry: events carry the trace, and the log of the process shows each event.

    pip install "tracevault[starlette,structlog,opentelemetry,embedded]" opentelemetry-sdk uvicorn
    uvicorn app:app

Log lines and metrics go to the terminal as JSON. Without DATABASE_URL_WRITE it runs on a PostgreSQL of its own.
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tracevault import start_tracevault
from tracevault.integrations.opentelemetry import current_span, instrument
from tracevault.integrations.starlette import AuditMiddleware
from tracevault.integrations.structlog import add_context, from_contextvars, log_stored

structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        add_context,
        structlog.processors.add_log_level,
        structlog.processors.JSONRenderer(),
    ],
    wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
)
trace.set_tracer_provider(TracerProvider())
reader = PeriodicExportingMetricReader(
    ConsoleMetricExporter(formatter=lambda data: data.to_json(indent=None) + "\n"), 500
)
metrics.set_meter_provider(MeterProvider([reader]))

log = structlog.get_logger()
tracer = trace.get_tracer("door")
audit = start_tracevault(
    connection_string=os.environ.get("DATABASE_URL_WRITE", "embedded:"),
    context_sources=[from_contextvars(actor="user"), current_span],
    on_stored=log_stored(),
)


async def open_door(request: Request) -> JSONResponse:
    structlog.contextvars.bind_contextvars(user=request.headers.get("x-user"))
    with tracer.start_as_current_span("open") as span:
        door = request.path_params["door"]
        await audit.emit("door.opened", target={"id": door, "type": "door"}, mode="async")
        log.info("the door is open", door=door)
        return JSONResponse({"trace_id": trace.format_trace_id(span.get_span_context().trace_id)})


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    async with audit:
        instrument(audit)
        yield
        metrics.get_meter_provider().shutdown()  # type: ignore[attr-defined] # of the SDK's


app = Starlette(lifespan=lifespan, routes=[Route("/doors/{door}", open_door, methods=["POST"])])
app.add_middleware(AuditMiddleware, audit=audit)
