"""What signs checkpoints: it never signs two histories, whatever happens to the database, to it, or to its state."""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.logs import NAME, ORIGIN, Log
from tracevault import RollbackError, SealError
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.note import Note, Signer
from tracevault.sealing import durable
from tracevault.sealing import signer as signer_module
from tracevault.sealing.keys import verifiers
from tracevault.sealing.signer import CheckpointSigner, SigningState, state_path

KEY = Signer(NAME, b"\x01" * 32)
OTHER_KEY = Signer(NAME, b"\x02" * 32)


def open_signer(folder: Path, *signers: Signer) -> CheckpointSigner:
    return CheckpointSigner(signers or (KEY,), SigningState(state_path(folder / "seal.key")))


def never(old: int, new: int) -> list[bytes]:
    raise AssertionError(f"no proof from {old} to {new} was needed")


def signed_sizes(folder: Path) -> set[int]:
    state = SigningState(state_path(folder / "seal.key")).read() or {}
    return {one.size for one in state.get(ORIGIN, {}).values()}


def test_it_signs_a_log_that_grows(tmp_path: Path) -> None:
    log, signer = Log(), open_signer(tmp_path)
    for size in (0, 0, 1, 1, 2, 7, 256, 257, 300):
        note = signer.sign(log.checkpoint(size), log.prove)
        assert len(note.verified_by(verifiers([KEY], ORIGIN))) == 1
        assert Checkpoint.parse(Note.parse(str(note)).text) == log.checkpoint(size)
        last = signer.last_signed(ORIGIN)
        assert last is not None
        assert (last.size, last.root) == (size, log.checkpoint(size).root)
    path = state_path(tmp_path / "seal.key")
    assert path.name == "seal.key.state"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(file.name for file in tmp_path.iterdir()) == ["seal.key.state", "seal.key.state.lock"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (Log(9), "size 10, and the log has size 9"),
        (Log(0), "size 10, and the log has size 0"),
        (Log(10, "x"), "size 10, and the log of the same size has another root"),
        (Log(12, "x"), "size 12 does not begin with what was signed"),
        (Log(12, "x", fork=9), "size 12 does not begin with what was signed"),
    ],
    ids=["shorter", "empty", "same size", "longer", "longer, last leaf"],
)
@pytest.mark.parametrize("known_by", ["state", "anchor"])
def test_a_rollback_is_refused(changed: Log, said: str, known_by: str, tmp_path: Path) -> None:
    signer = open_signer(tmp_path)
    before = signer.sign(Log(10).checkpoint(), never)
    newest = []
    if known_by == "anchor":
        state_path(tmp_path / "seal.key").unlink()
        newest = [before]
    with pytest.raises(RollbackError, match="ROLLBACK DETECTED") as caught:
        signer.sign(changed.checkpoint(), changed.prove, newest)
    assert said in str(caught.value)
    assert ("an anchor holds" if newest else "this key has signed") in str(caught.value)
    assert signed_sizes(tmp_path) == (set() if newest else {10})
    good = Log(12)
    assert signer.sign(good.checkpoint(), good.prove, newest)
    # A change behind what was signed is no rollback.
    later = Log(14, "x", fork=12)
    assert signer.sign(later.checkpoint(), later.prove, newest)


def test_every_anchor_counts(tmp_path: Path) -> None:
    signer = open_signer(tmp_path)
    with pytest.raises(RollbackError, match="size 20"):
        signer.sign(Log(12).checkpoint(), Log().prove, [Log(5).note(KEY), Log(20).note(KEY), Log(7).note(KEY)])


def test_notes_that_say_nothing_are_passed_over(tmp_path: Path) -> None:
    signer, log = open_signer(tmp_path), Log(5)
    genuine, users = Log(20).note(KEY), Log(20, "forged", origin=f"{NAME}/users")
    newest = [
        Log(20, "forged").note(OTHER_KEY),
        users.note(KEY),
        Note(genuine.text, [genuine.signatures[0]._replace(value=bytes(64))]),
        Note(str(users.checkpoint()), [KEY.renamed(ORIGIN).sign(str(users.checkpoint()))]),
        Note("no checkpoint\n", [KEY.renamed(ORIGIN).sign("no checkpoint\n")]),
    ]
    assert signer.sign(log.checkpoint(), log.prove, newest)


def test_a_checkpoint_of_another_name_is_not_signed(tmp_path: Path) -> None:
    for origin in ("log.example.com/other/audit_logs", NAME, f"{NAME}2/audit_logs"):
        with pytest.raises(SealError, match="signs for origins"):
            open_signer(tmp_path).sign(Log(1, origin=origin).checkpoint(), never)
    assert open_signer(tmp_path).state.read() is None


def test_logs_do_not_mix(tmp_path: Path) -> None:
    signer, users = open_signer(tmp_path), Log(3, "u", origin=f"{NAME}/users")
    signer.sign(Log(10).checkpoint(), never)
    signer.sign(users.checkpoint(), never)
    assert {origin: one.size for origin in (ORIGIN, f"{NAME}/users") if (one := signer.last_signed(origin))} == {
        ORIGIN: 10,
        f"{NAME}/users": 3,
    }


def test_the_state_is_written_before_the_signature_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(self: Signer, text: str, *, time: int | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Signer, "sign", dies)
    with pytest.raises(KeyboardInterrupt):
        open_signer(tmp_path).sign(Log(10).checkpoint(), never)
    assert signed_sizes(tmp_path) == {10}


def test_without_the_state_on_the_disk_nothing_is_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signer = open_signer(tmp_path)
    signer.sign(Log(10).checkpoint(), never)

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(SealError, match=r"No space left.*nothing was signed"):
            signer.sign(Log(12).checkpoint(), Log().prove)
    assert signed_sizes(tmp_path) == {10}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["seal.key.state", "seal.key.state.lock"]


def test_what_cannot_be_proved_now_is_no_rollback(tmp_path: Path) -> None:
    signer = open_signer(tmp_path)
    signer.sign(Log(10).checkpoint(), never)

    def unreachable(old: int, new: int) -> list[bytes]:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        signer.sign(Log(12).checkpoint(), unreachable)
    assert signed_sizes(tmp_path) == {10}


VICTIM = """
import os, signal, sys
from pathlib import Path
from tests.logs import Log
from tests.test_signer import open_signer
name, number = sys.argv[2], int(sys.argv[3])
real, calls = getattr(os, name), 0
def killed(*args, **kwargs):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(os, name, killed)
log = Log(12)
print(open_signer(Path(sys.argv[1])).sign(log.checkpoint(), log.prove), flush=True)
"""


@pytest.mark.parametrize("call", ["write 1", "fsync 1", "rename 1", "fsync 2"])
def test_killed_while_the_state_is_written(call: str, tmp_path: Path) -> None:
    signer = open_signer(tmp_path)
    signer.sign(Log(10).checkpoint(), never)
    arguments = [sys.executable, "-c", VICTIM, str(tmp_path), *call.split()]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), done.stderr
    assert signed_sizes(tmp_path) == ({12} if call == "fsync 2" else {10})
    log = Log(13)
    assert signer.sign(log.checkpoint(), log.prove, expect_state=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["seal.key.state", "seal.key.state.lock"]


def _state(entry: str) -> bytes:
    root = base64.b64encode(bytes(32)).decode()
    return f'{{"format": 1, "signed": {{"o": {{"k": {entry % root}}}}}}}'.encode()


BROKEN = {
    "empty": b"",
    "zeros": bytes(300),
    "torn": b'{"format": 1, "signed": {"log.example.com/shop/audit',
    "another version": b'{"format": 2, "signed": {}}',
    "no object": b"[]",
    "bytes": b"\xff\xfe",
    "too deep": b"[" * 100_000,
    "size": _state('{"size": -1, "root": "%s", "at": "2026-01-01T00:00:00+00:00"}'),
    "true": _state('{"size": true, "root": "%s", "at": "2026-01-01T00:00:00+00:00"}'),
    "root": _state('{"size": 1, "root": "AA==%.0s", "at": "2026-01-01T00:00:00+00:00"}'),
    "time": _state('{"size": 1, "root": "%s", "at": "2026-01-01T00:00:00"}'),
    "list": b'{"format": 1, "signed": []}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_state_stops_the_signer(content: bytes, tmp_path: Path) -> None:
    signer, path = open_signer(tmp_path), state_path(tmp_path / "seal.key")
    path.write_bytes(content)
    path.chmod(0o600)
    for act in (signer.sign, signer.adopt):
        with pytest.raises(SealError, match=r"is broken: restore it.*--adopt-state"):
            act(Log(10).checkpoint(), never)
    assert path.read_bytes() == content


def test_a_state_with_one_bit_turned_is_never_a_smaller_one(tmp_path: Path) -> None:
    signer, path = open_signer(tmp_path), state_path(tmp_path / "seal.key")
    signer.sign(Log(10).checkpoint(), never)
    path.write_bytes(path.read_bytes().replace(b'"size": 10', b'"size": 2'))
    with pytest.raises(RollbackError):
        signer.sign(Log(11).checkpoint(), Log().prove)


def test_a_state_that_others_may_write_is_refused(tmp_path: Path) -> None:
    signer, path = open_signer(tmp_path), state_path(tmp_path / "seal.key")
    signer.sign(Log(10).checkpoint(), never)
    path.chmod(0o620)
    with pytest.raises(SealError, match=r"others may write.*chmod 600"):
        signer.sign(Log(10).checkpoint(), never)


def test_a_state_that_cannot_be_read_or_locked(tmp_path: Path) -> None:
    path = state_path(tmp_path / "seal.key")
    path.mkdir()
    with pytest.raises(SealError, match="cannot be read"):
        open_signer(tmp_path).sign(Log(10).checkpoint(), never)
    with pytest.raises(SealError, match="cannot be locked: No such file"):
        open_signer(tmp_path / "none").sign(Log(10).checkpoint(), never)


def test_a_missing_state_is_adopted_by_hand(tmp_path: Path) -> None:
    signer, log = open_signer(tmp_path), Log(10)
    with pytest.raises(SealError, match=r"is missing.*restore it.*`tracevault seal --adopt-state`"):
        signer.sign(log.checkpoint(), never, expect_state=True)
    assert signer.state.read() is None
    with pytest.raises(RollbackError):
        signer.adopt(log.checkpoint(), log.prove, [Log(11).note(KEY)])
    assert signer.state.read() is None
    signer.adopt(log.checkpoint(), log.prove, [Log(9).note(KEY)])
    assert signed_sizes(tmp_path) == {10}
    assert signer.sign(log.grow().checkpoint(), log.prove, expect_state=True)
    # Nor is a state that is there overruled.
    with pytest.raises(RollbackError):
        signer.adopt(Log(5).checkpoint())
    with pytest.raises(SealError, match="takes a proof"):
        signer.adopt(Log(20).checkpoint())


def test_a_state_of_other_logs_alone_is_no_state(tmp_path: Path) -> None:
    signer = open_signer(tmp_path)
    signer.sign(Log(3, origin=f"{NAME}/users").checkpoint(), never)
    with pytest.raises(SealError, match=f"knows nothing of '{ORIGIN}'"):
        signer.sign(Log(10).checkpoint(), never, expect_state=True)


def test_rotation_with_an_overlap(tmp_path: Path) -> None:
    log = Log(10)
    open_signer(tmp_path, KEY).sign(log.checkpoint(), never)
    both = open_signer(tmp_path, KEY, OTHER_KEY)
    note = both.sign(log.grow().checkpoint(), log.prove, expect_state=True)
    for key in (KEY, OTHER_KEY):
        assert len(note.verified_by(verifiers([key], ORIGIN))) == 1
    new = open_signer(tmp_path, OTHER_KEY)
    with pytest.raises(RollbackError):
        new.sign(Log(9).checkpoint(), never, expect_state=True)
    note = new.sign(log.grow().checkpoint(), log.prove, expect_state=True)
    assert note.verified_by(verifiers([KEY], ORIGIN)) == []
    # The old one, should it come back, is bound by what the new one signed.
    with pytest.raises(RollbackError):
        open_signer(tmp_path, KEY).sign(Log(11).checkpoint(), never)


def test_a_key_that_was_just_exchanged_is_bound_as_well(tmp_path: Path) -> None:
    open_signer(tmp_path, KEY).sign(Log(10).checkpoint(), never)
    with pytest.raises(RollbackError):
        open_signer(tmp_path, OTHER_KEY).sign(Log(10, "x").checkpoint(), never, expect_state=True)


def test_a_faster_sealer_is_no_rollback(tmp_path: Path) -> None:
    """The slower one reads the log when no other can sign any more."""
    log, slow, fast = Log(10), open_signer(tmp_path), open_signer(tmp_path)

    def overtaken() -> Iterator[Note]:
        yield fast.sign(log.grow().checkpoint(), log.prove)

    assert Checkpoint.parse(slow.sign(log.checkpoint, log.prove, overtaken()).text).size == 11
    with pytest.raises(RollbackError):
        slow.sign(log.checkpoint(), log.prove, overtaken())


def test_a_state_that_is_held_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signer, log = open_signer(tmp_path), Log(10)
    notes: list[Note] = []
    with signer.state.lock():
        thread = threading.Thread(target=lambda: notes.append(signer.sign(log.checkpoint(), never)))
        thread.start()
        thread.join(0.2)
        assert notes == []
    thread.join(30)
    assert len(notes) == 1
    monkeypatch.setattr(signer_module, "LOCK_TIMEOUT", 0.1)
    with SigningState(signer.state.path).lock(), pytest.raises(SealError, match="held by another signer"):
        signer.sign(log.checkpoint(), never)


RACER = """
import sys
from pathlib import Path
from tests.logs import Log
from tests.test_signer import open_signer
from tracevault import RollbackError
signer, log = open_signer(Path(sys.argv[1])), Log(history=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for size in range(1, 60):
    try:
        signer.sign(log.checkpoint(size), log.prove)
    except RollbackError:
        continue
    print(size, flush=True)
"""


def test_of_two_processes_with_two_histories_one_signs(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), history],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for history in ("a", "b")
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        # Let go as soon as both are there.
        signed = [racer.communicate("\n", timeout=60)[0].split() for racer in _let_go(racers)]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(map(len, signed)) == [0, 59]


def _let_go(racers: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    return racers


def test_the_state_says_what_it_is(tmp_path: Path) -> None:
    open_signer(tmp_path).sign(Log(10).checkpoint(), never)
    document = json.loads(state_path(tmp_path / "seal.key").read_bytes())
    (entry,) = document["signed"][ORIGIN].values()
    assert document["format"] == 1
    assert entry["size"] == 10
    assert set(document["signed"][ORIGIN]) == {KEY.renamed(ORIGIN).verifier.key_id.hex()}
    assert set(entry) == {"size", "root", "at"}


def test_a_file_that_is_replaced_keeps_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "f"
    durable.replace(path, b"1", 0o600)
    durable.replace(path, b"2", 0o640)
    assert path.read_bytes() == b"2"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]
