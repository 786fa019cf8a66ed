"""``tracevault keygen``: a key that signs checkpoints, and what others verify them with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from tracevault.config import DEFAULT_TABLE, check_table_name
from tracevault.integrity.note import Signer
from tracevault.sealing import keys
from tracevault.sealing.signer import state_path


@click.command()
@click.argument("name", required=False)
@click.option("-o", "--output", "path", metavar="FILE", type=click.Path(path_type=Path), help="the key file to make")
@click.option("--show", metavar="FILE", type=click.Path(path_type=Path), help="print those of a key file that exists")
@click.option(
    "--table", "tables", metavar="NAME", multiple=True, help=f"an audit table; repeatable; default: `{DEFAULT_TABLE}`"
)
def keygen(name: str | None, path: Path | None, show: Path | None, tables: tuple[str, ...]) -> None:
    """Make a key that signs checkpoints, and print what verifies them.

    NAME is a domain of yours and the deployment: log.example.com/shop. For each table a verifier key is printed, which
    is public; the key file, which only its owner can read, stays on the host that seals. A file that exists is never
    overwritten.
    """
    origins = [check_table_name(table) for table in tables] or [DEFAULT_TABLE]
    if show is not None:
        if name is not None or path is not None:
            raise click.UsageError("--show prints the keys of a file that exists: no NAME and no -o with it")
        _print_verifiers(keys.read_keys(show), origins)
        return
    if name is None or path is None:
        raise click.UsageError("give a NAME and, with -o, the file; or --show with a file that exists")
    signer = keys.generate(name)
    keys.write_key(path, signer)
    _print_verifiers([signer], origins)
    advice = keys.name_advice(name)
    lines = [
        *([f"note: {advice}"] if advice else []),
        f"made {path}: it signs the log. Keep it safe, out of the database and its backups; {state_path(path)} will "
        "hold what it signed last, and belongs with it",
        "give each line above to whoever verifies that table's log, by a way that the database's administrators "
        f"cannot change; `tracevault keygen --show {shlex.quote(str(path))}` prints them again",
    ]
    for line in lines:
        click.echo(line, err=True)


def _print_verifiers(signers: Sequence[Signer], tables: Sequence[str]) -> None:
    for table in tables:
        for signer in signers:
            click.echo(str(signer.renamed(f"{signer.verifier.name}/{table}").verifier))
