"""Which ranges to ask for, and whether an answer is what was asked. Pure: no network, no clock.

A window is at most one page of the venue, so each can be asked alone, in any order and in parallel::

    asked      |----------------------------------------------|      [since, until)
    recorded        |=======|              |===|                     ranges of fetch_windows
    missing    |----|       |--------------|   |--------------|
    windows    |----|       |------|-------|   |------|-------|      at most ``limit`` bars each

All ranges are half-open on the open time, in UTC milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from recur.vocabulary import INTERVALS, Series, VenueError, ceil_open, floor_open, grid, iso, next_open

PAGE_ROWS = 1000
"""Most candles the venue returns at once (https://bybit-exchange.github.io/docs/v5/market/kline)."""

Range = tuple[int, int]


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """``expected`` bars of one series that open in ``[since_ms, until_ms)``; both ends lie on its grid."""

    series: Series
    since_ms: int
    until_ms: int
    expected: int

    def __str__(self) -> str:
        return f"{self.series} {iso(self.since_ms)} to {iso(self.until_ms)}"


@dataclass(frozen=True, slots=True, eq=False)
class Bars:
    """Bars of one series as arrays, any number n of them.

    ``open_ms`` (n,) int64; ``values`` (n, 6) float64: open, high, low, close, volume, turnover, NaN where absent.
    """

    series: Series
    open_ms: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.open_ms)

    def take(self, rows: slice | npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Bars:
        """The bars at ``rows``, anything that indexes an array."""
        return Bars(self.series, self.open_ms[rows], self.values[rows])

    def closed(self, now_ms: int) -> Bars:
        """Without the bar that is still open at ``now_ms``; the venue sends it without a mark."""
        return self.take(self.open_ms < floor_open(now_ms, self.series.interval))

    def joined(self, more: Bars) -> Bars:
        """These and the bars of ``more`` that are not among them, sorted."""
        new = more.take(~np.isin(more.open_ms, self.open_ms))
        opens = np.concatenate([self.open_ms, new.open_ms])
        order = np.argsort(opens, kind="stable")
        return Bars(self.series, opens[order], np.concatenate([self.values, new.values])[order])


def missing_ranges(since_ms: int, until_ms: int, done: Iterable[Range]) -> list[Range]:
    """Parts of ``[since_ms, until_ms)`` outside every range of ``done`` (any order, overlaps allowed)."""
    missing = []
    at = since_ms
    for start, end in sorted(done):
        if start > at:
            missing.append((at, min(start, until_ms)))
        at = max(at, end)
        if at >= until_ms:
            break
    if at < until_ms:
        missing.append((at, until_ms))
    return [(start, end) for start, end in missing if start < end]


def count_bars(since_ms: int, until_ms: int, interval: str) -> int:
    """Number of bars that open in ``[since_ms, until_ms)``."""
    step = INTERVALS[interval]
    if not step:
        return len(grid(since_ms, until_ms, interval))
    return max(0, -(-(until_ms - ceil_open(since_ms, interval)) // step))


def plan_windows(
    series: Series, since_ms: int, until_ms: int, done: Iterable[Range] = (), limit: int = PAGE_ROWS
) -> list[Window]:
    """Windows of at most ``limit`` bars that cover what ``done`` leaves of ``[since_ms, until_ms)``, oldest first."""
    windows = []
    for start, end in missing_ranges(since_ms, until_ms, done):
        windows += _pages(series, start, end, limit)
    return windows


def _pages(series: Series, since_ms: int, until_ms: int, limit: int) -> list[Window]:
    interval = series.interval
    step = INTERVALS[interval]
    if not step:
        opens = grid(since_ms, until_ms, interval)
        chunks = [opens[i : i + limit] for i in range(0, len(opens), limit)]
        return [Window(series, c[0], next_open(c[-1], interval), len(c)) for c in chunks]
    first = ceil_open(since_ms, interval)
    end = first + count_bars(first, until_ms, interval) * step
    return [
        Window(
            series, start, min(start + limit * step, end), (min(start + limit * step, end) - start) // step
        )
        for start in range(first, end, limit * step)
    ]


def check(window: Window, bars: Bars) -> tuple[Bars, list[int]]:
    """Return ``bars`` (in any order) sorted by open time, and the open times of the window that are missing.

    A window may be short, never wrong: VenueError when a bar lies outside the window or off its grid,
    when an open time comes twice, or when a bar cannot be (a price absent, not finite or, except for the
    premium, not above zero; open or close outside low and high; volume or turnover below zero).
    """
    if len(bars) > 1 and (np.diff(bars.open_ms) < 0).all():  # the venue's order
        bars = bars.take(slice(None, None, -1))
    elif len(bars) > 1 and not (np.diff(bars.open_ms) > 0).all():
        bars = bars.take(np.argsort(bars.open_ms, kind="stable"))
    opens = bars.open_ms
    _refuse(
        window, opens, (opens < window.since_ms) | (opens >= window.until_ms), "lies outside what was asked"
    )
    step = INTERVALS[window.series.interval]
    if step:
        expected = np.arange(window.since_ms, window.until_ms, step, dtype=np.int64)
        astray = (opens - window.since_ms) % step != 0
    else:
        expected = np.array(grid(window.since_ms, window.until_ms, window.series.interval), dtype=np.int64)
        astray = ~np.isin(opens, expected)
    _refuse(window, opens, astray, "is not on the grid of its interval")
    twice = np.zeros(len(opens), dtype=bool)
    twice[1:] = opens[1:] == opens[:-1]
    _refuse(window, opens, twice, "comes twice")
    _refuse(window, opens, _impossible(bars), "has impossible values")
    missing = [] if len(opens) == len(expected) else np.setdiff1d(expected, opens).tolist()
    return bars, missing


def verify(window: Window, rows: pl.DataFrame) -> tuple[pl.DataFrame, list[int]]:
    """``check`` for a candle frame."""
    rows = rows.sort("open_time")
    values = rows.select(
        pl.col("open", "high", "low", "close", "volume", "turnover").cast(pl.Float64).fill_null(float("nan"))
    )
    opens = rows["open_time"].dt.epoch("ms").to_numpy()
    return rows, check(window, Bars(window.series, opens, values.to_numpy()))[1]


def _impossible(bars: Bars) -> npt.NDArray[np.bool_]:
    # Comparisons with NaN are false: an absent price makes a bar impossible, an absent amount does not.
    o, h, low, c, volume, turnover = bars.values.T
    possible = (low <= np.minimum(o, c)) & (h >= np.maximum(o, c)) & np.isfinite(h) & np.isfinite(low)
    if bars.series.kind != "premium":
        possible &= low > 0
    for amount in (volume, turnover):
        possible &= ~((amount < 0) | np.isinf(amount))
    return np.asarray(~possible, dtype=np.bool_)


def _refuse(window: Window, opens: npt.NDArray[np.int64], bad: npt.NDArray[np.bool_], why: str) -> None:
    if bad.any():
        n_more = int(bad.sum()) - 1
        more = f" (and {n_more} more)" if n_more else ""
        raise VenueError(
            f"The venue's answer for {window} is not usable: the bar of {iso(int(opens[bad][0]))} {why}{more}.",
            "Nothing of this window was stored; try again later.",
        )
