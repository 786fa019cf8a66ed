"""OpenTelemetry: events carry the ids of the current span, and the writer's numbers become metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from weakref import ref

from tracevault import AsyncTracevault, Stats, Tracevault

try:
    from opentelemetry import metrics, trace
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
except ImportError as error:
    message = 'this needs the API of OpenTelemetry: pip install "tracevault[opentelemetry]"'
    raise ImportError(message) from error

Attributes = Mapping[str, str]

# Instruments are read one after another: within this many seconds they show the same moment.
_SAME_MOMENT = 0.1


def current_span() -> dict[str, str] | None:
    """Return ``trace_id`` and ``span_id`` of the span that runs here: a source for the option ``context_sources``.

    A span that is not sampled counts as well: its ids are what other logs show.
    """
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return None
    return {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}


def instrument(
    audit: AsyncTracevault | Tracevault,
    *,
    meter_provider: MeterProvider | None = None,
    attributes: Attributes | None = None,
) -> None:
    """Let a vault's `stats` be observed as metrics, by the global or this ``meter_provider``.

    ``attributes`` are added to each: where a process has several vaults, they tell them apart. Once the vault is
    garbage, its metrics are no longer reported. The table of metrics is in docs/integrations/opentelemetry.md.
    """
    meter = metrics.get_meter("tracevault", meter_provider=meter_provider)
    look = _looking(audit)
    common = dict(attributes or {})
    for name, kind, unit, help_, read in METRICS:
        make: Callable[..., Any] = getattr(meter, f"create_observable_{kind}")
        make(name, callbacks=[_callback(look, read, common)], unit=unit, description=help_)


def _looking(audit: AsyncTracevault | Tracevault) -> Callable[[], Stats | None]:
    vault = ref(audit)
    seen: list[tuple[float, Stats]] = []

    def look() -> Stats | None:
        found, now = vault(), time.monotonic()
        if found is None:
            return None
        if not seen or now - seen[0][0] > _SAME_MOMENT:
            seen[:] = [(now, found.stats())]
        return seen[0][1]

    return look


Read = Callable[[Stats], Iterable[tuple[float, Attributes]]]


class Metric(NamedTuple):
    """A metric: its name, the kind of its instrument, unit, description, and how it is read."""

    name: str
    kind: str
    unit: str
    help: str
    read: Read


def _callback(look: Callable[[], Stats | None], read: Read, common: Attributes) -> Callable[..., Iterable[Observation]]:
    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        stats = look()
        if stats is not None:
            for value, attributes in read(stats):
                yield Observation(value, {**common, **attributes})

    return observe


def _one(name: str) -> Read:
    return lambda stats: [(getattr(stats, name), {})]


def _several(attribute: str, *names: str) -> Read:
    return lambda stats: [(getattr(stats, name), {attribute: name}) for name in names]


METRICS = (
    Metric("tracevault.emitted", "counter", "{event}", "events that passed validation", _one("emitted")),
    Metric(
        "tracevault.events",
        "counter",
        "{event}",
        "what became of them, by `result`: delivered, dead, dropped, refused, raised, unknown",
        _several("result", "delivered", "dead", "dropped", "refused", "raised", "unknown"),
    ),
    Metric(
        "tracevault.pending",
        "up_down_counter",
        "{event}",
        "events that wait, by `place`: spooled, queued, in_flight",
        _several("place", "spooled", "queued", "in_flight"),
    ),
    Metric("tracevault.pending.age", "gauge", "s", "age of the oldest that waits", _one("oldest_seconds")),
    Metric("tracevault.spool.size", "up_down_counter", "By", "bytes in spool files", _one("spool_bytes")),
    Metric("tracevault.writer.batches", "counter", "{batch}", "statements of the writers", _one("batches")),
    Metric("tracevault.writer.rows", "counter", "{event}", "events stored by them", _one("batch_rows")),
    Metric("tracevault.writer.duration", "counter", "s", "time that they took", _one("write_seconds")),
    Metric(
        "tracevault.writer.failures", "counter", "{attempt}", "attempts that failed and are repeated", _one("transient")
    ),
    Metric("tracevault.spool.sync.duration", "counter", "s", "time that syncing the spool took", _one("fsync_seconds")),
    Metric(
        "tracevault.lane",
        "gauge",
        "1",
        "1 for each `scope` and its `state`: ok, waiting, paused",
        lambda stats: [(1, {"scope": scope, "state": state}) for scope, state in stats.lanes.items()],
    ),
)
