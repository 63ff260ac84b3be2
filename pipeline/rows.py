"""Forecasts as rows of the public long form (one per series, cutoff and horizon), in frames and in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from recur.pipeline.inference import Forecast
from recur.pipeline.metrics import LEVELS
from recur.vocabulary import INTERVALS, iso, next_open, to_ms

QUANTILE_NAMES = tuple(f"q{round(100 * level):02d}" for level in LEVELS)


def _ds(cutoff_ms: np.ndarray[Any, np.dtype[np.int64]], horizon: int, interval: str) -> list[int]:
    step = INTERVALS[interval]
    if step:
        return [int(t) + horizon * step for t in cutoff_ms]
    out = []
    for t in cutoff_ms:
        at = int(t)
        for _ in range(horizon):
            at = next_open(at, interval)
        out.append(at)
    return out


def forecast_rows(
    forecasts: Sequence[Forecast], horizons: Sequence[int], interval: str, model: str, run_id: str
) -> pl.DataFrame:
    """Long frame: identity, quantiles, mean, prob_up, vol, close and ``actual`` (null while unknown).

    ``prob_up`` is the share of the quantile grid's law above zero: one half for a law symmetric about zero.
    """
    time = pl.Datetime("ms", "UTC")
    frames = []
    for f in forecasts:
        cutoff = f.series.close_ms[f.index]
        for i, h in enumerate(horizons):
            q = f.quantiles[:, i]
            actual = f.series.target[f.index, i]
            frames.append(
                pl.DataFrame(
                    {
                        "unique_id": [f.series.unique_id] * len(cutoff),
                        "cutoff": pl.Series(cutoff).cast(time),
                        "ds": pl.Series(_ds(cutoff, h, interval), dtype=pl.Int64).cast(time),
                        "horizon": pl.Series([h] * len(cutoff), dtype=pl.Int32),
                        "model": [model] * len(cutoff),
                        "run_id": [run_id] * len(cutoff),
                        **{name: q[:, k] for k, name in enumerate(QUANTILE_NAMES)},
                        "mean": f.mean[:, i],
                        "prob_up": prob_up(q),
                        "vol": f.vol[:, i],
                        "close": f.series.close[f.index],
                        "actual": pl.Series(actual, nan_to_null=True),
                    }
                )
            )
    return pl.concat(frames) if frames else pl.DataFrame()


def prob_up(quantiles: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N,) 1 − F(0), linear between quantiles and held at 2.5 % and 97.5 % outside them."""
    levels = np.concatenate([[0.025], LEVELS, [0.975]])
    out = np.empty(len(quantiles))
    for row, q in enumerate(quantiles):
        padded = np.concatenate([[q[0] - 1e-12], q, [q[-1] + 1e-12]])
        out[row] = 1 - np.interp(0.0, padded, levels)
    return out


def json_rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows with times as ISO-8601 and NaN as null."""
    out = []
    for row in frame.iter_rows(named=True):
        out.append({k: iso(to_ms(v)) if hasattr(v, "isoformat") else v for k, v in row.items()})
    return out
