"""The archive on a Spark cluster: verified in parallel, and as a DataFrame that the filters of the table narrow.

``python -m tracevault.archive.spark verify PLACE``, with tracevault and its extra ``archive`` on every node, which all
have to reach PLACE. Spark itself is not installed with tracevault: ``pip install pyspark``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import and_, or_
from typing import Any, Unpack

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812 - as everybody calls it

from tracevault.archive.manifest import ArchiveManifest
from tracevault.archive.rows import NAMES
from tracevault.archive.search import at_path, files_of, needles
from tracevault.archive.store import Store
from tracevault.archive.verify import verify_archive
from tracevault.config import DEFAULT_TABLE, check_table_name
from tracevault.errors import ArchiveError
from tracevault.events.json_text import json_text
from tracevault.events.payload import jsonb_text
from tracevault.events.record import GENERATED_COLUMNS
from tracevault.integrity.report import Report
from tracevault.schema.filters import COUNT_FILTERS, CountFilters, Filter, check
from tracevault.schema.query_text import parse_query
from tracevault.schema.restriction import EVERYTHING
from tracevault.sealing.verify import GRACE


def verify(
    spark: SparkSession,
    location: str,
    table: str = DEFAULT_TABLE,
    *,
    keys: Sequence[str] = (),
    anchors: Sequence[str] = (),
) -> Report:
    """Verify an archive, each run in a task of its own; the report is that of ``tracevault verify --archive``.

    In each task every row is hashed anew, and the tree is made anew of the run's tiles. ``keys`` and ``anchors`` are
    those of `Scope.verify`; every node reads the anchors.
    """
    manifests = Store(location, check_table_name(table, "table")).manifests()
    if not manifests:
        raise ArchiveError(f"there is no archive of table `{table}` in {location!r}")

    def one(manifest: ArchiveManifest) -> Report:
        return verify_archive(Store(location, table), keys=keys, anchors=anchors, manifests=[manifest])

    tasks = spark.sparkContext.parallelize(manifests, len(manifests))
    return together(tasks.map(one).collect())


def together(reports: Sequence[Report]) -> Report:
    """Return one report of the runs of an archive, as if they had been verified one after the other."""
    largest = max(reports, key=lambda report: report.size)
    found = replace(largest, problems=[], problems_left_out=0, checked=0, erased=0, unsealed=0, anchor=None)
    for report in reports:
        for problem in report.problems:
            found.add(problem)
        found.problems_left_out += report.problems_left_out
        found.checked += report.checked
        found.erased += report.erased
        found.unsealed += report.unsealed
        found.seconds = max(found.seconds, report.seconds)
    anchored = [report.anchor for report in reports if report.anchor is not None]
    if len(anchored) == len(reports):
        found.anchor = max(anchored, key=lambda one: one.size)
    found.conclude(GRACE)
    return found


def find(spark: SparkSession, location: str, table: str = DEFAULT_TABLE, **filters: Unpack[CountFilters]) -> DataFrame:
    """Return the archived events for which the filters hold, with the columns of the table; payloads are JSON text."""
    checked = check(filters, COUNT_FILTERS, "find")
    store = Store(location, check_table_name(table, "table"))
    files = [store.full(file.path) for file in files_of(store.manifests(), checked)]
    if not files:
        raise ArchiveError(f"there is nothing of table `{table}` of that time in {location!r}")
    # Which times a file has, its manifest says; its folder need not.
    plain = spark.read.option("recursiveFileLookup", "true").parquet(*files).select(*NAMES)
    taken = [
        F.expr(f"nullif(trim(BOTH ' ' FROM get_json_object(data, '$.{'.'.join(stored.column.generated)}')), '')").alias(
            stored.name
        )
        for stored in GENERATED_COLUMNS
        if stored.column.generated is not None
    ]
    events = plain.select("*", *taken)
    conditions = [_condition(name, COUNT_FILTERS[name], value) for name, value in checked.items() if value is not False]
    return events.where(reduce(and_, conditions)) if conditions else events


def _condition(name: str, spec: Filter, value: Any) -> Column:
    column = F.col(spec.columns[0] if spec.columns else "event")
    match spec.kind:
        case "flag":
            return F.expr(spec.sql or "")
        case "prefix":
            return column.startswith(value)
        case "list":
            return column.isin(value)
        case "columns":
            return reduce(and_, (F.col(each).isNull() for each in value))
        case "paths" | "key":
            looked_at = F.udf(at_path, "boolean", useArrow=False)
            return reduce(
                and_,
                (column.contains(text) & looked_at(column, F.lit(wanted)) for text, wanted in needles(spec, value)),
            )
        case "words":
            return reduce(and_, map(_holds, value))
        case "time":
            return column >= F.lit(value) if name == "since" else column <= F.lit(value)
        case _:
            return column == F.lit(value)


def _holds(word: str) -> Column:
    plain, _payloads = EVERYTHING.searched()
    places = ((plain, word), (["data", "meta"], jsonb_text(word)[1:-1]))
    return reduce(
        or_,
        (F.lower(F.concat_ws("\n", *columns)).contains(F.lower(F.lit(text))) for columns, text in places),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; return the exit code: that of ``tracevault verify``, or 0."""
    parser = argparse.ArgumentParser(prog="tracevault.archive.spark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verifying = commands.add_parser("verify", help="hash every row anew, and compare")
    verifying.add_argument("--key", action="append", default=[], help="the log's verifier key; repeatable")
    verifying.add_argument("--anchor", action="append", default=[], help="a checkpoint from outside; repeatable")
    finding = commands.add_parser("find", help="print events as JSON Lines")
    finding.add_argument("--where", default="", help="a query text: `event:auth.* actor:user/42`")
    for command in (verifying, finding):
        command.add_argument("place")
        command.add_argument("--table", default=DEFAULT_TABLE)
    given = parser.parse_args(arguments)
    spark = SparkSession.builder.appName("tracevault").getOrCreate()
    if given.command == "verify":
        report = verify(spark, given.place, given.table, keys=given.key, anchors=given.anchor)
        _say(report.as_dict())
        return int(report.verdict.value)
    filters: Mapping[str, Any] = parse_query(given.where) if given.where else {}
    for line in find(spark, given.place, given.table, **filters).toJSON().toLocalIterator():
        sys.stdout.write(f"{line}\n")
    return 0


def _say(value: Any) -> None:
    sys.stdout.write(f"{json_text(value)}\n")


if __name__ == "__main__":
    sys.exit(main())
