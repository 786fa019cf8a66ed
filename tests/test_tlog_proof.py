"""Proof files: one leaf, its way to the root, and the checkpoint that vouches for it."""

from __future__ import annotations

from base64 import b64decode, b64encode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_properties import PROFILE
from tests.trees import hashes_of, leaves, vectors
from tracevault import ProofError
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.merkle import leaf_hash
from tracevault.integrity.note import COSIGNATURE_V1, Note, Signer, Verifier
from tracevault.integrity.proof import TlogProof

PURE = settings(max_examples=150, **PROFILE)
EXAMPLE = vectors("tracevault_example_bundle")
KEYS = [Verifier.parse(EXAMPLE["vkey"]), Verifier.parse(EXAMPLE["cosig_vkey"])]
NOTE = EXAMPLE["checkpoints"][-1]
RECORD = EXAMPLE["records"][3]
LINES = "".join(f"{line}\n" for line in RECORD["proof"])
FILE = f"c2sp.org/tlog-proof@v1\nindex {RECORD['index']}\n{LINES}\n{NOTE}"
LEAF = leaf_hash(b64decode(RECORD["leaf_data_b64"]))


def test_a_proof_of_each_record_of_the_example_log_is_written_read_and_verified() -> None:
    for record in EXAMPLE["records"]:
        proof = TlogProof(record["index"], hashes_of(record["proof"]), Note.parse(NOTE), b"\x00any bytes")
        leaf = leaf_hash(b64decode(record["leaf_data_b64"]))
        assert TlogProof.parse(str(proof)) == proof
        checkpoint = proof.verify(leaf, KEYS)
        assert (checkpoint.origin, checkpoint.size) == (EXAMPLE["origin"], record["size"])
        with pytest.raises(ProofError, match="leads to another root"):
            proof.verify(leaf_hash(b"another"), KEYS)


def test_the_file_is_that_of_the_specification() -> None:
    proof = TlogProof.parse(FILE)
    assert str(proof) == FILE
    assert proof.extra is None
    extra = FILE.replace("index", "extra AAEC\nindex")
    assert TlogProof.parse(extra).extra == b"\x00\x01\x02"
    assert str(TlogProof.parse(extra)) == extra


def test_a_tree_of_one_leaf_has_a_proof_without_hashes() -> None:
    (leaf,) = leaves(1)
    proof = TlogProof.parse(f"c2sp.org/tlog-proof@v1\nindex 0\n\n{EXAMPLE['checkpoints'][0]}")
    assert proof.verify(leaf, KEYS) == Checkpoint(EXAMPLE["origin"], 1, leaf)


@PURE
@given(st.data())
def test_no_byte_of_a_proof_can_be_changed(data: st.DataObject) -> None:
    encoded = bytearray(FILE.encode())
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]))
    try:
        proof = TlogProof.parse(encoded.decode("utf-8", "surrogateescape"))
        proof.verify(LEAF, KEYS)
    except ProofError:
        return
    # The name or key id of a signature that is not needed: it became a stranger's, which is passed over.
    assert (proof.index, proof.hashes) == (RECORD["index"], tuple(hashes_of(RECORD["proof"])))
    assert proof.checkpoint.verified_by(KEYS) == KEYS[:1]


def test_a_proof_needs_the_signature_of_the_log_itself() -> None:
    proof = TlogProof.parse(FILE)
    assert proof.verify(LEAF, KEYS[:1])
    for keys in ([], KEYS[1:], [Signer.generate(EXAMPLE["origin"]).verifier]):
        with pytest.raises(ProofError, match="not signed by a known key of its log"):
            proof.verify(LEAF, keys)
    # Neither does the key of another log do, nor a cosignature by a key with the log's name.
    for name, algorithm in (("log.example/other", 1), (EXAMPLE["origin"], COSIGNATURE_V1)):
        signer, text = Signer.generate(name, algorithm), proof.checkpoint.text
        signed = Note(text, [signer.sign(text, time=1 if algorithm == COSIGNATURE_V1 else None)])
        with pytest.raises(ProofError, match="not signed by a known key of its log"):
            TlogProof(proof.index, proof.hashes, signed).verify(LEAF, [signer.verifier])


@pytest.mark.parametrize(
    "proof",
    [
        "",
        NOTE,
        FILE.replace("@v1", "@v2"),
        "\n" + FILE,
        FILE.replace("index 256", "index 0256"),
        FILE.replace("index 256", "index -1"),
        FILE.replace("index 256", f"index {2**63}"),
        FILE.replace("index 256", "index  256"),
        FILE.replace("index 256", "Index 256"),
        FILE.replace("index 256\n", ""),
        FILE.replace("index 256\n", "index 256\nindex 256\n"),
        FILE.replace("index", "extra \nindex"),
        FILE.replace("index", "extra AA\nindex"),
        FILE.replace("index", "extra AB==\nindex"),
        FILE.replace("index", "extra AA==\nextra AA==\nindex"),
        FILE.replace("index 256\n", "index 256\nextra AA==\n"),
        FILE.replace("index 256\n", "index 256\n\n"),
        FILE.replace("index 256\n", f"index 256\n{b64encode(bytes(31)).decode()}\n"),
        FILE.replace("index 256\n", "index 256\n" + f"{RECORD['proof'][0]}\n" * 60),
        FILE.replace("=\n", "=\r\n", 1),
        FILE.replace("=\n", "\n", 1),
        FILE.partition("\n\n")[0] + "\n\n",
        FILE.partition("\n\n")[0] + "\n",
        FILE + "\n",
        FILE.replace("index", f"extra {'A' * 4_000_000}\nindex"),
    ],
)
def test_what_is_not_exactly_a_proof_is_refused(proof: str) -> None:
    with pytest.raises(ProofError):
        TlogProof.parse(proof)


@pytest.mark.parametrize(
    ("index", "hashes", "extra"),
    [(-1, [], None), (2**63, [], None), (0, [bytes(31)], None), (0, [bytes(32)] * 64, None), (0, [], b"")],
)
def test_a_proof_that_could_not_be_read_again_is_not_made(index: int, hashes: list[bytes], extra: bytes | None) -> None:
    with pytest.raises(ProofError):
        TlogProof(index, hashes, Note.parse(NOTE), extra)


def test_a_hash_too_many_or_too_few_is_refused() -> None:
    proof = TlogProof.parse(FILE)
    for hashes in (proof.hashes[1:], proof.hashes[:-1], [*proof.hashes, LEAF], [LEAF, *proof.hashes]):
        with pytest.raises(ProofError):
            TlogProof(proof.index, hashes, proof.checkpoint).verify(LEAF, KEYS)
