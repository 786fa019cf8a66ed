"""Celery: the context travels with a task, is restored where the task runs, and ends with it.

It travels in a header of the message, as JSON: whoever reads the broker reads it, whoever writes there can forge it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from tracevault import Tracevault, TracevaultError, ValidationError, context, current_context

try:
    from celery import signals
except ImportError as error:
    message = 'this needs Celery: pip install "tracevault[celery]"'
    raise ImportError(message) from error

HEADER = "tracevault"
# Characters of the header; what is longer travels without its meta.
MOST = 8192

_OPENED = "_tracevault_context"
_FIELDS = ("actor", "on_behalf_of", "tenant_id", "correlation_id", "traceparent", "meta")

_log = logging.getLogger("tracevault")


def install(audit: Tracevault | None = None) -> None:
    """Let every task of this process carry the context of who sends it, and run in it. Call it where the app is made.

    In a task the actor, ``on_behalf_of``, tenant, correlation id, trace and meta are those of the sender; the request
    id is the task's, and ``meta.task`` its name. A task that nobody sent, as beat's, has a correlation id of its own.
    ``audit``, a blocking vault that the tasks use, is closed with each process of the worker, so that it loses nothing.
    """
    signals.before_task_publish.connect(_send, weak=False, dispatch_uid="tracevault.send")
    signals.task_prerun.connect(_begin, weak=False, dispatch_uid="tracevault.begin")
    signals.task_postrun.connect(_end, weak=False, dispatch_uid="tracevault.end")
    if audit is not None:
        # Processes of a prefork pool end without running what Python runs at its end.
        for ends in (signals.worker_process_shutdown, signals.worker_shutdown):
            ends.connect(lambda **_: _close(audit), weak=False, dispatch_uid=f"tracevault.close.{id(audit)}")


def _send(headers: dict[str, Any] | None = None, **_: Any) -> None:
    if headers is not None:
        text = _written(current_context(*_FIELDS))
        if text is not None:
            headers[HEADER] = text


def _begin(task: Any, task_id: str, **_: Any) -> None:
    request = task.request
    # A task that is run at once, in the process that calls it, is in the caller's context already.
    received = {} if request.is_eager else _read(getattr(request, HEADER, None))
    meta: dict[str, Any] = {**received.pop("meta", {}), "task": task.name}
    if request.retries:
        meta["retries"] = request.retries
    fields = {"correlation_id": task_id, **received} if not request.is_eager else {}
    opened = context(inherit=bool(request.is_eager), **fields, request_id=task_id, meta=meta)
    opened.__enter__()
    setattr(request, _OPENED, opened)


def _end(task: Any, **_: Any) -> None:
    opened = task.request.__dict__.pop(_OPENED, None)
    if opened is not None:
        opened.__exit__(None, None, None)


def _written(fields: dict[str, Any]) -> str | None:
    """Return the header; what is not JSON in meta becomes text, and a meta that cannot is left behind."""
    for chosen in (fields, {name: value for name, value in fields.items() if name != "meta"}):
        with suppress(ValueError, TypeError, RecursionError):
            text = json.dumps(chosen, default=str, allow_nan=False, separators=(",", ":"))
            if len(text) <= MOST:
                return text if chosen else None
    _log.warning("the context of a task is too large to travel with it")
    return None


def _read(text: Any) -> dict[str, Any]:
    """Return what a header holds. One that we did not write, or that was damaged, counts as missing."""
    if text is None:
        return {}
    try:
        found = json.loads(text) if isinstance(text, str) and len(text) <= MOST else None
        if not isinstance(found, Mapping):
            raise ValueError("no JSON object")
        fields = {name: found[name] for name in _FIELDS if name in found}
        context(**fields)  # which checks them
    except (ValueError, RecursionError, ValidationError) as error:
        _log.warning("the context that came with a task is ignored: %s", error)
        return {}
    return fields


def _close(audit: Tracevault) -> None:
    try:
        audit.close()
    except TracevaultError:
        _log.exception("the vault of a worker's process did not close in order")
