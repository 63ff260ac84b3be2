"""Shapes of the frames that go in and out of the store, and the way to and from the tables' naive UTC times."""

from __future__ import annotations

import polars as pl

from recur.storage.schema import CANDLE_KEY, CANDLE_VALUES

TIME = pl.Datetime("ms", "UTC")
CANDLE_SCHEMA = pl.Schema(
    {k: TIME if k == "open_time" else pl.String() for k in CANDLE_KEY}
    | dict.fromkeys(CANDLE_VALUES, pl.Float64())
)
"""Columns of a candle frame; sorted by the first five, which are its key. Absent values are null."""
FUNDING_SCHEMA = pl.Schema(
    {"category": pl.String(), "symbol": pl.String(), "funding_time": TIME, "rate": pl.Float64()}
)
"""Columns of a funding frame; ``rate`` is a fraction per payment."""


def naive(frame: pl.DataFrame, schema: pl.Schema) -> pl.DataFrame:
    """The columns of ``schema`` as the tables want them: UTC times without a zone, NaN as null."""
    columns = []
    for name, kind in schema.items():
        column = pl.col(name).cast(kind)
        if kind == TIME:
            column = column.dt.replace_time_zone(None)
        elif kind == pl.Float64():
            column = column.fill_nan(None)
        columns.append(column)
    return frame.select(columns)


def aware(frame: pl.DataFrame, schema: pl.Schema) -> pl.DataFrame:
    times = [pl.col(name).dt.replace_time_zone("UTC") for name, kind in schema.items() if kind == TIME]
    return frame.with_columns(times)
