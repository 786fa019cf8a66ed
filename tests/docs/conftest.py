"""What the tests of the documentation share: the newest server alone, which the documentation is written for."""

from tests.newest import server

__all__ = ["server"]
