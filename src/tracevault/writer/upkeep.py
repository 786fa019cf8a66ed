"""The spool at work in one process: its own files, adopted ones, and the thread that looks after them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Event, Lock, Thread

from tracevault.errors import SpoolError
from tracevault.writer.adoption import SpoolFolder
from tracevault.writer.spool import SpoolFile, abandon_inherited

_log = logging.getLogger("tracevault")

# Seconds: how long an appended record may be with the operating system alone; how often orphans are looked for;
# how soon what failed is tried again.
SYNC_INTERVAL = 0.025
ADOPTION_INTERVAL = 2.0
_RETRY_INTERVAL = 0.3
# Bytes after which a process begins another file, so that room is given back while events go on; less with a small
# quota.
_FILE_BYTES = 16 << 20
_FILES_PER_QUOTA = 16
# So much of the quota is left for headers, and notes of what is delivered.
_NOTES_OF_QUOTA = 64


class Spool:
    """The spool files that this process holds.

    ``adopted`` is called with each orphan that is taken over; ``failed`` with a file that cannot be synced any
    more; ``is_done`` says of a file whether nobody works at it, and ``let_go`` hears that it is closed.
    """

    def __init__(
        self,
        folder: SpoolFolder,
        quota: int,
        *,
        adopted: Callable[[SpoolFile], None],
        failed: Callable[[SpoolFile], None],
        is_done: Callable[[SpoolFile], bool],
        let_go: Callable[[SpoolFile], None],
    ) -> None:
        self._folder = folder
        self._quota = quota
        self._file_bytes = min(_FILE_BYTES, quota // _FILES_PER_QUOTA)
        self._adopted, self._failed, self._is_done, self._told = adopted, failed, is_done, let_go
        self._own: SpoolFile | None = None
        self._others: list[SpoolFile] = []
        self._fsync_seconds = 0.0
        self._lock = Lock()
        self._dirty = Event()
        self._stopping = False
        self._thread: Thread | None = None
        self._failing = False

    def start(self) -> None:
        """Take over orphans, and look after the files from now on."""
        abandon_inherited()  # a fork from C (uWSGI) has run no hooks
        self._folder.prepare()
        self._adopt()
        self._thread = Thread(target=self._work, name="tracevault-spool", daemon=True)
        self._thread.start()

    @property
    def folder(self) -> SpoolFolder:
        """The folder."""
        return self._folder

    def own(self) -> SpoolFile:
        """Return the file that this process appends to, made when it is needed."""
        own = self._own
        if own is None:
            with self._lock:
                if self._own is None:
                    self._own = self._folder.create()
                    self._set_limit()
                own = self._own
        return own

    def appended(self, file: SpoolFile) -> None:
        """Have what was appended synced soon, and begin another file if this one has grown enough."""
        if file.size >= self._file_bytes:
            self.begin_another(file)
        self.wake()

    def wake(self) -> None:
        """Have the files looked after soon."""
        if not self._dirty.is_set():
            self._dirty.set()

    def begin_another(self, file: SpoolFile) -> None:
        """Append no more to ``file``; it goes once everything in it is delivered."""
        with self._lock:
            if file is self._own:
                file.retire()
                self._own = None
                self._others.append(file)

    def _set_limit(self) -> None:
        if self._own is not None:
            # What a distrusted file holds moves to another one, which must have room.
            counted = [file.size for file in self._others if file.mine and not file.distrusted]
            self._own.limit = self._quota - self._quota // _NOTES_OF_QUOTA - sum(counted)

    def files(self) -> list[SpoolFile]:
        """Return all files that this process holds, its latest one last."""
        with self._lock:
            return [*self._others, *([self._own] if self._own else [])]

    @property
    def fsync_seconds(self) -> float:
        """How long syncing took, files that are gone included."""
        return self._fsync_seconds + sum(file.fsync_seconds for file in self.files())

    def let_go(self, file: SpoolFile) -> None:
        """Close a file that is not appended to."""
        with self._lock:
            if file not in self._others:
                return
            self._others.remove(file)
            self._fsync_seconds += file.fsync_seconds
            self._set_limit()
        self._told(file)
        file.close()

    def _adopt(self) -> None:
        held = {file.path for file in self.files()}
        for file in self._folder.orphans(held):
            if not file.depth:
                file.close()
                continue
            with self._lock:
                self._others.append(file)
            _log.info("took over %d records of %s, which another process left", file.depth, file.path)
            self._adopted(file)

    def _work(self) -> None:
        looked = time.monotonic()
        while not self._stopping:
            if self._dirty.wait(_RETRY_INTERVAL if self._failing else ADOPTION_INTERVAL):
                self._dirty.clear()
                time.sleep(SYNC_INTERVAL)
            try:
                self._look_after()
                if time.monotonic() - looked >= ADOPTION_INTERVAL:
                    looked = time.monotonic()
                    self._adopt()
            except Exception as error:  # noqa: BLE001 - the thread must live on
                if not self._failing:
                    _log.error("the spool has trouble: %s", error)
                self._failing = True
            else:
                self._failing = False

    def _look_after(self) -> None:
        # In their order, so that a loss of power takes the latest records along, and none before those it leaves.
        for file in self.files():
            try:
                file.sync(file.unsynced)
            except SpoolError:
                self._failed(file)
        own = self._own
        if own is not None and own.damaged:
            self.begin_another(own)
        with self._lock:
            others = list(self._others)
        for file in others:
            # One that is damaged is read again from end to end, as an orphan, to learn what is missing.
            if not file.depth or (file.damaged and self._is_done(file)):
                self.let_go(file)

    def close(self) -> None:
        """Let go of all files; what is in them is kept for whoever comes next."""
        self._stopping = True
        self._dirty.set()
        if self._thread is not None:
            self._thread.join(1.0)
        for file in self.files():
            try:
                file.close()
            except (OSError, SpoolError) as error:
                _log.error("closing the spool file %s: %s", file.path, error)
