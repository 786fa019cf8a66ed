"""``tracevault emit``: one event, from a shell."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import Any, TypeVar, get_type_hints

import click

from tracevault.cli.connect import vault, write_dsn
from tracevault.cli.options import dsn_option, table_option
from tracevault.events.event import EventFields
from tracevault.events.record import BY_NAME

F = TypeVar("F", bound=Callable[..., Any])

# Fields of an event that are one plain column. Not `mode`: a command has to wait for the commit.
TEXT_FIELDS = tuple(
    name
    for name in get_type_hints(EventFields)
    if name != "mode" and name in BY_NAME and BY_NAME[name].column.sql_type != "jsonb"
)


def _text_options(function: F) -> F:
    for name in reversed(TEXT_FIELDS):
        option = f"--{name.replace('_', '-')}"
        function = click.option(option, name, metavar="TEXT", help=BY_NAME[name].column.help)(function)
    return function


def _identity(_ctx: click.Context, _option: click.Parameter, value: str | None) -> dict[str, str] | None:
    if value is None:
        return None
    type_, slash, id_ = value.partition("/")
    if not slash:
        raise click.BadParameter("write it as type/id: user/ana")
    return {"id": id_, "type": type_}


def _payload(ctx: click.Context, option: click.Parameter, value: str | None) -> dict[str, Any] | None:
    if value is None:
        return None
    if value == "-" and ctx.meta.setdefault("tracevault.stdin", option) is not option:
        raise click.BadParameter("standard input is read already, by the other one")
    try:
        text = sys.stdin.buffer.read().decode() if value == "-" else value
        payload = json.loads(text, parse_float=Decimal, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        # The parser's message says where, and quotes nothing; the payload may hold a secret.
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise click.BadParameter(f"not JSON in UTF-8: {what}") from None
    if not isinstance(payload, dict):
        raise click.BadParameter('not a JSON object, such as {"price": 150}')
    return payload


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value")


@click.command()
@click.argument("event")
@click.option("--actor", metavar="TYPE/ID", callback=_identity, help="who did it, as user/ana")
@click.option("--target", metavar="TYPE/ID", callback=_identity, help="what it was done to, as product/456")
@click.option("--data", metavar="JSON", callback=_payload, help="the event's own payload; - reads standard input")
@click.option("--meta", metavar="JSON", callback=_payload, help="circumstances: address, agent; - reads standard input")
@_text_options
@click.option("--mask", "mask_fields", metavar="KEY", multiple=True, help="mask what stands under this key; repeatable")
@table_option
@dsn_option("DATABASE_URL_WRITE")
def emit(event: str, dsn: str | None, table: str, mask_fields: tuple[str, ...], **fields: Any) -> None:
    """Store an event and print its id.

    EVENT is what happened, as product.price.updated. Numbers in JSON are stored exactly. With --id a repeated
    command stores the event once.
    """
    given: Any = {name: value for name, value in fields.items() if value is not None}
    with vault(write_dsn(dsn), table, mask_fields) as audit:
        receipt = audit.emit(event, **given)
    click.echo(receipt.id)
