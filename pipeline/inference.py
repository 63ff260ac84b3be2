"""Forecasts of a trained network over stretches of bars, back in log-return units.

A forecast starts its recurrence a full training window before the first cutoff that is asked for, so that a
forecast for one bar and the same bar inside a long backtest come from equally warm states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from recur.models.forecaster import Forecaster
from recur.pipeline.dataset import SeriesArrays, elapsed_bars

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Forecast:
    """Rows of one series. ``index`` (N,) into the series; ``quantiles`` (N, H, Q); ``mean``, ``vol`` (N, H)."""

    series: SeriesArrays
    index: NDArray[np.int64]
    quantiles: Floats
    mean: Floats
    vol: Floats


def cutoffs(series: SeriesArrays, since_ms: int, until_ms: int) -> NDArray[np.int64]:
    """Indices whose close lies in ``[since, until)``, whose bar was observed and whose scale is known."""
    ok = (series.close_ms >= since_ms) & (series.close_ms < until_ms) & series.observed
    ok &= np.isfinite(series.scale).all(axis=1)
    return np.flatnonzero(ok)


@torch.inference_mode()
def forecast(
    net: Forecaster,
    series: Sequence[SeriesArrays],
    symbols: dict[str, int],
    since_ms: int,
    until_ms: int,
    warm_up: int,
) -> list[Forecast]:
    """Forecasts of every series at each of its cutoffs in ``[since, until)``; series without one are left out."""
    net.eval()
    out = []
    for s in series:
        index = cutoffs(s, since_ms, until_ms)
        if not len(index):
            continue
        first = max(0, int(index[0]) - warm_up)
        used = slice(first, int(index[-1]) + 1)
        marks = net.steps(
            torch.from_numpy(s.observed[used].copy())[None],
            torch.from_numpy(elapsed_bars(s.observed)[used])[None],
        )
        x = torch.from_numpy(s.x[used])[None]
        got, _ = net(x, torch.tensor([symbols.get(s.symbol, 0)]), None, marks)
        rows = index - first
        scale = s.scale[index]
        out.append(
            Forecast(
                s,
                index,
                got.quantiles[0].numpy().astype(np.float64)[rows] * scale[..., None],
                got.mean[0].numpy().astype(np.float64)[rows] * scale,
                np.exp(0.5 * got.log_var[0].numpy().astype(np.float64)[rows]) * scale,
            )
        )
    return out
