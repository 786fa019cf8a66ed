"""``tracevault retention``: what is older than it is to be kept, shown and removed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any
from uuid import UUID

import click

from tracevault import ConfigError, ValidationError
from tracevault.cli.connect import connection, read_dsn, vault, write_dsn
from tracevault.cli.custody import operator, state_events
from tracevault.cli.options import (
    dsn_option,
    output_options,
    proof_timeout_option,
    reason_option,
    table_option,
    yes_option,
)
from tracevault.cli.output import Output, number, progress_bar, write_lines
from tracevault.config import check_table_name, config_from
from tracevault.events.json_text import json_text
from tracevault.events.payload import iso_utc
from tracevault.flows.retention import Retention
from tracevault.schema.custody import PRUNED
from tracevault.schema.retention import Rule, rules
from tracevault.sealing.retention import apply_retention, plan_retention

_retain = click.option(
    "--retain",
    "retain",
    metavar="[PATTERN=]PERIOD",
    multiple=True,
    help='for how long: `"400 days"` for all, `"auth.*=90 days"` for some, `forever`; repeatable',
)
_options = click.option(
    "--options",
    metavar="MODULE:NAME",
    help="a program's options of its vault, whose `scopes` say `retain` of the table; in place of --retain",
)


@click.group()
def retention() -> None:
    """Remove events that are older than they are to be kept.

    The rule that says most about an event's name decides. Events under a hold stay, see `tracevault hold`, as do those
    of tracevault itself unless a rule names them.
    """


@retention.command()
@table_option
@_retain
@_options
@output_options
@dsn_option("DATABASE_URL_READ, DATABASE_URL_WRITE")
def plan(dsn: str | None, table: str, retain: tuple[str, ...], options: str | None, output: Output) -> None:
    """Print what would go, and why. Removes nothing."""
    name = check_table_name(table, "--table")
    known = _rules(name, retain, options)
    with connection(read_dsn(dsn), "planning retention") as link:
        planned = plan_retention(link, name, known)
    write_lines([json_text(_as_json(planned))] if output == "json" else _shown(planned))


@retention.command()
@table_option
@_retain
@_options
@reason_option
@yes_option
@proof_timeout_option
@dsn_option("DATABASE_URL_WRITE")
def apply(
    dsn: str | None,
    table: str,
    retain: tuple[str, ...],
    options: str | None,
    reason: str | None,
    yes: bool,
    timeout: float,
) -> None:
    """Remove what `plan` shows: whole partitions where all of one goes, else rows, some thousands at a time.

    An event says first what goes. Where the table is sealed it must be sealed and anchored before anything goes, and it
    takes the custodian's role; else it takes the owner's. Interrupted, run it again.
    """
    name = check_table_name(table, "--table")
    known = _rules(name, retain, options)
    dsn = write_dsn(dsn)
    with connection(dsn, "retention") as link:
        planned = plan_retention(link, name, known)
        for line in _shown(planned):
            click.echo(line, err=True)
        _refuse_unsealed(planned)
        if not planned.rows and not planned.drops:
            return
        if not (yes or click.confirm("They will be removed for good. Go on?", err=True)):
            return
        ids = state(dsn, planned, reason)
        for id_ in ids:
            click.echo(f"event {id_} says so" + ("; waiting until that is proven" if planned.tree else ""), err=True)
        with progress_bar("removed") as progress:
            gone = apply_retention(link, planned, known, ids, timeout, progress)
    click.echo(f"{number(gone, 'row')} removed")


def _rules(table: str, retain: Sequence[str], options: str | None) -> tuple[Rule, ...]:
    if (options is None) != bool(retain):
        raise click.UsageError("give --retain, or --options of a program that says so")
    if options is not None:
        found = config_from(_imported(options)).retain
        if table not in found:
            raise ConfigError(f"`--options`: no scope with `retain` is of table `{table}`", field="--options")
        return rules(found[table])
    given = {}
    for text in retain:
        pattern, equals, period = text.rpartition("=")
        given[pattern if equals else "*"] = period
    return rules(given, "--retain")


def _imported(text: str) -> Mapping[str, Any]:
    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        options = getattr(import_module(module), name)
    except Exception as error:
        raise click.ClickException(f"{text} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(options, Mapping):
        raise click.UsageError(f"{text} is no mapping of options")
    return {name.lower(): value for name, value in options.items()}  # Django's settings are in capitals


def _refuse_unsealed(planned: Retention) -> None:
    waiting = sum(due.affected.unsealed for due in planned.due) if planned.tree else 0
    if waiting:
        raise ValidationError(
            f"{number(waiting, 'row')} of them are not sealed yet, and would stay: run `tracevault seal`, then this"
        )


def state(dsn: str, planned: Retention, reason: str | None) -> list[UUID]:
    """Emit the events that say what goes; return their ids."""
    ids = []
    for due in planned.due:
        said = {"rule": due.rule.pattern, "period": due.rule.period, "before": iso_utc(due.before)}
        if planned.tree is not None:
            if due.affected.ranges:
                ids += state_events(dsn, planned.table, planned.tree, due.affected, PRUNED, said, reason)
        elif due.affected.unsealed:
            data = {**said, **({"reason": reason} if reason else {}), "rows": due.affected.unsealed}
            with vault(dsn, planned.table) as audit:
                ids.append(audit.emit(PRUNED, data=data, meta=operator()).id)
    return ids


def _as_json(planned: Retention) -> dict[str, Any]:
    return {
        "table": planned.table,
        "sealed": planned.tree is not None,
        "rules": [
            {
                "pattern": due.rule.pattern,
                "period": due.rule.period,
                "before": iso_utc(due.before),
                "rows": planned.rows_of(due),
                "held": due.affected.held,
                "not_sealed_yet": due.affected.unsealed if planned.tree else None,
            }
            for due in planned.due
        ],
        "partitions": list(planned.drops),
    }


def _shown(planned: Retention) -> Iterator[str]:
    for due in planned.due:
        rows = planned.rows_of(due)
        held = f"; {due.affected.held:,} more stay, since they are held" if due.affected.held else ""
        waiting = f"; {due.affected.unsealed:,} are not sealed yet" if planned.tree and due.affected.unsealed else ""
        what = "all other events" if due.rule.pattern == "*" else due.rule.pattern
        yield (
            f"{planned.table}: {what}, kept {due.rule.period}: {number(rows, 'row')} from before "
            f"{iso_utc(due.before)}{held}{waiting}"
        )
    if planned.drops:
        yield f"{planned.table}: {number(len(planned.drops), 'partition')} as a whole: {', '.join(planned.drops)}"
    if not planned.rows and not planned.drops:
        yield f"{planned.table}: nothing to remove"
