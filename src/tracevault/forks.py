"""Whether this process was forked: asked with each event, so quickly, and also true where C code forked.

Python's functions of fork do not run where the fork was not Python's, as uWSGI's. `os.getpid` tells in any case, and
asks the kernel each time. Where it can, the kernel wipes a page of ours in each child (``MADV_WIPEONFORK``, Linux
4.14), which is read in a fifth of that time; libraries of cryptography guard their random numbers so.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from typing import cast

_WIPE_ON_FORK = 18
_NO_ADVICE = -1


class _ByPid(Sequence[int]):
    """Like a page that is wiped, where there is none."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def __getitem__(self, _place: object) -> int:  # type: ignore[override]
        return os.getpid() == self._pid

    def __len__(self) -> int:
        return 1


def fork_mark() -> Sequence[int]:
    """Return something whose first item is true in this process, and false in each that is forked from it."""
    page = _wiped_page() if sys.platform == "linux" else None
    return _ByPid() if page is None else page


def _wiped_page() -> Sequence[int] | None:
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(_WIPE_ON_FORK)
    except (OSError, ValueError):
        return None
    try:
        page.madvise(_NO_ADVICE)
    except (OSError, ValueError):
        page[0] = 1
        return cast("Sequence[int]", page)
    return None  # emulators take any advice, and follow none
