"""Tests of what the application emits: `pip install "tracevault[testing,binary]"`, then `pytest`."""

import pytest
from shop import DocShared, rename, share

from tracevault.testing import AuditLog


def test_sharing_is_audited(audit_log: AuditLog) -> None:
    share("1", "7", "bea")
    record = audit_log.assert_emitted("doc.shared", actor="user:1", target="doc:7", data={"with_": "bea"})
    assert record.meta == {"pin": "[REDACTED]"}
    audit_log.assert_no_more()


def test_a_typed_event_stands_for_its_data(audit_log: AuditLog) -> None:
    share("1", "7", "bea")
    audit_log.assert_emitted(DocShared("bea"), actor="user:1")


def test_a_rename_that_fails_leaves_no_event(audit_log: AuditLog) -> None:
    rename("7", "draft", "final")
    audit_log.assert_emitted("doc.renamed", before={"name": "draft"}, after={"name": "final"})
    with pytest.raises(ValueError, match="needs a name"):
        rename("7", "final", "")
    audit_log.assert_no_more()
