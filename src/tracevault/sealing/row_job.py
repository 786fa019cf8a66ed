"""What a process does that helps another one to check rows (`sealing.jobs`): its every n-th range, a line for each."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from threading import Thread
from typing import Any

from psycopg import IsolationLevel

from tracevault.config import Config
from tracevault.errors import DriverError
from tracevault.flows.seal import find_tree
from tracevault.flows.verify import prepare, stream, use_snapshot
from tracevault.postgres.failures import Place, translated
from tracevault.postgres.pool import connect_once
from tracevault.postgres.run import run
from tracevault.sealing.jobs import ranges
from tracevault.sealing.rows import Allowed, Ranges, RowCheck, leaf_hashes

_VERIFYING = Place("verifying")


def work(job: dict[str, Any]) -> None:
    """Do what ``job`` says, and answer on the standard output."""
    Thread(target=_end_with_the_other, daemon=True).start()
    try:
        with translated(_VERIFYING):
            _check(job)
    except DriverError as error:
        values = {"message": str(error), "sqlstate": error.sqlstate, "transient": error.transient}
        _say(f"error {json.dumps(values)}")


def _check(job: dict[str, Any]) -> None:
    with closing(connect_once(job["conninfo"], Config.timeout, _VERIFYING)) as connection:
        connection.isolation_level = IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        with connection.transaction():
            for flow in (use_snapshot(job["snapshot"]), prepare(), stream(True)):
                run(connection, flow, _VERIFYING)
            tree = run(connection, find_tree(job["table"]), _VERIFYING)
            assert tree is not None  # the other process has seen it, in the same snapshot
            _say("ready")
            rows = RowCheck(connection, tree, _VERIFYING, Allowed(*map(Ranges, job["allowed"])))
            for number, (start, end) in enumerate(ranges(*job["span"])):
                if number % job["jobs"] == job["turn"]:
                    hashes = leaf_hashes(connection, tree, start, end, _VERIFYING, lambda _detail, _index: None)
                    _say(rows.check(start, end, hashes).to_json())


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _end_with_the_other() -> None:
    """Wait for the end of the standard input, which nobody writes to any more: then the other process is gone."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
