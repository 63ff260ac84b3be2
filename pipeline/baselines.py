"""The naive forecasters that every model must beat, each fitted on the training span alone.

All emit the same quantile levels as the models, symmetric about zero (no drift: it does not pay).

- ``random_walk``: zero mean; quantiles of |h-bar return| over the trailing 90 days of *completed* returns.
- ``ewma``: RiskMetrics (1996): σ² = Σ λ^k r²; λ per horizon and the quantiles of standardised residuals from
  the training span.
- ``har``: Corsi (2009) in logarithms, on the range variance without its season of the week: log mean variance of
  the next h bars on those of the last 1, 6, 24, 168 and 720 bars; pooled least squares, then residual quantiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.signal import lfilter

from recur.pipeline.dataset import SeriesArrays, label_mask
from recur.pipeline.features import VARIANCE_FLOOR
from recur.pipeline.metrics import LEVELS
from recur.vocabulary import DAY_MS, DataMissing

Floats = NDArray[np.float64]
LAMBDAS = (0.9, 0.94, 0.96, 0.97, 0.98, 0.99, 0.995)
HAR_WINDOWS = (1, 6, 24, 168, 720)
HAR_LEAST = 48
"""Bars that the longest windows of ``har`` need: daily and weekly markets have few."""


@dataclass(frozen=True, slots=True)
class BaselineForecast:
    """``quantiles`` (T, H, Q) and ``vol`` (T, H) of one series; NaN before there is enough history."""

    quantiles: Floats
    vol: Floats


Baseline = Callable[[SeriesArrays], BaselineForecast]


def symmetric_quantiles(absolute: Floats) -> Floats:
    """(…, Q) quantiles of a symmetric law from ``absolute`` (…, 9): quantiles of |y| at 10 %, 20 %, …, 90 %."""
    zero = 0 * absolute[..., :1]  # NaN where there is no law yet
    out: Floats = np.concatenate([-absolute[..., ::-1], zero, absolute], axis=-1)
    return out


_ABS_LEVELS = np.round(2 * LEVELS[10:] - 1, 2)  # level 0.55 of a symmetric law is level 0.10 of |y|


def ewma_variance(r: Floats, decay: float) -> Floats:
    """(T,) exponentially weighted mean of r², skipping missing bars, normalised for its short start."""
    seen = np.isfinite(r)
    squares = np.where(seen, np.nan_to_num(r) ** 2, 0.0)
    if not seen.all():  # a missing bar neither adds nor decays
        out = np.full(len(r), np.nan)
        out[seen] = ewma_variance(r[seen], decay)
        return pl.Series(out).fill_nan(None).forward_fill().fill_null(np.nan).to_numpy()
    total: Floats = lfilter([1 - decay], [1, -decay], squares)
    weight = 1 - decay ** np.arange(1, len(r) + 1)
    return np.maximum(total / weight, VARIANCE_FLOOR)


def fit_random_walk(train: Sequence[SeriesArrays], horizons: Sequence[int], until_ms: int) -> Baseline:
    """Nothing is fitted: the window trails. The window is 90 days of completed returns."""

    def forecast(series: SeriesArrays) -> BaselineForecast:
        step = int(np.median(np.diff(series.close_ms))) if len(series.close_ms) > 1 else DAY_MS
        window = max(30, int(90 * DAY_MS // step))
        n, q = len(series.close), np.full((len(series.close), len(horizons), 9), np.nan)
        vol = np.full((n, len(horizons)), np.nan)
        for i, h in enumerate(horizons):
            done = np.full(n, np.nan)
            done[h:] = series.target[:-h, i] if h < n else []
            size = pl.Series(np.abs(done)).fill_nan(None)
            least = min(window, 30 + h)
            for k, level in enumerate(_ABS_LEVELS):
                q[:, i, k] = (
                    size.rolling_quantile(float(level), "linear", window_size=window, min_samples=least)
                    .fill_null(np.nan)
                    .to_numpy()
                )
            # A running mean that falls back to zero can end a rounding error below it.
            mean = (size**2).rolling_mean(window, min_samples=least).clip(0)
            vol[:, i] = mean.sqrt().fill_null(np.nan).to_numpy()
        return BaselineForecast(symmetric_quantiles(q), np.maximum(vol, np.sqrt(VARIANCE_FLOOR)))

    return forecast


def _residual_law(residuals: list[Floats]) -> tuple[Floats, float]:
    """Quantiles of |standardised residual| at ``_ABS_LEVELS`` and its root mean square.

    Raises DataMissing when there is no residual at all.
    """
    z = np.concatenate(residuals)
    if not len(z):
        raise DataMissing(
            "The training span holds no complete label to fit a baseline on.",
            "Fetch a longer history, or choose shorter horizons.",
        )
    return np.quantile(np.abs(z), _ABS_LEVELS), float(np.sqrt(np.mean(z**2)))


def fit_ewma(train: Sequence[SeriesArrays], horizons: Sequence[int], until_ms: int) -> Baseline:
    """λ of each horizon by pooled pinball loss on the training span, in units of each series' mean |y|."""
    chosen: list[tuple[float, Floats, float]] = []
    masks = [label_mask(s, horizons, 0, until_ms) for s in train]
    variances = {decay: [ewma_variance(s.r, decay) for s in train] for decay in LAMBDAS}
    for i, h in enumerate(horizons):
        best: tuple[float, float, Floats, float] | None = None
        for decay in LAMBDAS:
            ys, sigmas = [], []
            for s, mask, variance in zip(train, masks, variances[decay], strict=True):
                keep = mask[:, i] & np.isfinite(variance)
                keep[: min(200, len(keep) // 4)] = False  # warm-up of the mean
                ys.append(s.target[keep, i])
                sigmas.append(np.sqrt(variance[keep] * h))
            law, rms = _residual_law([y / sigma for y, sigma in zip(ys, sigmas, strict=True)])
            total = 0.0
            for y, sigma in zip(ys, sigmas, strict=True):
                if len(y):
                    scaled = np.abs(y)[:, None] - sigma[:, None] * law
                    total += float(
                        np.mean(np.maximum(_ABS_LEVELS * scaled, (_ABS_LEVELS - 1) * scaled))
                        / max(np.mean(np.abs(y)), 1e-12)  # a series that never moved says nothing
                    )
            if best is None or total < best[0]:
                best = (total, decay, law, rms)
        assert best is not None
        chosen.append(best[1:])

    def forecast(series: SeriesArrays) -> BaselineForecast:
        q = np.empty((len(series.close), len(horizons), 9))
        vol = np.empty((len(series.close), len(horizons)))
        for i, h in enumerate(horizons):
            decay, law, rms = chosen[i]
            sigma = np.sqrt(ewma_variance(series.r, decay) * h)
            q[:, i], vol[:, i] = sigma[:, None] * law, np.maximum(sigma * rms, np.sqrt(VARIANCE_FLOOR))
        return BaselineForecast(symmetric_quantiles(q), vol)

    return forecast


def har_regressors(series: SeriesArrays) -> Floats:
    """(T, 1 + windows) constant and logs of the mean de-seasonalised range variance over each window."""
    variance = pl.Series(series.gk / series.season).fill_nan(None)
    columns = [np.ones(len(series.close))]
    for window in HAR_WINDOWS:
        least = max(1, min(window // 2, HAR_LEAST))
        mean = variance.rolling_mean(window, min_samples=least).fill_null(np.nan).to_numpy()
        columns.append(np.log(mean + VARIANCE_FLOOR))
    return np.stack(columns, axis=1)


def _mean_ahead(values: Floats, h: int) -> Floats:
    """(T,) mean of values[t+1 … t+h]; NaN where any is missing."""
    out = np.full(len(values), np.nan)
    if h < len(values):
        total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
        missing = np.concatenate([[0], np.cumsum(~np.isfinite(values))])
        mean = (total[h + 1 :] - total[1:-h]) / h
        mean[missing[h + 1 :] > missing[1:-h]] = np.nan
        out[: len(mean)] = mean
    return out


def fit_har(train: Sequence[SeriesArrays], horizons: Sequence[int], until_ms: int) -> Baseline:
    """Pooled log-HAR with the season put back for the hours that are forecast."""
    masks = [label_mask(s, horizons, 0, until_ms) for s in train]
    regressors = [har_regressors(s) for s in train]
    fitted: list[tuple[Floats, Floats, float]] = []
    for i, h in enumerate(horizons):
        gram, cross, kept = np.zeros((6, 6)), np.zeros(6), []
        for s, mask, x in zip(train, masks, regressors, strict=True):
            y = np.log(_mean_ahead(s.gk / s.season, h) + VARIANCE_FLOOR)
            keep = mask[:, i] & np.isfinite(y) & np.isfinite(x).all(axis=1)
            gram += x[keep].T @ x[keep]
            cross += x[keep].T @ y[keep]
            kept.append(keep)
        beta: Floats = np.linalg.lstsq(gram, cross, rcond=None)[0].astype(np.float64)
        residuals = [
            s.target[keep, i] / np.sqrt(np.exp(x[keep] @ beta) * s.season_ahead[keep, i])
            for s, x, keep in zip(train, regressors, kept, strict=True)
        ]
        fitted.append((beta, *_residual_law(residuals)))

    def forecast(series: SeriesArrays) -> BaselineForecast:
        x = har_regressors(series)
        q = np.empty((len(series.close), len(horizons), 9))
        vol = np.empty((len(series.close), len(horizons)))
        for i in range(len(horizons)):
            beta, law, rms = fitted[i]
            sigma = np.sqrt(np.exp(x @ beta) * series.season_ahead[:, i])
            q[:, i], vol[:, i] = sigma[:, None] * law, np.maximum(sigma * rms, np.sqrt(VARIANCE_FLOOR))
        return BaselineForecast(symmetric_quantiles(q), vol)

    return forecast


BASELINES: dict[str, Callable[[Sequence[SeriesArrays], Sequence[int], int], Baseline]] = {
    "random_walk": fit_random_walk,
    "ewma": fit_ewma,
    "har": fit_har,
}
