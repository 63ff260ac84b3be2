"""The venue's answers as arrays and frames: the envelope checked, strings made numbers, absent values made null. Pure.

Every function raises VenueError when the answer has not the documented form
(https://bybit-exchange.github.io/docs/v5/market/kline and its neighbours). Whether the rows are those that were
asked for is the business of ``windows.check`` and of who asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import msgspec
import numpy as np
import polars as pl

from recur.connectors.windows import Bars
from recur.vocabulary import Series, VenueError

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
POINT_FIELDS = {
    "open_interest": {"open_interest": "openInterest"},
    "long_short": {"buy_ratio": "buyRatio", "sell_ratio": "sellRatio"},
}
"""Kind of point to our columns and the venue's names of them."""

INSTRUMENT_SCHEMA: dict[str, pl.DataType] = {
    **dict.fromkeys(
        ("category", "symbol", "status", "contract_type", "base_coin", "quote_coin", "settle_coin"),
        pl.String(),
    ),
    **dict.fromkeys(("launch_time", "delivery_time"), pl.Datetime("ms", "UTC")),
    "funding_minutes": pl.Int64(),
    **dict.fromkeys(("tick_size", "qty_step", "turnover_24h"), pl.Float64()),
}

_N_VALUES = 6

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reply:
    """A successful answer: the JSON text of its ``result`` object, and the venue's clock when it was made."""

    result: msgspec.Raw
    time_ms: int

    def document(self) -> dict[str, Any]:
        """``result`` as plain values."""
        found: dict[str, Any] = msgspec.json.decode(self.result)
        return found


class _TradePage(msgspec.Struct, rename={"bars": "list"}):
    bars: list[tuple[float, float, float, float, float, float, float]]
    category: str = ""
    symbol: str = ""


class _PricePage(msgspec.Struct, rename={"bars": "list"}):
    bars: list[tuple[float, float, float, float, float]]
    category: str = ""
    symbol: str = ""


_trade_pages = msgspec.json.Decoder(_TradePage, strict=False)
_price_pages = msgspec.json.Decoder(_PricePage, strict=False)


def envelope(body: Any) -> Reply:
    """The answer, once it is ``{"retCode": 0, "result": {…}, "time": ms}``; pybit has refused other codes."""
    if not isinstance(body, dict):
        raise VenueError(f"The answer is a {type(body).__name__}, expected an object.")
    code = body.get("retCode")
    if code != 0 or isinstance(code, bool) or not isinstance(code, int):
        raise VenueError(f"The answer's retCode is {code!r}, expected 0.")
    result = body.get("result")
    if not isinstance(result, msgspec.Raw) or bytes(result)[:1] != b"{":
        raise VenueError("The answer's result is not an object.")
    if type(body.get("time")) is not int:
        raise VenueError(f"The answer's time is {body.get('time')!r}, expected milliseconds.")
    return Reply(result, body["time"])


def rows(reply: Reply, row_type: type[T]) -> list[T]:
    """``result.list`` when all of it are of ``row_type``."""
    found = reply.document().get("list")
    if not isinstance(found, list) or not all(isinstance(row, row_type) for row in found):
        raise VenueError(f"The answer's list is not a list of rows ({type(found).__name__}).")
    return found


# -- candles ----------------------------------------------------------------------------------------------


def candle_bars(series: Series, reply: Reply) -> Bars:
    """Bars of a kline answer in the venue's order, the open one included. An empty text is an absent value."""
    decoder = _trade_pages if series.kind == "trade" else _price_pages
    try:
        page = decoder.decode(reply.result)
    except msgspec.ValidationError:  # not the usual form: absent values, further columns, or nonsense
        return _odd_bars(series, reply)
    _check_echo({"category": page.category, "symbol": page.symbol}, series.category, series.symbol)
    width = 7 if series.kind == "trade" else 5
    numbers = np.fromiter(chain.from_iterable(page.bars), np.float64, width * len(page.bars)).reshape(
        -1, width
    )
    opens = numbers[:, 0].astype(np.int64) if np.isfinite(numbers).all() else None
    if opens is None or (opens != numbers[:, 0]).any():
        return _odd_bars(series, reply)
    return Bars(series, opens, _six(numbers[:, 1:]))


def _odd_bars(series: Series, reply: Reply) -> Bars:
    """``candle_bars`` value by value."""
    _check_echo(reply.document(), series.category, series.symbol)
    raw = rows(reply, list)
    width = 7 if series.kind == "trade" else 5
    try:
        opens = np.array([msgspec.convert(row[0], int, strict=False) for row in raw], dtype=np.int64)
        values = np.array([[_number(row[i]) for i in range(1, width)] for row in raw], dtype=np.float64)
    except (IndexError, OverflowError, TypeError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise VenueError(f"The answer's candles cannot be read ({_first_line(error)}).") from error
    return Bars(series, opens, _six(values.reshape(-1, width - 1)))


def _six(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    absent = np.full((len(values), _N_VALUES - values.shape[1]), np.nan)
    return np.hstack([values, absent]) if absent.shape[1] else values


def _number(text: object) -> float:
    """The number in a text; NaN for an empty one. ValueError for anything that is not a finite number."""
    if text == "":
        return math.nan
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is not text")
    number = msgspec.convert(text, float, strict=False)
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not a number")
    return number


def candle_frame(series: Series, parts: Iterable[Bars]) -> pl.DataFrame:
    """One candle frame of all ``parts``, which are of ``series``, in their order."""
    parts = list(parts)
    opens = np.concatenate([bars.open_ms for bars in parts]) if parts else np.empty(0, np.int64)
    values = np.concatenate([bars.values for bars in parts]) if parts else np.empty((0, _N_VALUES))
    names = list(CANDLE_SCHEMA)[5:]
    columns = {
        name: pl.Series(np.ascontiguousarray(values[:, i]), nan_to_null=True) for i, name in enumerate(names)
    }
    words = (series.category, series.symbol, series.interval, series.kind)
    return pl.DataFrame({"open_time": opens, **columns}).select(
        *(pl.lit(word).alias(name) for name, word in zip(CANDLE_SCHEMA, words, strict=False)),
        pl.col("open_time").cast(pl.Datetime("ms", "UTC")),
        *(pl.col(name).cast(pl.Float64) for name in names),
    )


# -- funding and points -------------------------------------------------------------------------------------


def funding_frame(category: str, symbol: str, reply: Reply) -> pl.DataFrame:
    """Funding frame of a funding/history answer; ``rate`` is a fraction per event."""
    fields = {"rate": "fundingRate"}
    return _timed(category, symbol, reply, "funding_time", "fundingRateTimestamp", fields).select(
        list(FUNDING_SCHEMA)
    )


def point_frame(series: Series, reply: Reply) -> pl.DataFrame:
    """Frame of an open-interest or account-ratio answer: category, symbol, interval, ts and the kind's values."""
    fields = POINT_FIELDS[series.kind]
    frame = _timed(series.category, series.symbol, reply, "ts", "timestamp", fields)
    interval = pl.lit(series.interval).alias("interval")
    return frame.select("category", "symbol", interval, "ts", *fields)


def _timed(
    category: str, symbol: str, reply: Reply, time: str, venue_time: str, fields: Mapping[str, str]
) -> pl.DataFrame:
    _check_echo(reply.document(), category, symbol)
    events = rows(reply, dict)
    for row in events:
        _check_echo(row, category, symbol)
    try:
        times = [msgspec.convert(row[venue_time], int, strict=False) for row in events]
        values = {ours: [_number(row[theirs]) for row in events] for ours, theirs in fields.items()}
        if any(math.isnan(value) for column in values.values() for value in column):
            raise ValueError("a value is empty")
        frame = pl.DataFrame(
            {time: pl.Series(times, dtype=pl.Int64)}
            | {ours: pl.Series(column, dtype=pl.Float64) for ours, column in values.items()}
        )
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise VenueError(f"The rows of {symbol} cannot be read ({_first_line(error)}).") from error
    return frame.with_columns(
        pl.lit(category).alias("category"),
        pl.lit(symbol).alias("symbol"),
        pl.col(time).cast(pl.Datetime("ms", "UTC")),
    )


# -- instruments and maintenance ------------------------------------------------------------------------------


def instrument_frame(
    category: str, instruments: Iterable[Mapping[str, Any]], turnover: Mapping[str, float | None]
) -> pl.DataFrame:
    """Instruments as the venue lists them now, sorted by symbol; ``turnover`` of the last 24 h by symbol.

    ``delivery_time`` of a delisted perpetual is when it was delisted. Times and numbers that are absent, empty or 0
    are null; spot instruments have no times.
    """
    found = {
        str(row.get("symbol")): {
            "category": category,
            "symbol": str(row.get("symbol")),
            "status": _text(row.get("status")),
            "contract_type": _text(row.get("contractType")),
            "base_coin": _text(row.get("baseCoin")),
            "quote_coin": _text(row.get("quoteCoin")),
            "settle_coin": _text(row.get("settleCoin")),
            "launch_time": instant(row.get("launchTime")),
            "delivery_time": instant(row.get("deliveryTime")),
            "funding_minutes": instant(row.get("fundingInterval")),
            "tick_size": _positive(_inside(row, "priceFilter", "tickSize")),
            "qty_step": _positive(
                _inside(row, "lotSizeFilter", "qtyStep") or _inside(row, "lotSizeFilter", "basePrecision")
            ),
            "turnover_24h": turnover.get(str(row.get("symbol"))),
        }
        for row in instruments
    }
    schema = {k: pl.Int64() if isinstance(v, pl.Datetime) else v for k, v in INSTRUMENT_SCHEMA.items()}
    frame = pl.DataFrame([found[symbol] for symbol in sorted(found)], schema=schema)
    return frame.cast({k: v for k, v in INSTRUMENT_SCHEMA.items() if isinstance(v, pl.Datetime)})  # type: ignore[arg-type]


def day_amounts(category: str, reply: Reply) -> dict[str, float | None]:
    """What each symbol traded in 24 hours, of a tickers answer: quote coin, for inverse contracts USD."""
    field = "volume24h" if category == "inverse" else "turnover24h"
    return {str(row.get("symbol")): _positive(row.get(field)) for row in rows(reply, dict)}


def maintenance_ranges(reply: Reply) -> list[tuple[int, int]]:
    """(begin, end) of the maintenance windows of a system/status answer; those without both times are left out."""
    spans = ((instant(row.get("begin")), instant(row.get("end"))) for row in rows(reply, dict))
    return [(begin, end) for begin, end in spans if begin is not None and end is not None and begin < end]


def instant(value: object) -> int | None:
    """A positive whole number that came as a number or as text, else None."""
    try:
        number = msgspec.convert(value, int, strict=False)
    except msgspec.ValidationError:
        return None
    return number if 0 < number < 1 << 53 else None


def _positive(value: object) -> float | None:
    try:
        number = msgspec.convert(value, float, strict=False)
    except msgspec.ValidationError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def _inside(row: Mapping[str, Any], outer: str, inner: str) -> object:
    part = row.get(outer)
    return part.get(inner) if isinstance(part, dict) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _check_echo(found: Mapping[str, Any], category: str, symbol: str) -> None:
    for name, asked in (("category", category), ("symbol", symbol)):
        said = found.get(name, asked)
        if said not in (asked, ""):
            raise VenueError(f"Asked for {name} {asked}, the answer is for {said!r}.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
