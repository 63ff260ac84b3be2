"""Labels from the market: what the price did after a text was published.

For an item that becomes usable at ``t`` (publication plus latency; the next midnight when only its day is known) the
reaction over ``bars`` bars is the abnormal log return from the open of the first bar at or after ``t``, in units of
what was to be expected before::

    z = (r − β m) / (σ √bars)

with r the symbol's and m the market's log return over the window, and σ the standard deviation of r_1 − β m_1 of single
bars and β its slope over the ``history`` bars that closed before ``t`` (event study with estimation window, MacKinlay
1997, J. Economic Literature 35, §4). Beyond ±``threshold`` the item is positive or negative, between them neutral.

A label is known only at ``known_ms``, when its window has closed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recur.vocabulary import DAY_MS, DataMissing, UsageError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


BEFORE, AFTER = "before the candles and their history", "after the candles"
MISSING, STILL = "bars are missing", "the price never moved"
UNKNOWN = (BEFORE, AFTER, MISSING, STILL)
"""Why an item has no label."""


@dataclass(frozen=True, slots=True)
class ReactionPlan:
    """``bars`` the price has to react, ``threshold`` in standard deviations, ``history`` bars to know σ and β from."""

    bars: int = 4
    threshold: float = 0.75
    history: int = 168
    latency_ms: int = 60_000

    def __post_init__(self) -> None:
        if self.bars < 1 or self.history < 24 or self.threshold <= 0 or self.latency_ms < 0:
            raise UsageError(
                f"{self}: expected bars ≥ 1, history ≥ 24, threshold > 0 and latency ≥ 0.", "Mend the plan."
            )


def usable_ms(published_ms: IntArray, day_only: NDArray[np.bool_], latency_ms: int) -> IntArray:
    """When an item may be used: after ``latency_ms``; from the end of its day when only the day is known."""
    end_of_day = published_ms - published_ms % DAY_MS + DAY_MS
    return np.where(day_only, end_of_day, published_ms) + latency_ms


def reactions(
    published_ms: IntArray,
    day_only: NDArray[np.bool_],
    candles: pl.DataFrame,
    step_ms: int,
    plan: ReactionPlan,
    market: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """One row per item: ``usable_ms, known_ms, z, label`` (−1, 0, 1 as Int64) and ``why``; z and label are null where
    unknown, and ``why``, else null, is one of ``UNKNOWN``: the window or its history reach beyond the candles, a bar of
    the window or more than a tenth of the history is missing, or prices never moved.

    ``candles`` and ``market`` hold ``open_time, open, close``, sorted, one row per bar of ``step_ms``; without a market
    β is 0. Whether a window lies inside the candles depends on their times alone.
    Raises DataMissing when ``candles`` has no row.
    """
    if candles.is_empty():
        raise DataMissing("There are no candles to measure reactions on.", "recur fetch brings them.")
    opens, single = _grid(candles, step_ms)
    base = np.zeros_like(single)
    if market is not None:
        their_opens, their_single = _grid(market, step_ms)
        at = (opens - their_opens[0]) // step_ms
        inside = (at >= 0) & (at < len(their_single))
        base = np.where(inside, their_single[np.clip(at, 0, len(their_single) - 1)], np.nan)
    usable = usable_ms(published_ms, day_only, plan.latency_ms)
    first = -(-(usable - opens[0]) // step_ms)  # the first bar that opens at or after the item is usable
    z = np.full(len(usable), np.nan)
    why: list[str | None] = [None] * len(usable)
    for k, i in enumerate(first.tolist()):
        end = i + plan.bars
        if i - plan.history < 0 or end > len(opens):
            why[k] = BEFORE if i - plan.history < 0 else AFTER
            continue
        r, m = single[i - plan.history : i], base[i - plan.history : i]
        known = np.isfinite(r) & np.isfinite(m)
        inner = np.concatenate([single[i:end], base[i:end]])
        if known.sum() < 0.9 * plan.history or not np.isfinite(inner).all():
            why[k] = MISSING
            continue
        beta = (
            float(np.cov(r[known], m[known])[0, 1] / v) if (v := float(np.var(m[known], ddof=1))) > 0 else 0.0
        )
        sigma = float(np.std(r[known] - beta * m[known], ddof=1))
        abnormal = single[i:end].sum() - beta * base[i:end].sum()
        if sigma > 0:
            z[k] = abnormal / (sigma * np.sqrt(plan.bars))
        else:
            why[k] = STILL
    label = np.where(z > plan.threshold, 1, np.where(z < -plan.threshold, -1, 0))
    frame = pl.DataFrame(
        {"usable_ms": usable, "known_ms": opens[0] + (first + plan.bars) * step_ms, "z": z, "label": label},
    ).with_columns(pl.Series("why", why, dtype=pl.String))
    unknown = pl.col("z").is_nan()
    return frame.with_columns(pl.when(~unknown).then(c).alias(c) for c in ("z", "label"))


def _grid(candles: pl.DataFrame, step_ms: int) -> tuple[IntArray, FloatArray]:
    """(open times, log return of each bar from its open to its close) on a grid without holes."""
    times = candles["open_time"].dt.epoch("ms").to_numpy()
    at = (times - times[0]) // step_ms
    size = int(at[-1]) + 1
    single = np.full(size, np.nan)
    single[at] = np.log(candles["close"].to_numpy() / candles["open"].to_numpy())
    return times[0] + step_ms * np.arange(size, dtype=np.int64), single
