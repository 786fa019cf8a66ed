"""Tables of the documentation that derive from the code. ``python -m tests.docs.tables`` writes them anew.

In the Markdown each stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from tests.docs.pages import PAGES, name
from tracevault import Stats, TracevaultError, errors
from tracevault.cli.group import tracevault as command_line
from tracevault.config import Config, option_docs
from tracevault.events import event
from tracevault.events.record import BY_NAME, COLUMNS
from tracevault.integrity.leaf import FIELDS as LEAF_FIELDS
from tracevault.schema.filters import FIND_FILTERS, MAX_LIMIT, PAGE_FILTERS, Filter
from tracevault.schema.indexes import INDEXES, PAYLOAD_INDEXES

_MARKED = re.compile(r"(?P<begin><!-- table: (?P<name>[\w -]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
_MODULES = re.compile(r"(\w+\.)+")
_EXACTLY = re.compile(r"^(\w+) is exactly this: (.*)$")

_MICROSECONDS = "8 bytes: microseconds since 2000-01-01T00:00Z, signed"

# Which question an index answers cannot be read off its keys alone. A new index needs a line here.
_SERVES = {
    "occurred_at": "no filter; `since`, `until`; whatever has no index of its own",
    "event": "`event`",
    "event_prefix": "`event_prefix`",
    "actor": "`actor_id`, with or without `actor_type`",
    "target": "`target_id`, with or without `target_type`",
    "correlation_occurred_id": "`correlation_id`",
    "request": "`request_id`",
    "outcome_occurred": "`outcome`",
    "error_code_occurred": "`error_code`",
    "severity_occurred": "`severity`, `severities`",
    "errors": "`errors_only`",
    "tenant": "`tenant_id`",
    "trace": "`trace_id`",
    "stored": "`tail`, and the sealer",
    "data_paths": "`data`; built on request: `tracevault migrate --payload-indexes`",
    "meta_paths": "`meta`; likewise on request",
    "data_changes": "`changed`; likewise on request",
}


def table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; a ``|`` in a cell is escaped."""
    lines = [list(headers)]
    lines.append(["---"] * len(lines[0]))
    lines += [[" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def options() -> str:
    kinds = get_type_hints(Config)
    return table(
        ("Option", "Type", "Default", "Meaning"),
        ((f"`{doc.name}`", _type(kinds[doc.name]), _default(doc.default), doc.help) for doc in option_docs()),
    )


def _default(shown: str) -> str:
    return shown if shown == "required" else f"`{shown}`"


def _type(kind: Any) -> str:
    """Return a type as a reader of the table wants it: no modules, choices as themselves, None left out."""
    parts = [part for part in get_args(kind) if part is not type(None)] if type(None) in get_args(kind) else [kind]
    texts = []
    for part in parts:
        if get_origin(part) is Literal:
            texts += [f'`"{choice}"`' for choice in get_args(part)]
        else:
            text = part.__name__ if isinstance(part, type) else str(part)
            texts.append("`" + _MODULES.sub("", text) + "`")
    return ", ".join(texts)


def filters() -> str:
    return table(
        ("Filter", "Value", "Finds events for which"),
        (
            (f"`{key}`", _value(key, spec), _EXACTLY.sub(r"`\1` is exactly this (\2)", spec.help))
            for key, spec in FIND_FILTERS.items()
            if spec.sql is not None
        ),
    )


def paging() -> str:
    return table(
        ("Argument", "Value", "Meaning"),
        (
            (f"`{key}`", _value(key, spec), spec.help)
            for key, spec in (FIND_FILTERS | PAGE_FILTERS).items()
            if spec.sql is None
        ),
    )


def _value(key: str, spec: Filter) -> str:
    match spec.kind:
        case "text" | "event" | "prefix" | "words" | "key":
            return f"text, 1–{spec.limit} characters"
        case "hex":
            return f"text, {spec.limit} lower-case hex digits"
        case "columns":
            return "list of columns: " + ", ".join(f"`{column}`" for column in spec.choices)
        case "paths":
            return "mapping of paths to text, numbers, `True`, `False` or `None`"
        case "cursor":
            return "text, from `next_cursor`"
        case "choice":
            return ", ".join(f'`"{choice}"`' for choice in spec.choices)
        case "list":
            return f"list of text, 1–{spec.limit} characters each"
        case "flag":
            return "`True` (`False`: as if left out)"
        case "time":
            return "aware `datetime`, `date`, or ISO 8601 text with an offset"
        case "number":
            return f"1–{MAX_LIMIT}" if key == "limit" else "0 or more"


def fields() -> str:
    """Return the fields of an event, with the docstrings that stand under them in ``event.py``."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.parse(inspect.getsource(event)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for line, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr):
                kind = ast.unparse(line.annotation).removesuffix(" | None").replace("Identity", "Mapping")
                found[line.target.id] = (kind.replace("Mode", "str"), _text(ast.literal_eval(after.value)))
    order = ["event", "data", "before", "after", *(key for key in found if key not in {"event", "data"})]
    return table(
        ("Field", "Type", "Meaning"),
        ((f"`{key}`", f"`{found[key][0]}`", _purpose(key, found[key][1])) for key in dict.fromkeys(order)),
    )


def stats() -> str:
    """Return the fields of `Stats`, with the docstrings that stand under them."""
    (node,) = ast.parse(inspect.getsource(Stats)).body
    assert isinstance(node, ast.ClassDef)
    return table(
        ("Field", "Meaning"),
        (
            (f"`{line.target.id}`", _text(ast.literal_eval(after.value)))
            for line, after in zip(node.body, node.body[1:], strict=False)
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr)
        ),
    )


def _purpose(key: str, text: str) -> str:
    """Put a column's help before a text that says nothing but limits."""
    return f"{_sentence(BY_NAME[key].column.help)} {text}" if text[0].isdigit() else text


def columns() -> str:
    rows = []
    for key, column, nullable in COLUMNS:
        made = "`emit`"
        if column.default is not None:
            made = f"PostgreSQL: `{column.default}`"
        if column.generated is not None:
            made = "PostgreSQL, from `data`"
        rows.append(
            (
                f"`{key}`",
                f"`{column.sql_type.replace('timestamp with time zone', 'timestamptz')}`",
                "" if nullable else "not null",
                "" if column.limit is None else str(column.limit),
                made,
                column.help,
                "yes" if column.since <= 3 else "no",
            )
        )
    return table(("Column", "Type", "", "Most characters", "Set by", "Meaning", "In 1.0.1"), rows)


def leaf() -> str:
    values = {"uuid": "16 bytes", "jsonb": "32 bytes: the commitment", "timestamp with time zone": _MICROSECONDS}
    rows = [
        (str(stored.column.leaf), f"`{stored.name}`", values.get(stored.column.sql_type, "UTF-8"))
        for stored in LEAF_FIELDS
    ]
    return table(("Tag", "Field", "Value"), [("1", "the tree's name", "UTF-8"), *rows])


def indexes() -> str:
    rows = [
        (
            f"`{index.name('audit_logs')}`",
            (f"`{index.method} " if index.method != "btree" else "`")
            + f"({', '.join(index.columns)})`"
            + (f" where `{index.where}`" if index.where else ""),
            _SERVES[index.suffix],
        )
        for index in (*INDEXES, *PAYLOAD_INDEXES)
    ]
    return table(("Index", "Keys", "Serves"), [("`audit_logs_pkey`", "`(id)`", "`find_by_id`; unique ids"), *rows])


def error_tree() -> str:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TracevaultError)]
    return table(
        ("Error", "Is a", "Meaning"),
        ((f"`{kind.__name__}`", f"`{kind.__mro__[1].__name__}`", _text(inspect.getdoc(kind) or "")) for kind in kinds),
    )


def _text(docstring: str) -> str:
    return docstring.replace("``", "`")


def commands() -> str:
    return table(
        ("Command", "What it does"),
        (
            (f"[`tracevault {key}`](#{key})", _text((command.help or "").split("\n\n")[0]))
            for key, command in command_line.commands.items()
        ),
    )


def all_commands(group: click.Group, prefix: str = "tracevault") -> Iterable[tuple[str, click.Command]]:
    """Yield the commands of a group and of the groups in it, each by its full name."""
    for key, command in group.commands.items():
        yield f"{prefix} {key}", command
        if isinstance(command, click.Group):
            yield from all_commands(command, f"{prefix} {key}")


def command_help(full_name: str, command: click.Command) -> Callable[[], str]:
    """Return a function that returns what ``--help`` says of a command, as Markdown."""

    def text() -> str:
        usage = " ".join([full_name, *command.collect_usage_pieces(click.Context(command))])
        rows = [_option(command, option) for option in command.params if isinstance(option, click.Option)]
        parts = [f"`{usage}`", _text(inspect.cleandoc(command.help or ""))]
        if rows:
            parts.append(table(("Option", "Value", "Meaning"), rows).rstrip())
        return "\n\n".join(parts) + "\n"

    return text


def _option(command: click.Command, option: click.Option) -> tuple[str, str, str]:
    names = ", ".join(f"`{name}`" for name in option.opts)
    takes = "" if option.is_flag else f"`{option.make_metavar(click.Context(command)).strip('[]')}`"
    meaning = _text(option.help or "")
    if option.show_default:
        defaults: Any = option.default if isinstance(option.default, (list, tuple)) else [option.default]
        meaning = f"{meaning.removesuffix('.')}; default: {', '.join(f'`{default}`' for default in defaults)}"
    return names, takes, meaning


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


TABLES: Mapping[str, Callable[[], str]] = {
    "options": options,
    "filters": filters,
    "paging": paging,
    "fields": fields,
    "columns": columns,
    "leaf": leaf,
    "indexes": indexes,
    "errors": error_tree,
    "stats": stats,
    "commands": commands,
    **{key: command_help(key, command) for key, command in all_commands(command_line)},
}


def rewritten(text: str) -> str:
    """Return a page with its tables written anew; `KeyError` for one that nobody knows."""
    return _MARKED.sub(lambda found: f"{found['begin']}\n{TABLES[found['name']]()}\n{found['end']}", text)


def names_in(text: str) -> list[str]:
    """Return the names of the tables on a page."""
    return [found["name"] for found in _MARKED.finditer(text)]


def main() -> None:
    for page in PAGES:
        before = page.read_text()
        after = rewritten(before)
        if after != before:
            page.write_text(after)
            print(f"wrote {name(page)}")


if __name__ == "__main__":
    main()
