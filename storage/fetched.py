"""Which ranges were asked, when, and with what result: the table ``fetch_windows``.

A gap is thereby known and has a reason; it is never silently absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import duckdb
import polars as pl

from recur.storage.frames import CANDLE_SCHEMA
from recur.storage.schema import CANDLE_KEY
from recur.vocabulary import INTERVALS, Series

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


def checked_frame(batch: WindowRows) -> pl.DataFrame:
    """The frame of a window, checked to hold nothing but that window's rows."""
    frame, series = batch.frame, batch.series
    if frame.is_empty():
        return CANDLE_SCHEMA.to_frame()
    names = (series.category, series.symbol, series.interval, series.kind)
    opens = frame.get_column("open_time").dt.epoch("ms")
    ours = all(bool((frame.get_column(c) == n).all()) for c, n in zip(CANDLE_KEY, names, strict=False))
    if not ours or not opens.is_between(batch.since_ms, batch.until_ms, closed="left").all():
        raise ValueError(f"the frame of {series} holds rows of another series or outside its window")
    return frame.select(CANDLE_SCHEMA.names())


def record(con: duckdb.DuckDBPyConnection, asked: Sequence[Asked], source: str, now_ms: int) -> None:
    """Write down which ranges were asked and what came of it."""
    windows = pl.DataFrame(
        [
            (s.category, s.symbol, s.interval, s.kind, since, until, expected, rows, status, reason)
            for s, since, until, expected, rows, status, reason in asked
        ],
        schema={
            **dict.fromkeys(("category", "symbol", "interval", "kind"), pl.String),
            **dict.fromkeys(("since", "until", "expected", "rows"), pl.Int64),
            **dict.fromkeys(("status", "reason"), pl.String),
        },
        orient="row",
    )
    con.register("asked", windows)
    con.execute(
        """INSERT INTO fetch_windows
        SELECT category, symbol, interval, kind, make_timestamp_ms(since), make_timestamp_ms(until), expected, "rows",
            expected - "rows", status, reason, ?, make_timestamp_ms(?) FROM asked""",
        [source, now_ms],
    )
    con.unregister("asked")


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
