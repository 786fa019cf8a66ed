"""The supervisor's side of the shim: builds it, switches its faults, and restores what a power loss leaves."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from enum import IntEnum
from pathlib import Path

_SOURCE = Path(__file__).with_name("shim.c")
_NUMBERS = struct.Struct("5q")


class Fault(IntEnum):
    """What fails; the numbers of the enum in shim.c."""

    NOTHING = 0
    WRITE_ENOSPC = 1
    WRITE_EIO = 2
    SYNC_EIO = 3
    KILL_AT_WRITE = 4
    KILL_AT_MAIN_WRITE = 5


class Shim:
    """One preloaded library with its control page, for the victims that are started with it."""

    def __init__(self, folder: Path, spool: Path) -> None:
        library = folder / "shim.so"
        if not library.exists():
            subprocess.run(
                ["cc", "-O1", "-shared", "-fPIC", "-Wall", "-o", str(library), str(_SOURCE), "-ldl"], check=True
            )
        self._spool = spool
        self._shadow = folder / "shadow"
        self._shadow.mkdir(exist_ok=True)
        control = folder / "control"
        control.write_bytes(bytes(_NUMBERS.size))
        with control.open("r+b") as stream:
            self._page = mmap.mmap(stream.fileno(), _NUMBERS.size)
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAULTS_FOLDER": str(spool),
            "FAULTS_CONTROL": str(control),
            "FAULTS_SHADOW": str(self._shadow),
        }

    def fault(self, fault: Fault, count: int = -1) -> None:
        """Let calls fail from now on: ``count`` of them, or all (-1); for a kill, after ``count`` writes."""
        _, _, shift, seen, spare = _NUMBERS.unpack(self._page)
        self._page[:] = _NUMBERS.pack(Fault.NOTHING, 0, shift, seen, spare)
        self._page[:] = _NUMBERS.pack(fault, count, shift, seen, spare)

    def shift_clock(self, seconds: int) -> None:
        """Set the victims' wall clock so far from the true time."""
        mode, count, _, seen, spare = _NUMBERS.unpack(self._page)
        self._page[:] = _NUMBERS.pack(mode, count, seconds, seen, spare)

    @property
    def seen(self) -> int:
        """How many calls have failed."""
        return int(_NUMBERS.unpack(self._page)[3])

    def lose_power(self) -> None:
        """Leave in the spool directory what was synced, and nothing else; the victims must be dead."""
        for path in self._spool.iterdir():
            kept = self._shadow / path.name
            if kept.exists():
                shutil.copyfile(kept, path)
            else:
                path.unlink()
