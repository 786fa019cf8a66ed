"""Sealing inside an application: the option ``seal`` of a vault, as a thread of the process that started it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

from psycopg import Connection

from tracevault.errors import ConfigError, TracevaultError
from tracevault.integrity.note import Signer
from tracevault.sealing.anchors import parse_anchor
from tracevault.sealing.keys import environment_keys, read_keys
from tracevault.sealing.publisher import Publisher
from tracevault.sealing.sealer import HEARTBEAT, Sealer
from tracevault.sealing.signer import CheckpointSigner, SigningState, state_path

_log = logging.getLogger("tracevault")
EVERY_MS = 250.0
# Seconds between two checkpoints of a log that an anchor gets.
ANCHOR_EVERY = 60.0


def signing_keys(path: Path | None) -> list[Signer]:
    """Return the keys of a file, else those of the environment."""
    if path is not None:
        return read_keys(path)
    found = environment_keys()
    if not found:
        raise ConfigError(
            "sealing needs a key: pass its file as `seal.key`, or set TRACEVAULT_SIGNING_KEY; `tracevault keygen` "
            "makes one",
            field="seal.key",
        )
    return found


def make_sealer(
    connect: Callable[[], Connection[Any]],
    tables: Sequence[str],
    *,
    key: Path | None,
    state: Path | None = None,
    anchors: Sequence[str] = (),
    anchor_every: float = ANCHOR_EVERY,
    heartbeat: float = HEARTBEAT,
) -> tuple[Sealer, Publisher]:
    """Return a sealer of ``tables``, and the publisher that it tells; both are to be closed."""
    keys = signing_keys(key)
    place = state or (state_path(key) if key is not None else None)
    if place is None:
        raise ConfigError(
            "a key of the environment needs a file for what it has signed: pass it as `seal.state`", field="seal.state"
        )
    publisher = Publisher([parse_anchor(text) for text in anchors], interval=anchor_every)
    signer = CheckpointSigner(keys, SigningState(place))
    return Sealer(connect, tables, signer, publisher=publisher, heartbeat=heartbeat), publisher


class SealingThread:
    """Seals the tables of a vault for as long as it is open."""

    def __init__(
        self, connect: Callable[[], Connection[Any]], tables: Sequence[str], options: Mapping[str, Any]
    ) -> None:
        """Check keys and anchors; nothing is read from the database yet."""
        key, state = options.get("key"), options.get("state")
        self._every = options.get("every_ms", EVERY_MS) / 1000
        self._sealer, self._publisher = make_sealer(
            connect,
            tables,
            key=None if key is None else Path(key).expanduser(),
            state=None if state is None else Path(state).expanduser(),
            anchors=options.get("anchors", ()),
            anchor_every=options.get("anchor_every_s", ANCHOR_EVERY),
            heartbeat=options.get("heartbeat_s", HEARTBEAT),
        )
        self.pid = os.getpid()
        self._stop = Event()
        self._thread = Thread(target=self._sealer.run, args=(self._stop, self._every), name="tracevault-sealer")
        self._thread.daemon = True  # what is not sealed when the process ends is sealed by the next one

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Seal what is committed, tell the anchors, and stop; within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        self._stop.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._publisher.close()
            return
        try:
            for table in self._sealer.tables:
                if time.monotonic() < deadline:
                    self._sealer.seal(table)
            self._publisher.settle(max(0.0, deadline - time.monotonic()))
            self._sealer.beat()
        except TracevaultError as error:
            _log.warning("what was emitted last is not sealed yet: %s", error)
        self._publisher.close()
        self._sealer.close()
