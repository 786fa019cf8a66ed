"""``tracevault lint``: what changes something, and leaves no event."""

from __future__ import annotations

from pathlib import Path

import click

from tracevault.cli.options import output_options
from tracevault.cli.output import Output, number, visible, write_lines
from tracevault.events.json_text import json_text


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--exclude",
    metavar="PATTERN",
    multiple=True,
    help="files that are left out, by their path inside PATH: `scripts/*.py`; repeatable",
)
@output_options
@click.pass_context
def lint(ctx: click.Context, paths: tuple[Path, ...], exclude: tuple[str, ...], output: Output) -> None:
    """Find routes and writes of models that leave no audit event, in Starlette, FastAPI, Django and Flask projects.

    The code is read, not run. Tests, migrations and virtual environments are left out. Exit code 1: something is found.
    """
    from tracevault.lint.findings import find, lines  # noqa: PLC0415 - other commands need not wait for it

    found = find(paths, exclude)
    if output == "json":
        write_lines(json_text({**each._asdict(), "path": str(each.path)}) for each in found.found)
    else:
        write_lines(visible(line) for line in lines(found.found, Path.cwd()))
    looked = ", ".join((number(found.files, "file"), number(found.routes, "route"), number(found.writes, "write")))
    click.echo(f"{number(len(found.found), 'finding')}; looked at {looked}", err=True)
    ctx.exit(1 if found.found else 0)
