"""Where a follower of the log stands: which transactions' rows it has had. Text that may be kept for years.

``1.SYSTEM.DONE.TARGET.XID.ID.CHECKSUM``: the server's system identifier; the snapshot of which every visible row was
had; the one that is being walked to, with transaction and id of the last row had of it (empty between walks).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from tracevault.errors import ValidationError
from tracevault.events import rules

_TEXT = re.compile(
    r"1\.(?P<system>\d{1,20})\.(?P<done>\d+:\d+:[\d,]*)\.(?P<target>\d+:\d+:[\d,]*)?\.(?P<xid>\d*)\."
    r"(?P<id>[0-9a-f-]{36})?\.(?P<checksum>[0-9a-f]{8})",
    re.ASCII,
)
_LONGEST = 1_000_000


class Snapshot(NamedTuple):
    """PostgreSQL's ``pg_snapshot``: transactions below ``xmax`` had ended, but for those in ``running``."""

    xmin: int
    xmax: int
    running: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """Return the snapshot that PostgreSQL printed."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), tuple(map(int, running.split(","))) if running else ())

    def __str__(self) -> str:
        """Return it as PostgreSQL prints it."""
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, self.running))}"

    def sees(self, xid: int) -> bool:
        """Whether a transaction had ended."""
        return xid < self.xmax and xid not in self.running

    def union(self, other: Snapshot) -> Snapshot:
        """Return the snapshot that sees what either sees. A standby that lags may be asked after its primary."""
        if other.xmax < self.xmax:
            self, other = other, self  # noqa: PLW0642 - the later one is `other`
        running = tuple(xid for xid in other.running if not self.sees(xid))
        return Snapshot(running[0] if running else other.xmax, other.xmax, running)


# They see nothing, since transactions are counted from 3 on. With the first one, rows of no known transaction, which
# are older than the column, are still to be had.
BEFORE_ALL = Snapshot(1, 1, ())
BEFORE_TRANSACTIONS = Snapshot(2, 2, ())


@dataclass(frozen=True)
class Position:
    """See the module. Where ``done`` is `BEFORE_ALL`, ``id`` stands among the rows of no known transaction."""

    system: str
    done: Snapshot
    target: Snapshot | None = None
    xid: int | None = None
    id: UUID | None = None

    def __str__(self) -> str:
        """Return the text to keep."""
        xid, id_ = "" if self.xid is None else self.xid, "" if self.id is None else self.id
        content = f"1.{self.system}.{self.done}.{'' if self.target is None else self.target}.{xid}.{id_}"
        return f"{content}.{_checksum(content)}"


def read_position(text: object, field: str) -> Position:
    """Return the position that ``text`` stands for; raise `ValidationError` if it is none."""
    match = _TEXT.fullmatch(text) if isinstance(text, str) and len(text) <= _LONGEST else None
    if match is None or _checksum(match.string.rpartition(".")[0]) != match["checksum"]:
        raise ValidationError(
            f'`{field}` must be the `position` of a tail, "beginning", or left out, got {rules.got(text)}', field=field
        )
    return Position(
        match["system"],
        Snapshot.parse(match["done"]),
        Snapshot.parse(match["target"]) if match["target"] else None,
        int(match["xid"]) if match["xid"] else None,
        UUID(match["id"]) if match["id"] else None,
    )


def _checksum(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:8]
