"""Testing what an application emits, without a database: the fixture ``audit_log`` of pytest, or `AuditLog` alone."""

from tracevault.testing.log import AuditLog

__all__ = ["AuditLog"]
