"""The store: everything a workspace knows about the market, in one DuckDB file, ``<home>/market.duckdb``.

Each method opens the file, does one transaction and closes it again, so several processes can take turns.
Times are UTC milliseconds (``int``) in arguments and ``Datetime("ms", "UTC")`` in frames; ranges are half-open.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import duckdb
import polars as pl

from recur.storage import ledger
from recur.storage.connection import read_connection, write_connection
from recur.storage.fetched import SUMMARY, Asked, WindowRows, checked_frame, merged_ranges, record
from recur.storage.frames import CANDLE_SCHEMA, FUNDING_SCHEMA, aware, naive
from recur.storage.merge import PutResult, merge
from recur.storage.schema import CANDLE_KEY, CANDLE_VALUES, FUNDING_KEY, FUNDING_VALUES
from recur.vocabulary import INTERVALS, Series, grid, next_open

__all__ = ["CANDLE_SCHEMA", "FUNDING_SCHEMA", "PutResult", "Store", "WindowRows"]


class Store:
    """The DuckDB file of a workspace.

    ``wait_s``: how long, in seconds, to wait while another process holds the file. Beyond it every method raises
    StoreBusy; reading before anything was written raises DataMissing; an unreadable file raises StoreCorrupt.
    """

    def __init__(self, home: Path, wait_s: float = 30.0) -> None:
        self.home = Path(home)
        self.path = self.home / "market.duckdb"
        self.wait_s = wait_s

    def write(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """One writing transaction: committed at the end of the block, dropped when the block raises."""
        return write_connection(self.path, self.wait_s)

    def read(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """A read-only connection; keep it short, it blocks writers.

        Take all of a result (``fetchall``, ``.pl()``) before the next query: DuckDB refuses to interleave them.
        """
        return read_connection(self.path, self.wait_s)

    # -- writing ---------------------------------------------------------------------------------------------

    def put_windows(self, batches: Sequence[WindowRows], *, source: str, now_ms: int) -> PutResult:
        """Store the candles of several asked windows and the record that they were asked, all in one transaction.

        Closed bars only. A bar that differs from the stored one replaces it and leaves both in
        ``candle_revisions``. Raises ValueError when a frame holds rows of another series or outside its window.
        """
        if not batches:
            return PutResult()
        frames = [checked_frame(batch) for batch in batches]
        asked: list[Asked] = [
            (
                b.series,
                b.since_ms,
                b.until_ms,
                b.expected,
                frame.get_column("open_time").n_unique(),
                b.status,
                b.reason,
            )
            for b, frame in zip(batches, frames, strict=True)
        ]
        rows = naive(pl.concat(frames, how="vertical_relaxed"), CANDLE_SCHEMA)
        with self.write() as con:
            result = _merge_candles(con, rows, source, now_ms)
            record(con, asked, source, now_ms)
        return result

    def put_candles(self, frame: pl.DataFrame, *, source: str, now_ms: int) -> PutResult:
        """Store a candle frame that comes whole (a file), recording per series the range and its missing bars."""
        if frame.is_empty():
            return PutResult()
        spans = frame.group_by("category", "symbol", "interval", "kind", maintain_order=True).agg(
            pl.col("open_time").dt.epoch("ms").min().alias("first"),
            pl.col("open_time").dt.epoch("ms").max().alias("last"),
            pl.col("open_time").n_unique().alias("rows"),
        )
        windows = []
        for category, symbol, interval, kind, first, last, rows in spans.iter_rows():
            series, until = Series(category, symbol, interval, kind), next_open(last, interval)
            step = INTERVALS[interval]
            expected = (until - first) // step if step else len(grid(first, until, interval))
            status, reason = ("gap", "absent in file") if rows < expected else ("done", "")
            windows.append((series, first, until, expected, rows, status, reason))
        with self.write() as con:
            result = _merge_candles(con, naive(frame, CANDLE_SCHEMA), source, now_ms)
            record(con, windows, source, now_ms)
        return result

    def put_funding(
        self,
        frame: pl.DataFrame,
        *,
        source: str,
        now_ms: int,
        windows: Sequence[tuple[Series, int, int]] = (),
    ) -> PutResult:
        """Store funding payments and the ranges that were asked for them, in one transaction.

        ``windows``: (``Series(category, symbol, "", "funding")``, since_ms, until_ms); without any, the range of
        each symbol in ``frame`` is recorded. An empty frame with windows records that nothing was there.
        """
        frame = frame.select(pl.col(name).cast(kind) for name, kind in FUNDING_SCHEMA.items())
        asked = list(windows)
        if not asked:
            spans = frame.group_by("category", "symbol", maintain_order=True).agg(
                pl.col("funding_time").dt.epoch("ms").min().alias("first"),
                pl.col("funding_time").dt.epoch("ms").max().alias("last"),
            )
            asked = [
                (Series(c, s, "", "funding"), first, last + 1) for c, s, first, last in spans.iter_rows()
            ]
        if not asked:
            return PutResult()
        records = []
        for series, since, until in asked:
            rows = frame.filter(
                (pl.col("category") == series.category)
                & (pl.col("symbol") == series.symbol)
                & pl.col("funding_time").dt.epoch("ms").is_between(since, until, closed="left")
            ).height
            status, reason = ("done", "") if rows else ("gap", "venue empty")
            records.append((series, since, until, None, rows, status, reason))
        with self.write() as con:
            result = merge(
                con,
                naive(frame, FUNDING_SCHEMA),
                table="funding",
                revisions="funding_revisions",
                key=FUNDING_KEY,
                values=FUNDING_VALUES,
                source=source,
                now_ms=now_ms,
            )
            record(con, records, source, now_ms)
        return result

    # -- reading ---------------------------------------------------------------------------------------------

    def candles(
        self,
        category: str | None = None,
        symbols: Sequence[str] | None = None,
        interval: str | None = None,
        kind: str = "trade",
        since_ms: int | None = None,
        until_ms: int | None = None,
    ) -> pl.DataFrame:
        """Stored candles as a candle frame, sorted by its key; empty when nothing fits. None means any."""
        where, params = _where(category, symbols, since_ms, until_ms, "open_time")
        for name, wanted in (("interval", interval), ("kind", kind)):
            if wanted is not None:
                where.append(f"{name} = ?")
                params.append(wanted)
        query = (
            f"SELECT {', '.join(CANDLE_SCHEMA)} FROM candles WHERE {' AND '.join(where)}"
            f" ORDER BY {', '.join(CANDLE_KEY)}"
        )
        with self.read() as con:
            found: pl.DataFrame = con.sql(query, params=params).pl()
        return aware(found, CANDLE_SCHEMA)

    def funding(
        self,
        category: str | None = None,
        symbols: Sequence[str] | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
    ) -> pl.DataFrame:
        """Stored funding payments as a funding frame, sorted by its key; empty when nothing fits."""
        where, params = _where(category, symbols, since_ms, until_ms, "funding_time")
        query = (
            f"SELECT {', '.join(FUNDING_SCHEMA)} FROM funding WHERE {' AND '.join(where)}"
            f" ORDER BY {', '.join(FUNDING_KEY)}"
        )
        with self.read() as con:
            found: pl.DataFrame = con.sql(query, params=params).pl()
        return aware(found, FUNDING_SCHEMA)

    def windows(self, series: Series) -> list[tuple[int, int]]:
        """Ranges ``(since_ms, until_ms)`` that were asked before, with or without gaps, merged and ascending.

        For funding, ask with ``Series(category, symbol, "", "funding")``. Empty when there is no store yet.
        """
        if not self.path.exists():
            return []
        with self.read() as con:
            asked = con.execute(
                """SELECT epoch_ms(since), epoch_ms(until) FROM fetch_windows
                WHERE category = ? AND symbol = ? AND interval = ? AND kind = ? ORDER BY since, until""",
                [series.category, series.symbol, series.interval, series.kind],
            ).fetchall()
        return merged_ranges(asked)

    def last_open(self, series: Series) -> int | None:
        """Open time (for funding: payment time) of the newest stored row of a series, None when there is none."""
        if not self.path.exists():
            return None
        with self.read() as con:
            if series.kind == "funding":
                ((newest,),) = con.execute(
                    "SELECT epoch_ms(max(funding_time)) FROM funding WHERE category = ? AND symbol = ?",
                    [series.category, series.symbol],
                ).fetchall()
            else:
                ((newest,),) = con.execute(
                    """SELECT epoch_ms(max(open_time)) FROM candles
                    WHERE category = ? AND symbol = ? AND interval = ? AND kind = ?""",
                    [series.category, series.symbol, series.interval, series.kind],
                ).fetchall()
        return None if newest is None else int(newest)

    def series_summary(self) -> pl.DataFrame:
        """One row per stored candle series: ``series`` (its id), category, symbol, interval, kind, ``rows``,
        ``first`` and ``last`` open time, ``gaps`` (holes between them) and ``missing`` (bars absent in the holes).
        """
        with self.read() as con:
            found: pl.DataFrame = con.sql(SUMMARY).pl()
        ids = [
            str(Series(*row)) for row in found.select("category", "symbol", "interval", "kind").iter_rows()
        ]
        times = [pl.col(name).dt.replace_time_zone("UTC") for name in ("first", "last")]
        return found.with_columns(*times).insert_column(0, pl.Series("series", ids, dtype=pl.String))

    # -- the ledger ------------------------------------------------------------------------------------------

    def append_forecasts(self, frame: pl.DataFrame) -> int:
        """Append forecasts that are not in the ledger yet; returns how many. See ``storage/ledger.py``."""
        with self.write() as con:
            return ledger.append(con, frame)

    def forecasts(self, limit: int | None = None, symbols: Sequence[str] | None = None) -> pl.DataFrame:
        """The newest ``limit`` ledger entries (None: all), in the order they were appended, ``seq`` first."""
        with self.read() as con:
            return ledger.read(con, limit, symbols)


def _where(
    category: str | None, symbols: Sequence[str] | None, since_ms: int | None, until_ms: int | None, time: str
) -> tuple[list[str], list[object]]:
    where, params = ["true"], list[object]()
    if category is not None:
        where.append("category = ?")
        params.append(category)
    if symbols is not None:
        where.append("symbol IN (SELECT unnest(?::VARCHAR[]))")
        params.append(list(symbols))
    for bound, sign in ((since_ms, ">="), (until_ms, "<")):
        if bound is not None:
            where.append(f"{time} {sign} make_timestamp_ms(?)")
            params.append(bound)
    return where, params


def _merge_candles(
    con: duckdb.DuckDBPyConnection, frame: pl.DataFrame, source: str, now_ms: int
) -> PutResult:
    return merge(
        con,
        frame,
        table="candles",
        revisions="candle_revisions",
        key=CANDLE_KEY,
        values=CANDLE_VALUES,
        source=source,
        now_ms=now_ms,
    )
