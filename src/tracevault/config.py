"""Options: every one with its type, default and help. The only reader of ``os.environ``.

Keyword arguments of `start_tracevault` and `Tracevault`, environment names and the table in the docs all
derive from the fields of `Config`.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from decimal import Decimal
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

from tracevault.errors import ConfigError

OnFull = Literal["block", "raise", "drop_newest"]
Interval = Literal["day", "week", "month"]
INTERVALS: tuple[Interval, ...] = get_args(Interval)
_SERVER_OPTIONS = ("connection_string", "read_connection_string")
SCOPE_OPTIONS = ("table_name", "partition", "retain", *_SERVER_OPTIONS)

DEFAULT_TABLE = "audit_logs"
MAX_TABLE_NAME = 63
MAX_SCOPE_NAME = 64
MAX_ENVIRONMENT = 128
# jsonb holds no string longer than this, and a record must fit one.
MAX_EVENT_BYTES = 2**28 - 1

_SHOWN = 64
_TABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_SCOPE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*", re.ASCII)

_NATS = re.compile(r"(?:nats|tls)://[^\s,]+(?:,[^\s,]+)*")

WRITE_URL = "DATABASE_URL_WRITE"
READ_URL = "DATABASE_URL_READ"
SIGNING_KEY = "TRACEVAULT_SIGNING_KEY"


def _option(default: Any, help: str, *, secret: bool = False, env: str | None = None) -> Any:  # noqa: A002
    metadata = {"help": help, "env": env}
    if isinstance(default, dict):
        return field(default_factory=default.copy, repr=not secret, metadata=metadata)
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a vault, checked. A wrong one raises `ConfigError`, whose ``field`` names it."""

    driver: str = _option("postgres", 'the only driver is `"postgres"`')
    connection_string: str | None = _option(
        None,
        "where to write: a PostgreSQL URL or key=value string, `embedded:` or `embedded:PATH`; required unless "
        "`pool` is given. With `pool`: how background writers connect",
        secret=True,
        env=WRITE_URL,
    )
    read_connection_string: str | None = _option(
        None,
        "where to read, best as a role with SELECT only; default: where writes go",
        secret=True,
        env=READ_URL,
    )
    max_staleness: float | None = _option(
        None,
        "seconds that the server of `read_connection_string` may be behind, where that is a replica: if it is more, or "
        "does not answer, the primary is read from; default: it is read from however far behind it is",
    )
    pool: Any = _option(None, "a psycopg_pool pool of the caller's, never closed by the vault", secret=True)
    read_pool: Any = _option(None, "the same for reads; needs `pool`, which is the default", secret=True)
    default_scope: str = _option("default", "the scope of the vault's own `emit` and `query`")
    scopes: Mapping[str, str | Mapping[str, Any]] = _option(
        {"default": DEFAULT_TABLE},
        'names for tables: `{"users": {"table_name": "audit_user_events"}}`, or the table name alone; with '
        '`"partition": "month"` (or `"week"`, `"day"`) the table is made in partitions; `"retain": "400 days"` is '
        'for `tracevault retention`; with a `"connection_string"` of its own, and perhaps a '
        '`"read_connection_string"`, the table is on another server',
        secret=True,
    )
    bootstrap: Mapping[str, bool] = _option(
        {"ensure_schema": True},
        '`{"ensure_schema": False}`: migrations own the schema, no DDL runs at start',
    )
    mask_fields: Sequence[str] = _option(
        (), "keys whose values are masked in every payload, at any depth, whatever their case"
    )
    mask_value: str = _option("[REDACTED]", "what stands in place of a masked value")
    encrypt_fields: Sequence[str] = _option(
        (),
        "paths of values that are stored encrypted, by a key of the event's subject: `data.email`, `meta.ip`, "
        "`data.people.*.name`; needs `key_store`",
    )
    key_store: str | os.PathLike[str] | Callable[[str, bool], bytes | None] | Any = _option(
        None,
        "the data keys: a directory, a `KeyStore`, or a function `key_store(subject, create)` that returns 32 bytes; "
        "encrypts and decrypts",
        secret=True,
    )
    default_mode: Literal["sync", "async"] = _option(
        "sync", '`"sync"`: `emit` returns after the commit; `"async"`: at once, background writers store it'
    )
    environment: str | None = _option(None, "stored with each event that names none; 1-128 characters")
    context_sources: Sequence[Callable[[], Mapping[str, Any] | None]] = _option(
        (),
        "functions called for each event; what they return stands in for what neither the event nor a "
        "`tracevault.context` gives",
    )
    catalog: Literal["open", "closed"] = _option(
        "open", '`"closed"`: an event that the program does not declare is refused; see docs/events.md'
    )
    on_error: Callable[[Exception, Any], object] | None = _option(
        None,
        "called as `on_error(error, record)`, on the writer's thread, once for each async record that was lost",
    )
    on_stored: Callable[[Any, Any], object] | None = _option(
        None,
        "called as `on_stored(record, where)` for each event once it is stored: where is `database`, or `transaction` "
        "in a caller's transaction; by the emitter, or on the writer's thread for async records. See "
        "docs/integrations/logging.md",
    )
    timeout: float = _option(5.0, "seconds that one write may take, waiting for a connection included")
    async_batch_size: int = _option(1000, "most records that one statement of the background writer stores")
    async_flush_interval_ms: float = _option(
        0, "milliseconds for which the background writer lets a batch grow; 0: it writes at once"
    )
    max_event_bytes: int = _option(262_144, "most bytes of `data` and `meta` together, as JSON in UTF-8")
    max_queue: int = _option(10_000, "most async records waiting in memory")
    on_full: OnFull = _option(
        "block",
        '`"block"`: `emit` waits up to `timeout`, then `QueueFullError`; `"raise"`: `QueueFullError` at once; '
        '`"drop_newest"`: the new record is lost, and counted',
    )
    ingest: str | None = _option(
        None,
        "a NATS cluster, `nats://one:4222,two:4222`: async records go into its JetStream stream, from which "
        "`tracevault ingest` writes them to the database",
        secret=True,
    )
    spool: str | os.PathLike[str] | None = _option(
        None, "a folder that keeps async records until PostgreSQL has them: they survive the process, and outages"
    )
    durability: Literal["os", "fsync"] = _option(
        "os",
        '`"os"`: a spooled record is with the operating system, and on the disk within 25 ms; `"fsync"`: `emit` '
        "returns when it is on the disk",
    )
    on_unavailable: Literal["raise", "spool"] = _option(
        "raise", '`"spool"`: a sync `emit` that cannot reach the database keeps the event in the spool'
    )
    spool_quota_bytes: int = _option(2**30, "most bytes of a process's spool files; then `on_full` decides")
    writer_connect: Callable[[], Any] | None = _option(
        None,
        "returns a new blocking psycopg connection for background writers, where a pool's conninfo is not enough",
    )

    notify: bool = _option(
        False,
        "tells those who follow the log that there is something new, by NOTIFY from a connection of its own, at most "
        "every 100 ms; and listens to that in `tail`, which otherwise looks every half a second",
    )

    seal: Mapping[str, Any] | None = _option(
        None,
        'seals the tables in a thread of this process: `{"key": FILE, "anchors": ["file:PATH", ...]}`; see '
        "docs/integrity.md",
    )

    def __post_init__(self) -> None:
        """Check every option; freeze what is mutable."""
        for check in _CHECKS:
            check(self)

    @property
    def ensure_schema(self) -> bool:
        """Whether start-up may run DDL."""
        return self.bootstrap.get("ensure_schema", True)

    @property
    def tables(self) -> dict[str, str]:
        """Table name by scope name."""
        return {name: entry if isinstance(entry, str) else entry["table_name"] for name, entry in self.scopes.items()}

    @property
    def servers(self) -> list[Config]:
        """The options for each server, with the scopes that are there; first those for the default scope's."""
        groups: dict[tuple[str | None, str | None], dict[str, Mapping[str, Any]]] = {}
        for name in sorted(self.scopes, key=lambda name: name != self.default_scope):  # the others keep their order
            entry = cast("Mapping[str, Any]", self.scopes[name])
            groups.setdefault(_server(entry), {})[name] = entry
        return [self._at(*server, scopes) for server, scopes in groups.items()]

    def _at(self, write: str | None, read: str | None, scopes: dict[str, Mapping[str, Any]]) -> Config:
        plain = {
            name: {option: value for option, value in entry.items() if option not in _SERVER_OPTIONS}
            for name, entry in scopes.items()
        }
        default = self.default_scope if self.default_scope in scopes else next(iter(scopes))
        if write is None:
            return replace(self, scopes=plain, default_scope=default)
        return replace(
            self,
            connection_string=write,
            read_connection_string=read,
            pool=None,
            read_pool=None,
            writer_connect=None,
            scopes=plain,
            default_scope=default,
        )

    @property
    def retain(self) -> dict[str, object]:
        """How long events are kept by table name, as the scopes say it; of several scopes of a table the last one."""
        entries = [entry for entry in self.scopes.values() if not isinstance(entry, str)]
        return {entry["table_name"]: entry["retain"] for entry in entries if "retain" in entry}

    @property
    def partitions(self) -> dict[str, Interval]:
        """The interval of its partitions by table name, of tables that are to have some."""
        return {table: cast("Interval", min(intervals)) for (_, table), intervals in _intervals(self).items()}


def config_from(options: Mapping[str, Any]) -> Config:
    """Return the `Config` for keyword arguments; an unknown one is refused with the nearest known name.

    None is refused where it is not the default: a setting that came up empty must not turn masking off.
    """
    known = [option.name for option in fields(Config)]
    for name in options:
        if name not in known:
            shown = _printable(name)
            close = get_close_matches(shown, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else "known are " + ", ".join(known)
            raise ConfigError(f"`{shown}` is not an option; {hint}", field=shown)
    return Config(**options)


@dataclass(frozen=True)
class OptionDoc:
    """One row of the options table."""

    name: str
    type: str
    default: str
    help: str


def option_docs() -> list[OptionDoc]:
    """Return name, type, default and help of every option, in order, for the documentation."""
    docs = []
    for option in fields(Config):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        shown = "required" if option.name == "connection_string" else repr(default)
        docs.append(OptionDoc(option.name, str(option.type), shown, option.metadata["help"]))
    return docs


def environment_urls() -> tuple[str | None, str | None]:
    """Return ``DATABASE_URL_WRITE`` and ``DATABASE_URL_READ``, for the command line. Blank counts as unset."""
    return os.environ.get(WRITE_URL, "").strip() or None, os.environ.get(READ_URL, "").strip() or None


def signing_key() -> str | None:
    """Return what ``TRACEVAULT_SIGNING_KEY`` holds: the text of a key file. Blank counts as unset."""
    return os.environ.get(SIGNING_KEY, "").strip() or None


def command_environment(**added: str) -> dict[str, str]:
    """Return the environment for a command of the operator's: this process's without the signing key."""
    return {**{name: value for name, value in os.environ.items() if name != SIGNING_KEY}, **added}


def check_table_name(value: object, field: str = "table_name") -> str:
    """Return ``value`` if it can name an audit table: 1-63 letters, digits and underscores, no leading digit."""
    if not isinstance(value, str) or not _TABLE_NAME.fullmatch(value) or len(value) > MAX_TABLE_NAME:
        raise ConfigError(
            f"`{field}` must be 1 to {MAX_TABLE_NAME} ASCII letters, digits and underscores and not start with a "
            f"digit, got {_shown(value)}; a table outside the default schema is reached by search_path",
            field=field,
        )
    return str.__str__(value)  # a member of an Enum stands for its value


def check_interval(value: object, field: str) -> Interval:
    """Return ``value`` if partitions can have this length."""
    if value not in INTERVALS:
        raise ConfigError(f"`{field}` must be one of {', '.join(INTERVALS)}, got {_shown(value)}", field=field)
    return value


def check_scope_name(value: object, field: str) -> str:
    """Return ``value`` if it can name a scope: a letter, then up to 63 letters, digits, underscores, hyphens."""
    if not isinstance(value, str) or not _SCOPE_NAME.fullmatch(value) or len(value) > MAX_SCOPE_NAME:
        raise ConfigError(
            f"`{field}`: a scope's name is a letter and up to {MAX_SCOPE_NAME - 1} letters, digits, underscores or "
            f"hyphens, got {_shown(value)}",
            field=field,
        )
    return str.__str__(value)


def _shown(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return _shorten(str(Decimal(value)))  # Python refuses to print an int of more than 4,300 digits
    plain = isinstance(value, (str, int, float, bool)) or value is None
    return _shorten(repr(value) if plain else f"an instance of {type(value).__name__}")


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _printable(name: object) -> str:
    """Return a name that is not ours for a message: shortened, what would not print written as an escape."""
    if not isinstance(name, str):
        return _shown(name)
    return _shorten("".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[: _SHOWN + 1]))


def _check_driver(config: Config) -> None:
    if config.driver != "postgres":
        raise ConfigError(f'`driver` must be "postgres", got {_shown(config.driver)}', field="driver")


def _check_connections(config: Config) -> None:
    for name in ("connection_string", "read_connection_string"):
        value = getattr(config, name)
        # The value is not shown: it may hold a password.
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise ConfigError(f"`{name}` must be a PostgreSQL URL or key=value string, not blank", field=name)


def _check_pools(config: Config) -> None:
    if config.read_pool is not None and config.pool is None:
        raise ConfigError("`read_pool` needs `pool`: pass both, or connection strings", field="read_pool")
    read = config.read_connection_string
    if config.pool is not None and read is not None:
        if config.read_pool is not None:
            raise ConfigError("`read_pool` and `read_connection_string` exclude each other", field="read_pool")
        if read not in (config.connection_string, getattr(config.pool, "conninfo", None)):
            raise ConfigError(
                "`read_connection_string` differs from where `pool` connects: pass a `read_pool` for it",
                field="read_connection_string",
            )


def _check_scopes(config: Config) -> None:
    _set(config, "default_scope", check_scope_name(config.default_scope, "default_scope"))
    if not isinstance(config.scopes, Mapping) or not config.scopes:
        raise ConfigError(
            '`scopes` must be a mapping with at least one scope: {"default": {"table_name": "audit_logs"}}, '
            f"got {_shown(config.scopes)}",
            field="scopes",
        )
    scopes: dict[str, str | Mapping[str, Any]] = {}
    for given, entry in config.scopes.items():
        name = check_scope_name(given, f"scopes.{_printable(given)}" if isinstance(given, str) else "scopes")
        if isinstance(entry, str):
            scopes[name] = {"table_name": check_table_name(entry)}
            continue
        if not isinstance(entry, Mapping):
            raise ConfigError(
                f'`scopes.{name}` must be {{"table_name": ...}} or a table name, got {_shown(entry)}',
                field=f"scopes.{name}",
            )
        unknown = [_printable(key) for key in entry if key not in SCOPE_OPTIONS]
        if unknown:
            raise ConfigError(
                f"`scopes.{name}.{unknown[0]}` is not an option of a scope; known are {', '.join(SCOPE_OPTIONS)}",
                field=f"scopes.{name}.{unknown[0]}",
            )
        checked: dict[str, Any] = {"table_name": check_table_name(entry.get("table_name"))}
        if "retain" in entry:  # `schema.retention` checks it
            checked["retain"] = entry["retain"]
        if "partition" in entry:
            checked["partition"] = check_interval(entry["partition"], f"scopes.{name}.partition")
        checked |= _checked_server(entry, f"scopes.{name}")
        scopes[name] = checked
    if config.default_scope not in scopes:
        raise ConfigError(
            f"`default_scope` {_shown(config.default_scope)} is not in `scopes` ({', '.join(scopes)})",
            field="default_scope",
        )
    _set(config, "scopes", MappingProxyType(scopes))
    _check_servers(config, scopes)
    for (_, table), intervals in _intervals(config).items():
        if len(intervals) > 1:
            raise ConfigError(
                f"`scopes`: table `{table}` would be partitioned by {' and by '.join(sorted(intervals))}",
                field="scopes",
            )


def _server(entry: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return where a scope's own strings lead; None for those of the vault."""
    return entry.get("connection_string"), entry.get("read_connection_string")


def _checked_server(entry: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return a scope's own connection strings."""
    found = {}
    for name in _SERVER_OPTIONS:
        value = entry.get(name)
        if name in entry:
            # The value is not shown: it may hold a password.
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(
                    f"`{where}.{name}` must be a PostgreSQL URL or key=value string, not blank", field=f"{where}.{name}"
                )
            found[name] = value
    if "read_connection_string" in found and "connection_string" not in found:
        raise ConfigError(
            f"`{where}.read_connection_string` needs a `connection_string` of the scope's own",
            field=f"{where}.read_connection_string",
        )
    return found


def _check_servers(config: Config, scopes: Mapping[str, Any]) -> None:
    servers = {_server(entry) for entry in scopes.values()}
    if (None, None) in servers and config.connection_string is None and config.pool is None:
        raise ConfigError(
            "`connection_string` is missing: pass a PostgreSQL URL, a `pool`, or `embedded:` to try tracevault on "
            "a database of its own in ./.tracevault",
            field="connection_string",
        )
    places: dict[str, set[Any]] = {}
    for entry in scopes.values():
        places.setdefault(entry["table_name"], set()).add(_server(entry))
    twice = [table for table, where in places.items() if len(where) > 1]
    if config.seal is not None and twice:
        raise ConfigError(
            f"`scopes`: the table `{twice[0]}` is on two servers, and with `seal` two logs would have one name: give "
            "them different table names",
            field="scopes",
        )


def _intervals(config: Config) -> dict[tuple[Any, str], set[str]]:
    """Return what scopes say of the partitions of each server's tables; several scopes may share one."""
    found: dict[tuple[Any, str], set[str]] = {}
    for entry in config.scopes.values():
        assert isinstance(entry, Mapping)
        if "partition" in entry:
            found.setdefault((_server(entry), entry["table_name"]), set()).add(entry["partition"])
    return found


def _check_bootstrap(config: Config) -> None:
    value = config.bootstrap
    if not isinstance(value, Mapping) or not set(value) <= {"ensure_schema"}:
        raise ConfigError(
            f'`bootstrap` must be {{"ensure_schema": True}} or {{"ensure_schema": False}}, got {_shown(value)}',
            field="bootstrap",
        )
    if not isinstance(value.get("ensure_schema", True), bool):
        raise ConfigError(
            f"`bootstrap.ensure_schema` must be True or False, got {_shown(value['ensure_schema'])}",
            field="bootstrap.ensure_schema",
        )
    _set(config, "bootstrap", MappingProxyType(dict(value)))


def _check_masking(config: Config) -> None:
    names = config.mask_fields
    if isinstance(names, (str, bytes, Mapping)) or not isinstance(names, (Sequence, set, frozenset)):
        raise ConfigError(
            f'`mask_fields` must be a list of keys: ["password"], got {_shown(names)}', field="mask_fields"
        )
    for name in names:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"`mask_fields` must hold non-empty strings, got {_shown(name)}", field="mask_fields")
    _set(config, "mask_fields", tuple(map(str.__str__, names)))
    _check_text(config, "mask_value", most=None)


def _check_encryption(config: Config) -> None:
    paths = config.encrypt_fields
    if isinstance(paths, (str, bytes, Mapping)) or not isinstance(paths, (Sequence, set, frozenset)):
        raise ConfigError(
            f'`encrypt_fields` must be a list of paths: ["data.email"], got {_shown(paths)}', field="encrypt_fields"
        )
    for path in paths:
        if not isinstance(path, str) or not path:
            raise ConfigError(f"`encrypt_fields` must hold paths as text, got {_shown(path)}", field="encrypt_fields")
    _set(config, "encrypt_fields", tuple(map(str.__str__, paths)))
    store = config.key_store
    if store is None:
        if paths:
            raise ConfigError(
                "`encrypt_fields` needs `key_store`: a directory for the keys, or a function", field="key_store"
            )
        return
    if isinstance(store, (str, os.PathLike)):
        if not os.fspath(store):
            raise ConfigError("`key_store` must be the path of a directory, and is empty", field="key_store")
        return
    methods = ("get", "create", "find", "destroy")
    calls = [getattr(store, method, None) for method in methods]
    if not all(map(callable, calls)):
        calls = [store, type(store).__call__] if callable(store) else []
    if not calls:
        raise ConfigError(
            "`key_store` must be the path of a directory, a `KeyStore` "
            f"({', '.join(methods)}), or a function of subject and create, got {_shown(store)}",
            field="key_store",
        )
    if any(map(inspect.iscoroutinefunction, calls)):
        raise ConfigError("`key_store` is asked in threads and cannot be a coroutine function", field="key_store")


def _check_text(config: Config, name: str, *, most: int | None) -> None:
    value = getattr(config, name)
    if not isinstance(value, str):
        raise ConfigError(f"`{name}` must be a string, got {_shown(value)}", field=name)
    if most is not None and not 0 < len(value) <= most:
        raise ConfigError(f"`{name}` must have 1 to {most} characters, got {len(value)}", field=name)
    try:
        storable = "\0" not in value.encode().decode()
    except UnicodeEncodeError:
        storable = False
    if not storable:
        raise ConfigError(f"`{name}` holds U+0000 or a lone surrogate, which PostgreSQL cannot store", field=name)
    _set(config, name, str.__str__(value))


def _check_environment(config: Config) -> None:
    if config.environment is not None:
        _check_text(config, "environment", most=MAX_ENVIRONMENT)


def _check_choices(config: Config) -> None:
    for name, choices in (
        ("default_mode", ("sync", "async")),
        ("catalog", ("open", "closed")),
        ("on_full", ("block", "raise", "drop_newest")),
        ("durability", ("os", "fsync")),
        ("on_unavailable", ("raise", "spool")),
    ):
        value = getattr(config, name)
        if not isinstance(value, str) or value not in choices:
            allowed = ", ".join(f'"{choice}"' for choice in choices)
            raise ConfigError(f"`{name}` must be one of {allowed}, got {_shown(value)}", field=name)
        _set(config, name, str.__str__(value))


def _check_flags(config: Config) -> None:
    if not isinstance(config.notify, bool):
        raise ConfigError(f"`notify` must be True or False, got {_shown(config.notify)}", field="notify")


def _check_callables(config: Config) -> None:
    for name in ("on_error", "on_stored", "writer_connect"):
        value = getattr(config, name)
        if value is not None:
            _check_callable(value, name, "runs on the writer's thread and")
    sources = config.context_sources
    if isinstance(sources, (str, bytes, Mapping)) or not isinstance(sources, Sequence):
        raise ConfigError(
            f"`context_sources` must be a list of functions, got {_shown(sources)}", field="context_sources"
        )
    for source in sources:
        _check_callable(source, "context_sources", "holds what is called by every emit, blocking ones too, and")
    _set(config, "context_sources", tuple(sources))


def _check_callable(value: Any, name: str, because: str) -> None:
    if not callable(value):
        raise ConfigError(f"`{name}` must be callable, got {_shown(value)}", field=name)
    # It would be called and never awaited. An object is as good as its __call__.
    calls = (value, type(value).__call__)
    if any(map(inspect.iscoroutinefunction, calls)) or any(map(inspect.isasyncgenfunction, calls)):
        raise ConfigError(f"`{name}` {because} cannot be a coroutine function", field=name)


def _check_numbers(config: Config) -> None:
    for name, least, most in (
        ("async_batch_size", 1, 65_536),
        ("max_event_bytes", 1, MAX_EVENT_BYTES),
        ("max_queue", 1, 2**31),
        ("spool_quota_bytes", 2**20, 2**43),
    ):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(
                f"`{name}` must be a whole number from {least:,} to {most:,}, got {_shown(value)}", field=name
            )
    for name, least_seconds in (("timeout", 0.001), ("async_flush_interval_ms", 0.0)):
        value = getattr(config, name)
        most_seconds = 86_400 if name == "timeout" else 3_600_000
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least_seconds <= value <= most_seconds:
            raise ConfigError(
                f"`{name}` must be a number from {least_seconds:g} to {most_seconds:,}, got {_shown(value)}",
                field=name,
            )


def _check_ingest(config: Config) -> None:
    value = config.ingest
    if value is None:
        return
    if not isinstance(value, str) or not _NATS.fullmatch(value):
        # The value is not shown: it may hold a password.
        raise ConfigError("`ingest` must be the address of a NATS cluster: nats://one:4222,two:4222", field="ingest")
    if any(_server(cast("Mapping[str, Any]", entry)) != (None, None) for entry in config.scopes.values()):
        raise ConfigError(
            "`ingest` is for scopes of one server: a stream does not know which one a record is for", field="ingest"
        )


def _check_staleness(config: Config) -> None:
    value = config.max_staleness
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.1 <= value <= 86_400:
        raise ConfigError(
            f"`max_staleness` must be a number of seconds from 0.1 to 86,400, got {_shown(value)}",
            field="max_staleness",
        )


def _check_spool(config: Config) -> None:
    if config.spool is None:
        if config.on_unavailable == "spool":
            raise ConfigError('`on_unavailable="spool"` needs `spool`, the folder', field="on_unavailable")
        return
    if not isinstance(config.spool, (str, os.PathLike)) or not os.fspath(config.spool):
        raise ConfigError(f"`spool` must be the path of a folder, got {_shown(config.spool)}", field="spool")
    _set(config, "spool", os.path.abspath(os.path.expanduser(os.fspath(config.spool))))


_SEAL_NUMBERS = ("every_ms", "anchor_every_s", "heartbeat_s")
SEAL_OPTIONS = ("key", "state", "anchors", *_SEAL_NUMBERS)


def _check_seal(config: Config) -> None:
    options = config.seal
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise ConfigError(f'`seal` must be a mapping: {{"key": "seal.key"}}, got {_shown(options)}', field="seal")
    for name, value in options.items():
        field = f"seal.{_printable(name)}"
        if name in ("key", "state"):
            if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
                raise ConfigError(f"`{field}` must be the path of a file, got {_shown(value)}", field=field)
        elif name == "anchors":
            if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
                raise ConfigError(f'`{field}` must be a list such as ["file:/mnt/anchors/log"]', field=field)
        elif name in _SEAL_NUMBERS:
            most = 3_600_000 if name == "every_ms" else 366 * 86_400
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= most:
                raise ConfigError(f"`{field}` must be a number from 1 to {most:,}, got {_shown(value)}", field=field)
        else:
            raise ConfigError(f"`{field}` is not an option of `seal`; known are {', '.join(SEAL_OPTIONS)}", field=field)
    _set(config, "seal", MappingProxyType(dict(options)))


def _set(config: Config, name: str, value: object) -> None:
    object.__setattr__(config, name, value)


_CHECKS = cast(
    "tuple[Callable[[Config], None], ...]",
    (
        _check_driver,
        _check_connections,
        _check_scopes,
        _check_pools,
        _check_bootstrap,
        _check_masking,
        _check_encryption,
        _check_environment,
        _check_choices,
        _check_flags,
        _check_callables,
        _check_numbers,
        _check_staleness,
        _check_ingest,
        _check_spool,
        _check_seal,
    ),
)
