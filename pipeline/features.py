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

from recur.pipeline.newsfeatures import NAMES as NEWS
from recur.pipeline.newsfeatures import lookback_bars
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


def _by_week(values: NDArray[np.float64]) -> pl.Expr:
    """The value that belongs to the bar's position in the week."""
    return pl.lit(pl.Series(values)).gather(pl.col("at"))


def _circle(turns: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.sin(2 * np.pi * turns), np.cos(2 * np.pi * turns)


def _position(interval: str) -> pl.Expr:
    """Index of the bar within its week, Monday 00:00 UTC = 0."""
    n = week_positions(interval)
    if n == 1:
        return pl.lit(0, dtype=pl.Int64)
    ms = pl.col("open_time").dt.epoch("ms")
    return ((ms - _MONDAY_MS) % WEEK_MS) // INTERVALS[interval]


def bar_columns(interval: str, has_fine: bool) -> list[pl.Expr]:
    """First layer: what one bar tells by itself (log return, range variances), null where the bar is missing."""
    o, h, low, c = (pl.col(k) for k in ("open", "high", "low", "close"))
    hl2 = (h / low).log().pow(2)
    columns = [
        _position(interval).alias("at"),
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


def season_ahead(season: NDArray[np.float64], h: int) -> NDArray[np.float64]:
    """Season summed over the next ``h`` bars, by position in the week."""
    ahead: NDArray[np.float64] = np.sum([np.roll(season, -k) for k in range(1, h + 1)], axis=0)
    return ahead


def season_columns(season: NDArray[np.float64], horizons: Sequence[int]) -> list[pl.Expr]:
    """Season of this bar (``s_now``) and the season summed over the next h bars (``s_h``)."""
    ahead = [_by_week(season_ahead(season, h)).alias(f"s_{h}") for h in horizons]
    return [_by_week(season).alias("s_now"), *ahead]


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
        (pl.col("open_time").dt.ordinal_day() - 1).alias("day"),
    ]


def catalogue(
    interval: str,
    horizons: Sequence[int],
    season: NDArray[np.float64],
    has_fine: bool,
    has_news: bool = False,
) -> list[Feature]:
    """All features, in the order in which the model sees them."""
    r, slow = pl.col("r"), ewm_lookback(BASE_DECAY)
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
    out += calendar(interval)
    out.append(Feature("season_now", _by_week(np.log(season)), 1))
    out += [Feature(f"season_{h}", _by_week(np.log(season_ahead(season, h) / h)), 1) for h in horizons]
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
    if has_news:
        out += [Feature(name, pl.col(name), lookback_bars(INTERVALS[interval])) for name in NEWS]
    return out


def calendar(interval: str) -> list[Feature]:
    """Hour of the day, day of the week, weekend and time of the year, looked up by position."""
    n = week_positions(interval)
    week = np.arange(n) / n
    out = []
    for name, turns in (("hour", week * 7 % 1), ("week", week)):
        sine, cosine = _circle(turns)
        out += [Feature(f"{name}_sin", _by_week(sine), 1), Feature(f"{name}_cos", _by_week(cosine), 1)]
    for name, values in zip(("month_sin", "month_cos"), _circle(np.arange(366) / 366), strict=True):
        out.append(Feature(name, pl.lit(pl.Series(values)).gather(pl.col("day")), 1))
    out.append(Feature("weekend", _by_week((week >= 5 / 7).astype(np.float64)), 1))
    return out


def _place(bars: int) -> pl.Expr:
    # The kernels for columns without nulls are several times faster: an absent bar is no high and no low.
    top = pl.col("high").fill_null(float("-inf")).rolling_max(bars, min_samples=1)
    bottom = pl.col("low").fill_null(float("inf")).rolling_min(bars, min_samples=1)
    return (pl.col("close") - bottom) / (top - bottom)


BTC_COLUMNS = ("btc_z", "btc_log_base", "btc_gk_1", "btc_gk_24")


def _beside(own: pl.DataFrame, lead: pl.DataFrame | None) -> pl.DataFrame:
    """BTC's columns, row by row beside ``own``. Both lie on the full grid of one interval: one offset aligns them."""
    none = pl.DataFrame(schema=dict.fromkeys(BTC_COLUMNS, pl.Float64)).clear(own.height)
    if lead is None:
        return none
    before = int(own["open_time"].search_sorted(lead["open_time"][0]))
    part = lead.slice(int(lead["open_time"].search_sorted(own["open_time"][0])), own.height - before)
    if part.height == own.height:
        return part.select(BTC_COLUMNS)
    after = own.height - before - part.height
    return pl.concat([none.head(before), part.select(BTC_COLUMNS), none.head(after)])


@dataclass(slots=True)
class FeatureTransform:
    """What turns regular candle frames into model inputs; identical in training and serving.

    ``season``: relative variance per position of the week, mean 1. ``mean``/``std``: scaler of each feature.
    """

    interval: str
    horizons: tuple[int, ...]
    has_fine: bool = False
    has_news: bool = False
    season: NDArray[np.float64] = field(default_factory=lambda: np.ones(1))
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    std: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def features(self) -> list[Feature]:
        return catalogue(self.interval, self.horizons, self.season, self.has_fine, self.has_news)

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
                .with_columns(bar_columns(self.interval, False))
                .select(
                    "at",
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
        stacked = np.concatenate([frame.select("^[^_].*$").to_numpy() for frame in raw])
        stacked = np.where(np.isfinite(stacked), stacked, np.nan)
        seen = np.isfinite(stacked).sum(axis=0)
        total = np.nansum(stacked, axis=0)
        self.mean = total / np.maximum(seen, 1)
        self.std = np.sqrt(np.nansum((stacked - self.mean) ** 2, axis=0) / np.maximum(seen, 1))
        self.std = np.where(self.std < 1e-8, 1.0, self.std)

    def prepare(self, frames: Sequence[pl.DataFrame]) -> list[pl.DataFrame]:
        """What features are made of, beside the columns of the regular candle frame of each series."""
        plans = [
            frame.lazy()
            .with_columns(bar_columns(self.interval, self.has_fine))
            .with_columns(season_columns(self.season, self.horizons))
            .with_columns(base_column())
            .with_columns(shared_columns())
            for frame in frames
        ]
        return pl.collect_all(plans, optimizations=_AS_WRITTEN)

    def lead(self, prepared: pl.DataFrame) -> pl.DataFrame:
        """BTC's own state, to be given to :meth:`raw` of every series of the same source."""
        flat = pl.col("flat_gk")
        return (
            prepared.lazy()
            .select(
                "open_time",
                pl.col("z").alias("btc_z"),
                pl.col("log_base").alias("btc_log_base"),
                _log_ratio(flat).alias("btc_gk_1"),
                _log_ratio(_mean(flat, 24)).alias("btc_gk_24"),
            )
            .collect(optimizations=_AS_WRITTEN)
        )

    def raw(
        self, prepared: Sequence[pl.DataFrame], leads: Sequence[pl.DataFrame | None]
    ) -> list[pl.DataFrame]:
        """Raw features of each series, from what :meth:`prepare` and, for its BTC, :meth:`lead` gave.

        Absent values are null or NaN. Columns with a leading underscore are the helpers that scales and targets
        are made of.
        """
        keep = ["open_time", "close", "observed", "r", "gk", "s_now", "base"]
        keep += [f"s_{h}" for h in self.horizons]
        # A feature may bear the name of a column (``observed``), hence the underscore.
        out = [pl.col(c).alias(f"_{c}") for c in keep] + [f.expr.alias(f.name) for f in self.features]
        plans = [
            own.hstack(_beside(own, lead)).lazy().select(out)
            for own, lead in zip(prepared, leads, strict=True)
        ]
        return pl.collect_all(plans, optimizations=_AS_WRITTEN)

    def standardise(self, raw: pl.DataFrame) -> NDArray[np.float32]:
        """(rows, features) float32; absent values become 0, the mean, and ``observed`` says so."""
        x = (raw.select("^[^_].*$").to_numpy() - self.mean) / self.std
        return np.clip(np.nan_to_num(x, nan=0.0, posinf=CLIP, neginf=-CLIP), -CLIP, CLIP).astype(np.float32)

    def as_dict(self) -> dict[str, Any]:
        return {
            "interval": self.interval,
            "horizons": list(self.horizons),
            "has_fine": self.has_fine,
            "has_news": self.has_news,
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
            has_news=spec.get("has_news", False),  # runs of before there were news
            season=np.asarray(spec["season"], dtype=np.float64),
            mean=np.asarray(spec["scaler"]["mean"], dtype=np.float64),
            std=np.asarray(spec["scaler"]["std"], dtype=np.float64),
        )
        return made
