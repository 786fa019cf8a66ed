"""Benchmarks: ratios against plain psycopg, measured in one run."""
