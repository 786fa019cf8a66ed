"""The archive: what goes there is proven there, is found there, and comes back as it was."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pyarrow
import pytest
from pyarrow import parquet

from tests.conftest import TEMPLATE, database, rows
from tests.newest import server
from tests.rows import fill
from tests.sealed import Sealed, Sealing
from tests.test_cli import Cli, cli
from tests.test_partitions import bounds
from tracevault import Archive, ArchiveError, ConfigError, Tracevault, ValidationError, Verdict
from tracevault.archive import write
from tracevault.archive.rows import batch_of
from tracevault.archive.store import Store
from tracevault.archive.verify import verify_archive
from tracevault.archive.write import archive
from tracevault.flows.archive import hold_archive
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run

__all__ = ["cli", "server"]  # fixtures

PLACE = Place("testing")
BEFORE = datetime(2025, 1, 1, tzinfo=UTC)
EVERYTHING = (
    "SELECT id, event, actor_id, actor_type, target_id, target_type, data::text, meta::text, mode, occurred_at::text, "
    "created_at::text, correlation_id, request_id, environment, outcome, error_code, severity, tenant_id, trace_id, "
    "span_id, stored_xid::text, payload_salt FROM audit_logs WHERE occurred_at < '2025-01-01' "
    "AND NOT starts_with(event, 'tracevault.') ORDER BY occurred_at, id"
)
ODD = """
INSERT INTO audit_logs (id, event, actor_id, actor_type, mode, occurred_at, created_at, data, meta, payload_salt)
VALUES
 ('00000000-0000-4000-8000-000000000001', 'odd.number', 'Ångström 🐦', '', 'sync', '2024-02-29T23:59:59.999999Z',
  'infinity', '{"n": 12345678901234567890.10, "": null, "é": "\\u0001"}', NULL, gen_random_uuid()),
 ('00000000-0000-4000-8000-000000000002', 'odd.null', NULL, NULL, 'async', '2024-03-01Z', '-infinity', NULL,
  '{"a": {"b": [1, "x", true]}}', NULL),
 ('ffffffff-ffff-ffff-ffff-ffffffffffff', 'odd.early', NULL, NULL, 'sync', '0001-01-01Z', '4713-01-01 BC', NULL, NULL,
  gen_random_uuid()),
 ('00000000-0000-4000-8000-000000000003', 'odd.edge', NULL, NULL, 'sync', '2025-01-01Z', now(), NULL, NULL, NULL)"""


def populate(dsn: str, count: int = 600) -> None:
    """Rows of 2024, about 20 a day, and odd ones."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        fill(connection, count, start=datetime(2024, 1, 20, tzinfo=UTC), step=4_000_000)
        connection.execute(ODD.encode())


@pytest.fixture
def log(ready_dsn: str, tmp_path: Path) -> Iterator[Sealed]:
    populate(ready_dsn)
    with closing(Sealed(ready_dsn, tmp_path)) as sealed:
        sealed.seal()
        yield sealed


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "archive")


def write_all(dsn: str, place: str, before: datetime = BEFORE) -> write.Written:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return archive(connection, "audit_logs", before, Store(place, "audit_logs"))


def verified(log: Sealed, place: str, *, anchored: bool = True) -> Any:
    anchors = [str(log.anchor)] if anchored else []
    return verify_archive(Store(place, "audit_logs"), keys=[str(log.key())], anchors=anchors)


# --- there and back ----------------------------------------------------------------------------------------


def test_what_is_archived_is_proven_there(log: Sealed, place: str) -> None:
    written = write_all(log.dsn, place)
    count = rows(log.dsn, "SELECT count(*) FROM audit_logs WHERE occurred_at < '2025-01-01'")[0][0]
    assert (sum(one.rows for one in written.manifests), written.left_out) == (count, 0)
    months = [(one.start.year, one.start.month) for one in written.manifests]
    assert months == [(1, 1), (2024, 1), (2024, 2), (2024, 3)]
    report = verified(log, place)
    assert (report.verdict, report.checked, report.problems) == (Verdict.OK, count, [])
    assert report.anchor.size == report.size
    assert verified(log, place, anchored=False).verdict is Verdict.CONSISTENT
    again = write_all(log.dsn, place)
    assert again.manifests == []


@pytest.mark.parametrize("partitioned", [False, True], ids=["plain", "partitioned"])
def test_what_goes_there_comes_back_as_it_was(
    cli: Cli, dsn: str, tmp_path: Path, place: str, partitioned: bool
) -> None:
    options = ["--partition", "month"] if partitioned else []
    assert cli("migrate", "--dsn", dsn, *options).code == 0
    populate(dsn)
    if partitioned:
        assert cli("partitions", "ensure", "--dsn", dsn).code == 0
    with closing(Sealed(dsn, tmp_path)) as log:
        log.seal()
        with Sealing(log):
            assert cli("erase", "--target", "order/product_4729", "--reason", "x", "--yes", "--dsn", dsn).code == 0
        before = rows(dsn, EVERYTHING)
        assert any(row[6] is None and row[21] is None and row[4] == "product_4729" for row in before), (
            "nothing was erased"
        )
        log.seal()
        key = ["--key", str(log.key())]
        with Sealing(log):
            done = cli("archive", "--before", "2025-01-01", "--to", place, "--detach", "--yes", *key, "--dsn", dsn)
        assert done.code == 0, done.err
        assert rows(dsn, EVERYTHING) == []
        log.seal()
        report = log.verify()
        assert (report.verdict, report.pruned, report.problems) == (Verdict.OK, len(before), [])
        assert verified(log, place).verdict is Verdict.OK
        if partitioned:
            assert not any("2024" in name for name, _ in bounds(dsn))
        back = cli("restore", "--from", place, *key, "--dsn", dsn)
        assert (back.code, back.out) == (0, f"{len(before)} rows restored\n"), back.err
        assert rows(dsn, EVERYTHING) == before
        log.seal()
        report = log.verify()
        assert (report.verdict, report.pruned, report.problems, report.unsealed) == (Verdict.OK, 0, [], 0)
        assert report.checked + report.erased == report.size
        if partitioned:
            assert rows(dsn, "SELECT count(*) FROM audit_logs_default WHERE occurred_at > '2024-01-01'") == [(0,)]
        assert cli("restore", "--from", place, *key, "--dsn", dsn).out == "0 rows restored\n"
        events = rows(
            dsn, "SELECT event, count(*)::int FROM audit_logs WHERE starts_with(event, 'tracevault.') GROUP BY 1"
        )
        assert dict(events) == {
            "tracevault.archived": len(Store(place, "audit_logs").manifests()),
            "tracevault.erased": 1,
            "tracevault.pruned": 1,
            "tracevault.restored": 1,
        }


def test_what_is_erased_later_does_not_come_back(log: Sealed, cli: Cli, place: str) -> None:
    write_all(log.dsn, place)
    erased = "SELECT data, meta, payload_salt FROM audit_logs WHERE target_id = 'product_4729'"
    assert rows(log.dsn, erased)[0][0] is not None
    with Sealing(log):
        assert cli("erase", "--target", "order/product_4729", "--reason", "x", "--yes", "--dsn", log.dsn).code == 0
        done = cli("archive", "--before", "2025-01-01", "--to", place, "--detach", "--yes", "--dsn", log.dsn)
        assert done.code == 0, done.err
    assert rows(log.dsn, erased) == []
    back = cli("restore", "--from", place, "--dsn", log.dsn)
    assert (back.code, back.out) == (0, "603 rows restored\n"), back.err
    assert rows(log.dsn, erased) == [(None, None, None)]
    log.seal()
    report = log.verify()
    assert (report.verdict, report.erased, report.problems) == (Verdict.OK, 1, [])


def test_a_part_comes_back(log: Sealed, cli: Cli, place: str) -> None:
    with Sealing(log):
        done = cli("archive", "--before", "2025-01-01", "--to", place, "--detach", "--yes", "--dsn", log.dsn)
    assert done.code == 0, done.err
    back = cli("restore", "--from", place, "--since", "2024-01-25", "--before", "2024-01-26T12:00Z", "--dsn", log.dsn)
    assert back.code == 0, back.err
    span = "SELECT min(occurred_at) >= '2024-01-25', max(occurred_at) < '2024-01-26T12:00Z', count(*) > 20 "
    assert rows(log.dsn, span + "FROM audit_logs WHERE occurred_at < '2025-01-01'") == [(True, True, True)]
    assert cli("restore", "--from", place, "--since", "2029-01-01", "--dsn", log.dsn).code == 3


def test_what_comes_late_is_archived_by_the_next_run(log: Sealed, place: str) -> None:
    write_all(log.dsn, place)
    insert = (
        "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), %s, 'sync', '2024-02-02Z')"
    )
    rows(log.dsn, insert, "late")
    assert write_all(log.dsn, place).left_out == 1
    log.seal()
    (manifest,) = write_all(log.dsn, place).manifests
    assert (manifest.rows, f"{manifest.start:%Y-%m}") == (1, "2024-02")
    assert verified(log, place).verdict is Verdict.OK
    with Archive(place) as found:
        assert found.count(event="late") == 1


@pytest.mark.parametrize("sealed", [False, True], ids=["open", "sealed"])
def test_what_is_younger_stays_though_it_is_archived(
    cli: Cli, ready_dsn: str, tmp_path: Path, place: str, sealed: bool
) -> None:
    populate(ready_dsn)
    with ExitStack() as stack:
        if sealed:
            log = stack.enter_context(closing(Sealed(ready_dsn, tmp_path)))
            log.seal()
            stack.enter_context(Sealing(log))
        command = ["archive", "--to", place, "--dsn", ready_dsn]
        assert cli(*command, "--before", "2024-02-15").code == 0
        done = cli(*command, "--before", "2024-02-05", "--detach", "--yes")
        assert done.code == 0, done.err
    oldest = "SELECT min(occurred_at) >= '2024-02-05', count(*) FILTER (WHERE occurred_at < '2024-02-15') > 100 "
    assert rows(ready_dsn, oldest + "FROM audit_logs WHERE NOT starts_with(event, 'tracevault.')") == [(True, True)]


def test_nothing_goes_because_of_the_archive_of_another_log(
    log: Sealed, cli: Cli, server: str, tmp_path: Path, place: str
) -> None:
    for other in database(server, TEMPLATE):
        populate(other)
        (tmp_path / "other").mkdir()
        with closing(Sealed(other, tmp_path / "other")) as forged:
            forged.seal()
            write_all(other, place)
    done = cli("archive", "--before", "2025-01-01", "--to", place, "--detach", "--yes", "--dsn", log.dsn)
    assert (done.code, "has a checkpoint of another log" in done.err) == (3, True), done.err
    assert rows(log.dsn, "SELECT count(*) FROM audit_logs WHERE event <> 'tracevault.archived'") == [(604,)]


def test_held_rows_stay_in_the_table(log: Sealed, cli: Cli, place: str) -> None:
    assert cli("hold", "add", "--dsn", log.dsn, "--actor", "user/user_2919", "--reason", "x").code == 0
    log.seal()
    with Sealing(log):
        done = cli("archive", "--before", "2025-01-01", "--to", place, "--detach", "--yes", "--dsn", log.dsn)
    assert done.code == 0, done.err
    assert "1 archived row held back by legal holds" in done.err
    left = rows(log.dsn, "SELECT actor_id FROM audit_logs WHERE occurred_at < '2025-01-01'")
    assert left == [("user_2919",)]
    log.seal()
    assert log.verify().verdict is Verdict.OK


@pytest.mark.parametrize("partitioned", [False, True], ids=["plain", "partitioned"])
def test_a_table_that_nobody_sealed_is_archived_as_well(cli: Cli, dsn: str, place: str, partitioned: bool) -> None:
    options = ["--partition", "month"] if partitioned else []
    assert cli("migrate", "--dsn", dsn, *options).code == 0
    populate(dsn)
    before = rows(dsn, EVERYTHING)
    first = cli("archive", "--before", "2024-02-01", "--to", place, "--dsn", dsn)
    assert first.code == 0, first.err
    assert json.loads(cli("verify", "--archive", place, "--json").out)["verdict"] == "CONSISTENT"
    shown = cli("verify", "--archive", place, "-o", "table")
    assert (shown.code, "260 rows in files as their manifests say; nobody sealed them" in shown.out) == (4, True)
    rows(
        dsn,
        "INSERT INTO audit_logs (id, event, mode, occurred_at) VALUES (gen_random_uuid(), 'a', 'sync', '2024-01-30')",
    )
    done = cli("archive", "--before", "2025-01-01", "--to", place, "--detach", "--yes", "--dsn", dsn)
    assert done.code == 0, done.err
    assert rows(dsn, EVERYTHING) == []
    back = cli("restore", "--from", place, "--dsn", dsn)
    assert back.out == f"{len(before) + 1} rows restored\n", back.err
    assert [row for row in rows(dsn, EVERYTHING) if row[1] != "a"] == before


def test_a_run_that_stopped_leaves_nothing_that_counts(
    log: Sealed, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "GROUP_ROWS", 50)
    monkeypatch.setattr(write, "FILE_ROWS", 100)
    calls = 0
    real = batch_of

    def stopping(group: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:  # in the middle of a file
            raise RuntimeError("the process ends here")
        return real(group)

    monkeypatch.setattr(write, "batch_of", stopping)
    with pytest.raises(RuntimeError):
        write_all(log.dsn, place)
    assert not list(Path(place).rglob("*.part"))
    done = Store(place, "audit_logs").manifests()
    assert verified(log, place).verdict is Verdict.OK
    write_all(log.dsn, place)
    after = Store(place, "audit_logs").manifests()
    assert len(after) > len(done)
    assert len([file for one in after for file in one.files]) > len(after), "no month has two files"
    count = rows(log.dsn, "SELECT count(*) FROM audit_logs WHERE occurred_at < '2025-01-01'")[0][0]
    report = verified(log, place)
    assert (report.verdict, report.checked) == (Verdict.OK, count)


def test_a_row_that_was_changed_is_not_archived(log: Sealed, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with psycopg.connect(log.dsn) as connection:
        connection.execute("ALTER TABLE audit_logs DISABLE TRIGGER ALL")
        connection.execute("UPDATE audit_logs SET actor_id = 'other' WHERE correlation_id = 'op_50'")
    monkeypatch.setattr(write, "GROUP_ROWS", 50)
    with pytest.raises(ArchiveError, match="is not as it was sealed as leaf"):
        write_all(log.dsn, place)
    assert not list(Path(place).rglob("*.part")), "the file that was begun is still there"


def test_an_object_store_is_a_place_too(log: Sealed, cli: Cli) -> None:
    place = "memory://bucket/audit"
    written = write_all(log.dsn, place)
    assert verified(log, place).verdict is Verdict.OK
    with Archive(place) as found:
        assert found.count() == sum(one.rows for one in written.manifests)
    done = cli("find", "--archive", place, "--event", "odd.number", "--json")
    assert json.loads(done.out)["data"]["n"] == 12345678901234567890.1, done.err
    Store(place, "audit_logs").filesystem.rm("/bucket", recursive=True)


def test_what_cannot_be_is_refused(log: Sealed, cli: Cli, place: str, tmp_path: Path) -> None:
    done = cli("archive", "--before", "2999-01-01", "--to", place, "--dsn", log.dsn)
    assert (done.code, "is in the future" in done.err) == (2, True)
    with pytest.raises(ArchiveError, match="there is no archive of table `audit_logs`"):
        Archive(place)
    assert cli("verify", "--archive", place).code == 3
    with pytest.raises(ConfigError, match="takes the log's verifier key"):
        verify_archive(Store(place, "audit_logs"), anchors=["x"])
    (tmp_path / "file").touch()
    with pytest.raises(ArchiveError, match="cannot be"):
        write_all(log.dsn, str(tmp_path / "file"))
    write_all(log.dsn, place)
    (manifest, *_) = Path(place).glob("audit_logs/_manifests/*.json")
    manifest.write_text("{}")
    with pytest.raises(ArchiveError, match="is no manifest"):
        Archive(place)


# --- whoever changes it is found ---------------------------------------------------------------------------


def month(place: str, name: str = "year=2024/month=01") -> Path:
    """The file of a month."""
    (found,) = Path(place).glob(f"audit_logs/{name}/*.parquet")
    return found


def rewritten(path: Path, change: Any) -> None:
    table = parquet.read_table(path, partitioning=None)
    parquet.write_table(change(table), path, compression="zstd")


@pytest.mark.parametrize(
    "column",
    ["id", "occurred_at", "created_at", "event", "actor_id", "tenant_id", "data", "meta", "leaf"],
)
def test_one_value_that_was_changed_is_found_by_its_row(log: Sealed, place: str, column: str) -> None:
    write_all(log.dsn, place)
    path = month(place)
    chosen = parquet.read_table(path, partitioning=None).slice(7, 1).to_pylist()[0]

    def change(table: Any) -> Any:
        values = table.column(column).to_pylist()
        new = {
            "id": "00000000-0000-4000-8000-00000000000f",
            "occurred_at": datetime(2024, 1, 22, tzinfo=UTC),
            "created_at": datetime(2024, 1, 22, tzinfo=UTC),
            "leaf": chosen["leaf"] + 1,
            "tenant_id": "t" if values[7] is None else None,
        }.get(column, '{"a": 1}' if column in ("data", "meta") else "x")
        values[7] = new
        field = table.schema.field(column)
        return table.set_column(table.schema.get_field_index(column), field, pyarrow.array(values, field.type))

    rewritten(path, change)
    report = verified(log, place)
    assert report.verdict is Verdict.TAMPERED
    named = {problem.index for problem in report.problems if problem.kind == "changed"}
    assert chosen["leaf"] in named or chosen["leaf"] + 1 in named
    assert len(named) <= 2
    assert [problem.kind for problem in report.problems].count("file") == 1


def test_rows_that_are_missing_doubled_or_of_another_time_are_found(log: Sealed, place: str) -> None:
    write_all(log.dsn, place)
    path = month(place)
    whole = path.read_bytes()
    leaves = parquet.read_table(path, partitioning=None).column("leaf").to_pylist()
    rewritten(path, lambda table: pyarrow.concat_tables([table.slice(0, 3), table.slice(4)]))
    report = verified(log, place)
    assert leaves[3] in {problem.index for problem in report.problems if problem.kind == "deleted"}
    path.write_bytes(whole)
    rewritten(path, lambda table: pyarrow.concat_tables([table, table.slice(2, 1)]))
    assert leaves[2] in {problem.index for problem in verified(log, place).problems if problem.kind == "changed"}
    path.write_bytes(month(place, "year=2024/month=02").read_bytes())
    assert "is not of the month of" in str(verified(log, place).problems)
    path.write_bytes(whole[:-1])
    report = verified(log, place)
    assert any("cannot be read" in problem.detail for problem in report.problems)
    path.unlink()
    assert {problem.kind for problem in verified(log, place).problems} == {"deleted"}
    path.write_bytes(whole)
    assert verified(log, place).verdict is Verdict.OK


def test_other_hashes_need_another_checkpoint(log: Sealed, place: str, tmp_path: Path) -> None:
    write_all(log.dsn, place)
    (zipped,) = Path(place).glob("audit_logs/_proofs/2024-01-*.zip")
    (named,) = Path(place).glob("audit_logs/_manifests/2024-01-*.json")
    whole, manifest = zipped.read_bytes(), named.read_bytes()

    def tiles(change: Any) -> None:
        zipped.write_bytes(whole)
        with zipfile.ZipFile(zipped) as opened:
            content = {name: opened.read(name) for name in opened.namelist()}
        change(content)
        with zipfile.ZipFile(zipped, "w") as made:
            for name, data in content.items():
                made.writestr(name, data)
        said = json.loads(manifest)
        said["proof"]["sha256"] = Store(place, "audit_logs").digest(f"_proofs/{zipped.name}")[1]
        named.write_text(json.dumps(said))

    tiles(lambda content: content.update({"tile/0/000": bytes(8192)}))
    assert "is not what the tile above it says" in str(verified(log, place).problems)
    tiles(lambda content: content.pop("tile/1/000.p/2"))
    assert "lacks tile/1/000.p/2" in str(verified(log, place).problems)
    tiles(lambda content: content.update({"checkpoint": b"other"}))
    assert "its checkpoint is not the manifest's" in str(verified(log, place).problems)
    tiles(lambda content: content.update({"tile/0/000": bytes(8191)}))
    assert "tile/0/000 in the zip of tiles is not of 256 hashes" in str(verified(log, place).problems)
    zipped.write_bytes(b"no zip")
    assert "the zip of tiles cannot be read" in str(verified(log, place).problems)
    zipped.unlink()
    report = verified(log, place)
    assert (report.verdict, {problem.kind for problem in report.problems}) == (Verdict.TAMPERED, {"checkpoint"})
    zipped.write_bytes(whole)
    # A checkpoint that somebody else signed.
    said = json.loads(manifest)
    said["proof"]["checkpoint"] = said["proof"]["checkpoint"].replace("\n\n", "\n\n— other.example/x AAAA")
    named.write_text(json.dumps(said))
    assert verified(log, place).verdict is Verdict.TAMPERED
    named.write_bytes(manifest)
    assert verified(log, place).verdict is Verdict.OK
    # All of it by the owner of another log.
    other = tmp_path / "other"
    other.mkdir()
    with closing(Sealed(log.dsn, other)) as forged:
        report = verify_archive(Store(place, "audit_logs"), keys=[str(forged.key())])
    assert report.verdict is Verdict.TAMPERED


def test_the_log_tells_which_manifests_it_has(log: Sealed, cli: Cli, place: str) -> None:
    write_all(log.dsn, place, datetime(2024, 2, 1, tzinfo=UTC))  # by a process that died before it told
    assert cli("archive", "--before", "2025-01-01", "--to", place, "--verify", "--dsn", log.dsn).code == 0
    told = rows(
        log.dsn, "SELECT data->>'manifest', data->>'sha256' FROM audit_logs WHERE event = 'tracevault.archived'"
    )
    store = Store(place, "audit_logs")
    assert {(path, store.digest(path)[1]) for path, _ in told} == set(told)
    assert len(told) == len(store.manifests()) == 4
    assert cli("archive", "--before", "2025-01-01", "--to", place, "--dsn", log.dsn).code == 0
    assert rows(log.dsn, "SELECT count(*) FROM audit_logs WHERE event = 'tracevault.archived'") == [(4,)]


def test_two_runs_do_not_archive_at_once(log: Sealed, cli: Cli, place: str) -> None:
    with psycopg.connect(log.dsn, autocommit=True) as other:
        assert run(other, hold_archive("audit_logs"), PLACE)
        done = cli("archive", "--before", "2025-01-01", "--to", place, "--dsn", log.dsn)
        assert (done.code, "is being archived by another run" in done.err) == (3, True)
    assert cli("archive", "--before", "2025-01-01", "--to", place, "--dsn", log.dsn).code == 0


# --- it is read as the table is ----------------------------------------------------------------------------

FILTERS: list[dict[str, Any]] = [
    {},
    {"event": "auth.login"},
    {"events": ["auth.login", "odd.null"]},
    {"event_prefix": "auth."},
    {"event_prefix": "odd"},
    {"actor_id": "Ångström 🐦"},
    {"actor_ids": ["user_2919", "user_838"]},
    {"actor_type": "user"},
    {"target_id": "product_4729"},
    {"target_type": "order"},
    {"correlation_id": "op_7"},
    {"request_id": "req_7"},
    {"tenant_id": "tenant_7"},
    {"tenant_ids": ["tenant_7", "tenant_8"]},
    {"trace_id": "67e6caec1be0a604a3a43e9c33ba30a0"},
    {"environment": "staging"},
    {"mode": "async"},
    {"outcome": "failure"},
    {"error_code": "E3"},
    {"severity": "critical"},
    {"severities": ["critical", "error"]},
    {"errors_only": True},
    {"errors_only": False},
    {"data": {"payment.currency": "CHF"}},
    {"data": {"price": 7}},
    {"data": {"price": 7.0, "payment.currency": "EUR"}},
    {"data": {"price": "7"}},
    {"data": {"n": 12345678901234567890}},
    {"data": {"é": "\x01"}},
    {"data": {"payment": "EUR"}},
    {"meta": {"a.b.0": 1}},
    {"meta": {"ip": "10.0.7.7"}},
    {"changed": "price"},
    {"changed": "other"},
    {"text": "CHF failure", "since": "2024-01-01"},
    {"text": "Ångström", "since": "2024-01-01"},
    {"text": "100%_\\", "since": "2024-01-01"},
    {"is_null": ["tenant_id", "span_id"]},
    {"is_null": ["data"]},
    {"since": "2024-01-25", "until": "2024-01-26"},
    {"since": "2024-01-25T00:00:00.000001+02:00"},
    {"until": "2024-01-22", "order": "asc"},
]


@pytest.fixture(scope="module")
def both(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A database, and a place that has all of it archived."""
    place = str(tmp_path_factory.mktemp("archive"))
    with contextmanager(database)(server, TEMPLATE) as dsn:
        populate(dsn)
        write_all(dsn, place, datetime(2026, 1, 1, tzinfo=UTC))
        yield dsn, place


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_filters_are_those_of_the_table(both: tuple[str, str], filters: dict[str, Any]) -> None:
    dsn, place = both
    plain = {name: value for name, value in filters.items() if name != "order"}
    with Tracevault(connection_string=dsn) as audit, Archive(place) as found:
        assert found.count(**plain) == audit.query.count(**plain)
        here, there = audit.query.find_page(limit=7, **filters), found.find_page(limit=7, **filters)
        assert there.rows == here.rows
        assert (there.next_cursor is None) == (here.next_cursor is None)
        while there.next_cursor is not None:
            assert here.next_cursor is not None
            here = audit.query.find_page(limit=100, **filters, cursor=here.next_cursor)
            there = found.find_page(limit=100, **filters, cursor=there.next_cursor)
            assert there.rows == here.rows


def test_an_archive_refuses_what_the_table_refuses(both: tuple[str, str]) -> None:
    with Archive(both[1]) as found:
        with pytest.raises(ValidationError, match="is not a filter"):
            found.find_page(colour="red")  # type: ignore[call-arg]
        with pytest.raises(ValidationError, match="needs `since`"):
            found.count(text="x")
        with pytest.raises(ValidationError):
            found.find_page(cursor="nonsense")
        assert found.find_by_id("00000000-0000-4000-8000-000000000009") is None
        record = found.find_by_id("00000000-0000-4000-8000-000000000001")
        assert record is not None
        assert (record.event, record.created_at) == ("odd.number", datetime.max.replace(tzinfo=UTC))
        assert len(list(found.iterate(page_size=100))) == found.count()
        assert found.verify().verdict is Verdict.CONSISTENT
        assert next(row.event for row in found.iterate(order="asc", event_prefix="odd.")) == "odd.early"


def test_the_command_finds_in_the_archive_and_in_the_table_at_once(log: Sealed, cli: Cli, place: str) -> None:
    all_of_them = rows(log.dsn, "SELECT id::text FROM audit_logs ORDER BY occurred_at DESC, id DESC")
    with Sealing(log):
        done = cli("archive", "--before", "2024-02-01", "--to", place, "--detach", "--yes", "--dsn", log.dsn)
    assert done.code == 0, done.err
    # Something is in both, since it was not detached.
    assert cli("archive", "--before", "2024-02-05", "--to", place, "--dsn", log.dsn).code == 0
    rows(log.dsn, "SELECT 1")
    ids: list[str] = []
    more: list[str] = []
    while True:
        command = ["find", "--archive", place, "--live", "--limit", "100", "--until", "2025-06-01", "--json"]
        page = cli(*command, *more, "--dsn", log.dsn)
        assert page.code == 0, page.err
        ids += [json.loads(line)["id"] for line in page.out.splitlines()]
        if "--cursor" not in page.err:
            break
        more = ["--cursor", page.err.split("--cursor ")[1].strip()]
    assert ids == [id_ for (id_,) in all_of_them]
    alone = cli("find", "--archive", place, "--where", "event:odd.number", "-o", "table")
    assert (alone.code, "odd.number" in alone.out) == (0, False), "February was not archived up to its end"
    assert cli("find", "--live", "--dsn", log.dsn).code == 2
    assert cli("find", "--archive", place, "--offset", "3").code == 2
    shutil.rmtree(place)
    assert cli("find", "--archive", place).code == 3
