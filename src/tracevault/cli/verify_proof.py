"""``tracevault verify-proof``: whether a file proves an event, and what the event says. It takes no database."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracevault import EventProof, ProofError
from tracevault.cli.files import read_text
from tracevault.cli.options import output_options
from tracevault.cli.output import Output, console, identity, visible, write_lines
from tracevault.events.json_text import json_text
from tracevault.events.payload import iso_utc
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.encoding import to_base64
from tracevault.integrity.event_proof import SignedBy, trusted_keys
from tracevault.integrity.leaf import FIELDS, PAYLOADS
from tracevault.integrity.note import COSIGNATURE_V1
from tracevault.integrity.proof import MAX_PROOF

if TYPE_CHECKING:  # rich takes 40 ms, see output.py
    from rich.text import Text

_SHOWN_APART = frozenset({"id", "event", "actor_id", "actor_type", "target_id", "target_type", *PAYLOADS})


@click.command("verify-proof")
@click.argument("file", type=click.Path(allow_dash=True, path_type=Path))
@click.option(
    "--key",
    "keys",
    metavar="VKEY",
    multiple=True,
    required=True,
    help="a verifier key: the log's, as `tracevault keygen` prints it, and those of witnesses; VKEY@SIZE is believed "
    "up to that size; repeatable",
)
@output_options
@click.pass_context
def verify_proof_command(ctx: click.Context, file: Path, keys: tuple[str, ...], output: Output) -> None:
    """Check the proof of an event in FILE (- is standard input), and print what it proves.

    No database is asked. The verifier key has to come from somebody you trust, and not with the proof.

    Exit 0 if the event is proven, 1 if it is not.
    """
    given = [key for text in keys for key in text.split()]  # so that `"$(cat verifier-keys.txt)"` may have lines
    try:
        proof = EventProof.parse(_text(file))
        trusted = trusted_keys(given, proof.checkpoint.size)
        checkpoint = proof.verify(trusted)
        signed = proof.signed_by(trusted)
    except ProofError as error:
        _print_refusal(str(error), output)
        ctx.exit(1)
    if output == "json":
        write_lines([json_text(_as_dict(proof, checkpoint, signed))])
    else:
        _print(proof, checkpoint, signed)


def _text(path: Path) -> str:
    text = read_text(path, MAX_PROOF)
    if text is None:
        raise ProofError("the file is no proof: it is not UTF-8")
    return text


def _as_dict(proof: EventProof, checkpoint: Checkpoint, signed: Sequence[SignedBy]) -> dict[str, Any]:
    return {
        "verified": True,
        "origin": checkpoint.origin,
        "tree": proof.tree,
        "index": proof.index,
        "size": checkpoint.size,
        "root": checkpoint.root.hex(),
        "signed_by": [{"key": str(key), "at": None if at is None else iso_utc(at)} for key, at in signed],
        "event": _event(proof),
    }


def _event(proof: EventProof) -> dict[str, Any]:
    """Return what the event says, payloads nested."""
    return {name: _decoded(value) if name in PAYLOADS else value for name, value in proof.values.items()}


def _decoded(payload: str) -> Any:
    """Return a payload with its numbers to the last digit: 1.10 was proven, and not 1.1."""
    try:
        return json.loads(payload, parse_float=_plain)
    except (ValueError, RecursionError):  # a log of somebody else's making can hold anything
        return payload


def _plain(number: str) -> Decimal:
    if "e" in number.lower():  # which PostgreSQL never prints, and which could be terabytes
        raise ValueError
    return Decimal(number)


def _print_refusal(reason: str, output: Output) -> None:
    if output == "json":
        write_lines([json_text({"verified": False, "reason": reason})])
        return
    from rich.text import Text  # noqa: PLC0415 - see output.py

    line = Text.assemble(("NOT PROVEN", "bold red"), f"  {visible(reason)}")
    console().print(line, soft_wrap=True)


def _print(proof: EventProof, checkpoint: Checkpoint, signed: Sequence[SignedBy]) -> None:
    from rich.console import Group  # noqa: PLC0415 - see output.py
    from rich.padding import Padding  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from tracevault.cli.show import record_parts  # noqa: PLC0415

    event = _event(proof)
    log = Table.grid(padding=(0, 2))
    log.add_column(style="dim", no_wrap=True)
    log.add_column(overflow="fold")
    for name, value in _log(proof, checkpoint, signed):
        log.add_row(name, Text(visible(value)))
    parts = [
        Text.assemble(("PROVEN", "bold green"), f"  {_verdict(signed)}\n"),
        *record_parts(
            str(event.get("event", "")),
            str(event.get("id", "")),
            _fields(event),
            [(name, event.get(name)) for name in PAYLOADS],
        ),
        Text("\nthe log", style="dim"),
        Padding(log, (0, 0, 0, 2)),
    ]
    console().print(Group(*parts))


def _verdict(signed: Sequence[SignedBy]) -> str:
    times = [at for _key, at in signed if at is not None]
    since = f", and held it at {iso_utc(min(times))}" if times else ""
    return f"the log holds exactly this event{since}"


def _fields(event: dict[str, Any]) -> Iterator[tuple[str, Text]]:
    from rich.text import Text  # noqa: PLC0415 - see output.py

    for role in ("actor", "target"):
        id_, type_ = event.get(f"{role}_id"), event.get(f"{role}_type")
        if id_ is not None or type_ is not None:
            yield role, Text(identity(id_, type_))
    for stored in FIELDS:
        value = event.get(stored.name)
        if stored.name in _SHOWN_APART or value is None:
            continue
        if isinstance(value, int):
            yield stored.name, Text(f"{value:,} microseconds from 2000-01-01T00:00Z on")
        else:
            yield stored.name, Text(visible(value))
    for name in PAYLOADS:
        committed = event.get(f"{name}_commitment")
        if committed is not None:
            yield name, Text.assemble(("erased, or held back; its commitment:", "italic"), f"\n{committed}")


def _log(proof: EventProof, checkpoint: Checkpoint, signed: Sequence[SignedBy]) -> Iterator[tuple[str, str]]:
    yield "origin", checkpoint.origin
    yield "leaf", f"{proof.index:,}, counted from 0, of {checkpoint.size:,}"
    yield "root", to_base64(checkpoint.root)
    for key, at in signed:
        if key.algorithm == COSIGNATURE_V1 and at is not None:
            yield "cosigned", f"{iso_utc(at)} by {_short(key.name, key.key_id)}"
        else:
            yield "signed by", _short(key.name, key.key_id)
    others = len(proof.proof.checkpoint.signatures) - len(signed)
    if others > 0:
        yield "not checked", f"{others} signature{'s' if others > 1 else ''} by keys that were not given"


def _short(name: str, key_id: bytes) -> str:
    return f"{name}+{key_id.hex()}"
