"""Files that survive a loss of power: written whole or not at all, and listed in their folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def create(path: Path, data: bytes, mode: int) -> None:
    """Make a file; `FileExistsError` if there is one. It is whole and on the disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            os.fchmod(descriptor, mode)  # whatever the umask
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def replace(path: Path, data: bytes, mode: int) -> None:
    """Make a file, or put this one in its place at once: a reader finds the old one or the new one, whole.

    The caller holds a lock: what is written meanwhile stands in ``.NAME.new``, where nobody else may write, and which
    a process that was killed leaves to the next.
    """
    place(path, data, mode, path.with_name(f".{path.name}.new"))
    sync_folder(path.parent)


def place(path: Path, data: bytes, mode: int, temporary: Path) -> None:
    """Do as `replace`, but leave it to the caller to `sync_folder`, once for many files, and to say what for a time.

    ``temporary`` is on the same file system.
    """
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        try:
            os.fchmod(descriptor, mode)
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def growing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write to, which takes the place of ``path`` when it is whole and on the disk; else it goes.

    Until then it has a name of its own beside it, so that several can be made at once. What is no plain file, such as
    a pipe or a terminal, is written to as it is: nothing can take its place.
    """
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.new")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``: in one go, unless the disk becomes full or a signal comes in the middle."""
    while data:
        data = data[os.write(descriptor, data) :]


def sync_folder(folder: Path) -> None:
    """Have the disk know which files the folder holds."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, as far as they are missing, and have the disk know them."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    sync_folder(folder.parent)
