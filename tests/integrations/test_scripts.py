"""Examples that are no servers: started as a user would, and what is in the database then."""

from __future__ import annotations

from tests.conftest import rows
from tests.docs.test_snippets import url as url_of
from tests.integrations.conftest import run_example


def test_alembic(dsn: str) -> None:
    url = url_of(dsn)
    run_example("alembic", "alembic", "upgrade", "head", url=url)
    tables = rows(
        dsn, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY 1"
    )
    assert [name for (name,) in tables] == ["alembic_version", "audit_logs", "audit_user_events", "products"]
    assert "No new upgrade operations detected" in run_example("alembic", "alembic", "check", url=url)
    assert "CREATE TABLE" in run_example("alembic", "alembic", "upgrade", "head", "--sql", url=url)
    run_example("alembic", "alembic", "downgrade", "base", url=url)
    assert rows(dsn, "SELECT count(*) FROM audit_logs") == [(0,)]


def test_asyncpg(ready_dsn: str, url: str) -> None:
    run_example("asyncpg", "python", "transfer.py", "ann", "bea", "30", url=url)
    printed = run_example("asyncpg", "python", "transfer.py", "ann", "bea", "500", url=url)
    assert printed.splitlines()[1] == "money.transferred {'amount': 30}"
    assert rows(ready_dsn, "SELECT owner, money FROM accounts ORDER BY 1") == [("ann", 70), ("bea", 130)]
    assert rows(ready_dsn, "SELECT event, actor_id, target_id, outcome FROM audit_logs ORDER BY id") == [
        ("money.transferred", "ann", "bea", None),
        ("transfer.denied", "ann", None, "failure"),
    ]


def test_logging(ready_dsn: str, url: str) -> None:
    printed = run_example("logging", "python", "app.py", "bea", url=url).splitlines()
    assert printed[0].startswith(
        "WARNING tracevault.events: legacy.noted actor=user/bea target=doc/7 severity=warning id="
    )
    assert printed[1] == "WARNING shop.audit: deleted document 7"
    assert printed[2].startswith("INFO tracevault.events: doc.deleted actor=user/bea target=doc/7 id=")
    assert rows(
        ready_dsn, "SELECT event, actor_id, target_id, data #>> '{extra,password}' FROM audit_logs ORDER BY id"
    ) == [
        ("legacy.noted", "bea", "7", "[REDACTED]"),
        ("doc.deleted", "bea", "7", None),
    ]
