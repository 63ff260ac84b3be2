"""Open interest and the share of long accounts of the generated market, on a grid of five minutes.

Both follow the market, so that they carry what such series carry, and each is a function of the seed alone::

    log OI_t    = log(turnover of 8 hours / price) + 0.25 s_t + 0.05 f_t - 2 |r_4h|      (coins; a move closes positions)
    long_t      = 0.5 + 0.04 s'_t - 0.5 r_24h, within 0.05 … 0.95                        (crowds buy what fell)

s: AR(1) with a half-life of 5 days, f: of 2 hours, both N(0, 1); r_h: log return of the trade price over h hours.
"""

from __future__ import annotations

import numpy as np

from recur.connectors.sandbox.process import Process, autoregression
from recur.connectors.sandbox.world import Candles, Floats, Millis
from recur.vocabulary import HOUR_MS, MINUTE_MS

GRID_MS = 5 * MINUTE_MS
_PER_HOUR = HOUR_MS // GRID_MS


def open_interest(process: Process, symbol: str, trade: Candles) -> Floats:
    """Contracts held, in base coins (both sides counted), at the start and each five minutes after it."""
    log_price = _log_prices(process, trade)
    slow, fast = (
        _path(process, ("open interest", name, symbol), len(log_price), h) for name, h in _HALF_LIVES
    )
    hourly = float(trade.turnover[: 24 * process.per_hour].mean()) * process.per_hour
    level = np.log(8 * hourly) - log_price
    closed = 2 * np.abs(_change(log_price, 4))
    return np.asarray(np.round(np.exp(level + 0.25 * slow + 0.05 * fast - closed), 3))


def long_share(process: Process, symbol: str, trade: Candles) -> Floats:
    """Share of accounts that are net long, at the start and each five minutes after it."""
    log_price = _log_prices(process, trade)
    slow = _path(process, ("accounts", symbol), len(log_price), 120.0)
    return np.asarray(np.round(np.clip(0.5 + 0.04 * slow - 0.5 * _change(log_price, 24), 0.05, 0.95), 4))


_HALF_LIVES = (("slow", 120.0), ("fast", 2.0))


def _log_prices(process: Process, trade: Candles) -> Floats:
    """Log of the last price known at each grid instant, the begin included."""
    step_ms = HOUR_MS // process.per_hour
    ends: Millis = GRID_MS * np.arange(len(trade) * step_ms // GRID_MS + 1, dtype=np.int64) // step_ms
    return np.asarray(np.log(np.r_[trade.open[:1], trade.close][ends]))


def _change(log_price: Floats, hours: int) -> Floats:
    back = hours * _PER_HOUR
    before = np.r_[np.full(min(back, len(log_price)), log_price[0]), log_price[:-back]]
    return np.asarray(log_price - before)


def _path(process: Process, name: tuple[str, ...], count: int, half_life_h: float) -> Floats:
    noise = process.stream(*name).standard_normal(count)
    return autoregression(noise, 0.5 ** (1 / (half_life_h * _PER_HOUR)))
