"""Instruments as the venue described them, over time: append-only snapshots, and the universe at any date."""

from __future__ import annotations

import duckdb
import polars as pl

from recur.storage.frames import INSTRUMENT_SCHEMA, TIME, aware, naive
from recur.storage.merge import PutResult
from recur.vocabulary import DAY_MS

_KEY = ("category", "symbol")
_FACTS = tuple(name for name in INSTRUMENT_SCHEMA if name not in (*_KEY, "turnover_24h"))
_OUT = pl.Schema({**INSTRUMENT_SCHEMA, "seen_at": TIME})
_LAST = f"""SELECT DISTINCT ON (category, symbol) {", ".join(_OUT)} FROM instruments
    WHERE {{where}} ORDER BY category, symbol, {{order}}"""


def put(con: duckdb.DuckDBPyConnection, frame: pl.DataFrame, source: str, now_ms: int) -> PutResult:
    """Append the instruments of ``frame`` whose last snapshot says otherwise; absent columns count as unknown.

    The turnover of the last 24 hours changes at every look: alone it makes a new snapshot once a day.
    """
    columns = [
        (pl.col(name) if name in frame.columns else pl.lit(None).alias(name)).cast(kind)
        for name, kind in INSTRUMENT_SCHEMA.items()
    ]
    rows = naive(frame.select(columns), INSTRUMENT_SCHEMA).unique(_KEY, keep="last", maintain_order=True)
    if rows.select(_KEY).null_count().sum_horizontal().item():
        raise ValueError("instruments need a category and a symbol")
    con.register("incoming", rows)
    differs = " OR ".join(f"l.{name} IS DISTINCT FROM i.{name}" for name in _FACTS)
    stale = (
        f"epoch_ms(l.seen_at) <= {int(now_ms) - DAY_MS} AND i.turnover_24h IS DISTINCT FROM l.turnover_24h"
    )
    last = _LAST.format(where="true", order="seen_at DESC")
    con.execute(
        f"""CREATE OR REPLACE TEMP TABLE delta AS SELECT i.*, l.symbol IS NOT NULL AS known
        FROM incoming i LEFT JOIN ({last}) l ON l.category = i.category AND l.symbol = i.symbol
        WHERE l.symbol IS NULL OR {differs} OR ({stale})"""
    )
    con.unregister("incoming")
    ((new, changed),) = con.execute(
        "SELECT count(*) FILTER (NOT known), count(*) FILTER (known) FROM delta"
    ).fetchall()
    names = ", ".join(INSTRUMENT_SCHEMA)
    con.execute(
        f"""INSERT INTO instruments ({names}, source, seen_at)
        SELECT {names}, ?, make_timestamp_ms(?) FROM delta ORDER BY category, symbol""",
        [source, now_ms],
    )
    con.execute("DROP TABLE delta")
    return PutResult(new, changed, rows.height - new - changed)


def last(con: duckdb.DuckDBPyConnection, category: str | None, as_of_ms: int | None) -> pl.DataFrame:
    """The last snapshot of each instrument that was seen by ``as_of_ms`` (None: ever)."""
    where, params = ["true"], list[object]()
    if category is not None:
        where.append("category = ?")
        params.append(category)
    if as_of_ms is not None:
        where.append("seen_at <= make_timestamp_ms(?)")
        params.append(as_of_ms)
    query = _LAST.format(where=" AND ".join(where), order="seen_at DESC")
    found: pl.DataFrame = con.sql(query, params=params).pl()
    return aware(found, _OUT).sort(_KEY)


def universe(con: duckdb.DuckDBPyConnection, category: str, as_of_ms: int) -> pl.DataFrame:
    """Instruments that could be traded at ``as_of_ms``: launched by then, not yet delivered (delisted).

    Each is described by its last snapshot seen by then, or its first one if it was only looked at later. Its launch is
    the earlier of the venue's ``launch_time`` and the first stored bar (some symbols have bars before their launch
    time); where the venue gives none (spot) and no bar is stored, it is the first time it was seen.
    """
    query = f"""
        WITH described AS ({
        _LAST.format(
            where="category = $category",
            order="seen_at <= make_timestamp_ms($at) DESC, CASE WHEN seen_at <= make_timestamp_ms($at) "
            "THEN -epoch_ms(seen_at) ELSE epoch_ms(seen_at) END",
        )
    }),
        first_bar AS (SELECT symbol, min(open_time) AS opened FROM candles
            WHERE category = $category AND kind = 'trade' GROUP BY symbol),
        first_look AS (SELECT symbol, min(seen_at) AS seen FROM instruments
            WHERE category = $category GROUP BY symbol)
        SELECT d.* FROM described d LEFT JOIN first_bar USING (symbol) LEFT JOIN first_look USING (symbol)
        WHERE coalesce(least(d.launch_time, opened), seen) <= make_timestamp_ms($at)
        AND (d.delivery_time IS NULL OR d.delivery_time > make_timestamp_ms($at)) ORDER BY d.symbol"""
    found: pl.DataFrame = con.sql(query, params={"category": category, "at": as_of_ms}).pl()
    return aware(found, _OUT)
