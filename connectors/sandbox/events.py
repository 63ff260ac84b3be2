"""Funding, open interest and the long/short ratio: three endpoints with three rules for their time bounds.

=============  ================  =============  ==============================  =========
endpoint       a lone startTime  rows per page  both bounds                     next page
=============  ================  =============  ==============================  =========
funding        refused (10001)   200, max 200   the newest rows                 none
open interest  ignored           50, max 200    from the end, newest first      by cursor
ratio          ignored           50, max 500    from the end, newest first      by cursor
=============  ================  =============  ==============================  =========

A cursor continues before the last row of its page and ends inside the bounds. For the ratio nothing is known
about a lone startTime; it is taken as for open interest.
"""

from __future__ import annotations

from urllib.parse import parse_qs, quote

import numpy as np

from recur.connectors.sandbox.listings import symbol_of
from recur.connectors.sandbox.query import Query, category_of, integer_of, limit_of, refused
from recur.connectors.sandbox.rows import number_texts
from recur.connectors.sandbox.world import Floats, Millis, World
from recur.vocabulary import DAY_MS, HOUR_MS, MINUTE_MS, parse_time

PERIODS = {
    "5min": 5 * MINUTE_MS, "15min": 15 * MINUTE_MS, "30min": 30 * MINUTE_MS, "1h": HOUR_MS, "4h": 4 * HOUR_MS,
    "1d": DAY_MS,
}  # fmt: skip
RATIO_SINCE_MS = parse_time("2020-07-20")
_DERIVATIVES = ("linear", "inverse")


def funding(world: World, query: Query, now: int) -> object:
    category = category_of(query, _DERIVATIVES)
    symbol = symbol_of(world, category, query)
    start, end = integer_of(query, "startTime"), integer_of(query, "endTime")
    if start is not None and end is None:
        raise refused("Time is invalid")
    times, rates = world.funding(category, symbol)
    low = 0 if start is None else int(np.searchsorted(times, start))
    high = int(np.searchsorted(times, now if end is None else min(now, end), "right"))
    low = max(low, high - limit_of(query, 200, 200))
    rows = [
        {"symbol": symbol, "fundingRate": rate, "fundingRateTimestamp": str(at)}
        for at, rate in zip(times[low:high].tolist(), number_texts(rates[low:high]), strict=True)
    ]
    return {"category": category, "list": rows[::-1]}


def open_interest(world: World, query: Query, now: int) -> object:
    category = category_of(query, _DERIVATIVES)
    symbol = symbol_of(world, category, query)
    step_ms = _period(query, "intervalTime")
    times, values, cursor = _page(query, now, world.open_interest(category, symbol, step_ms), 200)
    both, single = number_texts(values), number_texts(np.round(values / 2, 3))
    rows = [
        {"openInterest": held, "singleOpenInterest": side, "timestamp": str(at)}
        for at, held, side in zip(times.tolist(), both, single, strict=True)
    ]
    return {"symbol": symbol, "category": category, "list": rows, "nextPageCursor": cursor}


def account_ratio(world: World, query: Query, now: int) -> object:
    category = category_of(query, _DERIVATIVES)
    symbol = symbol_of(world, category, query)
    times, shares = world.account_ratio(category, symbol, _period(query, "period"))
    if category == "linear" and not symbol.endswith("USDT"):
        times, shares = times[:0], shares[:0]
    since = int(np.searchsorted(times, RATIO_SINCE_MS))
    times, shares, cursor = _page(query, now, (times[since:], shares[since:]), 500)
    long, short = number_texts(shares), number_texts(np.round(1 - shares, 4))
    rows = [
        {"symbol": symbol, "buyRatio": buy, "sellRatio": sell, "timestamp": str(at)}
        for at, buy, sell in zip(times.tolist(), long, short, strict=True)
    ]
    return {"list": rows, "nextPageCursor": cursor}


def _period(query: Query, name: str) -> int:
    step_ms = PERIODS.get(query.get(name, ""))
    if step_ms is None:
        raise refused(f"params error: {name} invalid")
    return step_ms


def _page(query: Query, now: int, series: tuple[Millis, Floats], maximum: int) -> tuple[Millis, Floats, str]:
    """The rows asked for, newest first, and the cursor of the page after them ("" at the end of the bounds)."""
    times, values = series
    start, end = integer_of(query, "startTime"), integer_of(query, "endTime")
    low = 0 if start is None or end is None else int(np.searchsorted(times, start))
    high = int(np.searchsorted(times, now if end is None else min(now, end), "right"))
    if query.get("cursor"):
        high = min(high, int(np.searchsorted(times, _cursor_ms(query["cursor"]))))
    first = max(low, high - limit_of(query, 50, maximum))
    cursor = quote(f"lastid=0&lasttime={int(times[first]) // 1000}", safe="") if low < first < high else ""
    return times[first:high][::-1], values[first:high][::-1], cursor


def _cursor_ms(cursor: str) -> int:
    last = parse_qs(cursor).get("lasttime", [""])[0]
    if not last.isdigit():
        raise refused("params error: cursor invalid")
    return int(last) * 1000
