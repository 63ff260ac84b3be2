"""The ticker of one symbol at one instant, from its candles: every value is a text, as the venue sends it."""

from __future__ import annotations

import numpy as np

from recur.connectors.sandbox.world import World, unfinished
from recur.vocabulary import DAY_MS, VenueRefused, next_open

PRICES_BESIDE = {"markPrice": "mark", "indexPrice": "index"}


def ticker(world: World, category: str, symbol: str, now_ms: int) -> dict[str, str]:
    """Last price and the past 24 hours; beside them mark and index price of a contract. ``""`` = not known."""
    values = {"symbol": symbol}
    day = _day(world, category, symbol, "trade", now_ms)
    if day is None:
        return values | dict.fromkeys(("lastPrice", "prevPrice24h", "price24hPcnt"), "")
    first, high, low, last, volume, turnover = day
    values |= {
        "lastPrice": _text(last),
        "prevPrice24h": _text(first),
        "price24hPcnt": _text(round(last / first - 1, 6)),
        "highPrice24h": _text(high),
        "lowPrice24h": _text(low),
        "volume24h": _text(volume),
        "turnover24h": _text(turnover),
    }
    if category != "spot":
        for name, kind in PRICES_BESIDE.items():
            beside = _day(world, category, symbol, kind, now_ms)
            values[name] = _text(beside[3]) if beside else ""
    return values


def _day(
    world: World, category: str, symbol: str, kind: str, now_ms: int
) -> tuple[float, float, float, float, float, float] | None:
    """(first, high, low, last, volume, turnover) of the past 24 hours; None without any candle."""
    try:
        interval = world.base_interval(category, symbol, kind)
        bars = world.candles(category, symbol, kind, interval)
    except VenueRefused:
        return None
    begin, end = np.searchsorted(bars.open_time, (now_ms - DAY_MS, now_ms + 1))
    if begin >= end:
        return None
    part = bars[int(begin) : int(end)]
    close_ms = next_open(int(part.open_time[-1]), interval)
    now = unfinished(part[len(part) - 1 :], now_ms, close_ms)
    return (
        float(part.open[0]),
        float(max(now.high[0], *part.high[:-1])) if len(part) > 1 else float(now.high[0]),
        float(min(now.low[0], *part.low[:-1])) if len(part) > 1 else float(now.low[0]),
        float(now.close[0]),
        float(part.volume[:-1].sum() + now.volume[0]),
        float(part.turnover[:-1].sum() + now.turnover[0]),
    )


def _text(value: float) -> str:
    return np.format_float_positional(value, trim="-") if np.isfinite(value) else ""
