"""Options: every one with its default, what it accepts, and what its refusal says."""

from __future__ import annotations

import enum
import functools
import pickle
from collections.abc import AsyncIterator
from dataclasses import FrozenInstanceError, fields
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from tests.faces import OpenVault
from tracevault import ConfigError
from tracevault.config import Config, check_table_name, config_from, environment_urls, option_docs

DSN = "postgresql://user:s3cr3t@nowhere.invalid/db"
POOL = SimpleNamespace(conninfo=DSN)

DEFAULTS = {
    "driver": "postgres",
    "connection_string": None,
    "read_connection_string": None,
    "pool": None,
    "read_pool": None,
    "default_scope": "default",
    "scopes": {"default": {"table_name": "audit_logs"}},
    "bootstrap": {"ensure_schema": True},
    "mask_fields": (),
    "mask_value": "[REDACTED]",
    "default_mode": "sync",
    "environment": None,
    "on_error": None,
    "timeout": 5.0,
    "async_batch_size": 1000,
    "async_flush_interval_ms": 0,
    "max_event_bytes": 262_144,
    "max_queue": 10_000,
    "on_full": "block",
    "writer_connect": None,
}


def refused(**options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config_from({"connection_string": DSN, **options})
    error = caught.value
    assert f"`{error.field}`" in str(error)
    assert "s3cr3t" not in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    str(error).encode()
    return error


def test_defaults() -> None:
    config = config_from({"connection_string": DSN})
    assert {name: getattr(config, name) for name in DEFAULTS} == {**DEFAULTS, "connection_string": DSN}
    assert config.ensure_schema is True
    assert config.tables == {"default": "audit_logs"}


async def coroutine(*_: object) -> None:
    """Would never be awaited."""


async def generator(*_: object) -> AsyncIterator[int]:
    yield 1


class AsyncCallable:
    async def __call__(self, *_: object) -> None:
        """Would never be awaited."""

    async def method(self, *_: object) -> None:
        """Would never be awaited."""


class Callable:
    def __call__(self, *_: object) -> None:
        """Called."""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connection_string", "host=localhost dbname=x"),
        ("connection_string", "embedded:"),
        ("read_connection_string", "postgresql://reader@nowhere.invalid/db"),
        ("default_scope", "default"),
        ("mask_fields", ["password", "Token"]),
        ("mask_fields", {"password"}),
        ("mask_fields", frozenset({"password"})),
        ("mask_fields", ()),
        ("mask_value", ""),
        ("mask_value", "*" * 1000),
        ("default_mode", "async"),
        ("environment", "e"),
        ("environment", " "),
        ("environment", "e" * 128),
        ("on_error", print),
        ("on_error", lambda error, record: None),
        ("on_error", functools.partial(print, 1)),
        ("on_error", Callable()),
        ("timeout", 1),
        ("timeout", 0.001),
        ("timeout", 86_400),
        ("async_batch_size", 1),
        ("async_batch_size", 65_536),
        ("async_flush_interval_ms", 2.5),
        ("async_flush_interval_ms", 3_600_000),
        ("max_event_bytes", 1),
        ("max_event_bytes", 2**28 - 1),
        ("max_queue", 1),
        ("on_full", "raise"),
        ("on_full", "drop_newest"),
        ("writer_connect", print),
        ("bootstrap", {"ensure_schema": False}),
        ("bootstrap", {}),
        ("bootstrap", MappingProxyType({"ensure_schema": True})),
    ],
)
def test_accepted(name: str, value: Any) -> None:
    found = getattr(config_from({"connection_string": DSN, name: value}), name)
    assert list(found) == list(value) if name == "mask_fields" else found == value


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("driver", "mysql", "must be \"postgres\", got 'mysql'"),
        ("driver", None, "got None"),
        ("connection_string", None, "is missing: pass a PostgreSQL URL"),
        ("connection_string", "", "not blank"),
        ("connection_string", " \n", "not blank"),
        ("connection_string", 5, "must be a PostgreSQL URL"),
        ("connection_string", b"x", "must be a PostgreSQL URL"),
        ("read_connection_string", "", "not blank"),
        ("read_connection_string", 5, "must be a PostgreSQL URL"),
        ("default_scope", "nope", "'nope' is not in `scopes` (default)"),
        ("default_scope", "1bad", "a scope's name is a letter"),
        ("default_scope", "", "a scope's name"),
        ("default_scope", None, "got None"),
        ("default_scope", 5, "got 5"),
        ("mask_fields", "password", "must be a list of keys: [\"password\"], got 'password'"),
        ("mask_fields", b"password", "must be a list of keys"),
        ("mask_fields", {"password": 1}, "must be a list of keys"),
        ("mask_fields", None, "got None"),
        ("mask_fields", [""], "non-empty strings, got ''"),
        ("mask_fields", ["a", 5], "non-empty strings, got 5"),
        ("mask_fields", [None], "got None"),
        ("mask_fields", iter(["password"]), "must be a list of keys"),
        ("mask_value", None, "must be a string, got None"),
        ("mask_value", 5, "must be a string, got 5"),
        ("mask_value", "\0", "U+0000"),
        ("mask_value", "\ud800", "surrogate"),
        ("default_mode", "both", 'must be one of "sync", "async", got \'both\''),
        ("default_mode", "SYNC", "got 'SYNC'"),
        ("default_mode", True, "got True"),
        ("default_mode", None, "got None"),
        ("environment", "", "must have 1 to 128 characters, got 0"),
        ("environment", "e" * 129, "must have 1 to 128 characters, got 129"),
        ("environment", 5, "must be a string"),
        ("environment", "\0", "U+0000"),
        ("on_error", 5, "must be callable, got 5"),
        ("on_error", "print", "must be callable, got 'print'"),
        ("on_error", coroutine, "cannot be a coroutine function"),
        ("on_error", generator, "cannot be a coroutine function"),
        ("on_error", functools.partial(coroutine, 1), "cannot be a coroutine function"),
        ("on_error", AsyncCallable(), "cannot be a coroutine function"),
        ("on_error", AsyncCallable().method, "cannot be a coroutine function"),
        ("writer_connect", 5, "must be callable, got 5"),
        ("writer_connect", coroutine, "cannot be a coroutine function"),
        *(
            ("timeout", bad, "must be a number from 0.001 to 86,400")
            for bad in (0, -1, True, None, "5", float("nan"), float("inf"), 86_401)
        ),
        *(
            ("async_batch_size", bad, "must be a whole number from 1 to 65,536")
            for bad in (0, -1, 1.5, 2.0, True, None, "1", 65_537)
        ),
        *(
            ("async_flush_interval_ms", bad, "must be a number from 0 to 3,600,000")
            for bad in (-1, True, None, "0", float("nan"), 3_600_001)
        ),
        *(
            ("max_event_bytes", bad, "must be a whole number from 1 to 268,435,455")
            for bad in (0, -1, True, None, 1.0, 2**28)
        ),
        *(("max_queue", bad, "must be a whole number from 1 to") for bad in (0, True, None, 1.0, 10**5000)),
        ("on_full", "drop", 'must be one of "block", "raise", "drop_newest", got \'drop\''),
        ("on_full", None, "got None"),
        ("bootstrap", None, 'must be {"ensure_schema": True} or'),
        ("bootstrap", True, "got True"),
        ("bootstrap", [], "got an instance of list"),
        ("bootstrap", {"ensureSchema": True}, 'must be {"ensure_schema"'),
        ("bootstrap", {"ensure_schema": True, "x": 1}, 'must be {"ensure_schema"'),
        ("scopes", None, "must be a mapping with at least one scope"),
        ("scopes", {}, "must be a mapping with at least one scope"),
        ("scopes", "audit_logs", "got 'audit_logs'"),
        ("scopes", [], "got an instance of list"),
        ("scopes", {5: "t"}, "a scope's name is a letter"),
        ("environment", 10**5000, "got 1000000"),
        ("default_mode", "x" * 5000, "got 'xxxxxxxx"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else ascii(value)[:30],
)
def test_refused(name: str, value: Any, words: str) -> None:
    error = refused(**{name: value})
    assert error.field == name
    assert words in str(error)
    assert len(str(error)) < 400


@pytest.mark.parametrize(
    ("scopes", "field"),
    [
        ({"default": {}}, "table_name"),
        ({"default": {"table_name": None}}, "table_name"),
        ({"default": ""}, "table_name"),
        ({"default": "a-b"}, "table_name"),
        ({"default": {"table_name": 'a"b'}}, "table_name"),
        ({"default": "audit", "users": "public.users"}, "table_name"),
        ({"default": 5}, "scopes.default"),
        ({"default": ["audit_logs"]}, "scopes.default"),
        ({"default": None}, "scopes.default"),
        ({"default": {"table": "t"}}, "scopes.default.table"),
        ({"default": {"table_name": "t", "tableName": "t"}}, "scopes.default.tableName"),
        ({"default": "t", "1bad": "t"}, "scopes.1bad"),
        ({"default": "t", "a.b": "t"}, "scopes.a.b"),
        ({"default": "t", "": "t"}, "scopes."),
        ({"default": "t", "a\nb": "t"}, r"scopes.a\nb"),
        ({"default": "t", "ü": "t"}, "scopes.ü"),
        ({"default": "t", "a" * 65: "t"}, "scopes." + "a" * 63 + "…"),
        ({"default": "t", "a\n": "t"}, r"scopes.a\n"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_scopes_that_are_refused(scopes: Any, field: str) -> None:
    assert refused(scopes=scopes).field == field


@pytest.mark.parametrize("name", ["a", "A", "default", "a-b_c9", "a" * 64])
def test_scope_names(name: str) -> None:
    for entry in ("t", {"table_name": "t"}, MappingProxyType({"table_name": "t"})):
        config = config_from({"connection_string": DSN, "default_scope": name, "scopes": {name: entry, "x": "t"}})
        assert config.tables == {name: "t", "x": "t"}


@pytest.mark.parametrize("name", ["_", "a", "_1", "Audit_Logs", "t" * 63])
def test_table_names(name: str) -> None:
    assert check_table_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "1a", "a b", "a-b", "a.b", 'a"', "a;b", "ünï", "t" * 64, "a\n", "٣", None, 5, b"a", ["a"], 10**5000],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else ascii(value),
)  # fmt: skip
def test_table_names_that_are_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="`f` must be 1 to 63 ASCII letters, digits and underscores") as caught:
        check_table_name(name, "f")
    assert caught.value.field == "f"
    assert "search_path" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("connectionString", "did you mean `connection_string`?"),
        ("connection_strng", "did you mean `connection_string`?"),
        ("mask_field", "did you mean `mask_fields`?"),
        ("maskFields", "did you mean `mask_fields`?"),
        ("default_mod", "did you mean `default_mode`?"),
        ("zzz", "known are driver, connection_string"),
        ("a\nb", "known are"),
        ("x" * 5000, "known are"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_unknown_options(name: str, hint: str) -> None:
    error = refused(**{name: None})
    assert "is not an option; " + hint in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 600
    assert str(error.field) == name or len(name) != len(str(error.field))


POOLS: list[tuple[dict[str, Any], str | None]] = [
    ({"pool": POOL}, None),
    ({"pool": POOL, "read_pool": POOL}, None),
    ({"pool": POOL, "connection_string": DSN}, None),
    ({"pool": POOL, "read_connection_string": DSN}, None),
    ({"pool": POOL, "connection_string": "host=x", "read_connection_string": "host=x"}, None),
    ({"read_pool": POOL, "connection_string": DSN}, "read_pool"),
    ({"read_pool": POOL}, "connection_string"),
    ({"pool": POOL, "read_connection_string": "host=other"}, "read_connection_string"),
    ({"pool": POOL, "read_pool": POOL, "read_connection_string": "host=other"}, "read_pool"),
]


@pytest.mark.parametrize(("options", "field"), POOLS)
def test_pools(options: dict[str, Any], field: str | None) -> None:
    if field is None:
        config_from(options)
        return
    with pytest.raises(ConfigError, match=f"`{field}`") as caught:
        config_from(options)
    assert caught.value.field == field
    assert "s3cr3t" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    config = config_from({"connection_string": DSN, "read_connection_string": DSN, "mask_fields": ["pin"]})
    assert "s3cr3t" not in repr(config)
    assert "pin" in repr(config)
    assert "s3cr3t" not in repr(config_from({"pool": POOL}))


def test_options_are_frozen_and_copied() -> None:
    names, scopes, bootstrap = ["pin"], {"default": {"table_name": "t"}}, {"ensure_schema": False}
    config = config_from({"connection_string": DSN, "mask_fields": names, "scopes": scopes, "bootstrap": bootstrap})
    names.append("password")
    scopes["more"] = {"table_name": "u"}
    scopes["default"]["table_name"] = "v"
    bootstrap["ensure_schema"] = True
    assert config.mask_fields == ("pin",)
    assert config.tables == {"default": "t"}
    assert config.ensure_schema is False
    with pytest.raises(FrozenInstanceError):
        config.timeout = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.scopes["x"] = "t"  # type: ignore[index]


class Word(str, enum.Enum):  # noqa: UP042 - the kind whose format() is not its value
    """Options that come from an Enum of the caller's."""

    SCOPE = "main"
    TABLE = "audit_logs"
    FIELD = "pin"
    MODE = "async"


def test_members_of_an_enum_stand_for_their_values() -> None:
    config = config_from(
        {
            "connection_string": DSN,
            "default_scope": Word.SCOPE,
            "scopes": {Word.SCOPE: Word.TABLE},
            "mask_fields": [Word.FIELD],
            "mask_value": Word.FIELD,
            "default_mode": Word.MODE,
            "environment": Word.SCOPE,
        }
    )
    found = [config.default_scope, *config.tables, *config.tables.values(), *config.mask_fields]
    found += [config.mask_value, config.default_mode, config.environment or ""]
    assert found == ["main", "main", "audit_logs", "pin", "pin", "async", "main"]
    assert {type(value) for value in found} == {str}


def test_defaults_are_not_shared() -> None:
    assert config_from({"connection_string": DSN}).scopes is not config_from({"connection_string": DSN}).scopes


def test_every_option_is_documented() -> None:
    docs = option_docs()
    assert [doc.name for doc in docs] == [option.name for option in fields(Config)]
    assert all(doc.type and doc.default and doc.help for doc in docs)
    shown = {doc.name: doc.default for doc in docs}
    assert shown["connection_string"] == "required"
    assert (shown["timeout"], shown["mask_value"]) == ("5.0", "'[REDACTED]'")


def test_environment_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL_WRITE", raising=False)
    monkeypatch.setenv("DATABASE_URL_READ", "  ")
    assert environment_urls() == (None, None)
    monkeypatch.setenv("DATABASE_URL_WRITE", f" {DSN} ")
    assert environment_urls() == (DSN, None)


def test_the_environment_is_no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL_WRITE", DSN)
    with pytest.raises(ConfigError, match="`connection_string` is missing"):
        config_from({})


def test_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(refused(timeout=0)))
    assert (type(error), error.field) == (ConfigError, "timeout")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "connection_string"),
        ({"connection_string": DSN, "connectionString": DSN}, "connectionString"),
        ({"connection_string": DSN, "mask_fields": "password"}, "mask_fields"),
        ({"connection_string": DSN, "scopes": {"default": "a b"}}, "table_name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_vault_with_wrong_options_connects_to_nothing(options: dict[str, Any], field: str, face: OpenVault) -> None:
    with pytest.raises(ConfigError) as caught:
        face(**options)
    assert caught.value.field == field
