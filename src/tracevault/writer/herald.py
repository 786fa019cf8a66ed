"""Tells followers of the log that there is something new, by NOTIFY, on a connection of its own.

Never in a transaction that stores events: a commit that notifies takes a lock that the whole server shares. At most
every 100 ms, however much is stored.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from threading import Event, Thread
from typing import Any

import psycopg
from psycopg import Connection

from tracevault.errors import TracevaultError
from tracevault.flows.tail import notify
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.writer.stats import Counters

_log = logging.getLogger("tracevault")

INTERVAL = 0.1
# Seconds after a failure: followers look by themselves meanwhile.
_PAUSE = 5.0
_TELLING = Place("telling followers")


class Herald:
    """A thread that looks at the counters of what was stored, and tells the followers of ``tables``."""

    def __init__(self, connect: Callable[[], Connection[Any]], tables: Sequence[str], counters: Counters) -> None:
        self._connect = connect
        self._tables = tuple(tables)
        self._counters = counters
        self._connection: Connection[Any] | None = None
        self._told = 0
        self._ended = Event()
        self._thread = Thread(target=self._work, name="tracevault-herald", daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def _work(self) -> None:
        quiet_until = 0.0
        failing = False
        while not self._ended.wait(INTERVAL):
            stored = self._counters.count("delivered")
            if stored == self._told or time.monotonic() < quiet_until:
                continue
            try:
                self._tell()
                self._told, failing = stored, False
            except (TracevaultError, psycopg.Error, OSError) as error:
                self._let_go()
                quiet_until = time.monotonic() + _PAUSE
                if not failing:
                    _log.warning("followers of the log cannot be told of new events, and look by themselves: %s", error)
                failing = True
        with contextlib.suppress(TracevaultError, psycopg.Error, OSError):
            if self._counters.count("delivered") != self._told and self._connection is not None:
                self._tell()
        self._let_go()

    def _tell(self) -> None:
        if self._connection is None:
            self._connection = self._connect()
        run(self._connection, notify(self._tables), _TELLING)

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error, OSError):
                connection.close()

    def close(self, seconds: float) -> None:
        """Tell of the last events, and end."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
