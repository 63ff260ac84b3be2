"""What training, backtests and forecasts read: stored series, and extra candle files that only training sees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from recur.connectors.files import read_candles
from recur.pipeline.config import Config
from recur.pipeline.dataset import RawSeries, raw_series
from recur.pipeline.newsfeatures import Items, make_items, shuffled_within_month
from recur.storage.store import Store
from recur.vocabulary import INTERVALS, DataMissing, UsageError, did_you_mean, iso


def open_store(home: Path, config: Config) -> Store:
    return Store(home, wait_s=config.store.wait_s)


def stored_series(
    store: Store,
    config: Config,
    since_ms: int | None = None,
    until_ms: int | None = None,
    news: Items | None = None,
) -> list[RawSeries]:
    """The configured series on their grids, with funding and, where configured, finer bars joined in.

    Bars that open in ``[since, until)``. Raises DataMissing naming every symbol that has none.
    """
    market = config.market
    candles = store.candles(market.category, market.symbols, market.interval, "trade", since_ms, until_ms)
    have = set(candles["symbol"].unique())
    absent = [s for s in market.symbols if s not in have]
    if absent:
        stored = set(store.candles(market.category, None, market.interval)["symbol"].unique())
        near = did_you_mean(absent[0], stored)
        raise DataMissing(
            f"The store {store.path} holds no {market.category} {market.interval} candles of {', '.join(absent)}"
            f" in the range asked.{near}",
            f"Run 'recur fetch -s {','.join(absent)} -i {market.interval}' first; 'recur status' lists what is stored.",
        )
    funding = store.funding(market.category, market.symbols, None, until_ms)
    fine = None
    if config.features.fine:
        fine = store.candles(
            market.category, market.symbols, config.features.fine, "trade", since_ms, until_ms
        )
        without = sorted(set(market.symbols) - set(fine["symbol"].unique()))
        if without:
            raise DataMissing(
                f"features.fine is {config.features.fine}, and the store holds no such candles of {', '.join(without)}.",
                f"Run 'recur fetch -i {config.features.fine}', or set features.fine to an empty string.",
            )
    return raw_series(candles, "store", funding, fine, news)


def stored_news(store: Store, config: Config, placebo: int | None = None) -> Items | None:
    """The stored news as the features read them, None where ``features.news`` is off.

    ``placebo``: seed of a shuffle of their times within each month. Raises DataMissing when there are no news, or no
    scores of ``features.news_run``.
    """
    f = config.features
    if not f.news:
        return None
    if not INTERVALS[config.market.interval]:
        raise UsageError(
            f"News are not joined to bars of {config.market.interval}.", "Turn features.news off."
        )
    items = store.news_versions()
    if items.is_empty():
        raise DataMissing(
            f"features.news is on, and the store {store.path} holds no news.",
            "Run 'recur fetch --kinds announcements' or 'recur fetch --source NEWSFILE', or turn it off.",
        )
    scores = store.sentiment(f.news_run) if f.news_run else None
    if scores is not None and scores.is_empty():
        raise DataMissing(
            f"The store holds no scores of features.news_run = {f.news_run}.",
            f"Run 'recur sentiment --stored --run {f.news_run}' first.",
        )
    if placebo is not None:
        items = shuffled_within_month(items, placebo)
    return make_items(items, scores, f.news_latency_s)


def pool_series(paths: Sequence[str], config: Config, news: Items | None = None) -> list[RawSeries]:
    """Series of candle files used for training beside the stored ones; each file is a source of its own."""
    out: list[RawSeries] = []
    for path in paths:
        candles = read_candles(path, category=config.market.category)
        fitting = candles.filter(pl.col("interval") == config.market.interval)
        if fitting.is_empty():
            raise UsageError(
                f"{path} holds no {config.market.interval} candles; found {', '.join(candles['interval'].unique())}.",
                "Pool files must have the interval that is forecast.",
            )
        group = Path(path).name.split(".")[0]
        fine = None
        if config.features.fine:
            inner = candles.filter(pl.col("interval") == config.features.fine)
            fine = (
                inner
                if inner.height
                else fitting.with_columns(pl.lit(config.features.fine).alias("interval")).clear()
            )
        out += raw_series(fitting, group, None, fine, news)
    return out


def snapshot(series: Sequence[RawSeries]) -> list[dict[str, Any]]:
    """What data a run saw: per series the range, the bars present and a hash of their times and prices."""
    out = []
    for s in series:
        seen = s.frame.filter(pl.col("observed"))
        digest = hashlib.sha256()
        for column in ("open_time", "open", "high", "low", "close"):
            digest.update(seen[column].to_physical().to_numpy().tobytes())
        opens = seen["open_time"].dt.epoch("ms")
        out.append(
            {
                "series": s.unique_id,
                "rows": seen.height,
                "missing": s.frame.height - seen.height,
                "first": iso(int(opens[0])),
                "last": iso(int(opens[-1])),
                "sha256": digest.hexdigest(),
            }
        )
    return out


def data_end_ms(series: Sequence[RawSeries]) -> int:
    """Latest close time of any bar."""
    return max(int(s.frame["close_time"].dt.epoch("ms")[-1]) for s in series)
