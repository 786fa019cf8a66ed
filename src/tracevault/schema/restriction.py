"""What a reader may see: the events of some tenants alone, and not every field of them. Applied in SQL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tracevault.errors import ValidationError
from tracevault.events import rules
from tracevault.events.record import BY_NAME, GENERATED_COLUMNS, RECORD_COLUMNS, limit_of

PAYLOADS = tuple(name for name in RECORD_COLUMNS if BY_NAME[name].column.sql_type == "jsonb")
# By these rows are found, ordered and told apart.
_ALWAYS_SEEN = ("id", "event", "mode", "occurred_at", "created_at")
HIDEABLE = tuple(name for name in RECORD_COLUMNS if name not in _ALWAYS_SEEN)
MAX_TENANTS = 1000

Path = tuple[str, ...]
# Columns that PostgreSQL takes out of `data`, and where from.
_COPIES: dict[Path, Path] = {
    (stored.name,): ("data", *stored.column.generated) for stored in GENERATED_COLUMNS if stored.column.generated
}


@dataclass(frozen=True)
class Restriction:
    """``tenants`` are those whose events are seen (None: all, also of no tenant); ``hidden`` are columns and paths.

    A path begins with a payload column: ``("data", "card", "number")``. Make one by `restriction`.
    """

    tenants: tuple[str, ...] | None = None
    hidden: tuple[Path, ...] = ()

    def conditions(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yield SQL that holds for what may be seen, with ``{}`` for its parameters."""
        if self.tenants is not None:
            yield "tenant_id = ANY({})", (list(self.tenants),)

    def narrowed(self, other: Restriction) -> Restriction:
        """Return what both let through."""
        tenants = self.tenants if other.tenants is None else other.tenants
        if self.tenants is not None and other.tenants is not None:
            tenants = tuple(tenant for tenant in other.tenants if tenant in self.tenants)
        return Restriction(tenants, tuple(dict.fromkeys(self.hidden + other.hidden)))

    def sees(self, column: str) -> bool:
        """Whether something of a column is seen."""
        return (column,) not in self.hidden

    def expression(self, column: str) -> str:
        """Return SQL for what may be seen of a column."""
        if not self.sees(column):
            return f"NULL::{BY_NAME[column].column.sql_type}"
        hidden = [place for path in self._within(column) for place in _places(column, path)]
        return f"({column}{''.join(map(_without, hidden))})" if hidden else column

    def searched(self) -> tuple[list[str], list[str]]:
        """Return SQL for the columns of text, and for the payloads as text, that a search may look into."""
        plain = [
            name for name in RECORD_COLUMNS if BY_NAME[name].column.sql_type.startswith("character") and self.sees(name)
        ]
        return plain, [f"{self.expression(name)}::text" for name in PAYLOADS if self.sees(name)]

    def check(self, name: str, column: str, paths: Sequence[Path] | None = None) -> None:
        """Raise `ValidationError` if filter ``name`` looks at what is hidden: its answer would give that away.

        ``paths`` are those that it looks at within a payload; None means all of it.
        """
        hidden = not self.sees(column)
        for inside in self._within(column):
            for place in _places(column, inside):
                hidden = hidden or paths is None or any(_meet(place, path) for path in paths)
        if hidden:
            raise ValidationError(f"`{name}` looks at `{column}`, of which not everything may be seen here", field=name)

    def _within(self, column: str) -> list[Path]:
        return [path[1:] for path in self.hidden if len(path) > 1 and path[0] == column]


EVERYTHING = Restriction()


def restriction(tenant_ids: Any = None, hidden: Any = ()) -> Restriction:
    """Check and return a restriction.

    ``hidden`` are names of columns, and paths in payloads such as ``data.card.number``. What ``outcome``,
    ``error_code`` and ``severity`` copy out of ``data`` is hidden in both places, by either name.
    """
    tenants = None
    if tenant_ids is not None:
        places = _items(tenant_ids, "tenant_ids", MAX_TENANTS)
        tenants = tuple(rules.text(value, place, limit_of("tenant_id"), blank=False) for place, value in places)
    paths = [_hidden(value, place) for place, value in _items(hidden, "hidden", 100)]
    for copy, copied in _COPIES.items():
        if copy in paths or any(path == copied[: len(path)] and len(path) > 1 for path in paths):
            paths += [copy, copied]
    return Restriction(tenants, tuple(dict.fromkeys(paths)))


def _items(value: Any, name: str, most: int) -> list[tuple[str, Any]]:
    if not isinstance(value, (list, tuple, set, frozenset)) or len(value) > most:
        raise ValidationError(f"`{name}` must be a list of at most {most} strings, got {rules.got(value)}", field=name)
    return [(f"{name}[{place}]", item) for place, item in enumerate(value)]


def _hidden(value: Any, place: str) -> Path:
    column, dot, path = rules.text(value, place, 512, blank=False).partition(".")
    if column not in HIDEABLE or (dot and column not in PAYLOADS):
        raise ValidationError(
            f"`{place}` must be a column that can be hidden, or a path in a payload such as data.card.number, "
            f"got {rules.got(value)}; {rules.nearest(column, HIDEABLE)}",
            field=place,
        )
    return (column, *rules.path_keys(path, place)) if dot else (column,)


def _places(column: str, path: Path) -> list[Path]:
    """Return where a path stands: in what `emit_diff` stores, each field stands up to four times more."""
    if column != "data":
        return [path]
    first, *rest = path
    diffs = [("diff", first, side, *rest) for side in ("before", "after")] if rest else [("diff", first)]
    return [path, ("before", *path), ("after", *path), *diffs]


def _meet(one: Path, other: Path) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _without(path: Path) -> str:
    return " #- ARRAY[" + ", ".join("'" + key.replace("'", "''") + "'" for key in path) + "]"
