"""The group of all commands, and what becomes of their errors."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from tracevault import ConfigError, QueryError, TracevaultError, ValidationError, __version__
from tracevault.cli.archive import archive, restore
from tracevault.cli.bench import bench
from tracevault.cli.catalog import catalog
from tracevault.cli.completion import completion
from tracevault.cli.count import count
from tracevault.cli.custody import erase, prune
from tracevault.cli.demo import demo
from tracevault.cli.diff import diff
from tracevault.cli.doctor import doctor
from tracevault.cli.emit import emit
from tracevault.cli.export import export
from tracevault.cli.facets import facets
from tracevault.cli.find import find
from tracevault.cli.get import get
from tracevault.cli.histogram import histogram
from tracevault.cli.history import history
from tracevault.cli.hold import hold
from tracevault.cli.import_ import import_events
from tracevault.cli.ingest import ingest
from tracevault.cli.init_sql import init_sql
from tracevault.cli.keygen import keygen
from tracevault.cli.lint import lint
from tracevault.cli.migrate import migrate
from tracevault.cli.output import visible
from tracevault.cli.partitions import partitions
from tracevault.cli.prove import prove_command
from tracevault.cli.push import push
from tracevault.cli.retention import retention
from tracevault.cli.roles import roles
from tracevault.cli.seal import seal
from tracevault.cli.serve import serve
from tracevault.cli.spool import spool
from tracevault.cli.sql_path import sql_path
from tracevault.cli.status import status
from tracevault.cli.tail import tail
from tracevault.cli.trace import trace
from tracevault.cli.verify import verify_command
from tracevault.cli.verify_proof import verify_proof_command

WRONG = 2
FAILED = 3
INTERRUPTED = 130
# What a shell reports for a program that SIGPIPE ended, as `| head` does to most of them.
PIPE_CLOSED = 141


class _Commands(click.Group):
    """Lists the commands in the order in which they are met, and ends quietly where the reader has left."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        # Here, since click's own answer to a closed pipe is exit code 1, which means "no" in ours.
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _drop_output()
            ctx.exit(PIPE_CLOSED)
        return result


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 the answer is no, 2 wrong usage, 3 could not reach or do it.",
)
@click.version_option(__version__, prog_name="tracevault", message="%(prog)s %(version)s")
@click.pass_context
def tracevault(ctx: click.Context) -> None:
    """Audit events on PostgreSQL: emit, keep, prove, read.

    Commands that connect take --dsn, else DATABASE_URL_WRITE or DATABASE_URL_READ from the environment.
    "--dsn embedded:" is a PostgreSQL of tracevault's own, in ./.tracevault.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _command in (
    *(demo, emit, find, get, count, tail, trace, history, diff, histogram, facets, serve),
    *(migrate, partitions, roles, doctor, spool),
    *(keygen, seal, status, verify_command, prove_command, verify_proof_command),
    *(export, import_events, push, ingest),
    *(retention, hold, archive, restore, prune, erase),
    *(catalog, lint, init_sql, sql_path, bench, completion),
):
    tracevault.add_command(_command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command (default: ``sys.argv``) and return the exit code. An expected error is one line, no more."""
    # What a pool has to say of its connections, an error says as well.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    for stream in (sys.stdout, sys.stderr):
        # Text that the terminal's encoding lacks is written as an escape; it must not end the command.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return tracevault.main(arguments, prog_name="tracevault", standalone_mode=False) or 0
    except click.Abort:
        return INTERRUPTED
    except click.UsageError as error:
        hint = f"\nsee `{error.ctx.command_path} --help`" if error.ctx else ""
        return _failed(error.format_message() + hint, WRONG)
    except click.ClickException as error:
        return _failed(error.format_message(), FAILED)
    except QueryError as error:
        return _failed(f"{error}\n  " + error.pointer.replace("\n", "\n  "), WRONG)
    except (ConfigError, ValidationError) as error:
        return _failed(str(error), WRONG)
    except TracevaultError as error:
        return _failed(str(error), FAILED)
    except OSError as error:  # a full disk behind `> file`, a folder that may not be made
        _drop_output()
        return _failed(str(error), FAILED)


def _drop_output() -> None:
    """Send what is still buffered nowhere, or Python would try once more at exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(message: str, code: int) -> int:
    # Also here: a message can quote what was typed or stored.
    lines = "\n".join(visible(line) for line in message.splitlines())
    click.echo(f"error: {lines}", err=True)
    return code
