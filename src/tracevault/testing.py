"""What users need in their own tests: a log in memory, without a database."""
