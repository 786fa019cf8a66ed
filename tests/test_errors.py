"""Errors: the tree, and that they survive the way to another process."""

from __future__ import annotations

import inspect
import pickle
from uuid import UUID

import pytest

import tracevault
from tracevault import errors

ID = UUID("018f4e5c-7a1b-7c3d-9e2f-1a2b3c4d5e6f")
EXAMPLES = [
    errors.TracevaultError("closed"),
    errors.ConfigError("`driver` is wrong", field="driver"),
    errors.ValidationError("`data.a` is wrong", field="data.a"),
    errors.QueryError("`acter` is no key", text="acter:x", column=1, length=5),
    errors.DriverError("refused", sqlstate="42501", transient=False),
    errors.OutcomeUnknownError("broke", id=ID, sqlstate="57P01"),
    errors.MigrationError("not ours"),
    errors.DuplicateIdError("taken", id=ID),
    errors.QueueFullError("full"),
    errors.SpoolError("no room"),
    errors.KeyStoreError("damaged"),
    errors.UndeliveredError("lost", lost=3, pending=1, spooled=2),
    errors.ProofError("no hash fits"),
    errors.SealError("no key"),
    errors.ArchiveError("no manifest"),
    errors.RollbackError("ROLLBACK DETECTED"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_pickle(error: errors.TracevaultError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_every_error_is_public_and_drawn() -> None:
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and kind.__module__ == errors.__name__
    }
    assert {type(error) for error in EXAMPLES} == set(classes.values())
    assert set(classes) <= set(tracevault.__all__)
    assert all(name in (errors.__doc__ or "") for name in classes)
    assert all(issubclass(kind, errors.TracevaultError) for kind in classes.values())
