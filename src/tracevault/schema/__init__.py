"""The shape of the table: DDL, migrations and filters, all derived from ``events.record``. Pure."""
