"""Asks for a price, as a user: python order.py USER ITEM PRICE [USER ITEM PRICE ...]."""

import sys

from app import audit, change_price

import tracevault

with audit.unit_of_work() as unit:
    unit.connection.execute("CREATE TABLE IF NOT EXISTS prices (item text PRIMARY KEY, price int NOT NULL)")

orders = iter(sys.argv[1:])
for user, item, price in zip(orders, orders, orders, strict=True):
    with tracevault.context(actor={"id": user, "type": "user"}, correlation_id=f"order-of-{user}"):
        change_price.delay(item, int(price))
audit.close()
