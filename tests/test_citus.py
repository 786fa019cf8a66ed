"""The SQL for a Citus cluster keeps Citus's documented rules. Checked on PostgreSQL: no cluster is run here."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.conftest import rows
from tests.newest import server
from tests.test_cli import Cli, cli
from tracevault import ConfigError, DriverError, Tracevault, generate_init_sql

__all__ = ["cli", "server"]  # fixtures

# What Citus would refuse, by its documentation: a unique index without the distribution column, which must be hashable
# and the table's own; triggers; a table that is distributed already.
RULES = """
CREATE TABLE pg_dist_partition (logicalrelid regclass PRIMARY KEY, partkey text);
CREATE FUNCTION create_distributed_table(relation regclass, "column" text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  found record;
BEGIN
  FOR found IN
    SELECT i.indexrelid::regclass AS name FROM pg_index AS i
    WHERE i.indrelid = relation AND i.indisunique AND NOT EXISTS (
      SELECT FROM pg_attribute AS a WHERE a.attrelid = relation AND a.attname = "column" AND a.attnum = ANY (i.indkey))
  LOOP
    RAISE 'unique index % lacks the distribution column', found.name;
  END LOOP;
  IF EXISTS (SELECT FROM pg_trigger WHERE tgrelid = relation AND NOT tgisinternal) THEN
    RAISE 'triggers are not supported on distributed tables';
  END IF;
  IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = relation AND attname = "column" AND attgenerated <> '') THEN
    RAISE 'a generated column cannot be the distribution column';
  END IF;
  INSERT INTO pg_dist_partition VALUES (relation, "column");
END
$$
"""


@pytest.fixture
def cluster(dsn: str) -> str:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(RULES.encode())
    return dsn


def make(dsn: str, sql: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.encode())


def key_of(dsn: str) -> list[tuple[Any, ...]]:
    return rows(
        dsn, "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE contype = 'p' AND conname = %s", "log_pkey"
    )


@pytest.mark.parametrize(("column", "key"), [("tenant_id", "PRIMARY KEY (tenant_id, id)"), ("id", "PRIMARY KEY (id)")])
def test_the_table_can_be_distributed(cluster: str, column: str, key: str) -> None:
    sql = generate_init_sql("log", distribution_column=column)
    for _ in range(2):  # safe to run again
        make(cluster, sql)
    assert rows(cluster, "SELECT logicalrelid::text, partkey FROM pg_dist_partition") == [("log", column)]
    assert key_of(cluster) == [(key,)]


def test_the_rules_bite(cluster: str) -> None:
    make(cluster, generate_init_sql("log"))
    with pytest.raises(psycopg.Error, match="unique index log_pkey lacks the distribution column"):
        rows(cluster, "SELECT create_distributed_table('log', 'tenant_id')")


def test_such_a_table_takes_events_of_a_tenant(cluster: str, cli: Cli) -> None:
    sql = cli("init-sql", "log", "--distribution-column", "tenant_id").out
    make(cluster, sql)
    options: dict[str, Any] = {"connection_string": cluster, "scopes": {"default": "log"}}
    with Tracevault(**options, bootstrap={"ensure_schema": False}) as audit:
        receipt = audit.emit("order.paid", tenant_id="t1")
        assert audit.emit("order.paid", tenant_id="t1", id=receipt.id).id == receipt.id, "the same again is one event"
        audit.emit_many([{"event": "a", "tenant_id": "t1"}, {"event": "b", "tenant_id": "t2"}])
        audit.emit("c", tenant_id="t2", mode="async")
        audit.flush()
        assert [record.event for record in audit.query.find_many(tenant_id="t2", order="asc")] == ["b", "c"]
        assert audit.query.count() == 4
        with pytest.raises(DriverError):
            audit.emit("of.nobody")


@pytest.mark.parametrize("column", ["outcome", "data", "occurred_at", "nothing", "stored_xid", ""])
def test_other_columns_are_refused(column: str) -> None:
    with pytest.raises(ConfigError, match="`distribution_column` must be one of id, event, actor_id"):
        generate_init_sql("log", distribution_column=column)
