"""The two streams: events that wait for the database, and those that it refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nats.js.api import RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import NotFoundError

from tracevault.writer.stream import DEAD, DEAD_STREAM, EVENTS, STREAM, connected

# Seconds for which a stream knows the ids of messages. What is sent again later is found by the primary key.
WINDOW = 600.0


async def setup(servers: Sequence[str], replicas: int, timeout: float) -> None:
    """Make the streams, or give them ``replicas``: each on so many servers of the cluster."""
    client = await connected(servers, timeout)
    try:
        stream = client.jetstream(timeout=timeout)
        for name, subject, policy in (
            (STREAM, EVENTS, RetentionPolicy.WORK_QUEUE),  # a message goes when it is acknowledged
            (DEAD_STREAM, DEAD, RetentionPolicy.LIMITS),
        ):
            config = StreamConfig(
                name=name,
                subjects=[f"{subject}.*"],
                retention=policy,
                storage=StorageType.FILE,
                num_replicas=replicas,
                duplicate_window=WINDOW,
            )
            await (stream.update_stream if await _exists(stream, name) else stream.add_stream)(config)
    finally:
        await client.close()


async def _exists(stream: Any, name: str) -> bool:
    try:
        await stream.stream_info(name)
    except NotFoundError:
        return False
    return True
