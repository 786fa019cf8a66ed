"""Every case of the reference, over the blocking and the async vault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

import tracevault
from tests.conformance.cases import REFERENCE, decoded, field_matches, same
from tests.conftest import rows
from tests.faces import Face, OpenVault, opener
from tracevault import (
    ConfigError,
    TracevaultError,
    generate_init_sql,
    read_correlation_id_header,
    resolve_correlation_id,
)

TABLE = "conf_logs"


def named(cases: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(case, id=f"{number}-{case.get('name', '')}") for number, case in enumerate(cases)]


@pytest.fixture(scope="module")
def shared_dsn(server: str) -> Iterator[str]:
    """One database for all cases of this module, each of which leaves its table empty."""
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("CREATE DATABASE conformance TEMPLATE template0")
        dsn = psycopg.conninfo.make_conninfo(server, dbname="conformance")
        rows(dsn, generate_init_sql(TABLE))
        yield dsn
        admin.execute("DROP DATABASE conformance WITH (FORCE)")


def options(dsn: str, **more: Any) -> dict[str, Any]:
    return {
        "connection_string": dsn,
        "scopes": {"default": {"table_name": TABLE}},
        "bootstrap": {"ensure_schema": False},
        **more,
    }


@pytest.mark.parametrize("case", named(REFERENCE["write"]))
def test_write(case: dict[str, Any], face: OpenVault, shared_dsn: str) -> None:
    rows(shared_dsn, f"TRUNCATE {TABLE}")
    vault = face(**options(shared_dsn, **case["config"]))
    given = decoded(case["input"])
    expected = case["expect"]
    if "error" in expected:
        with pytest.raises(TracevaultError) as caught:
            getattr(vault, case["call"])(given)
        assert type(caught.value).__name__ == expected["error"]
        assert field_matches(getattr(caught.value, "field", None), expected["field"]), caught.value
        assert rows(shared_dsn, f"SELECT * FROM {TABLE}") == []
        return
    receipt = getattr(vault, case["call"])(given)
    vault.flush()
    record = vault.query.find_by_id(receipt.id)
    for column, value in expected["row"].items():
        assert same(getattr(record, column), value), (column, getattr(record, column), value)
    # And as any other client sees it.
    columns = [column for column, value in expected["row"].items() if not isinstance(value, (dict, list))]
    (stored,) = rows(shared_dsn, f"SELECT {', '.join(columns)} FROM {TABLE}")
    for column, found in zip(columns, stored, strict=True):
        assert same(found, expected["row"][column]), (column, found)


@pytest.mark.parametrize("case", named(REFERENCE["start_options"]))
def test_start_options(case: dict[str, Any], face: OpenVault, shared_dsn: str) -> None:
    given = decoded(case["options"], shared_dsn)
    if case["expect"].get("ok"):
        vault = face(**given)
        assert vault.healthcheck()
        return
    with pytest.raises(ConfigError) as caught:
        face(**given)
    assert field_matches(caught.value.field, case["expect"]["field"]), caught.value


@pytest.mark.parametrize("case", named(REFERENCE["generate_init_sql"]))
def test_generate_init_sql(case: dict[str, Any]) -> None:
    if case["expect"].get("ok"):
        assert f'"{case["table_name"]}"' in generate_init_sql(case["table_name"])
        return
    with pytest.raises(ConfigError) as caught:
        generate_init_sql(case["table_name"])
    assert field_matches(caught.value.field, case["expect"]["field"])


@pytest.mark.parametrize("case", named(REFERENCE["correlation"]))
def test_correlation(case: dict[str, Any]) -> None:
    headers = {} if case["header"] is None else {"x-correlation-id": case["header"]}
    assert read_correlation_id_header(headers) == case["expect"]
    assert read_correlation_id_header(lambda name: headers.get(name.lower())) == case["expect"]
    resolved = resolve_correlation_id(headers)
    assert resolved == case["expect"] if case["expect"] else len(resolved) == 36


@pytest.fixture(scope="module", params=["blocking", "async"])
def filled(request: pytest.FixtureRequest, shared_dsn: str) -> Iterator[Face]:
    """A vault whose table holds the reference's rows, emitted in order."""
    table = f"conf_reads_{request.param}"
    rows(shared_dsn, generate_init_sql(table))
    opened: list[Face] = []
    with opener(request.param, opened) as open_vault:
        vault = open_vault(**options(shared_dsn, scopes={"default": table}))
        for row in REFERENCE["read"]["rows"]:
            vault.emit(decoded(row))
        vault.flush()
        yield vault
        vault.close()


@pytest.mark.parametrize("case", named(REFERENCE["read"]["queries"]))
def test_find_many(case: dict[str, Any], filled: Face) -> None:
    expected = case["find_many"]
    if "error" in expected:
        with pytest.raises(tracevault.ValidationError) as caught:
            filled.query.find_many(**decoded(case["filters"]))
        assert field_matches(caught.value.field, expected["field"])
        return
    found = filled.query.find_many(**decoded(case["filters"]))
    assert [record.data["n"] for record in found] == expected["n"]


@pytest.mark.parametrize("case", named(REFERENCE["read"]["queries"]))
def test_count(case: dict[str, Any], filled: Face) -> None:
    filters = {k: v for k, v in decoded(case["filters"]).items() if k not in {"limit", "offset", "order"}}
    expected = case["count"]
    if "error" in expected:
        with pytest.raises(tracevault.ValidationError) as caught:
            filled.query.count(**filters)
        assert field_matches(caught.value.field, expected["field"])
        return
    assert filled.query.count(**filters) == expected["count"]


@pytest.mark.parametrize("case", named(REFERENCE["read"]["find_by_id"]))
def test_find_by_id(case: dict[str, Any], filled: Face) -> None:
    if "error" in case["expect"]:
        with pytest.raises(tracevault.ValidationError) as caught:
            filled.query.find_by_id(case["id"])
        assert field_matches(caught.value.field, case["expect"]["field"])
        return
    assert (filled.query.find_by_id(case["id"]) is not None) == case["expect"]["found"]
