"""What the tests of the documentation share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import servers


@pytest.fixture(scope="session")
def server(running: Callable[[str], str]) -> str:
    """Conninfo of the newest server alone, which the documentation is written for."""
    return running(servers.VERSIONS[0])
