"""``tracevault prune`` and ``tracevault erase``: rows go, or their payloads, and the log says so."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path
from typing import Any
from uuid import UUID

import click
from psycopg import Connection

from tracevault import Actor, SpoolError, Target, ValidationError
from tracevault.cli.connect import connection, vault, write_dsn
from tracevault.cli.options import (
    dsn_option,
    proof_timeout_option,
    reason_option,
    table_option,
    yes_option,
)
from tracevault.cli.output import number, progress_bar
from tracevault.config import check_table_name
from tracevault.events.data_key import subject_of
from tracevault.events.payload import iso_utc
from tracevault.events.rules import moment, uuid
from tracevault.flows.custody import Affected, about, as_data, older_than
from tracevault.flows.seal import Tree
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.schema.custody import ERASED, PRUNED
from tracevault.sealing.custody import carry_out_all, parts, tree_of
from tracevault.sealing.key_store import DirectoryKeyStore
from tracevault.writer import inspection
from tracevault.writer.dead import Letter

_dry = click.option("--dry-run", is_flag=True, help="only say how many rows it concerns")
_resume = click.option("--resume", metavar="ID", help="carry out to its end what the event with this id states")


@click.command()
@table_option
@click.option("--before", metavar="TIME", help="remove what happened before: 2020-01-01, or ISO 8601 with an offset")
@reason_option
@_dry
@yes_option
@_resume
@proof_timeout_option
@dsn_option("DATABASE_URL_WRITE")
def prune(
    dsn: str | None,
    table: str,
    before: str | None,
    reason: str | None,
    dry_run: bool,
    yes: bool,
    resume: str | None,
    timeout: float,
) -> None:
    """Remove old rows, and keep their hashes.

    An event says what goes; when it is sealed and an anchor has it, the rows go. Whatever remains can be proven as
    before, and a verification tells rows that were pruned from rows that were deleted. It takes the custodian's role,
    see `tracevault roles`, and a sealer with an anchor at work.
    """
    name = check_table_name(table, "--table")
    if (before is None) == (resume is None):
        raise click.UsageError("give --before TIME, or --resume ID")
    dsn = write_dsn(dsn)
    with connection(dsn, "pruning") as link:
        if resume is not None:
            carry_out_events(link, name, [uuid(resume, "--resume")], timeout, "pruned")
            return
        tree, until = tree_of(link, name), moment(before, "--before")
        affected = run(link, older_than(tree, until), Place("pruning"))
        if not _confirmed(affected, f"happened before {iso_utc(until)}", "removed for good", dry_run=dry_run, yes=yes):
            return
        ids = state_events(dsn, name, tree, affected, PRUNED, {"before": iso_utc(until)}, reason)
        carry_out_events(link, name, ids, timeout, "pruned")


@click.command()
@table_option
@click.option("--target", metavar="TYPE/ID", help="whom the events are about: user/123")
@click.option("--actor", metavar="TYPE/ID", help="who did what the events tell")
@click.option("--reason", metavar="TEXT", help="why, such as the number of a request; it stands in the event")
@click.option(
    "--key-store",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="destroy the subject's data key there as well, and with it every copy of what it encrypts",
)
@click.option(
    "--spool",
    "spools",
    metavar="DIR",
    multiple=True,
    type=click.Path(path_type=Path),
    help="make sure that this spool keeps nothing of it: dead letters are dropped; repeatable",
)
@_dry
@yes_option
@_resume
@proof_timeout_option
@dsn_option("DATABASE_URL_WRITE")
def erase(
    dsn: str | None,
    table: str,
    target: str | None,
    actor: str | None,
    reason: str | None,
    key_store: Path | None,
    spools: tuple[Path, ...],
    dry_run: bool,
    yes: bool,
    resume: str | None,
    timeout: float,
) -> None:
    """Erase the payloads of all events of one target or actor, and keep proof that they were not changed.

    `data`, `meta` and the salt go; the row and a hash that gives nothing away stay. Ids and types of actor and target
    stay as well: use pseudonymous ones. It takes the custodian's role, see `tracevault roles`.

    Exit 3 where a spool still has events of it to deliver: `tracevault spool flush` does that.
    """
    name = check_table_name(table, "--table")
    if sum(value is not None for value in (target, actor, resume)) != 1:
        raise click.UsageError("give one of --target TYPE/ID, --actor TYPE/ID and --resume ID")
    if resume is not None and (key_store is not None or spools):
        raise click.UsageError(
            "--resume ID takes neither --key-store nor --spool: give --target or --actor again for that"
        )
    keys = None if key_store is None else DirectoryKeyStore(key_store, create=False)
    dsn = write_dsn(dsn)
    with connection(dsn, "erasing") as link:
        if resume is not None:
            carry_out_events(link, name, [uuid(resume, "--resume")], timeout, "erased")
            return
        if not reason:
            raise click.UsageError("give --reason TEXT: an erasure without one cannot be justified later")
        subject = Target(*identity(target, "--target")) if target is not None else Actor(*identity(actor, "--actor"))
        tree = tree_of(link, name)
        letters = _undelivered(spools, subject)
        affected = run(link, about(tree, subject), Place("erasing"))
        side = "target" if isinstance(subject, Target) else "actor"
        if not _confirmed(
            affected,
            f"have the {side} {subject.type}/{subject.id} and a payload",
            "left without their payloads for good",
            dry_run=dry_run,
            yes=yes,
            more=keys is not None or bool(letters),
        ):
            return
        data = {side: {"id": subject.id, "type": subject.type}, "key_destroyed": keys is not None}
        ids = state_events(dsn, name, tree, affected, ERASED, data, reason)
        carry_out_events(link, name, ids, timeout, "erased")
    for folder, found in letters.items():
        inspection.drop(folder, found, f"erased: {reason}")
        click.echo(f"{number(len(found), 'dead letter')} dropped in {folder}")
    if keys is not None:
        destroyed = keys.destroy(subject_of(subject.type, subject.id))
        click.echo(f"{number(len(destroyed), 'data key')} destroyed")


def _undelivered(spools: tuple[Path, ...], subject: Actor | Target) -> dict[Path, list[Letter]]:
    """Return the dead letters of a subject by spool; refuse to go on while events of it wait to be delivered."""
    letters = {}
    for folder in spools:
        kept = inspection.kept_of(folder, subject)
        if kept.waiting:
            raise SpoolError(
                f"the spool {str(folder)!r} has {number(kept.waiting, 'event')} of it to deliver, which would stay: "
                "run `tracevault spool flush`, or let the process that holds them deliver, and run this again"
            )
        if kept.letters:
            letters[folder] = kept.letters
    return letters


def identity(text: str | None, option: str) -> tuple[str, str]:
    """Return id and type of ``TYPE/ID``."""
    kind, slash, id_ = (text or "").partition("/")
    if not (kind and slash and id_):
        raise click.UsageError(f"{option} is TYPE/ID, such as user/123")
    return id_, kind


def _confirmed(affected: Affected, which: str, fate: str, *, dry_run: bool, yes: bool, more: bool = False) -> bool:
    click.echo(f"{number(affected.rows, 'sealed row')} {which}", err=True)
    if affected.held:
        click.echo(f"{number(affected.held, 'more row')} stay, since they are held: `tracevault hold list`", err=True)
    if affected.unsealed:
        raise ValidationError(
            f"{affected.unsealed:,} more are not sealed yet, and would stay: run `tracevault seal`, then this again"
        )
    if dry_run or not (affected.ranges or more):
        return False
    return yes or click.confirm(f"They will be {fate}. Go on?", err=True)


def operator() -> dict[str, str]:
    """Return who runs this command, for an event's meta."""
    return {"operator": getpass.getuser(), "host": socket.gethostname()}


def state_events(
    dsn: str, table: str, tree: Tree, affected: Affected, event: str, data: dict[str, Any], reason: str | None
) -> list[UUID]:
    """Emit the events that state what is to go; return their ids."""
    ids = []
    several = list(parts(affected.ranges)) or [[]]
    with vault(dsn, table) as audit:
        for number, ranges in enumerate(several, 1):
            said = {
                **data,
                **({"reason": reason} if reason else {}),
                "rows": sum(end - first for first, end in ranges),
                "part": number,
                "parts": len(several),
                "origin": tree.origin,
                "ranges": as_data(ranges),
            }
            ids.append(audit.emit(event, data=said, meta=operator()).id)
    return ids


def carry_out_events(link: Connection[Any], table: str, ids: list[UUID], timeout: float, verb: str) -> None:
    """Do what the events state, once that is proven."""
    touched = 0
    for id_ in ids:
        click.echo(f"event {id_} says so; waiting until that is proven", err=True)
        with progress_bar(verb) as progress:
            touched += carry_out_all(link, table, id_, timeout, progress)
    click.echo(f"{number(touched, 'row')} {verb}")
