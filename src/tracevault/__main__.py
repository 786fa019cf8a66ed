"""``python -m tracevault`` is the command line."""

from tracevault.cli import main

main()
