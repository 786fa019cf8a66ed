"""The publisher: every anchor is told of the newest checkpoints, and none waits for another."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.logs import NAME, ORIGIN, Log
from tracevault import ProofError, SealError, TracevaultError
from tracevault.integrity.checkpoint import Checkpoint
from tracevault.integrity.note import Note, Signer, Verifier
from tracevault.sealing import publisher as publisher_module
from tracevault.sealing.anchors import LogView
from tracevault.sealing.publisher import Publisher

KEY = Signer(NAME, b"\x01" * 32)
USERS = f"{NAME}/audit_user_events"


class Sink:
    """An anchor whose other side does as the test says."""

    def __init__(self, name: str = "sink") -> None:
        self.sink = name
        self.told: list[tuple[str, int]] = []
        self.times: list[float] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Callable[[str], Exception | None] = lambda origin: None

    def publish(self, note: Note, log: LogView) -> str:
        checkpoint = Checkpoint.parse(note.text)
        self.told.append((checkpoint.origin, checkpoint.size))
        self.times.append(time.monotonic())
        assert self.gate.wait(30)
        if error := self.error(checkpoint.origin):
            raise error
        return f"receipt {checkpoint.size}"

    def newest(self, origin: str, verifiers: Sequence[Verifier] = ()) -> Note | None:
        return None

    @property
    def sizes(self) -> list[int]:
        return [size for _, size in self.told]


@pytest.fixture
def opened() -> Iterator[list[Publisher]]:
    found: list[Publisher] = []
    yield found
    for publisher in found:
        publisher.close(30)


Open = Callable[..., Publisher]


@pytest.fixture
def publish_to(opened: list[Publisher]) -> Open:
    def start(*sinks: Sink, interval: float = 0.0) -> Publisher:
        opened.append(Publisher(sinks, interval=interval))
        return opened[-1]

    return start


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(publisher_module, "LONGEST_PAUSE", 0.1)


def submit(publisher: Publisher, size: int, origin: str = ORIGIN) -> None:
    log = Log(size, origin=origin)
    publisher.submit(log.note(KEY), log)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_all_anchors_are_told(publish_to: Open) -> None:
    sinks = [Sink("a"), Sink("b")]
    publisher = publish_to(*sinks)
    assert publisher.settle(0)
    submit(publisher, 3)
    assert publisher.settle(30)
    submit(publisher, 5)
    submit(publisher, 7, USERS)
    assert publisher.settle(30)
    for sink in sinks:
        assert sorted(sink.told) == [(ORIGIN, 3), (ORIGIN, 5), (USERS, 7)]
    outcomes = publisher.outcomes()
    assert {(one.sink, one.origin, one.size, one.receipt, one.error) for one in outcomes} == {
        (name, origin, size, f"receipt {size}", None)
        for name in ("a", "b")
        for origin, size in ((ORIGIN, 3), (ORIGIN, 5), (USERS, 7))
    }
    assert publisher.outcomes() == []
    for status in publisher.status():
        assert status.last_success is not None
        assert (status.waiting, status.failures, status.last_error) == (0, 0, None)


def test_a_slow_anchor_delays_nobody_and_gets_the_newest_next(publish_to: Open) -> None:
    slow, fast = Sink("slow"), Sink("fast")
    slow.gate.clear()
    publisher = publish_to(slow, fast)
    submit(publisher, 1)
    wait_for(lambda: slow.sizes == fast.sizes == [1])
    for size in range(2, 6):
        submit(publisher, size)
        wait_for(lambda size=size: fast.sizes[-1:] == [size])  # type: ignore[misc]
    assert not publisher.settle(0.05)
    assert [status.waiting for status in publisher.status()] == [1, 0]
    slow.gate.set()
    assert publisher.settle(30)
    assert slow.sizes == [1, 5]
    assert fast.sizes == [1, 2, 3, 4, 5]
    assert sorted(one.size for one in publisher.outcomes() if one.sink == "slow") == [1, 5]


def test_between_two_checkpoints_of_a_log_some_time_passes(publish_to: Open) -> None:
    sink = Sink()
    publisher = publish_to(sink, interval=0.2)
    begun = time.monotonic()
    for size in range(1, 60):
        submit(publisher, size)
        time.sleep(0.01)
    submit(publisher, 1, USERS)
    wait_for(lambda: publisher.status()[0].waiting == 0)
    assert (ORIGIN, 59) in sink.told
    told = [at for at, (origin, _) in zip(sink.times, sink.told, strict=True) if origin == ORIGIN]
    assert all(later - earlier >= 0.2 for earlier, later in itertools.pairwise(told))
    assert 3 <= len(told) <= (time.monotonic() - begun) / 0.2 + 1
    # Another log does not wait for it.
    assert sink.told.index((USERS, 1)) < len(sink.told) - 1


def test_settling_waits_for_no_interval_and_no_pause(publish_to: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "FIRST_PAUSE", 120.0)
    good, broken = Sink("good"), Sink("broken")
    broken.error = lambda origin: SealError("down")
    publisher = publish_to(good, broken, interval=3600)
    for size in range(1, 8):
        submit(publisher, size)
        begun = time.monotonic()
        assert not publisher.settle(30)
        assert time.monotonic() - begun < 10
    assert good.sizes == broken.sizes == [1, 2, 3, 4, 5, 6, 7]
    submit(publisher, 8)
    time.sleep(0.1)
    assert good.sizes[-1] == broken.sizes[-1] == 7
    broken.error = lambda origin: None
    assert publisher.settle(30)
    assert good.sizes[-1] == broken.sizes[-1] == 8


@pytest.mark.usefixtures("quick")
def test_after_an_error_it_tries_again_with_the_newest(publish_to: Open, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tracevault")
    broken, good = Sink("broken"), Sink("good")
    broken.error = lambda origin: SealError("no such luck")
    publisher = publish_to(broken, good)
    submit(publisher, 1)
    assert not publisher.settle(30)
    wait_for(lambda: publisher.status()[0].failures >= 3)
    submit(publisher, 2)
    wait_for(lambda: broken.sizes[-1] == 2)
    status = publisher.status()[0]
    assert status.last_error == "no such luck"
    assert status.last_error_at is not None
    assert (status.last_success, status.last_size, status.waiting) == (None, None, 1)
    broken.error = lambda origin: None
    wait_for(lambda: publisher.status()[0].failures == 0)
    assert publisher.settle(30)
    status = publisher.status()[0]
    assert (status.last_error, status.last_size, status.waiting) == (None, 2, 0)
    outcomes = [one for one in publisher.outcomes() if one.sink == "broken"]
    assert [one.error for one in outcomes[:-1]] == ["no such luck"] * (len(outcomes) - 1)
    assert (outcomes[-1].size, outcomes[-1].receipt, outcomes[-1].error) == (2, "receipt 2", None)
    assert good.sizes == [1, 2]
    # Told once, however often it failed.
    told = [record.getMessage() for record in caplog.records]
    assert told == ["an anchor failed and is tried again: no such luck", f"the anchor broken takes {ORIGIN} again"]


def test_pauses_grow_and_have_an_end(publish_to: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(publisher_module, "LONGEST_PAUSE", 0.16)
    sink = Sink()
    sink.error = lambda origin: SealError("down")
    publisher = publish_to(sink)
    submit(publisher, 1)
    wait_for(lambda: len(sink.times) >= 8)
    publisher.close(30)
    pauses = [later - earlier for earlier, later in zip(sink.times, sink.times[1:], strict=False)]
    for pause, least in zip(pauses, (0.01, 0.02, 0.04, 0.08, 0.08, 0.08, 0.08), strict=False):
        assert pause >= least
    assert len({round(pause, 3) for pause in pauses[3:]}) > 1


@pytest.mark.usefixtures("quick")
def test_a_log_that_an_anchor_refuses_does_not_stop_the_others(publish_to: Open) -> None:
    sink = Sink()
    sink.error = lambda origin: SealError("unknown log") if origin == USERS else None
    publisher = publish_to(sink)
    submit(publisher, 1, USERS)
    wait_for(lambda: publisher.status()[0].failures >= 3)
    for size in range(1, 5):
        submit(publisher, size)
        wait_for(lambda size=size: (ORIGIN, size) in sink.told)  # type: ignore[misc]
    status = publisher.status()[0]
    assert status.last_error == "unknown log"
    assert status.last_success is not None
    assert status.waiting == 1


@pytest.mark.usefixtures("quick")
def test_whatever_an_anchor_raises_its_thread_lives_on(publish_to: Open) -> None:
    sink = Sink()
    sink.error = lambda origin: ZeroDivisionError("s3cret")
    publisher = publish_to(sink)
    submit(publisher, 1)
    wait_for(lambda: publisher.status()[0].failures >= 2)
    assert publisher.status()[0].last_error == "an unexpected ZeroDivisionError"
    sink.error = lambda origin: None
    wait_for(lambda: publisher.settle(0))
    assert publisher.status()[0].last_error is None


def test_closing(publish_to: Open) -> None:
    sink = Sink()
    sink.gate.clear()
    publisher = publish_to(sink)
    submit(publisher, 1)
    wait_for(lambda: sink.sizes == [1])
    submit(publisher, 2)
    begun = time.monotonic()
    publisher.close(0.1)
    assert 0.1 <= time.monotonic() - begun < 5
    sink.gate.set()
    publisher.close(30)
    # What was under way is known to have succeeded; what waited is not sent.
    assert [(one.size, one.receipt) for one in publisher.outcomes()] == [(1, "receipt 1")]
    assert sink.sizes == [1]
    with pytest.raises(TracevaultError, match="closed"):
        submit(publisher, 3)
    assert not [thread for thread in threading.enumerate() if thread.name == "tracevault-anchor" and thread.is_alive()]


def test_what_is_no_checkpoint_is_refused(publish_to: Open) -> None:
    with pytest.raises(ProofError):
        publish_to(Sink()).submit(Note("hello\n", [KEY.sign("hello\n")]), Log())


def test_it_keeps_no_process_alive() -> None:
    code = (
        "import time\n"
        "from tests.test_publisher import Publisher, Sink, submit\n"
        "sink = Sink()\n"
        "sink.gate.clear()\n"
        "publisher = Publisher([sink])\n"
        "submit(publisher, 1)\n"
        "while not sink.told: time.sleep(0.01)\n"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert time.monotonic() - begun < 20
