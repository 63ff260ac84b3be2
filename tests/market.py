"""Small candle and funding frames for tests, drawn with a seed."""

from __future__ import annotations

import numpy as np
import polars as pl

from recur.vocabulary import HOUR_MS, floor_open, next_open


def candles(symbol: str, since_ms: int, bars: int, *, interval: str = "1h", seed: int = 0) -> pl.DataFrame:
    """``bars`` consecutive sane bars of a market whose volatility wanders and has a daily season."""
    rng = np.random.default_rng(seed)
    opens = [floor_open(since_ms, interval)]
    while len(opens) < bars:
        opens.append(next_open(opens[-1], interval))
    level = np.cumsum(rng.normal(0, 0.05, bars)) * 0.5
    season = 0.4 * np.sin(2 * np.pi * (np.array(opens) % (24 * HOUR_MS)) / (24 * HOUR_MS))
    sigma = 0.006 * np.exp(np.clip(level, -1.5, 1.5) + season)
    path = rng.normal(0, 1, (bars, 8)) * (sigma / np.sqrt(8))[:, None]
    log_close = np.log(100.0) + np.cumsum(path.sum(axis=1))
    log_open = np.concatenate([[np.log(100.0)], log_close[:-1]])
    inside = log_open[:, None] + np.cumsum(path, axis=1)
    high = np.exp(np.maximum(inside.max(axis=1), log_open))
    low = np.exp(np.minimum(inside.min(axis=1), log_open))
    volume = np.exp(5 + 30 * sigma + rng.normal(0, 0.3, bars))
    close, open_ = np.exp(log_close), np.exp(log_open)
    return pl.DataFrame(
        {
            "category": ["linear"] * bars,
            "symbol": [symbol] * bars,
            "interval": [interval] * bars,
            "kind": ["trade"] * bars,
            "open_time": pl.Series(opens, dtype=pl.Int64).cast(pl.Datetime("ms", "UTC")),
            "open": open_,
            "high": np.maximum(high, np.maximum(open_, close)),
            "low": np.minimum(low, np.minimum(open_, close)),
            "close": close,
            "volume": volume,
            "turnover": volume * close,
        }
    )


def funding_frame(symbol: str, first_ms: int, payments: int) -> pl.DataFrame:
    """Payments every eight hours with rates 0.0001, 0.0002, …"""
    times = [first_ms + 8 * HOUR_MS * k for k in range(payments)]
    return pl.DataFrame(
        {
            "category": ["linear"] * payments,
            "symbol": [symbol] * payments,
            "funding_time": pl.Series(times, dtype=pl.Int64).cast(pl.Datetime("ms", "UTC")),
            "rate": [0.0001 * (k + 1) for k in range(payments)],
        }
    )
