"""Which database a command means, and connections to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
from psycopg import Connection

from tracevault import ConfigError, Tracevault
from tracevault.config import READ_URL, WRITE_URL, Config, environment_urls
from tracevault.postgres.embedded import acquire, is_embedded
from tracevault.postgres.failures import Place
from tracevault.postgres.pool import check_conninfo, connect_once

TIMEOUT: float = Config.timeout
EMBEDDED_FOLDER = ".tracevault/pgdata"


def write_dsn(given: str | None) -> str:
    """Return ``--dsn``, else DATABASE_URL_WRITE; there is no other default."""
    write, _read = environment_urls()
    return _first({"--dsn": given, WRITE_URL: write})


def read_dsn(given: str | None) -> str:
    """Return ``--dsn``, else DATABASE_URL_READ, else DATABASE_URL_WRITE; there is no other default."""
    write, read = environment_urls()
    return _first({"--dsn": given, READ_URL: read, WRITE_URL: write})


def _first(sources: dict[str, str | None]) -> str:
    for name, dsn in sources.items():
        if dsn is None:
            continue
        if not dsn.strip():  # which libpq takes for "the default database of the default server"
            raise click.UsageError(f"{name} is blank")
        return dsn if is_embedded(dsn) else check_conninfo(dsn, name)
    _option, *variables = sources
    raise click.UsageError(
        f"no database given: pass --dsn, or set {' or '.join(variables)} "
        "(`--dsn embedded:` is the database that `tracevault demo` makes)"
    )


@contextmanager
def conninfo(dsn: str, *, create: bool = False) -> Iterator[str]:
    """Yield what libpq takes for ``dsn``, while the embedded server runs if it means that one.

    Only with ``create`` may an embedded database be made: an empty fresh log must never look like an answer.
    """
    if not is_embedded(dsn):
        yield dsn
        return
    folder = Path(dsn.removeprefix("embedded:") or EMBEDDED_FOLDER).expanduser()
    if not create and not (folder / "PG_VERSION").exists():
        raise ConfigError(f"there is no embedded database in {folder}; `tracevault demo` makes one")
    server = acquire(dsn)
    try:
        yield server.conninfo
    finally:
        server.release()


@contextmanager
def connection(dsn: str, doing: str, *, create: bool = False) -> Iterator[Connection[Any]]:
    """Yield an autocommit connection without a statement timeout."""
    with conninfo(dsn, create=create) as target, closing(connect_once(target, TIMEOUT, Place(doing))) as link:
        yield link


@contextmanager
def vault(dsn: str, table: str, mask_fields: Sequence[str] = (), key_store: Path | None = None) -> Iterator[Tracevault]:
    """Yield a vault of one table, which it never creates; with a key store it decrypts what it reads."""
    # First a connection of our own: the vault's pool would try again for seconds what one attempt makes plain.
    with conninfo(dsn) as target:
        connect_once(target, TIMEOUT, Place("connecting")).close()
        with Tracevault(
            connection_string=target,
            scopes={"default": table},
            bootstrap={"ensure_schema": False},
            mask_fields=mask_fields,
            key_store=key_store,
        ) as audit:
            yield audit
