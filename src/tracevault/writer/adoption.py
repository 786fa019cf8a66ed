"""The folder of a spool: this process's own files, and those that other processes left behind."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from tracevault.errors import SpoolError
from tracevault.writer.frames import begins_frame
from tracevault.writer.spool import (
    CORRUPT_SUFFIX,
    LOCK_SUFFIX,
    SUFFIX,
    NoHeaderError,
    SpoolFile,
    acquire_lock,
    set_aside,
)

_log = logging.getLogger("tracevault")


class SpoolFolder:
    """Opens spool files. ``target`` names the database: files that wait for another one are left alone.

    With ``shared`` this process may have a vault for that one as well.
    """

    def __init__(self, path: str, *, target: str | None, shared: bool = False) -> None:
        self.path = Path(path)
        self._target = target
        self._strange = logging.INFO if shared else logging.WARNING
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
        return SpoolFile.create(self.path, target=self._target or "")

    def orphans(self, held: set[Path]) -> Iterator[SpoolFile]:
        """Take over the files that no living process holds; one that is no spool file is set aside."""
        for path in sorted(self.path.glob(f"*{SUFFIX}")):
            if path in held or path.name in self._passed_over:
                continue
            lock = acquire_lock(path.with_suffix(LOCK_SUFFIX))
            if lock is None:
                continue
            file = self._open(path, lock)
            if file is None:
                os.close(lock)
            elif self._target is not None and file.target != self._target and file.depth:
                _log.log(
                    self._strange,
                    "the spool file %s waits for another database (%s): a vault that writes there, or "
                    "`tracevault spool flush --any-database`, will deliver it",
                    path,
                    file.target,
                )
                self._passed_over.add(path.name)
                file.close()
            else:
                if file.damaged:
                    _tell_damage(file)
                yield file
        self._remove_locks()

    def _remove_locks(self) -> None:
        """Remove the locks of files that are gone: their owners died in between."""
        for path in self.path.glob(f"*{LOCK_SUFFIX}"):
            if path.with_suffix(SUFFIX).exists():
                continue
            lock = acquire_lock(path)  # whoever makes a file holds its lock before the file is there
            if lock is None:
                continue
            if not path.with_suffix(SUFFIX).exists():
                path.unlink(missing_ok=True)
            os.close(lock)

    def _open(self, path: Path, lock: int) -> SpoolFile | None:
        try:
            return SpoolFile.take_over(path, lock)
        except FileNotFoundError:  # its owner has removed it, after we saw it
            path.with_suffix(LOCK_SUFFIX).unlink(missing_ok=True)
        except NoHeaderError:
            if is_barely_begun(path):
                path.unlink()
                path.with_suffix(LOCK_SUFFIX).unlink(missing_ok=True)
            else:
                set_aside(path)
                _log.error(
                    "%s is no spool file, or broken throughout, and was set aside as %s",
                    path,
                    path.with_suffix(CORRUPT_SUFFIX).name,
                )
        except (SpoolError, OSError, ValueError, KeyError) as error:
            _log.error("the spool file %s is left alone: %s", path, error)
            self._passed_over.add(path.name)
        return None


def is_barely_begun(path: Path) -> bool:
    """Whether a process died while it made the file, so that nothing was kept in it."""
    with path.open("rb") as file:
        return begins_frame(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def _tell_damage(file: SpoolFile) -> None:
    _log.error(
        "the spool file %s is damaged: %d records in it cannot be read, and %d bytes at its end are no whole record; "
        "the others are delivered, then it is kept as %s",
        file.path,
        file.unreadable,
        file.torn,
        file.path.with_suffix(CORRUPT_SUFFIX).name,
    )
