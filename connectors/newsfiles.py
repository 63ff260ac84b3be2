"""News from a file: Parquet, CSV, gzipped CSV or Feather with ``title|text, published_at[, body|description][, url]
[, source][, published_precision][, tags]``. Other columns are ignored.

A time at midnight sharp is taken as a date without a time (``day``), unless the file states its precision: that errs
on the side of knowing an item too late.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recur.connectors.feeds import news_frame
from recur.connectors.files import load, refuse, times
from recur.vocabulary import DAY_MS, UsageError

PRECISIONS = ("ms", "s", "minute", "day")
_ROW = "row_in_file"


def read_news(path: str | Path) -> pl.DataFrame:
    """The news frame in a file, sorted by time. Raises UsageError, with row numbers, for a file that does not fit."""
    path = Path(path)
    raw = load(path)
    columns = set(raw.columns)
    title = "title" if "title" in columns else "text"
    if title not in columns or "published_at" not in columns:
        missing = [
            name for name in ("published_at", "title") if name not in columns and (name != "title" or title)
        ]
        raise UsageError(
            f"{path} does not hold news: missing column {', '.join(missing)}.",
            "Expected title (or text), published_at, and optionally body (or description), url, source.",
        )
    body = next((name for name in ("body", "description") if name in columns), None)

    def optional(name: str | None, alias: str) -> pl.Expr:
        if name is None or name not in columns:
            return pl.lit(None, dtype=pl.String).alias(alias)
        return pl.col(name).cast(pl.String).alias(alias)

    frame = raw.with_row_index(_ROW, offset=1).select(
        pl.col(_ROW).cast(pl.Int64),
        times(raw, "published_at", path).alias("published_at"),
        optional(title, "title"),
        optional(body, "body"),
        optional("url", "url"),
        optional("source", "source").fill_null(path.stem),
        optional("published_precision", "published_precision"),
    )
    empty = pl.col("title").str.strip_chars().fill_null("") == ""
    if body is not None:
        empty &= pl.col("body").str.strip_chars().fill_null("") == ""
    refuse(
        path,
        frame,
        [
            (pl.col("published_at").is_null(), "published_at is missing or no time"),
            (empty, "no text"),
            (
                ~pl.col("published_precision").is_in(PRECISIONS),
                f"precision is none of {', '.join(PRECISIONS)}",
            ),
        ],
    )
    midnight = pl.col("published_at").dt.epoch("ms") % DAY_MS == 0
    exact = pl.col("published_at").dt.epoch("ms") % 60_000 != 0
    guess = pl.when(midnight).then(pl.lit("day")).when(exact).then(pl.lit("s")).otherwise(pl.lit("minute"))
    frame = frame.with_columns(pl.col("published_precision").fill_null(guess)).sort("published_at")
    return news_frame(
        {
            "key": row["url"] or f"{row['title']}\n{row['published_at']:%Y-%m-%dT%H:%M:%S}",
            "published_ms": int(row["published_at"].timestamp() * 1000),
            "precision": row["published_precision"],
            "title": row["title"],
            "body": row["body"],
            "url": row["url"],
            "source": row["source"],
            "tags": [],
        }
        for row in frame.iter_rows(named=True)
    )
