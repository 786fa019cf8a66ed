"""How one event is proven: its row, its leaf, and the hashes between the leaf and a signed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from tracevault.errors import ProofError, SealError, TracevaultError, ValidationError
from tracevault.events.record import BY_NAME, PAYLOAD_SALT
from tracevault.events.rules import uuid
from tracevault.flows import Flow, Query, Result
from tracevault.flows.seal import read_tiles, tables_exist
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.event_proof import EventProof
from tracevault.integrity.leaf import PAYLOADS, READ, Statement, statement_of
from tracevault.integrity.merkle import inclusion_proof, leaf_hash, verify_inclusion
from tracevault.integrity.note import Note, Signature
from tracevault.integrity.tiles import tile_reader
from tracevault.schema.trees import ANCHORS, CHECKPOINTS, ERASURES, LEAVES, TREES

_FULL_TILE = bytes(8192)
# The fields of `READ`, each in the bytes of its binary format.
_AS_BYTES = {"uuid": "uuid_send(r.{})", "timestamp with time zone": "timestamptz_send(r.{})"}
_COLUMNS = ", ".join(
    _AS_BYTES.get(BY_NAME[name].column.sql_type, "convert_to(r.{}::text, 'UTF8')").format(name)
    for name in (read.removesuffix("::text") for read in READ)
)


class UnknownEventError(TracevaultError):
    """There is no event with this id in the table."""


@dataclass(frozen=True)
class _Tree:
    number: int
    name: str
    origin: str
    partitioned: bool


def prove_event(
    table: str, id_: UUID | str, *, checkpoint: Note | None = None, index: int | None = None
) -> Flow[EventProof]:
    """Check the id, and return the flow that proves its event; see `sealing.prove.prove`."""
    return _prove(table, uuid(id_, "id"), checkpoint, index)


def _prove(table: str, id_: UUID, given: Note | None, index: int | None) -> Flow[EventProof]:
    tree = yield from _tree(table, given)
    leaf = yield from _leaf(table, tree, id_, index)
    statement = yield from _statement(table, tree, id_, leaf)
    note = given or (yield from _checkpoint(table, tree, leaf))
    try:
        checkpoint = Checkpoint.parse(note.text)
        if checkpoint.origin != tree.origin:
            raise ProofError(f"the checkpoint is of {checkpoint.origin[:64]!r}")
        if leaf >= checkpoint.size:
            raise SealError(
                f"event {id_} is leaf {leaf:,}, and the checkpoint is of a log of {checkpoint.size:,} leaves, when it "
                "was not there yet: give a later one"
            )
        hashes = yield from _hashes(tree, leaf, checkpoint.size)
        verify_inclusion(leaf, checkpoint.size, leaf_hash(statement.leaf), hashes, checkpoint.root)
    except ProofError as error:
        raise SealError(
            f"event {id_} cannot be proven: the row of leaf {leaf:,} of table `{table}`, the hashes or the checkpoint "
            f"are not what was sealed, so the log was tampered with ({error}); run `tracevault verify --table {table}`"
        ) from None
    proof = EventProof.make(statement, leaf, hashes, note)
    try:
        EventProof.parse(str(proof))
    except ProofError as error:
        raise SealError(f"event {id_} is in the log, and does not fit into a proof: {error}") from None
    return proof


def _tree(table: str, given: Note | None) -> Flow[_Tree]:
    """Return the tree that the given checkpoint is of, else the present one."""
    rows: Sequence[tuple[Any, ...]] = ()
    if (yield from tables_exist()):
        found = yield Query(
            "SELECT t.tree, t.name, t.origin, coalesce((SELECT c.relkind = 'p' FROM pg_class AS c "
            "WHERE c.oid = to_regclass(quote_ident(t.table_name))), false) "
            f"FROM {TREES} AS t WHERE t.table_name = $1 ORDER BY t.epoch DESC",
            (table,),
        )
        rows = found.rows
    if not rows:
        raise SealError(f"table `{table}` was never sealed: `tracevault seal --table {table}` begins that")
    trees = [_Tree(*row) for row in rows]
    if given is None:
        return trees[0]
    origin = given.text.partition("\n")[0]
    for tree in trees:
        if tree.origin == origin:
            return tree
    raise SealError(f"the checkpoint is of {origin[:64]!r}, and the log of table `{table}` is {trees[0].origin!r}")


def _leaf(table: str, tree: _Tree, id_: UUID, index: int | None) -> Flow[int]:
    found = yield Query(f"SELECT index FROM {LEAVES} WHERE tree = $1 AND id = $2 ORDER BY index", (tree.number, id_))
    leaves = [leaf for (leaf,) in found.rows]
    if not leaves:
        stored = yield Query(f'SELECT EXISTS (SELECT FROM "{table}" WHERE id = $1)', (id_,))
        if stored.rows[0][0]:
            raise SealError(
                f"event {id_} is stored and not sealed yet: wait for the sealer, or run `tracevault seal --once "
                f"--table {table}`"
            )
        raise UnknownEventError(f"there is no event {id_} in table `{table}`")
    if index is not None:
        if index not in leaves:
            raise ValidationError(f"event {id_} is not leaf {index}, but {_listed(leaves)}", field="index")
        return index
    if len(leaves) > 1:  # in a partitioned table an id can stand once at each time
        raise ValidationError(
            f"{len(leaves)} events of table `{table}` have the id {id_}: say by `index` which leaf to prove, "
            f"{_listed(leaves)}",
            field="index",
        )
    return int(leaves[0])


def _listed(leaves: Sequence[int]) -> str:
    return ", ".join(map(str, leaves[:10])) + (" ..." if len(leaves) > 10 else "")


def _statement(table: str, tree: _Tree, id_: UUID, leaf: int) -> Flow[Statement]:
    """Return what the row says now, with commitments for payloads that were erased."""
    time = " AND r.occurred_at = l.occurred_at" if tree.partitioned else ""
    found = yield Query(
        f'SELECT e.data_commitment, e.meta_commitment, {_COLUMNS} FROM {LEAVES} AS l JOIN "{table}" AS r '
        f"ON r.id = l.id{time} LEFT JOIN {ERASURES} AS e ON e.tree = l.tree AND e.index = l.index "
        "WHERE l.tree = $1 AND l.index = $2",
        (tree.number, leaf),
    )
    if not found.rows:
        raise SealError(
            f"event {id_} was sealed as leaf {leaf:,}, and its row is gone: it was pruned, or deleted; `tracevault "
            f"verify --table {table}` says which"
        )
    data, meta, *fields = found.rows[0]
    statement = statement_of(tree.name, fields, (data, meta))
    if not any(name in statement.values for name in PAYLOADS):
        statement.values.pop(PAYLOAD_SALT, None)  # each row has one, and where it salts nothing the leaf is without it
    return statement


def _checkpoint(table: str, tree: _Tree, leaf: int) -> Flow[Note]:
    """Return the newest checkpoint that covers the leaf and has cosignatures of a witness, else the newest of all."""
    receipts = yield Query(
        f"SELECT size, receipt FROM {ANCHORS} WHERE tree = $1 AND size > $2 AND receipt LIKE '— %' "
        "ORDER BY size DESC LIMIT 100",
        (tree.number, leaf),
    )
    found = Result([], 0)
    if receipts.rows:
        witnessed = receipts.rows[0][0]
        found = yield Query(
            f"SELECT size, note FROM {CHECKPOINTS} WHERE tree = $1 AND size = $2", (tree.number, witnessed)
        )
    if not found.rows:
        found = yield Query(
            f"SELECT size, note FROM {CHECKPOINTS} WHERE tree = $1 AND size > $2 ORDER BY size DESC LIMIT 1",
            (tree.number, leaf),
        )
    if not found.rows:
        raise SealError(
            f"leaf {leaf:,} of table `{table}` is sealed, and no checkpoint that covers it is signed yet: wait for the "
            f"sealer, or run `tracevault seal --once --table {table}`"
        )
    size, text = found.rows[0]
    lines = [line for at, receipt in receipts.rows if at == size for line in receipt.splitlines()]
    try:
        return Note.parse(text).with_signatures(_signatures(lines))
    except ProofError as error:
        raise SealError(
            f"the stored checkpoint of size {size:,} was tampered with ({error}); "
            f"run `tracevault verify --table {table}`"
        ) from None


def _signatures(lines: Sequence[str]) -> list[Signature]:
    """Return the signatures that lines hold. What is none proves nothing, and takes nothing away either."""
    found = []
    for line in lines:
        try:
            found.append(Signature.parse(line))
        except ProofError:
            continue
    return found


def _hashes(tree: _Tree, leaf: int, size: int) -> Flow[list[bytes]]:
    """Return the inclusion proof. It is made twice: the first time to learn which tiles it takes."""
    wanted: list[tuple[int, int]] = []

    def note(tiles: Sequence[tuple[int, int]]) -> Mapping[tuple[int, int], bytes]:
        wanted.extend(tiles)
        return dict.fromkeys(tiles, _FULL_TILE)

    inclusion_proof(leaf, size, tile_reader(note, size))
    found = yield from read_tiles(tree.number, wanted)
    return inclusion_proof(leaf, size, tile_reader(lambda _tiles: found, size))
