"""Causal features: named lazy polars expressions, each with its lookback, in one object for training and serving.

Every expression looks only at its own row and earlier rows of one series on a regular time grid; a missing bar is
a row of nulls. :class:`FeatureTransform` holds what is *fitted* (the season of the week and the scaler), both from
the training span alone, and is saved with the model, so that serving computes exactly what training saw.

Variance of one bar is estimated from its range (Garman & Klass 1980, Parkinson 1980), far less noisy than r².
The **base scale** is an exponentially weighted mean of the de-seasonalised range variance; what a forecast of ``h``
bars is expressed in is ``scale_h = sqrt(base · Σ_{k≤h} season(t+k))``. Volatility features are logarithms of
ratios to the base, so that one model serves a quiet and a wild market alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recur.vocabulary import INTERVALS, WEEK_MS

_MONDAY_MS = 4 * 86_400_000
BASE_DECAY = 0.94
"""Decay per bar of the base variance (RiskMetrics' 0.94)."""
VARIANCE_FLOOR = 1e-10
"""Smallest variance of one bar; below it (0.001 % per bar) a market is taken as not moving."""
_AS_WRITTEN = pl.QueryOptFlags.none()
"""Fifty short expressions over columns already made: looking for common parts costs more than it saves."""
CLIP = 6.0
"""Standardised features are cut to ±CLIP."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One named feature. ``lookback``: how many bars, its own included, its value can depend on."""

    name: str
    expr: pl.Expr
    lookback: int


def ewm_lookback(decay: float) -> int:
    """Bars after which the weight left in an exponential mean is below 1e-9."""
    return int(np.ceil(np.log(1e-9) / np.log(decay)))


def _ewm(expr: pl.Expr, decay: float) -> pl.Expr:
    return expr.ewm_mean(alpha=1 - decay, adjust=True, ignore_nulls=True)


def _mean(expr: pl.Expr, bars: int) -> pl.Expr:
    if bars == 1:
        return expr
    return expr.rolling_mean(bars, min_samples=max(1, bars // 2))


def _log_ratio(variance: pl.Expr) -> pl.Expr:
    """Half the log of a variance over the base: the log ratio of two volatilities."""
    return 0.5 * ((variance + VARIANCE_FLOOR).log() - pl.col("log_base"))


def week_positions(interval: str) -> int:
    """Bars in a week (1 for week and month bars, which have no season of the week)."""
    step = INTERVALS[interval]
    return WEEK_MS // step if 0 < step < WEEK_MS else 1


def _position(interval: str) -> pl.Expr:
    """Index of the bar within its week, Monday 00:00 UTC = 0."""
    n = week_positions(interval)
    if n == 1:
        return pl.lit(0, dtype=pl.Int64)
    ms = pl.col("open_time").dt.epoch("ms")
    return ((ms - _MONDAY_MS) % WEEK_MS) // INTERVALS[interval]


def bar_columns(has_fine: bool) -> list[pl.Expr]:
    """First layer: what one bar tells by itself (log return, range variances), null where the bar is missing."""
    o, h, low, c = (pl.col(k) for k in ("open", "high", "low", "close"))
    hl2 = (h / low).log().pow(2)
    columns = [
        c.log().diff().alias("r"),
        (hl2 / (4 * np.log(2))).alias("parkinson"),
        (0.5 * hl2 - (2 * np.log(2) - 1) * (c / o).log().pow(2)).clip(0).alias("gk"),
        ((c - low) / (h - low)).alias("place"),
        (pl.col("volume") + 1).log().alias("lv"),
        (pl.coalesce(pl.col("turnover"), pl.col("volume") * (h + low + c) / 3) + 1).log().alias("lt"),
    ]
    if has_fine:
        columns.append(pl.col("fine_rv").alias("rv_in"))
    return columns


def season_columns(interval: str, season: NDArray[np.float64], horizons: Sequence[int]) -> list[pl.Expr]:
    """Season of this bar (``s_now``) and the season summed over the next h bars (``s_h``), by position in the week."""
    at = _position(interval)
    columns = [pl.lit(pl.Series(season)).gather(at).alias("s_now")]
    for h in horizons:
        ahead = sum(np.roll(season, -k) for k in range(1, h + 1))
        columns.append(pl.lit(pl.Series(np.asarray(ahead, dtype=np.float64))).gather(at).alias(f"s_{h}"))
    return columns


def base_column() -> pl.Expr:
    """The base variance: per bar of average season, known at this bar's close."""
    return _ewm(pl.col("gk") / pl.col("s_now"), BASE_DECAY).forward_fill().clip(VARIANCE_FLOOR).alias("base")


def shared_columns() -> list[pl.Expr]:
    """Third layer: what several features are made of, computed once."""
    r, base, season = pl.col("r"), pl.col("base"), pl.col("s_now")
    return [
        (r / (base * season).sqrt()).clip(-20, 20).alias("z"),
        (r * r).alias("r2"),
        r.abs().alias("abs_r"),
        (r * r / season).alias("flat_r2"),
        (pl.col("gk") / season).alias("flat_gk"),
        (pl.col("parkinson") / season).alias("flat_parkinson"),
        base.log().alias("log_base"),
        base.sqrt().alias("root_base"),
        (r.abs() / pl.col("lt")).alias("impact"),
        pl.col("open_time").dt.epoch("ms").alias("ms"),
    ]


def catalogue(interval: str, horizons: Sequence[int], has_fine: bool) -> list[Feature]:
    """All features, in the order in which the model sees them."""
    r, ms, slow = pl.col("r"), pl.col("ms"), ewm_lookback(BASE_DECAY)
    out = [
        Feature("observed", pl.col("observed").cast(pl.Float64), 1),
        Feature("ret_1", pl.col("z"), slow + 2),
    ]
    out += [
        Feature(
            f"ret_{n}",
            r.rolling_sum(n, min_samples=max(1, n // 2)) / (pl.col("root_base") * n**0.5),
            slow + n,
        )
        for n in (3, 6, 24, 72, 168)
    ]
    out += [
        Feature(f"rv_{n}", _log_ratio(_mean(pl.col("flat_r2"), n)), slow + n + 1)
        for n in (1, 6, 24, 72, 168, 720)
    ]
    out += [
        Feature(f"gk_{n}", _log_ratio(_mean(pl.col("flat_gk"), n)), slow + n)
        for n in (1, 3, 6, 24, 72, 168, 720)
    ]
    out += [
        Feature(f"parkinson_{n}", _log_ratio(_mean(pl.col("flat_parkinson"), n)), slow + n) for n in (1, 24)
    ]
    down = r.clip(upper_bound=0).pow(2)
    out += [
        Feature("base_level", 0.5 * pl.col("log_base"), slow),
        Feature("down_share_24", _mean(down, 24) / (_mean(pl.col("r2"), 24) + VARIANCE_FLOOR), 25),
        Feature(
            "jump_24",
            (
                pl.col("abs_r").rolling_max(24, min_samples=12)
                / (_mean(pl.col("gk"), 24) + VARIANCE_FLOOR).sqrt()
            ).log1p(),
            25,
        ),
        Feature("volume_1", pl.col("lv") - _mean(pl.col("lv"), 168), 168),
        Feature("volume_24", _mean(pl.col("lv"), 24) - _mean(pl.col("lv"), 720), 720),
        Feature("volume_same_hour", pl.col("lv") - _mean(pl.col("lv").shift(24), 1), 25),
        Feature("turnover_1", pl.col("lt") - _mean(pl.col("lt"), 24), 24),
        Feature("turnover_6", _mean(pl.col("lt"), 6) - _mean(pl.col("lt"), 168), 168),
        Feature(
            "impact_24",
            (_mean(pl.col("impact"), 24) / _mean(pl.col("impact"), 168)).log(),
            169,
        ),
        Feature("place_in_bar", pl.col("place"), 1),
        Feature("place_24", _place(24), 24),
        Feature("place_168", _place(168), 168),
        Feature("trend_24", _ewm(pl.col("z"), 1 - 1 / 24), slow + ewm_lookback(1 - 1 / 24)),
        Feature("trend_168", _ewm(pl.col("z"), 1 - 1 / 168), slow + ewm_lookback(1 - 1 / 168)),
    ]
    for name, period in (("hour", 86_400_000), ("week", WEEK_MS)):
        angle = (ms - _MONDAY_MS) % period / period * (2 * np.pi)
        out += [Feature(f"{name}_sin", angle.sin(), 1), Feature(f"{name}_cos", angle.cos(), 1)]
    month = (pl.col("open_time").dt.ordinal_day() - 1) / 366 * (2 * np.pi)
    out += [
        Feature("month_sin", month.sin(), 1),
        Feature("month_cos", month.cos(), 1),
        Feature("weekend", (pl.col("open_time").dt.weekday() >= 6).cast(pl.Float64), 1),
        Feature("season_now", pl.col("s_now").log(), 1),
    ]
    out += [Feature(f"season_{h}", (pl.col(f"s_{h}") / h).log(), 1) for h in horizons]
    out += [
        Feature("funding", (pl.col("funding") * 1e4).clip(-50, 50), 1),
        Feature(
            "funding_change", ((pl.col("funding") - pl.col("funding").shift(24)) * 1e4).clip(-50, 50), 25
        ),
        Feature("btc_ret_1", pl.col("btc_z"), slow + 2),
        Feature("btc_ret_24", _mean(pl.col("btc_z"), 24), slow + 24),
        Feature("btc_gk_1", pl.col("btc_gk_1"), slow + 1),
        Feature("btc_gk_24", pl.col("btc_gk_24"), slow + 24),
        Feature("btc_base", 0.5 * (pl.col("btc_log_base") - pl.col("log_base")), slow),
    ]
    if has_fine:
        out += [
            Feature(f"fine_{n}", _log_ratio(_mean(pl.col("rv_in") / pl.col("s_now"), n)), slow + n)
            for n in (1, 6, 24)
        ]
        out.append(Feature("fine_down_share", pl.col("fine_down_share"), 1))
        out.append(Feature("fine_jump_share", pl.col("fine_jump_share"), 1))
    return out


def _place(bars: int) -> pl.Expr:
    # The kernels for columns without nulls are several times faster: an absent bar is no high and no low.
    top = pl.col("high").fill_null(float("-inf")).rolling_max(bars, min_samples=1)
    bottom = pl.col("low").fill_null(float("inf")).rolling_min(bars, min_samples=1)
    return (pl.col("close") - bottom) / (top - bottom)


BTC_COLUMNS = ("btc_z", "btc_log_base", "btc_gk_1", "btc_gk_24")


def _lead(frame: pl.LazyFrame) -> pl.LazyFrame:
    """BTC's own state, to be joined to the other series of the same source by open time."""
    flat = pl.col("flat_gk")
    return frame.select(
        "open_time",
        pl.col("z").alias("btc_z"),
        pl.col("log_base").alias("btc_log_base"),
        _log_ratio(flat).alias("btc_gk_1"),
        _log_ratio(_mean(flat, 24)).alias("btc_gk_24"),
    )


@dataclass(slots=True)
class FeatureTransform:
    """What turns regular candle frames into model inputs; identical in training and serving.

    ``season``: relative variance per position of the week, mean 1. ``mean``/``std``: scaler of each feature.
    """

    interval: str
    horizons: tuple[int, ...]
    has_fine: bool = False
    season: NDArray[np.float64] = field(default_factory=lambda: np.ones(1))
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    std: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def features(self) -> list[Feature]:
        return catalogue(self.interval, self.horizons, self.has_fine)

    @property
    def names(self) -> list[str]:
        return [f.name for f in self.features]

    @property
    def lookback(self) -> int:
        """Bars of history that a feature row needs."""
        return max(f.lookback for f in self.features)

    def fit_season(self, frames: Sequence[pl.DataFrame]) -> None:
        """Mean ratio of a bar's range variance to its trailing week, by position in the week.

        Shrunk towards 1 by 20 pseudo-observations. ``frames`` must end where the training span ends.
        """
        n = week_positions(self.interval)
        sums, counts = np.full(n, 20.0), np.full(n, 20.0)
        for frame in frames:
            level = _mean(pl.col("gk"), n)
            ratio = (
                frame.lazy()
                .with_columns(bar_columns(False))
                .select(
                    _position(self.interval).alias("at"),
                    (pl.col("gk") / level).fill_nan(None).clip(0, 20).alias("ratio"),
                )
            )
            got = ratio.drop_nulls().group_by("at").agg(pl.sum("ratio"), pl.len().alias("n")).collect()
            at = got["at"].to_numpy()
            sums[at] += got["ratio"].to_numpy()
            counts[at] += got["n"].to_numpy()
        season = sums / counts
        self.season = season / season.mean()

    def fit_scaler(self, raw: Sequence[pl.DataFrame]) -> None:
        """Mean and standard deviation of each feature over the rows given (the training span)."""
        names = self.names
        stacked = np.concatenate([frame.select(names).to_numpy() for frame in raw])
        stacked = np.where(np.isfinite(stacked), stacked, np.nan)
        seen = np.isfinite(stacked).sum(axis=0)
        total = np.nansum(stacked, axis=0)
        self.mean = total / np.maximum(seen, 1)
        self.std = np.sqrt(np.nansum((stacked - self.mean) ** 2, axis=0) / np.maximum(seen, 1))
        self.std = np.where(self.std < 1e-8, 1.0, self.std)

    def lead(self, frame: pl.DataFrame) -> pl.DataFrame:
        """BTC's state from its regular frame, to be given to ``raw`` of every series of the same source."""
        return _lead(self._prepared(frame)).collect(optimizations=_AS_WRITTEN)

    def raw(self, frame: pl.DataFrame, lead: pl.DataFrame | None) -> pl.DataFrame:
        """Raw features of one series. ``frame``: regular candle frame; ``lead``: what :meth:`lead` gave, if any.

        Absent values are null or NaN. Columns with a leading underscore are the helpers that scales and targets are made of.
        """
        own = self._prepared(frame)
        if lead is None:
            own = own.with_columns(*(pl.lit(None, dtype=pl.Float64).alias(c) for c in BTC_COLUMNS))
        else:
            own = own.join(lead.lazy(), on="open_time", how="left", maintain_order="left")
        out = [f.expr.alias(f.name) for f in self.features]
        keep = [
            "open_time",
            "close",
            "observed",
            "r",
            "gk",
            "s_now",
            "base",
            *(f"s_{h}" for h in self.horizons),
        ]
        # A feature may bear the name of a column (``observed``), hence the underscore.
        helper = [pl.col(c).alias(f"_{c}") for c in keep]
        return own.select(*helper, *out).collect(optimizations=_AS_WRITTEN)

    def _prepared(self, frame: pl.DataFrame) -> pl.LazyFrame:
        return (
            frame.lazy()
            .with_columns(bar_columns(self.has_fine))
            .with_columns(season_columns(self.interval, self.season, self.horizons))
            .with_columns(base_column())
            .with_columns(shared_columns())
        )

    def standardise(self, raw: pl.DataFrame) -> NDArray[np.float32]:
        """(rows, features) float32; absent values become 0, the mean, and ``observed`` says so."""
        x = (raw.select(self.names).to_numpy() - self.mean) / self.std
        return np.clip(np.nan_to_num(x, nan=0.0, posinf=CLIP, neginf=-CLIP), -CLIP, CLIP).astype(np.float32)

    def as_dict(self) -> dict[str, Any]:
        return {
            "interval": self.interval,
            "horizons": list(self.horizons),
            "has_fine": self.has_fine,
            "features": [{"name": f.name, "lookback": f.lookback} for f in self.features],
            "scaler": {"mean": self.mean.tolist(), "std": self.std.tolist()},
            "season": self.season.tolist(),
            "targets": [f"log return over {h} bars" for h in self.horizons],
        }

    @classmethod
    def from_dict(cls, spec: dict[str, Any]) -> FeatureTransform:
        made = cls(
            interval=spec["interval"],
            horizons=tuple(spec["horizons"]),
            has_fine=spec["has_fine"],
            season=np.asarray(spec["season"], dtype=np.float64),
            mean=np.asarray(spec["scaler"]["mean"], dtype=np.float64),
            std=np.asarray(spec["scaler"]["std"], dtype=np.float64),
        )
        return made
