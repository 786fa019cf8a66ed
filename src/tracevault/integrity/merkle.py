"""The Merkle tree of a log: roots and proofs as of RFC 9162 section 2.1, hashed as in RFC 6962.

Nothing here stores a tree. What a proof is made of are the hashes of complete subtrees, named by ``(level, index)``:
the subtree of level ``l`` and index ``i`` covers the leaves from ``i * 2**l`` up to ``(i + 1) * 2**l``, and one of
level 0 is a leaf. They are asked for all at once, so that a reader needs one round trip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256

from tracevault.errors import ProofError

#: Gives the hashes of complete subtrees, by ``(level, index)``, in the order asked for.
HashReader = Callable[[Sequence[tuple[int, int]]], Sequence[bytes]]

#: Bytes of a hash: SHA-256.
HASH_SIZE = 32
#: The root of a tree without leaves (RFC 9162, 2.1.1).
EMPTY_ROOT = sha256().digest()


def leaf_hash(data: bytes) -> bytes:
    """Return the hash of a leaf with the content ``data``."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of the node above ``left`` and ``right``, 32 bytes each."""
    return sha256(b"\x01" + left + right).digest()


def tree_root(size: int, read: HashReader) -> bytes:
    """Return the root of the tree of the first ``size`` leaves."""
    if size < 0:
        raise ProofError(f"a tree has no {size} leaves: `size` must be 0 or more")
    return _range_hashes([(0, size)], read)[0] if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, read: HashReader) -> list[bytes]:
    """Return the proof that leaf ``index`` is in the tree of ``size`` leaves: from the leaf's sibling upwards.

    RFC 9162, 2.1.3.1. Raises `ProofError` where the tree has no such leaf.
    """
    _check_index(index, size)
    ranges, start, end = [], 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((start, middle))
            start = middle
    return _range_hashes(ranges[::-1], read)


def consistency_proof(old: int, new: int, read: HashReader) -> list[bytes]:
    """Return the proof that the tree of ``new`` leaves begins with the tree of ``old`` leaves.

    RFC 9162, 2.1.4.1. Empty for two trees of one size. Raises `ProofError` for an empty tree, which proves nothing,
    and where ``old`` is beyond ``new``.
    """
    _check_sizes(old, new)
    ranges, start, end = [], 0, new
    while end != old:
        middle = start + _split(end - start)
        if old <= middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((start, middle))
            start = middle
    # Where the old tree is a complete subtree on the left, its own root is known to whoever verifies.
    if start:
        ranges.append((start, end))
    return _range_hashes(ranges[::-1], read)


def verify_inclusion(index: int, size: int, leaf_hash: bytes, proof: Sequence[bytes], root: bytes) -> None:
    """Return where ``proof`` shows that leaf ``index`` of the tree with ``root`` has ``leaf_hash``.

    RFC 9162, 2.1.3.2. Raises `ProofError` for anything else: no such leaf, a hash too many or too few, or one that
    is not of 32 bytes.
    """
    _check_index(index, size)
    _check_hashes((leaf_hash, root, *proof))
    place, last, result = index, size - 1, leaf_hash
    for sibling in proof:
        if last == 0:
            raise ProofError("the inclusion proof has too many hashes")
        if place & 1 or place == last:
            result = node_hash(sibling, result)
            # A node without a sibling on its right rises as it is.
            while not place & 1 and place:
                place >>= 1
                last >>= 1
        else:
            result = node_hash(result, sibling)
        place >>= 1
        last >>= 1
    if last:
        raise ProofError("the inclusion proof has too few hashes")
    if result != root:
        raise ProofError(f"leaf {index} is not in the tree of {size} leaves: its proof leads to another root")


def verify_consistency(old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Return where ``proof`` shows that the tree of ``new`` leaves begins with the tree of ``old`` leaves.

    RFC 9162, 2.1.4.2. Raises `ProofError` for anything else, and for an empty tree: every tree begins with it, and
    a proof that shows nothing must not pass for one.
    """
    _check_sizes(old, new)
    if old == new:
        if proof:
            raise ProofError("the consistency proof has too many hashes: trees of one size need none")
        if old_root != new_root:
            raise ProofError(f"two roots for one tree of {old} leaves")
        return
    _check_hashes((old_root, new_root, *proof))
    hashes = list(proof) if old & (old - 1) else [old_root, *proof]
    if not proof:
        raise ProofError("the consistency proof has too few hashes")
    place, last = old - 1, new - 1
    while place & 1:
        place >>= 1
        last >>= 1
    before = after = hashes[0]
    for sibling in hashes[1:]:
        if last == 0:
            raise ProofError("the consistency proof has too many hashes")
        if place & 1 or place == last:
            before = node_hash(sibling, before)
            after = node_hash(sibling, after)
            while not place & 1 and place:
                place >>= 1
                last >>= 1
        else:
            after = node_hash(after, sibling)
        place >>= 1
        last >>= 1
    if last:
        raise ProofError("the consistency proof has too few hashes")
    if before != old_root:
        raise ProofError(f"the tree of {new} leaves does not begin with that of {old}: not the old root")
    if after != new_root:
        raise ProofError(f"the tree of {new} leaves does not begin with that of {old}: not the new root")


def _range_hashes(ranges: Sequence[tuple[int, int]], read: HashReader) -> list[bytes]:
    """Return the root of the leaves of each range, as RFC 9162 splits it, by a single read."""
    parts = [list(_subtrees(start, end)) for start, end in ranges]
    wanted = [subtree for subtrees in parts for subtree in subtrees]
    hashes = list(read(wanted)) if wanted else []
    if len(hashes) != len(wanted):
        raise ProofError(f"the tree has {len(hashes)} of the {len(wanted)} hashes that are needed")
    given, roots = iter(hashes), []
    for subtrees in parts:
        *left, root = [next(given) for _ in subtrees]
        for subtree in reversed(left):
            root = node_hash(subtree, root)
        roots.append(root)
    return roots


def _subtrees(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the complete subtrees that make up the leaves from ``start``, where one can begin, up to ``end``."""
    while start < end:
        level = (end - start).bit_length() - 1
        yield level, start >> level
        start += 1 << level


def _split(width: int) -> int:
    """Return the largest power of two that is smaller than ``width``, which is 2 or more."""
    return 1 << ((width - 1).bit_length() - 1)


def _check_index(index: int, size: int) -> None:
    if not 0 <= index < size:
        raise ProofError(f"a tree of {size} leaves has no leaf {index}: the first is 0")


def _check_sizes(old: int, new: int) -> None:
    if not 0 < old <= new:
        raise ProofError(f"no proof leads from a tree of {old} leaves to one of {new}: both must have some, and grow")


def _check_hashes(hashes: Sequence[bytes]) -> None:
    if any(len(value) != HASH_SIZE for value in hashes):
        raise ProofError(f"a hash is not of {HASH_SIZE} bytes")
