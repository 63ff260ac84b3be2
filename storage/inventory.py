"""What is stored: every series with its rows and revisions, what was asked for it, and whether its keys are unique."""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import polars as pl

from recur.storage.fetched import names_of, series_of, table_of
from recur.storage.schema import CANDLES, FUNDING, POINTS, Table
from recur.storage.series import one_series
from recur.vocabulary import Series

TABLES: tuple[Table, ...] = (CANDLES, FUNDING, *POINTS.values())


@dataclass(frozen=True, slots=True)
class StoredSeries:
    """One series: how many rows, how many revisions of them, and its columns of values."""

    series: Series
    rows: int
    revisions: int
    time: str
    values: tuple[str, ...]


def inventory(con: duckdb.DuckDBPyConnection) -> list[StoredSeries]:
    """Every series on a time axis that has rows, sorted by table and name."""
    out = []
    for table in TABLES:
        names = ", ".join(table.series)
        found = con.execute(
            f"""SELECT {names}, n, coalesce(r, 0) FROM (SELECT {names}, count(*) AS n FROM {table.name} GROUP BY ALL)
            LEFT JOIN (SELECT {names}, count(*) AS r FROM {table.revisions} GROUP BY ALL) USING ({names})
            ORDER BY {names}"""
        ).fetchall()
        out += [
            StoredSeries(series_of(row[:-2], table), row[-2], row[-1], table.time, table.values)
            for row in found
        ]
    return out


def rows(con: duckdb.DuckDBPyConnection, series: Series) -> pl.DataFrame:
    """Times and values of one series, in order of time."""
    table = table_of(series)
    names = dict(zip(table.series, names_of(series), strict=True))
    return one_series(con, table, dict(names), None, None).select(table.time, *table.values)


def asked(con: duckdb.DuckDBPyConnection, series: Series) -> list[tuple[int, int, str, str]]:
    """Every range that was asked for a series, in the order of asking: (since_ms, until_ms, status, reason)."""
    return con.execute(
        """SELECT epoch_ms(since), epoch_ms(until), status, reason FROM fetch_windows
        WHERE category = ? AND symbol = ? AND interval = ? AND kind = ? ORDER BY rowid""",
        [series.category, series.symbol, series.interval, series.kind],
    ).fetchall()


def duplicates(con: duckdb.DuckDBPyConnection) -> list[str]:
    """Tables in which a key stands twice, with how many keys: what the write path must never let happen."""
    out = []
    for table in TABLES:
        keys = ", ".join(table.key)
        ((n,),) = con.execute(
            f"SELECT count(*) FROM (SELECT 1 FROM {table.name} GROUP BY {keys} HAVING count(*) > 1)"
        ).fetchall()
        if n:
            out.append(f"{table.name}: {n}")
    return out
