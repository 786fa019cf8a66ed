"""``tracevault completion``: what teaches a shell to complete its commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands and options.

    For bash and zsh: eval "$(tracevault completion bash)". For fish: tracevault completion fish | source.
    """
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(ctx.find_root().command, {}, "tracevault", "_TRACEVAULT_COMPLETE").source(), nl=False)
