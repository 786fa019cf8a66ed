"""What ``tracevault doctor`` looks at. Each check asks, and yields findings with what to do about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

import psycopg
from psycopg import Connection

from tracevault import DriverError, MigrationError, __version__
from tracevault.cli.output import number, size, span
from tracevault.events.record import INSERT_COLUMNS
from tracevault.flows import Flow, Query
from tracevault.flows.convert import unfinished
from tracevault.flows.migrate import Plan
from tracevault.flows.partitions import ahead
from tracevault.flows.partitions import look as look_at_partitions
from tracevault.flows.roles import look_at_grants, members
from tracevault.flows.seal import find_tree, receipts, standing, tables_exist
from tracevault.postgres.failures import Place
from tracevault.postgres.run import run
from tracevault.postgres.schema import migration_plan
from tracevault.schema.comparison import RIGHTS, signature
from tracevault.schema.partitions import interval_of
from tracevault.schema.rights import UNSETTABLE, Thing, described, shown

_OLDEST_SERVER = 140_000
_SKEW = timedelta(seconds=1)
_CHANGES = ("UPDATE", "DELETE", "TRUNCATE")


class Finding(NamedTuple):
    """One line of the report, and what to do."""

    level: Literal["ok", "warn", "FAIL"]
    text: str
    advice: str = ""


def _migrate(table: str) -> str:
    return f"run `tracevault migrate --table {table}`"


def _ask(connection: Connection[Any], sql: str, *params: Any) -> tuple[Any, ...]:
    def flow() -> Flow[tuple[Any, ...]]:
        result = yield Query(sql, params)
        return result.rows[0]

    return run(connection, flow(), Place("asking the server"))


def check_driver() -> Iterator[Finding]:
    """Say which psycopg this is: its C build, or the slower one in Python."""
    implementation = psycopg.pq.__impl__
    text = f"tracevault {__version__}, psycopg {psycopg.__version__} ({implementation})"
    if implementation == "python":
        yield Finding("warn", f"{text}, which is slower than its C build", 'pip install "tracevault[binary]"')
    else:
        yield Finding("ok", text)


def check_server(connection: Connection[Any]) -> Iterator[Finding]:
    """Check version, encoding, durability, and that the server takes writes."""
    number, version, database, role, standby, encoding, fsync, commit, read_only = _ask(
        connection,
        "SELECT current_setting('server_version_num')::int, current_setting('server_version'), "
        "current_database()::text, current_user::text, pg_is_in_recovery(), current_setting('server_encoding'), "
        "current_setting('fsync'), current_setting('synchronous_commit'), current_setting('transaction_read_only')",
    )
    yield Finding("ok", f"connected to database {database} as {role}")
    if number < _OLDEST_SERVER:
        yield Finding("FAIL", f"PostgreSQL {version} is too old", "use PostgreSQL 14 or later")
    else:
        yield Finding("ok", f"PostgreSQL {version}")
    if encoding != "UTF8":
        yield Finding("FAIL", f"the database's encoding is {encoding}", "make a database with ENCODING 'UTF8'")
    if standby:
        yield Finding("FAIL", "this server is a standby, so nothing can be written", "connect to the primary")
    elif read_only == "on":
        yield Finding("FAIL", "transactions are read-only here", "use a role without default_transaction_read_only")
    if "off" in {fsync, commit}:
        setting = "fsync" if fsync == "off" else "synchronous_commit"
        yield Finding("warn", f"{setting} is off: events reported as stored can be lost in a crash", "set it to on")


def check_clock(connection: Connection[Any]) -> Iterator[Finding]:
    """Compare this machine's clock, which sets ``occurred_at``, with the server's, which sets ``created_at``."""
    before = datetime.now(UTC)
    (server,) = _ask(connection, "SELECT clock_timestamp()")
    after = datetime.now(UTC)
    # The server looked at its clock at some moment between the two.
    skew = max(server - after, before - server, timedelta())
    if skew > _SKEW:
        ahead = "ahead of" if server > after else "behind"
        text = f"the server's clock is {skew.total_seconds():.1f} s {ahead} this machine's"
        yield Finding("warn", text, "synchronise both with NTP: events are ordered by the machine's")
    else:
        yield Finding("ok", "this machine's clock and the server's agree")


def check_table(connection: Connection[Any], table: str, *, reads: bool) -> Iterator[Finding]:
    """Check one table and the role's rights on it; ``reads``: the role reads as well."""
    try:
        (plan,) = migration_plan(connection, [table])
    except MigrationError as error:
        yield Finding("FAIL", str(error))
        return
    if not plan.state.exists:
        yield Finding("FAIL", f"{table}: there is no such table here", _migrate(table))
        return
    yield from _check_version(plan)
    yield from _check_rights(connection, plan, reads=reads)
    yield from _check_access(connection, table)


def _check_version(plan: Plan) -> Iterator[Finding]:
    state = plan.state
    migrate = _migrate(state.name)
    columns, indexes = plan.pending("rewrite", "columns"), plan.pending("index")
    if columns:
        yield Finding("FAIL", f"{state.name}: {'; '.join(change.summary for change in columns)}", migrate)
    if indexes:
        text = f"{state.name}: {len(indexes)} indexes are missing or old, so that queries are slow"
        yield Finding("warn", text, migrate)
    if plan.pending("function"):
        text = f"{state.name}: its function is missing or old, so that a role without SELECT cannot confirm a retry"
        yield Finding("warn", text, migrate)
    if plan.done:
        rows = "" if state.rows is None else f"~{state.rows:,} rows, "
        yield Finding("ok", f"{state.name}: up to date ({rows}{size(state.size_bytes)})")


def _check_rights(connection: Connection[Any], plan: Plan, *, reads: bool) -> Iterator[Finding]:
    table = plan.state.name
    rights, role, owner, superuser = _rights(connection, table)
    if "INSERT" not in rights:
        yield Finding("FAIL", f"{table}: {role} may not INSERT", f"{_roles(table)}, with --writer and this role")
    if "SELECT" not in rights and reads:
        text = f"{table}: {role} may not SELECT, and reads use this connection"
        yield Finding("FAIL", text, f'GRANT SELECT ON "{table}" TO {role}')
    elif "SELECT" not in rights and not _ask(connection, RIGHTS, table, signature(table))[-1]:
        text = f"{table}: {role} may not SELECT and has no function to ask, so a retry with an id cannot be confirmed"
        yield Finding("warn", text, f"{_migrate(table)} as the table's owner")
    changes = ", ".join(right for right in _CHANGES if right in rights)
    if superuser or owner:
        what = "is a superuser" if superuser else "owns the table"
        advice = "write as a role that was granted INSERT alone"
        yield Finding("warn", f"{table}: {role} {what}, so it can change what is stored", advice)
    elif changes:
        yield Finding("warn", f"{table}: {role} may {changes}", f'REVOKE {changes} ON "{table}" FROM {role}')
    elif "INSERT" in rights:
        held = "INSERT and SELECT" if "SELECT" in rights else "INSERT"
        yield Finding("ok", f"{table}: {role} may {held}, and change nothing")


def _roles(table: str) -> str:
    return f"run `tracevault roles --table {table}` as the table's owner"


def _check_access(connection: Connection[Any], table: str) -> Iterator[Finding]:
    """Check the guards of a table, and who may do more than he should to it and to what seals it."""
    access = run(connection, look_at_grants(table), Place("looking at the rights"))
    for part, fault in access.faults:
        yield Finding("warn", f"{part}: {fault}", _roles(table))
    if not access.faults:
        yield Finding("ok", f"{table}: guards refuse UPDATE, DELETE and TRUNCATE")
    grantees = [name for name in {name for thing in access.things for name in thing.granted} if name is not None]
    belonging = run(connection, members(table, [None, *grantees]), Place("looking at the rights"))
    (myself,) = _ask(connection, "SELECT current_user::text")
    excess = [finding for thing in access.things for finding in _too_much(table, thing, belonging, myself)]
    yield from excess
    owners = [name for name in belonging.get(None, []) if name != shown(myself)]
    if owners:
        text = f"{table}: {', '.join(owners)} may act as its owner, and so change what is stored"
        yield Finding("warn", text, "let nobody be a member of the owner whose work it is not to migrate")
    if not excess:
        yield Finding("ok", f"{table}: no grant is more than it should be")


def _too_much(
    table: str, thing: Thing, belonging: Mapping[str | None, Sequence[str]], myself: str
) -> Iterator[Finding]:
    """Yield what of the grants on a thing is too much; what `_check_rights` says of ourselves is not said again."""
    if thing.stranger is not None:
        text = (
            f"{thing.name}: it belongs to {shown(thing.stranger)} and not to the owner of {table}, so he may change it"
        )
        yield Finding("warn", text, f"give {thing.sql} to the owner of {table}")
    for grantee in thing.granted:
        rights = thing.too_much(grantee)
        if grantee == myself and thing.kind == "table":
            rights = frozenset(right for right in rights if right[0] not in _CHANGES)
        name = shown(grantee)
        inheriting = [] if grantee is None else belonging.get(grantee, [])
        others = f", and so may its members {', '.join(inheriting)}" if inheriting else ""
        if rights:
            words = described(rights)
            words_to_revoke = words.replace(" WITH GRANT OPTION", "")
            advice = f"REVOKE {words_to_revoke} ON {thing.sql} FROM {name}"
            yield Finding("warn", f"{thing.name}: {name} may {words}{others}", advice)
        if thing.sets_too_much(grantee):
            text = f"{thing.name}: {name} has INSERT on all columns, so it may set {', '.join(UNSETTABLE)}{others}"
            yield Finding("warn", text, f"{_roles(table)}, with --writer and this role")
    if thing.kind == "custody" and len(thing.granted) > 1:
        text = f"{thing.name}: {', '.join(map(shown, thing.granted))} may run it; one role should, the custodian"
        yield Finding("warn", text, f"{_roles(table)}, with --custodian, and REVOKE EXECUTE from the others")


def check_reads(connection: Connection[Any], tables: Sequence[str]) -> Iterator[Finding]:
    """Check a read connection of its own: that it may read, and nothing else."""
    read_only = _ask(connection, "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'")[0]
    for table in tables:
        if not _ask(connection, "SELECT to_regclass(quote_ident($1)) IS NOT NULL", table)[0]:
            yield Finding("FAIL", f"{table}: the read connection finds no such table", "correct DATABASE_URL_READ")
            continue
        rights, role, owner, superuser = _rights(connection, table)
        if "SELECT" not in rights:
            yield Finding("FAIL", f"{table}: the reader {role} may not SELECT", f'GRANT SELECT ON "{table}" TO {role}')
        elif not read_only and (superuser or owner or rights > {"SELECT"}):
            advice = "use a role with SELECT only in DATABASE_URL_READ"
            yield Finding("warn", f"{table}: the reader {role} may also write", advice)
        else:
            yield Finding("ok", f"{table}: the reader {role} may SELECT and nothing else")


def _rights(connection: Connection[Any], table: str) -> tuple[set[str], str, bool, bool]:
    """Return the role's rights on a table, its name as SQL, and whether it owns the table or is a superuser."""
    names = ("SELECT", *_CHANGES)
    held = ", ".join(f"has_table_privilege(c.oid, '{name}')" for name in names)
    whole, some, *allowed, role, owner, superuser = _ask(
        connection,
        "SELECT (SELECT bool_and(has_column_privilege(c.oid, a.attnum, 'INSERT')) FROM pg_attribute a "
        f"WHERE a.attrelid = c.oid AND a.attname = ANY($2)), has_any_column_privilege(c.oid, 'INSERT'), {held}, "
        "quote_ident(current_user), pg_has_role(c.relowner, 'USAGE'), r.rolsuper "
        "FROM pg_class c, pg_roles r WHERE c.oid = to_regclass(quote_ident($1)) AND r.rolname = current_user",
        table,
        list(INSERT_COLUMNS),
    )
    rights = {name for name, has in zip(names, allowed, strict=True) if has}
    return rights | ({"INSERT"} if whole else {"INSERT of some columns"} if some else set()), role, owner, superuser


def check_partitions(connection: Connection[Any], table: str) -> Iterator[Finding]:
    """Check that a partitioned table has partitions ahead, and that its default partition is empty."""
    place = Place("looking at partitions")
    with connection.transaction():
        layout = run(connection, look_at_partitions(table), place)
    if layout is None:
        return
    ensure = f"run `tracevault partitions ensure --table {table}` as the table's owner"
    if layout.kind != "p":
        left = run(connection, unfinished(table), place)
        if left is not None:
            text = f"{table}: a conversion was interrupted, and events are refused unless {left}"
            yield Finding("FAIL", text, f"run `tracevault partitions convert --table {table}`, or that with --abort")
        return
    by = interval_of(layout.partitions)
    if by is None:
        yield Finding("ok", f"{table}: partitioned, neither by days nor weeks nor months")
    elif ahead(layout, by, 1):
        yield Finding("FAIL", f"{table}: the next {by} has no partition, or not for all of it", ensure)
    else:
        yield Finding("ok", f"{table}: {number(len(layout.partitions), 'partition')}, by {by}")
    default = layout.default
    if default is None:
        yield Finding("warn", f"{table}: no default partition, so an event of another time cannot be stored", ensure)
    elif default.filled and _ask(connection, f"SELECT EXISTS (SELECT FROM {default.sql})")[0]:
        text = f"{table}: events are in the default partition {default.name}, where every query looks"
        yield Finding("warn", text, ensure)


# Seconds after which a row that waits for its seal is for a person to look at.
_LONG = 60.0
_NOT_ALLOWED = "42501"


def check_seals(connection: Connection[Any], table: str) -> Iterator[Finding]:
    """Say how far a table is sealed, and how its anchors do."""
    seal = f"run `tracevault seal --table {table}`"
    place = Place("reading seals")
    try:
        tree = run(connection, find_tree(table), place) if run(connection, tables_exist(), place) else None
    except DriverError as error:
        if error.sqlstate != _NOT_ALLOWED:
            raise
        yield Finding("ok", f"{table}: this role may not see how far it is sealed, and need not")
        return
    if tree is None:
        yield Finding("warn", f"{table}: not sealed, so whoever may change it leaves no trace", f"{seal}; see docs")
        return
    how = run(connection, standing(tree), place)
    text = f"{table}: {number(tree.size, 'row')} sealed as {tree.origin}, {number(how.waiting, 'row')} not yet"
    if not tree.same_system:
        yield Finding("FAIL", f"{text}: the database was moved to another server", f"{seal} --resume")
    elif how.oldest_waiting >= _LONG:
        yield Finding("FAIL", f"{text}, the oldest for {span(how.oldest_waiting)}: no sealer is at work", seal)
    elif how.signed < tree.size and how.sealed_at is not None and _age(how.sealed_at) >= _LONG:
        yield Finding("FAIL", f"{text}, and only {how.signed:,} of them signed", "look at what the sealer logs")
    else:
        yield Finding("ok", text)
    anchors = run(connection, receipts(tree), place)
    if not anchors:
        advice = "give the sealer an --anchor that the database's owner cannot change"
        yield Finding("warn", f"{table}: no anchor, so whoever has the key could make the log anew", advice)
    for anchor in anchors:
        last = "never told" if anchor.at is None else f"told of {anchor.size:,} {span(_age(anchor.at))} ago"
        if anchor.error is not None:
            yield Finding("warn", f"{table}: anchor {anchor.sink}, {last}, fails: {anchor.error}")
        else:
            yield Finding("ok", f"{table}: anchor {anchor.sink}, {last}")


def _age(moment: datetime) -> float:
    return (datetime.now(UTC) - moment).total_seconds()
