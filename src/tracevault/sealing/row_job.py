"""What a process does that helps another one to check rows: see `sealing.jobs`."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from queue import SimpleQueue
from threading import Thread
from typing import Any, NoReturn

from psycopg import IsolationLevel

from tracevault.config import Config
from tracevault.errors import DriverError
from tracevault.flows.seal import find_tree
from tracevault.flows.verify import prepare, stream, use_snapshot
from tracevault.postgres.failures import Place, translated
from tracevault.postgres.pool import connect_once
from tracevault.postgres.run import run
from tracevault.sealing.rows import Allowed, Ranges, RowCheck

_VERIFYING = Place("verifying")


def work(job: dict[str, Any]) -> None:
    """Do what ``job`` says, and answer on the standard output."""
    given: SimpleQueue[tuple[int, int]] = SimpleQueue()
    Thread(target=_listen, args=(given,), daemon=True).start()
    try:
        with translated(_VERIFYING):
            _check(job, given)
    except DriverError as error:
        values = {"message": str(error), "sqlstate": error.sqlstate, "transient": error.transient}
        _say(f"error {json.dumps(values)}")


def _check(job: dict[str, Any], given: SimpleQueue[tuple[int, int]]) -> NoReturn:
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
            while True:
                _say(rows.check(*given.get()).to_json())


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _listen(given: SimpleQueue[tuple[int, int]]) -> None:
    """Take the ranges from the standard input. When that ends, the other process is gone, and so is this one."""
    heard = b""
    # Not by `sys.stdin`: its lock, which this thread then holds, would be missed when the process ends.
    while more := os.read(sys.stdin.fileno(), 4096):
        *lines, heard = (heard + more).split(b"\n")
        for line in lines:
            start, end = line.split()
            given.put((int(start), int(end)))
    os._exit(1)
