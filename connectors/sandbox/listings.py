"""What is listed now: instruments with their status, tickers and the latest trades."""

from __future__ import annotations

from dataclasses import fields
from typing import Any
from urllib.parse import quote

import numpy as np

from recur.connectors.sandbox.query import Query, category_of, limit_of, refused
from recur.connectors.sandbox.rows import number_texts
from recur.connectors.sandbox.world import NO_CANDLES, Candles, World, unfinished
from recur.vocabulary import CATEGORIES, DAY_MS, HOUR_MS, VenueRefused, next_open

STATUSES = ("PreLaunch", "Trading", "Delivering", "Closed")
_TRADES_EVERY_MS = 500


def symbol_of(world: World, category: str, query: Query) -> str:
    """The symbol asked for; code 10001 in the venue's two ways of saying that it does not know it."""
    symbol = query.get("symbol", "")
    if symbol not in world.symbols(category):
        raise refused("Not supported symbols" if category == "spot" else "params error: symbol invalid")
    return symbol


def instruments(world: World, query: Query, now: int) -> object:
    """Spot: all that trade, no paging, an unknown symbol gives an empty list. Else a page of one status."""
    category = category_of(query, CATEGORIES)
    status, wanted, base = query.get("status") or "Trading", query.get("symbol"), query.get("baseCoin")
    known = world.symbols(category)
    if status not in STATUSES:
        raise refused("params error: status invalid")
    if wanted and wanted not in known and category != "spot":
        raise refused("params error: symbol invalid")
    rows = []
    for symbol in known:
        life = world.life(category, symbol)
        if wanted not in (None, "", symbol) or life.status(now) != status:
            continue
        row = world.instrument(category, symbol) | {"status": status}
        if category != "spot":
            row |= {"deliveryTime": str(life.delisted_ms or 0), "isPreListing": status == "PreLaunch"}
        if not base or row["baseCoin"] == base:
            rows.append(row)
    if category == "spot":
        return {"category": category, "list": rows if status == "Trading" else []}
    limit = limit_of(query, 500, 1000)
    after = _after(query)
    rest = [row for row in rows if row["symbol"] > after]
    page, cursor = rest[:limit], ""
    if len(rest) > limit:
        cursor = quote(f"first={page[0]['symbol']}&last={page[-1]['symbol']}", safe="")
    return {"category": category, "list": page, "nextPageCursor": cursor}


def _after(query: Query) -> str:
    cursor = query.get("cursor", "")
    _, found, after = cursor.partition("last=")
    if cursor and not found:
        raise refused("params error: cursor invalid")
    return after


def tickers(world: World, query: Query, now: int) -> object:
    """One row per symbol that trades now, the whole category at once."""
    category = category_of(query, CATEGORIES)
    symbols = [symbol_of(world, category, query)] if query.get("symbol") else world.symbols(category)
    trading = [s for s in symbols if world.life(category, s).status(now) == "Trading"]
    rows = [row for row in (_ticker(world, category, symbol, now) for symbol in trading) if row]
    return {"category": category, "list": rows}


def _ticker(world: World, category: str, symbol: str, now: int) -> dict[str, Any] | None:
    bars = _until_now(world, category, symbol, "trade", now, DAY_MS)
    if not len(bars):
        return None
    hour_ago = max(0, int(np.searchsorted(bars.open_time, now - HOUR_MS)) - 1)
    last, day_ago = bars.close[-1], bars.open[0]
    numbers = {
        "lastPrice": last,
        "prevPrice24h": day_ago,
        "price24hPcnt": round(last / day_ago - 1, 6),
        "highPrice24h": bars.high.max(),
        "lowPrice24h": bars.low.min(),
        "turnover24h": bars.turnover.sum(),
        "volume24h": bars.volume.sum(),
        "bid1Price": bars.low[-1],
        "bid1Size": bars.volume[-1],
        "ask1Price": bars.high[-1],
        "ask1Size": bars.volume[-1],
    }
    texts: dict[str, Any] = {"symbol": symbol}
    if category != "spot":
        numbers["prevPrice1h"] = bars.close[hour_ago]
        for name, kind in (("indexPrice", "index"), ("markPrice", "mark")):
            beside = _until_now(world, category, symbol, kind, now, HOUR_MS)
            numbers[name] = beside.close[-1] if len(beside) else np.nan
        held = world.open_interest(category, symbol, 5 * 60_000)
        known = int(np.searchsorted(held[0], now, "right"))
        numbers["openInterest"] = held[1][known - 1] if known else np.nan
        numbers["openInterestValue"] = numbers["openInterest"] * last
        times, rates = world.funding(category, symbol)
        coming = min(int(np.searchsorted(times, now, "right")), len(times) - 1)
        numbers["fundingRate"] = rates[coming] if len(times) else np.nan
        texts["nextFundingTime"] = str(int(times[coming])) if len(times) else ""
        texts |= {"deliveryTime": "0", "fundingIntervalHour": "8"}
    return texts | dict(zip(numbers, number_texts(np.array(list(numbers.values()))), strict=True))


def _until_now(world: World, category: str, symbol: str, kind: str, now: int, back_ms: int) -> Candles:
    """The finest bars of the last ``back_ms``, the newest as it looks at ``now``; empty when there are none."""
    interval = _finest(world, category, symbol, kind)
    if interval is None:
        return NO_CANDLES
    recorded = world.candles(category, symbol, kind, interval)
    low, high = (int(i) for i in np.searchsorted(recorded.open_time, (now - back_ms, now + 1)))
    bars = recorded[low:high]
    if not len(bars):
        return bars
    newest = unfinished(bars[-1:], now, next_open(int(bars.open_time[-1]), interval))
    columns = (np.r_[getattr(bars, f.name)[:-1], getattr(newest, f.name)] for f in fields(Candles))
    return Candles(*columns)


def _finest(world: World, category: str, symbol: str, kind: str) -> str | None:
    try:
        return world.base_interval(category, symbol, kind)
    except VenueRefused:  # a replayed market need not have every kind
        return None


def recent_trades(world: World, query: Query, now: int) -> object:
    """The newest trades first: two a second along the way from a bar's open to its close."""
    category = category_of(query, CATEGORIES)
    symbol = symbol_of(world, category, query)
    limit = limit_of(query, 60, 60) if category == "spot" else limit_of(query, 500, 1000)
    interval = _finest(world, category, symbol, "trade")
    bars = world.candles(category, symbol, "trade", interval) if interval else NO_CANDLES
    if not interval or not len(bars):
        return {"category": category, "list": []}
    newest = now // _TRADES_EVERY_MS
    times = np.arange(newest, newest - limit, -1, dtype=np.int64) * _TRADES_EVERY_MS
    at = np.searchsorted(bars.open_time, times, "right") - 1
    step_ms = next_open(int(bars.open_time[0]), interval) - int(bars.open_time[0])
    inside = (at >= 0) & (times < bars.open_time[at] + step_ms)
    times, at = times[inside], at[inside]
    share = (times - bars.open_time[at]) / step_ms
    prices = number_texts(np.round(bars.open[at] + share * (bars.close[at] - bars.open[at]), 6))
    sizes = number_texts(np.round(bars.volume[at] * _TRADES_EVERY_MS / step_ms, 6))
    rows = [
        {
            "execId": f"{symbol}-{ms}",
            "symbol": symbol,
            "price": price,
            "size": size,
            "side": "Buy" if ms // _TRADES_EVERY_MS % 2 else "Sell",
            "time": str(ms),
            "isBlockTrade": False,
            "isRPITrade": False,
            "seq": str(ms // _TRADES_EVERY_MS),
        }
        for ms, price, size in zip(times.tolist(), prices, sizes, strict=True)
    ]
    return {"category": category, "list": rows}
