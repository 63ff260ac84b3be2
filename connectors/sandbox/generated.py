"""An invented market for the sandbox: candles of every kind and funding, made from the process and a seed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from recur.connectors.sandbox.process import Process, autoregression
from recur.connectors.sandbox.world import Candles, Floats, Millis, aggregate, instrument_row, nests
from recur.vocabulary import HOUR_MS, INTERVALS, UsageError, VenueRefused, check_interval, floor_open

FUNDING_MS = 8 * HOUR_MS
_PRICE = {"BTCUSDT": 60_000.0, "ETHUSDT": 3_000.0, "SOLUSDT": 150.0, "BNBUSDT": 600.0}
_TURNOVER_PER_HOUR = {"BTCUSDT": 3e8, "ETHUSDT": 1.5e8, "SOLUSDT": 6e7, "BNBUSDT": 2e7}
_VOLUME_DECIMALS = 3
_PREDICTOR_IN_VOLUME = 0.5


class GeneratedMarket:
    """A market whose truth is known: see ``process`` for the model of returns.

    It runs from ``start_ms`` (moved back to the hour) to ``end_ms`` (moved back to the base grid). The same
    symbols trade in ``linear`` and ``spot``. Bars of ``base_interval`` (one hour or a part of it) are drawn,
    coarser ones are their exact aggregates. ``signal`` plants a predictor: see ``predictor``.
    Raises UsageError for arguments outside these rules.
    """

    def __init__(
        self,
        seed: int,
        start_ms: int,
        end_ms: int,
        symbols: Sequence[str] = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "BNBUSDT"),
        signal: float = 0.0,
        base_interval: str = "5m",
    ) -> None:
        if not nests(check_interval(base_interval), "1h"):
            raise UsageError(f"The base interval must divide one hour, found '{base_interval}'.")
        self.start_ms = floor_open(start_ms, "1h")
        self.end_ms = floor_open(end_ms, base_interval)
        self._base = base_interval
        self._step = INTERVALS[base_interval]
        self._n = (self.end_ms - self.start_ms) // self._step
        if self._n < 1 or not symbols:
            raise UsageError("A generated market needs at least one bar and one symbol.")
        self._symbols = sorted(symbols)
        self._process = Process(seed, self.start_ms, self._n, self._step, signal)
        self._opens = self.start_ms + self._step * np.arange(self._n, dtype=np.int64)
        self._cache: dict[tuple[str, str, str, str], Candles] = {}
        self._lock = threading.RLock()

    def symbols(self, category: str) -> list[str]:
        return list(self._symbols) if category in ("linear", "spot") else []

    def instrument(self, category: str, symbol: str) -> dict[str, Any]:
        tick = 10.0 ** -_decimals(symbol)
        return instrument_row(category, symbol, self.start_ms, tick, FUNDING_MS // 60_000)

    def base_interval(self, category: str, symbol: str, kind: str) -> str:
        return self._base

    def candles(self, category: str, symbol: str, kind: str, interval: str) -> Candles:
        """All bars of the series; VenueRefused when ``interval`` is finer than the base."""
        if not nests(self._base, interval):
            raise VenueRefused("Invalid period!", ret_code=10001)
        key = (category, symbol, kind, interval)
        with self._lock:
            if key not in self._cache:
                if interval != self._base:
                    made = aggregate(self.candles(category, symbol, kind, self._base), self._base, interval)
                elif category == "spot":
                    made = self._spot(symbol)
                elif kind == "trade":
                    made = self._trade(symbol)
                else:
                    made = self._beside(symbol, kind)
                self._cache[key] = made
            return self._cache[key]

    def funding(self, category: str, symbol: str) -> tuple[Millis, Floats]:
        """Each 8 hours: mean premium P of the past 8 hours plus 0.01 % - P held within 0.05 %, as the venue does."""
        if category != "linear":
            return np.empty(0, np.int64), np.empty(0)
        sums = np.r_[0.0, np.cumsum(self.candles(category, symbol, "premium", self._base).close)]
        times = np.arange(-(-self.start_ms // FUNDING_MS) * FUNDING_MS, self.end_ms + 1, FUNDING_MS)
        times = times[times > self.start_ms].astype(np.int64)
        ends = (times - self.start_ms) // self._step
        begins = np.maximum(ends - FUNDING_MS // self._step, 0)
        premium = (sums[ends] - sums[begins]) / (ends - begins)
        return times, np.round(premium + np.clip(1e-4 - premium, -5e-4, 5e-4), 8)

    def predictor(self, symbol: str) -> tuple[Millis, Floats]:
        """(open times of hours, z): z of an hour shows in its volume and moves the next hour's return."""
        with self._lock:
            z = self._process.path(symbol).predictor
        return self.start_ms + HOUR_MS * np.arange(len(z), dtype=np.int64), z

    def expected_variance(self, symbol: str, cutoffs_ms: Millis, horizon_ms: int) -> Floats:
        """True expected squared log return after each cutoff: ``Process.expected_variance``."""
        with self._lock:
            return self._process.expected_variance(symbol, cutoffs_ms, horizon_ms)

    def expected_return(self, symbol: str, cutoffs_ms: Millis, horizon_ms: int) -> Floats:
        """True expected log return after each cutoff: ``Process.expected_return``."""
        with self._lock:
            return self._process.expected_return(symbol, cutoffs_ms, horizon_ms)

    def _trade(self, symbol: str) -> Candles:
        """Closes from the returns; highs and lows are the extremes of Brownian bridges between the ends.

        High and low are drawn independently, each from its exact distribution. Volume grows with volatility
        (power 0.6), with the size of the bar's surprise and with the hour's predictor.
        """
        path = self._process.path(symbol)
        decimals = _decimals(symbol)
        prices = _PRICE.get(symbol, 10.0) * np.exp(np.r_[0.0, np.cumsum(path.returns)])
        ends = np.round(prices, decimals)
        opened, close = ends[:-1], ends[1:]
        r = path.returns
        up, down = (
            np.sqrt(r * r - 2 * path.spread * np.log1p(-self._process.stream(side, symbol).random(self._n)))
            for side in ("high", "low")
        )
        high = np.round(prices[:-1] * np.exp((r + up) / 2), decimals)
        low = np.round(prices[:-1] * np.exp((r - down) / 2), decimals)
        hours = (self._opens - self.start_ms) // HOUR_MS
        noise = self._process.stream("volume", symbol).standard_normal(self._n)
        log_size = 0.6 * path.log_variance + 0.25 * path.surprise + 0.3 * noise
        log_size += _PREDICTOR_IN_VOLUME * path.predictor[hours]
        turnover = _TURNOVER_PER_HOUR.get(symbol, 1e7) / self._process.per_hour * np.exp(log_size)
        volume = np.round(turnover / prices[:-1], _VOLUME_DECIMALS)
        typical = (opened + close) / 2
        high, low = np.maximum(high, np.maximum(opened, close)), np.minimum(low, np.minimum(opened, close))
        return Candles(self._opens, opened, high, low, close, volume, np.round(volume * typical, 4))

    def _premium(self, symbol: str) -> Floats:
        """log(trade price / index) at the n + 1 bar ends: a fast and a slow AR(1), about 5 basis points."""
        premium = np.full(self._n + 1, 5e-5)
        for name, half_life_h, sd in (("fast", 1.0, 1.5e-4), ("slow", 72.0, 4e-4)):
            noise = self._process.stream("premium", name, symbol).standard_normal(self._n + 1)
            premium += sd * autoregression(noise, 0.5 ** (1 / (half_life_h * self._process.per_hour)))
        return premium

    def _beside(self, symbol: str, kind: str) -> Candles:
        """Index = trade price without the premium, mark = with half of it, premium = the premium as a fraction."""
        premium = self._premium(symbol)
        absent = np.full(self._n, np.nan)
        if kind == "premium":
            ends = np.asarray(np.round(np.expm1(premium), 8), dtype=np.float64)
            reach = np.abs(self._process.stream("premium reach", symbol).standard_normal((self._n, 2))) * 3e-5
            high = np.round(np.maximum(ends[:-1], ends[1:]) + reach[:, 0], 8)
            low = np.round(np.minimum(ends[:-1], ends[1:]) - reach[:, 1], 8)
            return Candles(self._opens, ends[:-1], high, low, ends[1:], absent, absent)
        trade = self.candles("linear", symbol, "trade", self._base)
        share = {"index": 1.0, "mark": 0.5}[kind]
        decimals = _decimals(symbol)
        factor = np.exp(-share * premium)
        middle = np.exp(-share * (premium[:-1] + premium[1:]) / 2)
        opened = np.round(trade.open * factor[:-1], decimals)
        close = np.round(trade.close * factor[1:], decimals)
        high = np.maximum(np.round(trade.high * middle, decimals), np.maximum(opened, close))
        low = np.minimum(np.round(trade.low * middle, decimals), np.minimum(opened, close))
        return Candles(self._opens, opened, high, low, close, absent, absent)

    def _spot(self, symbol: str) -> Candles:
        """The index with 30 % of the perpetual's volume."""
        index = self.candles("linear", symbol, "index", self._base)
        volume = np.round(0.3 * self.candles("linear", symbol, "trade", self._base).volume, _VOLUME_DECIMALS)
        turnover = np.round(volume * (index.open + index.close) / 2, 4)
        return Candles(self._opens, index.open, index.high, index.low, index.close, volume, turnover)


def _decimals(symbol: str) -> int:
    """Decimals of the price: six significant digits at the start."""
    return 5 - int(np.floor(np.log10(_PRICE.get(symbol, 10.0))))
