"""The supervisor's side of the shim: builds it, switches its faults, and restores what a power loss leaves."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import struct
import subprocess
from enum import IntEnum
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("shim.c")
_NUMBERS = struct.Struct("5q")


class Fault(IntEnum):
    """What fails; the numbers of the enum in shim.c."""

    NOTHING = 0
    WRITE_ENOSPC = 1
    WRITE_EIO = 2
    SYNC_EIO = 3
    KILL_AT_WRITE = 4
    KILL_AT_FIRST_WRITE = 5
    KILL_AT_SYNC = 6


class Shim:
    """One preloaded library with its control page, for the victims that are started with it."""

    def __init__(self, folder: Path, spool: Path) -> None:
        # Root's own run must not do without: there the compiler is missing by mistake.
        if shutil.which("cc") is None and os.geteuid() != 0:
            pytest.skip("no C compiler (`cc`) to build the shim that makes a disk fail")
        library = folder / "shim.so"
        if not library.exists():
            command = ["cc", "-O1", "-shared", "-fPIC", "-Wall", "-o", str(library), str(_SOURCE), "-ldl", "-lpthread"]
            subprocess.run(command, check=True)
        self._spool = spool.resolve()
        self._shadow = folder / "shadow"
        self._shadow.mkdir(exist_ok=True)
        control = folder / "control"
        control.write_bytes(bytes(_NUMBERS.size))
        with control.open("r+b") as stream:
            self._page = mmap.mmap(stream.fileno(), _NUMBERS.size)
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAULTS_FOLDER": str(self._spool),
            "FAULTS_CONTROL": str(control),
            "FAULTS_SHADOW": str(self._shadow),
        }

    def fault(self, fault: Fault, count: int = -1, *, piece: float = 0.0) -> None:
        """Let calls fail from now on: ``count`` of them, or all (-1).

        On a full disk ``count`` bytes still fit. Before a kill ``count`` writes or syncs still succeed; in the next
        the process dies, after this ``piece`` of a write.
        """
        _, _, shift, seen, _ = _NUMBERS.unpack(self._page)
        thousandths = round(piece * 1000)
        self._page[:] = _NUMBERS.pack(Fault.NOTHING, 0, shift, seen, thousandths)
        self._page[:] = _NUMBERS.pack(fault, count, shift, seen, thousandths)

    def shift_clock(self, seconds: int) -> None:
        """Set the victims' wall clock so far from the true time."""
        mode, count, _, seen, piece = _NUMBERS.unpack(self._page)
        self._page[:] = _NUMBERS.pack(mode, count, seconds, seen, piece)

    @property
    def seen(self) -> int:
        """How many calls have failed."""
        return int(_NUMBERS.unpack(self._page)[3])

    def lose_power(self, random: random.Random) -> int:
        """Leave in the spool directory what was synced, at its worst; the victims must be dead.

        Of what was not synced there is nothing, a piece, or as many zeros, whatever ``random`` says. Files that
        were removed are back, for nobody syncs that. Returns how many bytes were lost.
        """
        lost = 0
        names = {path.name for path in self._spool.iterdir()} | {
            path.stem for path in self._shadow.glob("*.listed") if (self._shadow / path.stem).exists()
        }
        for name in sorted(names):
            path, kept = self._spool / name, self._shadow / name
            had = path.read_bytes() if path.exists() else b""
            if not kept.exists() or not kept.with_name(f"{name}.listed").exists():
                path.unlink(missing_ok=True)
                lost += len(had)
                continue
            synced = bytearray(kept.read_bytes())
            gone = kept.with_name(f"{name}.gone")
            for line in gone.read_text().splitlines() if gone.exists() else ():
                start, end = map(int, line.split())
                end = min(end, len(synced))
                synced[start:end] = bytes(max(0, end - start))
                lost += max(0, end - start)
            tail = had[len(synced) :]
            lost += len(tail)
            path.write_bytes(synced + random.choice((b"", bytes(len(tail)), tail[: random.randint(0, len(tail))])))
        return lost
