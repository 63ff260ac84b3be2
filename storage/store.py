"""The store: everything a workspace knows about the market, in one DuckDB file, ``<home>/market.duckdb``.

Each method takes the file, does one transaction and lets go of it, so several processes can take turns; within a
``session`` it is kept between writes while nobody else waits. Times are UTC milliseconds (``int``) in arguments and
``Datetime("ms", "UTC")`` in frames; ranges are half-open.

Every row carries ``first_seen``, and what it said before lies in a table of revisions: ``as_of_ms`` reads what this
store knew at that instant. Tables are described in ``storage/schema.py``, frames in ``storage/frames.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import duckdb
import polars as pl

from recur.storage import instruments, inventory, ledger, news
from recur.storage.connection import read_connection, session, write_connection
from recur.storage.fetched import (
    SUMMARY,
    Asked,
    WindowRows,
    asked_file,
    asked_ranges,
    checked_rows,
    merged_ranges,
    names_of,
    table_of,
)
from recur.storage.frames import CANDLE_SCHEMA, FUNDING_SCHEMA, POINT_SCHEMAS
from recur.storage.merge import PutResult, Rows, merge, rows_of
from recur.storage.record import record
from recur.storage.schema import CANDLES, FUNDING, POINTS, Table
from recur.storage.series import read_rows
from recur.vocabulary import Series, did_you_mean

__all__ = ["CANDLE_SCHEMA", "FUNDING_SCHEMA", "PutResult", "Store", "WindowRows"]


class Store:
    """The DuckDB file of a workspace.

    ``wait_s``: how long, in seconds, to wait while another process holds the file. Beyond it every method raises
    StoreBusy; reading before anything was written raises DataMissing; an unreadable file raises StoreCorrupt; a full
    disk raises RecurError, and what was committed before stays.
    """

    def __init__(self, home: Path, wait_s: float = 30.0) -> None:
        self.home = Path(home)
        self.path = self.home / "market.duckdb"
        self.wait_s = wait_s

    def write(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """One writing transaction: committed at the end of the block, dropped when the block raises."""
        return write_connection(self.path, self.wait_s)

    def read(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """A connection for reading; keep it short, it blocks writers.

        Take all of a result (``fetchall``, ``.pl()``) before the next query: DuckDB refuses to interleave them.
        """
        return read_connection(self.path, self.wait_s)

    def session(self) -> AbstractContextManager[None]:
        """For a stream of writes: while it is open, the file stays attached between the calls of this process.

        Another process that wants the file gets it after the write at hand, or at once between writes.
        """
        return session(self.path)

    # -- writing ---------------------------------------------------------------------------------------------

    def put_windows(self, batches: Sequence[WindowRows], *, source: str, now_ms: int) -> PutResult:
        """Store the candles of several asked windows and the record that they were asked, all in one transaction.

        Closed bars only. A bar that differs from the stored one replaces it and leaves both in
        ``candle_revisions``. Raises ValueError when a frame holds rows of another series or outside its window.
        """
        if not batches:
            return PutResult()
        rows, counts = checked_rows(batches)
        asked: list[Asked] = [
            (b.series, b.since_ms, b.until_ms, b.expected, count, b.status, b.reason)
            for b, count in zip(batches, counts, strict=True)
        ]
        return self._put(rows, CANDLES, asked, source, now_ms)

    def put_candles(self, frame: pl.DataFrame, *, source: str, now_ms: int) -> PutResult:
        """Store a candle frame that comes whole (a file), recording per series the range and its missing bars."""
        if frame.is_empty():
            return PutResult()
        rows = rows_of(frame, CANDLES)
        return self._put(rows, CANDLES, asked_file(rows, CANDLES), source, now_ms)

    def put_funding(
        self,
        frame: pl.DataFrame,
        *,
        source: str,
        now_ms: int,
        windows: Sequence[tuple[Series, int, int] | Asked] = (),
    ) -> PutResult:
        """Store funding payments and the ranges that were asked for them, in one transaction.

        ``windows``: (``Series(category, symbol, "", "funding")``, since_ms, until_ms); without any, the range of
        each symbol in ``frame`` is recorded. An empty frame with windows records that nothing was there.
        """
        return self._put_ranges(frame, FUNDING, windows, source, now_ms)

    def put_points(
        self,
        table: str,
        frame: pl.DataFrame,
        *,
        source: str,
        now_ms: int,
        windows: Sequence[tuple[Series, int, int] | Asked] = (),
    ) -> PutResult:
        """Store open interest or long/short ratios (``table``: "open_interest", "long_short") with the asked ranges.

        ``windows``: (``Series(category, symbol, interval, table)``, since_ms, until_ms), as for funding; a range
        with fewer points than its grid is recorded as a gap. A whole record (``Asked``) is taken as it is. Raises
        ValueError for another table.
        """
        return self._put_ranges(frame, _points(table), windows, source, now_ms)

    def put_instruments(self, frame: pl.DataFrame, *, source: str, now_ms: int) -> PutResult:
        """Append a snapshot of every instrument that is new or changed. See ``storage/instruments.py``."""
        with self.write() as con:
            return instruments.put(con, frame, source, now_ms)

    def put_news(self, frame: pl.DataFrame, *, source: str, now_ms: int, backfill: bool = False) -> PutResult:
        """Store news items; an edited one becomes a new version. See ``storage/news.py``."""
        with self.write() as con:
            return news.put(con, frame, source, now_ms, backfill)

    def put_sentiment(self, frame: pl.DataFrame) -> int:
        """Store scores (columns of ``SENTIMENT_SCHEMA``) that are not there yet; returns how many."""
        with self.write() as con:
            return news.put_sentiment(con, frame)

    def _put_ranges(
        self,
        frame: pl.DataFrame,
        table: Table,
        windows: Sequence[tuple[Series, int, int] | Asked],
        source: str,
        now_ms: int,
    ) -> PutResult:
        rows = rows_of(frame, table) if frame.height else Rows.none(table)
        asked = asked_ranges(rows, windows) if windows else asked_file(rows, table)
        return self._put(rows, table, asked, source, now_ms) if asked else PutResult()

    def _put(self, rows: Rows, table: Table, asked: Sequence[Asked], source: str, now_ms: int) -> PutResult:
        with self.write() as con:
            result = merge(con, rows, table, source=source, now_ms=now_ms)
            record(con, asked, source, now_ms)
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
        as_of_ms: int | None = None,
        first_values: bool = False,
    ) -> pl.DataFrame:
        """Stored candles as a candle frame, sorted by its key; empty when nothing fits. None means any.

        ``as_of_ms``: what this store knew at that instant: bars first seen by then, with the values they had.
        ``first_values`` adds those first seen later, with the first values they ever had here.
        """
        wanted = {"category": category, "interval": interval, "kind": kind}
        with self.read() as con:
            return read_rows(
                con, CANDLES, CANDLE_SCHEMA, wanted, symbols, since_ms, until_ms, as_of_ms, first_values
            )

    def funding(
        self,
        category: str | None = None,
        symbols: Sequence[str] | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        as_of_ms: int | None = None,
        first_values: bool = False,
    ) -> pl.DataFrame:
        """Stored funding payments as a funding frame, sorted by its key; arguments as for ``candles``."""
        with self.read() as con:
            return read_rows(
                con, FUNDING, FUNDING_SCHEMA, {"category": category}, symbols, since_ms, until_ms, as_of_ms,
                first_values,
            )  # fmt: skip

    def points(
        self,
        table: str,
        category: str | None = None,
        symbols: Sequence[str] | None = None,
        interval: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        as_of_ms: int | None = None,
        first_values: bool = False,
    ) -> pl.DataFrame:
        """Open interest or long/short ratios (see ``put_points``), sorted by their key; arguments as for ``candles``."""
        wanted = {"category": category, "interval": interval}
        of = _points(table)
        with self.read() as con:
            return read_rows(
                con, of, POINT_SCHEMAS[table], wanted, symbols, since_ms, until_ms, as_of_ms, first_values
            )

    def instruments(self, category: str | None = None, as_of_ms: int | None = None) -> pl.DataFrame:
        """The last snapshot of every instrument, or the last one seen by ``as_of_ms``; sorted by name."""
        with self.read() as con:
            return instruments.last(con, category, as_of_ms)

    def universe(self, category: str, as_of_ms: int) -> pl.DataFrame:
        """What could be traded at ``as_of_ms``: launched by then and not yet delivered. Sorted by symbol."""
        with self.read() as con:
            return instruments.universe(con, category, as_of_ms)

    def news(
        self, since_ms: int | None = None, until_ms: int | None = None, as_of_ms: int | None = None
    ) -> pl.DataFrame:
        """The newest version of every item published in the range (or the newest known at ``as_of_ms``), by time."""
        with self.read() as con:
            return news.read(con, since_ms, until_ms, as_of_ms)

    def news_versions(self) -> pl.DataFrame:
        """Every version of every item, as a news frame sorted by publication."""
        with self.read() as con:
            return news.versions(con)

    def unscored(self, run_id: str) -> pl.DataFrame:
        """All versions of news items that ``run_id`` has not scored yet, as a news frame."""
        with self.read() as con:
            return news.unscored(con, run_id)

    def sentiment(self, run_id: str | None = None) -> pl.DataFrame:
        """The scores of a run, or of all, as a sentiment frame sorted by run and item."""
        with self.read() as con:
            return news.sentiment(con, run_id)

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

    def first_open(self, series: Series) -> int | None:
        """Like ``last_open``, of the oldest stored row."""
        return self._edge(series, "min")

    def last_open(self, series: Series) -> int | None:
        """Open time (for funding and points: their instant) of the newest stored row of a series, None without any."""
        return self._edge(series, "max")

    def _edge(self, series: Series, of: str) -> int | None:
        if not self.path.exists():
            return None
        table = table_of(series)
        with self.read() as con:
            ((at_ms,),) = con.execute(
                f"""SELECT epoch_ms({of}({table.time})) FROM {table.name}
                WHERE {" AND ".join(f"{column} = ?" for column in table.series)}""",
                list(names_of(series)),
            ).fetchall()
        return None if at_ms is None else int(at_ms)

    def inventory(self) -> list[inventory.StoredSeries]:
        """Every stored series with its rows and revisions."""
        with self.read() as con:
            return inventory.inventory(con)

    def rows(self, series: Series) -> pl.DataFrame:
        """Times and values of one series of any kind, in order of time."""
        with self.read() as con:
            return inventory.rows(con, series)

    def asked(self, series: Series) -> list[tuple[int, int, str, str]]:
        """Every range that was asked, in the order of asking: (since_ms, until_ms, "done" or "gap", reason)."""
        if not self.path.exists():
            return []
        with self.read() as con:
            return inventory.asked(con, series)

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


def _points(table: str) -> Table:
    if table not in POINTS:
        raise ValueError(f"no table of points is called '{table}'{did_you_mean(table, POINTS)}")
    return POINTS[table]
