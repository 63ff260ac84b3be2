"""Which ranges were asked, when, and with what result: the table ``fetch_windows``.

A gap is thereby known and has a reason; it is never silently absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from recur.storage.frames import CANDLE_SCHEMA
from recur.storage.merge import Rows, constant, rows_of_parts
from recur.storage.schema import CANDLES, FUNDING, POINTS, Table
from recur.vocabulary import INTERVALS, Series, ceil_open, grid, next_open

Asked = tuple[Series, int, int, int | None, int, str, str]
"""One record: series, since_ms, until_ms, expected, rows, status, reason."""


@dataclass(frozen=True, slots=True)
class WindowRows:
    """What came back for one asked range ``[since_ms, until_ms)`` of one series.

    ``status`` is ``"done"`` (every bar of the grid is there) or ``"gap"`` (some are not, ``reason`` says why);
    ``expected`` is the number of bars the grid has, None where there is no grid (funding).
    """

    series: Series
    since_ms: int
    until_ms: int
    frame: pl.DataFrame
    expected: int | None
    status: str = "done"
    reason: str = ""


def checked_rows(batches: Sequence[WindowRows]) -> tuple[Rows, list[int]]:
    """The rows of several windows, and how many each has. ValueError when a frame holds any but its window's rows."""
    some = [batch for batch in batches if batch.frame.height]
    if not some:
        return Rows.none(CANDLES), [0] * len(batches)
    order = CANDLE_SCHEMA.names()
    frames = [b.frame if b.frame.columns == order else b.frame.select(order) for b in some]
    frame = frames[0] if len(frames) == 1 else pl.concat(frames, how="vertical_relaxed")
    names = [(b.series.category, b.series.symbol, b.series.interval, b.series.kind) for b in some]
    heights = [batch.frame.height for batch in some]
    since, until = (np.repeat([getattr(b, side) for b in some], heights) for side in ("since_ms", "until_ms"))
    opens = frame.get_column("open_time").dt.timestamp("ms").to_numpy()
    fits = (since <= opens) & (opens < until)
    if len(set(names)) == 1:
        ours = constant(frame, CANDLES.series) == names[0]
        fits &= ours
    else:
        for i, column in enumerate(CANDLES.series):
            expected = pl.Series([n[i] for n in names]).gather(np.repeat(np.arange(len(some)), heights))
            fits &= (frame.get_column(column) == expected).fill_null(False).to_numpy()
    if not fits.all():
        stray = some[int(np.searchsorted(np.cumsum(heights), np.flatnonzero(~fits)[0], side="right"))]
        raise ValueError(f"the frame of {stray.series} holds rows of another series or outside its window")
    rows, at = rows_of_parts(frame, CANDLES, list(zip(names, heights, strict=True)))
    ends = np.cumsum(heights)
    counts = (
        heights
        if len(rows.at) == len(at)
        else [len(np.unique(at[end - n : end])) for end, n in zip(ends, heights, strict=True)]
    )
    found = iter(counts)
    return rows, [next(found) if batch.frame.height else 0 for batch in batches]


def table_of(series: Series) -> Table:
    """The table that holds a series, by its kind."""
    return FUNDING if series.kind == FUNDING.name else POINTS.get(series.kind, CANDLES)


def names_of(series: Series) -> tuple[str, ...]:
    """What names the series in its table."""
    every = {
        "category": series.category,
        "symbol": series.symbol,
        "interval": series.interval,
        "kind": series.kind,
    }
    return tuple(every[column] for column in table_of(series).series)


def series_of(names: Sequence[str], table: Table) -> Series:
    """The way back from ``names_of``."""
    kind = "trade" if table is CANDLES else table.name
    return Series(**({"interval": "", "kind": kind} | dict(zip(table.series, names, strict=True))))


def bars_between(since_ms: int, until_ms: int, interval: str) -> int | None:
    """Points of the grid in ``[since, until)``; None for what has no grid (funding)."""
    if not interval:
        return None
    step = INTERVALS[interval]
    if not step:
        return len(grid(since_ms, until_ms, interval))
    return max(0, -(-(until_ms - ceil_open(since_ms, interval)) // step))


def asked_file(rows: Rows, table: Table) -> list[Asked]:
    """The records of rows that come whole, as from a file: each series from its first row to its last."""
    out: list[Asked] = []
    ends = np.searchsorted(rows.number, np.arange(len(rows.series)), side="right")
    start = 0
    for names, end in zip(rows.series, ends.tolist(), strict=True):
        series, time = series_of(names, table), rows.time_ms[start:end]
        first, last = int(time[0]), int(time[-1])
        until = next_open(last, series.interval) if series.interval else last + 1
        expected = bars_between(first, until, series.interval)
        short = expected is not None and end - start < expected
        status, reason = ("gap", "absent in file") if short else ("done", "")
        out.append((series, first, until, expected, end - start, status, reason))
        start = end
    return out


def asked_ranges(rows: Rows, windows: Sequence[tuple[Series, int, int] | Asked]) -> list[Asked]:
    """The records of ranges that were asked for events or points: a gap where the venue gave none, or too few.

    A window that is a whole record already, because the caller knows the reason, is taken as it is.
    """
    numbers = {names: i for i, names in enumerate(rows.series)}
    out: list[Asked] = []
    for window in windows:
        if len(window) == 7:
            out.append(window)
            continue
        series, since, until = window
        time = rows.time_ms[rows.number == numbers.get(names_of(series), -1)]
        count = int(np.searchsorted(time, until) - np.searchsorted(time, since))
        expected = bars_between(since, until, series.interval)
        short = count < (1 if expected is None else expected)
        status, reason = ("gap", "venue empty") if short else ("done", "")
        out.append((series, since, until, expected, count, status, reason))
    return out


def merged_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join overlapping and touching half-open ranges, given in ascending order of their start."""
    merged: list[tuple[int, int]] = []
    for since, until in ranges:
        if merged and since <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(until, merged[-1][1]))
        else:
            merged.append((since, until))
    return merged


_STEP_CASES = " ".join(f"WHEN '{name}' THEN {step}" for name, step in INTERVALS.items() if step)
SUMMARY = f"""
WITH steps AS (
    SELECT category, symbol, interval, kind, open_time,
        lead(open_time) OVER (PARTITION BY category, symbol, interval, kind ORDER BY open_time) AS following
    FROM candles),
holes AS (
    SELECT category, symbol, interval, kind, open_time,
        CASE WHEN interval = '1M' THEN date_diff('month', open_time::TIMESTAMP, following::TIMESTAMP)
        ELSE (epoch_ms(following) - epoch_ms(open_time)) // CASE interval {_STEP_CASES} END END - 1 AS absent
    FROM steps)
SELECT category, symbol, interval, kind, count(*) AS "rows", min(open_time) AS first, max(open_time) AS last,
    count(*) FILTER (absent > 0) AS gaps, coalesce(sum(absent), 0)::BIGINT AS missing
FROM holes GROUP BY category, symbol, interval, kind ORDER BY category, symbol, interval, kind"""
"""Query behind ``Store.series_summary``."""
