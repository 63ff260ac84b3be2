"""The rules of the v5 market endpoints: query in, reply body out, at one instant of the venue's clock.

Each rule follows the venue's documentation and the behaviour users report. Where neither says, the choice is:
a ``limit`` above the maximum is cut to it, below 1 is refused (10001), and ``start > end`` gives an empty list.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from urllib.parse import quote

import numpy as np

from recur.connectors.sandbox.world import Candles, Floats, World, unfinished
from recur.vocabulary import CATEGORIES, VenueRefused, floor_open, next_open

INTERVAL_OF_CODE = {
    "1": "1m", "3": "3m", "5": "5m", "15": "15m", "30": "30m", "60": "1h", "120": "2h", "240": "4h",
    "360": "6h", "720": "12h", "D": "1d", "W": "1w", "M": "1M",
}  # fmt: skip
_LATEST_MS = 253_370_764_800_000  # 9999-01-01: keeps absurd bounds inside the calendar
_BLOCK = 1000  # rows turned into text at a time
_BLOCKS_KEPT = 4000
_STATUSES = ("PreLaunch", "Trading", "Delivering", "Closed")

Query = Mapping[str, str]


class Endpoints:
    """Answers ``path`` + ``query`` from ``world`` as the venue would at ``now_ms``; safe to share by threads."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._texts: dict[tuple[str, str, str, str], _RowTexts] = {}
        self._lock = threading.Lock()
        self._routes: dict[str, Callable[[Query, int], str]] = {
            "/v5/market/time": self._time,
            "/v5/market/kline": lambda q, now: self._kline("trade", CATEGORIES, q, now),
            "/v5/market/mark-price-kline": lambda q, now: self._kline("mark", ("linear", "inverse"), q, now),
            "/v5/market/index-price-kline": lambda q, now: self._kline(
                "index", ("linear", "inverse"), q, now
            ),
            "/v5/market/premium-index-price-kline": lambda q, now: self._kline(
                "premium", ("linear",), q, now
            ),
            "/v5/market/instruments-info": self._instruments,
            "/v5/market/funding/history": self._funding,
        }

    def __contains__(self, path: str) -> bool:
        return path in self._routes

    def answer(self, path: str, query: Query, now_ms: int) -> bytes:
        """The JSON envelope of a known path: retCode 0 with a result, or the venue's error code."""
        try:
            code, message, result = 0, "OK", self._routes[path](query, now_ms)
        except VenueRefused as refusal:
            code, message, result = refusal.ret_code, refusal.message, "{}"
        return (
            f'{{"retCode":{code},"retMsg":{json.dumps(message)},"result":{result},"retExtInfo":{{}},"time":{now_ms}}}'
        ).encode()

    def _time(self, query: Query, now: int) -> str:
        return f'{{"timeSecond":"{now // 1000}","timeNano":"{now * 1_000_000}"}}'

    def _kline(self, kind: str, categories: tuple[str, ...], query: Query, now: int) -> str:
        category = _category(query, categories, "linear")
        symbol = self._symbol(category, query)
        interval = INTERVAL_OF_CODE.get(query.get("interval", ""))
        if interval is None:
            raise VenueRefused("Invalid period!", ret_code=10001)
        start, end = _integer(query, "start"), _integer(query, "end")
        limit = _limit(query, 200, 1000)
        bars = self._world.candles(category, symbol, kind, interval)
        floor_now = floor_open(now, interval)
        closed = int(np.searchsorted(bars.open_time, floor_now))
        floor_start = None if start is None else floor_open(start, interval)
        low = 0 if floor_start is None else int(np.searchsorted(bars.open_time, floor_start))
        high = closed if end is None else min(closed, int(np.searchsorted(bars.open_time, end, "right")))
        low = min(low, high)
        newest = ""
        if (end is None or end >= floor_now) and (floor_start is None or floor_start <= floor_now):
            newest = self._open_row(category, symbol, kind, interval, now)
        if start is not None and end is None:
            high = min(high, low + limit)
            newest = newest if high - low < limit else ""
        else:
            low = max(low, high + bool(newest) - limit)
        rows = self._row_texts(category, symbol, kind, interval, bars).newest_first(low, high)
        parts = ",".join(part for part in (newest, rows) if part)
        return f'{{"symbol":"{symbol}","category":"{category}","list":[{parts}]}}'

    def _open_row(self, category: str, symbol: str, kind: str, interval: str, now: int) -> str:
        """Text of the bar that is open at ``now``, from the finest bars there are; empty if there are none."""
        since = floor_open(now, interval)
        bars = self._world.candles(category, symbol, kind, interval)
        if not len(bars):
            return ""
        for source in (self._world.base_interval(category, symbol, kind), interval):
            fine = self._world.candles(category, symbol, kind, source)
            low, high = np.searchsorted(fine.open_time, (since, now + 1))
            if high > low:
                part = fine[int(low) : int(high)]
                bar = unfinished(part, now, next_open(int(part.open_time[-1]), source))
                return _RowTexts(bar, kind == "trade").newest_first(0, 1)
        return ""

    def _row_texts(self, category: str, symbol: str, kind: str, interval: str, bars: Candles) -> _RowTexts:
        with self._lock:
            return self._texts.setdefault(
                (category, symbol, kind, interval), _RowTexts(bars, kind == "trade")
            )

    def _instruments(self, query: Query, now: int) -> str:
        category = _category(query, CATEGORIES, None)
        status = query.get("status") or "Trading"
        if status not in _STATUSES:
            raise VenueRefused("params error: status invalid", ret_code=10001)
        known = self._world.symbols(category)
        wanted = query.get("symbol")
        if wanted:
            if wanted not in known and category != "spot":
                raise VenueRefused("params error: symbol invalid", ret_code=10001)
            known = [symbol for symbol in known if symbol == wanted]
        rows = [self._world.instrument(category, symbol) for symbol in known]
        rows = [row for row in rows if row["status"] == status]
        base = query.get("baseCoin")
        rows = [row for row in rows if not base or row["baseCoin"] == base]
        if category == "spot":
            return json.dumps({"category": category, "list": rows})
        limit = _limit(query, 500, 1000)
        after = query.get("cursor", "").partition("last=")[2]
        rest = [row for row in rows if row["symbol"] > after]
        page = rest[:limit]
        cursor = ""
        if len(rest) > limit:
            cursor = quote(f"first={page[0]['symbol']}&last={page[-1]['symbol']}", safe="")
        return json.dumps({"category": category, "list": page, "nextPageCursor": cursor})

    def _funding(self, query: Query, now: int) -> str:
        category = _category(query, ("linear", "inverse"), None)
        symbol = self._symbol(category, query)
        start, end = _integer(query, "startTime"), _integer(query, "endTime")
        if start is not None and end is None:
            raise VenueRefused("Time is invalid", ret_code=10001)
        times, rates = self._world.funding(category, symbol)
        low = 0 if start is None else int(np.searchsorted(times, start))
        high = int(np.searchsorted(times, now if end is None else min(now, end), "right"))
        low = max(low, high - _limit(query, 200, 200))
        rows = [
            {"symbol": symbol, "fundingRate": rate, "fundingRateTimestamp": str(at)}
            for at, rate in zip(times[low:high].tolist(), _texts(rates[low:high]), strict=True)
        ]
        return json.dumps({"category": category, "list": rows[::-1]})

    def _symbol(self, category: str, query: Query) -> str:
        symbol = query.get("symbol", "")
        if symbol not in self._world.symbols(category):
            known = "Not supported symbols" if category == "spot" else "params error: symbol invalid"
            raise VenueRefused(known, ret_code=10001)
        return symbol


class _RowTexts:
    """JSON text of each bar, made a block at a time when first asked for."""

    def __init__(self, bars: Candles, with_volume: bool) -> None:
        self._bars = bars
        self._with_volume = with_volume
        self._blocks: dict[int, list[str]] = {}

    def newest_first(self, low: int, high: int) -> str:
        """Rows ``[low, high)`` joined by commas, the newest first."""
        rows: list[str] = []
        for block in range(low // _BLOCK, -(-high // _BLOCK)):
            base = block * _BLOCK
            rows += self._block(block)[max(low - base, 0) : high - base]
        return ",".join(reversed(rows))

    def _block(self, block: int) -> list[str]:
        made = self._blocks.get(block)
        if made is None:
            bars = self._bars[block * _BLOCK : (block + 1) * _BLOCK]
            columns = [bars.open, bars.high, bars.low, bars.close]
            columns += [bars.volume, bars.turnover] if self._with_volume else []
            texts = zip(map(str, bars.open_time.tolist()), *map(_texts, columns), strict=True)
            made = ['["' + '","'.join(row) + '"]' for row in texts]
            if len(self._blocks) >= _BLOCKS_KEPT:
                self._blocks.clear()
            self._blocks[block] = made
        return made


def _texts(values: Floats) -> list[str]:
    """Shortest decimal texts that read back as the same floats; "" for NaN; never an exponent."""
    texts = list(map(repr, values.tolist()))
    for i, text in enumerate(texts):
        if text[-1] == "n":
            texts[i] = ""
        elif "e" in text:
            texts[i] = np.format_float_positional(values[i], trim="-")
    return texts


def _category(query: Query, allowed: tuple[str, ...], default: str | None) -> str:
    category = query.get("category") or default
    if category not in allowed:
        raise VenueRefused("params error: category invalid", ret_code=10001)
    return str(category)


def _integer(query: Query, name: str) -> int | None:
    text = query.get(name, "")
    if not text:
        return None
    try:
        return max(0, min(int(text), _LATEST_MS))
    except ValueError:
        raise VenueRefused(f"params error: {name} invalid", ret_code=10001) from None


def _limit(query: Query, default: int, maximum: int) -> int:
    limit = _integer(query, "limit")
    if limit is not None and limit < 1:
        raise VenueRefused("params error: limit invalid", ret_code=10001)
    return default if limit is None else min(limit, maximum)
