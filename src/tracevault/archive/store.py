"""Where an archive lies: a folder, or whatever else fsspec reaches."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from tracevault.archive.manifest import ArchiveManifest, manifest_path, read_manifest
from tracevault.errors import ArchiveError, ConfigError
from tracevault.sealing.durable import make_folders, sync_folder

try:
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem
except ImportError as error:
    message = 'an archive needs the extra "archive": pip install "tracevault[archive]"'
    raise ConfigError(message) from error

_MOST_MANIFEST = 1 << 28
_BLOCK = 1 << 20


class Store:
    """The archive of one table at a location. Raises `ArchiveError` where it cannot be reached."""

    def __init__(self, location: str | os.PathLike[str], table: str) -> None:
        self.location = os.fspath(location)
        self.table = table
        with self._reported("found"):
            self.filesystem, root = url_to_fs(self.location)
        self._root = f"{root.rstrip('/')}/{table}"
        self._local = isinstance(self.filesystem, LocalFileSystem)

    def full(self, path: str) -> str:
        """Return the path of a file as fsspec and DuckDB take it."""
        full = f"{self._root}/{path}"
        return full if self._local else str(self.filesystem.unstrip_protocol(full))

    @property
    def local(self) -> bool:
        """Whether it is a folder of this machine."""
        return self._local

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading."""
        with self._reported("read"):
            return cast("BinaryIO", self.filesystem.open(f"{self._root}/{path}", "rb"))

    def digest(self, path: str) -> tuple[int, str]:
        """Return how many bytes a file has, and its SHA-256 in hexadecimal digits."""
        hashed, size = hashlib.sha256(), 0
        with self._reported("read"), self.open(path) as file:
            while block := file.read(_BLOCK):
                hashed.update(block)
                size += len(block)
        return size, hashed.hexdigest()

    @contextmanager
    def create(self, path: str) -> Iterator[NewFile]:
        """Yield a new file, which is there, and on the disk, once the block has ended well; otherwise it is not."""
        with self._reported("written"):
            if self._local:
                with self._create_local(Path(self._root) / path) as file:
                    yield file
                return
            with self.filesystem.transaction, self.filesystem.open(f"{self._root}/{path}", "wb") as opened:
                yield NewFile(opened)

    @contextmanager
    def _create_local(self, path: Path) -> Iterator[NewFile]:
        make_folders(path.parent)
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("wb") as opened:
                yield NewFile(opened)
                opened.flush()
                os.fsync(opened.fileno())
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)

    def manifests(self) -> list[ArchiveManifest]:
        """Return the manifests, by the time that they are of."""
        found = []
        with self._reported("read"):
            self.filesystem.invalidate_cache()
            try:
                names = self.filesystem.ls(f"{self._root}/_manifests", detail=False)
            except FileNotFoundError:
                names = []
        for name in names:
            run, dot, suffix = str(name).rpartition("/")[2].partition(".")
            if not run or dot + suffix != ".json":
                continue
            with self._reported("read"), self.open(manifest_path(run)) as file:
                content = file.read(_MOST_MANIFEST)
            manifest = read_manifest(content, hashlib.sha256(content).hexdigest(), self.full(manifest_path(run)))
            if manifest.run != run or manifest.table != self.table:
                raise ArchiveError(f"{self.full(manifest_path(run))} is the manifest of something else")
            found.append(manifest)
        return sorted(found, key=lambda one: (one.start, one.created_at, one.run))

    def add(self, manifest: ArchiveManifest) -> ArchiveManifest:
        """Write a manifest, with which its files begin to count; return it with its SHA-256."""
        with self.create(manifest.path) as file:
            file.write(manifest.content())
        return replace(manifest, sha256=file.sha256)

    @contextmanager
    def _reported(self, verb: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, ImportError) as error:
            told = getattr(error, "strerror", None) or error
            raise ArchiveError(f"the archive {self.location!r} cannot be {verb}: {told}") from error


class NewFile:
    """A file that is written from its beginning to its end, counted and hashed on the way."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> int:
        """Write ``data``; return its length."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._hash.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._size

    def flush(self) -> None:
        """Hand on what is buffered."""
        with contextlib.suppress(AttributeError):
            self._file.flush()

    def close(self) -> None:
        """Whoever opened it closes it."""

    @property
    def sha256(self) -> str:
        """The SHA-256 of what was written, in hexadecimal digits."""
        return self._hash.hexdigest()
