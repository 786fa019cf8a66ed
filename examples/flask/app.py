"""A shop's prices, with Flask: who changed which, in the same transaction as the change; and the log in a browser.

    pip install "tracevault[flask,web,embedded]"
    flask run

Without DATABASE_URL_WRITE it runs on a PostgreSQL of its own, in ./.tracevault. The log is under /audit/.
"""

import os
from typing import Any

from flask import Flask, abort, jsonify, request

import tracevault
from tracevault.integrations.flask import Audit
from tracevault.web import Access

audit = Audit(audit_requests=["/admin/*"])


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["TRACEVAULT"] = {
        "connection_string": os.environ.get("DATABASE_URL_WRITE", "embedded:"),
        "mask_fields": ["password"],
    }
    audit.init_app(app)
    audit.mount_viewer(app, "/audit", authorize)
    app.before_request(identify)
    app.add_url_rule("/", view_func=index)
    app.add_url_rule("/prices/<item>/<int(signed=True):price>", view_func=change_price, methods=["PUT"])
    app.add_url_rule("/admin/reload", view_func=reload, methods=["POST"])
    with app.app_context(), audit.unit_of_work() as unit:
        unit.connection.execute("CREATE TABLE IF NOT EXISTS prices (item text PRIMARY KEY, price int NOT NULL)")
        unit.connection.execute("INSERT INTO prices VALUES ('tea', 100) ON CONFLICT DO NOTHING")
    return app


def identify() -> None:
    """Stand in for your authentication: tell the log who it is, once known."""
    user = request.headers.get("x-user")
    if user is not None:
        tracevault.set_context(actor={"id": user, "type": "user"})


def authorize() -> Access | None:
    user = request.headers.get("x-user")
    return Access(actor={"id": user, "type": "user"}, may_export=True) if user == "auditor" else None


def index() -> str:
    return "PUT /prices/tea/120 with the header X-User"


def change_price(item: str, price: int) -> Any:
    if request.headers.get("x-user") == "guest":
        audit.emit("price.denied", target={"id": item, "type": "item"}, data={"outcome": "failure"})
        abort(403)
    with audit.unit_of_work() as unit:
        found = unit.connection.execute("SELECT price FROM prices WHERE item = %s FOR UPDATE", [item]).fetchone()
        if found is None:
            abort(404)
        unit.connection.execute("UPDATE prices SET price = %s WHERE item = %s", [price, item])
        unit.emit_diff(
            "price.changed", target={"id": item, "type": "item"}, before={"price": found[0]}, after={"price": price}
        )
        if price < 0:  # too late, but the transaction takes the change and its event back
            abort(422)
    return jsonify(was=found[0])


def reload() -> str:
    return "reloaded"
