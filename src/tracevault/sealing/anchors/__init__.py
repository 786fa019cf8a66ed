"""Anchors: where checkpoints are kept outside the database, so that nobody who owns it can change the log unseen.

============================================== ===================================================================
``file:PATH``                                  a text file that grows by each checkpoint, see ``file``
``dir:PATH``                                   the log as static files (C2SP tlog-tiles), see ``directory``
``https://HOST/PREFIX#vkey=KEY``               a witness that cosigns (C2SP tlog-witness), see ``witness``; ``http`` on
                                               this machine alone
``command:SHELL COMMAND``                      whatever takes a checkpoint on its standard input, see ``command``
============================================== ===================================================================

An anchor that fails raises `SealError`. That never stops the sealing; ``publisher`` tries again.
"""

from __future__ import annotations

from pathlib import Path

from tracevault.errors import ConfigError
from tracevault.sealing.anchors.anchor import Anchor, LogView
from tracevault.sealing.anchors.command import CommandAnchor
from tracevault.sealing.anchors.directory import DirectoryAnchor
from tracevault.sealing.anchors.file import FileAnchor, read_checkpoints
from tracevault.sealing.anchors.witness import WitnessAnchor, hide_passwords

__all__ = ["Anchor", "LogView", "parse_anchor", "read_checkpoints"]

_KNOWN = "`file:PATH`, `dir:PATH`, `https://HOST/PREFIX#vkey=KEY` and `command:SHELL COMMAND`"


def parse_anchor(text: str, base_dir: Path | None = None) -> Anchor:
    """Return the anchor that ``text`` names; relative paths are below ``base_dir``, by default the working folder.

    Nothing is opened or sent yet. Raises `ConfigError` for what is none.
    """
    kind, colon, rest = text.strip().partition(":")
    if colon and rest.strip():
        match kind.lower():
            case "file":
                return FileAnchor(_path(rest, base_dir))
            case "dir":
                return DirectoryAnchor(_path(rest, base_dir))
            case "http" | "https":
                return WitnessAnchor.parse(text.strip())
            case "command":
                return CommandAnchor(rest.strip())
    raise ConfigError(f"unknown anchor {hide_passwords(text)[:64]!r}; known are {_KNOWN}", field="anchor")


def _path(text: str, base_dir: Path | None) -> Path:
    return (base_dir or Path.cwd()) / Path(text.strip()).expanduser()
