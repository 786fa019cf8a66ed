"""The tables that derive from the code say what the code says."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, name
from tests.docs.tables import TABLES, names_in, rewritten


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_are_up_to_date(page: Path) -> None:
    found = page.read_text()
    lines = unified_diff(found.splitlines(), rewritten(found).splitlines(), name(page), "the code", lineterm="", n=0)
    difference = "\n".join(lines)
    if difference:
        pytest.fail(f"`make docs` (python -m tests.docs.tables) writes it anew:\n{difference}", pytrace=False)


def test_every_table_is_shown() -> None:
    docs = {table for page in PAGES for table in names_in(page.read_text())}
    assert docs == set(TABLES)


def test_the_readme_has_its_four_tables() -> None:
    readme = (ROOT / "README.md").read_text()
    assert {"options", "filters", "errors"} <= set(names_in(readme))
    assert "\n## Guarantees\n" in readme
