"""Connections: the vault's own pools, a caller's pools, and single ones for background writers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection, Connection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from tracevault.config import Config
from tracevault.errors import ConfigError, DriverError, TracevaultError
from tracevault.postgres.failures import Place, from_pool, from_psycopg

APPLICATION_NAME = "tracevault"
MAX_SIZE = 10
# Seconds. A server that refuses our role or database does so at once; one that comes back is found this fast.
_ATTEMPT = 0.5

P = TypeVar("P", ConnectionPool[Any], AsyncConnectionPool[Any])


def check_conninfo(value: str, field: str) -> str:
    """Return ``value`` if libpq can parse it; its parser's message may quote the password, so ours says less."""
    try:
        parts = conninfo_to_dict(value)
    except psycopg.Error:
        parts = None
    # In a URL, an @ or a slash inside the password moves the rest of it to where messages show it.
    if parts is not None and not ("://" in value and _is_torn(parts)):
        return value
    raise ConfigError(
        f"`{field}` is not a connection string that libpq understands: use postgresql://user@host/database, with "
        "special characters in the password percent-encoded, or key=value pairs",
        field=field,
    )


def _is_torn(parts: dict[str, Any]) -> bool:
    ports = str(parts.get("port", "")).split(",")
    return any("@" in str(parts.get(key, "")) for key in ("host", "dbname")) or not all(
        port.isdigit() or not port for port in ports
    )


def conninfo_for(value: str, timeout: float) -> str:
    """Return ``value`` in UTF-8, and with our application name and limits where it does not set its own."""
    given = conninfo_to_dict(value)
    defaults = {
        "application_name": APPLICATION_NAME,
        # libpq counts whole seconds, two at least.
        "connect_timeout": str(max(2, round(timeout))),
        # Milliseconds after which the kernel gives up on a peer that does not acknowledge.
        "tcp_user_timeout": str(round(timeout * 1000)),
    }
    missing = {key: text for key, text in defaults.items() if key not in given}
    return make_conninfo(value, **missing, client_encoding="UTF8")


def target_of(conninfo: Any) -> str | None:
    """Return which database ``conninfo`` names, without user and password; None if only a function knows."""
    if not isinstance(conninfo, str):
        return None
    parts = conninfo_to_dict(conninfo)
    return " ".join(f"{key}={parts[key]}" for key in ("host", "hostaddr", "port", "dbname", "service") if key in parts)


class LastError:
    """Remembers why a pool last failed to connect; the pool itself says only that time ran out."""

    def __init__(self) -> None:
        self.error: BaseException | None = None


def make_pool(kind: type[P], conninfo: str, timeout: float, *, write: bool) -> tuple[P, LastError]:
    """Return a pool that is not open yet, of autocommit connections made on demand.

    Connections for writing get a ``statement_timeout`` of ``timeout`` seconds.
    """
    last = LastError()
    base: Any = Connection if issubclass(kind, ConnectionPool) else AsyncConnection
    settle = settle_async if base is AsyncConnection else settle_session
    limit = timeout if write else None

    def configure(connection: Any) -> Any:
        return settle(connection, limit)

    pool = kind(
        conninfo_for(conninfo, timeout),
        connection_class=_remembering(base, last),
        kwargs={"autocommit": True},
        min_size=0,
        max_size=MAX_SIZE,
        timeout=timeout,
        reconnect_timeout=0,  # no attempts in the background, ever less often: `borrow` asks again
        configure=configure,
        open=False,
        name="tracevault-write" if write else "tracevault-read",
    )
    return pool, last


def _remembering(base: Any, last: LastError) -> Any:
    if issubclass(base, Connection):

        class Remembering(base):  # type: ignore[misc]
            @classmethod
            def connect(cls, *args: Any, **kwargs: Any) -> Any:
                try:
                    connection = super().connect(*args, **kwargs)
                except Exception as error:
                    last.error = error
                    raise
                last.error = None
                return connection

        return Remembering

    class AsyncRemembering(base):  # type: ignore[misc]
        @classmethod
        async def connect(cls, *args: Any, **kwargs: Any) -> Any:
            try:
                connection = await super().connect(*args, **kwargs)
            except Exception as error:
                last.error = error
                raise
            last.error = None
            return connection

    return AsyncRemembering


def settle_session(connection: Connection[Any], timeout: float | None) -> None:
    """Limit the connection's statements to ``timeout`` seconds, unless a pooler such as PgBouncer is in between.

    There a session is not ours: what we set would stay behind for other clients, and a statement that we prepare
    be missing, or be another client's of the same name. So nothing is set and nothing is prepared.
    """
    settled = connection.execute(_settle_sql(connection, timeout)).fetchone()
    if settled is None or not settled[0]:
        connection.prepare_threshold = None


async def settle_async(connection: AsyncConnection[Any], timeout: float | None) -> None:
    """Like `settle_session`, for an async connection."""
    settled = await (await connection.execute(_settle_sql(connection, timeout))).fetchone()
    if settled is None or not settled[0]:
        connection.prepare_threshold = None


def _settle_sql(connection: Connection[Any] | AsyncConnection[Any], timeout: float | None) -> bytes:
    # A pooler hands out process numbers of its own, so that the server's answer differs from what it told us.
    direct = f"pg_backend_pid() = {connection.info.backend_pid}"
    if timeout is None:
        return f"SELECT {direct}".encode()
    milliseconds = max(1, round(timeout * 1000))
    # In a CASE, set_config runs only if the condition holds: one round trip, and no setting where it must not be.
    return f"SELECT CASE WHEN {direct} THEN set_config('statement_timeout', '{milliseconds}', false) END".encode()


def borrow(pool: ConnectionPool[Any], last: LastError, place: Place, timeout: float) -> Connection[Any]:
    """Return a connection of ``pool``, to be given back by ``putconn``; a refusal becomes one of our errors."""
    deadline = time.monotonic() + timeout
    wait = min(timeout, _ATTEMPT)
    while True:
        try:
            return pool.getconn(wait)  # type: ignore[no-any-return]
        except (PoolClosed, PoolTimeout, TooManyRequests) as error:
            failure = from_pool(error, place, last.error, timeout)
        wait = _next_wait(failure, last, deadline, wait)


async def borrow_async(
    pool: AsyncConnectionPool[Any], last: LastError, place: Place, timeout: float
) -> AsyncConnection[Any]:
    """Return a connection of ``pool``, to be given back by ``putconn``; a refusal becomes one of our errors."""
    deadline = time.monotonic() + timeout
    wait = min(timeout, _ATTEMPT)
    while True:
        try:
            return await pool.getconn(wait)  # type: ignore[no-any-return]
        except (PoolClosed, PoolTimeout, TooManyRequests) as error:
            failure = from_pool(error, place, last.error, timeout)
        wait = _next_wait(failure, last, deadline, wait)


def _next_wait(failure: TracevaultError, last: LastError, deadline: float, wait: float) -> float:
    """Return how long to ask the pool once more; raise if that is in vain, or time is up."""
    left = deadline - time.monotonic()
    if left <= 0 or not isinstance(failure, DriverError) or not failure.transient:
        raise failure
    # Each time a pool is asked while it cannot connect, it tries anew. One that is only busy keeps its queue.
    return left if last.error is None else min(left, 2 * wait)


@contextmanager
def lent(pool: ConnectionPool[Any], last: LastError, place: Place, timeout: float) -> Iterator[Connection[Any]]:
    """Lend a connection of ``pool`` for the block."""
    connection = borrow(pool, last, place, timeout)
    try:
        yield connection
    finally:
        pool.putconn(connection)


@asynccontextmanager
async def lent_async(
    pool: AsyncConnectionPool[Any], last: LastError, place: Place, timeout: float
) -> AsyncIterator[AsyncConnection[Any]]:
    """Lend a connection of ``pool`` for the block."""
    # In tasks of their own: a pool that is cancelled while it hands out or takes back a connection may hang.
    borrowing = asyncio.ensure_future(borrow_async(pool, last, place, timeout))
    try:
        connection = await asyncio.shield(borrowing)
    except asyncio.CancelledError:
        borrowing.add_done_callback(lambda done: _give_back(pool, done))
        raise
    try:
        yield connection
    finally:
        await asyncio.shield(asyncio.ensure_future(pool.putconn(connection)))


def _give_back(pool: AsyncConnectionPool[Any], borrowed: asyncio.Future[AsyncConnection[Any]]) -> None:
    if not borrowed.cancelled() and borrowed.exception() is None:
        task = asyncio.ensure_future(pool.putconn(borrowed.result()))
        _giving_back.add(task)
        task.add_done_callback(_giving_back.discard)


# An event loop keeps no strong reference to its tasks.
_giving_back: set[asyncio.Future[None]] = set()


def pool_of(connect: Callable[[], Connection[Any]], size: int, timeout: float) -> tuple[ConnectionPool[Any], LastError]:
    """Return a blocking pool, not open yet, whose connections ``connect`` makes on demand."""

    class Made(Connection[Any]):
        @classmethod
        def connect(cls, *_args: Any, **_kwargs: Any) -> Any:
            return connect()

    last = LastError()
    pool = ConnectionPool(
        connection_class=_remembering(Made, last),
        min_size=0,
        max_size=size,
        timeout=timeout,
        open=False,
        name="tracevault-other-loops",
    )
    return pool, last


def writer_connect(config: Config, conninfo: str | None) -> Callable[[], Connection[Any]]:
    """Return how background writers connect: blocking, autocommit connections of their own.

    In order: ``writer_connect``, the connection string, the conninfo and kwargs of a caller's pool.
    """
    if config.writer_connect is not None:
        connect = config.writer_connect

        def connect_by_caller() -> Connection[Any]:
            connection = connect()
            if not isinstance(connection, Connection):
                raise ConfigError(
                    f"`writer_connect` must return a blocking psycopg.Connection, got {type(connection).__name__}",
                    field="writer_connect",
                )
            connection.autocommit = True
            if connection.info.encoding != "utf-8":
                connection.execute("SET client_encoding TO UTF8")
            return connection

        return connect_by_caller

    kwargs: dict[str, Any] = {}
    if conninfo is None:
        if callable(config.pool.conninfo) or callable(config.pool.kwargs):
            raise ConfigError(
                "`pool` makes its conninfo or kwargs anew each time: pass `writer_connect`, so that background "
                "writers can connect as well",
                field="writer_connect",
            )
        conninfo = check_conninfo(config.pool.conninfo, "pool")
        # Options of the pool's connections that concern rows and cursors mean nothing to ours.
        kwargs = {
            key: value
            for key, value in (config.pool.kwargs or {}).items()
            if key not in {"row_factory", "cursor_factory", "autocommit", "context", "client_encoding"}
        }
    target = conninfo_for(conninfo, config.timeout)

    def connect_anew() -> Connection[Any]:
        connection = Connection.connect(target, **kwargs, autocommit=True)
        settle_session(connection, config.timeout)
        return connection

    return connect_anew


def connect_once(conninfo: str, timeout: float, place: Place) -> Connection[Any]:
    """Return one autocommit connection, for start-up and the command line."""
    try:
        return Connection.connect(conninfo_for(conninfo, timeout), autocommit=True, prepare_threshold=None)
    except psycopg.Error as error:
        failure = from_psycopg(error, place)
    raise failure


async def connect_once_async(conninfo: str, timeout: float, place: Place) -> AsyncConnection[Any]:
    """Return one autocommit connection, for start-up."""
    try:
        return await AsyncConnection.connect(conninfo_for(conninfo, timeout), autocommit=True, prepare_threshold=None)
    except psycopg.Error as error:
        failure = from_psycopg(error, place)
    raise failure


def check_pool(pool: Any, kind: type[Any], field: str) -> None:
    """Refuse a pool of the other kind: an async vault needs an AsyncConnectionPool, a blocking one the other."""
    if pool is not None and not isinstance(pool, kind):
        raise ConfigError(f"`{field}` must be a psycopg_pool {kind.__name__}, got {type(pool).__name__}", field=field)
