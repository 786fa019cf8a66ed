"""``tracevault verify``: whether anybody changed the log, and what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click

from tracevault import Report, Verdict
from tracevault.cli.connect import connection, conninfo, read_dsn
from tracevault.cli.options import dsn_option, seconds, table_option
from tracevault.cli.output import Output, console, is_terminal, number, progress_bar, span, visible, write_lines
from tracevault.config import check_table_name
from tracevault.events.json_text import json_text
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.sealing.jobs import MOST_JOBS
from tracevault.sealing.offline import verify_file
from tracevault.sealing.trust import trust_of
from tracevault.sealing.verified import Verified
from tracevault.sealing.verify import GRACE, Progress, origin_of, verify

_STYLES = {
    Verdict.OK: "bold green",
    Verdict.CONSISTENT: "bold yellow",
    Verdict.INCOMPLETE: "bold yellow",
    Verdict.TAMPERED: "bold red",
    Verdict.UNKNOWN: "bold red",
}
# So many bad rows are shown to a person; JSON has more.
_SHOWN = 20


@click.command("verify")
@table_option
@click.option(
    "--key",
    "keys",
    metavar="VKEY",
    multiple=True,
    help="a verifier key of the log, as `tracevault keygen` prints it; VKEY@SIZE is believed up to that size; "
    "repeatable",
)
@click.option(
    "--anchor",
    "anchors",
    metavar="ANCHOR",
    multiple=True,
    help="checkpoints outside the database: an anchor's file, directory or address; repeatable",
)
@click.option(
    "--export",
    "exported",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="verify a file that `tracevault export --verifiable` has written; no database is asked",
)
@click.option("--archive", metavar="PLACE", help="verify what `tracevault archive` has written; no database is asked")
@click.option(
    "--state",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="a file that remembers what was verified; the next time only what is new is looked at",
)
@click.option("--full", is_flag=True, help="look at every row, whatever --state remembers")
@click.option(
    "--grace",
    metavar="TIME",
    default=f"{GRACE:g}s",
    callback=seconds,
    help="for how long a row may wait for its seal; default: 60s",
)
@click.option(
    "--jobs",
    metavar="NUMBER",
    type=click.IntRange(1, MOST_JOBS),
    help="how many processes check rows at once; default: one per CPU up to 4, and one for a small log",
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), help="for a person, or one JSON object")
@click.option("--json", "as_json", is_flag=True, help="the same as `-o json`")
@dsn_option("DATABASE_URL_READ, else DATABASE_URL_WRITE")
@click.pass_context
def verify_command(
    ctx: click.Context,
    dsn: str | None,
    table: str,
    keys: tuple[str, ...],
    anchors: tuple[str, ...],
    exported: Path | None,
    archive: str | None,
    *,
    state: Path | None,
    full: bool,
    grace: float,
    jobs: int | None,
    output: Output | None,
    as_json: bool,
) -> None:
    """Verify that nobody changed an audit table.

    Every row is hashed anew and compared with the tree, and the tree with signed checkpoints. OK takes a checkpoint
    from outside the database: whoever owns it, and the key, could make everything inside anew.

    Exit 0 OK, 1 tampered, 3 could not be checked, 4 consistent but not anchored, 5 rows wait too long to be sealed or
    signed.
    """
    if exported is not None or archive is not None:
        if dsn is not None or state is not None or full or jobs is not None or (exported and archive):
            raise click.UsageError(
                "--export and --archive take no --dsn, --state, --full or --jobs: each is looked at as it stands"
            )
        with progress_bar("verifying") as progress:
            if exported is not None:
                report = verify_file(exported, keys=keys, anchors=anchors, progress=progress)
            else:
                report = _archived(archive or "", check_table_name(table, "--table"), keys, anchors, progress)
    else:
        report = _verified(read_dsn(dsn), check_table_name(table, "--table"), keys, anchors, state, full, grace, jobs)
    if as_json or output == "json" or (output is None and not is_terminal()):
        write_lines([json_text(report.as_dict())])
    else:
        _print(report)
    ctx.exit(report.verdict.value)


def _archived(location: str, table: str, keys: tuple[str, ...], anchors: tuple[str, ...], progress: Progress) -> Report:
    from tracevault.archive.store import Store  # noqa: PLC0415 - they need an extra
    from tracevault.archive.verify import verify_archive  # noqa: PLC0415

    return verify_archive(Store(location, table), keys=keys, anchors=anchors, progress=progress)


def _verified(
    dsn: str,
    table: str,
    keys: tuple[str, ...],
    anchors: tuple[str, ...],
    state: Path | None,
    full: bool,
    grace: float,
    jobs: int | None,
) -> Report:
    with conninfo(dsn) as target, connection(target, "verifying") as link:
        origin = origin_of(link, table)
        trust = trust_of(keys, anchors, origin=origin)
        verified = None if state is None else Verified(state, trust)
        before = verified.read(origin) if verified is not None else None
        if before is not None:
            trust = replace(trust, outside=[*trust.outside, before])
        first = None if before is None or full else Checkpoint.parse(before.note.text)
        with progress_bar("verifying") as progress:
            report = verify(link, table, trust, first=first, grace=grace, progress=progress, jobs=jobs, conninfo=target)
        if verified is not None and report.verdict in (Verdict.OK, Verdict.CONSISTENT, Verdict.INCOMPLETE):
            verified.remember(link, report)
    return report


def _print(report: Report) -> None:
    from rich.text import Text  # noqa: PLC0415 - see output.py

    out = console()
    out.print(Text.assemble((report.verdict.name, _STYLES[report.verdict]), f"  {_summary(report)}"), soft_wrap=True)
    for line in _lines(report):
        out.print(Text(f"  {visible(line)}"), soft_wrap=True)
    for problem in report.problems[:_SHOWN]:
        place = "" if problem.index is None else f"leaf {problem.index:,}"
        who = "" if problem.id is None else str(problem.id)
        head = "  ".join(part for part in (place, who) if part)
        out.print(
            Text.assemble("  ", (f"{problem.kind:<12}", "red"), f"{head}\n      {visible(problem.detail)}"),
            soft_wrap=True,
        )
    left = len(report.problems) - _SHOWN + report.problems_left_out
    if left > 0:
        out.print(Text(f"  and {left:,} more; `-o json` names up to {len(report.problems):,}"), soft_wrap=True)


def _summary(report: Report) -> str:
    match report.verdict:
        case Verdict.OK:
            assert report.anchor is not None
            since = "" if report.anchor.at is None else f", {_age(report.anchor.at)} old"
            leaves = number(report.anchor.size, "leaf", "leaves")
            return f"nothing was changed up to a checkpoint of {leaves} kept outside{since}"
        case Verdict.CONSISTENT:
            return "nothing in it contradicts itself; no checkpoint from outside was compared"
        case Verdict.INCOMPLETE:
            if report.oldest_unsigned_seconds > report.oldest_unsealed_seconds:
                leaves, waits = number(report.unsigned, "leaf", "leaves"), span(report.oldest_unsigned_seconds)
                return f"{leaves} not signed, the oldest waits for {waits}"
            if not report.unsealed:
                leaves = number(report.unsigned, "leaf", "leaves")
                return f"no signed checkpoint covers the last {leaves} of the file: of these nothing can be said"
            waits = span(report.oldest_unsealed_seconds)
            return f"{number(report.unsealed, 'row')} not sealed, the oldest waits for {waits}"
        case Verdict.TAMPERED:
            return number(len(report.problems) + report.problems_left_out, "thing is", "things are") + (
                " not as they were sealed"
            )
        case _:
            return "it could not be checked"


def _lines(report: Report) -> Iterator[str]:
    rows = f"{number(report.checked, 'row')} as sealed"
    if report.first:
        rows += f", from leaf {report.first:,} on; those before were verified earlier"
    rows += "".join(
        f", {count:,} {what}" for count, what in ((report.erased, "erased"), (report.pruned, "pruned")) if count
    )
    if not report.origin:
        yield f"{report.table}: {number(report.unsealed, 'row')} in files as their manifests say; nobody sealed them"
        yield f"took {report.seconds:,.1f} s"
        return
    yield f"{report.table} is the log {report.origin} with {number(report.size, 'leaf', 'leaves')}: {rows}"
    if report.anchor is not None:
        later = report.size - report.anchor.size
        yield f"compared with {report.anchor.source}" + (
            f"; {number(later, 'leaf', 'leaves')} came later" if later else ""
        )
    if not report.signatures_checked:
        yield "signatures were not checked: pass the log's verifier key as --key"
    if report.unsigned:
        yield f"{number(report.unsigned, 'leaf', 'leaves')} not signed yet"
    if report.unsealed and report.verdict is not Verdict.INCOMPLETE:
        waits = f", the oldest waits for {span(age)}" if (age := report.oldest_unsealed_seconds) else ""
        yield f"{number(report.unsealed, 'row')} not sealed{' yet' if waits else ''}{waits}"
    yield f"took {report.seconds:,.1f} s"


def _age(moment: datetime) -> str:
    return span((datetime.now(UTC) - moment).total_seconds())
