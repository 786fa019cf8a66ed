"""The ledger: what victims say through their pipes, and the checker that compares it with the table.

A victim names each event by a token before it emits it. Everything the row must hold follows from the token, so
that the checker needs no second copy of what was meant. Lines, one per write and so never torn:

    I token time                    it will emit now
    R token id stored time          emit returned this receipt
    X token certain|unknown error   emit raised: certainly not stored, or nobody knows
    K token                         the caller's transaction with it was committed; B: certainly rolled back
    L token error sqlstate          it was given up after emit had returned (`on_error`)
    F                               flush or close returned: what was in memory is in the database
    S json                          the counters of the vault
    A json                          the answer to a command
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import UUID

import psycopg

TOKEN = re.compile(r"[\w.-]+/[\w.]+/\d+")
# PostgreSQL keeps microseconds, and the clock is read on both sides of emit; this much is measured inexactly.
_CLOCK_SLACK = 0.005


class FaultError(AssertionError):
    """A promise was broken."""


class VacuousError(AssertionError):
    """The run did not see the fault it was made for, so it proves nothing."""


def event_of(token: str) -> str:
    """Return the event's name of a token, ``victim/event/number``."""
    return token.split("/")[1]


def payload_of(token: str) -> dict[str, Any]:
    """Return the payload that belongs to a token, and to no other."""
    digest = sha256(token.encode()).hexdigest()
    return {"token": token, "digest": digest, "amount": int(digest[:8], 16), "items": [digest[8:16], None, True]}


@dataclass(slots=True)
class Entry:
    """What is known about one token."""

    intended: float | None = None
    returned: float | None = None
    id: UUID | None = None
    stored: str | None = None
    error: str | None = None
    certain: bool = False
    given_up: str | None = None
    committed: bool | None = None
    flushed: bool = False


@dataclass
class Verdict:
    """The counts of one run, and the tokens that broke a promise."""

    acknowledged: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    dead: int = 0
    replayed: int = 0
    present: int = 0
    unflushed: int = 0

    @property
    def sound(self) -> bool:
        return not (self.lost or self.doubled or self.wrong)

    def __str__(self) -> str:
        parts = [f"{self.acknowledged} acknowledged, {self.present} present, {self.dead} dead"]
        for name in ("lost", "doubled", "wrong"):
            found = getattr(self, name)
            if found:
                parts.append(f"{len(found)} {name}: {found[:5]}")
        return "; ".join(parts)


class Ledger:
    """All that the victims of one scenario said. Thread-safe; lives in the supervisor, which is never harmed."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.lines: list[str] = []
        self.stats: dict[str, dict[str, Any]] = {}
        self._lock = Lock()

    def hear(self, victim: str, line: str) -> None:
        """Note one line of a victim."""
        kind, _, rest = line.partition(" ")
        with self._lock:
            self.lines.append(f"{victim} {line}")
            if kind == "S":
                self.stats[victim] = json.loads(rest)
            elif kind == "F":
                # Receipts of one victim begin with its name, and so do those of its forked children.
                for token, entry in self.entries.items():
                    if entry.stored == "memory" and token.startswith(rest + "/"):
                        entry.flushed = True
            elif kind in "IRXKBL":
                self._note(kind, rest.split())

    def _note(self, kind: str, words: list[str]) -> None:
        entry = self.entries.setdefault(words[0], Entry())
        if kind == "I" and entry.intended is None:
            entry.intended = float(words[1])
        elif kind == "R":
            entry.id, entry.stored, entry.returned = UUID(words[1]), words[2], float(words[3])
            entry.error, entry.certain = None, False
        elif kind == "X":
            # An event that was acknowledged, or may be there, stays so whatever a retry with its id says.
            if entry.stored is None:
                entry.certain = words[1] == "certain" and (entry.error is None or entry.certain)
                entry.error = words[2]
        elif kind in "KB":
            entry.committed = kind == "K"
        elif kind == "L":
            entry.given_up = " ".join(words[1:])

    def total(self, name: str) -> int:
        """Return a counter, summed over the last word of each victim."""
        return sum(int(stats.get(name, 0)) for stats in self.stats.values())

    def errors(self) -> Counter[str]:
        """Return how often each error was raised by emit."""
        with self._lock:
            return Counter(entry.error for entry in self.entries.values() if entry.error)

    def count(self, stored: str | None = None) -> int:
        """Return how many receipts there are, or how many with this ``stored``."""
        with self._lock:
            return sum(entry.stored is not None and stored in (None, entry.stored) for entry in self.entries.values())

    def save(self, path: Path) -> None:
        with self._lock:
            path.write_text("\n".join(self.lines) + "\n")


def obliged(entry: Entry) -> bool:
    """Whether the event must be in the table at the end."""
    if entry.stored in ("database", "spool"):
        return True
    if entry.stored == "transaction":
        return entry.committed is True
    return entry.stored == "memory" and entry.flushed and entry.given_up is None


def forbidden(entry: Entry) -> bool:
    """Whether the event certainly failed, and so may not be in the table."""
    if entry.stored == "dropped":
        return True
    if entry.stored == "transaction":
        return entry.committed is False
    if entry.stored is None:
        return entry.certain
    return False


def check(
    ledger: Ledger,
    dsn: str,
    *,
    tables: Iterable[str] = ("audit_logs",),
    elsewhere: Iterable[str] = (),
    dead: Iterable[str] = (),
    excused: Iterable[str] = (),
    clock: bool = True,
) -> Verdict:
    """Compare the ledger with the table.

    ``elsewhere``: databases of other servers, which hold some of it in tables of the same names.
    ``dead``: tokens that must be kept out of the table. ``excused``: tokens whose loss the scenario allows.
    ``clock``: whether `occurred_at` must lie between the intent and the return of emit.
    """
    dead, excused, verdict = set(dead), set(excused), Verdict(replayed=ledger.total("replayed"))
    found: dict[str, list[tuple[Any, ...]]] = {}
    ids: Counter[UUID] = Counter()
    for place in (dsn, *elsewhere):
        with psycopg.connect(place, autocommit=True) as connection:
            for table in tables:
                query = f'SELECT correlation_id, id, event, data, occurred_at FROM "{table}"'
                for row in connection.execute(query.encode()):
                    found.setdefault(row[0], []).append(row)
                    ids[row[1]] += 1
    verdict.present = len(found)
    verdict.doubled += [token for token, rows in found.items() if len(rows) > 1 or ids[rows[0][1]] > 1]
    with ledger._lock:
        entries = dict(ledger.entries)
    verdict.wrong += [f"{token}: nobody emitted it" for token in found if token not in entries]
    for token, entry in entries.items():
        rows = found.get(token, [])
        verdict.acknowledged += entry.stored is not None
        verdict.unflushed += entry.stored == "memory" and not entry.flushed
        verdict.dead += token in dead and not rows
        if token in dead:
            if rows:
                verdict.wrong.append(f"{token}: should be dead")
        elif obliged(entry) and not rows and token not in excused:
            verdict.lost.append(token)
        elif forbidden(entry) and rows:
            verdict.wrong.append(f"{token}: certainly failed ({entry.error or entry.stored}), but is there")
        for row in rows:
            verdict.wrong += [f"{token}: {problem}" for problem in _problems(token, entry, row, clock=clock)]
    return verdict


def _problems(token: str, entry: Entry, row: tuple[Any, ...], *, clock: bool) -> Iterable[str]:
    _, id_, event, data, occurred_at = row
    if event != event_of(token) or data != payload_of(token):
        yield f"holds something else: {event} {data}"
    if entry.id is not None and id_ != entry.id:
        yield f"has the id {id_}, not {entry.id}"
    if clock and entry.intended is not None and entry.returned is not None:
        early, late = entry.intended - _CLOCK_SLACK, entry.returned + _CLOCK_SLACK
        if not early <= occurred_at.timestamp() <= late:
            returned = datetime.fromtimestamp(entry.returned, UTC)
            yield f"occurred at {occurred_at}, but emit ended at {returned}"
