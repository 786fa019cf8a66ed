"""The spool at work in one process: its own file, adopted ones, and the thread that looks after them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Event, Lock, Thread

from tracevault.errors import SpoolError
from tracevault.writer.adoption import SpoolFolder
from tracevault.writer.spool import SpoolFile

_log = logging.getLogger("tracevault")

# Seconds: how long an appended record may be with the operating system alone; how often orphans are looked for.
SYNC_INTERVAL = 0.025
ADOPTION_INTERVAL = 2.0


class Spool:
    """The spool files that this process holds.

    ``adopted`` is called with each orphan that is taken over, ``emptied`` with each that is let go of again.
    """

    def __init__(
        self, folder: SpoolFolder, adopted: Callable[[SpoolFile], None], emptied: Callable[[SpoolFile], None]
    ) -> None:
        self._folder = folder
        self._adopted = adopted
        self._emptied = emptied
        self._own: SpoolFile | None = None
        self._others: list[SpoolFile] = []
        self._lock = Lock()
        self._dirty = Event()
        self._stopping = False
        self._thread: Thread | None = None
        self._failing = False

    def start(self) -> None:
        """Take over orphans, and look after the files from now on."""
        self._folder.prepare()
        self._adopt()
        self._thread = Thread(target=self._work, name="tracevault-spool", daemon=True)
        self._thread.start()

    def own(self) -> SpoolFile:
        """Return the file that this process appends to, made when it is first needed."""
        own = self._own
        if own is None:
            with self._lock:
                if self._own is None:
                    self._own = self._folder.create()
                own = self._own
        return own

    def is_own(self, file: SpoolFile) -> bool:
        """Whether this process appends to ``file``."""
        return file is self._own

    def appended(self) -> None:
        """Have what was appended synced soon."""
        if not self._dirty.is_set():
            self._dirty.set()

    def files(self) -> list[SpoolFile]:
        """Return all files that this process holds."""
        with self._lock:
            return [*([self._own] if self._own else []), *self._others]

    def replace(self, broken: SpoolFile) -> None:
        """Set a broken file aside, and go on with a new one."""
        with self._lock:
            if broken is self._own:
                self._own = None
            elif broken in self._others:
                self._others.remove(broken)
            else:
                return
        aside = broken.quarantine()
        _log.error("the spool file %s is broken and was set aside as %s", broken.path, aside.name)

    def _adopt(self) -> None:
        held = {file.path for file in self.files()}
        for file in self._folder.orphans(held):
            if not file.depth:
                file.close()  # which removes it, unless dead letters are in it
                continue
            with self._lock:
                self._others.append(file)
            if file.depth:
                _log.info("took over %d records of %s, which another process left", file.depth, file.path)
            self._adopted(file)

    def _work(self) -> None:
        looked = time.monotonic()
        while not self._stopping:
            if self._dirty.wait(ADOPTION_INTERVAL):
                self._dirty.clear()
                time.sleep(SYNC_INTERVAL)
            try:
                for file in self.files():
                    file.upkeep()
                if time.monotonic() - looked >= ADOPTION_INTERVAL:
                    looked = time.monotonic()
                    self._adopt()
                    self._let_go_of_empty()
            except Exception as error:  # noqa: BLE001 - the thread must live on
                if not self._failing:
                    _log.error("the spool has trouble: %s", error)
                self._failing = True
            else:
                self._failing = False

    def _let_go_of_empty(self) -> None:
        with self._lock:
            # Those with dead letters are let go of as well: whoever deals with them needs the file.
            empty = [file for file in self._others if not file.depth]
            self._others = [file for file in self._others if file.depth]
        for file in empty:
            self._emptied(file)
            file.close()

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
