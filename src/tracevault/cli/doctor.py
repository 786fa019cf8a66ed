"""``tracevault doctor``: whether everything is as it should be, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Iterable

import click

from tracevault import DriverError
from tracevault.cli.checks import (
    Finding,
    check_clock,
    check_driver,
    check_partitions,
    check_reads,
    check_seals,
    check_server,
    check_table,
)
from tracevault.cli.connect import connection, read_dsn, write_dsn
from tracevault.cli.options import dsn_option, tables_option
from tracevault.cli.output import console, visible
from tracevault.config import check_table_name

_STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
_UNREACHABLE = 3


class _Report:
    """Prints findings as they come, and remembers whether one of them is a failure."""

    def __init__(self) -> None:
        self.failed = False
        self._console = console()

    def add(self, findings: Iterable[Finding]) -> None:
        from rich.text import Text  # noqa: PLC0415 - see output.py

        for level, text, advice in findings:
            self.failed = self.failed or level == "FAIL"
            lines = Text.assemble((f"{level:<6}", _STYLES[level]), visible(text))
            if advice:
                lines.append(f"\n      {visible(advice)}", style="dim")
            self._console.print(lines, soft_wrap=True)


@click.command()
@tables_option
@dsn_option("DATABASE_URL_WRITE, and DATABASE_URL_READ for what concerns reads")
@click.pass_context
def doctor(ctx: click.Context, dsn: str | None, tables: tuple[str, ...]) -> None:
    """Examine connection, server, tables and rights.

    It says what to do about what it finds, and changes nothing. Exit 0 if all is well, warnings included; 1 if
    something fails; 3 if the database cannot be reached.
    """
    names = list(dict.fromkeys(check_table_name(name, "--table") for name in tables))
    write = write_dsn(dsn)
    # A DATABASE_URL_READ of the environment says nothing about a database that was named on the command line.
    read = write if dsn is not None else read_dsn(None)
    report = _Report()
    report.add(check_driver())
    try:
        with connection(write, "connecting") as link:
            report.add(check_server(link))
            report.add(check_clock(link))
            for name in names:
                report.add(check_table(link, name, reads=read == write))
                report.add(check_partitions(link, name))
                report.add(check_seals(link, name))
        if read == write:
            advice = "set DATABASE_URL_READ to a role with SELECT only"
            report.add([Finding("warn", "reads use the write connection, so a reader could also write", advice)])
        else:
            with connection(read, "connecting to read") as link:
                report.add(check_reads(link, names))
    except DriverError as error:
        report.add([Finding("FAIL", str(error), "")])
        ctx.exit(_UNREACHABLE)
    ctx.exit(1 if report.failed else 0)
