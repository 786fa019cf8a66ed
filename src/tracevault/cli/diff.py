"""``tracevault diff``: what one event changed, or how two differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracevault import AuditRecord, FieldChange, compute_diff
from tracevault.cli.connect import read_dsn, vault
from tracevault.cli.options import dsn_option, key_store_option, output_options, table_option
from tracevault.cli.output import Output, write_lines
from tracevault.events.history import field_changes
from tracevault.events.json_text import json_text


@click.command()
@click.argument("id")
@click.argument("other", required=False)
@table_option
@key_store_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
@output_options
@click.pass_context
def diff(
    ctx: click.Context,
    id: str,  # noqa: A002
    other: str | None,
    dsn: str | None,
    table: str,
    key_store: Path | None,
    output: Output,
) -> None:
    """Print what the event ID changed, field by field, or how the event OTHER differs from it.

    Of two events, `after` is compared where `emit_diff` made them, and `data` elsewhere. Exit 1 if there is no such
    event, or nothing that differs.
    """
    with vault(read_dsn(dsn), table, key_store=key_store) as audit:
        records = [(text, audit.query.find_by_id(text)) for text in (id, other) if text is not None]
    for text, record in records:
        if record is None:
            click.echo(f"not found: {text} in table {table}", err=True)
            ctx.exit(1)
    found = [record for _, record in records if record is not None]
    changes = field_changes(found[0].data) if other is None else _between(*map(_content, found))
    if output == "json":
        write_lines(json_text(change._asdict()) for change in changes)
    else:
        from tracevault.cli.show import print_changes  # noqa: PLC0415 - it needs rich, which JSON does not

        print_changes(changes)
    if not changes:
        click.echo("nothing differs" if other else "this event tells of no change", err=True)
        ctx.exit(1)


def _content(record: AuditRecord) -> dict[str, Any]:
    data = record.data or {}
    return data["after"] if field_changes(data) and isinstance(data.get("after"), dict) else data


def _between(before: dict[str, Any], after: dict[str, Any]) -> list[FieldChange]:
    return field_changes({"before": before, "after": after, "diff": compute_diff(before, after)})
