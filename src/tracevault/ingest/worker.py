"""A worker: takes messages from the stream, stores their events, and acknowledges them after the commit.

Any number of workers may run. One that dies before it acknowledges leaves its messages to another, which finds the
events in the table by their ids. A message whose event the database refuses goes to the dead-letter subject.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig
from psycopg import Connection

from tracevault.errors import DriverError, TracevaultError
from tracevault.events.prepare import Prepared
from tracevault.flows.write import insert_many
from tracevault.postgres.failures import Failure, Place, failure_of, from_psycopg, is_broken
from tracevault.postgres.run import run
from tracevault.writer.stream import CODE, DEAD, EVENTS, MESSAGE_ID, REASON, STREAM, connected, decode

_log = logging.getLogger("tracevault")

# Seconds after which another worker gets what was not acknowledged.
ACK_WAIT = 15.0
# So many refused with the same code, and none accepted: it is not the records' fault.
_REFUSALS = 3
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
_LOOK = 1.0


class Worker:
    """Writes what is in the stream, until it is stopped. ``connect`` makes a blocking autocommit connection."""

    def __init__(
        self, servers: Sequence[str], connect: Callable[[], Connection[Any]], batch: int, timeout: float
    ) -> None:
        self._servers = servers
        self._connect = connect
        self._connection: Connection[Any] | None = None
        self._batch = batch
        self._timeout = timeout
        self._failures = 0
        self.stored = 0
        """Events that are in the table, those included that were there."""
        self.dead = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set."""
        client: Any = None
        try:
            while not stop.is_set():
                try:
                    if client is None:
                        client = await connected(self._servers, self._timeout)
                    await self._follow(client, stop)
                except (NatsError, OSError, TimeoutError) as error:
                    _log.warning("the stream cannot be read: %s", error or type(error).__name__)
                    await self._pause(stop)
        finally:
            if client is not None:
                await client.close()
            if self._connection is not None:
                self._connection.close()

    async def _follow(self, client: Any, stop: asyncio.Event) -> None:
        stream = client.jetstream(timeout=self._timeout)
        config = ConsumerConfig(
            ack_policy=AckPolicy.EXPLICIT, ack_wait=ACK_WAIT, max_ack_pending=20 * self._batch, max_deliver=-1
        )
        pulled = await stream.pull_subscribe(f"{EVENTS}.*", durable="tracevault", stream=STREAM, config=config)
        while not stop.is_set():
            try:
                messages = await pulled.fetch(self._batch, timeout=_LOOK)
            except TimeoutError:
                continue
            await self._handle(stream, messages, stop)

    async def _handle(self, stream: Any, messages: Sequence[Any], stop: asyncio.Event) -> None:
        groups: dict[str, list[tuple[Any, Prepared]]] = {}
        for message in messages:
            try:
                _scope, table, prepared = decode(message.subject, message.headers, message.data)
            except ValueError as error:
                await self._bury(stream, message, None, str(error))
            else:
                groups.setdefault(table, []).append((message, prepared))
        for table, group in groups.items():
            try:
                refused = await asyncio.to_thread(self._store, table, [prepared for _, prepared in group])
            except TracevaultError as error:
                if self._failures == 0:
                    _log.error("events wait in the stream: %s", error)
                await asyncio.gather(*(message.nak(self._longest()) for message, _ in group), return_exceptions=True)
                await self._pause(stop)
                continue
            if self._failures:
                _log.info("events of the stream are stored again")
            self._failures = 0
            for place, reason in refused.items():
                await self._bury(stream, group[place][0], getattr(reason, "sqlstate", None), str(reason))
            done = [message for place, (message, _) in enumerate(group) if place not in refused]
            # What is not acknowledged comes again, and is found.
            await asyncio.gather(*(message.ack_sync(self._timeout) for message in done), return_exceptions=True)
            self.stored += len(done)

    async def _bury(self, stream: Any, message: Any, code: str | None, reason: str) -> None:
        """Publish a message again, for whoever looks into it, and only then be done with it."""
        table = message.subject.rpartition(".")[2]
        headers = {**(message.headers or {}), CODE: code or "", REASON: " ".join(reason.split())}
        headers[MESSAGE_ID] = f"dead-{headers.get(MESSAGE_ID, '')}-{message.metadata.sequence.stream}"
        try:
            await stream.publish(f"{DEAD}.{table}", message.data, headers=headers)
            await message.ack_sync(self._timeout)
        except NatsError as error:
            _log.error("a refused event stays in the stream: %s", error)
            return
        self.dead += 1
        _log.error("a dead letter in %s.%s: %s", DEAD, table, reason)

    def _longest(self) -> float:
        return float(min(_FIRST_PAUSE * 2 ** min(self._failures, 10), _LONGEST_PAUSE))

    async def _pause(self, stop: asyncio.Event) -> None:
        seconds = random.uniform(0.2, 1.0) * self._longest()  # noqa: S311 - jitter
        self._failures += 1
        try:
            await asyncio.wait_for(stop.wait(), seconds)
        except TimeoutError:
            return

    # -- in a thread ---------------------------------------------------------------------------------------

    def _store(self, table: str, batch: Sequence[Prepared]) -> dict[int, TracevaultError]:
        """Store what the database takes of a batch; return why it refused the others, by their place.

        Raises the failure where waiting, or an operator, can help.
        """
        refused: dict[int, TracevaultError] = {}
        parts = [list(range(len(batch)))]
        while parts:
            part = parts.pop()
            failure = self._tried(table, [batch[place] for place in part])
            if failure is None:
                continue
            if failure_of(failure) is not Failure.REFUSED:
                raise failure
            if len(part) == 1:
                refused[part[0]] = failure
                self._check_refusals(refused, batch, failure)
                continue
            parts += list(_halves(part))
        return refused

    @staticmethod
    def _check_refusals(
        refused: dict[int, TracevaultError], batch: Sequence[Prepared], failure: TracevaultError
    ) -> None:
        codes = {getattr(error, "sqlstate", None) for error in refused.values()}
        if len(refused) == len(batch) >= _REFUSALS and len(codes) == 1 and isinstance(failure, DriverError):
            raise failure

    def _tried(self, table: str, part: Sequence[Prepared]) -> TracevaultError | None:
        place = Place("storing events of the stream", table=table)
        try:
            if self._connection is None:
                self._connection = self._connect()
            with self._connection.transaction():
                # Any of them may be there: from a worker that died before it acknowledged.
                run(self._connection, insert_many(table, part, replay=True), place)
        except psycopg.Error as error:
            failure: TracevaultError = from_psycopg(error, place)
        except TracevaultError as error:
            failure = error
        else:
            return None
        if self._connection is not None and is_broken(self._connection, failure):
            self._connection.close()
            self._connection = None
        return failure


def _halves(part: list[int]) -> Iterator[list[int]]:
    half = len(part) // 2
    yield part[half:]
    yield part[:half]
