"""An application as others: it makes its vault when it is imported."""

import os
from dataclasses import dataclass

import tracevault
from tracevault import Tracevault

audit = Tracevault(connection_string=os.environ.get("DATABASE_URL_WRITE", "postgresql:///shop"), mask_fields=["pin"])


@tracevault.event("doc.shared")
@dataclass
class DocShared:
    """A document was shown to somebody else."""

    with_: str


def share(user: str, doc: str, other: str) -> None:
    with tracevault.context(actor={"id": user, "type": "user"}):
        audit.emit(DocShared(with_=other), target={"id": doc, "type": "doc"}, meta={"pin": "1234"})


def rename(doc: str, old: str, new: str) -> None:
    with audit.unit_of_work() as unit:
        unit.emit_diff("doc.renamed", before={"name": old}, after={"name": new}, target={"id": doc, "type": "doc"})
        if not new:
            raise ValueError("a document needs a name")
