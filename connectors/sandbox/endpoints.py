"""The rules of the v5 market endpoints: query in, reply body out, at one instant of the venue's clock.

Each rule follows the venue's documentation and the behaviour users report. Where neither says, the choice is:
a ``limit`` above the maximum is cut to it, below 1 is refused (10001), and ``start > end`` gives an empty list.
Candles are here; the other endpoints in ``events``, ``listings`` and ``notices``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial

import numpy as np

from recur.connectors.sandbox import events, listings, notices
from recur.connectors.sandbox.query import Query, category_of, integer_of, limit_of, refused
from recur.connectors.sandbox.rows import RowTexts
from recur.connectors.sandbox.world import Candles, World, unfinished
from recur.vocabulary import CATEGORIES, VenueRefused, floor_open, next_open

INTERVAL_OF_CODE = {
    "1": "1m", "3": "3m", "5": "5m", "15": "15m", "30": "30m", "60": "1h", "120": "2h", "240": "4h",
    "360": "6h", "720": "12h", "D": "1d", "W": "1w", "M": "1M",
}  # fmt: skip
KLINE_PATHS = {
    "/v5/market/kline": ("trade", CATEGORIES),
    "/v5/market/mark-price-kline": ("mark", ("linear", "inverse")),
    "/v5/market/index-price-kline": ("index", ("linear", "inverse")),
    "/v5/market/premium-index-price-kline": ("premium", ("linear",)),
}


class Endpoints:
    """Answers ``path`` + ``query`` from ``world`` as the venue would at ``now_ms``; safe to share by threads."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._texts: dict[tuple[str, str, str, str], RowTexts] = {}
        self._lock = threading.Lock()
        self._routes: dict[str, Callable[[Query, int], bytes]] = {
            path: partial(self._kline, kind, categories) for path, (kind, categories) in KLINE_PATHS.items()
        }
        others: dict[str, Callable[[World, Query, int], object]] = {
            "/v5/market/time": _time,
            "/v5/market/funding/history": events.funding,
            "/v5/market/open-interest": events.open_interest,
            "/v5/market/account-ratio": events.account_ratio,
            "/v5/market/instruments-info": listings.instruments,
            "/v5/market/tickers": listings.tickers,
            "/v5/market/recent-trade": listings.recent_trades,
            "/v5/announcements/index": notices.announcements,
            "/v5/system/status": notices.system_status,
        }
        self._routes |= {path: partial(self._as_json, answer) for path, answer in others.items()}

    def __contains__(self, path: str) -> bool:
        return path in self._routes

    def answer(self, path: str, query: Query, now_ms: int) -> bytes:
        """The JSON envelope of a known path: retCode 0 with a result, or the venue's error code."""
        try:
            code, message, result = 0, "OK", self._routes[path](query, now_ms)
        except VenueRefused as refusal:
            code, message, result = refusal.ret_code, refusal.message, b"{}"
        head = f'{{"retCode":{code},"retMsg":{json.dumps(message)},"result":'
        return b'%s%s,"retExtInfo":{},"time":%d}' % (head.encode(), result, now_ms)

    def prepare(self, category: str, symbol: str, kind: str, interval: str) -> None:
        """Make the texts of all candles of a series now instead of when they are first asked for."""
        bars = self._world.candles(category, symbol, kind, interval)
        self._row_texts(category, symbol, kind, interval, bars).prepare()

    def _as_json(self, answer: Callable[[World, Query, int], object], query: Query, now: int) -> bytes:
        return json.dumps(answer(self._world, query, now)).encode()

    def _kline(self, kind: str, categories: tuple[str, ...], query: Query, now: int) -> bytes:
        category = category_of(query, categories, "linear")
        symbol = listings.symbol_of(self._world, category, query)
        interval = INTERVAL_OF_CODE.get(query.get("interval", ""))
        if interval is None:
            raise refused("Invalid period!")
        start, end = integer_of(query, "start"), integer_of(query, "end")
        limit = limit_of(query, 200, 1000)
        bars = self._world.candles(category, symbol, kind, interval)
        floor_now = floor_open(now, interval)
        closed = int(np.searchsorted(bars.open_time, floor_now))
        floor_start = None if start is None else floor_open(start, interval)
        low = 0 if floor_start is None else int(np.searchsorted(bars.open_time, floor_start))
        high = closed if end is None else min(closed, int(np.searchsorted(bars.open_time, end, "right")))
        low = min(low, high)
        newest = b""
        if (end is None or end >= floor_now) and (floor_start is None or floor_start <= floor_now):
            newest = self._open_row(category, symbol, kind, interval, now)
        if start is not None and end is None:
            high = min(high, low + limit)
            newest = newest if high - low < limit else b""
        else:
            low = max(low, high + bool(newest) - limit)
        rows = self._row_texts(category, symbol, kind, interval, bars).newest_first(low, high)
        parts = b",".join(part for part in (newest, rows) if part)
        return b'{"symbol":"%s","category":"%s","list":[%s]}' % (symbol.encode(), category.encode(), parts)

    def _open_row(self, category: str, symbol: str, kind: str, interval: str, now: int) -> bytes:
        """Text of the bar that is open at ``now``, from the finest bars there are; empty if there are none."""
        since = floor_open(now, interval)
        bars = self._world.candles(category, symbol, kind, interval)
        if not len(bars):
            return b""
        for source in (self._world.base_interval(category, symbol, kind), interval):
            fine = self._world.candles(category, symbol, kind, source)
            low, high = np.searchsorted(fine.open_time, (since, now + 1))
            if high > low:
                part = fine[int(low) : int(high)]
                bar = unfinished(part, now, next_open(int(part.open_time[-1]), source))
                return RowTexts(bar, kind == "trade").newest_first(0, 1)
        return b""

    def _row_texts(self, category: str, symbol: str, kind: str, interval: str, bars: Candles) -> RowTexts:
        key = (category, symbol, kind, interval)
        with self._lock:
            if key not in self._texts:
                self._texts[key] = RowTexts(bars, kind == "trade")
            return self._texts[key]


def _time(world: World, query: Query, now: int) -> object:
    return {"timeSecond": str(now // 1000), "timeNano": str(now * 1_000_000)}
