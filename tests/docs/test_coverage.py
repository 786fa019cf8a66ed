"""Nothing public is left out of the documentation, and no link of it leads nowhere."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import tracevault
from tests.docs.pages import CHANGELOG, PAGES, ROOT, anchors, links, name
from tracevault.cli.group import tracevault as command_line
from tracevault.config import READ_URL, WRITE_URL, Config
from tracevault.events.prepare import DIFF_FIELDS, EVENT_FIELDS
from tracevault.events.record import BY_NAME
from tracevault.schema.filters import FIND_FILTERS

DOCS = "\n".join(page.read_text() for page in PAGES if page.is_relative_to(ROOT / "docs"))
COMMANDS = (ROOT / "docs" / "command-line.md").read_text()

METHODS = {
    method
    for kind in (tracevault.AsyncTracevault, tracevault.AsyncQuery)
    for method in dir(kind)
    if not method.startswith("_")
}


@pytest.mark.parametrize(
    "word",
    sorted(
        {
            *tracevault.__all__,
            *METHODS,
            *(option.name for option in fields(Config)),
            *EVENT_FIELDS,
            *DIFF_FIELDS,
            *FIND_FILTERS,
            *BY_NAME,
            *("connection", "allow_autocommit", "savepoint"),
            *(WRITE_URL, READ_URL),
        }
    ),
)
def test_every_public_name_is_documented(word: str) -> None:
    assert re.search(rf"\b{word}\b", DOCS), f"`{word}` is mentioned in no page of docs/"


@pytest.mark.parametrize("command", command_line.commands)
def test_every_command_is_documented_with_its_options(command: str) -> None:
    section = re.search(rf"^## {command}$(.*?)(?=^## |\Z)", COMMANDS, re.MULTILINE | re.DOTALL)
    assert section, f"`tracevault {command}` has no section in docs/command-line.md"
    for option in command_line.commands[command].params:
        for spelling in option.opts:
            assert not spelling.startswith("-") or f"`{spelling}`" in section[1], spelling
    assert "```sh\n" in section[1], f"`tracevault {command}` has no example"


@pytest.mark.parametrize("page", [*PAGES, CHANGELOG], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_changelog_knows_this_version() -> None:
    assert f"## [{tracevault.__version__}]" in CHANGELOG.read_text()
