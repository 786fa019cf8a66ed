"""The server of tests that do not depend on its version; a conftest.py imports it in place of the one that does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import servers


@pytest.fixture(scope="session")
def server(running: Callable[[str], str]) -> str:
    """Conninfo of the newest server alone."""
    return running(servers.VERSIONS[0])
