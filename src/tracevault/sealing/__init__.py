"""The sealer at work: which rows, which keys, and who outside is told."""
