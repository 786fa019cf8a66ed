"""Anchors: what each keeps of a checkpoint, what it notices, and how it fails."""

from __future__ import annotations

import base64
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.logs import NAME, ORIGIN, Log
from tests.witness import SIZE, Answer, Witness, running
from tracevault import ConfigError, RollbackError, SealError
from tracevault.integrity.checkpoint import Checkpoint, cosignature_time
from tracevault.integrity.merkle import tree_root
from tracevault.integrity.note import Note, Signer, Verifier
from tracevault.integrity.tiles import Tile, tile_reader, tiles_of
from tracevault.sealing.anchors import Anchor, command, parse_anchor, read_checkpoints
from tracevault.sealing.anchors import witness as witness_module

KEY = Signer(NAME, b"\x01" * 32)
OTHER_KEY = Signer(NAME, b"\x02" * 32)
VERIFIER = KEY.renamed(ORIGIN).verifier
USERS = f"{NAME}/audit_user_events"


def size_of(note: Note | None) -> int | None:
    return None if note is None else Checkpoint.parse(note.text).size


# -- what names an anchor --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sink"),
    [
        ("file:/var/log/anchor", "file:/var/log/anchor"),
        ("file:anchor", "file:/base/anchor"),
        (" dir: tiles ", "dir:/base/tiles"),
        ("https://w.example.com", "https://w.example.com"),
        ("https://w.example.com:8443/a/", "https://w.example.com:8443/a"),
        ("https://ana:s3cret@w.example.com/a", "https://w.example.com/a"),
        ("HTTPS://w.example.com/a", "https://w.example.com/a"),
        ("http://127.0.0.1:1/a", "http://127.0.0.1:1/a"),
        ("http://[::1]:1/a", "http://[::1]:1/a"),
        ("http://localhost/a", "http://localhost/a"),
        ("command:curl https://ana:s3c@ret@x.example.com/", "command:curl https://…@x.example.com/"),
    ],
)
def test_anchors_that_are_known(text: str, sink: str) -> None:
    anchor = parse_anchor(text, Path("/base"))
    assert anchor.sink == sink
    assert "s3c" not in repr(anchor) or text.startswith("command")


@pytest.mark.parametrize(
    "text",
    [
        *("", "file:", "dir: ", "command:", "anchor", "ftp://w.example.com/", "s3:bucket", "https:", "https://"),
        *("http://w.example.com/a", "http://10.0.0.1/a", "https://w.example.com/a?token=1", "https://w.example.com:x/"),
        *(
            "https://[::1/a",
            "https://w.example.com/a b",
            "https://w.example.com/#key=1",
            "https://w.example.com/#vkey=1",
        ),
        f"https://w.example.com/#vkey={VERIFIER}",
        "https://ana:s3cret@w.example.com:x/",
        "http://ana:s3cret@w.example.com/",
        "ftp://ana:s3cret@w.example.com/",
    ],
)
def test_what_is_no_anchor(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_anchor(text)
    assert caught.value.field == "anchor"
    assert "s3cret" not in str(caught.value)


def test_an_unknown_anchor_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"file:PATH.*dir:PATH.*https://HOST.*command:SHELL"):
        parse_anchor("s3:bucket")


def test_only_checkpoints_are_anchored(tmp_path: Path) -> None:
    note = Note("hello\n", [KEY.sign("hello\n")])
    for text in (f"file:{tmp_path}/f", f"dir:{tmp_path}/d", "http://127.0.0.1:1/", "command:cat"):
        with pytest.raises(SealError, match="only checkpoints"):
            parse_anchor(text).publish(note, Log())
    assert list(tmp_path.iterdir()) == []


# -- file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "anchor.txt"


@pytest.fixture
def file(path: Path) -> Anchor:
    return parse_anchor(f"file:{path}")


def kept(path: Path) -> list[int | None]:
    return [size_of(note) for _, note in read_checkpoints(path)]


def test_a_file_keeps_what_it_is_given(file: Anchor, path: Path) -> None:
    log = Log()
    assert file.newest(ORIGIN) is None
    begun = datetime.now(UTC) - timedelta(seconds=1)
    receipts = [file.publish(log.note(KEY, size), log) for size in (0, 1, 300, 300)]
    found = list(read_checkpoints(path))
    assert [str(note) for _, note in found] == [str(log.note(KEY, size)) for size in (0, 1, 300, 300)]
    assert all(begun <= at <= datetime.now(UTC) for at, _ in found)
    data = path.read_bytes()
    places = [int(receipt.removeprefix("byte ")) for receipt in receipts]
    assert places == sorted(set(places))
    assert all(re.match(rb"# 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ\n" + ORIGIN.encode(), data[at:]) for at in places)
    assert str(file.newest(ORIGIN)) == str(log.note(KEY, 300))


def test_a_file_of_several_logs(file: Anchor, path: Path) -> None:
    users = Log(7, origin=USERS)
    file.publish(users.note(KEY), users)
    for size in range(1000, 1400):  # more than is read from the end in one go
        file.publish(Log(size).note(KEY), Log())
    assert len(list(read_checkpoints(path))) == 401
    assert size_of(file.newest(USERS)) == 7
    assert size_of(file.newest(ORIGIN)) == 1399
    assert file.newest(f"{NAME}/other") is None


def test_the_newest_that_counts_is_the_largest_that_verifies(file: Anchor) -> None:
    for note in (Log(5).note(KEY), Log(9).note(KEY), Log(8).note(KEY), Log(20).note(OTHER_KEY)):
        file.publish(note, Log())
    assert size_of(file.newest(ORIGIN)) == 20
    assert size_of(file.newest(ORIGIN, [VERIFIER])) == 9
    genuine = Log(30).note(KEY)
    file.publish(Note(genuine.text, [genuine.signatures[0]._replace(value=bytes(64))]), Log())
    assert size_of(file.newest(ORIGIN, [VERIFIER])) == 9


def test_a_file_that_is_torn_at_any_place_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "whole"
    for size in (3, 5):
        parse_anchor(f"file:{path}").publish(Log(size).note(KEY), Log())
    whole = path.read_bytes()
    second = whole.index(b"# 20", 1)
    for place in range(second, len(whole) + 1):
        torn = tmp_path / "torn"
        torn.write_bytes(whole[:place])
        anchor = parse_anchor(f"file:{torn}")
        assert kept(torn) == ([3, 5] if place == len(whole) else [3])
        assert size_of(anchor.newest(ORIGIN)) == (5 if place == len(whole) else 3)
        anchor.publish(Log(8).note(KEY), Log())
        assert kept(torn) == ([3, 5, 8] if place == len(whole) else [3, 8])
        assert torn.read_bytes().startswith(whole[:place])
        assert size_of(anchor.newest(ORIGIN)) == 8


@pytest.mark.parametrize("rubbish", [bytes(4096), b"\xff" * 100 + b"\n", b"# 2026-13-01T00:00:00Z\n", b"x" * 200_000])
def test_rubbish_in_a_file_is_passed_over(rubbish: bytes, file: Anchor, path: Path) -> None:
    file.publish(Log(3).note(KEY), Log())
    path.write_bytes(rubbish + path.read_bytes() + rubbish)
    file.publish(Log(5).note(KEY), Log())
    assert kept(path)[-2:] == [3, 5] or rubbish[-1:] != b"\n"
    assert kept(path)[-1] == 5
    assert size_of(file.newest(ORIGIN)) == 5


def test_a_line_that_looks_like_a_time_is_refused(file: Anchor, path: Path) -> None:
    text = str(Checkpoint(ORIGIN, 1, bytes(32), ["# 2026-01-01T00:00:00Z"]))
    with pytest.raises(SealError, match="looks like a time"):
        file.publish(Note(text, [KEY.renamed(ORIGIN).sign(text)]), Log())
    assert not path.exists()


WRITER = """
import sys
from tests.logs import Log
from tests.test_anchors import KEY
from tracevault.sealing.anchors import parse_anchor
print("ready", flush=True)
sys.stdin.readline()
anchor = parse_anchor("file:" + sys.argv[1])
for size in range(int(sys.argv[2]), 400, 2):
    anchor.publish(Log(size).note(KEY), Log())
"""


def test_two_processes_and_one_that_is_killed_share_a_file(file: Anchor, path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in (0, 1)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        while not path.exists() or len(kept(path)) < 20:
            time.sleep(0.01)
        writers[1].kill()
        writers[0].communicate("\n", timeout=60)
        writers[1].communicate("\n", timeout=60)
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert [writer.returncode for writer in writers] == [0, -signal.SIGKILL]
    found = kept(path)
    assert [size for size in found if size is not None and size % 2 == 0] == list(range(0, 400, 2))
    odd = [size for size in found if size is not None and size % 2]
    assert odd == list(range(1, 2 * len(odd), 2))
    assert path.read_bytes().count(b"# 20") == len(found)


def test_who_appends_to_a_file_waits_for_the_other(file: Anchor, path: Path) -> None:
    with path.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=file.publish, args=(Log(3).note(KEY), Log()))
        thread.start()
        thread.join(0.2)
        assert path.read_bytes() == b""
    thread.join(30)
    assert kept(path) == [3]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(SealError, match="cannot be written: No such file"):
        parse_anchor(f"file:{tmp_path}/none/anchor").publish(Log(1).note(KEY), Log())
    with pytest.raises(SealError, match="cannot be written: Is a directory"):
        parse_anchor(f"file:{tmp_path}").publish(Log(1).note(KEY), Log())
    with pytest.raises(SealError, match="cannot be read: Is a directory"):
        parse_anchor(f"file:{tmp_path}").newest(ORIGIN)


# -- directory -------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Anchor:
    return parse_anchor(f"dir:{tmp_path}/static")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "static" / ORIGIN


def root_from_files(folder: Path, size: int) -> bytes:
    """Compute the root from tiles alone, as a stranger would who reads the static log."""
    paths = {(tile.level, tile.number): folder / tile.path for tile in tiles_of(size)}

    def content(place: tuple[int, int]) -> bytes:
        path = paths[place]
        return path.read_bytes() if path.exists() else path.parent.with_name(path.parent.name[:-2]).read_bytes()

    return tree_root(size, tile_reader(lambda places: {place: content(place) for place in places}, size))


def test_a_directory_is_a_static_log(directory: Anchor, folder: Path) -> None:
    log = Log()
    sizes = (0, 1, 2, 255, 256, 257, 700, 700, 65_536, 70_000)
    for size in sizes:
        receipt = directory.publish(log.note(KEY, size), log)
        assert receipt == f"{ORIGIN}/checkpoints/{size}"
        assert (folder / "checkpoint").read_text() == str(log.note(KEY, size))
        assert str(directory.newest(ORIGIN, [VERIFIER])) == str(log.note(KEY, size))
        for tile in tiles_of(size):
            assert len((folder / tile.path).read_bytes()) == 32 * tile.width
    for size in sizes:
        assert (folder / "checkpoints" / str(size)).read_text() == str(log.note(KEY, size))
        assert root_from_files(folder, size) == log.checkpoint(size).root
    # Partial tiles are left where there is no full one.
    partial = sorted(path.parent.name for path in folder.glob("tile/**/*.p/*"))
    assert partial == ["000.p", "001.p", "273.p"]
    assert len([path for path in folder.glob("tile/0/**/*") if path.is_file()]) == 273 + 1


def test_each_log_has_a_folder_of_its_own(directory: Anchor, folder: Path) -> None:
    users = Log(3, "u", origin=USERS)
    directory.publish(users.note(KEY), users)
    assert directory.newest(ORIGIN) is None
    directory.publish(Log(5).note(KEY), Log(5))
    assert size_of(directory.newest(USERS)) == 3
    assert (folder.parent / "audit_user_events" / "checkpoint").exists()
    for origin in ("../x", "/etc/x", "a//b", "a/./b", "a/"):
        with pytest.raises(SealError, match="cannot name a folder"):
            directory.publish(Log(1, origin=origin).note(KEY), Log(1))


def test_a_directory_notices_another_history(directory: Anchor, folder: Path) -> None:
    log = Log(300)
    directory.publish(log.note(KEY), log)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for other in (Log(300, "x"), Log(301, "x"), Log(1000, "x", fork=299), Log(600, "x", fork=10)):
        with pytest.raises(RollbackError, match="ROLLBACK DETECTED"):
            directory.publish(other.note(KEY), other)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("tile", [Tile(0, 0, 256), Tile(0, 1, 44), Tile(1, 0, 1)], ids=lambda tile: tile.path)
def test_tiles_are_written_once(tile: Tile, directory: Anchor, folder: Path) -> None:
    path = folder / tile.path
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(32 * tile.width))
    with pytest.raises(RollbackError, match=tile.path):
        directory.publish(Log(300).note(KEY), Log())
    assert path.read_bytes() == bytes(32 * tile.width)
    assert directory.newest(ORIGIN) is None


def test_an_older_checkpoint_takes_no_other_place(directory: Anchor, folder: Path) -> None:
    log = Log()
    directory.publish(log.note(KEY, 600), log)
    directory.publish(log.note(KEY, 300), log)
    assert size_of(directory.newest(ORIGIN)) == 600
    assert (folder / "checkpoints/300").exists()
    assert not (folder / "tile/0/001.p").exists()
    assert root_from_files(folder, 300) == log.checkpoint(300).root
    with pytest.raises(RollbackError, match="tile/0/001"):
        directory.publish(Log(300, "x", fork=299).note(KEY), Log(300, "x", fork=299))


def test_a_checkpoint_signed_anew_is_kept(directory: Anchor, folder: Path) -> None:
    log = Log(5)
    text = str(log.checkpoint())
    directory.publish(log.note(KEY), log)
    both = Note(text, [key.renamed(ORIGIN).sign(text) for key in (KEY, OTHER_KEY)])
    directory.publish(both, log)
    assert (folder / "checkpoint").read_text() == str(both) == (folder / "checkpoints/5").read_text()


class Torn:
    """A log whose database goes away after some tiles."""

    def __init__(self, log: Log, tiles: int) -> None:
        self.log = log
        self.left = tiles

    def tile(self, level: int, number: int, width: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise SealError("the database is gone")
        return self.log.tile(level, number, width)

    def prove(self, old: int, new: int) -> list[bytes]:
        return self.log.prove(old, new)


def test_a_checkpoint_comes_after_all_that_it_needs(directory: Anchor, folder: Path) -> None:
    log = Log()
    directory.publish(log.note(KEY, 300), log)
    for tiles in range(5):
        with suppress(SealError):
            directory.publish(log.note(KEY, 1000), Torn(log, tiles))
        size = size_of(directory.newest(ORIGIN))
        assert size == (300 if tiles < 4 else 1000)
        assert root_from_files(folder, size) == log.checkpoint(size).root
        assert (folder / f"checkpoints/{size}").exists()


DYING = """
import os, signal, sys
from tests.logs import NAME, Log, Signer
from tracevault.sealing.anchors import parse_anchor
number, calls = int(sys.argv[2]), 0
def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
for name in ("write", "fsync", "rename", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
log = Log(700)
parse_anchor(sys.argv[1]).publish(log.note(Signer(NAME, bytes([1] * 32))), log)
"""


def test_a_publisher_that_is_killed_leaves_a_whole_log(directory: Anchor, folder: Path, tmp_path: Path) -> None:
    log, before = Log(300), tmp_path / "before"
    directory.publish(log.note(KEY), log)
    folder.rename(before)
    sizes = []
    for number in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        arguments = [sys.executable, "-c", DYING, directory.sink, str(number)]
        code = subprocess.run(arguments, timeout=60, check=False).returncode
        note = directory.newest(ORIGIN, [VERIFIER])
        assert note is not None
        sizes.append(Checkpoint.parse(note.text).size)
        assert root_from_files(folder, sizes[-1]) == log.checkpoint(sizes[-1]).root
        for path in (folder / "checkpoints").iterdir():
            assert Note.parse(path.read_text()).verified_by([VERIFIER]) == [VERIFIER]
        directory.publish(log.note(KEY, 800), log)
        assert {path.name for path in folder.iterdir()} == {".lock", "checkpoint", "checkpoints", "tile"}
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert sizes == sorted(sizes)
    assert set(sizes) == {300, 700}
    assert len(sizes) > 15


def test_a_tile_that_is_too_short_is_not_kept(directory: Anchor, folder: Path) -> None:
    class Short(Log):
        def tile(self, level: int, number: int, width: int) -> bytes:
            return super().tile(level, number, width)[:-32]

    with pytest.raises(SealError, match="the database has no tile/0/000"):
        directory.publish(Log(3).note(KEY), Short(3))
    assert directory.newest(ORIGIN) is None


@pytest.mark.parametrize("content", [b"", b"\xff", b"hello\n", bytes(100)])
def test_a_directory_with_something_else_in_it(content: bytes, directory: Anchor, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "checkpoint").write_bytes(content)
    with pytest.raises(SealError, match="is no checkpoint"):
        directory.newest(ORIGIN)
    with pytest.raises(SealError, match="is no checkpoint"):
        directory.publish(Log(3).note(KEY), Log())
    assert (folder / "checkpoint").read_bytes() == content


def test_a_directory_whose_checkpoint_is_not_ours(directory: Anchor, folder: Path) -> None:
    directory.publish(Log(3).note(OTHER_KEY), Log())
    assert size_of(directory.newest(ORIGIN)) == 3
    with pytest.raises(SealError, match="not signed by a known key"):
        directory.newest(ORIGIN, [VERIFIER])
    (folder / "checkpoint").write_text(str(Log(3, origin=USERS).note(KEY)))
    with pytest.raises(SealError, match="in place of"):
        directory.publish(Log(3).note(KEY), Log())


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(SealError, match="cannot be written: Not a directory"):
        parse_anchor(f"dir:{tmp_path}/f").publish(Log(1).note(KEY), Log())


# -- witness ---------------------------------------------------------------------------------------------------


@pytest.fixture
def witness() -> Iterator[Witness]:
    with running(Witness([VERIFIER])) as served:
        yield served


@pytest.fixture
def remote(witness: Witness) -> Anchor:
    return parse_anchor(f"{witness.url}#vkey={witness.vkey}")


def olds(witness: Witness) -> list[str]:
    return [request.partition("\n")[0] for request in witness.requests]


def test_a_witness_cosigns_a_log_that_grows(witness: Witness, remote: Anchor) -> None:
    log = Log()
    for size in (0, 1, 2, 300, 300, 700):
        note = log.note(KEY, size)
        receipt = remote.publish(note, log)
        # What stands in the receipt completes the note; the stranger's signature is left out.
        cosigned = Note.parse(str(note) + receipt)
        assert cosigned.verified_by([VERIFIER, Verifier.parse(witness.vkey)]) == [VERIFIER, witness.signer.verifier]
        assert len(cosigned.signatures) == 2
        assert abs(cosignature_time(cosigned.signatures[1]) - time.time()) < 60
        assert witness.held[ORIGIN] == log.checkpoint(size)
    assert olds(witness) == ["old 0", "old 0", "old 1", "old 2", "old 300", "old 300"]
    assert set(witness.paths) == {"/log/add-checkpoint"}
    assert remote.newest(ORIGIN) is None


def test_a_witness_says_what_it_took_last(witness: Witness, remote: Anchor) -> None:
    log = Log()
    remote.publish(log.note(KEY, 5), log)
    another = parse_anchor(f"{witness.url}/#vkey={witness.vkey}")
    another.publish(log.note(KEY, 9), log)
    remote.publish(log.note(KEY, 12), log)
    assert olds(witness) == ["old 0", "old 0", "old 5", "old 5", "old 9"]
    with pytest.raises(SealError, match=r"cosigned size 12 .* this is size 11"):
        remote.publish(log.note(KEY, 11), log)
    assert witness.held[ORIGIN].size == 12


@pytest.mark.parametrize("other", [Log(5, "x"), Log(9, "x", fork=4)], ids=["same size", "longer"])
def test_a_witness_notices_another_history(other: Log, witness: Witness, remote: Anchor) -> None:
    remote.publish(Log(5).note(KEY), Log())
    with pytest.raises(RollbackError, match="ROLLBACK DETECTED: the witness"):
        remote.publish(other.note(KEY), other)
    with pytest.raises(RollbackError, match="ROLLBACK DETECTED: the witness"):
        parse_anchor(witness.url).publish(other.note(KEY), other)
    assert witness.held[ORIGIN] == Log(5).checkpoint()


def test_a_witness_that_does_not_know_us(witness: Witness, remote: Anchor) -> None:
    with pytest.raises(SealError, match=r"answered 404: unknown log; it does not know the origin"):
        remote.publish(Log(1, origin=USERS).note(KEY), Log())
    with pytest.raises(SealError, match=r"answered 403: .*give it the verifier key"):
        remote.publish(Log(1).note(OTHER_KEY), Log())
    assert witness.held == {}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(400, b"no\x1b[2J\n request\n"), "answered 400: no [2J request"),
        (Answer(500, b"x" * 5000), "answered 500: xxx"),
        (Answer(503, b""), "answered 503"),
        (Answer(302, b"", headers=(("Location", "http://127.0.0.1:1/"),)), "answered 302"),
        (Answer(307, b"", headers=(("Location", "http://127.0.0.1:1/"),)), "answered 307"),
        (Answer(200, b"x" * 70_000), "more than 65,536 bytes"),
        (Answer(200, b""), "does not verify"),
        (Answer(200, b"\xff"), "does not verify"),
        (Answer(200, "— witness.example.com/w1 AAAA\n".encode()), "does not verify"),
        (Answer(409, b"3\n", SIZE), "answered 409"),
        (Answer(409, b"x\n", SIZE), "an unknown size"),
        (Answer(409, b"9" * 30, SIZE), "an unknown size"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_answers_that_are_none(answer: Answer, said: str, witness: Witness, remote: Anchor) -> None:
    witness.answer = answer
    with pytest.raises(SealError) as caught:
        remote.publish(Log(5).note(KEY), Log())
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()
    assert len(witness.requests) == (2 if said == "answered 409" else 1)
    witness.answer = None
    assert remote.publish(Log(5).note(KEY), Log())


def test_a_cosignature_of_something_else_does_not_count(witness: Witness, remote: Anchor) -> None:
    text = str(Log(4).checkpoint())
    line = witness.signer.sign(text, time=1)
    witness.answer = Answer(200, str(Note(text, [line])).removeprefix(f"{text}\n").encode())
    with pytest.raises(SealError, match="does not verify"):
        remote.publish(Log(5).note(KEY), Log())
    # With the key of another witness the genuine one is a stranger's.
    witness.answer = None
    stranger = Signer(witness.signer.name, bytes(32), witness.signer.algorithm)
    with pytest.raises(SealError, match="no cosignature of its key"):
        parse_anchor(f"{witness.url}#vkey={stranger.verifier}").publish(Log(5).note(KEY), Log())
    assert parse_anchor(witness.url).publish(Log(5).note(KEY), Log()).count("—") == 2


def test_a_password_goes_to_the_witness_alone(witness: Witness) -> None:
    url = witness.url.replace("http://", "http://ana:s3%20cret@")
    anchor = parse_anchor(url)
    anchor.publish(Log(5).note(KEY), Log())
    assert witness.authorizations == ["Basic " + base64.b64encode(b"ana:s3 cret").decode()]
    assert "cret" not in anchor.sink + repr(anchor)
    witness.answer = Answer(500, b"")
    with pytest.raises(SealError) as caught:
        anchor.publish(Log(5).note(KEY), Log())
    assert "cret" not in str(caught.value)


def test_no_proxy_has_a_part_in_what_stays_on_this_machine(witness: Witness, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert parse_anchor(witness.url).publish(Log(5).note(KEY), Log())


def test_a_witness_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(witness_module, "TIMEOUT", 0.2)
        begun = time.monotonic()
        with pytest.raises(SealError, match="cannot be reached: timed out"):
            parse_anchor(url).publish(Log(5).note(KEY), Log())
        assert time.monotonic() - begun < 5
    with pytest.raises(SealError, match=r"cannot be reached: .*refused"):
        parse_anchor(url).publish(Log(5).note(KEY), Log())


def test_a_witness_that_never_ends(witness: Witness, remote: Anchor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness_module, "TIMEOUT", 0.2)
    witness.answer, witness.drip = Answer(200, b"x" * 65_000), 0.1
    with pytest.raises(SealError, match="too slowly"):
        remote.publish(Log(5).note(KEY), Log())


# -- command ---------------------------------------------------------------------------------------------------


def test_a_command_gets_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACEVAULT_SIGNING_KEY", KEY.encode())
    monkeypatch.chdir(tmp_path)
    anchor = parse_anchor('command:cat >got && echo "$TRACEVAULT_ORIGIN $TRACEVAULT_SIZE $TRACEVAULT_SIGNING_KEY."')
    assert anchor.publish(Log(7).note(KEY), Log()) == f"{ORIGIN} 7 ."
    assert (tmp_path / "got").read_text() == str(Log(7).note(KEY))
    assert anchor.newest(ORIGIN) is None


@pytest.mark.parametrize(
    ("text", "receipt"),
    [
        ("true", ""),
        ("printf 'a\\000b\\377'", "a\ufffdb\ufffd"),
        ("head -c 1000000 /dev/zero | tr '\\0' x", "x" * command.MAX_RECEIPT),
        ("echo loud >&2; echo quiet", "quiet"),
    ],
)
def test_receipts_of_commands(text: str, receipt: str) -> None:
    assert parse_anchor(f"command:{text}").publish(Log(7).note(KEY), Log()) == receipt


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo first >&2; echo 'the last' >&2; exit 3", "failed with exit code 3: the last"),
        ("false", "failed with exit code 1"),
        ("kill -TERM $$", "was ended by signal 15"),
        ("no-such-program", "failed with exit code 127"),
        ("printf '\\033[2Jbad\\n' >&2; exit 1", "failed with exit code 1: [2Jbad"),
        ("head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 1", "exit code 1: xxx"),
    ],
)
def test_commands_that_fail(text: str, said: str) -> None:
    with pytest.raises(SealError) as caught:
        parse_anchor(f"command:{text}").publish(Log(7).note(KEY), Log())
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_command_that_does_not_end_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "TIMEOUT", 0.5)
    pid = tmp_path / "pid"
    with pytest.raises(SealError, match=r"took over 0.5 seconds and was killed"):
        parse_anchor(f"command:sleep 300 & echo $! >{pid}; wait").publish(Log(7).note(KEY), Log())
    for _ in range(500):
        # An orphan that nobody reaps is as dead as one that is gone.
        state = Path(f"/proc/{int(pid.read_text())}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    pytest.fail("the child lives on")
