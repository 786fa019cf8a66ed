"""The folder of a spool: this process's own file, and those that other processes left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from tracevault.errors import SpoolError
from tracevault.writer.spool import (
    CORRUPT_SUFFIX,
    LOCK_SUFFIX,
    SUFFIX,
    SpoolFile,
    acquire_lock,
    is_corrupt,
)

_log = logging.getLogger("tracevault")


class SpoolFolder:
    """Opens spool files. ``target`` names the database: files that wait for another one are left alone."""

    def __init__(self, path: str, *, quota: int, target: str | None) -> None:
        self.path = Path(path)
        self._quota = quota
        self._target = target
        self._passed_over: set[str] = set()

    def prepare(self) -> None:
        """Make the folder, for its owner alone; `SpoolError` if it cannot be written."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SpoolError(f"the spool {str(self.path)!r} cannot be made: {error.strerror}") from None
        if not os.access(self.path, os.R_OK | os.W_OK | os.X_OK):
            raise SpoolError(f"the spool {str(self.path)!r} cannot be written by this user")

    def create(self) -> SpoolFile:
        """Make a file of this process's own."""
        return SpoolFile.create(self.path, quota=self._quota, target=self._target or "")

    def orphans(self, held: set[Path]) -> Iterator[SpoolFile]:
        """Take over the files that no living process holds; one that is broken is set aside."""
        for path in sorted(self.path.glob(f"*{SUFFIX}")):
            if path in held:
                continue
            lock = acquire_lock(path.with_suffix(LOCK_SUFFIX))
            if lock is None:
                continue
            file = self._open(path, lock)
            if file is not None:
                yield file

    def _open(self, path: Path, lock: int) -> SpoolFile | None:
        if not path.exists():  # its owner has removed it, after we saw it
            with contextlib.suppress(FileNotFoundError):
                path.with_suffix(LOCK_SUFFIX).unlink()
            os.close(lock)
            return None
        try:
            file = SpoolFile(path, lock, quota=self._quota, target="", create=False)
        except sqlite3.Error as error:
            unfinished = "no such table" in str(error)  # its owner died while it made the file: nothing was kept in it
            if unfinished or is_corrupt(error):
                self._set_aside(path, empty=unfinished)
            elif path.name not in self._passed_over:
                _log.error("the spool file %s cannot be read: %s", path, error)
                self._passed_over.add(path.name)
            os.close(lock)
            return None
        except (SpoolError, ValueError, KeyError) as error:
            if path.name not in self._passed_over:
                _log.error("the spool file %s is left alone: %s", path, error)
                self._passed_over.add(path.name)
            os.close(lock)
            return None
        if self._target is not None and file.target != self._target:
            if path.name not in self._passed_over and (file.depth or file.dead):
                _log.warning(
                    "the spool file %s waits for another database (%s): a vault that writes there, or "
                    "`tracevault spool flush`, will deliver it",
                    path,
                    file.target,
                )
            self._passed_over.add(path.name)
            file.close()
            return None
        return file

    def _set_aside(self, path: Path, *, empty: bool) -> None:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                if empty:
                    os.unlink(f"{path}{suffix}")
                else:
                    os.rename(f"{path}{suffix}", f"{path.with_suffix(CORRUPT_SUFFIX)}{suffix}")
        with contextlib.suppress(FileNotFoundError):
            path.with_suffix(LOCK_SUFFIX).unlink()
        if not empty:
            _log.error(
                "the spool file %s is broken and was set aside as %s; what can be read of it can be had by sqlite3's "
                "`.recover`",
                path,
                path.with_suffix(CORRUPT_SUFFIX).name,
            )
