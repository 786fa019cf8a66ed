"""Hashes and signatures: leaves, the Merkle tree, signed notes and proofs. Pure, and byte for byte as others do it."""
