"""Tells anchors of new checkpoints, each on a thread of its own, so that none delays another, nor the sealer.

An anchor is fed the newest checkpoint of each log; older ones that it has not been told of are superseded, since the
newest stands for them. After an error it is tried again, with what is newest then: after 1 second, then 2, up to 5
minutes, each time cut by up to a half at random, so that many hosts do not come at once.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import NamedTuple

from tracevault.errors import TracevaultError
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.note import Note
from tracevault.sealing.anchors import Anchor, LogView

_log = logging.getLogger("tracevault")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
"""Seconds before an anchor that failed is tried again, at first and at most."""
INTERVAL = 1.0
"""Seconds between two checkpoints of one log that an anchor gets; the last one always comes."""
_MOST_OUTCOMES = 10_000


class Outcome(NamedTuple):
    """What became of one attempt: a receipt, or an error."""

    sink: str
    origin: str
    size: int
    at: datetime
    receipt: str | None
    error: str | None


@dataclass(frozen=True)
class AnchorStatus:
    """How an anchor does, for people to see."""

    sink: str
    last_success: datetime | None = None
    last_size: int | None = None
    """The size of the last checkpoint that it took, of any log."""
    last_error: str | None = None
    """Why it failed last; None once it has taken every log since."""
    last_error_at: datetime | None = None
    failures: int = 0
    """Failures in a row, of the log that has most."""
    waiting: int = 0
    """Logs whose newest checkpoint it has not got."""


class _Pending(NamedTuple):
    note: Note
    size: int
    log: LogView


class _Lane:
    """One anchor, what waits for it, and its thread."""

    def __init__(self, anchor: Anchor, interval: float, outcomes: deque[Outcome]) -> None:
        self.anchor = anchor
        self._interval = interval
        self._outcomes = outcomes
        self._changed = threading.Condition()
        self._pending: dict[str, _Pending] = {}
        self._untried: set[str] = set()
        # By log, since an anchor may refuse one alone: when it may be tried, and how often it failed in a row.
        self._next: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._status = AnchorStatus(anchor.sink)
        self._thread: threading.Thread | None = None
        self._hurried = 0
        self._closed = False

    def submit(self, origin: str, pending: _Pending) -> None:
        with self._changed:
            if self._closed:
                raise TracevaultError("the publisher is closed")
            self._pending[origin] = pending
            self._untried.add(origin)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="tracevault-anchor", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def status(self) -> AnchorStatus:
        with self._changed:
            return replace(self._status, waiting=len(self._pending))

    def settle(self, deadline: float) -> bool:
        """Have what waits untried be tried at once, and wait for that, or for the time to pass.

        Return whether nothing waits any more.
        """
        with self._changed:
            self._hurried += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._untried or self._closed, max(0.0, deadline - time.monotonic()))
            self._hurried -= 1
            return not self._pending

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._pending.clear()
            self._changed.notify_all()

    def join(self, deadline: float) -> None:
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (due := self._take()) is not None:
            origin, pending = due
            try:
                receipt = self.anchor.publish(pending.note, pending.log)
            except Exception as error:  # noqa: BLE001 - whatever it is, sealing and the other anchors go on
                self._failed(origin, pending, error)
            else:
                self._succeeded(origin, pending, receipt)

    def _take(self) -> tuple[str, _Pending] | None:
        """Wait for what is due next; None when closed."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                at_once = self._untried if self._hurried else ()
                times = {origin: 0.0 if origin in at_once else self._next.get(origin, 0.0) for origin in self._pending}
                origin = min(times, key=times.__getitem__, default=None)
                if origin is not None and times[origin] <= now:
                    return origin, self._pending[origin]
                self._changed.wait(None if origin is None else times[origin] - now)
        return None

    def _succeeded(self, origin: str, pending: _Pending, receipt: str) -> None:
        at = datetime.now(UTC)
        with self._changed:
            if self._failures.pop(origin, 0):
                _log.info("the anchor %s takes %s again", self.anchor.sink, origin)
            self._status = replace(self._status, last_success=at, last_size=pending.size)
            self._count_failures()
            self._next[origin] = time.monotonic() + self._interval
            if self._pending.get(origin) is pending:
                del self._pending[origin]
            self._settled(origin, pending)
            self._outcomes.append(Outcome(self.anchor.sink, origin, pending.size, at, receipt, None))

    def _failed(self, origin: str, pending: _Pending, error: Exception) -> None:
        at = datetime.now(UTC)
        # Only our own errors are known to hold no secret.
        said = str(error) if isinstance(error, TracevaultError) else f"an unexpected {type(error).__name__}"
        with self._changed:
            failures = self._failures[origin] = self._failures.get(origin, 0) + 1
            if failures == 1:
                _log.warning("an anchor failed and is tried again: %s", said)
            self._status = replace(self._status, last_error=said, last_error_at=at)
            self._count_failures()
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 30))
            self._next[origin] = time.monotonic() + pause * random.uniform(0.5, 1.0)  # noqa: S311
            self._settled(origin, pending)
            self._outcomes.append(Outcome(self.anchor.sink, origin, pending.size, at, None, said))

    def _count_failures(self) -> None:
        failures = max(self._failures.values(), default=0)
        last_error = self._status.last_error if failures else None
        self._status = replace(self._status, failures=failures, last_error=last_error)

    def _settled(self, origin: str, pending: _Pending) -> None:
        if self._pending.get(origin, pending) is pending:
            self._untried.discard(origin)
        self._changed.notify_all()


class Publisher:
    """The anchors of a sealer. Its threads begin with the first checkpoint, and never keep a process alive."""

    def __init__(self, anchors: Iterable[Anchor], *, interval: float = INTERVAL) -> None:
        """Take anchors, each with a ``sink`` of its own; ``interval`` is in seconds, see `INTERVAL`."""
        self._outcomes: deque[Outcome] = deque(maxlen=_MOST_OUTCOMES)
        self._lanes = [_Lane(anchor, interval, self._outcomes) for anchor in anchors]

    @property
    def anchors(self) -> list[Anchor]:
        """The anchors, in the order in which they were given."""
        return [lane.anchor for lane in self._lanes]

    def submit(self, note: Note, log: LogView) -> None:
        """Have every anchor told of a signed checkpoint, soon; returns at once.

        ``log`` is asked on the anchors' threads, several at a time. Raises `ProofError` if ``note`` holds no
        checkpoint.
        """
        checkpoint = Checkpoint.parse(note.text)
        for lane in self._lanes:
            lane.submit(checkpoint.origin, _Pending(note, checkpoint.size, log))

    def outcomes(self) -> list[Outcome]:
        """Return what became of attempts since the last call, in order, to be recorded; each is returned once."""
        found = []
        while self._outcomes:
            found.append(self._outcomes.popleft())
        return found

    def status(self) -> list[AnchorStatus]:
        """Return how each anchor does."""
        return [lane.status() for lane in self._lanes]

    def settle(self, timeout: float) -> bool:
        """Have each anchor told of the newest checkpoints at once; return whether every one has them all.

        What was not tried yet is tried once, without regard to ``interval`` and pauses; that may take up to
        ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        settled = [lane.settle(deadline) for lane in self._lanes]
        return all(settled)

    def close(self, timeout: float = 0.0) -> None:
        """Stop: what was not sent is not sent. Wait up to ``timeout`` seconds for what is under way."""
        deadline = time.monotonic() + timeout
        for lane in self._lanes:
            lane.close()
        for lane in self._lanes:
            lane.join(deadline)
