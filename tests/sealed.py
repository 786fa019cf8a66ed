"""A sealed audit table, for tests: its key, a sealer that is called when the test wants, and its anchor."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import psycopg

from tests.conftest import rows
from tracevault import Report
from tracevault.integrity.note import Note, Signer, Verifier
from tracevault.sealing.anchors import parse_anchor
from tracevault.sealing.publisher import Publisher
from tracevault.sealing.sealer import Sealer
from tracevault.sealing.signer import CheckpointSigner, SigningState
from tracevault.sealing.trust import trust_of
from tracevault.sealing.verify import GRACE, verify

NAME = "log.example.com/shop"


class Sealed:
    """``audit_logs`` of a database, and ``other`` tables if they are named, sealed by `seal` alone."""

    def __init__(self, dsn: str, folder: Path, tables: tuple[str, ...] = ("audit_logs",), batch: int = 1000) -> None:
        self.dsn = dsn
        self.anchor = folder / "anchor"
        self.key_file = folder / "seal.key"
        self.signer = Signer.generate(NAME)
        self.key_file.write_text(f"{self.signer.encode()}\n")
        self.key_file.chmod(0o600)
        self.state = SigningState(folder / "state")
        self.publisher = Publisher([parse_anchor(f"file:{self.anchor}")], interval=0.0)
        self.tables = tables
        self.sealer = self.another(batch)

    def another(self, batch: int = 1000) -> Sealer:
        """Another sealer with the same key and state."""
        signer = CheckpointSigner([self.signer], self.state)
        return Sealer(self._connect, self.tables, signer, publisher=self.publisher, batch=batch)

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn, autocommit=True)

    def key(self, table: str = "audit_logs") -> Verifier:
        return self.signer.renamed(f"{NAME}/{table}").verifier

    def seal(self) -> int:
        """Seal what is committed, and have the anchor and the database know; return the leaves of the first table."""
        size = 0
        for table in reversed(self.tables):
            done = self.sealer.seal(table)
            assert done is not None
            size = done.tree.size
        assert self.publisher.settle(10)
        self.sealer.beat()
        return size

    def note(self) -> Note:
        """The newest signed checkpoint in the database."""
        return Note.parse(rows(self.dsn, "SELECT note FROM tracevault_checkpoints ORDER BY size DESC LIMIT 1")[0][0])

    def verify(self, *, anchored: bool = True, grace: float = GRACE, key: bool = True) -> Report:
        table = self.tables[0]
        keys = [str(self.key(table))] if key else []
        trust = trust_of(keys, [str(self.anchor)] if anchored else [], origin=f"{NAME}/{table}")
        with self._connect() as connection:
            return verify(connection, table, trust, grace=grace)

    def close(self) -> None:
        self.publisher.close(5)
        self.sealer.close()


class Sealing:
    """A sealer at work in the background, as pruning and erasing need one."""

    def __init__(self, log: Sealed) -> None:
        self._sealer = log.another()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sealer.run, args=(self._stop, 0.05))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sealer.close()
