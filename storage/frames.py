"""Shapes of the frames that go in and out of the store, and the way to and from the tables' naive UTC times."""

from __future__ import annotations

import polars as pl

from recur.storage.schema import CANDLES, FUNDING, LONG_SHORT, OPEN_INTEREST, Table

TIME = pl.Datetime("ms", "UTC")
READ_ROWS = 16_384
"""Rows per batch in which results come out of DuckDB: buffers of this size are used again instead of being made anew by
the system for each batch, which is 0.6 of the time of reading large results."""


def _schema(table: Table) -> pl.Schema:
    names = {k: TIME if k == table.time else pl.String() for k in table.key}
    return pl.Schema(names | dict.fromkeys(table.values, pl.Float64()))


CANDLE_SCHEMA = _schema(CANDLES)
"""Columns of a candle frame; sorted by the first five, which are its key. Absent values are null."""
FUNDING_SCHEMA = _schema(FUNDING)
"""Columns of a funding frame; ``rate`` is a fraction per payment."""
OPEN_INTEREST_SCHEMA = _schema(OPEN_INTEREST)
"""Columns of an open-interest frame: in base coin (linear) or USD (inverse), both sides counted, at the instant ``ts``."""
LONG_SHORT_SCHEMA = _schema(LONG_SHORT)
"""Columns of a long/short frame: shares of accounts that are net long and net short, at the instant ``ts``."""
POINT_SCHEMAS = {OPEN_INTEREST.name: OPEN_INTEREST_SCHEMA, LONG_SHORT.name: LONG_SHORT_SCHEMA}

INSTRUMENT_SCHEMA = pl.Schema(
    {
        **dict.fromkeys(("category", "symbol", "status", "contract_type"), pl.String()),
        **dict.fromkeys(("base_coin", "quote_coin", "settle_coin"), pl.String()),
        **dict.fromkeys(("launch_time", "delivery_time"), TIME),
        "funding_minutes": pl.Int32(),
        **dict.fromkeys(("tick_size", "qty_step", "turnover_24h"), pl.Float64()),
    }
)
"""Columns of an instrument frame as it is put; what the store gives has ``seen_at`` as well."""
NEWS_PRECISIONS = ("ms", "s", "minute", "day")
NEWS_SCHEMA = pl.Schema(
    {
        "news_id": pl.String(),
        "published_at": TIME,
        "published_precision": pl.String(),
        "first_seen": TIME,
        **dict.fromkeys(("title", "body", "url", "source", "tags", "story_id"), pl.String()),
        "version": pl.Int32(),
        "backfill": pl.Boolean(),
    }
)
"""Columns of a news frame. ``tags`` is a JSON list; ``backfill`` marks items taken from an archive; ``version`` counts the edits of one ``news_id`` from 1."""
SENTIMENT_SCHEMA = pl.Schema(
    {
        "news_id": pl.String(),
        "version": pl.Int32(),
        "run_id": pl.String(),
        "scored_at": TIME,
        **dict.fromkeys(("p_negative", "p_neutral", "p_positive"), pl.Float64()),
        "contaminated": pl.Boolean(),
    }
)
"""Columns of a sentiment frame: one row per version of an item and run that scored it. ``contaminated``: the model may
have learned from the item."""


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
    """The way back: zoned times and the columns' own types, in the order of ``schema``."""
    columns = []
    for name, kind in schema.items():
        column = pl.col(name)
        if kind == TIME:
            column = column.cast(pl.Datetime("ms")).dt.replace_time_zone("UTC")
        columns.append(column if kind == TIME else column.cast(kind))
    return frame.select(columns)
