"""Options that several commands share; those of filters derive from the filter table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from tracevault import parse_query
from tracevault.cli.output import is_terminal
from tracevault.config import DEFAULT_TABLE
from tracevault.flows.aggregate import DEFAULT_AT_MOST
from tracevault.schema.filters import FIND_FILTERS, PAGE_FILTERS, Filter

_OUTPUT_HELP = "for a person, or JSON with one event per line; default: table on a terminal, else json"

_WHERE_HELP = "a query text as well: `event:auth.* actor:user/42 since:7d`"

_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|d)", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

F = TypeVar("F", bound=Callable[..., Any])


def seconds(ctx: click.Context, parameter: click.Parameter, value: str) -> float:
    """Return the seconds in ``250ms``, ``2s``, ``5m`` or ``1h``; the callback of an option."""
    match = _SPAN.fullmatch(value)
    if match is None or not float(match[1]):
        raise click.BadParameter(f"{value!r} is no span of time: 250ms, 2s, 5m, 1h", ctx, parameter)
    return float(match[1]) * _SECONDS[match[2]]


def dsn_option(variables: str) -> Callable[[F], F]:
    """Return the option ``--dsn``; ``variables`` says what takes its place."""
    return click.option(
        "--dsn", metavar="URL", help=f"the database: a PostgreSQL URL or `embedded:[PATH]`; default: {variables}"
    )


table_option = click.option("--table", metavar="NAME", default=DEFAULT_TABLE, show_default=True, help="the audit table")

key_store_option = click.option(
    "--key-store",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="the data keys, to decrypt what is stored encrypted; without them it is printed as it is stored",
)
reason_option = click.option("--reason", metavar="TEXT", help="why; it stands in the event")
yes_option = click.option("--yes", is_flag=True, help="do not ask")
proof_timeout_option = click.option(
    "--timeout",
    metavar="TIME",
    default="2m",
    callback=seconds,
    help="for how long to wait until the event is sealed and anchored; default: 2m",
)
tables_option = click.option(
    "--table",
    "tables",
    metavar="NAME",
    multiple=True,
    default=[DEFAULT_TABLE],
    show_default=True,
    help="an audit table; repeatable",
)


def output_options(function: F) -> F:
    """Add ``-o`` and ``--json``; the command gets ``output``, which is JSON unless a person reads."""

    @click.option("-o", "--output", type=click.Choice(["table", "json"]), help=_OUTPUT_HELP)
    @click.option("--json", "as_json", is_flag=True, help="the same as `-o json`")
    @wraps(function)
    def command(*args: Any, output: str | None, as_json: bool, **options: Any) -> Any:
        chosen = "json" if as_json else output or ("table" if is_terminal() else "json")
        return function(*args, output=chosen, **options)

    return cast("F", command)


def limits(function: F) -> F:
    """Add ``--timeout`` and ``--at-most`` of commands that count."""
    function = click.option(
        "--at-most",
        type=int,
        default=DEFAULT_AT_MOST,
        show_default=True,
        metavar="NUMBER",
        help="newest events to count; it says so if there are more",
    )(function)
    return click.option(
        "--timeout", type=float, default=60.0, show_default=True, metavar="SECONDS", help="how long counting may take"
    )(function)


def filter_options(filters: Mapping[str, Filter]) -> Callable[[F], F]:
    """Return a decorator that adds one option per filter, named like it."""

    def decorate(function: F) -> F:
        function = click.option("--where", metavar="QUERY", help=_WHERE_HELP)(function)
        for name, spec in reversed(list(filters.items())):  # click lists the last one first
            function = click.option(f"--{name.replace('_', '-')}", name, **_kind(spec), help=spec.help)(function)
        return function

    return decorate


def given_filters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the filters that were given, as the API takes them; it checks them."""
    filters: dict[str, Any] = {}
    where = values.get("where")
    if where is not None:
        filters = parse_query(where)
    asked = set(filters)
    for name, value in values.items():
        if name == "where" or value in (None, ()):
            continue
        if name in asked:
            raise click.UsageError(f"--{name.replace('_', '-')} is given twice: also in --where")
        if isinstance(value, tuple):
            paths = (FIND_FILTERS | PAGE_FILTERS)[name].kind == "paths"
            filters[name] = _paths(name, value) if paths else [item for text in value for item in text.split(",")]
        else:
            filters[name] = value
    return filters


def _paths(name: str, texts: tuple[str, ...]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals or path in paths:
            wrong = "is given twice" if equals else "has no value: PATH=VALUE"
            raise click.UsageError(f"--{name} {path}: {wrong}")
        paths[path] = _scalar(value)
    return paths


def _scalar(text: str) -> Any:
    """Return what JSON means by ``text`` if it is a number, true, false, null or a string; else the text itself."""
    try:
        value = json.loads(text, parse_float=Decimal, parse_constant=str)
    except ValueError:
        return text
    return text if isinstance(value, (dict, list)) else value


def _kind(spec: Filter) -> dict[str, Any]:
    match spec.kind:
        case "flag":
            return {"is_flag": True, "default": None}
        case "list":
            return {"multiple": True, "metavar": "TEXT,..."}
        case "columns":
            return {"multiple": True, "metavar": "COLUMN,..."}
        case "paths":
            return {"multiple": True, "metavar": "PATH=VALUE"}
        case "choice":
            return {"type": click.Choice(spec.choices)}
        case "number":
            return {"type": int, "metavar": "NUMBER"}
        case "time":
            return {"metavar": "TIME"}
        case "cursor":
            return {"metavar": "CURSOR"}
        case _:
            return {"metavar": "TEXT"}
