"""``tracevault serve``: the viewer, for one's own machine."""

from __future__ import annotations

import asyncio
import getpass
import socket
from typing import Any

import click

from tracevault import ConfigError, start_tracevault
from tracevault.cli.connect import conninfo, read_dsn
from tracevault.cli.options import dsn_option, tables_option
from tracevault.config import check_table_name

LOOPBACK = "127.0.0.1"


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=8650, show_default=True, help="0: any that is free")
@click.option("--audit-reads", is_flag=True, help="store in the log that it was looked at; needs the right to write")
@tables_option
@dsn_option("DATABASE_URL_READ, or DATABASE_URL_WRITE")
def serve(dsn: str | None, tables: tuple[str, ...], port: int, audit_reads: bool) -> None:
    """Show the log in a browser: on this machine alone, behind an address that works once.

    Everybody who can become this user can read what the database gives. To show it to others, mount the viewer in an
    application that knows who they are.
    """
    names = list(dict.fromkeys(check_table_name(name, "--table") for name in tables))
    try:
        import uvicorn  # noqa: PLC0415 - optional packages are imported where they are used

        from tracevault.web import Access, viewer  # noqa: PLC0415
        from tracevault.web.local import LocalGate  # noqa: PLC0415
    except ImportError:
        raise ConfigError('the viewer needs the extra "web": pip install "tracevault[web]"') from None

    access = Access(may_export=True, actor={"id": getpass.getuser(), "type": "user"})

    async def run(target: str, listening: socket.socket) -> None:
        scopes: Any = {name: name for name in names}
        async with start_tracevault(
            connection_string=target, scopes=scopes, default_scope=names[0], bootstrap={"ensure_schema": False}
        ) as audit:
            host = f"{LOOPBACK}:{listening.getsockname()[1]}"
            app = LocalGate(viewer(audit, authorize=lambda _request: access, audit_reads=audit_reads), [host])
            click.echo(f"http://{host}/?token={app.token}")
            click.echo("Ctrl-C ends it", err=True)
            config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
            await uvicorn.Server(config).serve([listening])

    with conninfo(read_dsn(dsn)) as target, socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((LOOPBACK, port))
            listening.listen()  # before the address is printed
        except OSError as error:
            raise click.ClickException(f"port {port} cannot be used: {error.strerror or error}") from None
        try:
            asyncio.run(run(target, listening))
        except KeyboardInterrupt:
            raise click.Abort from None
