"""The venue's answers as frames: the envelope checked, strings made numbers, absent values made null. Pure.

Every function raises VenueError when the answer has not the documented form
(https://bybit-exchange.github.io/docs/v5/market/kline). Whether the bars are those that were asked for is the
business of ``windows.verify``.
"""

from __future__ import annotations

from typing import Any, TypeVar

import polars as pl

from recur.vocabulary import Series, VenueError, floor_open

CANDLE_SCHEMA: dict[str, pl.DataType] = {
    **dict.fromkeys(("category", "symbol", "interval", "kind"), pl.String()),
    "open_time": pl.Datetime("ms", "UTC"),
    **dict.fromkeys(("open", "high", "low", "close", "volume", "turnover"), pl.Float64()),
}
FUNDING_SCHEMA: dict[str, pl.DataType] = {
    "category": pl.String(),
    "symbol": pl.String(),
    "funding_time": pl.Datetime("ms", "UTC"),
    "rate": pl.Float64(),
}

T = TypeVar("T")


def envelope(body: Any) -> dict[str, Any]:
    """The answer, once it is ``{"retCode": 0, "result": {…}, "time": ms}``; pybit has refused other codes."""
    if not isinstance(body, dict):
        raise VenueError(f"The answer is a {type(body).__name__}, expected an object.")
    code = body.get("retCode")
    if code != 0 or isinstance(code, bool) or not isinstance(code, int):
        raise VenueError(f"The answer's retCode is {code!r}, expected 0.")
    if not isinstance(body.get("result"), dict):
        raise VenueError(f"The answer's result is a {type(body.get('result')).__name__}, expected an object.")
    if type(body.get("time")) is not int:
        raise VenueError(f"The answer's time is {body.get('time')!r}, expected milliseconds.")
    return body


def rows(reply: dict[str, Any], row_type: type[T]) -> list[T]:
    """``result.list`` when all of it are of ``row_type``."""
    found = reply["result"].get("list")
    if not isinstance(found, list) or not all(isinstance(row, row_type) for row in found):
        raise VenueError(f"The answer's list is not a list of rows ({type(found).__name__}).")
    return found


def _check_echo(reply: dict[str, Any], category: str, symbol: str) -> None:
    for name, asked in (("category", category), ("symbol", symbol)):
        said = reply["result"].get(name, asked)
        if said not in (asked, ""):
            raise VenueError(f"Asked for {name} {asked}, the answer is for {said!r}.")


def candle_frame(series: Series, reply: dict[str, Any]) -> pl.DataFrame:
    """Candle frame of a kline answer, rows in the venue's order. An empty string is an absent value."""
    _check_echo(reply, series.category, series.symbol)
    names = ["open_time", "open", "high", "low", "close"] + ["volume", "turnover"] * (series.kind == "trade")
    raw = rows(reply, list)
    try:
        columns = list(zip(*raw, strict=True)) or [()] * len(names)
        if len(columns) < len(names):
            raise ValueError(f"rows of {len(columns)} values, expected {len(names)}")
        frame = pl.DataFrame(
            {
                name: pl.Series(column, dtype=pl.String)
                for name, column in zip(names, columns, strict=False)  # later columns are news to us
            }
        )
        values = pl.col(names[1:])
        frame = frame.with_columns(
            pl.col("open_time").cast(pl.Int64).cast(pl.Datetime("ms")).dt.replace_time_zone("UTC"),
            pl.when(values != "").then(values).cast(pl.Float64),
        )
    except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
        raise VenueError(f"The answer's candles cannot be read ({_first_line(error)}).") from error
    return _complete(frame, series)


def _complete(frame: pl.DataFrame, series: Series) -> pl.DataFrame:
    absent = [pl.lit(None, pl.Float64).alias(n) for n in ("volume", "turnover") if n not in frame.columns]
    return frame.with_columns(
        pl.lit(series.category).alias("category"),
        pl.lit(series.symbol).alias("symbol"),
        pl.lit(series.interval).alias("interval"),
        pl.lit(series.kind).alias("kind"),
        *absent,
    ).select(list(CANDLE_SCHEMA))


def closed(frame: pl.DataFrame, series: Series, now_ms: int) -> pl.DataFrame:
    """``frame`` without the bar that is still open at ``now_ms``; the venue sends it without a mark."""
    return frame.filter(pl.col("open_time").dt.epoch("ms") < floor_open(now_ms, series.interval))


def funding_frame(category: str, symbol: str, reply: dict[str, Any]) -> pl.DataFrame:
    """Funding frame of a funding/history answer; ``rate`` is a fraction per event."""
    events = rows(reply, dict)
    try:
        frame = pl.DataFrame(
            {
                "funding_time": pl.Series([row["fundingRateTimestamp"] for row in events], dtype=pl.String),
                "rate": pl.Series([row["fundingRate"] for row in events], dtype=pl.String),
            }
        ).with_columns(
            pl.lit(category).alias("category"),
            pl.lit(symbol).alias("symbol"),
            pl.col("funding_time").cast(pl.Int64).cast(pl.Datetime("ms")).dt.replace_time_zone("UTC"),
            pl.col("rate").cast(pl.Float64),
        )
        if any(row.get("symbol", symbol) != symbol for row in events):
            raise ValueError("another symbol")
    except (pl.exceptions.PolarsError, KeyError, TypeError, ValueError) as error:
        raise VenueError(f"The funding events of {symbol} cannot be read ({_first_line(error)}).") from error
    return frame.select(list(FUNDING_SCHEMA))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
