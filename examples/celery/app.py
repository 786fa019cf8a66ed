"""A shop whose prices change in the background, with Celery: the log knows who asked for it.

    pip install "tracevault[celery,binary]"
    export DATABASE_URL_WRITE=postgresql://...
    celery -A app worker
    python order.py ann tea 120        # in another terminal

The broker is BROKER_URL; without one, a folder ./broker.
"""

import os
from pathlib import Path

from celery import Celery

from tracevault import Tracevault
from tracevault.integrations.celery import install

app = Celery("app", broker=os.environ.get("BROKER_URL", "filesystem://"))
if app.conf.broker_url == "filesystem://":
    folders = {"data_folder_in": "messages", "data_folder_out": "messages", "control_folder": "control"}
    base = Path(os.environ.get("BROKER_FOLDER", "broker"))
    for folder in folders.values():
        (base / folder).mkdir(parents=True, exist_ok=True)
    app.conf.broker_transport_options = {name: str(base / folder) for name, folder in folders.items()}

# Made once, before the worker forks its processes; each of them goes on with it.
audit = Tracevault(connection_string=os.environ["DATABASE_URL_WRITE"])
install(audit)


@app.task
def change_price(item: str, price: int) -> None:
    with audit.unit_of_work() as unit:
        unit.connection.execute(
            "INSERT INTO prices VALUES (%s, %s) ON CONFLICT (item) DO UPDATE SET price = excluded.price", [item, price]
        )
        unit.emit("price.changed", target={"id": item, "type": "item"}, data={"price": price})
        if price < 0:
            raise ValueError("no price is below nothing")  # takes the change and its event back
    if app.conf.broker_url != "filesystem://":
        tell.delay(item)


@app.task(bind=True, max_retries=1, default_retry_delay=0)
def tell(self, item: str) -> None:  # type: ignore[no-untyped-def]
    audit.emit("subscribers.told", target={"id": item, "type": "item"}, mode="async")
    if self.request.retries == 0:
        raise self.retry()
