"""Files that a command is given to read."""

from __future__ import annotations

import sys
from pathlib import Path

import click

STDIN = Path("-")


def read_text(path: Path, most: int) -> str | None:
    """Return what is in a file, or for ``-`` on standard input; None if that is no UTF-8.

    Of a file of more than ``most`` bytes one byte more is read, so that whoever limits it sees that. A file that
    cannot be read ends the command with exit code 3.
    """
    try:
        if path == STDIN:
            data = sys.stdin.buffer.read(most + 1)
        else:
            with path.open("rb") as file:
                data = file.read(most + 1)
    except OSError as error:
        raise click.ClickException(f"{str(path)!r} cannot be read: {error.strerror}") from None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        # The limit may have cut a character.
        return data[: error.start].decode() if len(data) > most and error.start >= len(data) - 3 else None
