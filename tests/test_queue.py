"""The queue in memory: bounds, lanes, what waits on the disk, and what was accepted before a mark."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tracevault import TracevaultError
from tracevault.writer.queue import Item, Lane, Queue

NOTHING: Any = None


def lane_of(queue: Queue, scope: str = "default", *, sync: bool = False, spool: Any = None) -> Lane:
    return queue.lane(scope, "audit_logs", sync=sync, spool=spool)


def offer(queue: Queue, name: Any, scope: str = "default", **more: Any) -> bool:
    return queue.offer(lane_of(queue, scope, **more), Item(name))


def take(queue: Queue) -> tuple[Lane, list[Item]]:
    taken = queue.take()
    assert taken is not None
    return taken


def names(items: list[Item]) -> list[Any]:
    return [item.prepared for item in items]


def settle(queue: Queue, lane: Lane, items: list[Item], rest: list[Item] = NOTHING) -> None:
    queue.settle(lane, (items or rest)[0].number, items, rest or ())


def seconds(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def test_it_holds_so_many_until_they_are_settled() -> None:
    queue = Queue(3, 2, 0)
    assert [offer(queue, name) for name in "abcd"] == [True, True, True, False]
    lane, batch = take(queue)
    assert names(batch) == ["a", "b"]
    assert not offer(queue, "d")
    settle(queue, lane, batch)
    assert [offer(queue, name) for name in "def"] == [True, True, False]


def test_sync_emits_always_find_room() -> None:
    queue = Queue(1, 10, 0)
    assert offer(queue, "a")
    assert not queue.sync_busy
    assert all(offer(queue, name, sync=True) for name in "bcd")
    assert queue.sync_busy
    assert queue.in_memory().waiting == 1


def test_the_lane_that_waits_longest_is_first() -> None:
    queue = Queue(10, 10, 0)
    for name, scope in (("a", "one"), ("b", "two"), ("c", "one")):
        offer(queue, name, scope)
        time.sleep(0.002)
    assert [names(take(queue)[1]) for _ in range(2)] == [["a", "c"], ["b"]]


def test_a_postponed_lane_does_not_hold_up_others() -> None:
    queue = Queue(10, 10, 0)
    offer(queue, "a", "one")
    lane, batch = take(queue)
    queue.postpone(lane, 0.1)
    settle(queue, lane, [], batch)
    offer(queue, "b", "two")
    assert names(take(queue)[1]) == ["b"]
    assert 0.05 < seconds(lambda: take(queue)) < 1


def test_a_second_writer_takes_whole_batches_of_async_records_only() -> None:
    queue = Queue(10, 3, 0)
    offer(queue, "a")
    assert names(take(queue)[1]) == ["a"]
    offer(queue, "b")
    taken: list[Any] = []
    other = threading.Thread(target=lambda: taken.append(names(take(queue)[1])))
    other.start()
    time.sleep(0.1)
    assert taken == []
    offer(queue, "c")
    offer(queue, "d")
    other.join(2)
    assert taken == [["b", "c", "d"]]


def test_what_is_put_back_keeps_its_place() -> None:
    queue = Queue(100, 2, 0)
    for name in "abcdef":
        offer(queue, name)
    lane, first = take(queue)
    _, second = take(queue)
    settle(queue, lane, [], second)
    settle(queue, lane, [first[0]], [first[1]])
    assert names(list(lane.waiting)) == ["b", "c", "d", "e", "f"]


def test_lingering() -> None:
    queue = Queue(10, 3, 0.2)
    offer(queue, "a")
    assert 0.1 < seconds(lambda: take(queue)) < 1
    queue = Queue(10, 3, 60)
    for name in "abc":  # a whole batch need not wait
        offer(queue, name)
    assert seconds(lambda: take(queue)) < 0.1
    queue = Queue(10, 3, 60)
    offer(queue, "a", sync=True)  # nor does somebody who waits
    assert seconds(lambda: take(queue)) < 0.1


def test_a_mark_is_settled_by_its_own_records_only() -> None:
    queue = Queue(10, 1, 0)
    for name in "ab":
        offer(queue, name)
    mark = queue.mark()
    offer(queue, "c")
    lane, first = take(queue)
    _, second = take(queue)
    _, third = take(queue)
    settle(queue, lane, third)
    settle(queue, lane, second)
    assert not queue.wait_settled(mark, 0)
    settle(queue, lane, first)
    assert queue.wait_settled(mark, 0)


def test_what_does_not_fit_is_read_back_in_its_turn() -> None:
    queue, spool = Queue(2, 10, 0), object()
    lane = lane_of(queue, spool=spool)
    for number, name in enumerate("abcd", 1):
        item = Item(NOTHING if name > "b" else name)  # type: ignore[arg-type]
        assert queue.offer_spooled(lane, item, number) == (name <= "b")
    mark = queue.mark()
    taken, batch = take(queue)
    assert names(batch) == ["a", "b"]
    settle(queue, taken, batch)
    assert not queue.settled(mark)
    taken, batch = take(queue)
    assert (taken, batch) == (lane, [])
    items = [Item(name) for name in "cd"]  # type: ignore[arg-type]
    for number, item in enumerate(items, 3):
        item.number = number
    queue.fill(lane, items, last=4)
    taken, batch = take(queue)
    assert names(batch) == ["c", "d"]
    settle(queue, taken, batch)
    assert queue.settled(mark)


def test_withdrawing() -> None:
    queue = Queue(10, 10, 0)
    lane, items = lane_of(queue, sync=True), [Item(name) for name in "ab"]  # type: ignore[arg-type]
    for item in items:
        queue.offer(lane, item)
    assert queue.withdraw(lane, items[0])
    assert names(take(queue)[1]) == ["b"]
    assert not queue.withdraw(lane, items[1])


def test_listeners_hear_of_every_change_and_of_none_after() -> None:
    queue, heard = Queue(10, 1, 0), []
    offer(queue, "a")
    offer(queue, "b")
    with queue.listening(lambda: heard.append(1)):
        settle(queue, *take(queue))
        assert heard
    heard.clear()
    settle(queue, *take(queue))
    assert not heard


def test_a_closed_queue() -> None:
    queue = Queue(10, 1, 3600)
    offer(queue, "a")
    offer(queue, "b")
    queue.close()
    with pytest.raises(TracevaultError, match="closed"):
        offer(queue, "c")
    lane, batch = take(queue)
    queue.postpone(lane, 60)
    settle(queue, lane, [], batch)
    assert seconds(lambda: settle(queue, *take(queue))) < 1  # no long waits any more
    settle(queue, *take(queue))
    assert queue.take() is None


def test_writers_wait_for_work_and_end_together() -> None:
    queue = Queue(10, 10, 0)
    ended = []
    threads = [threading.Thread(target=lambda: ended.append(queue.take())) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert ended == []
    queue.close()
    for thread in threads:
        thread.join(2)
    assert ended == [None] * 3


def test_an_emit_within_an_emit() -> None:
    """A signal handler runs in the middle of whatever its thread does, and may emit."""
    queue = Queue(10, 1, 0)
    offer(queue, "a")
    with queue.listening(lambda: offer(queue, "b")):
        settle(queue, *take(queue))
    assert names(take(queue)[1]) == ["b"]
