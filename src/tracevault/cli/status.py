"""``tracevault status``: how far the sealing of each table is, and how its anchors do."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from tracevault.cli.connect import connection, read_dsn
from tracevault.cli.options import dsn_option, output_options, tables_option
from tracevault.cli.output import Output, console, number, span, visible, write_lines
from tracevault.config import check_table_name
from tracevault.events.json_text import json_text
from tracevault.flows.seal import Receipts, Standing, Tree, find_tree, receipts, standing, tables_exist
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run

_LOOKING = Place("reading seals")
# Seconds after which a row that waits, or an anchor that failed, is for a person to look at.
_LONG = 60.0


@click.command()
@tables_option
@output_options
@dsn_option("DATABASE_URL_READ, else DATABASE_URL_WRITE")
@click.pass_context
def status(ctx: click.Context, dsn: str | None, tables: tuple[str, ...], output: Output) -> None:
    """Show how far tables are sealed, and when each anchor was last told.

    Exit 1 if a table was never sealed, rows wait for longer than a minute, or an anchor fails.
    """
    names = list(dict.fromkeys(check_table_name(name, "--table") for name in tables))
    well = True
    with connection(read_dsn(dsn), "reading seals") as link:
        for name in names:
            tree = run(link, find_tree(name), _LOOKING) if run(link, tables_exist(), _LOOKING) else None
            if tree is None:
                well = False
                if output == "json":
                    write_lines([json_text({"table": name, "sealed": False})])
                else:
                    write_lines([f"{name}: never sealed; `tracevault seal --table {name}` begins that"])
                continue
            how, anchors = run(link, standing(tree), _LOOKING), run(link, receipts(tree), _LOOKING)
            well = well and how.oldest_waiting < _LONG and not any(anchor.error for anchor in anchors)
            if output == "json":
                write_lines([json_text(_as_dict(name, tree, how, anchors))])
            else:
                _print(name, tree, how, anchors)
    ctx.exit(0 if well else 1)


def _as_dict(table: str, tree: Tree, how: Standing, anchors: list[Receipts]) -> dict[str, Any]:
    return {
        "table": table,
        "sealed": True,
        "origin": tree.origin,
        "epoch": tree.epoch,
        "size": tree.size,
        "root": tree.root.hex(),
        "walking": tree.walking,
        **_plain(how),
        "anchors": [_plain(anchor) for anchor in anchors],
    }


def _plain(values: Any) -> dict[str, Any]:
    return {
        name: value.isoformat() if isinstance(value, datetime) else value for name, value in values._asdict().items()
    }


def _print(table: str, tree: Tree, how: Standing, anchors: list[Receipts]) -> None:
    from rich.text import Text  # noqa: PLC0415 - see output.py

    out = console()
    late = how.oldest_waiting >= _LONG
    waiting = "no row waits"
    if how.waiting:
        waiting = f"{number(how.waiting, 'row')} not sealed yet, the oldest waits for {span(how.oldest_waiting)}"
    signed = "nothing is signed" if how.signed_at is None else f"signed up to {how.signed:,} {_ago(how.signed_at)}"
    lines = [
        Text.assemble((visible(table), "bold"), f"  {visible(tree.origin)}"),
        Text(f"  {number(tree.size, 'row')} sealed{' (a backlog is being sealed)' if tree.walking else ''}, {signed}"),
        Text(f"  {waiting}", style="bold yellow" if late else ""),
    ]
    for anchor in anchors:
        told = "never told" if anchor.at is None else f"told of {anchor.size:,} {_ago(anchor.at)}"
        lines.append(Text(f"  {visible(anchor.sink)}: {told}"))
        if anchor.error is not None:
            lines.append(Text(f"      fails: {visible(anchor.error)}", style="yellow"))
    if not anchors:
        lines.append(Text("  no anchor: whoever owns the database could still make the log anew", style="yellow"))
    for line in lines:
        out.print(line, soft_wrap=True)


def _ago(moment: datetime) -> str:
    return f"{span((datetime.now(UTC) - moment).total_seconds())} ago"
