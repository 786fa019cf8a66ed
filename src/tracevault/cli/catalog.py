"""``tracevault catalog``: the events that a program declares."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Literal

import click

from tracevault import DeclaredEvent
from tracevault import catalog as declared
from tracevault.cli.output import is_terminal, visible, write_lines
from tracevault.events.json_text import json_text


@click.command()
@click.argument("modules", nargs=-1, required=True, metavar="MODULE...")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "markdown"]),
    help="for a person, JSON with one event per line, or a table in Markdown; default: table on a terminal, else json",
)
def catalog(modules: tuple[str, ...], output: Literal["table", "json", "markdown"] | None) -> None:
    """Import modules, and print the events that are declared then: `tracevault catalog shop.events`.

    They are imported, and so run, as from a Python that was started in this folder.
    """
    sys.path.insert(0, os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            message = f"{module} cannot be imported: {type(error).__name__}: {error}"
            raise click.ClickException(message) from error
    events = declared()
    if not events:
        click.echo("no event is declared there: see @tracevault.event and tracevault.declare", err=True)
    match output or ("table" if is_terminal() else "json"):
        case "json":
            write_lines(json_text(_as_json(event)) for event in events)
        case "markdown":
            write_lines(_markdown(events))
        case _:
            write_lines(line for event in events for line in _lines(event))


def _as_json(event: DeclaredEvent) -> dict[str, object]:
    fields = None
    if event.fields is not None:
        fields = [{"name": field.name, "type": field.type, "required": field.required} for field in event.fields]
    return {
        "event": event.name,
        "description": event.description,
        "source": event.source,
        "kind": event.kind,
        "fields": fields,
    }


def _lines(event: DeclaredEvent) -> Iterator[str]:
    yield visible(event.name) + (f"  {visible(event.description)}" if event.description else "")
    yield f"    {event.source}" + ("" if event.kind == "name" else f" ({event.kind})")
    fields = event.fields or ()
    width = max((len(field.name) for field in fields), default=0)
    for field in fields:
        yield f"    {field.name:{width}}  {visible(field.type)}" + ("" if field.required else "  optional")
    if event.fields is None:
        yield "    any data"


def _markdown(events: Iterable[DeclaredEvent]) -> Iterator[str]:
    yield "| Event | Meaning | `data` | Declared by |"
    yield "| --- | --- | --- | --- |"
    for event in events:
        names = [f"`{field.name}`" + ("" if field.required else "?") for field in event.fields or ()]
        data = "any" if event.fields is None else ", ".join(names) or "empty"
        cells = (f"`{visible(event.name)}`", visible(event.description or ""), data, f"`{event.source}`")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
