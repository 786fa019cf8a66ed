"""The anchor ``dir:PATH``: the log as static files, which any web server or object store can serve.

Each origin has a folder of its path below PATH, laid out as C2SP tlog-tiles says, so that tools of others read it::

    log.example.com/shop/audit_logs/checkpoint            the newest checkpoint, replaced at once and last
    log.example.com/shop/audit_logs/checkpoints/312       the checkpoint of each size
    log.example.com/shop/audit_logs/tile/0/x001/067       a full tile: 256 hashes, written once
    log.example.com/shop/audit_logs/tile/0/x001/068.p/7   a partial tile, gone once there is the full one

A file that would have to be changed otherwise is the sign of another history: `RollbackError`. There are no entry
bundles: what happened stays in the database.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tracevault.errors import ProofError, RollbackError, SealError
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.merkle import verify_consistency
from tracevault.integrity.note import Note, Verifier
from tracevault.integrity.tiles import WIDTH, Tile, right_edge
from tracevault.sealing import durable
from tracevault.sealing.anchors.anchor import LogView, checkpoint_of, counts

_MODE = 0o644
_LEVELS = 8  # 256 ** 8 is more than a log can hold


class DirectoryAnchor:
    """A folder on this machine, on a share, or what an object store is mounted on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sink = f"dir:{path}"

    def publish(self, note: Note, log: LogView) -> str:
        """Write what is new of the tree, then the checkpoint; all is on the disk when this returns.

        The receipt is the path of the checkpoint of this size, below the folder.
        """
        checkpoint = checkpoint_of(note)
        folder = self.path / _below(checkpoint.origin)
        try:
            durable.make_folders(folder)
            with _alone(folder):
                self._publish(note, checkpoint, folder, log)
        except OSError as error:
            raise SealError(f"the anchor {self.sink!r} cannot be written: {error.strerror or error}") from None
        return f"{checkpoint.origin}/checkpoints/{checkpoint.size}"

    def _publish(self, note: Note, checkpoint: Checkpoint, folder: Path, log: LogView) -> None:
        old = self._held(folder, checkpoint.origin)
        if old is not None:
            self._check_same_log(old, checkpoint, log)
        # What a checkpoint needs is there before it is; so all that the old one needs is there.
        files = _Files(self.sink, folder)
        for tile in _new_tiles(old.size if old else 0, checkpoint.size):
            files.write_tile(tile, log.tile(tile.level, tile.number, tile.width))
        files.write_checkpoint(f"checkpoints/{checkpoint.size}", note, checkpoint)
        files.sync()
        if old is None or old.size <= checkpoint.size:
            durable.replace(folder / "checkpoint", str(note).encode(), _MODE)

    def _check_same_log(self, old: Checkpoint, new: Checkpoint, log: LogView) -> None:
        small, large = sorted((old, new), key=lambda checkpoint: checkpoint.size)
        told = f"ROLLBACK DETECTED: the anchor {self.sink!r} holds size {old.size:,} of {new.origin!r}"
        if small.size == large.size:
            if small.root != large.root:
                raise RollbackError(f"{told} with another root")
        elif small.size and large is new:
            # A smaller one than is held needs no proof: the signer compared it, and it takes no other's place.
            try:
                verify_consistency(small.size, large.size, small.root, large.root, list(log.prove(old.size, new.size)))
            except ProofError:
                raise RollbackError(f"{told}, which size {new.size:,} does not extend") from None

    def _held(self, folder: Path, origin: str) -> Checkpoint | None:
        try:
            note = Note.parse((folder / "checkpoint").read_text("utf-8"))
            checkpoint = Checkpoint.parse(note.text)
        except FileNotFoundError:
            return None
        except (ProofError, UnicodeDecodeError):
            raise SealError(f"what the anchor {self.sink!r} holds of {origin!r} is no checkpoint") from None
        if checkpoint.origin != origin:
            raise SealError(f"the anchor {self.sink!r} holds {checkpoint.origin!r} in place of {origin!r}")
        return checkpoint

    def newest(self, origin: str, verifiers: Sequence[Verifier] = ()) -> Note | None:
        """Return the note in ``checkpoint``; `SealError` if it is none, or none of these verify it."""
        path = self.path / _below(origin) / "checkpoint"
        try:
            note = Note.parse(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SealError(f"the anchor {self.sink!r} cannot be read: {error.strerror}") from None
        except (ProofError, UnicodeDecodeError):
            raise SealError(f"what the anchor {self.sink!r} holds of {origin!r} is no checkpoint") from None
        if counts(note, origin, verifiers) is None:
            raise SealError(f"what the anchor {self.sink!r} holds of {origin!r} is not signed by a known key")
        return note


class _Files:
    """Writes files of one log and remembers the folders that are not on the disk yet."""

    def __init__(self, sink: str, folder: Path) -> None:
        self._sink = sink
        self._folder = folder
        self._unsynced: set[Path] = set()
        self._outgrown: list[Path] = []

    def write_tile(self, tile: Tile, hashes: bytes) -> None:
        if len(hashes) != tile.width * 32:
            raise SealError(f"the database has no {tile.path} of the log that is published")
        path = self._folder / tile.path
        full = path.parent.with_name(path.parent.name.removesuffix(".p"))
        if tile.width < WIDTH and (present := _content(full)) is not None:
            # It has replaced its partial ones.
            hashes += present[len(hashes) :]
        else:
            present = _content(path)
        if present is None:
            self._place(path, hashes)
        elif present != hashes:
            raise RollbackError(
                f"ROLLBACK DETECTED: the anchor {self._sink!r} holds another {tile.path}: full and partial tiles are "
                "written once"
            )
        if tile.width == WIDTH:
            self._outgrown.append(path.with_name(path.name + ".p"))

    def write_checkpoint(self, name: str, note: Note, checkpoint: Checkpoint) -> None:
        path = self._folder / name
        present = _content(path)
        data = str(note).encode()
        if present == data:
            return
        if present is not None and not present.startswith(str(checkpoint).encode()):
            raise RollbackError(f"ROLLBACK DETECTED: the anchor {self._sink!r} holds another {name}")
        self._place(path, data)  # signed anew, by other keys

    def _place(self, path: Path, data: bytes) -> None:
        durable.make_folders(path.parent)
        # Not beside it, where a reader of the folder would find it.
        durable.place(path, data, _MODE, self._folder / ".new")
        self._unsynced.add(path.parent)

    def sync(self) -> None:
        """Have all on the disk, and only then remove the partial tiles that have become full ones."""
        for folder in self._unsynced:
            durable.sync_folder(folder)
        for folder in self._outgrown:
            shutil.rmtree(folder, ignore_errors=True)


def _new_tiles(old: int, new: int) -> Iterator[Tile]:
    """Yield the full tiles that a log got by growing from one size to another, and its partial ones."""
    for level in range(_LEVELS):
        shift = 8 * (level + 1)
        for number in range(old >> shift, new >> shift):
            yield Tile(level, number, WIDTH)
    yield from right_edge(new)


def _below(origin: str) -> Path:
    parts = origin.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise SealError(f"the origin {origin!r} cannot name a folder")
    return Path(*parts)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against other publishers: an older checkpoint must not take a newer one's place."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
