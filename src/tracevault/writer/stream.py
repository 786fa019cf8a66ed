"""Async records on their way into a NATS JetStream stream, from which ``tracevault ingest`` writes them to PostgreSQL.

A message is one record: its row as the spool keeps it, and in headers what `decode` needs. Its id is the event's, with
a digest of the row, so that what is published again within the stream's window is one message; beyond that, the primary
key tells.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from hashlib import sha256
from threading import Lock, Thread
from typing import Any, NamedTuple, TypeVar

from tracevault.config import check_table_name
from tracevault.errors import ConfigError, DriverError
from tracevault.events.binary import decode_row
from tracevault.events.prepare import Prepared
from tracevault.events.record import INSERT_COLUMNS
from tracevault.postgres.failures import Place
from tracevault.writer.queue import Item
from tracevault.writer.spool import prepared_from

try:
    from nats.aio.client import Client
    from nats.errors import Error as NatsError
    from nats.errors import MaxPayloadError
except ImportError as error:
    message = 'the option `ingest` needs the extra "nats": pip install "tracevault[nats]"'
    raise ConfigError(message, field="ingest") from error

STREAM, DEAD_STREAM = "TRACEVAULT", "TRACEVAULT_DEAD"
EVENTS, DEAD = "tracevault.events", "tracevault.dead"
MESSAGE_ID = "Nats-Msg-Id"
_COLUMNS, _FLAGS, _SCOPE = "Tracevault-Columns", "Tracevault-Flags", "Tracevault-Scope"
CODE, REASON = "Tracevault-Code", "Tracevault-Reason"
# Seconds beyond `timeout` that the thread may take to say so.
_GRACE = 0.5
_CLOSING = 2.0

T = TypeVar("T")


class Received(NamedTuple):
    """The record of a message."""

    scope: str
    table: str
    prepared: Prepared


def servers_of(text: str) -> list[str]:
    """Return the addresses in ``nats://one:4222,two:4222``, of which any leads to the cluster."""
    scheme, _, rest = text.partition("://")
    return [f"{scheme}://{each.strip().rpartition('://')[2]}" for each in rest.split(",") if each.strip()]


def headers_of(scope: str, item: Item) -> dict[str, str]:
    """Return the headers of a record's message."""
    return {
        # Of the content as well: another event under the same id is for the database to refuse, and not to be lost.
        MESSAGE_ID: f"{item.prepared.id}/{sha256(item.encoded).hexdigest()[:16]}",
        _COLUMNS: ",".join(INSERT_COLUMNS),
        _FLAGS: str(item.flags),
        _SCOPE: scope,
    }


def decode(subject: str, headers: Mapping[str, str] | None, data: bytes) -> Received:
    """Return the record of a message; raise `ValueError` for one that has none, or one of another version."""
    given = headers or {}
    try:
        table = check_table_name(subject.removeprefix(f"{EVENTS}."))
        row = decode_row(data, given[_COLUMNS].split(","))
        return Received(given[_SCOPE], table, prepared_from(int(given[_FLAGS]), row))
    except (KeyError, ConfigError) as error:
        raise ValueError(f"no record of ours: {error}") from None


async def connected(servers: Sequence[str], timeout: float) -> Any:
    """Return a connection to the cluster, which goes on to another server by itself for ever."""

    async def ignore(_error: Exception) -> None:
        """Whoever waits for an answer hears of it."""

    client = Client()
    connecting = client.connect(
        list(servers),
        name="tracevault",
        connect_timeout=2,
        reconnect_time_wait=0.2,  # type: ignore[arg-type] # seconds, which need not be whole
        max_reconnect_attempts=-1,
        ping_interval=5,
        max_outstanding_pings=2,
        error_cb=ignore,
    )
    try:
        await asyncio.wait_for(connecting, timeout)
    except BaseException:
        with contextlib.suppress(Exception):
            await client.close()
        raise
    return client


class Publisher:
    """Publishes batches from the writers' threads, over one connection in a thread of its own."""

    def __init__(self, address: str) -> None:
        self._servers = servers_of(address)
        self._lock = Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: Thread | None = None
        self._client: Any = None
        self._connecting: asyncio.Lock | None = None

    def publish(self, scope: str, table: str, items: Sequence[Item], timeout: float, place: Place) -> None:
        """Return when the stream has all of them; else raise `DriverError`: some may be there, others not.

        It is transient, but for a record that is larger than the servers allow.
        """
        try:
            self._run(self._publish(scope, table, items, timeout), timeout + _GRACE)
        except MaxPayloadError:
            raise DriverError(f"{place} failed: a record is larger than the NATS servers allow") from None
        except (NatsError, OSError, FutureTimeoutError, TimeoutError, CancelledError) as error:
            told = str(error) or type(error).__name__
            raise DriverError(
                f"{place} failed: the stream did not take them ({told}); is NATS running, and the stream made by "
                "`tracevault ingest setup`?",
                transient=True,
            ) from None

    async def _publish(self, scope: str, table: str, items: Sequence[Item], timeout: float) -> None:
        client = await self._connected(timeout)
        stream = client.jetstream(timeout=timeout)
        answers = await asyncio.gather(
            *(
                stream.publish(f"{EVENTS}.{table}", item.encoded, timeout=timeout, headers=headers_of(scope, item))
                for item in items
            ),
            return_exceptions=True,
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer

    async def _connected(self, timeout: float) -> Any:
        if self._connecting is None:
            self._connecting = asyncio.Lock()
        async with self._connecting:
            if self._client is None or self._client.is_closed:
                self._client = await connected(self._servers, timeout)
            return self._client

    def _run(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = Thread(target=_serve, args=(self._loop,), name="tracevault-stream", daemon=True)
                self._thread.start()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except FutureTimeoutError:
            future.cancel()
            raise

    def close(self) -> None:
        """Let go of connection and thread."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None:
            return
        if self._client is not None:
            with contextlib.suppress(Exception):
                asyncio.run_coroutine_threadsafe(self._client.close(), loop).result(_CLOSING)
        loop.call_soon_threadsafe(loop.stop)
        if self._thread is not None:
            self._thread.join(_CLOSING)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, and leave nothing of it."""
    try:
        loop.run_forever()
        loop.run_until_complete(_cancel_all())
    finally:
        loop.close()


async def _cancel_all() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
