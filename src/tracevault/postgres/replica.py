"""Whether a replica may be read from: known for a moment, then looked at again."""

from __future__ import annotations

import time

# Seconds for which an answer holds, at most; and for which a replica that could not be asked is left alone.
_KEPT = 1.0
_LEFT_ALONE = 10.0


class Freshness:
    """What is known of a replica, which may be ``most`` seconds behind."""

    def __init__(self, most: float) -> None:
        self._kept = min(_KEPT, most / 4)
        # While the answer holds it grows older.
        self.limit = most - self._kept
        self._fresh = False
        self._until = 0.0

    def known(self) -> bool | None:
        """Whether it is fresh enough; None where it has to be asked."""
        return self._fresh if time.monotonic() < self._until else None

    def note(self, fresh: bool | None) -> bool:
        """Keep an answer, and return it; None where there was none."""
        self._fresh = bool(fresh)
        self._until = time.monotonic() + (_LEFT_ALONE if fresh is None else self._kept)
        return self._fresh
