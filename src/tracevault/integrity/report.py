"""What a verification found: the verdict, what is wrong with which rows, and what it rests on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any
from uuid import UUID

# A report names so many bad places; it counts the others.
MOST_PROBLEMS = 10_000


class Verdict(Enum):
    """What can be said of a log. The value is the exit code of ``tracevault verify``."""

    OK = 0
    """Unchanged up to a checkpoint that was kept outside the database."""
    TAMPERED = 1
    """Something was changed, removed, put in or rolled back."""
    UNKNOWN = 3
    """It could not be checked."""
    CONSISTENT = 4
    """The database contradicts itself nowhere. Whoever owns it, and the key, could have made it so."""
    INCOMPLETE = 5
    """Rows wait to be sealed, or leaves to be signed, for longer than is usual: of these nothing can be said."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. ``kind`` is for programs, ``detail`` for people; ``index`` is that of the leaf."""

    kind: str
    detail: str
    index: int | None = None
    id: UUID | None = None


@dataclass(frozen=True)
class Outside:
    """A checkpoint from outside the database that the log was compared with, and found to extend."""

    source: str
    size: int
    at: datetime | None
    """When it was anchored, where the anchor says so."""


@dataclass
class Report:
    """The result of `verify` for one table."""

    table: str
    verdict: Verdict = Verdict.UNKNOWN
    origin: str = ""
    size: int = 0
    """Leaves of the tree."""
    root: bytes = b""
    first: int = 0
    """The first leaf whose row was looked at: 0 but in an incremental verification."""
    checked: int = 0
    """Rows that were hashed and found as they were sealed."""
    erased: int = 0
    pruned: int = 0
    unsealed: int = 0
    """Rows without a leaf."""
    oldest_unsealed_seconds: float = 0.0
    unsigned: int = 0
    """Leaves beyond the newest signed checkpoint."""
    oldest_unsigned_seconds: float = 0.0
    """Age of the oldest row among them; 0 where no key was given to check signatures with."""
    signatures_checked: bool = False
    anchor: Outside | None = None
    """The largest checkpoint from outside that the log extends."""
    problems: list[Problem] = field(default_factory=list)
    problems_left_out: int = 0
    seconds: float = 0.0

    def add(self, problem: Problem) -> None:
        """Note a problem."""
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)
        else:
            self.problems_left_out += 1

    def conclude(self, grace: float) -> None:
        """Set the verdict. A row may wait ``grace`` seconds for its seal, and a leaf for its signature."""
        if self.problems or self.problems_left_out:
            self.verdict = Verdict.TAMPERED
        elif max(self.oldest_unsealed_seconds, self.oldest_unsigned_seconds) > grace:
            self.verdict = Verdict.INCOMPLETE
        elif self.anchor is None:
            self.verdict = Verdict.CONSISTENT
        else:
            self.verdict = Verdict.OK

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON's values."""
        values = asdict(self)
        values["verdict"] = self.verdict.name
        values["root"] = self.root.hex()
        for problem in values["problems"]:
            problem["id"] = None if problem["id"] is None else str(problem["id"])
        if self.anchor is not None:
            values["anchor"]["at"] = None if self.anchor.at is None else self.anchor.at.isoformat()
        return values
