"""Interleaved pairs, their ratios, and whether a bar is kept."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import repeat

Work = Callable[[], object]
AsyncWork = Callable[[], Awaitable[object]]


@dataclass
class Row:
    """One line of the table: ``ratios`` of ours to the work by hand, of times or of rates.

    ``bound`` is the bar, ``at_most`` says on which side of it we must stay; without one the row only informs.
    """

    name: str
    against: str
    ratios: list[float]
    bound: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """``missed`` only when the better quartile misses too: until then the spread reaches over the bar."""
        if self.bound is None:
            return "for information"
        low, median, high = quartiles(self.ratios)
        if self._within(median):
            return "kept"
        return "at the edge" if self._within(low if self.at_most else high) else "MISSED"

    def _within(self, value: float) -> bool:
        assert self.bound is not None
        return value <= self.bound if self.at_most else value >= self.bound

    def line(self) -> str:
        low, median, high = quartiles(self.ratios)
        bar = "" if self.bound is None else f"{'≤' if self.at_most else '≥'} {self.bound:g}"
        cells = (self.name, self.against, f"{median:.2f}", f"{low:.2f} to {high:.2f}", bar, self.verdict, self.note)
        return f"| {' | '.join(cells)} |"


@dataclass
class Seconds:
    """What the two sides of each pair took."""

    ours: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    def times(self) -> list[float]:
        return [ours / plain for ours, plain in zip(self.ours, self.plain, strict=True)]

    def rates(self) -> list[float]:
        return [plain / ours for ours, plain in zip(self.ours, self.plain, strict=True)]

    def per_second(self, count: int) -> str:
        """Absolute rates of both sides, for the last column."""
        ours, plain = (count / statistics.median(seconds) for seconds in (self.ours, self.plain))
        return f"{ours:,.0f}/s against {plain:,.0f}/s"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def timed(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


async def timed_async(work: AsyncWork) -> float:
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


def often(work: Work, count: int = 20) -> Callable[[], None]:
    """Return what does ``work`` so many times, for what takes too little to be timed by itself."""

    def repeated() -> None:
        for _ in range(count):
            work()

    return repeated


def pairs(count: int, ours: Work, plain: Work, before: Work = lambda: None) -> Seconds:
    """Time ``count`` interleaved pairs, after one of each to warm up. ``before`` each of them is not timed."""
    seconds = Seconds()
    for number in range(-1, count):
        sides = [(ours, seconds.ours), (plain, seconds.plain)]
        for work, kept in sides if number % 2 else reversed(sides):
            before()
            took = timed(work)
            if number >= 0:
                kept.append(took)
    return seconds


async def pairs_async(count: int, ours: AsyncWork, plain: AsyncWork, before: AsyncWork | None = None) -> Seconds:
    """Like `pairs`, in an event loop."""
    seconds = Seconds()
    for number in range(-1, count):
        sides = [(ours, seconds.ours), (plain, seconds.plain)]
        for work, kept in sides if number % 2 else reversed(sides):
            if before is not None:
                await before()
            took = await timed_async(work)
            if number >= 0:
                kept.append(took)
    return seconds


async def spread(callers: int, count: int, one: AsyncWork) -> None:
    """Have ``callers`` tasks do ``one`` after another, ``count`` in all."""
    turns = repeat(None, count)

    async def caller() -> None:
        for _ in turns:
            await one()

    await asyncio.gather(*(caller() for _ in range(callers)))
