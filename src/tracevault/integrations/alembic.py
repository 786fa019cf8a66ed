"""Alembic: the schema as an operation of migrations, and autogenerate that leaves our tables alone.

To import this module, in ``env.py`` or in a migration, is enough for ``op.create_audit_table`` to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tracevault.config import DEFAULT_TABLE, check_table_name
from tracevault.schema.ddl import STEPS, step_statements
from tracevault.schema.holds import HOLDS
from tracevault.schema.partitions import is_partition_name
from tracevault.schema.trees import ANCHORS, CHECKPOINTS, ERASURES, LEAVES, TILES, TREES

try:
    from alembic.operations import MigrateOperation, Operations
    from sqlalchemy import text
except ImportError as error:
    message = 'this needs Alembic: pip install "tracevault[alembic]"'
    raise ImportError(message) from error

IncludeName = Callable[[str | None, Any, Any], bool]

_SEALS = frozenset({ANCHORS, CHECKPOINTS, ERASURES, LEAVES, TILES, TREES})


@Operations.register_operation("create_audit_table")
class CreateAuditTable(MigrateOperation):
    """``op.create_audit_table("audit_logs")``: the table, its columns and indexes, as `generate_init_sql` makes them.

    Safe to run again, and on a table of an earlier version, which it upgrades; on one with many rows the indexes are
    better built by ``tracevault migrate``, beside the migrations. Runs in the migration's transaction, and offline.
    """

    def __init__(self, table_name: str) -> None:
        """Check the name."""
        self.table_name = check_table_name(table_name)

    @classmethod
    def create_audit_table(cls, operations: Operations, table_name: str = DEFAULT_TABLE) -> None:
        """Make an audit table, or bring it up to date."""
        operations.invoke(cls(table_name))

    def reverse(self) -> MigrateOperation:
        """Return what a downgrade does: it keeps the log, which nobody drops by going back a version."""
        return _KeepAuditTable()


class _KeepAuditTable(MigrateOperation):
    def reverse(self) -> MigrateOperation:
        return self


@Operations.implementation_for(CreateAuditTable)
def _create(operations: Operations, operation: CreateAuditTable) -> None:
    for step in STEPS:
        for statement in step_statements(step.number, operation.table_name):
            operations.execute(text(statement))


@Operations.implementation_for(_KeepAuditTable)
def _keep(_operations: Operations, _operation: _KeepAuditTable) -> None:
    """Do nothing."""


def leave_audit_tables(*tables: str, include_name: IncludeName | None = None) -> IncludeName:
    """Return an ``include_name`` for ``context.configure`` that hides our tables from autogenerate.

    ``tables`` are the audit tables, by default ``audit_logs``; their partitions, and the tables of the seals and holds,
    are known. ``include_name`` is one of your own, which is asked about everything else.
    """
    audited = [check_table_name(table) for table in tables or (DEFAULT_TABLE,)]
    ours = {*audited, HOLDS, *_SEALS}

    def included(name: str | None, type_: Any, parent_names: Mapping[str, str | None]) -> bool:
        known = name is not None and (name in ours or any(is_partition_name(table, name) for table in audited))
        if type_ == "table" and known:
            return False
        return include_name is None or include_name(name, type_, parent_names)

    return included
