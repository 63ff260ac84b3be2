"""Scores of forecasts, one pure function each, and the tests of their differences.

Rows are (cutoff, series) pairs of one horizon; arrays have shape (N,) and quantiles (N, Q) at ``LEVELS``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
LEVELS: Floats = np.round(np.arange(1, 20) * 0.05, 2)


def pinball(y: Floats, quantiles: Floats) -> Floats:
    """(N,) pinball loss averaged over the levels, in units of y."""
    error = y[:, None] - quantiles
    loss: Floats = np.maximum(LEVELS * error, (LEVELS - 1) * error).mean(axis=1)
    return loss


def crps(y: Floats, quantiles: Floats) -> Floats:
    """(N,) twice the mean pinball loss over the even grid of levels (Gneiting & Ranjan 2011), in units of y."""
    return 2 * pinball(y, quantiles)


def coverage(y: Floats, quantiles: Floats, level: float) -> float:
    """Share of outcomes inside the central band of probability ``level`` (bounds included)."""
    low, high = round((1 - level) / 2 / 0.05) - 1, round((1 + level) / 2 / 0.05) - 1
    return float(np.mean((y >= quantiles[:, low]) & (y <= quantiles[:, high])))


def pit(y: Floats, quantiles: Floats) -> Floats:
    """(N,) probability integral transform F(y): linear between quantiles, 0.025 and 0.975 outside the outermost
    ones, the middle of their levels where y equals several quantiles (a point mass)."""
    below = (quantiles < y[:, None]).sum(axis=1)
    at_most = (quantiles <= y[:, None]).sum(axis=1)
    out = np.where(at_most == 0, 0.025, 0.975)
    equal = at_most > below
    out[equal] = (LEVELS[below[equal]] + LEVELS[at_most[equal] - 1]) / 2
    rows = np.flatnonzero(~equal & (below > 0) & (below < len(LEVELS)))
    low, high = quantiles[rows, below[rows] - 1], quantiles[rows, below[rows]]
    out[rows] = LEVELS[below[rows] - 1] + (y[rows] - low) / (high - low) * 0.05
    return out


def pit_ks(y: Floats, quantiles: Floats) -> float:
    """Largest distance between the share of outcomes below each quantile and its level (Kolmogorov on the grid).

    Where outcomes equal a quantile, any level between the shares below it and up to it is right.
    """
    below, up_to = (y[:, None] < quantiles).mean(axis=0), (y[:, None] <= quantiles).mean(axis=0)
    return float(np.max(np.maximum(below - LEVELS, LEVELS - up_to).clip(0)))


def qlike(y: Floats, vol: Floats) -> Floats:
    """(N,) log σ² + y²/σ² in nats (Patton 2011, up to a term without σ): only differences have a meaning."""
    variance = vol**2
    loss: Floats = np.log(variance) + y**2 / variance
    return loss


def correlation(forecast: Floats, y: Floats) -> float | None:
    """Pearson correlation (the information coefficient); None where the forecast does not vary."""
    if len(y) < 3 or np.std(forecast) < 1e-15 or np.std(y) < 1e-15:
        return None
    return float(np.corrcoef(forecast, y)[0, 1])


def rank_correlation(forecast: Floats, y: Floats) -> float | None:
    """Spearman correlation; None where the forecast does not vary."""
    if len(y) < 3 or np.std(forecast) < 1e-15 or np.std(y) < 1e-15:
        return None
    return float(stats.spearmanr(forecast, y).statistic)


def auc(forecast: Floats, y: Floats) -> float | None:
    """Probability that a bar that rose had the higher forecast (Mann & Whitney); ties count half."""
    up, down = forecast[y > 0], forecast[y < 0]
    if not len(up) or not len(down) or np.std(forecast) < 1e-15:
        return None
    ranks = stats.rankdata(np.concatenate([up, down]))
    return float((ranks[: len(up)].sum() - len(up) * (len(up) + 1) / 2) / (len(up) * len(down)))


def by_cutoff(cutoff_ms: NDArray[np.int64], values: Floats) -> Floats:
    """Mean of ``values`` over the series that share a cutoff, in order of time: one number per instant, so that
    series which move together do not count as independent evidence."""
    _, at = np.unique(cutoff_ms, return_inverse=True)
    mean: Floats = np.bincount(at, weights=values) / np.bincount(at)
    return mean


def diebold_mariano(difference: Floats, horizon: int, min_lag: int = 24) -> tuple[float, float]:
    """(statistic, two-sided p) of the mean loss difference, ours minus theirs: negative favours ours.

    Diebold & Mariano (1995) with Newey & West's (1987) variance and the small sample correction of Harvey,
    Leybourne & Newbold (1997), against Student's t. Losses of overlapping forecasts are correlated up to
    ``horizon − 1`` and their weights shrink there, so the lag is ``max(min_lag, 3 · horizon, 1.3 √n)`` (Lazarus,
    Lewis, Stock & Watson 2018), at most n/4, and the p value allows for its width: the 5 % critical value is Kiefer
    & Vogelsang's (2005). (nan, nan) below 30 instants, below ``4 · horizon``, where the lag would not span the overlap
    (36 instants 24 bars ahead reject 14 % of equal forecasts), or where the difference does not vary.
    """
    n = len(difference)
    lag = min(max(min_lag, 3 * horizon, int(np.ceil(1.3 * np.sqrt(n)))), n // 4)
    if n < max(30, 4 * horizon) or np.std(difference) <= 1e-12 * np.max(np.abs(difference)):
        return float("nan"), float("nan")
    d = difference - difference.mean()
    variance = d @ d / n
    for k in range(1, lag + 1):
        variance += 2 * (1 - k / (lag + 1)) * (d[k:] @ d[:-k]) / n
    if variance <= 0:
        return float("nan"), float("nan")
    h = min(horizon, n // 2)
    correction = np.sqrt(max((n + 1 - 2 * h + h * (h - 1) / n) / n, 1e-12))
    statistic = float(correction * difference.mean() / np.sqrt(variance / n))
    width = (lag + 1) / n
    stretch = (1.96 + 2.9694 * width + 0.4160 * width**2 - 0.5324 * width**3) / 1.96
    return statistic, float(2 * stats.t.sf(abs(statistic) / stretch, df=n - 1))


def skill_interval(
    ours: Floats, theirs: Floats, block: int, draws: int = 400, seed: int = 0
) -> tuple[float | None, float | None]:
    """95 % interval of ``1 − mean(ours)/mean(theirs)`` by the circular block bootstrap (Politis & Romano 1992).

    ``block`` in instants, at most a quarter of them. (None, None) below 8 instants or where ``theirs`` is all zero.
    """
    n = len(ours)
    if n < 8 or not np.any(theirs):
        return None, None
    block = max(1, min(block, n // 4))
    rng = np.random.default_rng(seed)
    wrapped = np.concatenate(
        [np.zeros((1, 2)), np.cumsum(np.tile(np.stack([ours, theirs], 1), (2, 1)), axis=0)]
    )
    starts = rng.integers(0, n, size=(draws, int(np.ceil(n / block))))
    sums = (wrapped[starts + block] - wrapped[starts]).sum(axis=1)
    sums = sums[sums[:, 1] > 0]  # a draw of nothing but zero losses has no ratio
    skills = 1 - sums[:, 0] / sums[:, 1]
    low, high = np.quantile(skills, [0.025, 0.975])
    return float(low), float(high)
