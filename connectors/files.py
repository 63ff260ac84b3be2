"""Candles and funding from a file: Parquet, CSV, gzipped CSV or Feather.

Candles: ``symbol, interval, ts|open_time, open, high, low, close, volume[, turnover][, category]``.
Funding: ``symbol, ts|funding_time, funding_rate|rate[, category]``. Other columns are ignored. Times are datetimes, ISO-8601 text
(UTC unless they carry an offset) or integer epoch milliseconds.

A file that does not fit is refused whole with a UsageError of one line: row numbers (the first row below any header
is row 1) and reasons, five of them at most and then a count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import polars as pl

from recur.vocabulary import CATEGORIES, DAY_MS, INTERVALS, UsageError, check_category, iso

Kind = Literal["candles", "funding", "open_interest", "long_short", "news"]
_TIME = pl.Datetime("ms", "UTC")
_SUFFIXES = (".parquet", ".csv", ".csv.gz", ".feather")
_PRICES = ("open", "high", "low", "close")
_CANDLE_KEY = ("category", "symbol", "interval", "kind", "open_time")
_CCXT = r"^([^/:]+)/([^/:]+)(?::([^/:]+))?$"
_SHOWN = 5
_OLDEST_MS, _NEWEST_MS = 1_230_768_000_000, 4_102_444_800_000  # else epoch seconds or microseconds were given
_ROW = "row_in_file"


def sniff(path: str | Path) -> Kind:
    """What a file holds, by its columns. Raises UsageError when it is none of them or cannot be read."""
    return _kind(load(Path(path)), Path(path))


def read_candles(path: str | Path, *, category: str = "linear", now_ms: int | None = None) -> pl.DataFrame:
    """The candle frame in a file; ``category`` applies when the file has no such column. Sorted by its key.

    Rows of a series must stand in the order of time, and every bar be closed at ``now_ms`` where that is given.
    Raises UsageError for anything that does not fit.
    """
    path = Path(path)
    raw = load(path)
    need(raw, path, "candles", ("symbol", "interval", *_PRICES, "volume"), ("open_time", "ts"))
    time = "open_time" if "open_time" in raw.columns else "ts"
    numbers = [*_PRICES, "volume", *(["turnover"] if "turnover" in raw.columns else [])]
    frame = raw.with_row_index(_ROW, offset=1).select(
        pl.col(_ROW).cast(pl.Int64),
        category_of(raw, category),
        symbol_of(),
        text("interval"),
        pl.lit("trade").alias("kind"),
        times(raw, time, path).alias("open_time"),
        *(number(name) for name in numbers),
    )
    if "turnover" not in numbers:
        frame = frame.with_columns(pl.lit(None, dtype=pl.Float64).alias("turnover"))
    open_, high, low, close = (pl.col(name) for name in _PRICES)
    series = _CANDLE_KEY[:-1]
    refuse(
        path,
        frame,
        [
            *key_faults("open_time", series),
            (~pl.col("interval").is_in(list(INTERVALS)).fill_null(False), "unknown interval"),
            (
                pl.col("interval").is_in(list(INTERVALS)) & ~_on_grid(),
                "open time is off the grid of its interval",
            ),
            *_ahead(_close_ms(), now_ms, "bar is not closed"),
            *((pl.col(n).is_null() | ~pl.col(n).is_finite(), f"{n} is not a finite number") for n in _PRICES),
            (~pl.col("volume").is_finite(), "volume is not finite"),
            (~pl.col("turnover").is_finite(), "turnover is not finite"),
            (pl.min_horizontal(_PRICES) <= 0, "price is not above 0"),
            (pl.min_horizontal("volume", "turnover") < 0, "volume or turnover is below 0"),
            (high < low, "high is below low"),
            (high < pl.max_horizontal(open_, close), "high is below open or close"),
            (low > pl.min_horizontal(open_, close), "low is above open or close"),
        ],
    )
    return frame.drop(_ROW).sort(_CANDLE_KEY)


def read_funding(path: str | Path, *, category: str = "linear", now_ms: int | None = None) -> pl.DataFrame:
    """The funding frame in a file (rates are fractions per payment), sorted by category, symbol and time.

    No payment may lie after ``now_ms`` where that is given. Raises UsageError for anything that does not fit.
    """
    path = Path(path)
    raw = load(path)
    need(raw, path, "funding", ("symbol",), ("funding_time", "ts"), ("funding_rate", "rate"))
    time = "funding_time" if "funding_time" in raw.columns else "ts"
    rate = "funding_rate" if "funding_rate" in raw.columns else "rate"
    frame = raw.with_row_index(_ROW, offset=1).select(
        pl.col(_ROW).cast(pl.Int64),
        category_of(raw, category),
        symbol_of(),
        times(raw, time, path).alias("funding_time"),
        number(rate).alias("rate"),
    )
    refuse(
        path,
        frame,
        [
            *key_faults("funding_time", ("category", "symbol")),
            *_ahead(pl.col("funding_time").dt.epoch("ms"), now_ms, "payment is still to come"),
            (pl.col("rate").is_null() | ~pl.col("rate").is_finite(), "rate is not a finite number"),
        ],
    )
    return frame.drop(_ROW).sort("category", "symbol", "funding_time")


def load(path: Path) -> pl.DataFrame:
    """Any table the formats allow. Raises UsageError when it is absent, empty, or cannot be read."""
    name = path.name.lower()
    if not name.endswith(_SUFFIXES):
        raise UsageError(
            f"Cannot tell the format of {path}: expected a name ending in {', '.join(_SUFFIXES)}."
        )
    if not path.is_file():
        raise UsageError(f"There is no file {path}.", "Check the path.")
    try:
        if name.endswith(".parquet"):
            frame = pl.read_parquet(path)
        elif name.endswith(".feather"):
            frame = pl.read_ipc(path)
        else:
            frame = pl.read_csv(path, infer_schema_length=None)
    except pl.exceptions.NoDataError:
        raise UsageError(f"{path} is empty.") from None
    except (pl.exceptions.PolarsError, OSError, ValueError, EOFError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"Cannot read {path}: {said.rstrip('.')}.", "Is it complete, and of the format its name tells?"
        ) from error
    if frame.is_empty():
        raise UsageError(f"{path} has no rows.")
    return frame


def _kind(frame: pl.DataFrame, path: Path) -> Kind:
    columns = set(frame.columns)
    if len(columns & set(_PRICES)) > 1:  # one that is missing is named later
        return "candles"
    if columns & {"funding_rate", "rate"}:
        return "funding"
    if "open_interest" in columns:
        return "open_interest"
    if columns & {"buy_ratio", "sell_ratio"}:
        return "long_short"
    if columns & {"title", "text"} and "published_at" in columns:
        return "news"
    raise UsageError(
        f"{path} holds none of candles, funding, open interest, long/short ratio and news: found the columns"
        f" {', '.join(frame.columns)}.",
        "Candles need symbol, interval, ts, open, high, low, close, volume; funding symbol, ts, funding_rate; news"
        " title, published_at.",
    )


def need(frame: pl.DataFrame, path: Path, what: str, names: Sequence[str], *either: tuple[str, str]) -> None:
    absent = [name for name in names if name not in frame.columns]
    absent += ["|".join(pair) for pair in either if not set(pair) & set(frame.columns)]
    if absent:
        raise UsageError(
            f"{path} does not fit {what}: column {', '.join(absent)} is missing; found {', '.join(frame.columns)}."
        )


def text(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.String).str.strip_chars()


def symbol_of() -> pl.Expr:
    """The symbol as the venue writes it; the ccxt spellings BTC/USDT and BTC/USDT:USDT become BTCUSDT."""
    return text("symbol").str.to_uppercase().str.replace(_CCXT, "${1}${2}")


def category_of(raw: pl.DataFrame, category: str) -> pl.Expr:
    """The category of each row: the file's own, else that of a ccxt spelling, else ``category``.

    Null where the file's own and the spelling contradict each other.
    """
    spelled = text("symbol").str.to_uppercase().str.extract_groups(_CCXT).struct
    quote, settle = spelled.field("2"), spelled.field("3")
    ccxt = (
        pl.when(settle == quote)
        .then(pl.lit("linear"))
        .when(settle.is_not_null())
        .then(pl.lit("inverse"))
        .when(quote.is_not_null())
        .then(pl.lit("spot"))
    )
    if "category" in raw.columns:
        own = text("category")
        return pl.when(ccxt.is_null() | (ccxt == own)).then(own).alias("category")
    return pl.coalesce(ccxt, pl.lit(check_category(category))).alias("category")


def number(name: str) -> pl.Expr:
    """A float column; text that is no number becomes NaN, so that it is refused and not taken as absent."""
    return (
        pl.col(name)
        .cast(pl.Float64, strict=False)
        .fill_null(pl.when(pl.col(name).is_not_null()).then(float("nan")))
    )


def times(raw: pl.DataFrame, name: str, path: Path) -> pl.Expr:
    """UTC milliseconds of a column of datetimes, ISO text or epoch milliseconds; null where it cannot be read."""
    kind = raw.schema[name]
    column = pl.col(name)
    if isinstance(kind, pl.Datetime):
        column = (
            column.dt.replace_time_zone("UTC")
            if kind.time_zone is None
            else column.dt.convert_time_zone("UTC")
        )
        return column.cast(_TIME)
    if kind.is_integer():
        return column.cast(pl.Int64).cast(_TIME)
    if kind == pl.Date:
        return column.cast(pl.Datetime("ms")).dt.replace_time_zone("UTC")
    if kind == pl.String:
        text = (
            column.str.strip_chars().str.replace(" ", "T").str.replace(r"^(\d{4}-\d{2}-\d{2})$", "${1}T00:00")
        )
        text = text.str.replace(r"(Z|[+-]00:?00)$", "")
        text = text.str.replace(r"T(\d{2}:\d{2})($|[+-])", "T${1}:00${2}")
        zoned = text.str.replace(r"([+-]\d{2})$", "${1}:00").str.replace(r"([+-]\d{2})(\d{2})$", "${1}:${2}")
        plain = text.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="ms", time_zone="UTC", strict=False)
        offset = zoned.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", time_unit="ms", strict=False)
        return pl.coalesce(plain, offset.dt.convert_time_zone("UTC"))
    raise UsageError(
        f"{path}: column {name} has type {kind}: expected datetimes, ISO-8601 text or epoch milliseconds."
    )


def _close_ms() -> pl.Expr:
    opened = pl.col("open_time")
    step = pl.col("interval").replace_strict(INTERVALS, default=0, return_dtype=pl.Int64)
    month = opened.dt.offset_by("1mo").dt.epoch("ms")
    return pl.when(pl.col("interval") == "1M").then(month).otherwise(opened.dt.epoch("ms") + step)


def _ahead(at_ms: pl.Expr, now_ms: int | None, why: str) -> list[tuple[pl.Expr, str]]:
    """The fault of lying after now, if there is a now."""
    return (
        [] if now_ms is None else [(at_ms > now_ms, f"{why} at {iso(now_ms)}, now by this machine's clock")]
    )


def _on_grid() -> pl.Expr:
    """Whether an open time is one of its interval's: multiples of its length, Mondays, firsts of a month."""
    midnight = pl.col("open_time").dt.epoch("ms") % DAY_MS == 0
    fixed = {name: step for name, step in INTERVALS.items() if name not in ("1w", "1M")}
    step = pl.col("interval").replace_strict(fixed, default=1, return_dtype=pl.Int64)
    return (
        pl.when(pl.col("interval") == "1M")
        .then(midnight & (pl.col("open_time").dt.day() == 1))
        .when(pl.col("interval") == "1w")
        .then(midnight & (pl.col("open_time").dt.weekday() == 1))
        .otherwise(pl.col("open_time").dt.epoch("ms") % step == 0)
    )


def key_faults(time: str, series: Sequence[str]) -> list[tuple[pl.Expr, str]]:
    before = pl.col(time).shift(1).over(series)
    known = pl.col(time).is_not_null()
    return [
        (~pl.col("category").is_in(list(CATEGORIES)), "unknown category"),
        (pl.col("symbol").is_null() | (pl.col("symbol") == ""), "symbol is missing"),
        (pl.col("category").is_null(), "category is missing or contradicts the symbol"),
        (~pl.col("symbol").str.contains(r"^[\p{L}\p{N}-]+$"), "symbol is not a name such as BTCUSDT"),
        (~known, "time is missing or cannot be read"),
        (~pl.col(time).to_physical().is_between(_OLDEST_MS, _NEWEST_MS), "time is not of 2009 to 2100"),
        (known & ~pl.struct(*series, time).is_first_distinct(), "duplicate time in its series"),
        (pl.col(time) < before, "time goes backwards in its series"),
    ]


def refuse(path: Path, frame: pl.DataFrame, faults: Sequence[tuple[pl.Expr, str]]) -> None:
    """Raise one UsageError for all rows at fault, the first reason of each, the earliest rows first."""
    first = pl.coalesce(pl.when(check.fill_null(False)).then(pl.lit(why)) for check, why in faults)
    found = frame.select(_ROW, first.alias("why")).filter(pl.col("why").is_not_null())
    if found.is_empty():
        return
    shown = "; ".join(f"row {row}: {why}" for row, why in found.head(_SHOWN).iter_rows())
    rest = f"; and {found.height - _SHOWN} more rows" if found.height > _SHOWN else ""
    raise UsageError(
        f"{path} is refused: {shown}{rest}.",
        "Nothing was imported; mend the file and try again (row 1 is the first below any header).",
    )
