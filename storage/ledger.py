"""The forecast ledger: append-only rows, each carrying a hash of itself and of the row before it.

``entry_hash`` is the SHA-256 of the row's canonical JSON (sorted keys, no spaces, times as ISO-8601 with ``Z``,
floats in shortest form, ``prev_hash`` included; ``seq`` and ``entry_hash`` are not). The first row's ``prev_hash`` is
64 zeros. Changing, removing or inserting a row breaks the chain from there on; cutting off its end does not show.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime

import duckdb
import polars as pl

from recur.storage.schema import QUANTILES
from recur.vocabulary import iso, to_ms

GENESIS = "0" * 64
KEY = ("unique_id", "cutoff", "horizon", "model", "run_id")
_TIME = pl.Datetime("ms", "UTC")
FORECAST_SCHEMA = pl.Schema(
    {
        "unique_id": pl.String(),
        "cutoff": _TIME,
        "ds": _TIME,
        "horizon": pl.Int32(),
        "model": pl.String(),
        "run_id": pl.String(),
        "made_at": _TIME,
        "known_at": _TIME,
        "late": pl.Boolean(),
        **dict.fromkeys(QUANTILES, pl.Float64()),
        **dict.fromkeys(("mean", "prob_up", "vol", "close"), pl.Float64()),
    }
)
"""Columns of a forecast frame before it is chained; ``horizon`` counts bars, quantiles are log returns."""
_REQUIRED = (*KEY, "ds", "made_at")


def entry_hash(row: Mapping[str, object], prev_hash: str) -> str:
    """Hash of one forecast (columns of ``FORECAST_SCHEMA``; others are ignored) that follows ``prev_hash``."""
    plain: dict[str, object] = {"prev_hash": prev_hash}
    for name in FORECAST_SCHEMA:
        value = row[name]
        plain[name] = iso(to_ms(value)) if isinstance(value, datetime) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def append(con: duckdb.DuckDBPyConnection, frame: pl.DataFrame) -> int:
    """Append the rows whose ``KEY`` is not in the ledger yet, in the given order; returns how many.

    Absent optional columns and NaN become null. Raises ValueError for absent or null required columns and for
    infinite numbers. Must run inside a writing transaction.
    """
    rows = _plain(frame)
    known: pl.DataFrame = con.sql(f"SELECT {', '.join(KEY)} FROM forecasts").pl()
    known = known.with_columns(pl.col("cutoff").dt.replace_time_zone("UTC"))
    rows = rows.join(known, on=list(KEY), how="anti", maintain_order="left")
    if rows.is_empty():
        return 0
    tail = con.execute("SELECT seq, entry_hash FROM forecasts ORDER BY seq DESC LIMIT 1").fetchall()
    last, prev = tail[0] if tail else (0, GENESIS)
    hashes = [prev]
    for row in rows.iter_rows(named=True):
        hashes.append(entry_hash(row, hashes[-1]))
    chained = rows.with_columns(
        pl.col(_TIME).dt.replace_time_zone(None),
        pl.int_range(last + 1, last + 1 + rows.height, dtype=pl.Int64).alias("seq"),
        pl.Series("entry_hash", hashes[1:]),
        pl.Series("prev_hash", hashes[:-1]),
    )
    con.register("appended", chained)
    con.execute("INSERT INTO forecasts BY NAME SELECT * FROM appended ORDER BY seq")
    con.unregister("appended")
    return rows.height


def read(
    con: duckdb.DuckDBPyConnection, limit: int | None = None, symbols: Sequence[str] | None = None
) -> pl.DataFrame:
    """The newest ``limit`` entries in the order they were appended; ``symbols`` are names such as BTCUSDT."""
    where = "" if symbols is None else "WHERE split_part(unique_id, ':', 3) IN (SELECT unnest(?::VARCHAR[]))"
    params: list[object] = [] if symbols is None else [list(symbols)]
    newest = "" if limit is None else f"LIMIT {int(limit)}"
    query = f"SELECT * FROM (SELECT * FROM forecasts {where} ORDER BY seq DESC {newest}) ORDER BY seq"
    found: pl.DataFrame = con.sql(query, params=params).pl()
    return found.with_columns(pl.col(pl.Datetime).dt.replace_time_zone("UTC"))


def first_broken(entries: pl.DataFrame) -> int | None:
    """``seq`` of the first entry that does not fit the chain, None when all do. Takes the whole ledger, in order."""
    prev = GENESIS
    for row in entries.iter_rows(named=True):
        if row["prev_hash"] != prev or entry_hash(row, prev) != row["entry_hash"]:
            return int(row["seq"])
        prev = row["entry_hash"]
    return None


def _plain(frame: pl.DataFrame) -> pl.DataFrame:
    absent = [name for name in _REQUIRED if name not in frame.columns]
    if absent:
        raise ValueError(f"forecasts lack the columns {', '.join(absent)}")
    columns = [
        (pl.col(name) if name in frame.columns else pl.lit(None).alias(name)).cast(kind)
        for name, kind in FORECAST_SCHEMA.items()
    ]
    rows = frame.select(columns).with_columns(pl.col(pl.Float64).fill_nan(None))
    if any(rows.get_column(name).has_nulls() for name in _REQUIRED):
        raise ValueError(f"forecasts need a value in each of {', '.join(_REQUIRED)}")
    return rows.unique(list(KEY), keep="first", maintain_order=True)
