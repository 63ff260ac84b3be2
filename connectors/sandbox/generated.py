"""An invented market for the sandbox: candles of every kind and funding, made from the process and a seed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from recur.connectors.sandbox.feed import feed
from recur.connectors.sandbox.positions import GRID_MS, long_share, open_interest
from recur.connectors.sandbox.process import Process, autoregression
from recur.connectors.sandbox.world import (
    Announcement,
    Candles,
    Floats,
    Life,
    Maintenance,
    Millis,
    aggregate,
    instrument_row,
    nests,
)
from recur.vocabulary import DAY_MS, HOUR_MS, INTERVALS, UsageError, VenueRefused, check_interval, floor_open

FUNDING_MS = 8 * HOUR_MS
_PRICE = {"BTCUSDT": 60_000.0, "ETHUSDT": 3_000.0, "SOLUSDT": 150.0, "BNBUSDT": 600.0}
_TURNOVER_PER_HOUR = {"BTCUSDT": 3e8, "ETHUSDT": 1.5e8, "SOLUSDT": 6e7, "BNBUSDT": 2e7}
_VOLUME_DECIMALS = 3
_PREDICTOR_IN_VOLUME = 0.5


class GeneratedMarket:
    """A market whose truth is known: see ``process`` for the model of returns.

    It runs from ``start_ms`` (moved back to the hour) to ``end_ms`` (moved back to the base grid). The same
    symbols trade in ``linear`` and ``spot``. Bars of ``base_interval`` (one hour or a part of it) are drawn,
    coarser ones are their exact aggregates. ``signal`` plants a predictor: see ``predictor``. ``lives`` says
    when a symbol trades, for those that do not trade all the time (``extra_lives`` makes three); it may name
    further symbols. During ``maintenance`` there are no bars. Raises UsageError for arguments outside these rules.
    """

    def __init__(
        self,
        seed: int,
        start_ms: int,
        end_ms: int,
        symbols: Sequence[str] = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "BNBUSDT"),
        signal: float = 0.0,
        base_interval: str = "5m",
        lives: Mapping[str, Life] | None = None,
        maintenance: Sequence[Maintenance] = (),
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
        self._lives = dict(lives or {})
        self._symbols = sorted({*symbols, *self._lives})
        self._maintenance = sorted(maintenance, key=lambda m: m.begin_ms)
        self._process = Process(seed, self.start_ms, self._n, self._step, signal)
        self._opens = self.start_ms + self._step * np.arange(self._n, dtype=np.int64)
        self._cache: dict[tuple[str, str, str, str], Candles] = {}
        self._wholes: dict[tuple[str, str, str], Candles] = {}
        self._events: dict[tuple[str, str, int], tuple[Millis, Floats]] = {}
        self._feed: list[Announcement] | None = None
        self._seed = seed
        self._lock = threading.RLock()

    def symbols(self, category: str) -> list[str]:
        return list(self._symbols) if category in ("linear", "spot") else []

    def instrument(self, category: str, symbol: str) -> dict[str, Any]:
        tick = 10.0 ** -_decimals(symbol)
        launch_ms = self.life(category, symbol).listed_ms
        return instrument_row(category, symbol, launch_ms, tick, FUNDING_MS // 60_000)

    def life(self, category: str, symbol: str) -> Life:
        """What ``lives`` says, else all the time."""
        return self._lives.get(symbol, Life(self.start_ms))

    def base_interval(self, category: str, symbol: str, kind: str) -> str:
        return self._base

    def candles(self, category: str, symbol: str, kind: str, interval: str) -> Candles:
        """All bars of the series; VenueRefused when ``interval`` is finer than the base."""
        if not nests(self._base, interval):
            raise VenueRefused("Invalid period!", ret_code=10001)
        key = (category, symbol, kind, interval)
        with self._lock:
            if key not in self._cache:
                if interval == self._base:
                    self._cache[key] = self._traded(category, symbol, self._whole(category, symbol, kind))
                else:
                    fine = self.candles(category, symbol, kind, self._base)
                    self._cache[key] = aggregate(fine, self._base, interval)
            return self._cache[key]

    def _whole(self, category: str, symbol: str, kind: str) -> Candles:
        """Base bars from the world's begin to its end, whether the symbol is listed or not."""
        key = (category, symbol, kind)
        with self._lock:
            if key not in self._wholes:
                if category == "spot":
                    made = self._spot(symbol)
                elif kind == "trade":
                    made = self._trade(symbol)
                else:
                    made = self._beside(symbol, kind)
                self._wholes[key] = made
            return self._wholes[key]

    def _traded(self, category: str, symbol: str, bars: Candles) -> Candles:
        """Those of ``bars`` that open while the symbol is listed and no maintenance runs."""
        life = self.life(category, symbol)
        last_ms = self.end_ms if life.delisted_ms is None else life.delisted_ms
        low, high = (int(i) for i in np.searchsorted(bars.open_time, (life.listed_ms, last_ms)))
        bars = bars[low:high] if (low, high) != (0, len(bars)) else bars
        for pause in self._maintenance:
            absent = (bars.open_time >= floor_open(pause.begin_ms, self._base)) & (
                bars.open_time < pause.end_ms
            )
            bars = bars[~absent] if absent.any() else bars
        return bars

    def funding(self, category: str, symbol: str) -> tuple[Millis, Floats]:
        """Each 8 hours: mean premium P of the past 8 hours plus 0.01 % - P held within 0.05 %, as the venue does."""
        if category != "linear":
            return np.empty(0, np.int64), np.empty(0)
        return self._once(("funding", symbol, 0), lambda: self._made_funding(symbol))

    def _made_funding(self, symbol: str) -> tuple[Millis, Floats]:
        sums = np.r_[0.0, np.cumsum(self._whole("linear", symbol, "premium").close)]
        times = np.arange(-(-self.start_ms // FUNDING_MS) * FUNDING_MS, self.end_ms + 1, FUNDING_MS)
        times = times[times > self.start_ms].astype(np.int64)
        ends = (times - self.start_ms) // self._step
        begins = np.maximum(ends - FUNDING_MS // self._step, 0)
        premium = (sums[ends] - sums[begins]) / (ends - begins)
        return self._listed(symbol, times, np.round(premium + np.clip(1e-4 - premium, -5e-4, 5e-4), 8))

    def open_interest(self, category: str, symbol: str, step_ms: int) -> tuple[Millis, Floats]:
        """See ``positions``; only linear contracts have any."""
        return self._positions(category, symbol, step_ms, open_interest)

    def account_ratio(self, category: str, symbol: str, step_ms: int) -> tuple[Millis, Floats]:
        """See ``positions``; only linear contracts have any."""
        return self._positions(category, symbol, step_ms, long_share)

    def maintenance(self) -> Sequence[Maintenance]:
        return self._maintenance

    def announcements(self) -> Sequence[Announcement]:
        """See ``feed``."""
        with self._lock:
            if self._feed is None:
                lives = {symbol: self.life("linear", symbol) for symbol in self._symbols}
                self._feed = feed(self._seed, self.start_ms, self.end_ms, lives, self._maintenance)
            return self._feed

    def _positions(
        self, category: str, symbol: str, step_ms: int, derive: Callable[[Process, str, Candles], Floats]
    ) -> tuple[Millis, Floats]:
        if category != "linear":
            return np.empty(0, np.int64), np.empty(0)

        def made() -> tuple[Millis, Floats]:
            values = derive(self._process, symbol, self._whole("linear", symbol, "trade"))
            times = self.start_ms + GRID_MS * np.arange(len(values), dtype=np.int64)
            on_grid = times % step_ms == 0
            return self._listed(symbol, times[on_grid], values[on_grid])

        return self._once((derive.__name__, symbol, step_ms), made)

    def _once(
        self, key: tuple[str, str, int], make: Callable[[], tuple[Millis, Floats]]
    ) -> tuple[Millis, Floats]:
        with self._lock:
            if key not in self._events:
                self._events[key] = make()
            return self._events[key]

    def _listed(self, symbol: str, times: Millis, values: Floats) -> tuple[Millis, Floats]:
        life = self.life("linear", symbol)
        kept = times >= life.listed_ms
        if life.delisted_ms is not None:
            kept &= times <= life.delisted_ms
        return times[kept], values[kept]

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
        trade = self._whole("linear", symbol, "trade")
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
        index = self._whole("linear", symbol, "index")
        volume = np.round(0.3 * self._whole("linear", symbol, "trade").volume, _VOLUME_DECIMALS)
        turnover = np.round(volume * (index.open + index.close) / 2, 4)
        return Candles(self._opens, index.open, index.high, index.low, index.close, volume, turnover)


def extra_lives(start_ms: int, end_ms: int) -> dict[str, Life]:
    """Three symbols for ``lives``: delisted after a third of the time, listed after half of it, not listed yet."""
    third, half = (floor_open(start_ms + (end_ms - start_ms) // part, "1d") for part in (3, 2))
    return {
        "GONEUSDT": Life(floor_open(start_ms, "1h"), third),
        "NEWUSDT": Life(half),
        "SOONUSDT": Life(end_ms + 30 * DAY_MS),
    }


def _decimals(symbol: str) -> int:
    """Decimals of the price: six significant digits at the start."""
    return 5 - int(np.floor(np.log10(_PRICE.get(symbol, 10.0))))
