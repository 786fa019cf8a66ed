"""``tracevault init-sql``: the SQL of a table, for whoever runs migrations by other means."""

from __future__ import annotations

import click

from tracevault import generate_init_sql


@click.command("init-sql")
@click.argument("table")
@click.option(
    "--distribution-column", metavar="COLUMN", help="distribute the table over a Citus cluster by this: tenant_id"
)
def init_sql(table: str, distribution_column: str | None) -> None:
    """Print the SQL that makes an audit table.

    It is safe to run again. Nothing is run here: pipe it into psql, or keep it as a migration.
    """
    click.echo(generate_init_sql(table, distribution_column=distribution_column), nl=False)
