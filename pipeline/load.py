"""What training, backtests and forecasts read: stored series, and extra candle files that only training sees."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from recur.connectors.files import read_candles
from recur.pipeline.certificate import UNEXPLAINED, holes
from recur.pipeline.config import Config
from recur.pipeline.dataset import RawSeries, raw_series
from recur.pipeline.newsfeatures import Items, make_items, shuffled_within_month
from recur.storage.runs import RunFolder
from recur.storage.store import Store
from recur.vocabulary import (
    INTERVALS,
    DataMissing,
    Series,
    UsageError,
    did_you_mean,
    floor_open,
    iso,
    parse_time,
)

_log = logging.getLogger(__name__)


def open_store(home: Path, config: Config) -> Store:
    return Store(home, wait_s=config.store.wait_s)


def stored_series(
    store: Store,
    config: Config,
    since_ms: int | None = None,
    until_ms: int | None = None,
    as_of_ms: int | None = None,
    news: Items | None = None,
) -> list[RawSeries]:
    """The configured series on their grids, with funding and, where configured, finer bars joined in.

    Bars that open in ``[since, until)``. Raises DataMissing naming every symbol that has none.

    ``as_of_ms``: what the store knew then, later revisions undone. A store that was not following the market then (it
    had seen none of the last two bars) answers with the first values of what it learned later.
    """
    market = config.market
    first_values = as_of_ms is not None and not _followed(store, config, as_of_ms)
    candles = store.candles(
        market.category, market.symbols, market.interval, "trade", since_ms, until_ms, as_of_ms, first_values
    )
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
    funding = store.funding(market.category, market.symbols, None, until_ms, as_of_ms, first_values)
    fine = None
    if config.features.fine:
        fine = store.candles(
            market.category, market.symbols, config.features.fine, "trade", since_ms, until_ms, as_of_ms,
            first_values,
        )  # fmt: skip
        without = sorted(set(market.symbols) - set(fine["symbol"].unique()))
        if without:
            raise DataMissing(
                f"features.fine is {config.features.fine}, and the store holds no such candles of {', '.join(without)}.",
                f"Run 'recur fetch -i {config.features.fine}', or set features.fine to an empty string.",
            )
    return raw_series(candles, "store", funding, fine, news)


def _followed(store: Store, config: Config, as_of_ms: int) -> bool:
    """Whether the store held, at ``as_of_ms``, one of the last two closed bars of a configured symbol."""
    market = config.market
    end = floor_open(as_of_ms, market.interval)
    since = floor_open(floor_open(end - 1, market.interval) - 1, market.interval)
    known = store.candles(market.category, market.symbols, market.interval, "trade", since, end, as_of_ms)
    return known.height > 0


def refuse_unexplained(
    store: Store, config: Config, since_ms: int | None = None, until_ms: int | None = None
) -> None:
    """Raise DataMissing when a configured series has holes that no request explains inside ``[since, until)``.

    A hole is explained when the venue or the file was asked for it and lacked it; a range between two fetches that
    nobody asked for is not. Series without any bars are left to ``stored_series``.
    """
    market = config.market
    found = []
    for symbol in market.symbols:
        for interval in filter(None, (market.interval, config.features.fine)):
            series = Series(market.category, symbol, interval)
            frame = store.candles(market.category, [symbol], interval, "trade", since_ms, until_ms)
            times = frame.get_column("open_time").dt.timestamp("ms").to_numpy()
            absent = [
                hole
                for hole in holes(times, interval, store.asked(series))
                if hole.reason == UNEXPLAINED and times[0] < hole.since_ms < times[-1]
            ]
            if absent:
                found.append((series, absent))
    if found:
        series, absent = found[0]
        more = f" {len(found) - 1} more series have such holes." if len(found) > 1 else ""
        raise DataMissing(
            f"{series} lacks {sum(hole.bars for hole in absent)} bars in {len(absent)} holes that nothing explains, the"
            f" first {iso(absent[0].since_ms)} to {iso(absent[0].until_ms)}.{more}",
            f"Run 'recur fetch -s {series.symbol} -i {series.interval} --since {iso(absent[0].since_ms)}' to ask for them,"
            " or give --allow-gaps.",
        )


def stored_news(store: Store, config: Config, placebo: int | None = None) -> Items | None:
    """The stored news as the features read them, None where ``features.news`` is off.

    ``placebo``: seed of a shuffle of their times within each month. Raises DataMissing when there are no news, or no
    scores of ``features.news_run`` that are known to be forecasts.
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
    scores = _usable_scores(store, items, f.news_run) if f.news_run else None
    if placebo is not None:
        items = shuffled_within_month(items, placebo)
    return make_items(items, scores, f.news_latency_s)


def _usable_scores(store: Store, items: pl.DataFrame, run: str) -> pl.DataFrame:
    """The scores of a sentiment run, without those that know what the price did next.

    A run whose labels the market made has seen the prices up to the end of its training window: what it says of items of
    before is no forecast. Raises DataMissing when there are no scores, none of later, or nothing tells of the labels.
    """
    scores = store.sentiment(run)
    if scores.is_empty():
        raise DataMissing(
            f"The store holds no scores of features.news_run = {run}.",
            f"Run 'recur sentiment --stored --run {run}' first.",
        )
    until = _prices_learned_until(store.home, run)
    if until is None:
        return scores
    known = items.filter(pl.col("published_at").dt.epoch("ms") <= until)
    later = scores.join(known, on=["news_id", "version"], how="anti")
    if later.is_empty():
        raise DataMissing(
            f"All {scores.height} scores of {run} are of items up to {iso(until)}: the prices after them are its labels.",
            f"Bring in and score news of after {iso(until)}, or name a run of human labels in features.news_run.",
        )
    if later.height < scores.height:
        _log.warning(
            "%d of %d scores of %s are left out: its labels are the prices up to %s",
            scores.height - later.height, scores.height, run, iso(until),
        )  # fmt: skip
    return later


def _prices_learned_until(home: Path, run: str) -> int | None:
    """Until when the market labelled the texts of a sentiment run, or of one that it was begun from; None: never.

    Raises DataMissing where the folder of one of them is gone: its labels may have been the prices themselves.
    """
    name: str | None = run
    while name:
        folder = RunFolder(home, name)
        if not folder.manifest.exists():
            of = run if name == run else f"{run} was begun from {name}, which"
            raise DataMissing(
                f"{of} is no longer in {home / 'runs'}: nothing tells whether its labels were prices.",
                "Bring its folder back, or score the news with a run that is there and name it in features.news_run.",
            )
        manifest = folder.read_manifest()
        if isinstance(manifest.get("labels"), dict):
            return parse_time(str(manifest["training_window"]["until"]))
        name = manifest.get("parent")
    return None


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
