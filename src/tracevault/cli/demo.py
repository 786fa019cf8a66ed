"""``tracevault demo``: the first thing a stranger runs. What it prints is read back from the log."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracevault import AuditRecord, Tracevault, __version__, random_correlation_id
from tracevault.cli import story
from tracevault.cli.connect import EMBEDDED_FOLDER, TIMEOUT, conninfo
from tracevault.cli.output import console, fits, identity, visible
from tracevault.events.history import field_changes
from tracevault.postgres.failures import Place
from tracevault.postgres.pool import connect_once

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@click.command()
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=EMBEDDED_FOLDER,
    show_default=True,
    help="where the database is kept",
)
def demo(folder: Path) -> None:
    """See it work: a small story on a PostgreSQL of its own.

    Nothing has to be installed or running. The data is kept; run again, it adds the same story once more.
    """
    dsn = "embedded:" if folder == Path(EMBEDDED_FOLDER) else f"embedded:{folder}"
    run = random_correlation_id()
    with (
        console(stderr=True).status(f"starting PostgreSQL in {visible(str(folder))}"),
        conninfo(dsn, create=True) as target,
        Tracevault(connection_string=target, **story.OPTIONS) as audit,
        closing(connect_once(target, TIMEOUT, Place("demo"))) as shop,
    ):
        story.tell(audit, shop, run)
        told = story.read_back(audit, run)
        connect = partial(connect_once, target, TIMEOUT, Place("demo"))
        sealed = (
            story.tamper(audit, connect, folder.absolute(), told.last("payment.captured").id) if _can_seal() else None
        )
        version = shop.info.parameter_status("server_version")
    out = console()
    out.print(f"tracevault {__version__} on PostgreSQL {version}: a morning in a small shop\n", style="bold")
    _print_story(out, told.records)
    _print_findings(out, told, sealed)
    _print_next(out, told, sealed, folder, dsn)


def _can_seal() -> bool:
    return find_spec("cryptography") is not None


def _print_story(out: Console, records: list[AuditRecord]) -> None:
    wide = _story_table(records, reasons=True)
    out.print(wide if fits(out, wide) else _story_table(records, reasons=False))


def _story_table(records: list[AuditRecord], *, reasons: bool) -> Table:
    from rich.table import Table  # noqa: PLC0415 - see output.py
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for header in ("time (UTC)", "event", "actor", "target", "outcome"):
        table.add_column(header, no_wrap=True, overflow="ellipsis")
    for record in records:
        failed = record.outcome == "failure"
        outcome = Text(visible(record.outcome or ""), style="red" if failed else "")
        if reasons and record.error_code:
            outcome.append(f" {visible(record.error_code)}", style="dim")
        table.add_row(
            Text(record.occurred_at.isoformat(timespec="milliseconds")[11:23], style="dim"),
            Text(visible(record.event), style="bold"),
            identity(record.actor_id, record.actor_type),
            identity(record.target_id, record.target_type),
            outcome,
        )
    return table


def _print_findings(out: Console, told: story.Told, sealed: story.Tampering | None) -> None:
    from rich.table import Table  # noqa: PLC0415 - see output.py
    from rich.text import Text  # noqa: PLC0415

    from tracevault.cli.show import change_text  # noqa: PLC0415

    changes = {change.name: change for change in field_changes(told.last("product.price.updated").data)}
    registered: Any = told.last("user.registered").data
    kept, gone = told.counts[story.KEPT.id], told.counts[story.ROLLED_BACK.id]
    payments = told.counts["payment"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("scopes", "user.* is in the table audit_user_events, the rest in audit_logs")
    table.add_row(
        "diff", Text.assemble("product.price.updated holds what changed: price ", change_text(changes["price"]))
    )
    table.add_row(
        "mask", f"user.registered holds no password: {visible(str(registered['password']))} stands in its place"
    )
    table.add_row(
        "transaction",
        f"order {story.KEPT.id} was committed, and so was its event ({kept} stored); "
        f"order {story.ROLLED_BACK.id} was rolled back, and so was its event ({gone} stored)",
    )
    table.add_row("retry", f"payment.captured was emitted twice under one id ({payments} stored)")
    table.add_row("async", f"receipt.mailed was written in the background (mode {told.last('receipt.mailed').mode})")
    if sealed is None:
        table.add_row("seal", 'not shown: it takes the extra "seal", and a table without guards')
    else:
        said = "; ".join(f"leaf {problem.index}: {problem.detail}" for problem in sealed.meanwhile.problems)
        table.add_row(
            "seal",
            f"verify says {sealed.before.verdict.name}. A superuser then made 15 of the payment's 150, and verify said "
            f"{sealed.meanwhile.verdict.name}, {visible(said)}. The change was taken back",
        )
    out.print("\nWorth a look", style="bold")
    out.print(table)


def _print_next(out: Console, told: story.Told, sealed: story.Tampering | None, folder: Path, dsn: str) -> None:
    older = told.total - len(told.records)
    before = f", {older} of earlier ones" if older else ""
    out.print("\nTry next", style="bold")
    program, database = _program(), f"--dsn {shlex.quote(dsn)}"
    commands = [
        f"find {database} --errors-only",
        f"find {database} --table audit_user_events --actor-id ana",
        f"get {database} {told.last('product.price.updated').id}",
        f"history {database} {_of(told.last('product.price.updated'))}",
        f"doctor {database}",
    ]
    if find_spec("uvicorn") is not None and find_spec("jinja2") is not None:
        commands.insert(0, f"serve {database} --table audit_logs --table audit_user_events")
    if sealed is not None:
        commands.append(f"verify {database} --key {sealed.vkey} --anchor {_short(sealed.anchor)}")
    for command in commands:
        out.print(f"{program} {command}", style="cyan", soft_wrap=True)
    out.print(
        f"\nKept in {visible(str(folder))}: {len(told.records)} events of this run{before}.",
        style="dim",
        soft_wrap=True,
    )


def _of(record: AuditRecord) -> str:
    return f"{record.target_type} {record.target_id}"


def _program() -> str:
    """Return how this program was called, so that the commands work as printed, on the PATH or not."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{_short(Path(sys.executable))} -m tracevault"
    found = shutil.which("tracevault")
    if found is not None and Path(found).resolve() == called.resolve():
        return "tracevault"
    return _short(called)


def _short(path: Path) -> str:
    near = os.path.relpath(path)
    if near.startswith(".."):
        near = str(path)
    return shlex.quote(near if os.sep in near else f"./{near}")
