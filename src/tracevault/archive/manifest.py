"""What one run wrote. A file that no manifest names does not count: a run that was interrupted leaves such files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from tracevault.errors import ArchiveError, ValidationError
from tracevault.events.payload import iso_utc
from tracevault.events.rules import moment
from tracevault.schema.position import Snapshot

FORMAT = "tracevault/archive/v1"
_RUN = re.compile(r"[0-9a-z-]{8,64}", re.ASCII)
_PATH = re.compile(r"(?:[0-9A-Za-z_=-][0-9A-Za-z_=.-]*/)*[0-9A-Za-z_=-][0-9A-Za-z_=.-]*", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class ArchivedFile:
    """A file below the table's folder. ``first`` and ``last`` say when its events happened."""

    path: str
    rows: int
    bytes: int
    sha256: str
    first: datetime
    last: datetime


@dataclass(frozen=True)
class Proof:
    """What shows that rows are those of the log: the note of a checkpoint, of ``size`` leaves, and the zip of tiles."""

    tree: str
    origin: str
    size: int
    checkpoint: str
    path: str
    sha256: str
    leaves: tuple[tuple[int, int], ...]
    """The leaves of the rows: ranges from the first to before the end."""


@dataclass(frozen=True)
class ArchiveManifest:
    """One run: what was archived of one month of a table. ``proof`` is None where the table was not sealed."""

    run: str
    table: str
    start: datetime
    end: datetime
    """The events happened from ``start`` on and before this."""
    rows: int
    files: tuple[ArchivedFile, ...]
    proof: Proof | None
    system: str
    """The system identifier of the server."""
    snapshot: str
    created_at: datetime
    sha256: str = ""
    """Of the manifest itself, as it was read or written. The log tells it in an event ``tracevault.archived``."""

    @property
    def path(self) -> str:
        """Its own path below the table's folder."""
        return manifest_path(self.run)

    def content(self) -> bytes:
        """Return it as it is written."""
        values = asdict(self)
        del values["sha256"]
        return (json.dumps({"format": FORMAT, **values}, default=iso_utc, indent=1) + "\n").encode()


def manifest_path(run: str) -> str:
    """Return the path of a run's manifest below the table's folder."""
    return f"_manifests/{run}.json"


def read_manifest(content: bytes, sha256: str, where: str) -> ArchiveManifest:
    """Return the manifest that ``content`` is; raise `ArchiveError` if it is none. ``where`` names its place."""
    try:
        values = json.loads(content)
        if values["format"] != FORMAT:
            raise ValueError
        proof = values["proof"]
        made = ArchiveManifest(
            run=_matching(_RUN, values["run"]),
            table=_text(values["table"]),
            start=_time(values["start"]),
            end=_time(values["end"]),
            rows=_count(values["rows"]),
            files=tuple(map(_file, values["files"])),
            proof=None if proof is None else _proof(proof),
            system=_matching(re.compile(r"\d{1,20}", re.ASCII), values["system"]),
            snapshot=str(Snapshot.parse(values["snapshot"])),
            created_at=_time(values["created_at"]),
            sha256=sha256,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ValidationError):
        raise ArchiveError(f"{where} is no manifest of an archive, or one of another version") from None
    return made


def _file(values: Mapping[str, Any]) -> ArchivedFile:
    return ArchivedFile(
        _matching(_PATH, values["path"]),
        _count(values["rows"]),
        _count(values["bytes"]),
        _matching(_DIGEST, values["sha256"]),
        _time(values["first"]),
        _time(values["last"]),
    )


def _proof(values: Mapping[str, Any]) -> Proof:
    return Proof(
        _text(values["tree"]),
        _text(values["origin"]),
        _count(values["size"]),
        _text(values["checkpoint"]),
        _matching(_PATH, values["path"]),
        _matching(_DIGEST, values["sha256"]),
        tuple((_count(first), _count(end)) for first, end in values["leaves"]),
    )


def _matching(pattern: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError
    return value


def _time(value: Any) -> datetime:
    return moment(_text(value), "manifest")
