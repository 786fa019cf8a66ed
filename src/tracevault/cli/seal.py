"""``tracevault seal``: give committed rows their leaves, sign, and tell the anchors; until it is stopped."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event

import click
from psycopg import Connection

from tracevault.cli.connect import TIMEOUT, conninfo, write_dsn
from tracevault.cli.options import dsn_option, seconds, tables_option
from tracevault.cli.output import number, progress_bar
from tracevault.config import check_table_name
from tracevault.postgres.failures import Place
from tracevault.postgres.pool import connect_once
from tracevault.sealing.sealer import HEARTBEAT, Round, Sealer
from tracevault.sealing.service import ANCHOR_EVERY, make_sealer

# Seconds that the anchors get at the end.
_SETTLE = 30.0


@click.command()
@tables_option
@click.option(
    "--key",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="the key file, see `tracevault keygen`; default: the keys in TRACEVAULT_SIGNING_KEY",
)
@click.option(
    "--state",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="where the key keeps what it signed last; default: the key file with .state added",
)
@click.option(
    "--anchor",
    "anchors",
    metavar="ANCHOR",
    multiple=True,
    help="where checkpoints go as well: file:PATH, dir:PATH, https://WITNESS, command:COMMAND; repeatable",
)
@click.option("--every", metavar="TIME", default="250ms", callback=seconds, help="time between rounds; default: 250ms")
@click.option("--once", is_flag=True, help="seal what is committed now, tell the anchors, and end")
@click.option(
    "--anchor-every",
    metavar="TIME",
    default=f"{ANCHOR_EVERY:g}s",
    callback=seconds,
    help="time between two checkpoints that an anchor gets; default: 60s",
)
@click.option(
    "--heartbeat",
    metavar="TIME",
    default=f"{HEARTBEAT:g}s",
    callback=seconds,
    help="time after which the checkpoint of an idle log is published again; default: 1h",
)
@click.option("--resume", is_flag=True, help="go on after the database was restored on, or moved to, another server")
@click.option(
    "--new-epoch", is_flag=True, help="after a rollback: keep the old log, and begin another for these tables"
)
@click.option("--adopt-state", is_flag=True, help="after the state was lost: believe what the database says was signed")
@dsn_option("DATABASE_URL_WRITE")
def seal(
    dsn: str | None,
    tables: tuple[str, ...],
    key: Path | None,
    state: Path | None,
    anchors: tuple[str, ...],
    every: float,
    once: bool,
    anchor_every: float,
    heartbeat: float,
    resume: bool,
    new_epoch: bool,
    adopt_state: bool,
) -> None:
    """Seal audit tables, so that nobody changes them unseen.

    Committed rows get their place in a Merkle tree, its root is signed, and anchors outside the database are told.
    Runs until it is stopped; any number may run at a time. A table that holds millions of rows is sealed where it
    stands, and interrupted, goes on where it was.
    """
    names = list(dict.fromkeys(check_table_name(name, "--table") for name in tables))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with conninfo(write_dsn(dsn)) as target:

        def connect() -> Connection[tuple[object, ...]]:
            return connect_once(target, TIMEOUT, Place("sealing"))

        sealer, publisher = make_sealer(
            connect, names, key=key, state=state, anchors=anchors, anchor_every=anchor_every, heartbeat=heartbeat
        )
        try:
            for name in names:
                _decide(sealer, name, resume=resume, new_epoch=new_epoch, adopt_state=adopt_state)
            _backlog(sealer, names)
            if not once:
                click.echo(f"sealing {', '.join(names)} every {every * 1000:g} ms; Ctrl-C ends it", err=True)
                _until_stopped(sealer, every)
            if not publisher.settle(_SETTLE):
                click.echo("an anchor has not got the newest checkpoint; `tracevault status` says which", err=True)
            sealer.beat()
        finally:
            publisher.close()
            sealer.close()


def _decide(sealer: Sealer, table: str, *, resume: bool, new_epoch: bool, adopt_state: bool) -> None:
    """Carry out what only an operator can decide."""
    if resume:
        sealer.resume(table)
    if new_epoch:
        tree = sealer.new_epoch(table)
        click.echo(f"{table}: the log is {tree.origin} from now on; give this key to whoever verifies", err=True)
        for key in sealer.verifier_keys(tree.origin):
            click.echo(key)
    if adopt_state:
        sealer.adopt_state(table)


def _backlog(sealer: Sealer, tables: Sequence[str]) -> None:
    """Seal what is there already, with a bar where it takes long."""
    for table in tables:
        about = sealer.estimate(table)
        with progress_bar(f"sealing {table}") as progress:

            def announce(done: Round, about: int = about, tell: Callable[[int, int], None] = progress) -> None:
                tell(done.tree.size, max(about, done.tree.size))

            done = sealer.seal(table, announce)
        if done is None:
            click.echo(f"{table}: another sealer is at work", err=True)
        else:
            click.echo(f"{table}: {number(done.tree.size, 'row')} sealed", err=True)


def _until_stopped(sealer: Sealer, every: float) -> None:
    stop = Event()
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda _number, _frame: stop.set())
    sealer.run(stop, every)
