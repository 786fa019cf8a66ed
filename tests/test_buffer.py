"""The queue itself: its bound, its lanes, its order, and when the writer is given what."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from tracevault.errors import TracevaultError
from tracevault.event.prepare import Prepared
from tracevault.writer.buffer import Buffer, Entry, Lane


def entry(name: str, scope: str = "default") -> Entry:
    return Entry(scope, f"table_{scope}", cast("Prepared", name))


def take(buffer: Buffer) -> tuple[Lane, list[Any]]:
    taken = buffer.take()
    assert taken is not None
    return taken[0], list(taken[1])


def seconds(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def test_it_holds_so_many_until_they_are_settled() -> None:
    buffer = Buffer(limit=3, most=2, linger=0)
    assert [buffer.offer(entry(name)) for name in "abcd"] == [True, True, True, False]
    lane, batch = take(buffer)
    assert batch == ["a", "b"]
    assert take(buffer) == (lane, ["a", "b"])  # they stay until settled
    assert not buffer.offer(entry("d"))
    buffer.settle(lane, 1)
    assert buffer.offer(entry("d"))
    assert take(buffer) == (lane, ["b", "c"])
    assert buffer.pending == 3


def test_lanes_take_turns() -> None:
    buffer = Buffer(limit=100, most=2, linger=0)
    for name in "abcdef":
        buffer.offer(entry(name, scope="one"))
    buffer.offer(entry("x", scope="two"))
    seen = []
    while buffer.pending:
        lane, batch = take(buffer)
        seen.append("".join(batch))
        buffer.settle(lane, len(batch))
    assert seen[:2] == ["ab", "x"]
    assert seen[2:] == ["cd", "ef"]


def test_a_postponed_lane_does_not_hold_up_others() -> None:
    buffer = Buffer(limit=100, most=2, linger=0)
    buffer.offer(entry("a", scope="one"))
    buffer.offer(entry("x", scope="two"))
    one, _ = take(buffer)
    buffer.postpone(one, 0.2)
    two, batch = take(buffer)
    assert batch == ["x"]
    buffer.settle(two, 1)
    assert seconds(lambda: take(buffer)) > 0.1
    buffer.postpone(one, 60)
    threading.Timer(0.1, buffer.close).start()
    assert seconds(lambda: take(buffer)) < 1  # closing ends every pause
    buffer.postpone(one, 60)
    assert seconds(lambda: take(buffer)) < 1


def test_lingering() -> None:
    buffer = Buffer(limit=5, most=3, linger=0.2)
    buffer.offer(entry("a"))
    assert 0.1 < seconds(lambda: take(buffer)) < 1
    lane, _ = take(buffer)
    buffer.settle(lane, 1)

    buffer = Buffer(limit=5, most=3, linger=60)
    for name in "abc":
        buffer.offer(entry(name))
    assert seconds(lambda: take(buffer)) < 1  # a full batch
    lane, _ = take(buffer)
    buffer.settle(lane, 2)
    threading.Timer(0.1, buffer.mark).start()
    assert seconds(lambda: take(buffer)) < 1  # somebody waits in flush
    for number, name in enumerate("defg"):
        buffer.offer(entry(name, scope=f"scope{number}"))
    assert seconds(lambda: take(buffer)) < 1  # the buffer is full


def test_a_mark_is_settled_by_its_own_records_only() -> None:
    buffer = Buffer(limit=100, most=10, linger=0)
    buffer.offer(entry("a", scope="one"))
    buffer.offer(entry("x", scope="two"))
    mark = buffer.mark()
    buffer.offer(entry("b", scope="one"))
    buffer.offer(entry("c", scope="one"))
    lane, batch = take(buffer)
    buffer.settle(lane, len(batch))
    assert not buffer.settled(mark)
    assert not buffer.wait_settled(mark, 0.01)
    lane, batch = take(buffer)
    buffer.settle(lane, len(batch))
    assert buffer.wait_settled(mark, 0)
    assert buffer.wait_settled(buffer.mark(), 0)


def test_waiting_for_room() -> None:
    buffer = Buffer(limit=1, most=1, linger=0)
    buffer.offer(entry("a"))
    lane, _ = take(buffer)
    assert 0.05 < seconds(lambda: buffer.wait_room(0.1)) < 1
    threading.Timer(0.1, buffer.settle, (lane, 1)).start()
    assert seconds(lambda: buffer.wait_room(60)) < 1
    buffer.offer(entry("b"))
    threading.Timer(0.1, buffer.close).start()
    assert seconds(lambda: buffer.wait_room(60)) < 1


def test_listeners_hear_of_every_change_and_of_none_after() -> None:
    buffer = Buffer(limit=10, most=1, linger=0)
    heard = []
    with buffer.listening(lambda: heard.append("one")), buffer.listening(lambda: heard.append("two")):
        buffer.offer(entry("a"))
        buffer.settle(take(buffer)[0], 1)
        assert heard == ["one", "two"]
    buffer.close()
    assert heard == ["one", "two"]


def test_a_closed_buffer() -> None:
    buffer = Buffer(limit=10, most=1, linger=60)
    buffer.offer(entry("a"))
    buffer.close()
    with pytest.raises(TracevaultError, match="closed"):
        buffer.offer(entry("b"))
    lane, batch = take(buffer)
    assert batch == ["a"]
    buffer.settle(lane, 1)
    assert buffer.take() is None
    assert buffer.take() is None
    assert seconds(lambda: buffer.pause(60)) < 1


def test_the_writer_waits_for_work() -> None:
    buffer = Buffer(limit=10, most=5, linger=0)
    threading.Timer(0.1, lambda: buffer.offer(entry("a"))).start()
    assert take(buffer)[1] == ["a"]
    buffer.settle(take(buffer)[0], 1)
    threading.Timer(0.1, buffer.close).start()
    assert buffer.take() is None


def test_an_emit_within_an_emit() -> None:
    """A signal handler, or a logging handler, may emit while the same thread holds the lock."""
    buffer = Buffer(limit=10, most=5, linger=0)
    with buffer.listening(lambda: buffer.offer(entry("within"))):
        buffer.offer(entry("a"))
        with buffer._work:
            assert buffer.offer(entry("b"))
        buffer.settle(take(buffer)[0], 1)
    assert take(buffer)[1] == ["b", "within"]
