"""An independent check of stored bars: rebuild them from the venue's public files of single trades, and compare.

Two layouts of ``.csv.gz`` (or ``.csv``) files are known, by their columns: contracts (``timestamp`` in seconds with decimals,
``symbol``, ``side``, ``size``, ``price``, … 10 or 11 columns) and spot (``id``, ``timestamp`` in milliseconds, ``price``, ``volume``,
``side``, …; the symbol stands in the file's name). Rows may be in any order.

The venue opens a bar at the close of the bar before it, whatever the first trade was; so a stored open may be either,
and high and low include it. A bar without trades is flat at the close before, with volume 0.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recur.storage.store import Store
from recur.vocabulary import (
    DAY_MS,
    INTERVALS,
    DataMissing,
    Series,
    UsageError,
    ceil_open,
    floor_open,
    from_ms,
    iso,
    next_open,
    parse_time,
)

RELATIVE = 1e-6
"""Volumes and turnovers are sums of rounded numbers: they may differ by this share."""
_NEWEST_MS = 4_102_444_800_000  # the year 2100: beyond it, milliseconds were taken for seconds
_CONTRACT = ("timestamp", "symbol", "size", "price")
_SPOT = ("id", "timestamp", "price", "volume")
_INVERSE = re.compile(r"[A-Z0-9]+USD([FGHJKMNQUVXZ]\d{2})?")
_NAME = re.compile(r"(?P<symbol>.+?)[_-]?(?P<date>\d{4}-\d{2}(-\d{2})?)?\.csv(\.gz)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Trades:
    """The trades of one file in order of time: columns ``ms`` (Int64), ``price``, ``size`` (Float64).

    ``since_ms``, ``until_ms``: the day or month that the file's name tells, else the whole minutes inside its trades.
    """

    path: Path
    category: str
    symbol: str
    since_ms: int
    until_ms: int
    frame: pl.DataFrame


def read_trades(path: Path) -> Trades:
    """Read one archive file. UsageError when it is absent, cut short, of another layout, or not what its name says."""
    named = _NAME.fullmatch(path.name)
    if named is None:
        raise UsageError(f"{path} is not a trade archive: expected a name ending in .csv.gz or .csv.")
    content = _content(path)
    try:
        raw = pl.read_csv(content, infer_schema_length=10_000)
    except pl.exceptions.PolarsError as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(f"Cannot read {path}: {said}", "Is it a file of single trades?") from error
    spot = set(_SPOT) <= set(raw.columns)
    if not spot and not set(_CONTRACT) <= set(raw.columns):
        raise UsageError(
            f"{path} is not a trade archive: found the columns {', '.join(raw.columns)}.",
            f"Contracts have {', '.join(_CONTRACT)}; spot has {', '.join(_SPOT)}.",
        )
    size, unit = ("volume", 1.0) if spot else ("size", 1000.0)
    frame = raw.select(
        (pl.col("timestamp").cast(pl.Float64, strict=False) * unit).alias("at"),
        pl.col("price").cast(pl.Float64, strict=False),
        pl.col(size).cast(pl.Float64, strict=False).alias("size"),
    )
    sane = pl.all_horizontal(pl.all().is_finite()) & (pl.col("price") > 0) & (pl.col("size") >= 0)
    sane &= pl.col("at").is_between(0, _NEWEST_MS)
    bad = frame.with_row_index("row", 1).filter(~sane.fill_null(False))
    if frame.is_empty() or bad.height:
        where = (
            f"row {bad.item(0, 'row')} has no sane time, price and size" if bad.height else "it has no rows"
        )
        raise UsageError(f"{path} is refused: {where}.", "Fetch the file again.")
    steps = frame.get_column("at").diff()
    if int((steps < 0).sum()) > int((steps > 0).sum()):
        frame = frame.reverse()  # newest first: turned round, trades of one instant stand in their order
    frame = frame.sort("at", maintain_order=True)
    frame = frame.select(pl.col("at").round(3).floor().cast(pl.Int64).alias("ms"), "price", "size")
    symbols = [named["symbol"].upper()] if spot else raw.get_column("symbol").unique().to_list()
    if len(symbols) != 1:
        raise UsageError(f"{path} holds trades of {len(symbols)} symbols: expected one.")
    symbol = str(symbols[0])
    category = "spot" if spot else "inverse" if _INVERSE.fullmatch(symbol) else "linear"
    first, last = int(frame.item(0, "ms")), int(frame.item(-1, "ms"))
    since, until = _range(named["date"], first, last)
    if not (since <= first and last < until) and named["date"]:
        raise UsageError(
            f"{path} is refused: its name says {named['date']}, its trades run from {iso(first)} to {iso(last)}.",
            "Times are seconds in files of contracts and milliseconds in files of spot.",
        )
    return Trades(path, category, symbol, since, until, frame)


def _content(path: Path) -> bytes:
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path} is cut short or damaged: {error}.", "Fetch the file again.") from error
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from error


def _range(date: str | None, first: int, last: int) -> tuple[int, int]:
    if date is None:
        return ceil_open(first, "1m"), floor_open(last, "1m")
    if len(date) == len("2025-07"):
        since = parse_time(f"{date}-01")
        return since, next_open(since, "1M")
    since = parse_time(date)
    return since, since + DAY_MS


def rebuild(trades: Trades, interval: str) -> pl.DataFrame:
    """Bars with trades inside the file's range: ``open_ms``, ``first``, ``high``, ``low``, ``close``, ``volume``, ``turnover``,
    ``trades`` and ``before``, the close of the last bar with trades before it (null for the first).

    Volume is in base coin and turnover in quote coin; for inverse contracts it is the other way round.
    """
    step = INTERVALS[interval]
    value = (
        pl.col("size") / pl.col("price") if trades.category == "inverse" else pl.col("size") * pl.col("price")
    )
    return (
        trades.frame.lazy()
        .with_columns((pl.col("ms") - pl.col("ms") % step).alias("open_ms"), value.alias("value"))
        .group_by("open_ms", maintain_order=True)
        .agg(
            pl.col("price").first().alias("first"),
            pl.col("price").max().alias("high"),
            pl.col("price").min().alias("low"),
            pl.col("price").last().alias("close"),
            pl.col("size").sum().alias("volume"),
            pl.col("value").sum().alias("turnover"),
            pl.len().alias("trades"),
        )
        .with_columns(pl.col("close").shift(1).alias("before"))
        .filter(pl.col("open_ms") >= trades.since_ms, pl.col("open_ms") + step <= trades.until_ms)
        .collect()
    )


def compare(stored: pl.DataFrame, bars: pl.DataFrame) -> pl.DataFrame:
    """Where stored bars (a candle frame) are not what the trades say: ``open_ms``, ``column``, ``stored``, ``rebuilt``.

    A bar that is not stored though it had trades has the column "bar", and its volume under ``rebuilt``.
    """
    prices = ("open", "high", "low", "close", "volume", "turnover")
    ours = stored.select(
        pl.col("open_time").dt.epoch("ms").alias("open_ms"), *(pl.col(n).alias(f"s_{n}") for n in prices)
    )
    both = ours.join(bars, on="open_ms", how="full", coalesce=True).sort("open_ms")
    before = pl.coalesce("before", pl.col("close").forward_fill().shift(1))
    quiet = pl.col("first").is_null()
    o, h, low = pl.col("s_open"), pl.col("s_high"), pl.col("s_low")
    both = both.with_columns(before.alias("before"))
    both = both.with_columns(
        pl.when(quiet).then("before").when(o == pl.col("before")).then("before")
        .when(pl.col("before").is_null() & o.is_between("low", "high")).then(o).otherwise("first").alias("r_open")
    )  # fmt: skip
    opened = pl.col("r_open")
    both = both.with_columns(
        pl.when(quiet).then(opened).when(h == pl.col("high")).then(h)
        .otherwise(pl.max_horizontal("high", opened)).alias("r_high"),
        pl.when(quiet).then(opened).when(low == pl.col("low")).then(low)
        .otherwise(pl.min_horizontal("low", opened)).alias("r_low"),
        pl.when(quiet).then(opened).otherwise("close").alias("r_close"),
        pl.col("volume").fill_null(0.0).alias("r_volume"),
        pl.col("turnover").fill_null(0.0).alias("r_turnover"),
    )  # fmt: skip
    absent = both.filter(pl.col("s_close").is_null()).select(
        "open_ms", pl.lit("bar").alias("column"), pl.lit(None, dtype=pl.Float64).alias("stored"),
        pl.col("volume").alias("rebuilt"),
    )  # fmt: skip
    found = [absent]
    present = both.filter(pl.col("s_close").is_not_null())
    for name in prices:
        mine, theirs = pl.col(f"s_{name}"), pl.col(f"r_{name}")
        slack = RELATIVE * theirs.abs() if name in ("volume", "turnover") else pl.lit(0.0)
        found.append(
            present.filter(((mine - theirs).abs() > slack).fill_null(False)).select(
                "open_ms", pl.lit(name).alias("column"), mine.alias("stored"), theirs.alias("rebuilt")
            )
        )
    return pl.concat(found).sort("open_ms", "column")


def check_archives(store: Store, paths: Sequence[Path]) -> dict[str, Any]:
    """Compare stored trade candles of every interval up to a day with archive files.

    Returns ``{"ok", "files": [{file, symbol, category, trades, since, until, series: [{series, bars, equal}]}],
    "differences": [{series, open_time, column, stored, rebuilt}]}``. Raises UsageError for an unusable file, DataMissing
    when nothing is stored to compare one with.
    """
    files, differences = [], []
    kept = [stored.series for stored in store.inventory()]
    for path in paths:
        trades = read_trades(path)
        series = [
            s
            for s in kept
            if (s.category, s.symbol, s.kind) == (trades.category, trades.symbol, "trade")
            and 0 < INTERVALS[s.interval] <= DAY_MS
        ]
        report = []
        for one in sorted(series, key=lambda s: INTERVALS[s.interval]):
            since = ceil_open(trades.since_ms, one.interval)
            until = floor_open(trades.until_ms, one.interval)
            stored = store.candles(
                one.category, [one.symbol], one.interval, "trade", since, max(since, until)
            )
            if stored.is_empty():
                continue
            found = compare(stored, rebuild(trades, one.interval))
            report.append(_counts(one, stored, found))
            differences += [
                {
                    "series": str(one),
                    "open_time": iso(ms),
                    "column": column,
                    "stored": mine,
                    "rebuilt": theirs,
                }
                for ms, column, mine, theirs in found.iter_rows()
            ]
        if not report:
            raise DataMissing(
                f"The store holds no {trades.category} candles of {trades.symbol} between {iso(trades.since_ms)} and"
                f" {iso(trades.until_ms)}.",
                f"Fetch them first: recur fetch -s {trades.symbol} --category {trades.category} -i 1m"
                f" --since {from_ms(trades.since_ms):%Y-%m-%d}.",
            )
        files.append(
            {
                "file": str(path),
                "symbol": trades.symbol,
                "category": trades.category,
                "trades": trades.frame.height,
                "since": iso(trades.since_ms),
                "until": iso(trades.until_ms),
                "series": report,
            }
        )
    return {"ok": not differences, "files": files, "differences": differences}


def _counts(series: Series, stored: pl.DataFrame, found: pl.DataFrame) -> dict[str, Any]:
    absent = found.filter(pl.col("column") == "bar").height
    differing = found.filter(pl.col("column") != "bar").get_column("open_ms").n_unique()
    return {
        "series": str(series),
        "bars": stored.height,
        "equal": stored.height - differing,
        "differing": differing,
        "absent": absent,
    }
