"""A program that used to audit by logging: its lines become events, and each event is a line of the ordinary log.

    pip install "tracevault[embedded]"
    python app.py

Without DATABASE_URL_WRITE it runs on a PostgreSQL of its own, in ./.tracevault.
"""

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import tracevault
from tracevault import Tracevault
from tracevault.integrations.logging import AuditHandler, log_stored

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)

audit = Tracevault(
    connection_string=os.environ.get("DATABASE_URL_WRITE", "embedded:"),
    mask_fields=["password"],
    on_stored=log_stored(),
)


def target_of(line: logging.LogRecord) -> Mapping[str, Any]:
    return {"target": {"id": str(line.__dict__["doc"]), "type": "doc"}} if hasattr(line, "doc") else {}


legacy = logging.getLogger("shop.audit")
legacy.addHandler(AuditHandler(audit, event="legacy.noted", fields=target_of))

with tracevault.context(actor={"id": sys.argv[1] if len(sys.argv) > 1 else "ann", "type": "user"}):
    legacy.warning("deleted document %s", 7, extra={"doc": 7, "password": "correct horse"})
    audit.emit("doc.deleted", target={"id": "7", "type": "doc"})
audit.close()
