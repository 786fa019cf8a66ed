"""``tracevault roles``: what each role may do then, and what `doctor` says of roles that may do more."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.conftest import rows
from tests.docs.test_snippets import _PATH
from tests.faces import OpenVault
from tests.sealed import Sealed, Sealing
from tests.servers import one_server
from tests.test_cli import Cli, cli, findings
from tests.test_custody import fill
from tests.test_ddl import in_schema
from tests.test_guards import INSERT, PARTITIONED
from tracevault import DuplicateIdError, Verdict, generate_init_sql
from tracevault.postgres import schema
from tracevault.schema.rights import VAULT_RIGHTS, identifier
from tracevault.schema.trees import tree_statements

__all__ = ["cli"]  # the fixture

NO_DDL = {"ensure_schema": False}
KINDS = ("writer", "reader", "sealer", "custodian", "tenant-reader")
VAULT = "".join(f"CREATE TABLE {name} (tree int);" for name in VAULT_RIGHTS)
CUSTODY = "".join(
    f"CREATE FUNCTION {name}(reason text) RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1';"
    for name in ("tracevault_prune", "tracevault_erase")
)


class Names(dict[str, str]):
    """A name for each kind of role."""

    @property
    def options(self) -> list[str]:
        return [word for kind, name in self.items() for word in (f"--{kind}", name)]

    def login(self, dsn: str, kind: str) -> str:
        """A connection string of this role, which may log in from now on."""
        rows(dsn, f"ALTER ROLE {identifier(self[kind])} LOGIN")
        return make_conninfo(dsn, user=self[kind])


@pytest.fixture
def make_names(server: str, ready_dsn: str) -> Iterator[Callable[..., Names]]:
    """Makes names of roles that nobody has yet; the roles are dropped in the end."""
    made: list[str] = []

    def make(*kinds: str, odd: str = "") -> Names:
        names = Names({kind: f"{kind[:6]}{odd}_{uuid4().hex[:8]}" for kind in kinds or KINDS})
        made.extend(names.values())
        return names

    yield make
    for name in made:
        if rows(ready_dsn, "SELECT FROM pg_roles WHERE rolname = %s", name):
            rows(ready_dsn, f"DROP OWNED BY {identifier(name)} CASCADE")
            rows(ready_dsn, f"DROP ROLE {identifier(name)}")


MakeNames = Callable[..., Names]


def refused(dsn: str, *statements: str) -> None:
    for statement in statements:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            rows(dsn, statement)


# --- what the command does ----------------------------------------------------------------------------------


def test_it_says_what_it_does_and_does_it_once(cli: Cli, ready_dsn: str, make_names: MakeNames) -> None:
    names = make_names()
    command = ["roles", "--dsn", ready_dsn, *names.options, "--table", "audit_logs", "--table", "audit_user_events"]
    rows(ready_dsn, f"{VAULT} {CUSTODY} GRANT SELECT, UPDATE (data) ON audit_logs TO PUBLIC")
    planned = cli(*command, "--check")
    assert planned.code == 1
    assert rows(ready_dsn, "SELECT FROM pg_roles WHERE rolname = ANY(%s)", list(names.values())) == []
    done = cli(*command)
    assert (done.code, done.out, done.err) == (0, planned.out, "")
    lines = done.out.splitlines()
    for name in names.values():
        assert f"create role {name}, NOLOGIN and without a password" in lines
    for line in (
        "audit_logs: set the guard (UPDATE and DELETE are not guarded)",
        "audit_user_events: set the guard (TRUNCATE is not guarded)",
        "audit_logs: revoke SELECT, UPDATE (data) on audit_logs from PUBLIC",
        f"audit_logs: grant INSERT (16 columns) on audit_logs to {names['writer']}",
        f"audit_logs: grant INSERT, SELECT, UPDATE on tracevault_tiles to {names['sealer']}",
        "audit_logs: revoke EXECUTE on tracevault_prune from PUBLIC",
        f"audit_logs: grant EXECUTE on tracevault_erase to {names['custodian']}",
        f"audit_user_events: grant SELECT on audit_user_events_tenant to {names['tenant-reader']}",
    ):
        assert line in lines
    nothing = "audit_logs: nothing to do\naudit_user_events: nothing to do\n"
    assert cli(*command, "--check") == (0, nothing, "")
    assert cli(*command) == (0, nothing, "")
    query = "SELECT rolcanlogin, rolpassword IS NULL FROM pg_authid WHERE rolname = ANY(%s)"
    assert set(rows(ready_dsn, query, list(names.values()))) == {(False, True)}


def test_what_is_too_much_is_taken_away(cli: Cli, ready_dsn: str, make_names: MakeNames) -> None:
    rows(ready_dsn, PARTITIONED + VAULT + CUSTODY)
    names = make_names("writer", "reader")
    command = ["roles", "--dsn", ready_dsn, *names.options]
    assert cli(*command).code == 0
    writer, reader = names["writer"], names["reader"]
    rows(
        ready_dsn,
        f"GRANT INSERT, UPDATE (data) ON audit_logs TO {writer}; GRANT DELETE ON audit_2026_05 TO {reader};"
        f"GRANT SELECT ON audit_logs TO {reader} WITH GRANT OPTION; GRANT ALL ON tracevault_leaves TO {writer};"
        f"GRANT EXECUTE ON FUNCTION tracevault_prune TO {writer}; GRANT TRUNCATE ON audit_2026 TO PUBLIC;"
        f"GRANT INSERT (stored_xid) ON audit_logs TO {writer}",
    )
    rows(ready_dsn, f"SET ROLE {reader}; GRANT SELECT ON audit_logs TO {writer}")
    checked = cli(*command, "--check")
    assert checked.code == 1
    texts = checked.out.splitlines()
    assert f"audit_logs: revoke INSERT, SELECT, UPDATE (data) on audit_logs from {writer}" in texts
    assert f"audit_logs: revoke DELETE on audit_2026_05 from {reader}" in texts
    assert f"audit_logs: revoke SELECT WITH GRANT OPTION on audit_logs from {reader}" in texts
    assert f"audit_logs: revoke EXECUTE on tracevault_prune from {writer}" in texts
    assert "audit_logs: revoke TRUNCATE on audit_2026 from PUBLIC" in texts
    assert cli(*command).code == 0
    assert cli(*command, "--check") == (0, "audit_logs: nothing to do\n", "")
    refused(names.login(ready_dsn, "writer"), "SELECT FROM audit_logs", "DELETE FROM tracevault_leaves")


def test_the_script_does_the_same_again_and_again(
    cli: Cli, ready_dsn: str, make_names: MakeNames, tmp_path: Path
) -> None:
    names = make_names(odd="'s \"$tracevault$\\")
    rows(ready_dsn, PARTITIONED + VAULT + CUSTODY)
    printed = cli("roles", "--sql", *names.options)
    assert (printed.code, printed.err) == (0, "")
    psql = shutil.which("psql", path=_PATH)
    assert psql, "the embedded server's package has one"
    for _ in range(2):
        done = subprocess.run(
            [psql, "--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", *connecting(ready_dsn)],
            input=printed.out,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert cli("roles", "--check", "--dsn", ready_dsn, *names.options).out == "audit_logs: nothing to do\n"


def connecting(dsn: str) -> list[str]:
    given = conninfo_to_dict(dsn)
    words = {"host": "--host", "port": "--port", "user": "--username", "dbname": "--dbname"}
    return [f"{words[key]}={value}" for key, value in given.items() if key in words]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--writer", "public"], "PostgreSQL's own"),
        (["--reader", "none"], "PostgreSQL's own"),
        (["--sealer", "pg_write_all_data"], "PostgreSQL's own"),
        (["--custodian", ""], "1 to 63 bytes"),
        (["--writer", "é" * 32], "1 to 63 bytes"),
        (["--writer", "a", "--tenant-reader", "a"], "`--tenant-reader`"),
        (["--sql", "--check"], "exclude each other"),
        (["--table", "a b"], "`--table`"),
    ],
)
def test_bad_options_are_refused(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli("roles", "--dsn", "postgresql://127.0.0.1:1/log", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


@one_server
def test_a_role_that_may_do_anything_is_refused(
    cli: Cli, ready_dsn: str, make_names: MakeNames, tmp_path: Path
) -> None:
    names = make_names("owner", "member")
    owner, member = names.values()
    rows(
        ready_dsn, f"CREATE ROLE {owner}; CREATE ROLE {member} IN ROLE {owner}; ALTER TABLE audit_logs OWNER TO {owner}"
    )
    superuser = rows(ready_dsn, "SELECT current_user::text")[0][0]
    for name in (owner, member, superuser):
        for arguments in (["--check"], []):
            done = cli("roles", "--dsn", ready_dsn, "--writer", name, *arguments)
            assert done.code == 3
            assert "choose another role" in done.err
        script = cli("roles", "--sql", "--writer", name).out
        with pytest.raises(psycopg.errors.RaiseException, match="may do anything"):
            rows(ready_dsn, script)
    assert rows(ready_dsn, "SELECT FROM pg_trigger WHERE tgname LIKE 'tracevault%%'") == []


@one_server
def test_it_needs_the_table_and_its_owner(cli: Cli, ready_dsn: str, make_names: MakeNames) -> None:
    names = make_names("writer", "nobody")
    rows(ready_dsn, f"CREATE ROLE {names['nobody']} LOGIN")
    done = cli("roles", "--dsn", ready_dsn, "--table", "absent")
    assert done.code == 3
    assert "run `tracevault migrate --table absent` first" in done.err
    done = cli("roles", "--dsn", make_conninfo(ready_dsn, user=names["nobody"]), "--writer", names["writer"])
    assert done.code == 3
    assert "as the owner of the tables" in done.err
    assert rows(ready_dsn, "SELECT FROM pg_roles WHERE rolname = %s", names["writer"]) == []


@one_server
def test_a_right_that_it_cannot_revoke_is_named(cli: Cli, ready_dsn: str, make_names: MakeNames) -> None:
    names = make_names("writer", "grantor")
    writer, grantor = names.values()
    rows(ready_dsn, f"CREATE ROLE {writer}; CREATE ROLE {grantor}")
    rows(ready_dsn, f"GRANT SELECT ON audit_logs TO {grantor} WITH GRANT OPTION")
    rows(ready_dsn, f"SET ROLE {grantor}; GRANT SELECT ON audit_logs TO {writer}")
    done = cli("roles", "--dsn", ready_dsn, "--writer", writer)
    assert done.code == 1
    assert f"not done: audit_logs: revoke SELECT on audit_logs from {writer}" in done.err
    assert f"audit_logs: grant INSERT (16 columns) on audit_logs to {writer}" in done.out.splitlines()
    assert "revoke" not in done.out
    assert cli("roles", "--dsn", ready_dsn, "--writer", writer, "--reader", grantor).code == 0


@one_server
def test_functions_of_another_owner_are_not_the_custodian_s(cli: Cli, ready_dsn: str, make_names: MakeNames) -> None:
    names = make_names("custodian", "owner")
    custodian, owner = names.values()
    rows(ready_dsn, f"CREATE ROLE {owner} LOGIN; {CUSTODY}")
    rows(ready_dsn, f"ALTER TABLE audit_logs OWNER TO {owner}; ALTER SCHEMA public OWNER TO {owner}")
    command = ["roles", "--dsn", ready_dsn, "--custodian", custodian]
    assert "EXECUTE" not in cli(*command).out
    rows(ready_dsn, f"ALTER FUNCTION tracevault_prune OWNER TO {owner}")
    done = cli(*command)
    assert f"audit_logs: grant EXECUTE on tracevault_prune to {custodian}" in done.out
    assert "tracevault_erase" not in done.out
    query = "SELECT has_function_privilege(%s, %s, 'EXECUTE')"
    assert rows(ready_dsn, query, custodian, "tracevault_prune(text)") == [(True,)]
    assert rows(ready_dsn, "SELECT proacl IS NULL FROM pg_proc WHERE proname = 'tracevault_erase'") == [(True,)]


@one_server
def test_the_owner_needs_no_superuser(cli: Cli, ready_dsn: str, make_names: MakeNames) -> None:
    names = make_names("owner", *KINDS)
    owner = names.pop("owner")
    rows(ready_dsn, f"CREATE ROLE {owner} LOGIN CREATEROLE; ALTER SCHEMA public OWNER TO {owner}")
    rows(ready_dsn, f"ALTER TABLE audit_logs OWNER TO {owner}; ALTER FUNCTION audit_logs_compare OWNER TO {owner}")
    own = make_conninfo(ready_dsn, user=owner)
    rows(own, VAULT + CUSTODY)
    assert cli("roles", "--dsn", own, *names.options).code == 0
    assert cli("roles", "--check", "--dsn", own, *names.options) == (0, "audit_logs: nothing to do\n", "")


def test_it_waits_for_writers_without_stopping_them(cli: Cli, ready_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "PATIENCE", 0.0)
    with psycopg.connect(ready_dsn) as writer:
        writer.execute(INSERT.format("audit_logs").encode())
        done = cli("roles", "--dsn", ready_dsn)
    assert done.code == 3
    assert "run `tracevault roles` again when it has ended" in done.err
    assert cli("roles", "--dsn", ready_dsn).code == 0


# --- what each role may do then -----------------------------------------------------------------------------


def test_the_writer_writes_in_every_way_and_nothing_else(
    face: OpenVault, cli: Cli, ready_dsn: str, make_names: MakeNames
) -> None:
    names = make_names("writer")
    assert cli("roles", "--dsn", ready_dsn, *names.options).code == 0
    writer = names.login(ready_dsn, "writer")
    lost: list[Any] = []
    vault = face(connection_string=writer, on_error=lambda *args: lost.append(args))
    event = {"event": "a", "id": uuid4(), "data": {"n": 1}, "tenant_id": "t"}
    vault.emit(event)
    vault.emit(event)
    vault.emit_many([{"event": "b", "data": {"n": n}} for n in range(50)])
    vault.emit_many([event, "c"])
    for _ in range(50):
        vault.emit("d", mode="async")
    vault.emit(event, mode="async")
    vault.flush()
    connection = vault.connect(writer)
    vault.emit("e", connection=connection.vault)
    connection.commit()
    connection.close()
    with pytest.raises(DuplicateIdError):
        vault.emit({**event, "data": {"n": 2}})
    assert lost == []
    assert rows(ready_dsn, "SELECT event, count(*) FROM audit_logs GROUP BY 1 ORDER BY 1") == [
        *(("a", 1), ("b", 50), ("c", 1), ("d", 50), ("e", 1))
    ]
    assert rows(ready_dsn, "SELECT count(*) FROM audit_logs WHERE stored_xid IS NULL OR payload_salt IS NULL") == [(0,)]
    refused(
        writer,
        "SELECT id FROM audit_logs",
        "UPDATE audit_logs SET event = 'x'",
        "DELETE FROM audit_logs",
        "TRUNCATE audit_logs",
        *(
            INSERT.format("audit_logs").replace("(id,", f"({column}, id,").replace("(gen", f"({value}, gen", 1)
            for column, value in (("stored_xid", "'1'"), ("created_at", "now()"), ("payload_salt", "gen_random_uuid()"))
        ),
    )
    done = cli("doctor", "--dsn", writer)
    warned = [text for level, text in findings(done) if level == "warn" and "audit_logs" in text]
    assert warned == ["audit_logs: not sealed, so whoever may change it leaves no trace"]
    assert ("ok", "audit_logs: guards refuse UPDATE, DELETE and TRUNCATE") in findings(done)


def test_reader_sealer_and_custodian(cli: Cli, ready_dsn: str, make_names: MakeNames) -> None:
    names = make_names()
    rows(ready_dsn, VAULT + CUSTODY + INSERT.format("audit_logs"))
    assert cli("roles", "--dsn", ready_dsn, *names.options).code == 0
    users = {kind: names.login(ready_dsn, kind) for kind in KINDS}
    changes = ("UPDATE audit_logs SET event = 'x'", "DELETE FROM audit_logs", "TRUNCATE audit_logs")
    for user in users.values():
        refused(user, *changes)
    for kind in ("reader", "sealer", "custodian"):
        assert rows(users[kind], "SELECT count(*) FROM audit_logs")[0][0] >= 1
    refused(users["reader"], INSERT.format("audit_logs"), "INSERT INTO tracevault_leaves VALUES (1)")
    refused(users["writer"], "SELECT FROM tracevault_leaves")
    for kind in ("sealer", "custodian"):
        rows(users[kind], INSERT.format("audit_logs"))
    rows(users["sealer"], "INSERT INTO tracevault_leaves VALUES (1); UPDATE tracevault_tiles SET tree = 1")
    refused(users["sealer"], "UPDATE tracevault_leaves SET tree = 2", "DELETE FROM tracevault_tiles")
    call = "SELECT tracevault_prune('x'), tracevault_erase('x')"
    assert rows(users["custodian"], call) == [(1, 1)]
    for kind in ("writer", "reader", "sealer", "tenant-reader"):
        refused(users[kind], call)


def test_sealing_verifying_pruning_and_erasing_each_by_its_role(
    cli: Cli, ready_dsn: str, make_names: MakeNames, tmp_path: Path
) -> None:
    names = make_names()
    log = Sealed(ready_dsn, tmp_path)
    log.seal()  # as the owner, which makes the vault's tables
    assert cli("roles", "--dsn", ready_dsn, *names.options).code == 0
    assert rows(ready_dsn, "SELECT count(*) FROM tracevault_trees") == [(1,)]
    log.sealer.close()
    log.dsn = names.login(ready_dsn, "sealer")
    log.sealer = log.another()
    fill(names.login(ready_dsn, "writer"))
    assert log.seal() == 30
    custodian = names.login(ready_dsn, "custodian")
    with Sealing(log):
        done = cli("prune", "--before", "2021-01-01", "--reason", "r", "--yes", "--dsn", custodian)
        assert (done.code, done.out) == (0, "15 rows pruned\n"), done.err
        done = cli("erase", "--target", "user/u1", "--reason", "r", "--yes", "--dsn", custodian)
        assert (done.code, done.out) == (0, "5 rows erased\n"), done.err
    log.dsn = names.login(ready_dsn, "reader")
    report = log.verify()
    assert (report.verdict, report.pruned, report.erased, report.problems) == (Verdict.OK, 15, 5, [])
    log.close()


def test_a_tenant_s_reader_sees_one_tenant(cli: Cli, ready_dsn: str, make_names: MakeNames) -> None:
    names = make_names("tenant-reader")
    command = ["roles", "--dsn", ready_dsn, *names.options]
    assert cli(*command).code == 0
    insert = "INSERT INTO audit_logs (id, event, mode, occurred_at, tenant_id) SELECT gen_random_uuid(), 'e', 'sync'"
    rows(ready_dsn, f"{insert}, now(), t FROM unnest(ARRAY['a', 'a', 'b', '', NULL]) AS t")
    reader = names.login(ready_dsn, "tenant-reader")
    refused(
        reader, "SELECT FROM audit_logs", "UPDATE audit_logs_tenant SET event = 'x'", "DELETE FROM audit_logs_tenant"
    )
    query = "SELECT count(*) FROM audit_logs_tenant"
    assert rows(reader, query) == [(0,)]
    with psycopg.connect(reader, autocommit=True) as connection:
        for tenant, count in (("a", 2), ("b", 1), ("", 0), ("c", 0)):
            connection.execute("SELECT set_config('tracevault.tenant_id', %s, false)", (tenant,))
            assert connection.execute(query.encode()).fetchall() == [(count,)]
            # What a reader adds to the query sees no other row, be it by an error or by a notice.
            leak = "SELECT count(*) FROM audit_logs_tenant WHERE 1 / CASE WHEN tenant_id = 'b' THEN 0 ELSE 1 END = 1"
            if tenant != "b":
                assert connection.execute(leak.encode()).fetchall() == [(count,)]
    columns = rows(ready_dsn, "SELECT * FROM audit_logs_tenant LIMIT 0")
    assert columns == []


@pytest.mark.parametrize(
    "view",
    [
        "SELECT * FROM audit_logs",
        "SELECT 1 AS one",
        "{same}",
        "{query} OR event = 'x'",
    ],
)
@one_server
def test_another_view_in_its_place_is_replaced(cli: Cli, ready_dsn: str, make_names: MakeNames, view: str) -> None:
    command = ["roles", "--dsn", ready_dsn, *make_names("tenant-reader").options]
    assert cli(*command).code == 0
    ((query,),) = rows(ready_dsn, "SELECT pg_get_viewdef('audit_logs_tenant')")
    query = query.rstrip(";")
    rows(
        ready_dsn,
        f"DROP VIEW audit_logs_tenant; CREATE VIEW audit_logs_tenant AS {view.format(same=query, query=query)}",
    )
    assert "audit_logs: replace view audit_logs_tenant" in cli(*command, "--check").out
    assert cli(*command).code == 0
    assert cli(*command, "--check").code == 0


def test_in_a_schema_of_its_own(cli: Cli, ready_dsn: str, make_names: MakeNames) -> None:
    elsewhere = in_schema(ready_dsn, "Odd one")
    rows(elsewhere, generate_init_sql("Select") + VAULT + CUSTODY)
    names = make_names()
    assert cli("roles", "--dsn", elsewhere, "--table", "Select", *names.options).code == 0
    assert cli("roles", "--check", "--dsn", elsewhere, "--table", "Select", *names.options).code == 0
    rows(names.login(elsewhere, "writer"), INSERT.format('"Select"'))
    refused(names.login(elsewhere, "sealer"), 'DELETE FROM "Select"')


# --- doctor -------------------------------------------------------------------------------------------------


def test_doctor_names_who_may_do_too_much(cli: Cli, ready_dsn: str, make_names: MakeNames) -> None:
    rows(ready_dsn, PARTITIONED + "".join(f"{statement};" for statement in tree_statements()) + CUSTODY)
    names = make_names("app", "member", "owner")
    app, member, owner = names.values()
    for name in names.values():
        rows(ready_dsn, f"CREATE ROLE {name}")
    rows(
        ready_dsn,
        f"GRANT INSERT, UPDATE (data), TRIGGER ON audit_logs TO {app}; GRANT {app} TO {member};"
        f"GRANT TRUNCATE ON audit_2026_05 TO PUBLIC; GRANT DELETE ON tracevault_leaves TO {app};"
        f"ALTER TABLE audit_logs OWNER TO {owner}; GRANT {owner} TO {member};"
        f"ALTER TABLE tracevault_tiles OWNER TO {app}; ALTER FUNCTION tracevault_prune OWNER TO {owner};"
        f"ALTER FUNCTION tracevault_erase OWNER TO {owner}; GRANT EXECUTE ON FUNCTION tracevault_erase TO {app}",
    )
    done = cli("doctor", "--dsn", ready_dsn)
    report = findings(done)
    assert done.code == 0
    for text in (
        "audit_logs and 2 more: UPDATE and DELETE are not guarded",
        "audit_logs and 2 more: TRUNCATE is not guarded",
        f"audit_logs: {app} may TRIGGER, UPDATE (data), and so may its members {member}",
        f"audit_logs: {app} has INSERT on all columns, so it may set created_at, stored_xid, payload_salt, "
        f"and so may its members {member}",
        "audit_2026_05: PUBLIC may TRUNCATE",
        f"tracevault_tiles: it belongs to {app} and not to the owner of audit_logs, so he may change it",
        f"tracevault_leaves: {app} may DELETE, and so may its members {member}",
        "tracevault_prune: PUBLIC may EXECUTE",
        f"tracevault_erase: PUBLIC, {app} may run it; one role should, the custodian",
        f"audit_logs: {member} may act as its owner, and so change what is stored",
    ):
        assert ("warn", text) in report
    assert f"REVOKE TRIGGER, UPDATE (data) ON public.audit_logs FROM {app}" in done.out
    assert "REVOKE EXECUTE ON FUNCTION tracevault_prune(text) FROM PUBLIC" in done.out
    for line in done.out.splitlines():
        if line.strip().startswith("REVOKE"):
            rows(ready_dsn, line.strip())
    rows(ready_dsn, f"REVOKE {owner} FROM {member}; REVOKE INSERT ON audit_logs FROM {app}")
    rows(ready_dsn, f"ALTER TABLE tracevault_tiles OWNER TO {owner}")
    assert cli("roles", "--dsn", ready_dsn).code == 0
    report = findings(cli("doctor", "--dsn", ready_dsn))
    assert ("ok", "audit_logs: no grant is more than it should be") in report
    assert ("ok", "audit_logs: guards refuse UPDATE, DELETE and TRUNCATE") in report


def test_doctor_says_so_where_all_is_well(cli: Cli, ready_dsn: str, make_names: MakeNames) -> None:
    names = make_names()
    rows(ready_dsn, VAULT + CUSTODY)
    assert cli("roles", "--dsn", ready_dsn, *names.options).code == 0
    report = findings(cli("doctor", "--dsn", names.login(ready_dsn, "writer")))
    assert [text for level, text in report if level != "ok" and "read" not in text and "fsync" not in text] == []
    assert ("ok", "audit_logs: no grant is more than it should be") in report
