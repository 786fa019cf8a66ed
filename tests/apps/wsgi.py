"""A web application: each request emits, and is answered with the receipts. It has emitted when it was loaded, too."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from tests.apps.vaults import Vaults

vaults = Vaults()
loaded_by = os.getpid()
at_load = vaults.emit_all("loaded")


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    query = parse_qs(environ.get("QUERY_STRING", ""))
    kinds = query.get("kind", [])
    answer = {
        "pid": os.getpid(),
        "loaded_by": loaded_by,
        "at_load": at_load,
        "receipts": [vaults.emit(kind, "requested") for kind in kinds],
    }
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]
