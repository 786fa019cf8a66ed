"""Events on their way out: files in several formats, which take their place whole, and batches that are pushed."""
