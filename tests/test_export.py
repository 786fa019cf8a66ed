"""A sealed log as a file: whole, readable, and verified without its database; every change to it is found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import rows
from tests.sealed import NAME, Sealed, Sealing
from tests.test_cli import Cli, cli, command, environment
from tests.test_custody import fill
from tracevault import ConfigError, Report, SealError, Tracevault, Verdict, verify_export
from tracevault.sealing.anchors import parse_anchor
from tracevault.sealing.publisher import Publisher

__all__ = ["cli"]  # the fixture

ORIGIN = f"{NAME}/audit_logs"
Lines = list[dict[str, Any]]


@pytest.fixture
def log(ready_dsn: str, tmp_path: Path) -> Iterator[Sealed]:
    sealed = Sealed(ready_dsn, tmp_path)
    sealed.publisher.close()
    anchors = [parse_anchor(f"file:{sealed.anchor}"), parse_anchor(f"dir:{tmp_path / 'static'}")]
    sealed.publisher = Publisher(anchors, interval=0.0)
    sealed.sealer.close()
    sealed.sealer = sealed.another()
    yield sealed
    sealed.close()


class File:
    """An export, and the means to change it."""

    def __init__(self, cli: Cli, log: Sealed) -> None:
        self.path = log.anchor.with_name("log.jsonl")
        self._log = log
        done = cli("export", "--verifiable", "-o", str(self.path), "--dsn", log.dsn)
        assert done.code == 0, done.err
        self.told = done.err

    @property
    def lines(self) -> Lines:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def change(self, change: Callable[[Lines], object]) -> None:
        lines = self.lines
        change(lines)
        self.path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")

    def rewrite(self, old: str, new: str) -> None:
        """Change the text where ``old`` stands first: to what Python would not write."""
        text = self.path.read_bytes()
        assert old.encode() in text
        self.path.write_bytes(text.replace(old.encode(), new.encode("utf-8", "surrogateescape"), 1))

    def verify(self, *anchors: str) -> Report:
        return verify_export(self.path, keys=[str(self._log.key())], anchors=anchors or [str(self._log.anchor)])

    def by_tiles(self) -> Report:
        return self.verify(f"dir:{self.path.with_name('static')}")


def test_a_log_is_verified_without_its_database(log: Sealed, cli: Cli) -> None:
    fill(log.dsn)
    log.seal()
    file = File(cli, log)
    assert file.told.endswith("log.jsonl: 30 leaves\n")
    rows(log.dsn, "DROP TABLE audit_logs, tracevault_trees, tracevault_leaves, tracevault_tiles CASCADE")
    report = file.verify()
    assert (report.verdict, report.checked, report.size, report.origin) == (Verdict.OK, 30, 30, ORIGIN)
    assert report.anchor is not None
    assert report.anchor.size == 30
    assert file.by_tiles().verdict is Verdict.OK
    assert verify_export(file.path).verdict is Verdict.CONSISTENT
    assert not verify_export(file.path).signatures_checked
    done = cli(
        "verify", "--export", str(file.path), "--key", str(log.key()), "--anchor", str(log.anchor), "-o", "table"
    )
    assert (done.code, done.out.startswith("OK  nothing was changed up to a checkpoint of 30 leaves")) == (0, True)
    assert [one.name for one in file.path.parent.iterdir() if one.name.endswith(".new")] == []


def test_what_a_line_holds(log: Sealed, cli: Cli) -> None:
    with Tracevault(connection_string=log.dsn) as audit:
        audit.emit("order.paid", actor={"id": "ü🎈", "type": "user"}, data={"b": 12345678901234567890, "a": 1})
    rows(log.dsn, "UPDATE audit_logs SET data = jsonb_set(data, '{c}', '1.10'), occurred_at = 'infinity'")
    log.seal()
    head, line, tail = File(cli, log).lines
    assert (head["format"], head["tree"], head["origin"], head["size"]) == (
        *("tracevault/export/v1", "audit_logs", ORIGIN),
        1,
    )
    assert line["leaf"] == 0
    assert line["actor_id"] == "ü🎈"
    assert line["data_text"] == '{"a": 1, "b": 12345678901234567890, "c": 1.10}'
    assert line["data"] == {"a": 1, "b": 12345678901234567890, "c": 1.1}
    assert line["occurred_at"] == 2**63 - 1
    assert re.fullmatch(r"[0-9a-f-]{36}", line["payload_salt"])
    assert line["meta"] is None
    assert (tail["leaves"], tail["checkpoint"].startswith(f"{ORIGIN}\n1\n")) == (1, True)


def test_rows_that_went_rightly(log: Sealed, cli: Cli) -> None:
    fill(log.dsn)
    log.seal()
    with Sealing(log):
        cli("erase", "--target", "user/u1", "--reason", "r", "--yes", "--dsn", log.dsn)
        cli("prune", "--before", "2021-01-01", "--yes", "--dsn", log.dsn)
    log.seal()
    file = File(cli, log)
    report = file.verify()
    assert (report.verdict, report.pruned, report.erased, report.problems) == (Verdict.OK, 15, 5, [])
    lines = file.lines
    assert set(lines[1]) == {"leaf", "id", "hash"}
    erased = next(line for line in lines if "data_commitment" in line)
    assert (erased["data"], "payload_salt" in erased, len(erased["data_commitment"])) == (None, False, 64)


def test_rows_that_went_otherwise(log: Sealed, cli: Cli) -> None:
    ids = fill(log.dsn)
    log.seal()
    rows(log.dsn, f"DELETE FROM audit_logs WHERE id = '{ids[4]}'")
    report = File(cli, log).verify()
    assert report.verdict is Verdict.TAMPERED
    assert [(problem.kind, problem.index, str(problem.id)) for problem in report.problems] == [("deleted", 4, ids[4])]


def _set(number: int, **values: Any) -> Callable[[Lines], object]:
    return lambda lines: lines[number + 1].update(values)


def _both(lines: Lines) -> None:
    lines[8].update(data={"n": 8}, data_text='{"n": 8}')


CHANGES: dict[str, Callable[[Lines], object]] = {
    "another event": _set(7, event="order.refunded"),
    "another time": _set(7, occurred_at="2020-01-01T00:00:00.001Z"),
    "a payload and what is hashed of it": _both,
    "a payload alone": _set(7, data={"n": 8}),
    "true for 1": lambda lines: lines[2]["data"].update(n=True),
    "what is hashed alone": _set(7, data_text='{"n": 8, "secret": "hush-7"}'),
    "no salt": lambda lines: lines[8].pop("payload_salt"),
    "another salt": _set(7, payload_salt="00112233-4455-6677-8899-aabbccddeeff"),
    "a column that is none": _set(7, colour="red"),
    "a column that is missing": lambda lines: lines[8].pop("actor_id"),
    "a line that is no leaf": lambda lines: lines[8].clear(),
    "a hash in place of a row": lambda lines: lines.__setitem__(8, {"leaf": 7, "id": None, "hash": "00" * 32}),
    "lines that changed places": lambda lines: lines.insert(3, lines.pop(9)),
    "a line less": lambda lines: lines.pop(8),
    "a line more": lambda lines: lines.insert(8, lines[7]),
    "an end that is cut off": lambda lines: lines.__delitem__(slice(20, None)),
    "no last line": lambda lines: lines.pop(),
    "something after the last line": lambda lines: lines.append({"leaf": 31}),
    "a shorter log": lambda lines: (lines.pop(-2), lines[0].update(size=29), lines[-1].update(leaves=29)),
    "another checkpoint at the end": lambda lines: lines[-1].update(checkpoint="x\n1\ny\n\n— x y\n"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_to_the_file_is_found(log: Sealed, cli: Cli, change: Callable[[Lines], object]) -> None:
    fill(log.dsn)
    log.seal()
    file = File(cli, log)
    file.change(change)
    for report in (file.verify(), file.by_tiles()):
        assert report.verdict is Verdict.TAMPERED
        assert report.problems
        json.dumps(report.as_dict())


# What an export never has, and what some reader would show otherwise than it is hashed, or not at all.
TEXTS: dict[str, list[tuple[str, str]]] = {
    "an event said twice": [('"event": "order.paid"', '"event": "order.refunded", "event": "order.paid"')],
    "a payload said twice": [('"data": {"n": 0,', '"data": {"n": 99}, "data": {"n": 0,')],
    "a name twice in a payload": [('"data": {"n": 0,', '"data": {"n": 99, "n": 0,')],
    "no number": [('"leaf": 0', '"leaf": NaN')],
    "true in place of a number": [('"leaf": 1,', '"leaf": true,')],
    "no UTF-8": [('"order.paid"', '"order.paid\udcff"')],
    "half a character": [('"order.paid"', '"order.paid\\ud800"')],
    "deeper than any parser goes": [('"order.paid"', "[" * 100_000 + "]" * 100_000)],
    "a payload deeper than any parser goes": [('"data": {"n": 0,', f'"data": {{"": {"[" * 9000}{"]" * 9000}, "n": 0,')],
    "a range without an end": [
        ('"event": "order.paid"', '"event": "tracevault.pruned"'),
        ('"data": {"n": 0,', '"data": {"ranges": [[0, Infinity]], "n": 0,'),
    ],
    "a range to a number that no computer holds": [
        ('"event": "order.paid"', '"event": "tracevault.pruned"'),
        ('"data": {"n": 0,', '"data": {"ranges": [[0, 1e99999999999999999999]], "n": 0,'),
    ],
}


@pytest.mark.parametrize("changes", TEXTS.values(), ids=TEXTS.keys())
def test_a_line_that_readers_may_take_otherwise_is_not_believed(
    log: Sealed, cli: Cli, changes: list[tuple[str, str]]
) -> None:
    fill(log.dsn)
    log.seal()
    file = File(cli, log)
    for old, new in changes:
        file.rewrite(old, new)
    report = file.verify()
    assert report.verdict is Verdict.TAMPERED
    assert {problem.index for problem in report.problems} & {0, 1}
    json.dumps(report.as_dict())


def test_what_other_writers_store_is_no_tampering(log: Sealed, cli: Cli) -> None:
    fill(log.dsn, 8)
    payloads = [
        f'{{"n": {"9" * 5000}, "m": -0.{"1" * 5000}}}',
        '{"a": ' * 3000 + "1.0" + "}" * 3000,
        "[" * 3000 + "]" * 3000,
        json.dumps({"\x85\u2028\r\n": "\u202e\x9b"}),
        "null",
        '"text"',
    ]
    ids = [str(id_) for (id_,) in rows(log.dsn, "SELECT id FROM audit_logs ORDER BY id")]
    for id_, payload in zip(ids, payloads, strict=False):
        rows(log.dsn, "UPDATE audit_logs SET data = %s::jsonb, actor_id = %s WHERE id = %s", payload, "\u2028\r\n", id_)
    for id_, moment in zip(ids, ("-infinity", "infinity", "4713-01-01 00:00:00 BC", "294276-12-31"), strict=False):
        rows(log.dsn, "UPDATE audit_logs SET occurred_at = %s, payload_salt = NULL WHERE id = %s", moment, id_)
    log.seal()
    file = File(cli, log)
    report = file.by_tiles()
    assert (report.verdict, report.checked, report.problems) == (Verdict.OK, 8, [])
    # Another hand may write the same in other letters, but for what only an exact comparison can reach.
    file.path.write_bytes(file.path.read_bytes().replace(b'"mode": "', b'"mode"  :"').replace(b"\n", b"\r\n"))
    assert [problem.index for problem in file.verify().problems if problem.kind == "leaf"] == [1, 2]


def test_lines_after_the_last_checkpoint_are_not_vouched_for(log: Sealed, cli: Cli) -> None:
    fill(log.dsn)
    log.seal()
    for own in (True, False):
        file = File(cli, log)

        def forge(lines: Lines, own: bool = own) -> None:
            lines.insert(-1, {**lines[-2], "leaf": 30, "id": "0" * 32, "event": "order.forged"})
            lines[0]["size"] = lines[-1]["leaves"] = 31
            if not own:
                lines[-1]["checkpoint"] = None

        file.change(forge)
        report = file.verify()
        assert (report.verdict, report.unsigned, report.problems) == (Verdict.INCOMPLETE, 1, [])
    done = cli(
        *("verify", "--export", str(file.path), "--key", str(log.key()), "--anchor", str(log.anchor), "-o", "table")
    )
    assert done.code == 5
    assert done.out.startswith("INCOMPLETE  no signed checkpoint covers the last 1 leaf of the file")


def test_an_export_ends_with_the_newest_checkpoint(log: Sealed, cli: Cli, tmp_path: Path) -> None:
    fill(log.dsn, 10)
    log.seal()
    note = tmp_path / "checkpoint"
    note.write_text(str(log.note()))
    fill(log.dsn, 10)
    log.seal()
    rows(log.dsn, "DELETE FROM tracevault_checkpoints WHERE size = 20")
    file = File(cli, log)
    report = file.verify(str(note))
    assert (report.verdict, report.size, report.unsigned) == (Verdict.OK, 10, 0)
    # An anchor that knows of more says so.
    assert [problem.kind for problem in file.verify().problems] == ["rolled back"]


def test_the_tiles_of_an_anchor_name_the_line(log: Sealed, cli: Cli) -> None:
    ids = fill(log.dsn, 600)
    log.seal()
    file = File(cli, log)
    for number in (0, 255, 256, 599):
        file.change(_set(number, event="order.refunded"))
    named = [(problem.index, str(problem.id)) for problem in file.by_tiles().problems if problem.kind == "changed"]
    assert named == [(number, ids[number]) for number in (0, 255, 256, 599)]


def test_checkpoints_say_between_which_leaves_it_was_changed(log: Sealed, cli: Cli) -> None:
    for _ in range(3):
        fill(log.dsn, 10)
        log.seal()
    file = File(cli, log)
    file.change(_set(14, event="order.refunded"))
    details = [problem.detail for problem in file.verify().problems if problem.kind == "root"]
    assert "of size 20 has another root" in details[0]
    assert "after leaf 9, where they last agree" in details[0]


HALF = b'{"format": "tracevault/export/v1", "tree": "\\ud800", "origin": "a", "size": 1}\n'


def test_an_export_of_another_log(log: Sealed, cli: Cli, tmp_path: Path) -> None:
    fill(log.dsn)
    log.seal()
    file = File(cli, log)
    file.change(lambda lines: lines[0].update(origin="log.example.com/other/audit_logs"))
    with pytest.raises(SealError, match="holds no checkpoint of"):
        file.verify()
    with pytest.raises(ConfigError, match="verifier key"):
        verify_export(file.path, anchors=[str(log.anchor)])
    for content in (b"", b"{}\n", b"\xff\n", b'{"format": "tracevault/export/v2"}\n', HALF):
        file.path.write_bytes(content)
        with pytest.raises(SealError):
            verify_export(file.path)
    with pytest.raises(SealError, match="cannot be read"):
        verify_export(tmp_path / "none")


def test_wrong_usage(log: Sealed, cli: Cli, tmp_path: Path) -> None:
    assert cli("export", "--verifiable", "--event", "a", "--dsn", log.dsn).code == 2
    done = cli("export", "--verifiable", "-o", str(tmp_path / "x"), "--dsn", log.dsn)
    assert (done.code, "never sealed" in done.err, (tmp_path / "x").exists()) == (3, True, False)
    for more in (["--state", "s"], ["--full"], ["--dsn", log.dsn]):
        assert cli("verify", "--export", "x", *more).code == 2
    fill(log.dsn, 3)
    log.seal()
    assert len(cli("export", "--verifiable", "--dsn", log.dsn).out.splitlines()) == 5


def test_a_file_takes_its_place_when_it_is_whole(log: Sealed, cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "exports"
    folder.mkdir()
    file, link = folder / "1.jsonl", folder / "latest"
    file.write_text("the old one")
    link.symlink_to(file)
    assert cli("export", "--verifiable", "-o", str(link), "--dsn", log.dsn).code == 3
    assert (file.read_text(), sorted(folder.iterdir())) == ("the old one", [file, link])
    fill(log.dsn, 3)
    log.seal()
    assert cli("export", "--verifiable", "-o", str(link), "--dsn", log.dsn).code == 0
    assert (link.is_symlink(), len(file.read_text().splitlines()), sorted(folder.iterdir())) == (True, 5, [file, link])
    assert cli("export", "--verifiable", "-o", str(folder / "none" / "x"), "--dsn", log.dsn).err.endswith(
        "x' cannot be written: No such file or directory\n"
    )


def test_a_pipe_is_written_to(log: Sealed, cli: Cli, tmp_path: Path) -> None:
    fill(log.dsn, 3)
    log.seal()
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    assert cli("export", "--verifiable", "-o", str(pipe), "--dsn", log.dsn).code == 0
    reader.join()
    assert (len(read[0].splitlines()), pipe.is_fifo()) == (5, True)


def test_standard_output_is_utf8_whatever_the_terminal_is(log: Sealed, cli: Cli) -> None:
    with Tracevault(connection_string=log.dsn) as audit:
        audit.emit("order.paid", actor={"id": "ü🎈", "type": "user"})
    log.seal()
    done = subprocess.run(
        command("export", "--verifiable", "--dsn", log.dsn),
        env=environment(PYTHONIOENCODING="ascii"),
        check=True,
        stdout=subprocess.PIPE,
    )
    assert '"actor_id": "ü🎈"' in done.stdout.decode()
    path = log.anchor.with_name("log.jsonl")
    path.write_bytes(done.stdout)
    assert verify_export(path, keys=[str(log.key())], anchors=[str(log.anchor)]).verdict is Verdict.OK
