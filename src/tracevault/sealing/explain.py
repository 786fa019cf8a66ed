"""What became of rows that are not as they were sealed, and of leaves that are listed no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar
from uuid import UUID

from psycopg import Connection

from tracevault.flows import Flow
from tracevault.flows.seal import Tree
from tracevault.flows.verify import Leafless, leafless, row_count, rows_by_id_sql, stream
from tracevault.integrity.leaf import Encoder
from tracevault.integrity.report import MOST_PROBLEMS, Problem, Report
from tracevault.postgres.failures import Place
from tracevault.postgres.run import raw_rows, run
from tracevault.sealing.findings import Findings

T = TypeVar("T")


class Explanation:
    """Tells a report what the findings about all rows mean."""

    def __init__(self, connection: Connection[Any], tree: Tree, report: Report, found: Findings, place: Place) -> None:
        self._connection = connection
        self._tree = tree
        self._report = report
        self._found = found
        self._place = place

    def tell(self, *, everywhere: bool) -> None:
        """Say what became of the rows that are not as they were sealed, and look for rows without a leaf."""
        by_hash = {bad.stored: bad for bad in self._found.changed}
        for bad in self._found.changed:
            other = by_hash.get(bad.computed)
            if other is not None:
                detail = f"its row was sealed as leaf {other.index:,}: leaves were exchanged"
                self._add("moved", detail, bad.index, bad.id)
            else:
                self._add("changed", "its row is not what was sealed", bad.index, bad.id)
        self._report.problems_left_out += self._found.left_out
        self._report.unsealed, oldest, count, suspects = self._leafless(everywhere=everywhere)
        self._report.oldest_unsealed_seconds = round(oldest, 3)
        self._tell_of(suspects)
        self._report.problems_left_out += count - len(suspects)
        for index in self._found.unlisted.values():
            detail = "its leaf is gone from the list of leaves, and no row that was sealed as it is left"
            self._add("leaf", detail, index)

    def _leafless(self, *, everywhere: bool) -> tuple[int, float, int, list[Leafless]]:
        """Return what `flows.verify.leafless` does; ``everywhere``, but only if there is something to find there."""
        tree = self._tree
        if tree.same_system and not tree.walking:
            self._run(stream(True))  # those of late come from an index
            recent = self._run(leafless(tree, MOST_PROBLEMS, everywhere=False))
            self._run(stream(False))
            waiting, _oldest, suspicious, _suspects = recent
            if not everywhere or self._run(row_count(tree)) == self._found.with_leaf + waiting + suspicious:
                return recent
        return self._run(leafless(tree, MOST_PROBLEMS, everywhere=everywhere))

    def _tell_of(self, suspects: Sequence[Leafless]) -> None:
        hashes = self._hashes_of([suspect.id for suspect in suspects])
        for id_, state in suspects:
            unlisted = self._found.unlisted.pop(hashes.get(id_, b""), None)
            if unlisted is not None:
                self._add(
                    "leaf", "its leaf is gone from the list of leaves; its row is as it was sealed", unlisted, id_
                )
            elif id_ in self._found.gone:
                self._add("changed", "its row has another `occurred_at` than was sealed", self._found.gone[id_], id_)
            else:
                self._add("inserted", f"a row without a leaf {state}: it was put in behind the log's back", None, id_)

    def _hashes_of(self, ids: Sequence[UUID]) -> Mapping[UUID, bytes]:
        if not ids or not self._found.unlisted:
            return {}
        hash_of = Encoder(self._tree.name).hash
        rows = raw_rows(self._connection, rows_by_id_sql(self._tree, ids), self._place)
        return {UUID(bytes=id_): hash_of(fields) for id_, *fields in rows}

    def _run(self, flow: Flow[T]) -> T:
        return run(self._connection, flow, self._place)

    def _add(self, kind: str, detail: str, index: int | None = None, id_: UUID | None = None) -> None:
        self._report.add(Problem(kind, detail, index, id_))
