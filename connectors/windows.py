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

from recur.vocabulary import INTERVALS, Series, VenueError, ceil_open, grid, iso, next_open

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


def verify(window: Window, rows: pl.DataFrame) -> tuple[pl.DataFrame, list[int]]:
    """Return ``rows`` (a candle frame in any order) sorted by open time, and the open times that are missing.

    A window may be short, never wrong: VenueError when a row lies outside the window or off its grid,
    when an open time comes twice, or when a bar cannot be (a price absent, not finite or, except for the
    premium, not above zero; open or close outside low and high; volume or turnover below zero).
    """
    rows = rows.sort("open_time")
    opens = rows["open_time"].dt.epoch("ms").to_numpy()
    _refuse(
        window, opens, (opens < window.since_ms) | (opens >= window.until_ms), "lies outside what was asked"
    )
    expected = np.array(grid(window.since_ms, window.until_ms, window.series.interval), dtype=np.int64)
    _refuse(window, opens, ~np.isin(opens, expected), "is not on the grid of its interval")
    twice = np.zeros(len(opens), dtype=bool)
    twice[1:] = opens[1:] == opens[:-1]
    _refuse(window, opens, twice, "comes twice")
    _refuse(window, opens, _impossible(rows, window.series.kind), "has impossible values")
    missing = [] if len(opens) == len(expected) else np.setdiff1d(expected, opens).tolist()
    return rows, missing


def _impossible(rows: pl.DataFrame, kind: str) -> npt.NDArray[np.bool_]:
    # Absent prices become NaN here, and every comparison with NaN is false.
    o, h, low, c = (rows[name].to_numpy() for name in ("open", "high", "low", "close"))
    possible = (low <= np.minimum(o, c)) & (h >= np.maximum(o, c)) & np.isfinite(h) & np.isfinite(low)
    if kind != "premium":
        possible &= low > 0
    for name in ("volume", "turnover"):
        amount = rows[name]
        possible &= (amount.is_null() | (amount.is_finite() & (amount >= 0))).fill_null(True).to_numpy()
    return np.asarray(~possible, dtype=np.bool_)


def _refuse(window: Window, opens: npt.NDArray[np.int64], bad: npt.NDArray[np.bool_], why: str) -> None:
    if bad.any():
        n_more = int(bad.sum()) - 1
        more = f" (and {n_more} more)" if n_more else ""
        raise VenueError(
            f"The venue's answer for {window} is not usable: the bar of {iso(int(opens[bad][0]))} {why}{more}.",
            "Nothing of this window was stored; try again later.",
        )
