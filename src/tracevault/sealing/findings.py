"""What was found of the rows of a range of leaves, and how that comes from another process.

What is kept does not grow with what is wrong: of each kind of trouble as much is named as a report names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from uuid import UUID

from tracevault.integrity.report import MOST_PROBLEMS, Problem


@dataclass(frozen=True)
class Bad:
    """A leaf whose row has another hash than was stored."""

    index: int
    id: UUID
    computed: bytes
    stored: bytes


@dataclass
class Findings:
    """What was found of the rows of a range of leaves."""

    checked: int = 0
    erased: int = 0
    pruned: int = 0
    problems: list[Problem] = field(default_factory=list)
    left_out: int = 0
    """Problems that are counted alone."""
    changed: list[Bad] = field(default_factory=list)
    gone: dict[UUID, int] = field(default_factory=dict)
    """Leaves that have no row, by id: to recognise the row that was theirs."""
    unlisted: dict[bytes, int] = field(default_factory=dict)
    """Leaves that are not in the list of leaves, by hash."""

    @property
    def with_leaf(self) -> int:
        """Rows that have a leaf, beyond doubt: each of another one, or the tree would be none that anybody signed."""
        return self.checked + self.erased

    def add(self, kind: str, detail: str, index: int, id_: UUID) -> None:
        """Note a problem."""
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(Problem(kind, detail, index, id_))
        else:
            self.left_out += 1

    def add_changed(self, bad: Bad) -> None:
        """Note a row that has another hash than was stored."""
        if len(self.changed) < MOST_PROBLEMS:
            self.changed.append(bad)
        else:
            self.left_out += 1

    def add_gone(self, id_: UUID, index: int) -> None:
        """Note a leaf that has no row."""
        if len(self.gone) < MOST_PROBLEMS:
            self.gone[id_] = index

    def add_unlisted(self, stored: bytes, index: int) -> None:
        """Note a leaf that is not in the list of leaves."""
        if len(self.unlisted) < MOST_PROBLEMS:
            self.unlisted[stored] = index
        else:
            self.left_out += 1

    def merge(self, later: Findings) -> None:
        """Add what was found of the range after this one, but for the problems: those a report names at once."""
        self.checked += later.checked
        self.erased += later.erased
        self.pruned += later.pruned
        self.left_out += later.left_out
        for bad in later.changed:
            self.add_changed(bad)
        for id_, index in later.gone.items():
            self.add_gone(id_, index)
        for stored, index in later.unlisted.items():
            self.add_unlisted(stored, index)

    def to_json(self) -> str:
        """Return it as one line."""
        return json.dumps(
            {
                "counts": (self.checked, self.erased, self.pruned, self.left_out),
                "problems": [(one.kind, one.detail, one.index, one.id and one.id.hex) for one in self.problems],
                "changed": [(bad.index, bad.id.hex, bad.computed.hex(), bad.stored.hex()) for bad in self.changed],
                "gone": [(id_.hex, index) for id_, index in self.gone.items()],
                "unlisted": [(stored.hex(), index) for stored, index in self.unlisted.items()],
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Findings:
        """Return what `to_json` wrote."""
        values = json.loads(text)
        checked, erased, pruned, left_out = values["counts"]
        return cls(
            checked,
            erased,
            pruned,
            [Problem(kind, detail, index, id_ and UUID(id_)) for kind, detail, index, id_ in values["problems"]],
            left_out,
            [
                Bad(index, UUID(id_), bytes.fromhex(computed), bytes.fromhex(stored))
                for index, id_, computed, stored in values["changed"]
            ],
            {UUID(id_): index for id_, index in values["gone"]},
            {bytes.fromhex(stored): index for stored, index in values["unlisted"]},
        )
