"""``tracevault roles``: guard the tables, and give each role the least that it needs."""

from __future__ import annotations

import click

from tracevault import ConfigError
from tracevault.cli.connect import connection, write_dsn
from tracevault.cli.options import dsn_option, tables_option
from tracevault.cli.output import visible, write_lines
from tracevault.config import check_table_name
from tracevault.postgres.roles import differences, establish
from tracevault.schema.grants import script
from tracevault.schema.rights import Roles, check_role_name


@click.command()
@click.option("--writer", metavar="ROLE", help="may add events: what an application needs")
@click.option("--reader", metavar="ROLE", help="may read events")
@click.option("--sealer", metavar="ROLE", help="may read and add events, and keep the seals")
@click.option("--custodian", metavar="ROLE", help="may read and add events, prune and erase; and nobody else")
@click.option("--tenant-reader", metavar="ROLE", help="may read one tenant's events, through a view")
@click.option("--sql", "as_sql", is_flag=True, help="print the script for psql, and connect to nothing")
@click.option("--check", is_flag=True, help="only print what is to do; exit 1 if anything is")
@tables_option
@dsn_option("DATABASE_URL_WRITE")
@click.pass_context
def roles(
    ctx: click.Context,
    /,
    dsn: str | None,
    tables: tuple[str, ...],
    as_sql: bool,
    check: bool,
    **names: str | None,
) -> None:
    """Make the tables append-only, and give roles the least that they need.

    Triggers refuse UPDATE, DELETE and TRUNCATE to everybody. A role that is missing is created, and may not log in
    (NOLOGIN): have a login role be a member of it, or let it log in by ALTER ROLE. Whatever else the named roles,
    and PUBLIC, may do to the tables is revoked; other roles are left as they are. Run it as the owner of the
    tables, as often as you like. Exit 1 if something could not be done.
    """
    if as_sql and check:
        raise click.UsageError("--sql and --check exclude each other")
    wanted = _checked(names)
    audited = list(dict.fromkeys(check_table_name(name, "--table") for name in tables))
    if as_sql:
        click.echo(script(wanted, audited), nl=False)
        return
    with connection(write_dsn(dsn), "setting the rights") as link:
        before = differences(link, wanted, audited)
        if check or not before:
            write_lines(map(visible, before or [f"{name}: nothing to do" for name in audited]))
            ctx.exit(1 if before else 0)
        establish(link, wanted, audited)
        left = differences(link, wanted, audited)
    write_lines(visible(line) for line in before if line not in left)
    if left:
        for line in left:
            click.echo(f"not done: {visible(line)}", err=True)
        click.echo("what another role owns or granted can be changed by that role or a superuser alone", err=True)
        ctx.exit(1)


def _checked(names: dict[str, str | None]) -> Roles:
    wanted = Roles(
        **{
            kind: None if name is None else check_role_name(name, f"--{kind.replace('_', '-')}")
            for kind, name in names.items()
        }
    )
    others = (wanted.writer, wanted.reader, wanted.sealer, wanted.custodian)
    if wanted.tenant_reader is not None and wanted.tenant_reader in others:
        raise ConfigError(
            "`--tenant-reader`: a role that reads one tenant's events can be no other role as well, since those may "
            "do more on the table itself",
            field="--tenant-reader",
        )
    return wanted
