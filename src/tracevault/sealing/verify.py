"""Verification: every row against its leaf, every hash against the tree, the tree against what was signed.

Nothing in the database is believed. Rows are hashed anew, in Python, and compared with the hashes of the lowest tiles;
from those the tree grows again, and its root at each size is compared with signed checkpoints: those in the database,
which show that nobody without the key made them, and those from outside, which alone show that the log was not cut or
made anew by somebody with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from psycopg import Connection, IsolationLevel

from tracevault.errors import ConfigError, DriverError, ProofError, SealError
from tracevault.flows import Flow
from tracevault.flows.seal import HASH, Tree, find_tree, read_tiles, tables_exist
from tracevault.flows.verify import (
    leaf_count,
    leaves_outside,
    not_tables,
    prepare,
    stored_checkpoints,
    stored_tiles,
    stream,
    tile_count,
    tiles_outside,
    unsigned_age,
)
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.note import Note, Verifier
from tracevault.integrity.report import Outside, Problem, Report
from tracevault.integrity.tiles import WIDTH, Growth, right_edge
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.sealing.explain import Explanation
from tracevault.sealing.findings import Findings
from tracevault.sealing.jobs import MOST_JOBS, Crew, crew, jobs_for, ranges
from tracevault.sealing.rows import RowCheck, leaf_hashes

_VERIFYING = Place("verifying")
# Leaves that are checked at once, by one process: a twentieth of a second of work, and as many whole tiles.
CHUNK = 32 * WIDTH
# Seconds that a row may wait for its seal, and a leaf for its signature, before the log counts as incomplete.
GRACE = 60.0
_LARGEST = (1 << 63) - 1
# Of leaves and checkpoints beyond the tree's end, which all say the same, so many are named.
_BEYOND = 1000

T = TypeVar("T")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Witnessed:
    """A checkpoint from outside the database: where it was found, and when it was put there, if that is known."""

    source: str
    note: Note
    at: datetime | None = None


@dataclass(frozen=True)
class Trust:
    """Whom a verification believes: keys, each perhaps only up to a size of the log, and checkpoints from outside."""

    keys: Sequence[Verifier] = ()
    revoked: tuple[tuple[Verifier, int], ...] = ()
    """Keys that are believed for checkpoints up to a size, and for none beyond."""
    outside: Sequence[Witnessed] = ()

    def opened(self, note: Note, origin: str) -> Checkpoint:
        """Return the checkpoint of a note; `ProofError` if no key that is trusted for its size signed it."""
        checkpoint = Checkpoint.parse(note.text)
        if checkpoint.origin != origin:
            raise ProofError(f"it is a checkpoint of {checkpoint.origin!r}, and the log is {origin!r}")
        trusted = [*self.keys, *(key for key, size in self.revoked if checkpoint.size <= size)]
        if not note.verified_by(trusted):
            raise ProofError("no key that is trusted signed it")
        return checkpoint


def origin_of(connection: Connection[Any], table: str) -> str:
    """Return the origin that the database says the log of ``table`` has; `SealError` if it was never sealed."""
    try:
        return str(_tree_of(connection, table).origin)
    except DriverError as error:
        raise _unable(table, error) from error


def verify(
    connection: Connection[Any],
    table: str,
    trust: Trust,
    *,
    first: Checkpoint | None = None,
    grace: float = GRACE,
    progress: Progress = lambda _done, _all: None,
    jobs: int | None = 1,
    conninfo: str | None = None,
) -> Report:
    """Verify the log of ``table`` in one read-only transaction, and say what was found.

    With ``first``, a checkpoint that an earlier verification found good, only what came after it is looked at: of
    rows before it that were changed or removed since, and of rows that were put in behind the log's back with an old
    transaction, nothing is seen. ``progress`` is called with leaves done and all leaves. With ``conninfo``, which has
    to lead where ``connection`` does, up to ``jobs`` processes check rows at once, this one among them; None stands for
    as many as pay. Raises `SealError` where there is nothing to verify or it cannot be read, and `DriverError` where
    trying again can help.
    """
    if trust.outside and not (trust.keys or trust.revoked):
        raise ConfigError("to believe a checkpoint takes the log's verifier key: pass it as `keys`", field="keys")
    if jobs is not None and (type(jobs) is not int or not 1 <= jobs <= MOST_JOBS):
        raise ConfigError(f"`jobs` must be a number from 1 to {MOST_JOBS}, got {jobs!r}", field="jobs")
    started = time.monotonic()
    connection.isolation_level = IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    try:
        with connection.transaction():
            run(connection, prepare(), _VERIFYING)
            tree = _tree_of(connection, table)
            report = _Verification(connection, tree, table, trust, first, progress, jobs, conninfo).report()
    except DriverError as error:
        if error.transient:
            raise
        raise _unable(table, error) from error
    report.conclude(grace)
    report.seconds = time.monotonic() - started
    return report


def _tree_of(connection: Connection[Any], table: str) -> Tree:
    tree = run(connection, find_tree(table), _VERIFYING) if run(connection, tables_exist(), _VERIFYING) else None
    if tree is None:
        raise SealError(
            f"table `{table}` was never sealed, or what was stored of it is gone: `tracevault seal --table {table}` "
            "begins that, and a backup has what is gone"
        )
    return tree


def _unable(table: str, error: DriverError) -> SealError:
    return SealError(f"the log of table `{table}` cannot be checked: {error}")


class _Verification:
    """One verification, from reading the tree to the last comparison."""

    def __init__(
        self,
        connection: Connection[Any],
        tree: Tree,
        table: str,
        trust: Trust,
        first: Checkpoint | None,
        progress: Progress,
        jobs: int | None,
        conninfo: str | None,
    ) -> None:
        self._connection = connection
        self._tree = tree
        self._trust = trust
        self._first = first
        self._progress = progress
        self._jobs = jobs
        self._conninfo = conninfo
        self._report = Report(table, first=first.size if first else 0)
        # Checkpoints that wait for the tree to grow to their size.
        self._marks: dict[int, list[_Mark]] = {}
        self._newest = self._report.first
        # The largest size at which the tree was found to be what somebody says, and the first at which it was not.
        self._agreed = 0
        self._misfit: int | None = None

    def report(self) -> Report:
        tree, report = self._tree, self._report
        unfit = _unfit(tree)
        if unfit:
            self._add("tree", f"its row in the table of trees cannot be what the sealer stored: {unfit}")
            return report
        report.origin, report.size, report.root = tree.origin, tree.size, tree.root
        for name in self._run(not_tables(tree)):
            self._add("table", f"`{name}` is no table: what it shows need not be what is stored")
        report.signatures_checked = bool(self._trust.keys or self._trust.revoked)
        self._collect_marks()
        if report.first > tree.size:
            self._add("rolled back", f"the log has {tree.size:,} leaves, and had {report.first:,} when it was verified")
        else:
            self._run(stream(True))
            found = self._walk(report.first)
            self._run(stream(False))
            explain = Explanation(self._connection, tree, report, found, _VERIFYING)
            explain.tell(everywhere=report.first == 0)
        self._look_beyond()
        report.unsigned = max(0, tree.size - self._newest)
        if report.unsigned and report.signatures_checked:
            report.oldest_unsigned_seconds = round(self._run(unsigned_age(tree, self._newest)), 3)
        return report

    # ------------------------------------------------------------------------------------------ checkpoints

    def _collect_marks(self) -> None:
        """Note what is to be compared with the tree, but for stored checkpoints: there can be very many of those."""
        tree, trust = self._tree, self._trust
        names = {key.name for key in (*trust.keys, *(key for key, _ in trust.revoked))}
        if names and tree.origin not in names:
            given = ", ".join(map(repr, sorted(names)))
            self._add("origin", f"the database calls the log {tree.origin!r}, and the keys are of {given}")
        for witnessed in trust.outside:
            try:
                checkpoint = trust.opened(witnessed.note, tree.origin)
            except ProofError as error:
                self._add("checkpoint", f"a checkpoint from {witnessed.source} is not the log's: {error}")
                continue
            self._mark(
                checkpoint.size,
                _Mark(checkpoint.root, f"the checkpoint from {witnessed.source}", witnessed, signed=True),
            )
        if self._first is not None:
            if self._first.origin != tree.origin:
                self._add(
                    "checkpoint", f"what was verified before is the log {self._first.origin!r}, not {tree.origin!r}"
                )
            self._mark(self._first.size, _Mark(self._first.root, "what was verified before"))
        self._mark(tree.size, _Mark(tree.root, "the tree's own row"))

    def _mark_stored(self, first: int, last: int, limit: int) -> None:
        """Note the stored checkpoints of sizes ``first`` to ``last``."""
        tree = self._tree
        for size, text in self._run(stored_checkpoints(tree, first, last, limit)):
            try:
                note = Note.parse(text)
                signed = self._report.signatures_checked
                checkpoint = self._trust.opened(note, tree.origin) if signed else Checkpoint.parse(note.text)
                if checkpoint.size != size:
                    raise ProofError(f"it is of size {checkpoint.size:,}")
            except ProofError as error:
                self._add("checkpoint", f"the stored checkpoint of size {size:,} is not the log's: {error}")
                continue
            self._mark(size, _Mark(checkpoint.root, "the stored checkpoint", stored=True, signed=True))

    def _mark(self, size: int, mark: _Mark) -> None:
        if size <= self._tree.size:
            self._marks.setdefault(size, []).append(mark)
            return
        self._add(
            "rolled back",
            f"{mark.what} says that the log had {size:,} leaves, and it has {self._tree.size:,}: its end was cut off, "
            "or it is an older copy",
        )

    def _compare(self, growth: Growth) -> None:
        """Compare the root at this size with the checkpoints of this size."""
        marks = self._marks.pop(growth.size, ())
        if not marks:
            return
        size, root = growth.size, growth.root
        for mark in marks:
            if mark.root == root:
                self._agreed = size
                if mark.signed:
                    self._newest = max(self._newest, size)
                best = self._report.anchor
                if mark.witnessed is not None and (best is None or size >= best.size):
                    self._report.anchor = Outside(mark.witnessed.source, size, mark.witnessed.at)
            elif mark.stored and self._misfit is not None:
                self._report.problems_left_out += 1  # once the log is another one, every later checkpoint says so
            else:
                if mark.stored:
                    self._misfit = size
                since = f"after leaf {self._agreed - 1:,}, where they last agree" if self._agreed else "from its start"
                self._add(
                    "root",
                    f"{mark.what} of size {size:,} has another root than the log has at that size: it was changed "
                    f"{since}",
                )

    # ------------------------------------------------------------------------------------------------- tree

    def _walk(self, first: int) -> Findings:
        """Let the tree grow from ``first``, comparing rows, tiles and checkpoints on the way."""
        # What comes before `first` is compared by the hashes that were verified with it.
        for size in sorted(size for size in self._marks if size < first):
            self._compare(Growth(size, self._edge(size)))
        growth = Growth(first, self._edge(first))
        self._mark_stored(first if first else -_LARGEST, first, _BEYOND)
        self._compare(growth)
        last = self._last()
        found = Findings()
        spans = list(ranges(first, last, CHUNK))
        with closing(self._crew(spans)) as rows:
            for start, end in spans:
                hashes = leaf_hashes(self._connection, self._tree, start, end, _VERIFYING, partial(self._add, "tile"))
                found.merge(self._told(rows.check(start, end, hashes)))
                self._mark_stored(start + 1, end, CHUNK)
                self._grow(growth, start, end, hashes)
                self._progress(end - first, last - first)
        self._report.checked, self._report.erased, self._report.pruned = found.checked, found.erased, found.pruned
        return found

    def _crew(self, spans: list[tuple[int, int]]) -> Crew:
        jobs = jobs_for(sum(end - start for start, end in spans)) if self._jobs is None else self._jobs
        own = RowCheck(self._connection, self._tree, _VERIFYING)
        return crew(self._connection, own, self._tree, spans, self._conninfo, jobs, _VERIFYING)

    def _told(self, found: Findings) -> Findings:
        """Tell the report what is wrong beyond doubt; what else there is, is explained when all rows were seen."""
        for problem in found.problems:
            self._report.add(problem)
        return found

    def _last(self) -> int:
        """Return how far there is anything to compare: a size that was made up must not be counted up to."""
        size = self._tree.size
        extent = self._run(tile_count(self._tree)) * WIDTH
        if extent < size:
            extent = max(extent, self._run(leaf_count(self._tree)))
        if extent < size:
            self._add("tree", f"its row says that it has {size:,} leaves, and there are no more than {extent:,}")
        return min(size, extent)

    def _edge(self, size: int) -> dict[int, bytes]:
        """Return the incomplete tile of each level, noughts where it lacks hashes."""
        partial = right_edge(size)
        found = self._run(read_tiles(self._tree.number, [(tile.level, tile.number) for tile in partial]))
        edge = {}
        for level, number, width in partial:
            hashes = (found.get((level, number)) or b"")[: width * HASH]
            if len(hashes) < width * HASH:
                self._add("tile", f"tile {number:,} of level {level} lacks hashes")
            edge[level] = hashes.ljust(width * HASH, b"\0")
        return edge

    def _grow(self, growth: Growth, start: int, end: int, hashes: bytes) -> None:
        """Grow the tree by the hashes of leaves ``start`` to ``end``, stopping at each size that a checkpoint is of."""
        place = start
        for size in sorted(size for size in self._marks if start < size <= end):
            growth.add(_split(hashes, place - start, size - start))
            place = size
            self._compare(growth)
        growth.add(_split(hashes, place - start, end - start))
        self._check_tiles(growth)

    def _check_tiles(self, growth: Growth) -> None:
        """Compare the stored tiles above the lowest level with those that grew meanwhile."""
        for level, number, content in growth.changes():
            if level:
                found = self._run(stored_tiles(self._tree, level, number, number + 1)).get(number, b"")
                if found[: len(content)] != content or len(found) > WIDTH * HASH:
                    self._add("tile", f"tile {number:,} of level {level} is not what the hashes below it make")
        growth.settle()

    def _look_beyond(self) -> None:
        """Look for what a log leaves behind that was cut."""
        tree = self._tree
        self._mark_stored(tree.size + 1, _LARGEST, _BEYOND)
        for index, id_ in self._run(leaves_outside(tree, _BEYOND)):
            self._add("leaf", f"the list of leaves has it, and the tree has but {tree.size:,}", index, id_)
        for level, number in self._run(tiles_outside(tree)):
            self._add("tile", f"tile {number:,} of level {level} has hashes of more leaves than the tree has")

    def _add(self, kind: str, detail: str, index: int | None = None, id_: UUID | None = None) -> None:
        self._report.add(Problem(kind, detail, index, id_))

    def _run(self, flow: Flow[T]) -> T:
        return run(self._connection, flow, _VERIFYING)


class _Mark(NamedTuple):
    """What the root is said to be at some size, and by whom."""

    root: bytes
    what: str
    witnessed: Witnessed | None = None
    stored: bool = False
    signed: bool = False
    """Whether it is a checkpoint, which somebody signed."""


def _unfit(tree: Tree) -> str | None:
    """Return what is wrong with a tree's row, which its owner can fill with anything."""
    if type(tree.size) is not int or tree.size < 0:
        return f"its size is {tree.size!r}"
    if not isinstance(tree.root, bytes) or len(tree.root) != HASH:
        return "its root is no hash"
    for column in ("name", "origin", "snapshot", "walk"):
        if not isinstance(getattr(tree, column), str):
            return f"it has no {column}"
    if type(tree.number) is not int:
        return "it has no number"
    return None


def _split(hashes: bytes, first: int, end: int) -> Iterator[bytes]:
    return (hashes[place : place + HASH] for place in range(first * HASH, end * HASH, HASH))
