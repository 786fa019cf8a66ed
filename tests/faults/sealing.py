"""A sealer in a process of its own, which may kill itself where it hurts most: ``python -m tests.faults.sealing``."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from threading import Event
from typing import Any

import psycopg

from tracevault.sealing import sealer as sealing
from tracevault.sealing import signer as signing
from tracevault.sealing.keys import read_keys
from tracevault.sealing.sealer import Sealer
from tracevault.sealing.signer import CheckpointSigner, SigningState, state_path


def _die_sometimes(owner: Any, name: str, chance: float, *, before: bool) -> None:
    """Have a function end this process now and then, before or after it does its work."""
    real = getattr(owner, name)

    def fatal(*args: Any, **kwargs: Any) -> Any:
        if before and random.random() < chance:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if not before and random.random() < chance:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, fatal)


def main(spec: dict[str, Any]) -> None:
    """Seal until killed. ``chance``: how often to die at each of the points between two steps that belong together."""
    chance = spec["chance"]
    if chance:
        _die_sometimes(Sealer, "sign", chance, before=True)  # leaves are committed, and nothing is signed
        _die_sometimes(signing.SigningState, "write", chance, before=False)  # signed, and the note is not stored
        _die_sometimes(sealing, "store_checkpoint", chance, before=True)
    key = Path(spec["key"])
    signer = CheckpointSigner(read_keys(key), SigningState(state_path(key)))
    sealer = Sealer(lambda: psycopg.connect(spec["dsn"]), spec["tables"], signer, batch=spec["batch"])
    sealer.run(Event(), spec["every"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
