"""Records that the database refuses for what they are: they alone become dead letters."""

from __future__ import annotations

import itertools
import time
from uuid import uuid4

import pytest

from tests.faults.ledger import VacuousError
from tests.faults.server import ROLE
from tests.faults.supervisor import Scenario, Victim
from tracevault.writer.delivery import PROBE_INTERVAL

GOOD = 256
_CHECK = "ALTER TABLE audit_logs ADD CONSTRAINT refuse CHECK (tenant_id IS NULL)"
_MEND = "ALTER TABLE audit_logs DROP CONSTRAINT refuse"
# What makes PostgreSQL refuse a row with a tenant, by the SQLSTATE that it says then.
POISON = {
    "22P02": "ALTER TABLE audit_logs ADD parsed integer GENERATED ALWAYS AS (tenant_id::integer) STORED",
    "22001": "ALTER TABLE audit_logs ALTER tenant_id TYPE varchar(3)",
    "23502": "ALTER TABLE audit_logs ADD flag boolean NOT NULL "
    "GENERATED ALWAYS AS (CASE WHEN tenant_id IS NULL THEN true END) STORED",
    "23514": _CHECK,
    "54000": "CREATE FUNCTION huge(varchar) RETURNS text LANGUAGE sql IMMUTABLE AS "
    "$$ SELECT string_agg(md5(n::text), '') FROM generate_series(1, 300) AS n WHERE $1 IS NOT NULL $$; "
    "CREATE INDEX ON audit_logs (huge(tenant_id))",
    "P0001": "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN IF NEW.tenant_id IS NOT NULL THEN RAISE EXCEPTION 'refused'; END IF; RETURN NEW; END $$; "
    "CREATE TRIGGER refuse BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION refuse()",
}


def given_up(scenario: Scenario) -> dict[str, str]:
    """Return the tokens that were given to `on_error`, with the error."""
    return {token: entry.given_up for token, entry in scenario.ledger.entries.items() if entry.given_up}


def write_at_once(scenario: Scenario, poison: int) -> tuple[Victim, list[str], int]:
    """Have 256 good events, and so many refused ones somewhere among them, written by one statement at first.

    Returns the victim, the tokens of the refused ones, and how often a write was answered.
    """
    proxy = scenario.proxy()
    victim = scenario.victim(dsn=scenario.through(proxy), async_batch_size=2 * GOOD)
    proxy.refuse()
    places = sorted(scenario.random.sample(range(GOOD), poison))
    tokens: list[str] = []
    for start, end in itertools.pairwise([0, *places, GOOD]):
        if end > start:
            victim.do("emit", count=end - start)
        if end < GOOD:
            tokens += victim.do("emit", tenant_id="poison")
    proxy.open()
    scenario.drained(victim)
    return victim, tokens, proxy.attempts


@pytest.mark.parametrize("state", POISON)
def test_one_poisonous_row(scenario: Scenario, state: str) -> None:
    """One of 257 is refused: it alone is dead, and that costs two round trips at most."""
    scenario.server.sql(POISON[state], dbname=scenario.dbname)
    victim, tokens, attempts = write_at_once(scenario, 1)
    stats = victim.stats()
    assert victim.finish() == 0
    assert (stats["dead"], stats["poison"], stats["delivered"]) == (1, 1, GOOD), stats
    assert given_up(scenario) == {tokens[0]: f"DriverError {state}"}
    assert "was refused" not in victim.log.read_text()
    print(f"{attempts} writes answered")
    if attempts < 2:
        raise VacuousError("nothing was refused")
    assert attempts <= 1 + 2
    scenario.check(dead=tokens, acknowledged=GOOD + 1, poison=1)


def test_every_row_is_poison(scenario: Scenario) -> None:
    """After three the lane is paused, and the rest kept; once the table is mended, it is delivered."""
    server, dbname = scenario.server, scenario.dbname
    server.sql(_CHECK, dbname=dbname)
    proxy = scenario.proxy()
    victim = scenario.victim(dsn=scenario.through(proxy))
    victim.do("emit", count=100, threads=2, tenant_id="poison")
    scenario.until(lambda: victim.stats()["lanes"] == {"default": "paused"}, 10, victim.tail)
    attempts = proxy.attempts
    time.sleep(2 * PROBE_INTERVAL + 1)
    if not 2 <= proxy.attempts - attempts <= 3:
        raise VacuousError(f"{proxy.attempts - attempts} attempts in two intervals")
    stats = victim.stats()
    assert (stats["dead"], stats["spooled"], stats["lanes"]) == (3, 97, {"default": "paused"}), stats
    server.sql(_MEND, dbname=dbname)
    began = time.monotonic()
    scenario.drained(victim, within=PROBE_INTERVAL + 2)
    print(f"{stats}, delivered after {time.monotonic() - began:.1f} s")
    assert victim.finish() == 0
    assert victim.log.read_text().count("in a row were refused") == 1
    scenario.check(dead=given_up(scenario), acknowledged=100, poison=3)


def test_poison_in_front(scenario: Scenario) -> None:
    """Five refused ones before fifty good ones: the lane is paused after three, and finds out what is good."""
    scenario.server.sql(_CHECK, dbname=scenario.dbname)
    proxy = scenario.proxy()
    victim = scenario.victim(dsn=scenario.through(proxy))
    proxy.refuse()
    poison = victim.do("emit", count=5, tenant_id="poison")
    victim.do("emit", count=50)
    proxy.open()
    scenario.drained(victim, within=6 * PROBE_INTERVAL)
    assert victim.finish() == 0
    if "in a row were refused" not in victim.log.read_text():
        raise VacuousError("it was not paused")
    assert sorted(given_up(scenario)) == sorted(poison)
    scenario.check(dead=poison, acknowledged=55, poison=5)


@pytest.mark.parametrize("reads", [True, False], ids=["may read", "may only insert"])
def test_the_same_id_again(scenario: Scenario, reads: bool) -> None:
    """With the same content it is delivered, and stored once; with other content it is an error, or a dead letter."""
    if not reads:
        scenario.server.sql(f"REVOKE SELECT ON audit_logs FROM {ROLE}", dbname=scenario.dbname)
    victim = scenario.victim()
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ids = [str(uuid4()) for _ in range(4)]
    modes = itertools.product(("sync", "async"), repeat=2)
    refused = []
    for id_, (first, second) in zip(ids, modes, strict=True):
        (token,) = victim.do("emit", id=id_, mode=first, occurred_at=moment)
        victim.do("flush")
        victim.do("emit", token=token, id=id_, mode=second, occurred_at=moment)
        # Among others, so that a batch has to be taken apart.
        victim.do("emit", count=10)
        refused += victim.do("emit", id=id_, mode=second)
        victim.do("emit", count=10)
        victim.do("flush")
    stats = victim.stats()
    assert victim.finish() == 0
    lost = given_up(scenario)
    assert list(lost) == [refused[1], refused[3]]
    assert {error.split()[0] for error in lost.values()} == {"DuplicateIdError"}
    assert scenario.ledger.errors() == {"DuplicateIdError": 2}
    assert (stats["dead"], stats["raised"], stats["delivered"]) == (2, 2, 8 + 80), stats
    assert scenario.rows() == 4 + 80
    scenario.check(dead=refused, clock=False, acknowledged=80)
