"""``tracevault sql-path``: where the package keeps its SQL files."""

from __future__ import annotations

import click

from tracevault.schema.ddl import MIGRATIONS


@click.command("sql-path")
def sql_path() -> None:
    """Print the folder of the package's SQL files.

    They are numbered migrations of the table audit_logs, each safe to run again; for another table see
    `tracevault init-sql`.
    """
    click.echo(str(MIGRATIONS))
