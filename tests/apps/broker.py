"""A Celery application whose broker is a folder; `tests.apps.tasks` adds tasks, and the test sends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celery import Celery


def application(folder: Path, *, out: str = "messages") -> Celery:
    """Return the application whose messages and results are in ``folder``; what it sends goes to ``out`` there."""
    for name in ("messages", "control", "results", out):
        (folder / name).mkdir(exist_ok=True)
    app = Celery("tasks", broker="filesystem://", backend=f"file://{folder / 'results'}")
    app.conf.update(
        broker_transport_options={
            "data_folder_in": str(folder / "messages"),
            "data_folder_out": str(folder / out),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.02,
        },
        worker_hijack_root_logger=False,
    )
    return app


def send(app: Celery, folder: Path, task: str) -> Any:
    """Send a task, and return its result to come.

    The application's own ``out`` is "outbox": a worker that sees a message while it is written would lose it.
    """
    result = app.send_task(task)
    for message in (folder / "outbox").iterdir():
        message.rename(folder / "messages" / message.name)
    return result
