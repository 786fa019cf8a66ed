"""The story that ``tracevault demo`` tells, and what the log then holds; through the public API alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from psycopg import Connection, errors

from tracevault import Actor, AuditRecord, Report, Target, Tracevault
from tracevault.sealing.keys import generate, read_keys, write_key
from tracevault.sealing.service import make_sealer
from tracevault.sealing.signer import state_path

OPTIONS: dict[str, Any] = {
    "scopes": {"default": {"table_name": "audit_logs"}, "users": {"table_name": "audit_user_events"}},
    "mask_fields": ["password", "token"],
    "environment": "demo",
}

ANA = Actor("ana", "user")
WEB = Actor("web", "service")
BANK = Actor("bank", "service")
KITE = Target("kite-7", "product")
KEPT, ROLLED_BACK = Target("1001", "order"), Target("1002", "order")


class CardDeclinedError(Exception):
    """What makes the shop roll an order back."""


def tell(audit: Tracevault, shop: Connection[Any], run: str) -> None:
    """Emit the story's events, tied together by the correlation id ``run``; ``shop`` is the shop's connection."""
    users = audit.get_scope("users")
    emit = partial(audit.emit, correlation_id=run)
    emit_user = partial(users.emit, correlation_id=run)

    # Whatever stands under a masked key is replaced before the event leaves this process.
    account = Target("ana", "account")
    emit_user("user.registered", actor=WEB, target=account, data={"plan": "shop", "password": "correct horse"})
    emit_user(
        "user.login",
        actor=ANA,
        target=account,
        data={"outcome": "failure", "severity": "warning", "error": {"code": "wrong_password"}},
        meta={"ip": "192.0.2.17"},
    )
    emit_user("user.login", actor=ANA, target=account, data={"outcome": "success", "token": "eyJhbGciOi"})

    # A diff holds both sides and what differs between them.
    emit("product.created", actor=ANA, target=KITE, data={"name": "Kite", "price": 120, "stock": 8})
    audit.emit_diff(
        "product.price.updated",
        actor=ANA,
        target=KITE,
        before={"name": "Kite", "price": 120},
        after={"name": "Kite", "price": 150},
        correlation_id=run,
    )

    # On the caller's connection an event belongs to the caller's transaction: both are stored, or neither.
    shop.execute("CREATE TEMPORARY TABLE orders (id int)")
    with shop.transaction():
        shop.execute("INSERT INTO orders VALUES (1001)")
        emit("order.placed", actor=ANA, target=KEPT, data={"price": 150}, connection=shop)
    try:
        with shop.transaction():
            shop.execute("INSERT INTO orders VALUES (1002)")
            emit("order.placed", actor=ANA, target=ROLLED_BACK, data={"price": 150}, connection=shop)
            raise CardDeclinedError
    except CardDeclinedError:
        emit(
            "payment.declined",
            actor=BANK,
            target=ROLLED_BACK,
            data={"outcome": "failure", "severity": "error", "error": {"code": "card_declined"}},
        )

    # The answer to the first emit was lost, so it is emitted again: under its own id it is stored once.
    payment = uuid4()
    for _attempt in ("first", "again"):
        emit(
            "payment.captured",
            id=payment,
            actor=BANK,
            target=KEPT,
            data={"outcome": "success", "amount": 150},
        )

    # Many events, in one transaction.
    audit.emit_many(
        {"event": event, "actor": WEB, "target": KEPT, "correlation_id": run}
        for event in ("order.packed", "order.shipped")
    )

    # In async mode emit returns at once and background writers store it; flush waits for that.
    emit("receipt.mailed", actor=WEB, target=KEPT, mode="async")
    audit.flush()


class Told(NamedTuple):
    """What the log holds of one run: its records, how many of a kind (``counts``); and how much in all."""

    records: list[AuditRecord]
    counts: dict[str, int]
    total: int

    def last(self, event: str) -> AuditRecord:
        """Return the run's newest record of this event."""
        return next(record for record in reversed(self.records) if record.event == event)


def read_back(audit: Tracevault, run: str) -> Told:
    """Read the run's records and what the demo claims about them."""
    users = audit.get_scope("users")
    records = [*audit.query.find_many(correlation_id=run), *users.query.find_many(correlation_id=run)]
    counts: dict[str, int] = {
        order: audit.query.count(correlation_id=run, event="order.placed", target_id=order)
        for order in (KEPT.id, ROLLED_BACK.id)
    }
    counts["payment"] = audit.query.count(correlation_id=run, event="payment.captured")
    total = audit.query.count() + users.query.count()
    return Told(sorted(records, key=lambda record: (record.occurred_at, record.id)), counts, total)


KEY_NAME = "demo.example/shop"
TABLE = "audit_logs"


class Tampering(NamedTuple):
    """What verifying said of the log as it is, and while a superuser had changed an event; and the log's key."""

    before: Report
    meanwhile: Report
    event: UUID
    vkey: str
    anchor: Path


def tamper(audit: Tracevault, connect: Callable[[], Connection[Any]], folder: Path, event: UUID) -> Tampering | None:
    """Seal the log, change an event as a superuser can, verify, and take the change back; None if guards refuse that.

    Key, signing state and anchor stand beside the ``folder`` of the database.
    """
    key, anchor = folder.with_name(f"{folder.name}.key"), folder.with_name(f"{folder.name}.anchor")
    with closing(connect()) as superuser:
        found = superuser.execute("SELECT to_regclass('tracevault_trees')").fetchone()
        if found == (None,):  # a new database; what another one before it signed is of no use
            for path in (key, state_path(key), anchor):
                path.unlink(missing_ok=True)
            write_key(key, generate(KEY_NAME))
        sealer, publisher = make_sealer(connect, [TABLE], key=key, anchors=[f"file:{anchor}"])
        try:
            sealer.seal(TABLE)
            publisher.settle(10)
        finally:
            publisher.close(1)
            sealer.close()
        vkey = str(read_keys(key)[0].renamed(f"{KEY_NAME}/{TABLE}").verifier)
        before = audit.verify(keys=[vkey], anchors=[str(anchor)])
        change = "UPDATE audit_logs SET data = jsonb_set(data, '{amount}', %s) WHERE id = %s"
        try:
            superuser.execute(change, ("15", event))
        except errors.InsufficientPrivilege:
            return None
        meanwhile = audit.verify(keys=[vkey], anchors=[str(anchor)])
        superuser.execute(change, ("150", event))
    return Tampering(before, meanwhile, event, vkey, anchor)
