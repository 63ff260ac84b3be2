"""``recur backtest``: walk-forward folds, scores against the baselines on the same rows, and a trading simulation.

    fold 1  ├─ train ─┤gap├ val ┤gap├─ test ─┤
    fold 2  ├────── train ──────┤gap├ val ┤gap├─ test ─┤

Each fold fits season, scaler, network and baselines on its own training span. Rows where any forecaster has no
forecast yet or the outcome is unknown are left out for all of them, so that every score is on the same rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recur.models.registry import model_label
from recur.pipeline import artefact as art
from recur.pipeline import metrics as score
from recur.pipeline import trading
from recur.pipeline.baselines import BASELINES, BaselineForecast
from recur.pipeline.config import Config, MarketConfig
from recur.pipeline.dataset import RawSeries, Split, arrays, make_split
from recur.pipeline.fit import choose_device
from recur.pipeline.inference import Forecast, forecast
from recur.pipeline.load import (
    data_end_ms,
    open_store,
    pool_series,
    refuse_unexplained,
    snapshot,
    stored_news,
    stored_series,
)
from recur.pipeline.report import write_report
from recur.pipeline.rows import forecast_rows
from recur.pipeline.settings import dump_toml, load_config
from recur.pipeline.train import fit_fold, gap_ms, resolved
from recur.pipeline.verdict import judge
from recur.storage.runs import COMPLETE, RUNNING, RunFolder, list_runs, new_run_id, open_run
from recur.vocabulary import DataMissing, UsageError, bars_per_year, ceil_open, floor_open, iso, parse_time

Floats = NDArray[np.float64]


@dataclass(slots=True)
class Rows:
    """Scored rows of one horizon, all folds and series stacked: (N,) and (N, Q) arrays."""

    cutoff_ms: list[NDArray[np.int64]] = field(default_factory=list)
    series: list[NDArray[np.str_]] = field(default_factory=list)
    y: list[Floats] = field(default_factory=list)
    quantiles: list[Floats] = field(default_factory=list)
    mean: list[Floats] = field(default_factory=list)
    vol: list[Floats] = field(default_factory=list)
    base_quantiles: dict[str, list[Floats]] = field(default_factory=lambda: {n: [] for n in BASELINES})
    base_vol: dict[str, list[Floats]] = field(default_factory=lambda: {n: [] for n in BASELINES})

    def add(self, f: Forecast, i: int, base: dict[str, BaselineForecast]) -> None:
        y = f.series.target[f.index, i]
        ok = np.isfinite(y)
        for b in base.values():
            ok &= np.isfinite(b.quantiles[f.index, i]).all(axis=1) & np.isfinite(b.vol[f.index, i])
        at = f.index[ok]
        self.cutoff_ms.append(f.series.close_ms[at])
        self.series.append(np.full(len(at), f.series.unique_id))
        self.y.append(y[ok])
        self.quantiles.append(f.quantiles[ok, i])
        self.mean.append(f.mean[ok, i])
        self.vol.append(f.vol[ok, i])
        for name, b in base.items():
            self.base_quantiles[name].append(b.quantiles[at, i])
            self.base_vol[name].append(b.vol[at, i])


def run_backtest(
    home: Path,
    config: Config,
    *,
    run: str | None,
    progress: bool,
    allow_gaps: bool = False,
    placebo: int | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Backtest the configured model, write a run folder, and return its metrics (contract of ``metrics.json``).

    ``run``: judge this trained run, on its own market unless one is configured, instead of training; the test span
    must then lie after all that it saw.
    ``placebo``: seed with which the times of the news are shuffled within each month.
    ``trust``: let a run of a user's own model run its code.
    Raises DataMissing when the store lacks data or, unless ``allow_gaps``, has unexplained holes, UsageError when
    the spans do not fit.
    """
    started = time.monotonic()
    choose_device(config.train.device)
    config = _of_run(home, config, run) if run else resolved(config)
    store = open_store(home, config)
    since = parse_time(config.train.since) if config.train.since else None
    news = stored_news(store, config, placebo)
    own = stored_series(store, config, since, news=news)
    if not allow_gaps:
        refuse_unexplained(store, config, since)
    splits = _splits(config, own)
    trained = _trained_before(home, config, run, splits, trust) if run else None
    label = model_label(trained.net.spec.model if trained else config.model.name)
    series = own + ([] if trained else pool_series(config.train.pool, config, news))
    config = replace(
        config,
        backtest=replace(
            config.backtest, test_since=iso(splits[0].test_since_ms), test_until=iso(splits[-1].test_until_ms)
        ),
    )
    folder = RunFolder(home, new_run_id("backtest", label, int(time.time() * 1000)))
    folder.write_text("config.toml", dump_toml(config))
    manifest = {
        "run_id": folder.run_id,
        "kind": "backtest",
        "model": label,
        "status": RUNNING,
        "seed": config.train.seed,
        "device": choose_device(config.train.device),
        "data": snapshot(series),
        "folds": [s.as_dict() for s in splits],
        "parent": run,
        "placebo": placebo,
        **art.environment(),
    }
    folder.write_json("manifest.json", manifest)

    horizons = config.train.horizons
    rows = [Rows() for _ in horizons]
    long_rows: list[pl.DataFrame] = []
    positions: dict[str, list[Forecast]] = {}
    summaries = []
    for number, split in enumerate(splits):
        part = folder.part(f"folds/{number + 1}")
        if trained:
            made, data = trained, arrays(own, trained.transform)
            summaries.append({"reused": run})
        else:
            with folder.unless_data_missing():
                made, data, summary = fit_fold(series, split, config, part, progress=progress)
            summaries.append(summary)
        forecasts = forecast(
            made.net,
            data[: len(own)],
            made.symbols,
            split.test_since_ms,
            split.test_until_ms,
            config.train.window,
        )
        fitted = {name: fit(data, horizons, split.train_until_ms) for name, fit in BASELINES.items()}
        for f in forecasts:
            base = {name: b(f.series) for name, b in fitted.items()}
            for i in range(len(horizons)):
                rows[i].add(f, i, base)
            positions.setdefault(f.series.unique_id, []).append(f)
        long_rows.append(forecast_rows(forecasts, horizons, config.market.interval, label, folder.run_id))
    bare = [h for h, r in zip(horizons, rows, strict=True) if not any(len(y) for y in r.y)]
    if bare:
        with folder.unless_data_missing():
            raise DataMissing(
                f"No bar of the test span has both a forecast and a known outcome {bare[0]} bars later.",
                "Fetch more history, or choose an earlier --test-since.",
            )
    predictions = pl.concat(long_rows)
    predictions.write_parquet(folder.predictions, compression="zstd")
    metrics: dict[str, Any] = {
        "run_id": folder.run_id,
        "model": label,
        "series": [s.unique_id for s in own],
        "horizons": list(horizons),
        "folds": [{**s.as_dict(), **extra} for s, extra in zip(splits, summaries, strict=True)],
        "n_forecasts": predictions.height,
        "forecast": {str(h): judge_horizon(r, h) for h, r in zip(horizons, rows, strict=True)},
        "pit_levels": {
            str(h): (np.concatenate(r.y)[:, None] <= np.concatenate(r.quantiles)).mean(axis=0).tolist()
            for h, r in zip(horizons, rows, strict=True)
        },
    }
    metrics["trading"] = _trade(store, config, own, positions, home, folder)
    metrics["verdict"] = judge(metrics)
    _differences(rows, horizons).write_parquet(folder.path / "cum_difference.parquet")
    folder.write_json("metrics.json", metrics)
    manifest |= {"status": COMPLETE, "wall_s": round(time.monotonic() - started, 3)}
    folder.write_json("manifest.json", manifest)
    write_report(folder)
    return metrics


def judge_horizon(rows: Rows, horizon: int) -> dict[str, Any]:
    """All scores of one horizon, as in the contract's ``forecast`` block. CRPS in log-return units."""
    y, q = np.concatenate(rows.y), np.concatenate(rows.quantiles)
    mean, vol = np.concatenate(rows.mean), np.concatenate(rows.vol)
    cutoff, series = np.concatenate(rows.cutoff_ms), np.concatenate(rows.series)
    ours = score.crps(y, q)
    ours_q = score.qlike(y, vol)
    out: dict[str, Any] = {
        "n": len(y),
        "crps": float(ours.mean()),
        "pinball": float(ours.mean() / 2),
        "coverage_50": score.coverage(y, q, 0.5),
        "coverage_90": score.coverage(y, q, 0.9),
        "pit_ks": score.pit_ks(y, q),
        "qlike": float(ours_q.mean()),
        "ic": score.correlation(mean / vol, y / vol),
        "rank_ic": score.rank_correlation(mean / vol, y / vol),
        "auc": score.auc(mean / vol, y),
        "baselines": {},
        "by_series": {str(name): {} for name in np.unique(series)},
    }
    ours_t = score.by_cutoff(cutoff, ours)
    for name in BASELINES:
        theirs = score.crps(y, np.concatenate(rows.base_quantiles[name]))
        theirs_q = score.qlike(y, np.concatenate(rows.base_vol[name]))
        theirs_t = score.by_cutoff(cutoff, theirs)
        statistic, p = score.diebold_mariano(ours_t - theirs_t, horizon)
        low, high = score.skill_interval(ours_t, theirs_t, block=max(24 * 7, 2 * horizon))
        out["baselines"][name] = {
            "crps": float(theirs.mean()),
            "crps_skill": _skill(ours, theirs),
            "crps_skill_low": low,
            "crps_skill_high": high,
            "qlike": float(theirs_q.mean()),
            "qlike_diff": float(ours_q.mean() - theirs_q.mean()),
            "dm_stat": None if math.isnan(statistic) else statistic,
            "dm_p": None if math.isnan(p) else p,
        }
        for unique in out["by_series"]:
            mine = series == unique
            out["by_series"][unique][name] = _skill(ours[mine], theirs[mine])
    return out


def _skill(ours: Floats, theirs: Floats) -> float | None:
    """1 − mean(ours)/mean(theirs); None where the baseline made no error at all (a market that does not move)."""
    return float(1 - ours.mean() / theirs.mean()) if theirs.any() else None


def _splits(config: Config, own: Sequence[RawSeries]) -> list[Split]:
    """Equal consecutive test spans on the bar grid, each with its own train and validation spans before it."""
    interval, b = config.market.interval, config.backtest
    end = data_end_ms(own)
    until = parse_time(b.test_until) if b.test_until else end + 1
    since = (
        parse_time(b.test_since)
        if b.test_since
        else floor_open(min(until, end) - b.test_days * 86_400_000, interval)
    )
    first = min(int(s.frame["close_time"].dt.epoch("ms")[0]) for s in own)
    if since >= min(until, end):
        raise UsageError(
            f"The test span {iso(since)} to {iso(until)} is empty: the stored data end at {iso(end)}.",
            "Choose --test-since before the end of the data, or fetch more.",
        )
    edges = [ceil_open(since + (until - since) * k // b.folds, interval) for k in range(b.folds)] + [until]
    splits = [make_split(lo, hi, config.train.val_days, gap_ms(config)) for lo, hi in pairwise(edges)]
    if splits[0].train_until_ms <= first:
        raise DataMissing(
            f"Nothing is left to train on: the data begin at {iso(first)}, the training span of the first fold would"
            f" end at {iso(splits[0].train_until_ms)}.",
            "Fetch a longer history, lower backtest.test_days or train.val_days.",
        )
    return splits


def _of_run(home: Path, config: Config, run: str) -> Config:
    """``config`` with the market of the trained ``run`` where none was configured."""
    theirs, _ = load_config([open_run(home, run).config], [], {})
    return replace(config, market=theirs.market) if config.market == MarketConfig() else config


def _trained_before(
    home: Path, config: Config, run: str, splits: Sequence[Split], trust: bool
) -> art.Artefact:
    folder, made = art.open_trained(home, run, trust=trust)
    known_until = parse_time(folder.read_manifest()["known_until"])
    if known_until > splits[0].test_since_ms:
        raise UsageError(
            f"Run {run} has seen data up to {iso(known_until)}, and the test span begins at"
            f" {iso(splits[0].test_since_ms)}: its score there would mean nothing.",
            "Choose --test-since after that, or drop --run so that each fold trains anew.",
        )
    if made.transform.horizons != config.train.horizons or made.transform.interval != config.market.interval:
        raise UsageError(
            f"Run {run} forecasts {made.transform.interval} bars {made.transform.horizons} ahead, not"
            f" {config.market.interval} bars {config.train.horizons} ahead as configured.",
            f"Use its configuration: --config {folder.config}.",
        )
    return made


def _trade(
    store: Any,
    config: Config,
    own: Sequence[RawSeries],
    positions: dict[str, list[Forecast]],
    home: Path,
    folder: RunFolder,
) -> dict[str, Any]:
    b = config.backtest
    at = config.train.horizons.index(b.trade_horizon)
    funding = store.funding(config.market.category, config.market.symbols)
    legs = []
    for s in own:
        parts = positions.get(s.unique_id)
        if not parts:
            continue
        paid = funding.filter(pl.col("symbol") == s.symbol)
        legs.append(
            trading.Leg(
                open_ms=s.frame["open_time"].dt.epoch("ms").to_numpy(),
                open=s.frame["open"].to_numpy().astype(np.float64),
                index=np.concatenate([f.index for f in parts]),
                mean=np.concatenate([f.mean[:, at] for f in parts]),
                vol=np.concatenate([f.vol[:, at] for f in parts]),
                funding_ms=paid["funding_time"].dt.epoch("ms").to_numpy(),
                funding_rate=paid["rate"].fill_null(0.0).to_numpy(),
            )
        )
    trials = sum(r.run_id.startswith("backtest-") for r in list_runs(home))
    result, curves = trading.simulate(
        legs, b.fee_bps, b.slippage_bps, bars_per_year(config.market.interval), max(1, trials)
    )
    pl.DataFrame(
        {"time": pl.Series(curves.pop("time_ms")).cast(pl.Datetime("ms", "UTC")), **curves}
    ).write_parquet(folder.path / "equity.parquet")
    return result | {
        "fee_bps": b.fee_bps,
        "slippage_bps": b.slippage_bps,
        "trade_horizon": b.trade_horizon,
        "bars_per_year": bars_per_year(config.market.interval),
        "funding_payments": int(funding.height),
    }


def _differences(rows: Sequence[Rows], horizons: Sequence[int]) -> pl.DataFrame:
    """Cumulative CRPS, ours minus EWMA, over time and per horizon (falling: ours is better)."""
    frames = []
    for r, h in zip(rows, horizons, strict=True):
        cutoff, y = np.concatenate(r.cutoff_ms), np.concatenate(r.y)
        ours = score.crps(y, np.concatenate(r.quantiles))
        excess = ours - score.crps(y, np.concatenate(r.base_quantiles["ewma"]))
        times = np.unique(cutoff)
        frames.append(
            pl.DataFrame(
                {
                    "time": pl.Series(times).cast(pl.Datetime("ms", "UTC")),
                    "horizon": pl.Series([h] * len(times), dtype=pl.Int32),
                    "ewma": score.by_cutoff(cutoff, excess).cumsum(),
                }
            )
        )
    return pl.concat(frames)
