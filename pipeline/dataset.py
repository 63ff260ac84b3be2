"""From candles to arrays: regular grids, funding and finer bars joined as of then, targets, and time splits.

    candles ──regular_frame──▶ one row per grid point ──FeatureTransform──▶ SeriesArrays (x, scale, target)

A row at index t is known at ``close_ms[t]``. ``target[t, i]`` is the log return from that close over
``horizons[i]`` bars and is NaN wherever one of its two ends is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recur.pipeline.features import FeatureTransform
from recur.pipeline.newsfeatures import Items, news_columns
from recur.vocabulary import INTERVALS, DataMissing, Series, from_ms, grid, iso, next_open

Floats = NDArray[np.float64]
_TOGETHER = 4
"""Series whose features are computed at once: enough for the cores, few enough for the memory."""


@dataclass(frozen=True, slots=True)
class RawSeries:
    """One series on its regular grid. ``group`` is its source: BTC's state is joined within a group only."""

    unique_id: str
    symbol: str
    group: str
    frame: pl.DataFrame


@dataclass(frozen=True, slots=True)
class SeriesArrays:
    """Arrays of one series; T rows, F features, H horizons.

    ``open_ms``/``close_ms`` (T,) int64; ``close``, ``r``, ``gk``, ``season`` (T,) float64; ``observed`` (T,) bool;
    ``x`` (T, F) float32 standardised; ``scale``, ``season_ahead``, ``target`` (T, H) float64.
    """

    unique_id: str
    symbol: str
    open_ms: NDArray[np.int64]
    close_ms: NDArray[np.int64]
    close: Floats
    observed: NDArray[np.bool_]
    r: Floats
    gk: Floats
    season: Floats
    season_ahead: Floats
    x: NDArray[np.float32]
    scale: Floats
    target: Floats


def regular_frame(
    candles: pl.DataFrame,
    interval: str,
    funding: pl.DataFrame | None = None,
    fine: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Put one series on its full time grid: missing bars are rows of nulls with ``observed`` false.

    ``funding`` (funding_time, rate): the last rate settled at or before each bar's close is joined.
    ``fine`` (candles of a finer interval): realised variance inside each bar, null unless the bar is complete there.
    """
    opens = candles["open_time"]
    times = grid(int(opens.dt.epoch("ms")[0]), int(opens.dt.epoch("ms")[-1]) + 1, interval)
    axis = pl.DataFrame({"open_time": pl.Series(times, dtype=pl.Int64).cast(pl.Datetime("ms", "UTC"))})
    values = candles.select("open_time", "open", "high", "low", "close", "volume", "turnover")
    frame = axis.join(values, on="open_time", how="left", maintain_order="left")
    frame = frame.with_columns(pl.col("close").is_not_null().alias("observed"))
    step = INTERVALS[interval]
    closes = (
        pl.col("open_time") + pl.duration(milliseconds=step)
        if step
        else pl.Series([from_ms(next_open(t, interval)) for t in times], dtype=pl.Datetime("ms", "UTC"))
    )
    frame = frame.with_columns(closes.alias("close_time"))
    if funding is not None and funding.height:
        known = funding.select(pl.col("funding_time").alias("close_time"), pl.col("rate").alias("funding"))
        frame = frame.join_asof(
            known.sort("close_time"), on="close_time", strategy="backward", tolerance="2d"
        )
    else:
        frame = frame.with_columns(pl.lit(None, dtype=pl.Float64).alias("funding"))
    if fine is not None:
        frame = frame.join(realised_inside(fine, interval), on="open_time", how="left", maintain_order="left")
    return frame


def realised_inside(fine: pl.DataFrame, interval: str) -> pl.DataFrame:
    """Realised measures of each coarse bar from its finer bars; bars with a fine bar missing are left out.

    ``fine_rv`` = Σ r² (Andersen & Bollerslev 1998), ``fine_down_share`` = share of negative returns in it
    (Barndorff-Nielsen, Kinnebrock & Shephard 2010), ``fine_jump_share`` = 1 − bipower/rv, at least 0
    (Barndorff-Nielsen & Shephard 2004).
    """
    inner = str(fine["interval"][0])
    per_bar = INTERVALS[interval] // INTERVALS[inner]
    r = (pl.col("close") / pl.col("open")).log()
    bipower = (np.pi / 2) * (pl.col("r").abs() * pl.col("r").abs().shift(1)).sum()
    rv = pl.col("r").pow(2).sum()
    return (
        fine.lazy()
        .select(pl.col("open_time").dt.truncate(interval).alias("bar"), r.alias("r"))
        .group_by("bar", maintain_order=True)
        .agg(
            pl.len().alias("n"),
            rv.alias("fine_rv"),
            (pl.col("r").clip(upper_bound=0).pow(2).sum() / rv).fill_nan(None).alias("fine_down_share"),
            (1 - bipower / rv).clip(0).fill_nan(None).alias("fine_jump_share"),
        )
        .filter(pl.col("n") == per_bar)
        .rename({"bar": "open_time"})
        .drop("n")
        .collect()
    )


def raw_series(
    candles: pl.DataFrame,
    group: str,
    funding: pl.DataFrame | None = None,
    fine: pl.DataFrame | None = None,
    news: Items | None = None,
) -> list[RawSeries]:
    """One RawSeries per (category, symbol) of a candle frame of a single interval."""
    out = []
    for (category, symbol), part in candles.group_by(["category", "symbol"], maintain_order=True):
        interval = str(part["interval"][0])
        own = None if funding is None else funding.filter(pl.col("symbol") == symbol)
        inner = None if fine is None else fine.filter(pl.col("symbol") == symbol)
        unique = str(Series(str(category), str(symbol), interval))
        frame = regular_frame(part.sort("open_time"), interval, own, inner)
        if news is not None:
            closes = frame["close_time"].dt.epoch("ms").to_numpy()
            frame = frame.hstack(news_columns(str(symbol), closes, news))
        out.append(RawSeries(unique if group == "store" else f"{group}:{symbol}", str(symbol), group, frame))
    return out


def raw_features(
    series: Sequence[RawSeries], transform: FeatureTransform
) -> Iterator[tuple[RawSeries, pl.DataFrame]]:
    """Raw features of each series, with the state of BTC of its own group beside it (linear USDT first)."""
    chosen: dict[str, RawSeries] = {}
    for s in series:
        if s.symbol.startswith("BTC") and (s.group not in chosen or s.symbol == "BTCUSDT"):
            chosen[s.group] = s
    ready = {s.unique_id: transform.prepare([s.frame])[0] for s in chosen.values()}
    lead = {group: transform.lead(ready[s.unique_id]) for group, s in chosen.items()}
    for at in range(0, len(series), _TOGETHER):
        part = series[at : at + _TOGETHER]
        new = [s for s in part if s.unique_id not in ready]
        made = dict(zip((s.unique_id for s in new), transform.prepare([s.frame for s in new]), strict=True))
        prepared = [made[s.unique_id] if s.unique_id in made else ready[s.unique_id] for s in part]
        yield from zip(part, transform.raw(prepared, [lead.get(s.group) for s in part]), strict=True)


def fit_transform(
    series: Sequence[RawSeries],
    interval: str,
    horizons: tuple[int, ...],
    until_ms: int,
    has_fine: bool = False,
    has_news: bool = False,
) -> FeatureTransform:
    """Fit season and scaler on the rows that were closed at ``until_ms``, and on nothing later."""
    until = from_ms(until_ms)
    past = [
        RawSeries(s.unique_id, s.symbol, s.group, s.frame.filter(pl.col("close_time") <= until))
        for s in series
    ]
    past = [s for s in past if s.frame.height]
    if not past:
        raise DataMissing(
            f"No bar was closed by the end of the training span, {iso(until_ms)}: nothing is left to train on.",
            "Fetch a longer history ('recur fetch --days'), or lower train.val_days.",
        )
    transform = FeatureTransform(interval=interval, horizons=horizons, has_fine=has_fine, has_news=has_news)
    transform.fit_season([s.frame for s in past])
    transform.fit_scaler([raw for _, raw in raw_features(past, transform)])
    return transform


def arrays(series: Sequence[RawSeries], transform: FeatureTransform) -> list[SeriesArrays]:
    """Model-ready arrays of every series."""
    return [_one(s, raw, transform) for s, raw in raw_features(series, transform)]


def _one(series: RawSeries, raw: pl.DataFrame, transform: FeatureTransform) -> SeriesArrays:
    close = raw["_close"].to_numpy().astype(np.float64)
    log_close = np.log(close)
    target = np.full((len(close), len(transform.horizons)), np.nan)
    for i, h in enumerate(transform.horizons):
        if h < len(close):
            target[:-h, i] = log_close[h:] - log_close[:-h]
    ahead = raw.select([f"_s_{h}" for h in transform.horizons]).to_numpy().astype(np.float64)
    base = raw["_base"].fill_null(np.nan).to_numpy().astype(np.float64)
    return SeriesArrays(
        unique_id=series.unique_id,
        symbol=series.symbol,
        open_ms=series.frame["open_time"].dt.epoch("ms").to_numpy(),
        close_ms=series.frame["close_time"].dt.epoch("ms").to_numpy(),
        close=close,
        observed=raw["_observed"].to_numpy(),
        r=raw["_r"].to_numpy().astype(np.float64),
        gk=raw["_gk"].to_numpy().astype(np.float64),
        season=raw["_s_now"].to_numpy().astype(np.float64),
        season_ahead=ahead,
        x=transform.standardise(raw),
        scale=np.sqrt(base[:, None] * ahead),
        target=target,
    )


def elapsed_bars(observed: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(T,) bars since the last observed bar before each one; 1 where there is none."""
    index = np.arange(len(observed))
    last = np.maximum.accumulate(np.where(observed, index, -1))
    before = np.concatenate([[-1], last[:-1]])
    return np.where(before >= 0, index - before, 1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Split:
    """Spans of one fold, by cutoff (close time of the last bar used), half-open and in this order::

        ├──── train ────┤gap├── validation ──┤gap├──── test ────┤

    A label counts for a span only when it also *ends* inside the span; each gap is one longest horizon.
    """

    train_until_ms: int
    val_since_ms: int
    val_until_ms: int
    test_since_ms: int
    test_until_ms: int

    def as_dict(self) -> dict[str, str]:
        return {name.removesuffix("_ms"): iso(getattr(self, name)) for name in self.__slots__}


def make_split(test_since_ms: int, test_until_ms: int, val_days: int, gap_ms: int) -> Split:
    """The fold that tests ``[test_since, test_until)`` and validates on the ``val_days`` before the gap."""
    val_until = test_since_ms - gap_ms
    val_since = val_until - val_days * 86_400_000
    return Split(val_since - gap_ms, val_since, val_until, test_since_ms, test_until_ms)


def label_mask(
    series: SeriesArrays, horizons: Sequence[int], since_ms: int, until_ms: int
) -> NDArray[np.bool_]:
    """(T, H): the cutoff is at or after ``since_ms``, the label ends at or before ``until_ms``, both ends observed."""
    mask = np.isfinite(series.target) & np.isfinite(series.scale)
    mask &= (series.close_ms >= since_ms)[:, None]
    for i, h in enumerate(horizons):
        ends = np.full(len(series.close_ms), np.iinfo(np.int64).max)
        if h < len(ends):
            ends[:-h] = series.close_ms[h:]
        mask[:, i] &= ends <= until_ms
    return mask
