"""Partitions made ahead: by a command, at start-up, and by a thread of a vault that runs for long."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from threading import Event, Thread
from typing import Any, TypeVar

from psycopg import Connection

from tracevault.config import Interval
from tracevault.errors import DriverError, MigrationError, TracevaultError
from tracevault.flows import Flow, Query
from tracevault.flows.convert import Conversion, conversion, drop_cutoff, drop_preparations
from tracevault.flows.migrate import LOCK_NOT_AVAILABLE, lock_migrations, unlock_migrations
from tracevault.flows.partitions import Layout, ahead, interval, look, make, make_default, strayed
from tracevault.postgres.failures import Place, translated
from tracevault.postgres.run import run
from tracevault.postgres.schema import PATIENCE, patiently
from tracevault.schema.partitions import AHEAD, Range, floor, following, interval_of, missing

_log = logging.getLogger("tracevault")
_PLACE = Place("making partitions")
# Seconds between two looks of the thread, and its patience with locks; a command has more.
INTERVAL = 3600.0
_SHORT = 5.0
# Rows that the thread moves out of the default partition at once: about a second, in which their like cannot be stored.
MOST_MOVED = 20_000
# Somebody else made the partition, or its table, at the same moment; or an event came into the default partition.
_MADE_MEANWHILE = frozenset({"42P07", "42P17", "23505", "23514"})

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """A partition that was made, and how many rows came into it out of the default one."""

    wanted: Range
    moved: int


def layout_of(connection: Connection[Any], table: str) -> Layout:
    """Return how a table is partitioned; `MigrationError` where there is none of that name."""
    with connection.transaction():
        layout = run(connection, look(table), _PLACE)
    if layout is None:
        raise MigrationError(f"table `{table}` does not exist: run `tracevault migrate --table {table}`")
    return layout


def wanted(
    connection: Connection[Any], layout: Layout, by: Interval | None, count: int = AHEAD, *, stray: bool = False
) -> tuple[Interval, list[Range]]:
    """Return the interval, and the partitions that are missing; with ``stray`` those of the default one's rows, too."""
    length = interval(layout, by)
    ranges = ahead(layout, length, count)
    if stray:
        with connection.transaction():
            found = run(connection, strayed(layout, length), _PLACE)
        ranges = sorted({*ranges, *found}, key=lambda stretch: stretch.start)
    return length, ranges


def ensure(
    connection: Connection[Any],
    table: str,
    by: Interval | None = None,
    count: int = AHEAD,
    *,
    stray: bool = False,
    most: int | None = None,
    patience: float = _SHORT,
    announce: Callable[[Made], None] = lambda _made: None,
) -> None:
    """Make what is missing of the present interval and the next ``count``, each partition in its own transaction.

    ``stray``: as well for what the default partition holds already; ``most``: how many of its rows may move into one.
    Raises `MigrationError` where they are more, where the role may not, and where no lock is to be had in ``patience``
    seconds.
    """
    layout = layout_of(connection, table)
    length, ranges = wanted(connection, layout, by, count, stray=stray)
    if not ranges and layout.default is not None:
        return
    if not layout.may:
        raise MigrationError(
            f"table `{table}` lacks {len(ranges)} partitions, and this role may not make them: run "
            f"`tracevault partitions ensure --table {table}` as the table's owner"
        )
    for stretch in ranges:
        moved = _ensured(connection, table, partial(_make, table, length, stretch, most), patience)
        if moved is not None:
            announce(Made(stretch, moved))
    if layout.default is None:
        _ensured(connection, table, partial(make_default, layout), patience)


def ensure_between(connection: Connection[Any], table: str, start: datetime, end: datetime) -> None:
    """Make what is missing for the time from ``start`` to before ``end``, each partition in its own transaction.

    Nothing happens to a table that is not partitioned, or whose partitions follow no interval.
    """
    layout = layout_of(connection, table)
    by = interval_of(layout.partitions)
    if by is None:
        return
    ranges: list[Range] = []
    moment = floor(start, by)
    while moment < end:
        ranges += missing(layout.partitions, by, moment, 1)
        moment = following(moment, by)
    for stretch in ranges:
        _ensured(connection, table, partial(_make, table, by, stretch, None), PATIENCE)


def _make(table: str, by: Interval, stretch: Range, most: int | None) -> Flow[int | None]:
    """Make one partition, unless somebody else has."""
    layout = yield from look(table)
    if layout is None or any(
        found.start <= stretch.start < found.end for found in layout.partitions if not found.default
    ):
        return None
    return (yield from make(layout, by, stretch, most))


def _ensured(connection: Connection[Any], table: str, flow: Callable[[], Flow[T]], patience: float) -> T:
    states = frozenset({LOCK_NOT_AVAILABLE, *_MADE_MEANWHILE})
    return patiently(connection, flow, table, "partitions ensure", _PLACE, states=states, patience=patience)


def plan_conversion(connection: Connection[Any], table: str, by: Interval, at: datetime | None = None) -> Conversion:
    """Return what makes a table partitioned."""
    with connection.transaction():
        return run(connection, conversion(table, by, at), _PLACE)


def convert(
    connection: Connection[Any],
    planned: Conversion,
    announce: Callable[[str], None] = lambda _text: None,
    count: int = AHEAD,
) -> None:
    """Carry out a conversion on an autocommit connection, whose timeouts it lifts, and make partitions ahead.

    ``announce`` is told of each stage before it begins. Interrupted, it can be planned and run again; what refuses
    events that happen after the cutoff is taken back, unless the process is killed.
    """
    table = planned.table
    with translated(_PLACE):
        run(connection, lock_migrations(), _PLACE)
        try:
            for stage in planned.stages:
                announce(stage.title)
                if stage.together:
                    patiently(connection, partial(_say, stage.statements), table, "partitions convert", _PLACE)
                else:
                    run(connection, _say(stage.statements), _PLACE)
        except BaseException:
            with suppress(Exception):
                connection.rollback()
                run(connection, drop_cutoff(table), _PLACE)
            raise
        finally:
            with suppress(DriverError):
                run(connection, unlock_migrations(), _PLACE)
        announce("make partitions ahead")
        ensure(connection, table, planned.by, count, patience=PATIENCE)
        announce("count what is in them, for the planner")
        run(connection, _say([f'ANALYZE "{table}"']), _PLACE)


def abort(connection: Connection[Any], table: str) -> None:
    """Undo what an interrupted conversion has left; on an autocommit connection."""
    with translated(_PLACE):
        patiently(connection, partial(drop_cutoff, table), table, "partitions convert --abort", _PLACE)
        run(connection, drop_preparations(table), _PLACE)


def _say(statements: Iterable[str]) -> Flow[None]:
    for statement in statements:
        yield Query(statement, reads=False)


class Keeper:
    """Makes partitions ahead for as long as a vault is open, on a connection that it makes when it looks."""

    def __init__(self, connect: Callable[[], Connection[Any]], partitions: Mapping[str, Interval]) -> None:
        self._connect = connect
        self._partitions = dict(partitions)
        self.pid = os.getpid()
        self._stop = Event()
        self._thread = Thread(target=self._work, name="tracevault-partitions", daemon=True)
        self._said: dict[str, str] = {}

    def start(self) -> None:
        """Look at once, and then every hour."""
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Stop, and wait for at most ``timeout`` seconds; a partition that is being made is made."""
        self._stop.set()
        self._thread.join(timeout)

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                with closing(self._connect()) as connection:
                    connection.autocommit = True
                    for table, by in self._partitions.items():
                        self._look(connection, table, by)
            except Exception as error:  # noqa: BLE001 - the thread must live on
                self._say("", f"partitions could not be looked at: {error}")
            self._stop.wait(INTERVAL)

    def _look(self, connection: Connection[Any], table: str, by: Interval) -> None:
        try:
            ensure(connection, table, by, most=MOST_MOVED, announce=partial(_announce, table))
        except TracevaultError as error:
            self._say(table, str(error))
        else:
            self._said.pop(table, None)

    def _say(self, table: str, text: str) -> None:
        if self._said.get(table) != text:
            _log.warning("%s", text)
        self._said[table] = text


def _announce(table: str, made: Made) -> None:
    _log.info("table %s: made the partition from %s on", table, made.wanted.start.date())
