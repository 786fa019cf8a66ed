"""How values are written: for a terminal, where nothing stored may act on it, and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from tracevault import AuditRecord
from tracevault.events.json_text import escaped, json_record, json_text, members

if TYPE_CHECKING:  # rich takes 40 ms, which piped JSON need not wait for
    from rich.console import Console
    from rich.table import Table

Output = Literal["table", "json"]

# Up to this many characters a JSON list or object stays on one line.
_ONE_LINE = 60
# So many levels are laid out in lines. Other writers can nest deeper than there are columns, or Python's stack.
_DEPTH = 30


def is_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def console(*, stderr: bool = False) -> Console:
    """Return rich's console: no markup, so ``[red]`` is text; NO_COLOR and pipes are seen to by rich."""
    from rich.console import Console  # noqa: PLC0415 - see above

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with 1, which means "no" here

    return Plain(stderr=stderr, markup=False, emoji=False, highlight=False)


@contextmanager
def progress_bar(doing: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield what is told of how much is done, and of how much; it shows on a terminal's standard error."""
    if not sys.stderr.isatty():
        yield lambda _done, _all: None
        return
    from rich import progress  # noqa: PLC0415 - see above

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(visible(doing), total=None)
        yield lambda done, every: bar.update(task, completed=done, total=every)


def fits(out: Console, table: Table) -> bool:
    """Whether a table can be printed without cutting anything."""
    return out.measure(table, options=out.options.update(width=10_000)).maximum <= out.width


def visible(text: str) -> str:
    r"""Return ``text`` with whatever does not print written as an escape: ``\x1b``, ``\u202e``.

    So a stored value can neither move the cursor nor turn the direction of what is read.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def identity(id_: str | None, type_: str | None) -> str:
    """Return an actor or a target as ``type/id``, fit for a terminal."""
    return "" if id_ is None and type_ is None else visible(f"{type_ or '?'}/{id_ or '?'}")


def size(number: int) -> str:
    """Return a number of bytes for a person: ``1.2 GB``."""
    amount, unit = float(number), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:,.0f} {unit}" if unit == "bytes" or amount >= 99.5 else f"{amount:.3g} {unit}"


def number(count: int, one: str, many: str = "") -> str:
    """Return ``1 row``, ``1,000 rows``; ``many`` is for a plural that takes more than an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def span(seconds: float) -> str:
    """Return a span of time for a person: ``3 hours``."""
    for length, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return "1 second" if 0.5 <= seconds < 1.5 else f"{max(seconds, 0):,.0f} seconds"


def json_line(record: AuditRecord) -> str:
    """Return a record as one line of JSON: every column, payloads nested, times in UTC, numbers exact."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json_text(json_record(record), ascii_only=not utf8)


def write_lines(lines: Iterable[str]) -> None:
    """Write lines to standard output."""
    sys.stdout.writelines(line + "\n" for line in lines)


def json_lines(value: Any, depth: int = _DEPTH) -> list[str]:
    """Return ``value`` as JSON over several lines, short containers on one; for a person to read."""
    text = json_text(value)
    if not isinstance(value, (dict, list)) or len(text) <= _ONE_LINE or depth == 0:
        return [text]
    lines = []
    parts = members(value)
    for place, (prefix, item) in enumerate(parts):
        inner = json_lines(item, depth - 1)
        inner[0] = escaped(prefix) + inner[0]
        inner[-1] += "," if place < len(parts) - 1 else ""
        lines += ["  " + line for line in inner]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return [opening, *lines, closing]
