"""A plain trading simulation of the forecasts: what the direction in them would have earned, after costs.

At each cutoff the position of a series is ``clip(10 · mean / vol, −1, 1)`` at the trading horizon; it is filled at
the **next** bar's open, pays taker fee and slippage on every change, and pays or receives funding at each
settlement that it is held over. Series have equal weight and no leverage. Where the next bar is missing nothing is
filled and the old position stays. A book that loses everything in one bar is left with a trillionth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
GAIN = 10.0
RUIN = 1e-12 - 1
"""Smallest return of one bar: below −1 an equity curve has no logarithm."""


@dataclass(frozen=True, slots=True)
class Leg:
    """One series. Grid arrays (T,): ``open_ms``, ``close_ms``, ``open`` (NaN = missing). Forecasts (N,): ``index``
    into the grid, ``mean``, ``vol``. ``funding_ms``/``funding_rate``: settlements (fraction, longs pay positive)."""

    open_ms: NDArray[np.int64]
    open: Floats
    index: NDArray[np.int64]
    mean: Floats
    vol: Floats
    funding_ms: NDArray[np.int64]
    funding_rate: Floats


@dataclass(frozen=True, slots=True)
class LegResult:
    """Per bar that a position can be held over, from its open to the next: all (M,) fractions of capital."""

    open_ms: NDArray[np.int64]
    gross: Floats
    fee: Floats
    slippage: Floats
    funding: Floats
    traded: Floats
    hold: Floats


def run_leg(leg: Leg, fee_bps: float, slippage_bps: float) -> LegResult:
    """Simulate one series from its first forecast to the last bar with a following open."""
    n = len(leg.open)
    wish = np.full(n, np.nan)
    wish[leg.index] = np.clip(GAIN * leg.mean / leg.vol, -1, 1)
    rows = np.arange(0)
    if len(leg.index):
        first = int(leg.index[0]) + 1  # the first bar at whose open something can be filled
        rows = np.arange(first, min(int(leg.index[-1]) + 1, n - 2) + 1)
    if not len(rows):
        empty = np.zeros(0)
        return LegResult(leg.open_ms[:0], empty, empty, empty, empty, empty, empty)
    target = wish[rows - 1]
    target[~np.isfinite(leg.open[rows])] = np.nan  # no bar, no fill
    known = np.isfinite(target)
    at = np.maximum.accumulate(np.where(known, np.arange(len(rows)), -1))
    position = np.where(at >= 0, target[np.maximum(at, 0)], 0.0)
    price = leg.open.copy()
    seen = np.isfinite(price)
    price = price[np.maximum.accumulate(np.where(seen, np.arange(n), int(np.argmax(seen))))]
    change = price[rows + 1] / price[rows] - 1
    traded = np.abs(np.diff(position, prepend=0.0))
    rate = np.zeros(len(rows))
    # A settlement at the very instant of an open falls on what was held until then, the bar before.
    slot = np.searchsorted(leg.open_ms, leg.funding_ms, side="left") - 1 - first
    inside = (slot >= 0) & (slot < len(rows))
    np.add.at(rate, slot[inside], leg.funding_rate[inside])
    return LegResult(
        leg.open_ms[rows],
        position * change,
        traded * fee_bps / 1e4,
        traded * slippage_bps / 1e4,
        position * rate,
        traded,
        change,
    )


def simulate(
    legs: Sequence[Leg], fee_bps: float, slippage_bps: float, bars_per_year: float, n_trials: int
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Equal-weight portfolio of all legs: the ``trading`` block of the metrics, and the equity curves.

    Ratios are None where the book never traded or the span is too short. Annualised with 365 days. ``turnover`` is
    a day's traded value over capital, ``break_even_bps`` the fee and slippage together at which nothing is left.
    """
    results = [run_leg(leg, fee_bps, slippage_bps) for leg in legs]
    times = np.unique(np.concatenate([r.open_ms for r in results]))
    columns = ("gross", "fee", "slippage", "funding", "traded", "hold")
    book = {name: np.zeros(len(times)) for name in columns}
    for r in results:
        at = np.searchsorted(times, r.open_ms)
        for name in columns:
            book[name][at] += getattr(r, name) / len(legs)
    net = book["gross"] - book["fee"] - book["slippage"] - book["funding"]
    curves = {
        name: np.log1p(np.maximum(v, RUIN)).cumsum()
        for name, v in (("net", net), ("gross", book["gross"]), ("buy_hold", book["hold"]))
    }
    traded = float(book["traded"].sum())
    days = len(times) / (bars_per_year / 365)
    peak = np.maximum.accumulate(np.concatenate([[0.0], curves["net"]]))[1:]
    active = traded > 0 and len(times) > 30
    metrics = {
        "gross_sharpe": sharpe(book["gross"], bars_per_year) if active else None,
        "net_sharpe": sharpe(net, bars_per_year) if active else None,
        "net_return": float(np.expm1(curves["net"][-1])) if len(times) else None,
        "max_drawdown": float(np.max(1 - np.exp(curves["net"] - peak))) if len(times) else None,
        "turnover": traded / days if days else None,
        "fees": float(book["fee"].sum()),
        "slippage": float(book["slippage"].sum()),
        "funding": float(book["funding"].sum()),
        "break_even_bps": float((book["gross"] - book["funding"]).sum() / traded * 1e4) if active else None,
        "deflated_sharpe": deflated_sharpe(net, n_trials) if active else None,
        "n_trials": n_trials,
        "buy_hold_sharpe": sharpe(book["hold"], bars_per_year) if len(times) > 30 else None,
    }
    return metrics, {"time_ms": times, **curves}


def sharpe(returns: Floats, bars_per_year: float) -> float | None:
    """Annualised mean over standard deviation of per-bar returns; None when they do not vary."""
    deviation = float(np.std(returns))
    return float(np.mean(returns) / deviation * np.sqrt(bars_per_year)) if deviation > 1e-15 else None


def deflated_sharpe(returns: Floats, n_trials: int) -> float | None:
    """Probability that the true Sharpe ratio exceeds what the best of ``n_trials`` skill-less tries would show.

    Bailey & López de Prado (2014), with the variance of a skill-less Sharpe ratio estimate, 1/T, for that across
    trials.
    """
    n, deviation = len(returns), float(np.std(returns))
    if n < 30 or deviation < 1e-15:
        return None
    ratio = float(np.mean(returns)) / deviation
    skew, kurtosis = float(stats.skew(returns)), float(stats.kurtosis(returns, fisher=False))
    trials = max(1, n_trials)
    expected_best = 0.0
    if trials > 1:
        gamma = float(np.euler_gamma)
        expected_best = (
            (1 - gamma) * stats.norm.ppf(1 - 1 / trials) + gamma * stats.norm.ppf(1 - 1 / (trials * np.e))
        ) / np.sqrt(n)
    spread = np.sqrt(max(1 - skew * ratio + (kurtosis - 1) / 4 * ratio**2, 1e-12))
    return float(stats.norm.cdf((ratio - expected_best) * np.sqrt(n - 1) / spread))
