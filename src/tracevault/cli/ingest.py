"""``tracevault ingest``: events from a NATS JetStream stream into PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine
from typing import Any

import click

from tracevault import DriverError
from tracevault.cli.connect import TIMEOUT, conninfo, write_dsn
from tracevault.cli.options import dsn_option
from tracevault.cli.output import number
from tracevault.config import Config
from tracevault.postgres.pool import writer_connect

_nats = click.option("--nats", "address", metavar="URL", required=True, help="the cluster: nats://one:4222,two:4222")


@click.group()
def ingest() -> None:
    """Write events to the database that vaults with the option `ingest` put into a NATS JetStream stream."""


@ingest.command()
@_nats
@click.option(
    "--replicas", type=click.IntRange(1, 5), default=3, show_default=True, help="on how many servers each message is"
)
def setup(address: str, replicas: int) -> None:
    """Make the streams, or change their replicas: TRACEVAULT for events, TRACEVAULT_DEAD for refused ones."""
    from tracevault.ingest.streams import setup as make_streams  # noqa: PLC0415 - they need an extra
    from tracevault.writer.stream import servers_of  # noqa: PLC0415

    _run(make_streams(servers_of(address), replicas, 2 * TIMEOUT))
    click.echo(f"streams TRACEVAULT and TRACEVAULT_DEAD, each message on {number(replicas, 'server')}")


@ingest.command()
@_nats
@click.option(
    "--batch", type=click.IntRange(1, 1000), default=500, show_default=True, help="most events in one transaction"
)
@dsn_option("DATABASE_URL_WRITE")
def run(address: str, batch: int, dsn: str | None) -> None:
    """Store what is in the stream, until it is stopped. Any number of these may run.

    A message is acknowledged after the commit; an event that is there already is left as it is. What the database
    refuses goes to the subject tracevault.dead.TABLE, with code and reason in its headers.
    """
    from tracevault.ingest.worker import Worker  # noqa: PLC0415 - they need an extra
    from tracevault.writer.stream import servers_of  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with conninfo(write_dsn(dsn)) as target:
        config = Config(connection_string=target)
        worker = Worker(servers_of(address), writer_connect(config, target), batch, TIMEOUT)
        _run(_until_stopped(worker))
    click.echo(f"{number(worker.stored, 'event')} stored, {number(worker.dead, 'dead letter')}", err=True)


async def _until_stopped(worker: Any) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number_ in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number_, stop.set)
    await worker.run(stop)


def _run(work: Coroutine[Any, Any, None]) -> None:
    from nats.errors import Error  # noqa: PLC0415 - it needs an extra

    try:
        asyncio.run(work)
    except (Error, TimeoutError, OSError) as error:
        raise DriverError(f"the NATS cluster cannot be reached: {error or type(error).__name__}") from None
