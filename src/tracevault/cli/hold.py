"""``tracevault hold``: events that nobody may remove while a case is open."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import click

from tracevault import ValidationError
from tracevault.cli.connect import connection, read_dsn, vault, write_dsn
from tracevault.cli.custody import identity, operator
from tracevault.cli.options import dsn_option, output_options, table_option
from tracevault.cli.output import Output, write_lines
from tracevault.config import check_table_name
from tracevault.events.ids import uuid7
from tracevault.events.json_text import json_text
from tracevault.events.payload import iso_utc
from tracevault.events.rules import moment, uuid
from tracevault.flows.holds import Hold, holds, make_holds, place
from tracevault.flows.holds import release as release_hold
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.schema.holds import HELD, RELEASED

_PLACE = Place("holding")
_reason = click.option("--reason", metavar="TEXT", required=True, help="why, such as the number of a case")


@click.group()
def hold() -> None:
    """Keep events whatever retention says: a legal hold.

    What a hold names is neither pruned nor erased until it is released. Placing and releasing one is an event.
    """


@hold.command()
@table_option
@click.option("--actor", metavar="TYPE/ID", help="who did what the events tell")
@click.option("--target", metavar="TYPE/ID", help="whom the events are about")
@click.option("--tenant-id", metavar="ID", help="whose events they are")
@click.option("--correlation-id", metavar="ID", help="of which operation they are")
@click.option("--since", metavar="TIME", help="that happened at this time or later")
@click.option("--until", metavar="TIME", help="that happened at this time or earlier")
@_reason
@dsn_option("DATABASE_URL_WRITE")
def add(
    dsn: str | None,
    table: str,
    actor: str | None,
    target: str | None,
    tenant_id: str | None,
    correlation_id: str | None,
    since: str | None,
    until: str | None,
    reason: str,
) -> None:
    """Hold the events for which all of the options are true, those to come as well. Prints the id of the hold."""
    name = check_table_name(table, "--table")
    given: dict[str, Any] = {}
    for side, text in (("actor", actor), ("target", target)):
        if text is not None:
            given[f"{side}_id"], given[f"{side}_type"] = identity(text, f"--{side}")
    given |= {key: value for key, value in (("tenant_id", tenant_id), ("correlation_id", correlation_id)) if value}
    given |= {key: moment(text, f"--{key}") for key, text in (("since", since), ("until", until)) if text}
    if not given:
        raise click.UsageError("say what to hold: --actor, --target, --tenant-id, --correlation-id, --since, --until")
    id_ = uuid7()
    dsn = write_dsn(dsn)
    with connection(dsn, "holding") as link, link.transaction():
        run(link, make_holds(), _PLACE)
        run(link, place(name, id_, given, reason), _PLACE)
    # Said afterwards: a hold that nobody recorded is better than a record of a hold that is none.
    with vault(dsn, name) as audit:
        said = {key: iso_utc(value) if isinstance(value, datetime) else value for key, value in given.items()}
        audit.emit(HELD, data={"hold": str(id_), **said, "reason": reason}, meta=operator())
    click.echo(str(id_))


@hold.command("list")
@table_option
@click.option("--released", is_flag=True, help="also those that were released")
@output_options
@dsn_option("DATABASE_URL_READ, DATABASE_URL_WRITE")
def list_command(dsn: str | None, table: str, released: bool, output: Output) -> None:
    """Print the holds on a table, the newest first."""
    with connection(read_dsn(dsn), "looking at holds") as link:
        found = run(link, holds(check_table_name(table, "--table"), released=released), _PLACE)
    if output == "json":
        write_lines(json_text(_as_json(one)) for one in found)
    elif found:
        write_lines(line for one in found for line in _shown(one))
    else:
        write_lines(["no holds"])


def _as_json(one: Hold) -> dict[str, Any]:
    times = {name: getattr(one, name) for name in ("since", "until", "placed_at", "released_at")}
    return {
        "id": str(one.id),
        **one.subjects,
        **{name: iso_utc(time) for name, time in times.items() if time is not None},
        "reason": one.reason,
        "placed_by": one.placed_by,
        **({} if one.released_by is None else {"released_by": one.released_by}),
    }


def _shown(one: Hold) -> Iterator[str]:
    what = [f"{name} {value}" for name, value in one.subjects.items()]
    what += [f"{name} {iso_utc(time)}" for name, time in (("since", one.since), ("until", one.until)) if time]
    yield f"{one.id}  {', '.join(what)}"
    yield f"  {one.reason}; placed {iso_utc(one.placed_at)} by {one.placed_by}"
    if one.released_at is not None:
        yield f"  released {iso_utc(one.released_at)} by {one.released_by}"


@hold.command()
@click.argument("hold_id", metavar="ID")
@table_option
@_reason
@dsn_option("DATABASE_URL_WRITE")
def release(dsn: str | None, hold_id: str, table: str, reason: str) -> None:
    """Release a hold: retention goes on with what it held."""
    name, id_ = check_table_name(table, "--table"), uuid(hold_id, "ID")
    dsn = write_dsn(dsn)
    # Said first: events must not be free to go before it is known that they are.
    with connection(dsn, "releasing") as link:
        if id_ not in [one.id for one in run(link, holds(name), _PLACE)]:
            raise ValidationError(f"table `{name}` has no hold {id_} in force", field="ID")
        with vault(dsn, name) as audit:
            audit.emit(RELEASED, data={"hold": str(id_), "reason": reason}, meta=operator())
        with link.transaction():
            run(link, release_hold(name, id_, reason), _PLACE)
