"""What was verified before: a file with a checkpoint, so that the next verification need only look at what is new.

It is a signed note, and so a checkpoint from outside the database as well. A log that no longer extends it was changed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from psycopg import Connection

from tracevault.errors import ConfigError, ProofError, SealError
from tracevault.flows.seal import find_tree
from tracevault.flows.verify import newest_checkpoint
from tracevault.integrity.note import Note
from tracevault.integrity.report import Report
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.sealing import durable
from tracevault.sealing.verify import Trust, Witnessed

_READING = Place("reading checkpoints")


class Verified:
    """The file. Its signature is checked, so it takes a key."""

    def __init__(self, path: Path, trust: Trust) -> None:
        if not (trust.keys or trust.revoked):
            raise ConfigError("to remember what was verified takes the log's verifier key", field="keys")
        self.path = path
        self._trust = trust

    def read(self, origin: str) -> Witnessed | None:
        """Return the checkpoint that was verified last; None if there was none. `SealError` if it is not the log's."""
        try:
            note = Note.parse(self.path.read_text(encoding="utf-8"))
            self._trust.opened(note, origin)
            return Witnessed(str(self.path), note, datetime.fromtimestamp(self.path.stat().st_mtime, UTC))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ProofError) as error:
            raise SealError(
                f"{str(self.path)!r} does not say what was verified: {error}; --full goes without"
            ) from None

    def remember(self, connection: Connection[Any], report: Report) -> None:
        """Keep the newest checkpoint that a verification has found to be the log's."""
        tree = run(connection, find_tree(report.table), _READING)
        assert tree is not None
        text = run(connection, newest_checkpoint(tree, report.size), _READING)
        if text is not None:
            durable.replace(self.path, text.encode(), 0o600)
