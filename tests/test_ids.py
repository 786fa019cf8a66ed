"""UUIDv7: version, variant, order and uniqueness."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import RFC_4122, UUID

import pytest

from tracevault.events import ids


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Put the process's clock of ids back, which these tests set."""
    before = ids._last
    yield
    ids._last = before


def milliseconds(value: UUID) -> int:
    return value.int >> 80


def test_version_variant_and_time() -> None:
    before = time.time_ns() // 1_000_000
    value = ids.uuid7()
    after = time.time_ns() // 1_000_000
    assert value.version == 7
    assert value.variant == RFC_4122
    assert before <= milliseconds(value) <= after


def test_a_hundred_thousand_ids_rise_and_are_unique() -> None:
    made = [ids.uuid7() for _ in range(100_000)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)
    assert {value.version for value in made} == {7}
    assert {value.variant for value in made} == {RFC_4122}
    assert [str(value) for value in made] == sorted(str(value) for value in made)


@pytest.mark.parametrize("clock", ["stands still", "goes back"])
def test_ids_rise_whatever_the_clock_does(clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ids.uuid7()
    frozen = time.time_ns()
    hour = 3600 * 10**9
    times = iter(range(frozen, frozen - 50_000 * hour, -hour) if clock == "goes back" else [frozen] * 50_000)
    monkeypatch.setattr(ids, "time_ns", lambda: next(times))
    made = [first, *(ids.uuid7() for _ in range(50_000))]
    assert made == sorted(made)
    assert len(set(made)) == len(made)
    assert {(value.version, value.variant) for value in made} == {(7, RFC_4122)}
    # 4,096 steps to a millisecond: the ids run ahead of a clock that stands, slowly.
    assert milliseconds(made[-1]) - milliseconds(first) <= 50_000 // 4096 + 2


def test_ids_follow_the_clock_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.time_ns() + 10**15
    monkeypatch.setattr(ids, "time_ns", lambda: later)
    assert milliseconds(ids.uuid7()) == later // 1_000_000


@pytest.mark.parametrize("nanoseconds", [0, 1, 999_999, 500_000])
def test_the_fraction_of_the_millisecond_follows(nanoseconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids._last = 0
    monkeypatch.setattr(ids, "time_ns", lambda: 10**18 + nanoseconds)
    value = ids.uuid7()
    assert milliseconds(value) == 10**12
    assert value.int >> 64 & 0xFFF == nanoseconds * 4096 // 1_000_000


def test_threads_do_not_repeat_each_other() -> None:
    with ThreadPoolExecutor(8) as threads:
        lists = list(threads.map(lambda _: [ids.uuid7() for _ in range(5_000)], range(8)))
    assert len({value for made in lists for value in made}) == 40_000
    assert all(made == sorted(made) for made in lists)
