"""Roots and proofs: against other people's vectors, and against the definition of the RFC."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_properties import PROFILE
from tests.trees import fetcher, hashes_of, leaves, naive_root, vectors
from tracevault import ProofError
from tracevault.integrity.merkle import (
    EMPTY_ROOT,
    HashReader,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    tree_root,
    verify_consistency,
    verify_inclusion,
)
from tracevault.integrity.tiles import Growth, tile_reader

PURE = settings(max_examples=60, **PROFILE)
EIGHT = vectors("rfc6962_8leaf")
OTHERS = vectors("merkle_proofs_transparency_dev")
EXAMPLE = vectors("tracevault_example_bundle")
LEAVES = leaves(1200)
SIZES = st.integers(1, len(LEAVES)) | st.sampled_from([1, 2, 255, 256, 257, 511, 512, 513, 1024])


def reader(size: int) -> HashReader:
    growth = Growth()
    growth.add(LEAVES[:size])
    return tile_reader(fetcher({(level, number): hashes for level, number, hashes in growth.changes()}), size)


def named(cases: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(case, id=case["file"]) for case in cases]


# Vectors


def test_the_eight_leaves_of_the_rfc_have_their_hashes_and_roots() -> None:
    hashes = [leaf_hash(bytes.fromhex(data)) for data in EIGHT["leaf_inputs_hex"]]
    assert [value.hex() for value in hashes] == EIGHT["leaf_hashes_hex"]
    roots = []
    for size in range(9):
        growth = Growth()
        growth.add(hashes[:size])
        roots.append(growth.root.hex())
    assert roots == EIGHT["roots_hex"]
    assert EMPTY_ROOT.hex() == EIGHT["roots_hex"][0]


@pytest.mark.parametrize("case", named(OTHERS["inclusion"]))
def test_inclusion_proofs_of_transparency_dev(case: dict[str, Any]) -> None:
    given_proof = (
        case["leafIdx"],
        case["treeSize"],
        b64decode(case["leafHash"]),
        hashes_of(case["proof"]),
        b64decode(case["root"]),
    )
    if case["wantErr"]:
        with pytest.raises(ProofError):
            verify_inclusion(*given_proof)
    else:
        verify_inclusion(*given_proof)


@pytest.mark.parametrize("case", named(OTHERS["consistency"]))
def test_consistency_proofs_of_transparency_dev(case: dict[str, Any]) -> None:
    given_proof = (
        case["size1"],
        case["size2"],
        b64decode(case["root1"]),
        b64decode(case["root2"]),
        hashes_of(case["proof"]),
    )
    if case["wantErr"]:
        with pytest.raises(ProofError):
            verify_consistency(*given_proof)
    else:
        verify_consistency(*given_proof)


def example_root(size: int) -> bytes:
    return naive_root(LEAVES[:size])


def test_the_proofs_of_the_example_log_are_ours() -> None:
    for record in EXAMPLE["records"]:
        index, size = record["index"], record["size"]
        assert leaf_hash(b64decode(record["leaf_data_b64"])) == LEAVES[index]
        proof = inclusion_proof(index, size, reader(size))
        assert proof == hashes_of(record["proof"])
        verify_inclusion(index, size, LEAVES[index], proof, example_root(size))
    for step in EXAMPLE["consistency"]:
        old, new = step["old"], step["new"]
        proof = consistency_proof(old, new, reader(new))
        assert proof == hashes_of(step["proof"])
        verify_consistency(old, new, example_root(old), example_root(new), proof)


# Against the definition


@PURE
@given(SIZES, st.data())
def test_any_proof_verifies_against_the_root_as_the_rfc_defines_it(size: int, data: st.DataObject) -> None:
    read, root = reader(size), naive_root(LEAVES[:size])
    assert tree_root(size, read) == root
    index = data.draw(st.integers(0, size - 1))
    verify_inclusion(index, size, LEAVES[index], inclusion_proof(index, size, read), root)
    old = data.draw(st.integers(1, size))
    verify_consistency(old, size, naive_root(LEAVES[:old]), root, consistency_proof(old, size, read))


def test_every_proof_of_every_small_tree_verifies() -> None:
    roots = [naive_root(LEAVES[:size]) for size in range(35)]
    for size in range(1, 35):
        read = reader(size)
        for place in range(size):
            proof = inclusion_proof(place, size, read)
            verify_inclusion(place, size, LEAVES[place], proof, roots[size])
            # And for no other place of the same tree.
            for other in range(size):
                if other != place:
                    with pytest.raises(ProofError):
                        verify_inclusion(other, size, LEAVES[place], proof, roots[size])
            proof = consistency_proof(place + 1, size, read)
            verify_consistency(place + 1, size, roots[place + 1], roots[size], proof)


@PURE
@given(st.integers(2, len(LEAVES)), st.data())
def test_a_changed_byte_is_refused_wherever_it_is(size: int, data: st.DataObject) -> None:
    read, root = reader(size), naive_root(LEAVES[:size])
    index, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size - 1))
    inclusion = [LEAVES[index], root, *inclusion_proof(index, size, read)]
    consistency = [naive_root(LEAVES[:old]), root, *consistency_proof(old, size, read)]
    for hashes in (inclusion, consistency):
        place, byte, bit = data.draw(
            st.tuples(st.integers(0, len(hashes) - 1), st.integers(0, 31), st.sampled_from([1, 2, 64, 128]))
        )
        changed = bytearray(hashes[place])
        changed[byte] ^= bit
        hashes[place] = bytes(changed)
    with pytest.raises(ProofError):
        verify_inclusion(index, size, inclusion[0], inclusion[2:], inclusion[1])
    with pytest.raises(ProofError):
        verify_consistency(old, size, consistency[0], consistency[1], consistency[2:])


@PURE
@given(st.integers(2, len(LEAVES)), st.data())
def test_a_proof_with_a_hash_too_many_or_too_few_is_refused(size: int, data: st.DataObject) -> None:
    read, root = reader(size), naive_root(LEAVES[:size])
    index, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size - 1))
    inclusion, consistency = inclusion_proof(index, size, read), consistency_proof(old, size, read)
    old_root = naive_root(LEAVES[:old])
    place = data.draw(st.integers(0, len(inclusion) - 1))
    extra = data.draw(st.sampled_from([root, LEAVES[index], bytes(32)]))
    for wrong in (inclusion[:place] + inclusion[place + 1 :], [*inclusion[:place], extra, *inclusion[place:]]):
        with pytest.raises(ProofError):
            verify_inclusion(index, size, LEAVES[index], wrong, root)
    place = data.draw(st.integers(0, len(consistency) - 1))
    for wrong in (consistency[:place] + consistency[place + 1 :], [*consistency, extra], [extra, *consistency]):
        with pytest.raises(ProofError):
            verify_consistency(old, size, old_root, root, wrong)


# What proves nothing


@pytest.mark.parametrize(("index", "size"), [(0, 0), (1, 1), (7, 7), (-1, 7), (2**64, 7), (0, -1)])
def test_a_leaf_beyond_the_tree_has_no_proof(index: int, size: int) -> None:
    with pytest.raises(ProofError, match="has no leaf"):
        inclusion_proof(index, size, reader(7))
    with pytest.raises(ProofError, match="has no leaf"):
        verify_inclusion(index, size, LEAVES[0], [], LEAVES[0])


@pytest.mark.parametrize(("old", "new"), [(0, 0), (0, 7), (8, 7), (-1, 7)])
def test_an_empty_or_shrinking_tree_has_no_proof(old: int, new: int) -> None:
    with pytest.raises(ProofError, match="no proof leads"):
        consistency_proof(old, new, reader(7))
    with pytest.raises(ProofError, match="no proof leads"):
        verify_consistency(old, new, EMPTY_ROOT, EMPTY_ROOT, [])


def test_hashes_of_another_length_are_refused() -> None:
    root = node_hash(LEAVES[0], LEAVES[1])
    verify_inclusion(0, 2, LEAVES[0], [LEAVES[1]], root)
    for leaf, sibling in ((LEAVES[0] + LEAVES[1][:1], LEAVES[1][1:]), (LEAVES[0][:31], LEAVES[0][31:] + LEAVES[1])):
        assert node_hash(leaf, sibling) == root
        with pytest.raises(ProofError, match="not of 32 bytes"):
            verify_inclusion(0, 2, leaf, [sibling], root)
        with pytest.raises(ProofError, match="not of 32 bytes"):
            verify_consistency(1, 2, leaf, root, [sibling])


def test_a_reader_that_gives_too_few_hashes_is_noticed() -> None:
    with pytest.raises(ProofError, match="has 0 of the 1 hashes"):
        tree_root(1, lambda subtrees: [])
