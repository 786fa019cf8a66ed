"""The pytest plugin: the fixture ``audit_log``, and vaults in memory.

Every pytest that finds tracevault installed loads this, so it is no part of the package, which takes longer to import.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tracevault.testing import AuditLog

_IN_MEMORY = "tracevault_in_memory"


@pytest.fixture
def audit_log() -> Iterator[AuditLog]:
    """What the vaults of the application emit in this test: kept in memory, no database is needed."""
    from tracevault.testing import AuditLog  # noqa: PLC0415 - see above

    with AuditLog() as log:
        yield log


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the setting for vaults that are made when the application is imported."""
    parser.addini(_IN_MEMORY, "every vault of the whole run is in memory, also those that modules make", type="bool")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Begin before any conftest.py can import the application."""
    if early_config.getini(_IN_MEMORY):
        from tracevault.testing import AuditLog  # noqa: PLC0415 - see above

        AuditLog().__enter__()
