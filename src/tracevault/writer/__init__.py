"""When a record is written."""
