"""Forecasts as rows of the public long form (one per series, cutoff and horizon), in frames and in JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl

from recur.pipeline.inference import Forecast
from recur.pipeline.metrics import LEVELS, pit
from recur.vocabulary import INTERVALS, iso, next_open, to_ms

QUANTILE_NAMES = tuple(f"q{round(100 * level):02d}" for level in LEVELS)

SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "unique_id": pl.String,
    "cutoff": pl.Datetime("ms", "UTC"),
    "ds": pl.Datetime("ms", "UTC"),
    "horizon": pl.Int32,
    "model": pl.String,
    "run_id": pl.String,
    **dict.fromkeys((*QUANTILE_NAMES, "mean", "prob_up", "vol", "close", "actual"), pl.Float64),
}


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
    frames = [pl.DataFrame(schema=SCHEMA)]
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
                    },
                    schema=SCHEMA,
                )
            )
    return pl.concat(frames)


def prob_up(quantiles: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N,) 1 − F(0), linear between quantiles and held at 2.5 % and 97.5 % outside them."""
    return 1 - pit(np.zeros(len(quantiles)), quantiles)


def json_rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows with times as ISO-8601 and NaN as null."""
    return [{k: _plain(v) for k, v in row.items()} for row in frame.iter_rows(named=True)]


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return iso(to_ms(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
