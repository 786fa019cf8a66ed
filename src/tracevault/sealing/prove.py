"""Proofs of single events, for whoever cannot or may not look into the database."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from psycopg import Connection

from tracevault.flows.prove import prove_event
from tracevault.integrity.event_proof import EventProof
from tracevault.integrity.note import Note
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run

_PROVING = Place("proving an event")


def prove(
    connection: Connection[Any],
    table: str,
    id_: UUID | str,
    *,
    checkpoint: Note | None = None,
    index: int | None = None,
) -> EventProof:
    """Return the proof that the log of ``table`` holds the event with this id, checked against its checkpoint.

    The checkpoint is the newest stored one that covers the event, rather one with cosignatures of a witness than a
    newer one; or the one that is given, as from an anchor, in whose tree (its epoch) the event is then looked up.
    Signatures are not verified here, where no key is known. ``index`` says which leaf is meant where an id stands
    more than once, as it can in a partitioned table. An erased payload is proven by its commitment.

    Raises `TracevaultError` where there is no such event, `ValidationError` for an id or an index that is none, and
    `SealError` where the event is not sealed or not signed yet, where its row is gone, where the proof would be larger
    than 4,000,000 bytes, and where row, hashes and checkpoint contradict each other: the log was tampered with.
    """
    return run(connection, prove_event(table, id_, checkpoint=checkpoint, index=index), _PROVING)
