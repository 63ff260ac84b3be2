"""The random process of the generated market, with the forecasts that somebody who knows it would make.

Per symbol and base bar t (m bars an hour), with V the mean variance of one bar::

    r_t = sqrt(v_t) * (sqrt(1 - s^2) * e_t + s * z_h / sqrt(m)) + J_t
    log v_t = log(0.95 V) - (a^2 + b^2) / 2 + season(hour of week) + x_t + y_t

- x, y: Gaussian AR(1) with half-lives of 5 hours and 5 days and standard deviations a = 0.55, b = 0.5; 60 % of
  each one's variance is common to all symbols, so E[v] = 0.95 V.
- season: a known function of the hour of the week (168 values, mean of its exponential 1).
- e: unit-variance Student-t with 6 degrees of freedom, correlation 0.6 between symbols.
- J: compound Poisson, one jump in four days, Gaussian sizes, 5 % of V on average.
- z: the planted predictor, white N(0, 1) per hour and symbol; z_h belongs to the hour before the bar's own.
  s is ``signal``: the correlation of z with the next hour's return in units of its volatility.

Each random stream is seeded by (seed, its name) alone: a longer market, or one with more symbols, repeats the
shorter one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import numpy as np
from scipy.signal import lfilter

from recur.connectors.sandbox.world import Floats, Millis
from recur.vocabulary import DAY_MS, HOUR_MS, UsageError, floor_open

HALF_LIVES_H = (5.0, 120.0)
FACTOR_SD = (0.55, 0.50)
COMMON_SHARE = 0.6
RETURN_CORRELATION = 0.6
TAIL_DEGREES = 6.0
JUMPS_PER_DAY = 0.25
JUMP_SHARE = 0.05

_ANNUAL_VOL = {"BTCUSDT": 0.50, "ETHUSDT": 0.65, "SOLUSDT": 0.85, "BNBUSDT": 0.55}
_MONDAY_MS = floor_open(7 * DAY_MS, "1w")


def weekly_season() -> Floats:
    """Log-variance offsets of the 168 hours from Monday 00:00 UTC: busy at 14:00, calm at weekends."""
    hour = np.arange(168)
    day = 0.6 * np.cos(2 * np.pi * (hour - 14) / 24) + 0.2 * np.cos(4 * np.pi * (hour - 14) / 24)
    season = day - 0.7 * (hour >= 120)
    return np.asarray(season - np.log(np.exp(season).mean()), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Path:
    """One symbol's realisation; all per base bar (n) but ``predictor`` (per hour)."""

    returns: Floats
    """Log return of the bar."""
    spread: Floats
    """Variance of the bar's Gaussian part given its tail weight: what a bridge between its ends has."""
    log_variance: Floats
    """log v minus its level: season and both factors."""
    surprise: Floats
    """|e|, the size of the standardised innovation."""
    factors: tuple[Floats, Floats]
    predictor: Floats


class Process:
    """``n`` base bars of ``step_ms`` each from ``start_ms`` (on the hour)."""

    def __init__(self, seed: int, start_ms: int, n: int, step_ms: int, signal: float) -> None:
        if not -1 < signal < 1:
            raise UsageError(f"The signal is a correlation: expected -1 < signal < 1, found {signal}.")
        self._seed, self.start_ms, self._n, self._step = seed, start_ms, n, step_ms
        self.signal = signal
        self.per_hour = HOUR_MS // step_ms
        self._decay = tuple(0.5 ** (1 / (hours * self.per_hour)) for hours in HALF_LIVES_H)
        self._paths: dict[str, Path] = {}

    def stream(self, *name: str) -> np.random.Generator:
        """The random stream of this name."""
        return np.random.default_rng([self._seed, crc32("/".join(name).encode())])

    def bar_variance(self, symbol: str) -> float:
        """V: mean variance of one bar's log return."""
        return float(_ANNUAL_VOL.get(symbol, 0.80) ** 2 * self._step / (365 * DAY_MS))

    def path(self, symbol: str) -> Path:
        """The symbol's realisation, made once."""
        if symbol not in self._paths:
            self._paths[symbol] = self._simulate(symbol)
        return self._paths[symbol]

    def expected_variance(self, symbol: str, cutoffs_ms: Millis, horizon_ms: int) -> Floats:
        """E[sum of squared base-bar returns over (cutoff, cutoff + horizon] | factors of the last closed bar].

        Closed form: given x now, x after k bars is N(p^k x, a^2 (1 - p^2k)), so
        E[exp x_k] = exp(p^k x + a^2 (1 - p^2k) / 2); the season is known; jumps add their mean variance.
        Averaged over the planted predictor. Units: squared log return. Since base returns are uncorrelated,
        it is also the expected squared return over the horizon, up to terms of the order of signal^2.
        UsageError for a cutoff or horizon off the base grid, or a cutoff before the first close.
        """
        return self._sum_of_powers(symbol, cutoffs_ms, horizon_ms, 1.0) + (
            JUMP_SHARE * self.bar_variance(symbol) * (horizon_ms // self._step)
        )

    def expected_return(self, symbol: str, cutoffs_ms: Millis, horizon_ms: int) -> Floats:
        """E[log return over (cutoff, cutoff + horizon] | factors, predictors of the hours complete at cutoff].

        signal * z of the last complete hour * E[sum of sqrt(v) over the rest of the hour the cutoff is in]
        / sqrt(m): the predictor reaches one hour and no further. E[exp(x_k / 2)] as in ``expected_variance``.
        """
        cutoffs = np.asarray(cutoffs_ms, dtype=np.int64)
        hours = (cutoffs - self.start_ms) // HOUR_MS
        predictor = np.where(hours > 0, self.path(symbol).predictor[np.maximum(hours - 1, 0)], 0.0)
        left = HOUR_MS - (cutoffs - self.start_ms) % HOUR_MS
        volatility = self._sum_of_powers(symbol, cutoffs, horizon_ms, 0.5, left // self._step)
        return np.asarray(self.signal * predictor * volatility / np.sqrt(self.per_hour))

    def _sum_of_powers(
        self, symbol: str, cutoffs_ms: Millis, horizon_ms: int, power: float, at_most: Millis | None = None
    ) -> Floats:
        """Sum over the horizon's bars (only the first ``at_most``) of E[v^power | factors at the cutoff]."""
        cutoffs = np.asarray(cutoffs_ms, dtype=np.int64)
        bars, rest = np.divmod(cutoffs - self.start_ms, self._step)
        if rest.any() or (bars < 1).any() or (bars > self._n).any() or horizon_ms % self._step:
            raise UsageError(
                f"Cutoffs and horizon must be whole base bars of {self._step} ms, cutoffs inside the market."
            )
        states = [factor[bars - 1] for factor in self.path(symbol).factors]
        season = weekly_season()
        total = np.zeros(len(cutoffs))
        count = horizon_ms // self._step
        for k in range(1, (count if at_most is None else min(count, self.per_hour)) + 1):
            opens = cutoffs + (k - 1) * self._step
            log_mean = power * season[_hour_of_week(opens)]
            for state, decay, sd in zip(states, self._decay, FACTOR_SD, strict=True):
                spread = sd * sd * (1 - decay ** (2 * k))
                log_mean = log_mean + power * decay**k * state + power * power * spread / 2
            total += np.exp(log_mean) if at_most is None else np.where(k <= at_most, np.exp(log_mean), 0.0)
        return total * float(np.exp(power * self._level(symbol)))

    def _level(self, symbol: str) -> float:
        mean = (1 - JUMP_SHARE) * self.bar_variance(symbol)
        return float(np.log(mean) - sum(sd * sd for sd in FACTOR_SD) / 2)

    @cached_property
    def _common(self) -> tuple[Floats, Floats, tuple[Floats, Floats]]:
        """What all symbols share: Gaussian shocks, tail weights of mean 1, and factor parts of unit variance."""
        shocks = self.stream("shock").standard_normal(self._n)
        tails = (TAIL_DEGREES - 2) / self.stream("tail").chisquare(TAIL_DEGREES, self._n)
        return shocks, tails, (self._factor(0), self._factor(1))

    def _factor(self, which: int, *owner: str) -> Floats:
        noise = self.stream("factor", str(which), *owner).standard_normal(self._n)
        return autoregression(noise, self._decay[which])

    def _simulate(self, symbol: str) -> Path:
        shocks, tails, commons = self._common
        own_shocks = self.stream("shock", symbol).standard_normal(self._n)
        shared, own = np.sqrt(RETURN_CORRELATION), np.sqrt(1 - RETURN_CORRELATION)
        innovations = np.sqrt(tails) * (shared * shocks + own * own_shocks)
        fast, slow = (
            sd * (np.sqrt(COMMON_SHARE) * common + np.sqrt(1 - COMMON_SHARE) * self._factor(which, symbol))
            for which, (sd, common) in enumerate(zip(FACTOR_SD, commons, strict=True))
        )
        opens = self.start_ms + self._step * np.arange(self._n, dtype=np.int64)
        log_variance = weekly_season()[_hour_of_week(opens)] + fast + slow
        variance = np.exp(self._level(symbol) + log_variance)
        hours = -(-self._n // self.per_hour)
        predictor = self.stream("predictor", symbol).standard_normal(hours)
        before = np.repeat(np.r_[0.0, predictor[:-1]], self.per_hour)[: self._n]
        noise_share = 1 - self.signal**2
        drift = self.signal * before / np.sqrt(self.per_hour)
        jumps = self.stream("jump count", symbol).poisson(JUMPS_PER_DAY * self._step / DAY_MS, self._n)
        jump_sd = np.sqrt(JUMP_SHARE * self.bar_variance(symbol) * DAY_MS / self._step / JUMPS_PER_DAY)
        jumped = jump_sd * np.sqrt(jumps) * self.stream("jump size", symbol).standard_normal(self._n)
        return Path(
            np.sqrt(variance) * (np.sqrt(noise_share) * innovations + drift) + jumped,
            variance * noise_share * tails,
            log_variance,
            np.abs(innovations),
            (fast, slow),
            predictor,
        )


def autoregression(noise: Floats, decay: float) -> Floats:
    """Stationary AR(1) of unit variance driven by standard normal ``noise``."""
    driven = noise * np.sqrt(1 - decay * decay)
    driven[0] = noise[0]
    return np.asarray(lfilter([1.0], [1.0, -decay], driven))


def _hour_of_week(times: Millis) -> Millis:
    return (times - _MONDAY_MS) // HOUR_MS % 168
