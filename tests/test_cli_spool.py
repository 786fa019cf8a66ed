"""``tracevault spool``: what waits on this machine is shown, and dead letters are repeated or dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import rows
from tests.test_background import REFUSE_BAD, events, wait_for
from tracevault import Tracevault, UndeliveredError

pytest.importorskip("click", reason='needs the extra "cli"')
pytest.importorskip("rich", reason='needs the extra "cli"')

from tracevault.cli.group import run


@contextmanager
def vault_with_a_dead_letter(dsn: str, folder: Path) -> Iterator[tuple[Tracevault, str]]:
    rows(dsn, REFUSE_BAD)
    vault = Tracevault(
        connection_string=dsn, bootstrap={"ensure_schema": False}, default_mode="async", spool=folder / "spool"
    )
    receipt = vault.emit("bad", data={"n": 1})
    wait_for(lambda: vault.stats().dead == 1)
    try:
        yield vault, str(receipt.id)
    finally:
        with suppress(UndeliveredError):  # which tells of the dead letter
            vault.close()


def test_dead_letters_are_shown(ready_dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "spool")
    with vault_with_a_dead_letter(ready_dsn, tmp_path) as (_vault, id_):
        assert run(["spool", "status", "--spool", folder, "-o", "json"]) == 0
        file, dead = map(json.loads, capsys.readouterr().out.splitlines())
        assert (file["held"], file["waiting"], file["dead"]) == (True, 0, 0)
        assert (dead["held"], dead["waiting"], dead["dead"]) == (False, 0, 1)
    assert run(["spool", "status", "--spool", folder, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == dead["name"]
    assert run(["spool", "dead", "list", "--spool", folder, "-o", "table"]) == 0
    assert run(["spool", "dead", "list", "--spool", folder, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["id"] == id_
    assert run(["spool", "dead", "show", id_, "--spool", folder]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["record"]["data"], shown["why"]["table"]) == ({"n": 1}, "audit_logs")


@pytest.mark.parametrize("command", [["requeue"], ["drop", "--reason", "a test"]])
def test_dead_letters_of_a_living_process(command: list[str], ready_dsn: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "spool")
    with vault_with_a_dead_letter(ready_dsn, tmp_path) as (_vault, id_):
        rows(ready_dsn, "ALTER TABLE audit_logs DISABLE TRIGGER USER")
        assert run(["spool", "dead", *command, id_, "--spool", folder]) == 0
        expected = "bad" if command == ["requeue"] else "tracevault.dead_letter.dropped"
        wait_for(lambda: events(ready_dsn) == [expected], 10)
        assert run(["spool", "dead", *command, id_, "--spool", folder]) == 3


def test_flush_delivers_what_was_requeued(ready_dsn: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "spool")
    with vault_with_a_dead_letter(ready_dsn, tmp_path):
        pass
    rows(ready_dsn, "ALTER TABLE audit_logs DISABLE TRIGGER USER")
    assert run(["spool", "dead", "requeue", "--all", "--spool", folder]) == 0
    assert run(["spool", "flush", "--spool", folder, "--dsn", ready_dsn]) == 0
    assert events(ready_dsn) == ["bad"]
