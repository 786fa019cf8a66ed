"""Tiles: their names, what they hold, and how a tree grows from its right edge alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_properties import PROFILE
from tests.trees import fetcher, leaves, naive_root
from tracevault import ProofError
from tracevault.integrity.merkle import EMPTY_ROOT, consistency_proof, inclusion_proof, tree_root
from tracevault.integrity.tiles import WIDTH, Growth, Tile, right_edge, tile_reader, tiles_of

PURE = settings(max_examples=40, **PROFILE)
LEAVES = leaves(66_000)


def grown(*chunks: int) -> tuple[dict[tuple[int, int], bytes], Growth]:
    """Store a tree that is opened anew, from its stored edge, for each chunk of leaves."""
    stored: dict[tuple[int, int], bytes] = {}
    growth, size = Growth(), 0
    for chunk in chunks:
        growth = Growth(size, {tile.level: stored[tile.level, tile.number] for tile in right_edge(size)})
        growth.add(LEAVES[size : size + chunk])
        size += chunk
        for level, number, hashes in growth.changes():
            before = stored.get((level, number), b"")
            assert len(hashes) > len(before)
            assert hashes.startswith(before), "a tile only grows"
            stored[level, number] = hashes
    return stored, growth


# Names


@pytest.mark.parametrize(
    ("tile", "path"),
    [
        (Tile(0, 0), "tile/0/000"),
        (Tile(0, 0, 1), "tile/0/000.p/1"),
        (Tile(0, 999, 255), "tile/0/999.p/255"),
        (Tile(1, 1000), "tile/1/x001/000"),
        (Tile(0, 1067, 3), "tile/0/x001/067.p/3"),
        (Tile(63, 1_234_067), "tile/63/x001/x234/067"),
    ],
)
def test_a_tile_has_the_path_of_the_specification(tile: Tile, path: str) -> None:
    assert tile.path == path
    assert Tile.parse(path) == tile


@given(st.integers(0, 63), st.integers(0, 2**55), st.integers(1, WIDTH))
def test_a_path_names_one_tile(level: int, number: int, width: int) -> None:
    assert Tile.parse(Tile(level, number, width).path) == (level, number, width)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tile/0/0",
        "tile/0/00",
        "tile/0/0000",
        "tile/00/000",
        "tile/01/000",
        "tile/64/000",
        "tile/-1/000",
        "tile/0/x000/067",
        "tile/0/001/067",
        "tile/0/x001",
        "tile/0/x001/x067",
        "tile/0/067.p/0",
        "tile/0/067.p/256",
        "tile/0/067.p/03",
        "tile/0/067.p/",
        "tile/0/067.p/3/",
        "tile/0/067\n",
        "/tile/0/067",
        "tile/8/0/067",
        "tile/0/٠٦٧",
        "tile/entries/067",
        "tile/0/../067",
    ],
)
def test_what_is_no_path_of_a_tile_is_refused(path: str) -> None:
    with pytest.raises(ProofError, match="no path of a tile"):
        Tile.parse(path)


def test_a_tree_of_70000_leaves_has_the_tiles_that_the_specification_counts() -> None:
    tiles = list(tiles_of(70_000))
    assert [tile for tile in tiles if tile.width < WIDTH] == right_edge(70_000)
    assert right_edge(70_000) == [Tile(0, 273, 112), Tile(1, 1, 17), Tile(2, 0, 1)]
    assert len([tile for tile in tiles if tile.level == 0 and tile.width == WIDTH]) == 273
    assert len(tiles) == 273 + 1 + 1 + 1 + 1
    assert list(tiles_of(256)) == [Tile(0, 0), Tile(1, 0, 1)]
    assert list(tiles_of(0)) == right_edge(0) == []


# Growing


@PURE
@given(st.lists(st.integers(0, 700) | st.sampled_from([1, 255, 256, 257, 512]), max_size=6))
def test_a_tree_grown_in_chunks_is_the_tree_grown_at_once(chunks: list[int]) -> None:
    size = sum(chunks)
    stored, growth = grown(*chunks)
    at_once, whole = grown(size)
    assert stored == at_once
    assert {(tile.level, tile.number): tile.width * 32 for tile in tiles_of(size)} == {
        place: len(hashes) for place, hashes in stored.items()
    }
    assert growth.size == whole.size == size
    assert growth.root == whole.root == naive_root(LEAVES[:size])
    assert tree_root(size, tile_reader(fetcher(stored), size)) == growth.root


def test_a_growth_that_goes_on_gives_its_root_and_changes_at_any_time() -> None:
    growth = Growth()
    assert (growth.root, growth.changes()) == (EMPTY_ROOT, [])
    for size in (1, 2, 3, 256, 257, 600):
        growth.add(iter(LEAVES[growth.size : size]))
        assert growth.root == naive_root(LEAVES[:size])
        assert {(level, number): hashes for level, number, hashes in growth.changes()} == grown(size)[0]


def test_only_what_changed_is_written() -> None:
    stored, _ = grown(65_536 + 300)
    growth = Growth(65_836, {tile.level: stored[tile.level, tile.number] for tile in right_edge(65_836)})
    assert growth.changes() == []
    growth.add(LEAVES[65_836:65_840])
    assert [(level, number, len(hashes) // 32) for level, number, hashes in growth.changes()] == [(0, 257, 48)]


def test_a_third_level_is_right() -> None:
    stored, growth = grown(65_000, 536, 100)
    assert growth.root == naive_root(LEAVES[:65_636])
    assert stored[2, 0] == naive_root(LEAVES[:65_536])


def test_a_wrong_leaf_adds_nothing() -> None:
    growth = Growth()
    growth.add(LEAVES[:5])
    with pytest.raises(ProofError, match="not of 32 bytes"):
        growth.add([LEAVES[5], LEAVES[6] + b"!", LEAVES[7][:31]])
    assert growth.size == 5
    assert growth.root == naive_root(LEAVES[:5])


def test_an_edge_that_is_missing_or_short_is_refused_and_a_longer_one_is_cut() -> None:
    edge = {0: b"".join(LEAVES[:9])}
    assert Growth(7, edge).root == naive_root(LEAVES[:7])
    for wrong in ({}, {1: edge[0]}, {0: edge[0][:192]}, {0: edge[0][:-1]}, {0: bytes(257 * 32)}):
        with pytest.raises(ProofError, match="tile tile/0/000"):
            Growth(7, wrong)


# Reading


def test_a_reader_asks_once_for_all_tiles_of_a_proof_and_keeps_them() -> None:
    stored, _ = grown(66_000)
    log: list[object] = []
    read = tile_reader(fetcher(stored, log), 66_000)  # type: ignore[arg-type]
    proof = inclusion_proof(300, 66_000, read)
    assert len(log) == 1
    assert inclusion_proof(300, 66_000, read) == proof
    assert len(log) == 1, "what was read is kept"


def test_tiles_of_a_larger_tree_serve_a_smaller_one() -> None:
    stored, _ = grown(1000)
    for size in (1, 255, 256, 700, 999):
        assert tree_root(size, tile_reader(fetcher(stored), size)) == naive_root(LEAVES[:size])


def test_a_missing_or_short_tile_is_refused() -> None:
    stored, _ = grown(700)
    for broken in (stored | {(0, 2): stored[0, 2][:-32]}, stored | {(0, 2): stored[0, 2] + b"!"}):
        with pytest.raises(ProofError, match="and not"):
            tree_root(700, tile_reader(fetcher(broken), 700))
    del stored[0, 2]
    with pytest.raises(ProofError, match="is missing"):
        consistency_proof(600, 700, tile_reader(fetcher(stored), 700))


@pytest.mark.parametrize("subtree", [(0, 700), (1, 350), (8, 2), (10, 0), (0, -1), (-1, 0)])
def test_a_subtree_that_is_not_complete_has_no_hash(subtree: tuple[int, int]) -> None:
    with pytest.raises(ProofError, match="no complete subtree"):
        tile_reader(fetcher(grown(700)[0]), 700)([subtree])
