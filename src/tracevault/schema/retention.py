"""How long events are kept: the rules, and the SQL for what they let go.

A rule is a pattern of event names and a period. ``*`` stands for all events, ``auth.*`` for those that begin with
``auth.``, anything else for one name; the rule that says most about an event's name decides. The events of tracevault
itself, ``tracevault.*``, are concerned only where a rule names them, and those that say what was pruned and erased
never: a verification goes by them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tracevault.errors import ConfigError
from tracevault.schema.custody import ERASED, OURS, PRUNED

FOREVER = "forever"
_PERIOD = re.compile(r"([1-9]\d{0,4}) ?(day|week|month|year)s?", re.ASCII)
_PATTERN = re.compile(r"\*|[^\s*][^*\n\t\0]{0,252}(?:\.\*)?")
_EVER_KEPT = (PRUNED, ERASED)


@dataclass(frozen=True)
class Rule:
    """For how long events of a pattern are kept: ``"400 days"``, or ``"forever"``."""

    pattern: str
    period: str

    @property
    def prefix(self) -> str | None:
        """What the names begin with; None for a rule of one name."""
        return self.pattern[:-1] if self.pattern.endswith("*") else None

    @property
    def weight(self) -> tuple[bool, int]:
        """The rule of the greatest weight decides."""
        return self.prefix is None, len(self.pattern)


def rules(retain: object, field: str = "retain") -> tuple[Rule, ...]:
    """Return the rules of ``"400 days"``, or of ``{"*": "400 days", "auth.*": "90 days"}``, the weightiest first.

    A period is a number of days, weeks, months or years, or ``"forever"``. Raises `ConfigError`.
    """
    given = {"*": retain} if isinstance(retain, str) else retain
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(
            f'`{field}` must be a period as "400 days", or a mapping from patterns to periods', field=field
        )
    found = []
    for pattern, period in given.items():
        if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern):
            raise ConfigError(
                f"`{field}`: a pattern is the name of an event, its beginning as `auth.*`, or `*`, got {pattern!r:.64}",
                field=field,
            )
        match = _PERIOD.fullmatch(period) if isinstance(period, str) else None
        if match is None and period != FOREVER:
            raise ConfigError(
                f'`{field}.{pattern}` must be a period as "400 days", "18 months" or "forever", got {period!r:.64}',
                field=field,
            )
        found.append(Rule(pattern, FOREVER if match is None else f"{match[1]} {match[2]}{'s' * (match[1] != '1')}"))
    return tuple(sorted(found, key=lambda rule: rule.weight, reverse=True))


def condition(rule: Rule, known: Iterable[Rule]) -> tuple[str, tuple[Any, ...]]:
    """Return the condition that a rule, among all that are known, decides about row ``r``, and what its ``{}`` are."""
    clauses: list[str] = ["r.event <> ALL({})"]
    params: list[Any] = [list(_EVER_KEPT)]
    if rule.prefix == "":
        clauses.append("NOT starts_with(r.event, {})")
        params.append(OURS)
    else:
        clauses.append(_sql(rule))
        params.append(rule.prefix or rule.pattern)
    for other in known:
        if rule.prefix is not None and other.weight > rule.weight and other.pattern.startswith(rule.prefix):
            clauses.append(f"NOT {_sql(other)}")
            params.append(other.prefix or other.pattern)
    return " AND ".join(clauses), tuple(params)


def _sql(rule: Rule) -> str:
    return "(r.event = {})" if rule.prefix is None else "starts_with(r.event, {})"
