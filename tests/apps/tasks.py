"""The tasks of the Celery worker: each emits, and returns the receipts. The worker has emitted before it forked."""

from __future__ import annotations

import os
from pathlib import Path

from celery.signals import worker_process_shutdown

from tests.apps.broker import application
from tests.apps.vaults import Receipts, Vaults

app = application(Path(os.environ["TEST_FOLDER"]))
vaults = Vaults()
at_load = vaults.emit_all("loaded")


@app.task
def emit() -> tuple[int, Receipts]:
    return os.getpid(), vaults.emit_all("worked", 1)


@app.task
def loaded() -> Receipts:
    return at_load


if "TEST_CLOSES" in os.environ:
    # The processes of a prefork pool end by os._exit: nothing else closes a vault there.
    worker_process_shutdown.connect(lambda **_: vaults.close(), weak=False)
