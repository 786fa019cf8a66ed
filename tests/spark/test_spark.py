"""The job for Spark says what we say: of the archive, of what was done to it, and of what is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyspark.sql import SparkSession

from tests.conftest import TEMPLATE, database
from tests.newest import server
from tests.sealed import Sealed
from tests.test_archive import FILTERS, log, month, populate, rewritten, verified, write_all
from tracevault import Archive, ArchiveError, Verdict
from tracevault.archive.spark import find, verify

__all__ = ["log", "server"]  # fixtures

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def spark() -> Iterator[SparkSession]:
    os.environ["PYSPARK_PYTHON"] = sys.executable
    made = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .getOrCreate()
    )
    yield made
    made.stop()


@pytest.fixture
def place(log: Sealed, tmp_path: Path) -> str:
    """All of it archived."""
    location = str(tmp_path / "archive")
    write_all(log.dsn, location)
    return location


def both(spark: SparkSession, log: Sealed, place: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reports of Spark's job and of ours, but for the time that they took."""
    theirs = verify(spark, place, keys=[str(log.key())], anchors=[str(log.anchor)])
    ours = verified(log, place)
    return theirs.as_dict() | {"seconds": 0}, ours.as_dict() | {"seconds": 0}


def test_it_verifies_what_we_verify(spark: SparkSession, log: Sealed, place: str) -> None:
    theirs, ours = both(spark, log, place)
    assert theirs == ours
    assert theirs["verdict"] == "OK"
    assert verify(spark, place).verdict is Verdict.CONSISTENT


def test_it_finds_what_was_changed(spark: SparkSession, log: Sealed, place: str) -> None:
    path = month(place)

    def change(table: Any) -> Any:
        actors = table.column("actor_id").to_pylist()
        actors[3] = "somebody"
        number = table.schema.get_field_index("actor_id")
        changed = table.set_column(number, table.schema.field(number), pyarrow.array(actors, pyarrow.string()))
        return pyarrow.concat_tables([changed.slice(0, 7), changed.slice(8)])

    rewritten(path, change)
    next(Path(place).glob("audit_logs/_proofs/2024-03-*.zip")).unlink()
    theirs, ours = both(spark, log, place)
    assert theirs == ours
    assert theirs["verdict"] == "TAMPERED"
    assert {problem["kind"] for problem in theirs["problems"]} == {"changed", "deleted", "file", "checkpoint"}


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_it_finds_what_we_find(spark: SparkSession, archived: str, filters: dict[str, Any]) -> None:
    plain = {name: value for name, value in filters.items() if name != "order"}
    with Archive(archived) as archive:
        ours = sorted((str(row.id), row.outcome, row.severity, row.error_code) for row in archive.iterate(**plain))
    try:
        rows = find(spark, archived, **plain).select("id", "outcome", "severity", "error_code").collect()
    except ArchiveError:
        rows = []
    assert sorted(map(tuple, rows)) == ours


@pytest.fixture(scope="module")
def archived(server: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An archive that no test changes."""
    location = str(tmp_path_factory.mktemp("archive"))
    with contextmanager(database)(server, TEMPLATE) as dsn:
        populate(dsn)
        write_all(dsn, location)
    return location


def test_the_job(log: Sealed, place: str) -> None:
    command = [sys.executable, "-m", "tracevault.archive.spark"]
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable}
    key = ["--key", str(log.key()), "--anchor", str(log.anchor)]
    done = subprocess.run(
        [*command, "verify", place, *key], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "OK"
    done = subprocess.run(
        [*command, "find", place, "--where", "event:odd.number"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    (line,) = done.stdout.splitlines()
    assert json.loads(json.loads(line)["data"])["n"] == 12345678901234567890.1
