"""Retention: what goes, what stays, and that a run that stopped anywhere is finished by the next."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import rows
from tests.newest import server
from tests.sealed import Sealed, Sealing
from tests.test_cli import Cli, cli
from tests.test_guards import faults
from tests.test_partitions import bounds
from tracevault import ConfigError, Tracevault, Verdict
from tracevault.cli.retention import state
from tracevault.events.ids import uuid7
from tracevault.flows.holds import make_holds, place, release
from tracevault.postgres import schema
from tracevault.postgres.failures import Place
from tracevault.postgres.partitions import ensure
from tracevault.postgres.run import run
from tracevault.postgres.schema import ensure_schema
from tracevault.schema.retention import Rule, rules
from tracevault.sealing import custody, retention

__all__ = ["cli", "server"]  # fixtures

PLACE = Place("testing")
NAMES = ("auth.login", "auth.login.failed", "auth.logout", "order.paid", "order", "tracevault.key_added", "authx")
PATTERNS = ("*", "auth.*", "auth.login", "auth.login.*", "order.paid", "tracevault.*")


def rule_of(event: str, known: tuple[Rule, ...]) -> Rule | None:
    """The model of which rule decides about an event, told by its name alone; None where it is kept."""
    if event in {"tracevault.pruned", "tracevault.erased"}:
        return None
    fitting = [
        rule
        for rule in known
        if event == rule.pattern
        or (rule.pattern.endswith(".*") and event.startswith(rule.pattern[:-1]))
        or (rule.pattern == "*" and not event.startswith("tracevault."))
    ]
    return max(fitting, key=lambda rule: (event == rule.pattern, len(rule.pattern)), default=None)


# --- the rules ---------------------------------------------------------------------------------------------


def test_the_rule_that_says_most_decides() -> None:
    known = rules({"*": "400 days", "auth.*": "90 days", "auth.login": "forever", "auth.login.*": "1 week"})

    def period(event: str) -> str | None:
        found = rule_of(event, known)
        return None if found is None else found.period

    assert period("order.paid") == "400 days"
    assert period("auth.logout") == "90 days"
    assert period("auth.login") == "forever"
    assert period("auth.login.failed") == "1 week"
    assert period("tracevault.key_added") is None
    assert period("tracevault.pruned") is None
    assert rule_of("tracevault.key_added", rules({"tracevault.*": "5 years"})) is not None
    assert rule_of("tracevault.pruned", rules({"tracevault.*": "5 years", "tracevault.pruned": "1 day"})) is None


@pytest.mark.parametrize(
    ("retain", "message"),
    [
        (7, "must be a period"),
        ({}, "must be a period"),
        ("7", 'must be a period as "400 days"'),
        ("0 days", 'must be a period as "400 days"'),
        ("-1 days", 'must be a period as "400 days"'),
        ("1 hour", 'must be a period as "400 days"'),
        ({"a*": "1 day"}, "a pattern is the name of an event"),
        ({"*.a": "1 day"}, "a pattern is the name of an event"),
        ({"": "1 day"}, "a pattern is the name of an event"),
    ],
)
def test_what_is_no_rule_is_refused(retain: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rules(retain)


# --- against a model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """An event so many days and a half old."""

    name: str
    age: int
    actor: str
    tenant: str


events = st.builds(
    Event, st.sampled_from(NAMES), st.integers(0, 200), st.sampled_from("ab"), st.sampled_from(["t", "u"])
)
policies = st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 150), min_size=1)
held = st.fixed_dictionaries(
    {}, optional={"actor_id": st.sampled_from("ab"), "tenant_id": st.sampled_from(["t", "u"])}
).filter(bool)


class Log:
    """One table, filled with events; `keep` says which of them a policy and holds keep."""

    def __init__(self, dsn: str, folder: Path, *, partitioned: bool, sealed: bool) -> None:
        self.dsn, self.table = dsn, f"log_{uuid7().hex}"
        with psycopg.connect(dsn, autocommit=True) as connection:
            ensure_schema(connection, [self.table], {self.table: "month"} if partitioned else {})
            run(connection, make_holds(), PLACE)
        folder = folder / self.table
        folder.mkdir()
        self.sealed = Sealed(dsn, folder, (self.table,)) if sealed else None

    def fill(self, many: list[Event]) -> None:
        with psycopg.connect(self.dsn) as connection, connection.cursor() as cursor:
            cursor.executemany(
                f'INSERT INTO "{self.table}" (id, event, actor_id, actor_type, tenant_id, mode, occurred_at) VALUES '
                "(gen_random_uuid(), %s, %s, 'user', %s, 'sync', now() - %s * interval '1 day' - interval '12 hours')",
                [(event.name, event.actor, event.tenant, event.age) for event in many],
            )
        if self.sealed is not None:
            self.sealed.seal()

    def hold(self, subjects: dict[str, str]) -> None:
        with psycopg.connect(self.dsn) as connection:
            run(connection, place(self.table, uuid7(), subjects, "a case"), PLACE)

    def left(self) -> list[tuple[str, int, str, str]]:
        return rows(
            self.dsn,
            "SELECT event, extract(day FROM now() - occurred_at)::int, actor_id, tenant_id "
            f'FROM "{self.table}" WHERE actor_id IS NOT NULL ORDER BY 1, 2, 3, 4',
        )

    def apply(self, retain: dict[str, str]) -> None:
        known = rules(retain)
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            planned = retention.plan_retention(connection, self.table, known)
            ids = state(self.dsn, planned, "policy")
            if self.sealed is not None:
                self.sealed.seal()
            retention.apply_retention(connection, planned, known, ids, 5.0)

    def close(self) -> None:
        if self.sealed is not None:
            self.sealed.close()

    def check(self) -> None:
        """The log is whole: every row that is missing was said to go."""
        if self.sealed is None:
            return
        self.sealed.seal()
        report = self.sealed.verify()
        assert (report.verdict, report.problems, report.unsealed) == (Verdict.OK, [], 0)


def kept(many: list[Event], retain: dict[str, int], holds: list[dict[str, str]]) -> list[tuple[str, int, str, str]]:
    """The model."""
    known = rules({pattern: f"{days} days" for pattern, days in retain.items()})
    left = []
    for event in many:
        rule = rule_of(event.name, known)
        values = {"actor_id": event.actor, "tenant_id": event.tenant}
        is_held = any(all(values[name] == value for name, value in hold.items()) for hold in holds)
        if rule is None or event.age < retain[rule.pattern] or is_held:
            left.append((event.name, event.age, event.actor, event.tenant))
    return sorted(left)


in_database = settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("partitioned", [False, True], ids=["plain", "partitioned"])
@pytest.mark.parametrize("sealed", [False, True], ids=["open", "sealed"])
@in_database
@given(many=st.lists(events, min_size=1, max_size=40), retain=policies, holds=st.lists(held, max_size=2))
def test_what_goes_is_what_the_model_says(
    dsn: str,
    tmp_path: Path,
    partitioned: bool,
    sealed: bool,
    many: list[Event],
    retain: dict[str, int],
    holds: list[dict[str, str]],
) -> None:
    policy = {pattern: f"{days} days" for pattern, days in retain.items()}
    with closing(Log(dsn, tmp_path, partitioned=partitioned, sealed=sealed)) as log:
        log.fill(many)
        if partitioned:
            _move_out_of_default(log)
        for subjects in holds:
            log.hold(subjects)
        log.apply(policy)
        assert log.left() == kept(many, retain, holds)
        log.check()
        log.apply(policy)
        assert log.left() == kept(many, retain, holds)


def _move_out_of_default(log: Log) -> None:
    with psycopg.connect(log.dsn, autocommit=True) as connection:
        ensure(connection, log.table, "month", stray=True)


class StoppedError(Exception):
    """The process ends here."""


@pytest.mark.parametrize("sealed", [False, True], ids=["open", "sealed"])
def test_a_run_that_stopped_anywhere_is_finished_by_the_next(
    dsn: str, tmp_path: Path, sealed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STEP", 3)
    monkeypatch.setattr(custody, "STEP", 3)
    many = [Event(NAMES[number % 4], number * 5 % 200, "ab"[number % 2], "tu"[number % 3 == 0]) for number in range(60)]
    retain = {"*": 100, "auth.*": 20}
    policy = {pattern: f"{days} days" for pattern, days in retain.items()}
    stops = 0
    for step in itertools.count(1, 3 if sealed else 1):  # all of them take half a minute
        with closing(Log(dsn, tmp_path, partitioned=True, sealed=sealed)) as log:
            log.fill(many)
            _move_out_of_default(log)
            log.hold({"actor_id": "a", "tenant_id": "t"})
            calls = itertools.count(1)

            def stopping(*arguments: Any, step: int = step, calls: Iterator[int] = calls) -> Any:
                if next(calls) == step:
                    raise StoppedError
                return run(*arguments)

            with monkeypatch.context() as patched:
                for module in (retention, custody, schema):
                    patched.setattr(module, "run", stopping)
                try:
                    log.apply(policy)
                except StoppedError:
                    stops += 1
                else:
                    break
            log.check()
            log.apply(policy)
            assert log.left() == kept(many, retain, [{"actor_id": "a", "tenant_id": "t"}])
            log.check()
    assert stops >= 5


# --- the commands ------------------------------------------------------------------------------------------


def test_the_commands_say_what_goes_and_remove_it(cli: Cli, dsn: str, tmp_path: Path) -> None:
    assert cli("migrate", "--dsn", dsn, "--partition", "month").code == 0
    insert = (
        "INSERT INTO audit_logs (id, event, actor_id, actor_type, mode, occurred_at) "
        "SELECT gen_random_uuid(), %s, %s, 'user', 'sync', now() - interval '500 days' FROM generate_series(1, %s)"
    )
    rows(dsn, insert, "order.paid", "u1", 5)
    rows(dsn, insert, "auth.login", "u2", 3)
    assert cli("partitions", "ensure", "--dsn", dsn).code == 0
    sealed = Sealed(dsn, tmp_path)
    sealed.seal()
    assert cli("roles", "--dsn", dsn).code == 0
    retain = ["--retain", "400 days", "--retain", "auth.*=90 days"]
    planned = json.loads(cli("retention", "plan", "--dsn", dsn, *retain, "--json").out)
    assert [(one["pattern"], one["rows"], one["held"]) for one in planned["rules"]] == [("auth.*", 3, 0), ("*", 5, 0)]
    assert len(planned["partitions"]) == 1
    added = cli("hold", "add", "--dsn", dsn, "--actor", "user/u2", "--reason", "case 4711")
    assert added.code == 0, added.err
    (hold,) = added.out.splitlines()
    assert hold in cli("hold", "list", "--dsn", dsn, "-o", "table").out
    sealed.seal()
    shown = cli("retention", "plan", "--dsn", dsn, *retain, "-o", "table").out
    assert "audit_logs: auth.*, kept 90 days: 0 rows from before " in shown
    assert "; 3 more stay, since they are held" in shown
    assert "as a whole" not in shown
    with Sealing(sealed):
        done = cli("retention", "apply", "--dsn", dsn, *retain, "--yes", "--reason", "policy 7")
    assert (done.code, done.out) == (0, "5 rows removed\n"), done.err
    assert len(bounds(dsn)) == 7
    released = cli("hold", "release", hold, "--dsn", dsn, "--reason", "closed")
    assert released.code == 0, released.err
    assert cli("hold", "release", hold, "--dsn", dsn, "--reason", "closed").code == 2
    assert cli("hold", "list", "--dsn", dsn, "-o", "table").out == "no holds\n"
    assert json.loads(cli("hold", "list", "--dsn", dsn, "--released", "--json").out)["reason"] == "case 4711"
    sealed.seal()
    with Sealing(sealed):
        done = cli("retention", "apply", "--dsn", dsn, *retain, "--yes")
    assert (done.code, done.out) == (0, "3 rows removed\n"), done.err
    assert len(bounds(dsn)) == 6, "the partition went as a whole"
    assert faults(dsn) == []
    events = [row[0] for row in rows(dsn, "SELECT event FROM audit_logs ORDER BY occurred_at, id")]
    assert events == ["tracevault.hold_placed", "tracevault.pruned", "tracevault.hold_released", "tracevault.pruned"]
    said = rows(dsn, "SELECT data FROM audit_logs WHERE event = 'tracevault.pruned' ORDER BY id LIMIT 1")[0][0]
    assert (said["rule"], said["period"], said["rows"], said["reason"]) == ("*", "400 days", 5, "policy 7")
    sealed.seal()
    report = sealed.verify()
    assert (report.verdict, report.pruned, report.problems) == (Verdict.OK, 8, [])
    assert cli("retention", "plan", "--dsn", dsn, *retain, "-o", "table").out.endswith(
        "audit_logs: nothing to remove\n"
    )
    sealed.close()


@pytest.mark.parametrize("seal", [False, True], ids=["open", "sealed"])
def test_events_of_ours_outlive_their_partition(cli: Cli, dsn: str, tmp_path: Path, seal: bool) -> None:
    assert cli("migrate", "--dsn", dsn, "--partition", "month").code == 0
    insert = (
        "INSERT INTO audit_logs (id, event, mode, occurred_at, data) VALUES (gen_random_uuid(), %s, 'sync', "
        "'2020-05-05Z', '{\"ranges\": []}')"
    )
    for event in ("order.paid", "tracevault.pruned", "order.paid", "tracevault.key_added"):
        rows(dsn, insert, event)
    assert cli("partitions", "ensure", "--dsn", dsn).code == 0
    with closing(Sealed(dsn, tmp_path)) as sealed, ExitStack() as stack:
        if seal:
            sealed.seal()
            stack.enter_context(Sealing(sealed))
        # A rule that names ours takes what was not said of prunings.
        for rule, gone in (("1 year", 2), ("tracevault.*=2 years", 1)):
            done = cli("retention", "apply", "--dsn", dsn, "--retain", rule, "--yes")
            assert (done.code, done.out) == (0, f"{gone} row{'s' * (gone > 1)} removed\n"), done.err
            assert "audit_logs_2020_05" not in dict(bounds(dsn))
        left = "SELECT tableoid::regclass::text, event FROM audit_logs WHERE occurred_at < '2021-01-01'"
        assert rows(dsn, left) == [("audit_logs_default", "tracevault.pruned")]
        stack.close()
        if seal:
            sealed.seal()
            assert sealed.verify().verdict is Verdict.OK


def test_rules_may_stand_in_the_options_of_a_program(
    cli: Cli, ready_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop_audit.py").write_text(
        'OPTIONS = {"connection_string": "host=nowhere", "scopes": {"default": {"table_name": "audit_logs", '
        '"retain": {"auth.*": "90 days"}}}}'
    )
    command = ["retention", "plan", "--dsn", ready_dsn, "-o", "table"]
    done = cli(*command, "--options", "shop_audit:OPTIONS")
    assert done.code == 0, done.err
    assert "audit_logs: auth.*, kept 90 days: 0 rows from before" in done.out
    assert cli(*command).code == 2
    assert cli(*command, "--options", "shop_audit:OPTIONS", "--retain", "1 day").code == 2
    other = cli(*command, "--table", "audit_user_events", "--options", "shop_audit:OPTIONS")
    assert (other.code, "no scope with `retain` is of table" in other.err) == (2, True)
    assert cli(*command, "--options", "shop_audit:NOTHING").code == 3
    with pytest.raises(ConfigError, match="must be a period"):
        Tracevault(connection_string="host=nowhere", scopes={"default": {"table_name": "a", "retain": "soon"}})


def test_what_is_held_is_neither_pruned_nor_erased(cli: Cli, ready_dsn: str, tmp_path: Path) -> None:
    sealed = Sealed(ready_dsn, tmp_path)
    insert = (
        "INSERT INTO audit_logs (id, event, target_id, target_type, correlation_id, mode, occurred_at, data) "
        "VALUES (gen_random_uuid(), 'a', 'u1', 'user', %s, 'sync', '2020-01-01Z', '{\"a\": 1}')"
    )
    for operation in ("c1", "c2", "c2"):
        rows(ready_dsn, insert, operation)
    sealed.seal()
    assert cli("hold", "add", "--dsn", ready_dsn, "--correlation-id", "c1", "--reason", "x").code == 0
    sealed.seal()
    with Sealing(sealed):
        done = cli("erase", "--target", "user/u1", "--reason", "y", "--yes", "--dsn", ready_dsn)
        assert (done.code, done.out) == (0, "2 rows erased\n"), done.err
        assert "1 more row stay" in done.err or "1 more row stays" in done.err
        done = cli("prune", "--before", "2021-01-01", "--yes", "--dsn", ready_dsn)
        assert (done.code, done.out) == (0, "2 rows pruned\n"), done.err
    assert rows(ready_dsn, "SELECT correlation_id, data FROM audit_logs WHERE event = 'a'") == [("c1", {"a": 1})]
    sealed.close()


def test_the_functions_refuse_a_partition_that_no_event_names(cli: Cli, dsn: str, tmp_path: Path) -> None:
    assert cli("migrate", "--dsn", dsn, "--partition", "month").code == 0
    rows(dsn, "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'a', 'sync', now())")
    sealed = Sealed(dsn, tmp_path)
    sealed.seal()
    name = rows(dsn, "SELECT tableoid::regclass::text FROM audit_logs")[0][0]
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="1 rows that no sealed and anchored event names"):
        rows(dsn, "SELECT tracevault_drop_partition('audit_logs', '{}', %s)", name)
    with pytest.raises(psycopg.errors.UndefinedTable, match="is no partition of table audit_logs"):
        rows(dsn, "SELECT tracevault_drop_partition('audit_logs', '{}', 'tracevault_leaves')")
    sealed.close()


def test_a_release_is_for_one_table(ready_dsn: str) -> None:
    id_ = uuid7()
    with psycopg.connect(ready_dsn) as connection:
        run(connection, make_holds(), PLACE)
        run(connection, place("audit_logs", id_, {"tenant_id": "t"}, "x"), PLACE)
        assert not run(connection, release("audit_user_events", id_, "y"), PLACE)
        assert run(connection, release("audit_logs", id_, "y"), PLACE)
        assert not run(connection, release("audit_logs", id_, "y"), PLACE)
