"""``tracevault migrate``: make the tables, or bring them up to date."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from tracevault.cli.connect import connection, write_dsn
from tracevault.cli.options import dsn_option, tables_option
from tracevault.cli.output import size, write_lines
from tracevault.config import INTERVALS, Interval, check_table_name
from tracevault.flows.migrate import Plan
from tracevault.postgres import schema
from tracevault.schema.indexes import INDEXES, PARTITIONED_INDEXES


@click.command()
@click.option("--check", is_flag=True, help="only print what is to do; exit 1 if anything is")
@click.option("--partition", type=click.Choice(INTERVALS), help="make tables that are missing in such partitions")
@click.option("--payload-indexes", is_flag=True, help="also index payloads, for --data, --meta and --changed")
@tables_option
@dsn_option("DATABASE_URL_WRITE")
@click.pass_context
def migrate(
    ctx: click.Context,
    dsn: str | None,
    tables: tuple[str, ...],
    check: bool,
    partition: Interval | None,
    payload_indexes: bool,
) -> None:
    """Make the tables, or bring them up to date.

    The plan is printed first. Indexes are built while writers go on. Adding a generated column to a table of an
    older version writes it anew, which stops its writers; the plan says how much that is. Interrupted, it can be
    run again. Indexes of payloads make every insert dearer, so they are built only where they are asked for.
    """
    names = list(dict.fromkeys(check_table_name(name, "--table") for name in tables))
    with connection(write_dsn(dsn), "migrating", create=not check) as link:
        plans = schema.migration_plan(link, names, payloads=payload_indexes)
        for plan in plans:
            write_lines(_described(plan, partition))
        if all(plan.done for plan in plans):
            return
        if check:
            ctx.exit(1)
        sys.stdout.flush()  # the plan is read before it is carried out
        schema.migrate(link, plans, lambda change: click.echo(change, err=True), payloads=payload_indexes, by=partition)
        click.echo("done", err=True)


def _described(plan: Plan, partition: Interval | None) -> Iterator[str]:
    name, state = plan.state.name, plan.state
    if not state.exists:
        indexes = len(INDEXES if partition is None else PARTITIONED_INDEXES)
        how = "" if partition is None else f", in partitions by {partition}"
        yield f"{name}: create the table with {indexes} indexes{how}"
        return
    if plan.done:
        yield f"{name}: nothing to do"
        return
    rows = "no rows" if not plan.filled else "rows not counted yet" if state.rows is None else f"~{state.rows:,} rows"
    yield f"{name}: {len(plan.changes)} to do ({rows}, {size(state.size_bytes)})"
    for change in plan.changes:
        yield f"  {change.summary}"
    if plan.pending("rewrite"):
        yield f"  ! writers and readers of {name} wait while it is written anew: choose a quiet time"
    if plan.pending("index") and state.partitioned:
        yield f"  ! writers of {name} wait while its indexes are built, since it is partitioned"
