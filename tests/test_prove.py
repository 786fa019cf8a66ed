"""Proofs of single events: made of a sealed log, checked without a database, and refused where anything was changed."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

pytest.importorskip("cryptography", reason='needs the extra "seal"')

from tests import sealed as sealed_table
from tests.conftest import rows
from tests.docs.pages import PAGES, blocks
from tracevault import ConfigError, EventProof, ProofError, SealError, Tracevault, TracevaultError, ValidationError
from tracevault import verify_proof as verify_text
from tracevault.flows.prove import UnknownEventError
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.leaf import Statement
from tracevault.integrity.merkle import inclusion_proof, leaf_hash
from tracevault.integrity.note import COSIGNATURE_V1, Note, Signer
from tracevault.integrity.tiles import Growth, tile_reader
from tracevault.sealing.prove import prove

NAME = sealed_table.NAME
TABLE = "audit_logs"
PARTITIONED = """
    ALTER TABLE audit_logs RENAME TO template;
    CREATE TABLE audit_logs (LIKE template INCLUDING DEFAULTS INCLUDING GENERATED, PRIMARY KEY (occurred_at, id))
        PARTITION BY RANGE (occurred_at);
    CREATE TABLE audit_rest PARTITION OF audit_logs DEFAULT;
"""
DATA = {"price": 120, "exact": "1.10", "note": "a\x1b[31m“quoted”"}


class Sealed(sealed_table.Sealed):
    """A database whose audit table is sealed on demand, and whose events are proven."""

    @property
    def vkey(self) -> str:
        return str(self.key())

    def emit(self, count: int = 1, **fields: Any) -> list[UUID]:
        events = [{"event": "order.paid", **fields} for _ in range(count)]
        with Tracevault(connection_string=self.dsn, bootstrap={"ensure_schema": False}) as audit:
            return [receipt.id for receipt in audit.emit_many(events)]

    def prove(self, id_: UUID | str, **options: Any) -> EventProof:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return prove(connection, TABLE, id_, **options)


@pytest.fixture
def sealed(ready_dsn: str, tmp_path: Path) -> Iterator[Sealed]:
    opened = Sealed(ready_dsn, tmp_path)
    yield opened
    opened.close()


# ------------------------------------------------------------------------------------------------------ from a database


def test_an_event_is_proven(sealed: Sealed) -> None:
    sealed.emit(3)
    (id_,) = sealed.emit(
        actor={"id": "ana", "type": "user"}, data=DATA, meta={"ip": "::1"}, tenant_id="acme", trace_id="a" * 32
    )
    sealed.emit(300)
    sealed.seal()
    text = str(sealed.prove(id_))
    proof = verify_text(text, [sealed.vkey])
    assert str(proof) == text
    assert (proof.tree, proof.checkpoint.origin, proof.checkpoint.size) == (TABLE, f"{NAME}/{TABLE}", 304)
    assert proof.index == 3
    assert proof.values["id"] == str(id_)
    assert proof.values["actor_id"] == "ana"
    assert proof.values["tenant_id"] == "acme"
    assert json.loads(proof.values["data"]) == DATA
    # What it says can be read by whoever decodes one line.
    extra = base64.b64decode(text.split("\n")[1].removeprefix("extra ")).decode()
    assert "order.paid" in extra
    assert "“quoted" in extra


def test_every_event_of_a_log_is_proven_by_each_checkpoint(sealed: Sealed) -> None:
    ids, notes = [], []
    for count in (1, 1, 5, 250):
        ids += sealed.emit(count)
        sealed.seal()
        notes.append(sealed.note())
    with psycopg.connect(sealed.dsn, autocommit=True) as connection:
        for id_ in ids[:9] + ids[-3:]:
            assert verify_text(str(prove(connection, TABLE, id_)), [sealed.vkey]).checkpoint.size == 257
            for note in notes:
                size = Checkpoint.parse(note.text).size
                if ids.index(id_) < size:
                    proof = prove(connection, TABLE, str(id_), checkpoint=note)
                    assert verify_text(str(proof), [sealed.vkey]).checkpoint.size == size
                else:
                    with pytest.raises(SealError, match="when it was not there yet"):
                        prove(connection, TABLE, id_, checkpoint=note)


def test_what_has_no_proof(sealed: Sealed) -> None:
    (id_,) = sealed.emit()
    with pytest.raises(SealError, match="never sealed"):
        sealed.prove(id_)
    sealed.seal()
    unknown = uuid4()
    with pytest.raises(UnknownEventError, match=f"there is no event {unknown} in table `audit_logs`") as caught:
        sealed.prove(unknown)
    assert isinstance(caught.value, TracevaultError)
    with pytest.raises(ValidationError, match="`id` must be a UUID"):
        sealed.prove("x")
    (later,) = sealed.emit()
    with pytest.raises(SealError, match=r"stored and not sealed yet: .*tracevault seal --once --table audit_logs"):
        sealed.prove(later)
    sealed.seal()
    rows(sealed.dsn, "DELETE FROM tracevault_checkpoints WHERE size = 2")
    assert sealed.prove(id_).checkpoint.size == 1
    with pytest.raises(SealError, match="no checkpoint that covers it is signed yet"):
        sealed.prove(later)
    rows(sealed.dsn, "ALTER TABLE audit_logs DISABLE TRIGGER USER")
    rows(sealed.dsn, "DELETE FROM audit_logs WHERE id = %s", id_)
    with pytest.raises(SealError, match="its row is gone: it was pruned, or deleted"):
        sealed.prove(id_)


@pytest.mark.parametrize(
    "attack",
    [
        "UPDATE audit_logs SET actor_id = 'eve' WHERE id = %s",
        "UPDATE audit_logs SET occurred_at = occurred_at + interval '1 microsecond' WHERE id = %s",
        "UPDATE audit_logs SET data = '{\"price\": 120.0}' WHERE id = %s",
        "UPDATE audit_logs SET data = NULL WHERE id = %s",
        "UPDATE audit_logs SET payload_salt = NULL WHERE id = %s",
        "UPDATE tracevault_leaves SET index = 300 - index WHERE id IS DISTINCT FROM %s OR true",
        "UPDATE tracevault_tiles SET hashes = set_byte(hashes, 5, get_byte(hashes, 5) # 1) WHERE %s IS NOT NULL",
        "DELETE FROM tracevault_tiles WHERE level = 0 AND %s IS NOT NULL",
        "UPDATE tracevault_checkpoints SET note = replace(note, '/audit_logs', '/audit_log5') WHERE %s IS NOT NULL",
        "UPDATE tracevault_checkpoints SET note = 'x' WHERE %s IS NOT NULL",
        "UPDATE tracevault_trees SET name = 'other' WHERE %s IS NOT NULL",
        "UPDATE tracevault_checkpoints SET size = 10000, note = replace(note, '301', '10000') WHERE %s IS NOT NULL",
    ],
)
def test_of_a_changed_log_no_proof_is_handed_out(attack: str, sealed: Sealed) -> None:
    (id_,) = sealed.emit(data={"price": 120})
    sealed.emit(300)
    sealed.seal()
    verify_text(str(sealed.prove(id_)), [sealed.vkey])
    rows(sealed.dsn, "ALTER TABLE audit_logs DISABLE TRIGGER USER")
    if "300 - index" in attack:
        rows(sealed.dsn, "ALTER TABLE tracevault_leaves DROP CONSTRAINT tracevault_leaves_pkey")
    rows(sealed.dsn, attack, id_)
    with pytest.raises(SealError, match=r"tampered with.*run `tracevault verify --table audit_logs`"):
        sealed.prove(id_)


def test_an_erased_event_is_proven_by_its_commitments(sealed: Sealed) -> None:
    (id_,) = sealed.emit(data=DATA, meta={"ip": "::1"})
    sealed.seal()
    before = sealed.prove(id_)
    (told,) = sealed.emit(event="tracevault.erased", data={"ranges": [[0, 1]]})
    sealed.seal()
    rows(sealed.dsn, "SELECT tracevault_erase('audit_logs', %s, 0, 1)", told)
    proof = verify_text(str(sealed.prove(id_)), [sealed.vkey])
    assert not {"data", "meta", "payload_salt"} & set(proof.values)
    assert len(proof.values["data_commitment"]) == len(proof.values["meta_commitment"]) == 64
    assert proof.statement.leaf == before.statement.leaf
    verify_text(str(before), [sealed.vkey])  # a proof that is out stays one


def test_a_row_without_payloads_says_nothing_that_is_not_sealed(sealed: Sealed) -> None:
    (id_,) = sealed.emit()
    sealed.seal()
    assert "payload_salt" not in verify_text(str(sealed.prove(id_)), [sealed.vkey]).values


def test_times_that_python_has_no_date_for(sealed: Sealed) -> None:
    id_ = uuid4()
    rows(
        sealed.dsn,
        "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (%s, 'x', 'sync', 'infinity')",
        id_,
    )
    sealed.seal()
    assert verify_text(str(sealed.prove(id_)), [sealed.vkey]).values["occurred_at"] == 2**63 - 1


def test_an_id_that_stands_twice_is_asked_for_by_its_leaf(sealed: Sealed) -> None:
    rows(sealed.dsn, PARTITIONED)
    id_ = uuid4()
    for day in (1, 2):
        rows(
            sealed.dsn,
            "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (%s, 'x', 'sync', %s)",
            id_,
            f"2026-01-0{day}T00:00Z",
        )
    sealed.seal()
    with pytest.raises(ValidationError, match=r"2 events of table `audit_logs` have the id .* `index` .*, 0, 1"):
        sealed.prove(id_)
    for index in (0, 1):
        proof = verify_text(str(sealed.prove(id_, index=index)), [sealed.vkey])
        assert proof.values["occurred_at"] == f"2026-01-0{index + 1}T00:00:00.000Z"
    with pytest.raises(ValidationError, match="is not leaf 2, but 0, 1"):
        sealed.prove(id_, index=2)


def test_an_event_larger_than_a_proof(sealed: Sealed) -> None:
    id_ = uuid4()
    rows(
        sealed.dsn,
        "INSERT INTO audit_logs (id, event, mode, occurred_at, data) "
        "VALUES (%s, 'x', 'sync', now(), jsonb_build_object('text', repeat('x', 3100000)))",
        id_,
    )
    sealed.seal()
    with pytest.raises(SealError, match="does not fit into a proof: the proof has more than 4000000 bytes"):
        sealed.prove(id_)


def test_cosignatures_of_witnesses_go_into_the_proof(sealed: Sealed) -> None:
    (id_,) = sealed.emit()
    sealed.seal()
    witness = Signer.generate("witness.example.org/w1", COSIGNATURE_V1)
    cosignature = witness.sign(sealed.note().text, time=1_790_000_000)
    rows(
        sealed.dsn,
        "INSERT INTO tracevault_anchors (tree, sink, size, receipt) VALUES (1, 'https://w', 1, %s), (1, 'f', 1, 'ok'), "
        "(1, 'https://x', 1, '— garbage')",
        str(cosignature),
    )
    sealed.emit()
    sealed.seal()  # a newer checkpoint, which no witness has seen yet
    proof = sealed.prove(id_)
    assert proof.checkpoint.size == 1
    trusted = [sealed.signer.renamed(f"{NAME}/{TABLE}").verifier, witness.verifier]
    proof.verify(trusted)
    ours, theirs = proof.signed_by(trusted)
    assert (ours.key, ours.at) == (trusted[0], None)
    assert theirs.key == witness.verifier
    assert theirs.at is not None
    assert theirs.at.timestamp() == 1_790_000_000
    with pytest.raises(ProofError, match="not signed by a known key of its log"):
        verify_text(str(proof), [str(witness.verifier)])


def test_a_checkpoint_of_another_log_or_epoch(sealed: Sealed) -> None:
    (id_,) = sealed.emit()
    sealed.seal()
    first = sealed.note()
    sealed.sealer.new_epoch(TABLE)
    sealed.seal()
    second = str(sealed.signer.renamed(f"{NAME}/{TABLE}/2").verifier)
    assert verify_text(str(sealed.prove(id_)), [second]).checkpoint.origin == f"{NAME}/{TABLE}/2"
    assert verify_text(str(sealed.prove(id_, checkpoint=first)), [sealed.vkey]).checkpoint.origin == f"{NAME}/{TABLE}"
    text = str(Checkpoint("log.example.com/other/audit_logs", 1, bytes(32)))
    strange = Note(text, [sealed.signer.renamed("log.example.com/other/audit_logs").sign(text)])
    with pytest.raises(SealError, match=r"the checkpoint is of 'log\.example\.com/other/audit_logs', and the log of"):
        sealed.prove(id_, checkpoint=strange)


# --------------------------------------------------------------------------------------------------- without a database

SIGNER = Signer("log.example.com/shop/audit_logs", bytes(range(32)))
VKEY = str(SIGNER.verifier)
VALUES = {
    "id": "01930000-0000-7000-8000-00000000000a",
    "occurred_at": "2026-01-01T00:00:00.000Z",
    "created_at": "2026-01-01T00:00:00.000001Z",
    "event": "order.paid",
    "actor_id": "añą",
    "mode": "sync",
    "payload_salt": "00112233-4455-6677-8899-aabbccddeeff",
    "data": '{"a": 1.10}',
    "meta_commitment": "ab" * 32,
}


def file_of(values: Mapping[str, Any], index: int = 2, size: int = 7, *, tree: str = TABLE, signer: Signer = SIGNER,
            hashed: Mapping[str, Any] | None = None) -> str:  # fmt: skip
    """Return a proof that a log of ``size`` holds ``hashed`` (by default ``values``) as leaf ``index``."""
    statement = Statement(tree, values)
    own = leaf_hash(Statement(tree, values if hashed is None else hashed).leaf)
    growth = Growth()
    growth.add(own if place == index else leaf_hash(b"%d" % place) for place in range(size))
    tiles = {(level, number): hashes for level, number, hashes in growth.changes()}
    text = str(Checkpoint(signer.name, size, growth.root))
    note = Note(text, [signer.sign(text)])
    hashes = inclusion_proof(index, size, tile_reader(lambda _wanted: tiles, size))
    return str(EventProof.make(statement, index, hashes, note))


def with_extra(text: str, extra: bytes) -> str:
    lines = text.split("\n")
    lines[1] = f"extra {base64.b64encode(extra).decode()}"
    return "\n".join(lines)


def test_a_proof_says_what_it_proves() -> None:
    proof = verify_text(file_of(VALUES), [VKEY])
    assert proof.values == VALUES
    assert proof.verify([SIGNER.verifier]) == proof.checkpoint
    assert (proof.index, proof.checkpoint.size) == (2, 7)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in VALUES),
        {"id": "01930000-0000-7000-8000-000000000002"},
        {"occurred_at": "2026-01-01T00:00:00.001Z"},
        {"event": "order.refunded"},
        {"actor_id": "anab"},
        {"tenant_id": ""},
        {"data": '{"a": 1.1}'},
        {"data": '{"a":1.10}'},
        {"meta_commitment": "ab" * 31 + "ac"},
        {"meta": "{}"},
    ],
    ids=str,
)
def test_no_other_event_is_proven(changes: dict[str, Any]) -> None:
    values = {name: value for name, value in {**VALUES, **changes}.items() if value is not None}
    text = file_of(values, hashed=VALUES)
    with pytest.raises(ProofError):
        verify_text(text, [VKEY])


@pytest.mark.parametrize(
    "changes",
    [
        {"id": VALUES["id"].upper()},
        {"id": "{" + str(VALUES["id"]) + "}"},
        {"occurred_at": "2026-01-01T01:00:00.000+01:00"},
        {"occurred_at": "2026-01-01T00:00:00.0000009Z"},
        {"occurred_at": "2026-01-01"},
        {"occurred_at": 820_540_800_000_000},
        {"occurred_at": True},
        {"meta_commitment": "AB" * 32},
        {"meta_commitment": "a b" + "ab" * 30 + "c"},
        {"meta_commitment": None},
        {"actor_id": None},
        {"outcome": "success"},
        {"payload_salt": VALUES["payload_salt"].upper()},
    ],
    ids=str,
)
def test_each_value_has_one_spelling(changes: dict[str, Any]) -> None:
    values = {**VALUES, **changes}
    with pytest.raises(ProofError):
        verify_text(with_extra(file_of(VALUES), document(values)), [VKEY])


def test_a_salt_without_a_payload_is_nothing_that_was_sealed() -> None:
    values = {name: value for name, value in VALUES.items() if name not in ("data", "payload_salt")}
    verify_text(file_of(values), [VKEY])
    with pytest.raises(ProofError, match="payload_salt"):
        verify_text(file_of({**values, "payload_salt": VALUES["payload_salt"]}, hashed=values), [VKEY])


def document(values: Any, **changes: Any) -> bytes:
    return json.dumps({"format": "tracevault/events/v1", "tree": TABLE, "event": values, **changes}).encode()


@pytest.mark.parametrize(
    "extra",
    [
        b"order.paid",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        document(VALUES, format="tracevault/events/v2"),
        document(VALUES, tree=None),
        document(["order.paid"]),
        document(VALUES).replace(b'"mode"', b'"event": "order.refunded", "mode"'),
    ],
    ids=lambda extra: extra[:30].decode(errors="replace"),
)
def test_what_is_no_event(extra: bytes) -> None:
    with pytest.raises(ProofError, match="extra"):
        EventProof.parse(with_extra(file_of(VALUES), extra))


def test_a_tlog_proof_without_an_event() -> None:
    lines = file_of(VALUES).split("\n")
    with pytest.raises(ProofError, match="does not say what the event is"):
        EventProof.parse("\n".join([lines[0], *lines[2:]]))


def test_no_byte_of_a_proof_can_be_changed() -> None:
    text = file_of(VALUES)
    accepted = []
    for place, character in enumerate(text):
        changed = text[:place] + ("B" if character != "B" else "C") + text[place + 1 :]
        try:
            proof = verify_text(changed, [VKEY])
        except ProofError:
            continue
        accepted.append(changed)
        assert proof.values == VALUES  # spaces between JSON's tokens at most
    assert not accepted


@pytest.mark.parametrize(
    ("origin", "tree", "good"),
    [
        ("log.example.com/shop/audit_logs", "audit_logs", True),
        ("log.example.com/shop/audit_logs/2", "audit_logs", True),
        ("log.example.com/shop/audit_logs/2/3", "audit_logs", False),
        ("log.example.com/shop/audit_logs/02", "audit_logs", False),
        ("log.example.com/shop/audit_logs", "udit_logs", False),
        ("log.example.com/shop/audit_logs", "shop", False),
        ("log.example.com/shop/audit_logs", "", False),
        ("audit_logs", "audit_logs", False),
        ("log.example.com/shop/audit-logs", "audit.logs", False),
    ],
)
def test_the_log_is_the_one_of_the_tree(origin: str, tree: str, good: bool) -> None:
    signer = Signer(origin, bytes(32))
    text = file_of(VALUES, tree=tree, signer=signer)
    if good:
        assert verify_text(text, [str(signer.verifier)]).tree == tree
    else:
        with pytest.raises(ProofError, match="the event is one of the tree"):
            verify_text(text, [str(signer.verifier)])


def test_whose_keys_are_believed() -> None:
    text = file_of(VALUES)
    other = Signer(SIGNER.name, bytes(32)).verifier
    with pytest.raises(ProofError, match="not signed by a known key"):
        verify_text(text, [str(other)])
    verify_text(text, [str(other), VKEY])
    verify_text(text, [f"{VKEY}@7"])
    with pytest.raises(ProofError, match="not signed by a known key"):
        verify_text(text, [f"{VKEY}@6"])
    for wrong in ([], VKEY, ["x"], [VKEY[:-4] + "AAA="]):
        with pytest.raises(ConfigError) as caught:
            verify_text(text, wrong)
        assert caught.value.field == "keys"


# -------------------------------------------------------------------------------------------- somebody else's program


@pytest.fixture(scope="module")
def check_proof() -> Callable[[str, str], Any]:
    """The program of the documentation, which knows nothing of tracevault."""
    (program,) = (block for page in PAGES for block in blocks(page) if "def check_proof" in block.text)
    assert "tracevault" not in "".join(line for line in program.text.splitlines() if "import" in line)
    namespace: dict[str, Any] = {"__name__": "check_proof"}
    exec(compile(program.text, str(program), "exec"), namespace)
    check: Callable[[str, str], Any] = namespace["check_proof"]
    return check


def places(size: int) -> Iterator[int]:
    yield from sorted({0, 1, size // 3, size // 2, 255, 256, size - 2, size - 1} & set(range(size)))


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 1000, 70_000])
def test_the_documented_program_accepts_what_we_prove(check_proof: Callable[[str, str], Any], size: int) -> None:
    for index in places(size):
        text = file_of(VALUES, index, size)
        verify_text(text, [VKEY])
        assert check_proof(text, VKEY)["event"] == VALUES


def test_the_documented_program_refuses_what_we_refuse(check_proof: Callable[[str, str], Any]) -> None:
    text = file_of(VALUES, 5, 300)
    values = {**VALUES, "actor_id": "eve"}
    changed = [
        with_extra(text, document(values)),
        text.replace("index 5", "index 6"),
        text.replace("\n300\n", "\n301\n"),
        file_of(VALUES, 5, 300, signer=Signer(SIGNER.name, bytes(32))),
    ]
    for one in changed:
        assert one != text
        with pytest.raises(ProofError):
            verify_text(one, [VKEY])
        with pytest.raises(Exception, match=r".*"):  # it has no errors of its own
            check_proof(one, VKEY)


def test_the_documented_program_reads_a_proof_of_a_database(
    check_proof: Callable[[str, str], Any], sealed: Sealed
) -> None:
    (id_,) = sealed.emit(data=DATA, meta={"ip": "::1"}, actor={"id": "ana", "type": "user"}, span_id="b" * 16)
    sealed.seal()
    assert check_proof(str(sealed.prove(id_)), sealed.vkey)["event"]["id"] == str(id_)
