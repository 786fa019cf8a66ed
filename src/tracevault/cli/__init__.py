"""The command line: ``tracevault`` and ``python -m tracevault``. One file per command.

Data goes to standard output, everything else to standard error. Exit codes: 0 done, 1 the answer is no, 2 the
command or the event is wrong, 3 the database could not be reached or could not do it, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command in ``sys.argv`` and exit; without click and rich, name the extra that brings them."""
    try:
        import click  # noqa: F401, PLC0415 - optional packages are imported where they are used
        import rich  # noqa: F401, PLC0415
    except ImportError:
        sys.stderr.write('error: the command line needs the extra "cli": pip install "tracevault[cli]"\n')
        sys.exit(3)
    from tracevault.cli.group import run  # noqa: PLC0415 - it needs them

    sys.exit(run())
