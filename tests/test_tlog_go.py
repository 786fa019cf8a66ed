"""The packages of Go's checksum database read what we write, and we read what they write.

Needs the packages ``golang-go`` and ``golang-golang-x-mod-dev`` of Debian; built offline, with nothing downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.trees import fetcher, hashes_of, naive_root
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.merkle import (
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    tree_root,
    verify_consistency,
    verify_inclusion,
)
from tracevault.integrity.note import Note, Signer, Verifier
from tracevault.integrity.proof import TlogProof
from tracevault.integrity.tiles import WIDTH, Growth, Tile, tile_reader, tiles_of

SOURCE = Path(__file__).parent / "go" / "tlog.go"
GOPATH = Path("/usr/share/gocode")
SIZES = (1, 2, 3, 7, 255, 256, 257, 700, 1024)
LEAVES = [b"event-%d" % number for number in range(max(SIZES))]
HASHES = [leaf_hash(leaf) for leaf in LEAVES]

Go = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Go:
    """Runs the program of ``tests/go`` with JSON as its input."""
    compiler = shutil.which("go")
    if compiler is None or not (GOPATH / "src/golang.org/x/mod/sumdb/tlog").is_dir():
        pytest.skip("Go or its package x/mod is not installed: apt-get install golang-go golang-golang-x-mod-dev")
    folder = tmp_path_factory.mktemp("go")
    program = folder / "tlog"
    environment = os.environ | {
        "GO111MODULE": "off",
        "GOPATH": str(GOPATH),
        "GOCACHE": str(folder / "cache"),
        "GOFLAGS": "",
        "GOPROXY": "off",
        "CGO_ENABLED": "0",
    }
    subprocess.run([compiler, "build", "-o", program, SOURCE], env=environment, check=True, timeout=110)

    def run(command: str, value: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, command], input=json.dumps(value), capture_output=True, text=True, check=False, timeout=30
        )

    return run


def encoded(hashes: Sequence[bytes]) -> list[str]:
    return [b64encode(value).decode() for value in hashes]


def places(size: int) -> list[int]:
    """Leaves whose proofs differ: both ends, both sides of tiles, and some between."""
    return sorted({place for place in (0, 1, 2, 100, 254, 255, 256, 257, 511, 512, size - 1) if place < size})


def our_log(size: int) -> dict[str, Any]:
    growth = Growth()
    growth.add(HASHES[:size])
    stored = {(level, number): hashes for level, number, hashes in growth.changes()}
    read = tile_reader(fetcher(stored), size)
    signer = Signer.generate("tracevault.example/acme/audit_events")
    text = str(Checkpoint(signer.name, size, growth.root))
    witness = Signer.generate("witness.example/w", algorithm=4)
    return {
        "vkey": str(signer.verifier),
        "checkpoint": str(Note(text, [witness.sign(text, time=1_700_000_000), signer.sign(text)])),
        "tiles": {tile.path: b64encode(stored[tile.level, tile.number]).decode() for tile in tiles_of(size)},
        "records": [
            {"index": index, "hash": encoded([HASHES[index]])[0], "proof": encoded(inclusion_proof(index, size, read))}
            for index in places(size)
        ],
        "steps": [
            {
                "old": place + 1,
                "root": encoded([naive_root(HASHES[: place + 1])])[0],
                "proof": encoded(consistency_proof(place + 1, size, read)),
            }
            for place in places(size)
        ],
    }


@pytest.mark.parametrize("size", SIZES)
def test_go_reads_our_checkpoints_tiles_and_proofs(go: Go, size: int) -> None:
    result = go("check", our_log(size))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("part", ["checkpoint", "tiles", "records", "steps"])
def test_go_refuses_what_was_changed(go: Go, part: str) -> None:
    log = our_log(700)
    changed = deepcopy(log)
    if part == "checkpoint":
        changed[part] = changed[part].replace("\n700\n", "\n701\n")
    elif part == "tiles":
        changed[part]["tile/0/001"] = changed[part]["tile/0/000"]
    else:
        changed[part][3]["proof"][0] = changed[part][3]["proof"][1]
    assert go("check", log).returncode == 0
    assert go("check", changed).returncode == 1


@pytest.mark.parametrize("size", SIZES)
def test_we_read_the_checkpoints_tiles_and_proofs_of_go(go: Go, size: int) -> None:
    plan = {
        "name": "go.example/log",
        "leaves": encoded(LEAVES[:size]),
        "index": places(size),
        "old": [place + 1 for place in places(size)],
    }
    result = go("make", plan)
    assert (result.returncode, result.stderr) == (0, "")
    log = json.loads(result.stdout)

    verifier, note = Verifier.parse(log["vkey"]), Note.parse(log["checkpoint"])
    assert (str(verifier), str(note)) == (log["vkey"], log["checkpoint"])
    assert note.verified_by([verifier]) == [verifier]
    checkpoint = Checkpoint.parse(note.text)
    assert checkpoint == Checkpoint("go.example/log", size, naive_root(HASHES[:size]))

    # Go names the partial tiles of smaller trees, too; those of this size are the ones that we name.
    stored = {Tile.parse(path): b64decode(hashes) for path, hashes in log["tiles"].items()}
    ours = {(tile.level, tile.number): stored[tile] for tile in tiles_of(size)}
    assert {tile for tile in stored if tile.width == WIDTH} <= set(tiles_of(size))
    growth = Growth()
    growth.add(HASHES[:size])
    assert growth.changes() == sorted((level, number, hashes) for (level, number), hashes in ours.items())
    read = tile_reader(fetcher(ours), size)
    assert tree_root(size, read) == checkpoint.root

    for record in log["records"]:
        index, proof = record["index"], hashes_of(record["proof"])
        assert proof == inclusion_proof(index, size, read)
        verify_inclusion(index, size, b64decode(record["hash"]), proof, checkpoint.root)
        assert TlogProof(index, proof, note).verify(HASHES[index], [verifier]) == checkpoint
    for step in log["steps"]:
        old, proof = step["old"], hashes_of(step["proof"])
        assert proof == consistency_proof(old, size, read)
        verify_consistency(old, size, b64decode(step["root"]), checkpoint.root, proof)
