"""Verification of an export, with no database: every leaf is hashed anew, and the tree compared with checkpoints.

An export says itself what it holds; it is the checkpoints from outside that show whether that is the log. Which leaf is
wrong shows in the hashes that an anchor's directory has; without one it is known between which checkpoints it lies.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from tracevault.errors import ConfigError, ProofError, SealError
from tracevault.events.payload import has_surrogate
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.leaf import Statement
from tracevault.integrity.merkle import leaf_hash
from tracevault.integrity.note import Note
from tracevault.integrity.report import Outside, Problem, Report, Verdict
from tracevault.integrity.tiles import WIDTH, Growth, Tile
from tracevault.schema.custody import ERASED, PRUNED
from tracevault.sealing.export import COMMITMENTS, FORMAT, NAMES, STRICT, TEXTS, Line, read_line, said_by
from tracevault.sealing.rows import Ranges
from tracevault.sealing.trust import folder_of, trust_of
from tracevault.sealing.verify import GRACE, Progress, Witnessed

_HASH = 32


def verify_file(
    path: str | os.PathLike[str],
    *,
    keys: Sequence[str] = (),
    anchors: Sequence[str] = (),
    progress: Progress = lambda _done, _all: None,
) -> Report:
    """Verify an export, as `tracevault.verify_export` says."""
    if anchors and not keys:
        raise ConfigError("to believe a checkpoint takes the log's verifier key: pass it as `keys`", field="keys")
    started = time.monotonic()
    place = Path(path)
    try:
        with place.open("rb") as file:
            report = _Export(file, place, keys, anchors, progress).report()
    except OSError as error:
        raise SealError(f"the export {str(place)!r} cannot be read: {error}") from None
    report.conclude(GRACE)
    if report.unsigned and report.signatures_checked and report.verdict in (Verdict.OK, Verdict.CONSISTENT):
        # In a file nothing waits for its signature: anybody can have written such lines.
        report.verdict = Verdict.INCOMPLETE
    report.seconds = time.monotonic() - started
    return report


class _Export:
    """One verification of a file."""

    def __init__(
        self, lines: Iterable[bytes], path: Path, keys: Sequence[str], anchors: Sequence[str], progress: Progress
    ) -> None:
        self._lines = iter(lines)
        self._progress = progress
        head = read_line(next(self._lines, b"")).values
        if head.get("format") != FORMAT or not all(_is_name(head.get(name)) for name in ("tree", "origin")):
            raise SealError(f"{str(path)!r} is no export of tracevault, or one of another version")
        self._tree, self._origin, size = head["tree"], head["origin"], head.get("size")
        self._size = size if type(size) is int and size >= 0 else 0
        self._trust = trust_of(keys, anchors, origin=self._origin)
        self._tiles = [_Tiles(folder) for folder in (folder_of(anchor, self._origin) for anchor in anchors) if folder]
        self._report = Report(self._tree, origin=self._origin)
        self._report.signatures_checked = bool(keys)
        self._marks: dict[int, list[tuple[bytes, str, Witnessed | None]]] = {}
        self._gone: list[tuple[int, UUID | None]] = []
        self._erased: list[tuple[int, UUID | None]] = []
        self._remarks: list[tuple[int, str, list[tuple[int, int]]]] = []
        self._agreed = 0

    def report(self) -> Report:
        report, growth, whole = self._report, Growth(), False
        for witnessed in self._trust.outside:
            self._mark(witnessed.note, f"the checkpoint from {witnessed.source}", witnessed)
        self._compare(growth)
        for data in self._lines:
            line = read_line(data)
            if "leaves" in line.values:
                whole = line.values["leaves"] == growth.size
                self._trailer(line.values, growth.size)
                self._compare(growth)
                break
            growth.add([self._hash(growth.size, line)])
            self._compare(growth)
            if growth.size % 4096 == 0:
                growth.settle()
                self._progress(growth.size, self._size)
        report.size, report.root, report.unsigned = growth.size, growth.root, growth.size - self._agreed
        if not whole or growth.size != self._size or next(self._lines, None) is not None:
            self._add(
                "cut", f"the file is not whole: it begins as one of {self._size:,} leaves, and has {growth.size:,}"
            )
        for size, marks in sorted(self._marks.items()):
            for _root, what, _witnessed in marks:
                self._add("rolled back", f"{what} says that the log had {size:,} leaves, and here are {growth.size:,}")
        self._judge()
        return report

    def _hash(self, index: int, line: Line) -> bytes:
        """Return the leaf's hash that a line says or makes; what is wrong with the line is noted."""
        values = line.values
        id_ = _id(values)
        if type(values.get("leaf")) is not int or values["leaf"] != index:
            self._add("leaf", "its line is missing, out of order, or cannot be read in one way only", index, id_)
        if set(values) == {"leaf", "id", "hash"}:
            self._gone.append((index, id_))
            hash_ = _bytes(values["hash"])
        else:
            hash_ = self._hash_of_row(index, id_, line)
        for tiles in self._tiles:
            stored = tiles.hash(index)
            if stored is not None and stored != hash_:
                self._add("changed", f"it is not what the tiles in {str(tiles.folder)!r} hold", index, id_)
        return hash_

    def _hash_of_row(self, index: int, id_: UUID | None, line: Line) -> bytes:
        values, said = line.values, said_by(line.values)
        if not line.is_of(index, said):
            self._look_into(index, id_, values)
        try:
            hash_ = leaf_hash(Statement(self._tree, said).leaf)
        except ProofError as error:
            self._add("changed", str(error), index, id_)
            return bytes(_HASH)
        if not said.keys().isdisjoint(COMMITMENTS):
            self._erased.append((index, id_))
        else:
            self._report.checked += 1
        if said.get("event") in (PRUNED, ERASED):
            self._remarks.append((index, said["event"], _ranges(values.get("data"), index)))
        return hash_

    def _look_into(self, index: int, id_: UUID | None, values: dict[str, Any]) -> None:
        """Note what a line that is written otherwise than an export's says beyond what is hashed."""
        unknown = sorted(set(values) - NAMES)
        if unknown:
            self._add("changed", f"its line has a field `{unknown[0][:64]}` that no export has", index, id_)
        for text, name in TEXTS.items():
            if not _says(values.get(name), values.get(text)):
                self._add("changed", f"its `{name}` is not what its `{text}` says", index, id_)

    def _trailer(self, values: dict[str, Any], size: int) -> None:
        note = values.get("checkpoint")
        if not isinstance(note, str):
            return
        try:
            self._mark(Note.parse(note), "the export's own checkpoint", None, size)
        except ProofError as error:
            self._add("checkpoint", f"the export's own checkpoint is none: {error}")

    def _mark(self, note: Note, what: str, witnessed: Witnessed | None, passed: int = 0) -> None:
        try:
            trusted = self._report.signatures_checked
            checkpoint = self._trust.opened(note, self._origin) if trusted else Checkpoint.parse(note.text)
        except ProofError as error:
            self._add("checkpoint", f"{what} is not the log's: {error}")
            return
        if checkpoint.size < passed:
            return  # of what comes after it it says nothing
        self._marks.setdefault(checkpoint.size, []).append((checkpoint.root, what, witnessed))

    def _compare(self, growth: Growth) -> None:
        for root, what, witnessed in self._marks.pop(growth.size, ()):
            if root != growth.root:
                since = f"after leaf {self._agreed - 1:,}, where they last agree" if self._agreed else "from its start"
                detail = (
                    f"{what} of size {growth.size:,} has another root than the export: one of them was changed {since}"
                )
                self._add("root", detail)
                continue
            self._agreed = growth.size
            if witnessed is not None:
                self._report.anchor = Outside(witnessed.source, growth.size, witnessed.at)

    def _judge(self) -> None:
        """Tell rows that went as a sealed event says from those that went otherwise."""
        pruned = Ranges(pair for _, event, pairs in self._remarks if event == PRUNED for pair in pairs)
        erased = Ranges(pair for _, event, pairs in self._remarks if event == ERASED for pair in pairs)
        for index, id_ in self._gone:
            if index in pruned:
                self._report.pruned += 1
            else:
                self._add("deleted", "its row is gone, and no sealed event says so", index, id_)
        for index, id_ in self._erased:
            if index in erased:
                self._report.erased += 1
            else:
                self._add("erased", "its payload is gone, and no sealed event says so", index, id_)

    def _add(self, kind: str, detail: str, index: int | None = None, id_: UUID | None = None) -> None:
        self._report.add(Problem(kind, detail, index, id_))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and not has_surrogate(value)


def _says(value: Any, text: Any) -> bool:
    """Whether what is read and what is hashed are the same, to the order of keys; ``true`` is not 1."""
    if text is None:
        return value is None
    try:
        return repr(STRICT.decode(text)) == repr(value)
    except (ValueError, TypeError, RecursionError):
        return False


def _id(values: dict[str, Any]) -> UUID | None:
    try:
        return UUID(values.get("id"))
    except (ValueError, TypeError, AttributeError):
        return None


def _bytes(text: Any) -> bytes:
    try:
        found = bytes.fromhex(text)
    except (ValueError, TypeError):
        found = b""
    return found if len(found) == _HASH else bytes(_HASH)


def _ranges(data: Any, index: int) -> list[tuple[int, int]]:
    """Return the ranges that an event names; it speaks only for leaves before its own."""
    try:
        pairs = [(first, end) for first, end in data["ranges"]]
    except (TypeError, ValueError, KeyError):
        return []
    if not all(type(number) is int for pair in pairs for number in pair):
        return []
    return [(first, min(end, index)) for first, end in pairs]


class _Tiles:
    """The hashes of leaves in an anchor's directory, as far as it has them; asked for in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = -1
        self._hashes = b""

    def hash(self, index: int) -> bytes | None:
        """Return the hash of a leaf, if it is there."""
        number, place = divmod(index, WIDTH)
        if number != self._number:
            self._number, self._hashes = number, self._read(number)
        found = self._hashes[place * _HASH : (place + 1) * _HASH]
        return found if len(found) == _HASH else None

    def _read(self, number: int) -> bytes:
        full = self.folder / Tile(0, number, WIDTH).path
        partial = full.with_name(f"{full.name}.p")
        try:
            if full.exists():
                return full.read_bytes()
            if not partial.is_dir():
                return b""
            files = [file for file in partial.iterdir() if file.name.isdecimal()]
            return max(files, key=lambda file: int(file.name)).read_bytes() if files else b""
        except OSError as error:
            raise SealError(f"the anchor's tiles in {str(self.folder)!r} cannot be read: {error}") from None
