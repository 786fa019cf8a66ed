"""``tracevault prove``: one event with the proof that the log holds it, in a file for others."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from tracevault import EventProof, ProofError, SealError
from tracevault.cli.connect import connection, read_dsn
from tracevault.cli.files import read_text
from tracevault.cli.options import dsn_option, table_option
from tracevault.config import check_table_name
from tracevault.flows.prove import UnknownEventError
from tracevault.integrity.note import MAX_NOTE, Note
from tracevault.sealing.prove import prove


@click.command("prove")
@click.argument("id")
@table_option
@click.option(
    "-o", "--output", "path", metavar="FILE", type=click.Path(path_type=Path), help="where to; default: standard output"
)
@click.option(
    "--checkpoint",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="a signed checkpoint to prove it by, as an anchor keeps it; default: one that is stored",
)
@click.option(
    "--index",
    metavar="NUMBER",
    type=click.IntRange(min=0),
    help="which leaf, where a partitioned table has the id twice",
)
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
@click.pass_context
def prove_command(
    ctx: click.Context,
    id: str,  # noqa: A002
    dsn: str | None,
    table: str,
    path: Path | None,
    checkpoint: Path | None,
    index: int | None,
) -> None:
    """Write the proof that the log holds an event: a file for somebody without access to the database.

    It holds the event, the hashes that lead from it to a checkpoint, and the checkpoint as the log's key, and perhaps
    witnesses, signed it: a C2SP tlog-proof. `tracevault verify-proof` checks it.

    Exit 1 if there is no event with this ID.
    """
    name = check_table_name(table, "--table")
    note = None if checkpoint is None else _note(checkpoint)
    try:
        with connection(read_dsn(dsn), "proving an event") as link:
            proof = prove(link, name, id, checkpoint=note, index=index)
    except UnknownEventError:
        click.echo(f"not found: {id} in table {name}", err=True)
        ctx.exit(1)
    text = str(proof).encode()
    if path is None:
        click.echo(text, nl=False)  # as bytes: a proof is UTF-8, whatever the terminal's encoding is
        return
    path.write_bytes(text)
    for line in _told(proof, path):
        click.echo(line, err=True)


def _told(proof: EventProof, path: Path) -> list[str]:
    checkpoint = proof.checkpoint
    file = shlex.quote(os.fspath(path))
    return [
        f"wrote {file}: leaf {proof.index:,} of {checkpoint.origin} at size {checkpoint.size:,}",
        f"`tracevault verify-proof {file} --key VKEY` checks it; VKEY is what `tracevault keygen` printed",
    ]


def _note(path: Path) -> Note:
    """Return the checkpoint in a file."""
    text = read_text(path, MAX_NOTE)
    try:
        if text is None:
            raise ProofError("it is not UTF-8")
        return Note.parse(text)
    except ProofError as error:
        raise SealError(f"{str(path)!r} holds no signed checkpoint: {error}") from None
