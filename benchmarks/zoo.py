"""Every model on the real candles with the same budget, beside HAR and a LightGBM on the same features.

Walk-forward as in ``real.py``: trained on all bars before 2025-07-01 (less gap and validation) of Bybit perpetuals and
the pool of Binance files, judged on 2025-07-01 … 2026-02-08 for BTC, ETH, SOL and BNB. All models have the same width,
windows, epochs, learning rate and seeds, so that nothing but the recurrence differs; all have one layer, but for the
hybrid, which needs some of each kind.

``python benchmarks/zoo.py [--models gru,lstm] [--seeds 0,1,2]``: one JSON per model and seed in ``--out``; those that
are there are kept, and a training that was cut off goes on from its last epoch. ``--table`` prints what is there.

With OMP_NUM_THREADS=1 the times are CPU times, otherwise wall times.

``--finer 15m`` is the other experiment: hourly forecasts of the same hours by the same model on three kinds of input,
without the pool (there are no finer bars in it):

    hourly    hourly bars, a window of 512 (three weeks)
    measures  hourly bars with the realised measures of the finer bars inside each hour as further features
    finer     the finer bars themselves, a window of 4096 of them, horizons in finer bars, judged on the full hours
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from common import show
from memory import available
from numpy.typing import NDArray

from recur.connectors.files import read_candles, read_funding
from recur.models.forecaster import Forecaster
from recur.models.registry import MODELS
from recur.pipeline.backtest import Rows, judge_horizon
from recur.pipeline.baselines import BASELINES, BaselineForecast, symmetric_quantiles
from recur.pipeline.config import Config
from recur.pipeline.dataset import (
    RawSeries,
    SeriesArrays,
    Split,
    arrays,
    fit_transform,
    label_mask,
    make_split,
    raw_series,
)
from recur.pipeline.features import VARIANCE_FLOOR, FeatureTransform
from recur.pipeline.fit import fit
from recur.pipeline.inference import Forecast, cutoffs, forecast
from recur.pipeline.load import pool_series
from recur.pipeline.metrics import LEVELS
from recur.pipeline.train import build_net, gap_ms, symbol_table
from recur.vocabulary import INTERVALS, parse_time

Floats = NDArray[np.float64]
POOL = ("candles_binance_perp_1h.parquet", "candles_binance_spot_1h.parquet")
SINCE, UNTIL = "2025-07-01", {"": "2026-02-08", "15m": "2026-01-05", "5m": "2026-02-08"}
FINER_WINDOW = 4096
VARIANTS = ("hourly", "measures", "finer")


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of input with everything that is fitted before the network. ``own``: the first series, to be judged."""

    config: Config
    split: Split
    transform: FeatureTransform
    data: list[SeriesArrays]
    own: int
    symbols: dict[str, int]


@dataclass(frozen=True, slots=True)
class Judge:
    """Hourly series and what the baselines say of them: the same rows for every model and every kind of input."""

    series: list[SeriesArrays]
    base: list[dict[str, BaselineForecast]]
    horizons: tuple[int, ...]

    def scores(self, forecasts: Sequence[Forecast]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for i, h in enumerate(self.horizons):
            rows = Rows()
            for f in forecasts:
                k = next(k for k, s in enumerate(self.series) if s.symbol == f.series.symbol)
                at = np.searchsorted(self.series[k].close_ms, f.series.close_ms[f.index])
                rows.add(replace(f, series=self.series[k], index=at), i, self.base[k])
            found = judge_horizon(rows, h)
            out[str(h)] = {
                key: found[key] for key in ("n", "crps", "qlike", "coverage_50", "coverage_90", "baselines")
            }
        return out


def problem(data: Path, kind: str, finer: str) -> Problem:
    """``kind``: "" for hourly bars and the pool, or one of VARIANTS for the experiment with ``finer`` bars."""
    config, step = Config(), INTERVALS[finer] if kind else 0
    candles = read_candles(data / "candles_bybit_perp_1h.parquet")
    funding = read_funding(data / "funding_bybit.parquet")
    if not kind:
        paths = tuple(str(data / name) for name in POOL)
        config = replace(config, train=replace(config.train, pool=paths))
        return _fitted(config, raw_series(candles, "store", funding), pool_series(paths, config), finer)
    fine = read_candles(data / f"candles_bybit_perp_{finer}.parquet")
    candles = candles.join(
        fine.group_by("symbol").agg(
            pl.col("open_time").min().alias("a"), pl.col("open_time").max().alias("b")
        ),
        on="symbol",
    )
    candles = candles.filter(pl.col("open_time").is_between(pl.col("a"), pl.col("b"))).drop("a", "b")
    if kind == "finer":
        per = INTERVALS["1h"] // step
        train = config.train
        config = replace(
            config,
            market=replace(config.market, interval=finer),
            train=replace(
                train, horizons=tuple(per * h for h in train.horizons), window=FINER_WINDOW, burn_in=FINER_WINDOW // 4,
                batch=max(1, train.batch * train.window // FINER_WINDOW),
            ),
            backtest=replace(config.backtest, trade_horizon=per * config.backtest.trade_horizon),
        )  # fmt: skip
        return _fitted(config, raw_series(fine, "store", funding), [], finer)
    inner = fine if kind == "measures" else None
    if inner is not None:
        config = replace(config, features=replace(config.features, fine=finer))
    return _fitted(config, raw_series(candles, "store", funding, inner), [], finer)


def _fitted(config: Config, own: list[RawSeries], pool: list[RawSeries], finer: str) -> Problem:
    series = own + pool
    split = make_split(parse_time(SINCE), parse_time(UNTIL[finer]), config.train.val_days, gap_ms(config))
    transform = fit_transform(
        series,
        config.market.interval,
        config.train.horizons,
        split.train_until_ms,
        bool(config.features.fine),
    )
    return Problem(config, split, transform, arrays(series, transform), len(own), symbol_table(series))


def judge(hourly: Problem) -> Judge:
    """Baselines fitted on the training span of the hourly series (and their pool)."""
    horizons = hourly.config.train.horizons
    fitted = {n: make(hourly.data, horizons, hourly.split.train_until_ms) for n, make in BASELINES.items()}
    own = hourly.data[: hourly.own]
    return Judge(own, [{n: b(s) for n, b in fitted.items()} for s in own], horizons)


def train_and_judge(p: Problem, who: Judge, name: str, seed: int, epochs: int, work: Path) -> dict[str, Any]:
    train = replace(p.config.train, seed=seed, epochs=epochs, device="cpu")
    model = replace(p.config.model, name=name)
    net = build_net(replace(p.config, train=train, model=model), p.transform, p.symbols)
    work.mkdir(parents=True, exist_ok=True)
    spent = work / "seconds.json"
    before = json.loads(spent.read_text()) if spent.exists() else 0.0
    start = clock()
    try:
        summary = fit(net, p.data, p.symbols, p.split, train, work, progress=False)
    finally:
        seconds = before + clock() - start
        spent.write_text(json.dumps(seconds))
    forecasts = forecast(
        net, p.data[: p.own], p.symbols, p.split.test_since_ms, p.split.test_until_ms, train.window
    )
    return {
        "model": name,
        "seed": seed,
        "parameters": sum(q.numel() for q in net.parameters()),
        "train_s": seconds,
        "step_us": {str(batch): step_us(net, batch) for batch in (1, 500)},
        "val_pinball": summary["val_pinball"],
        "forecast": who.scores([on_the_hour(f) for f in forecasts]),
    }


def clock() -> float:
    """Seconds: of the process's own computing with one thread, which other work on the machine leaves alone."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def on_the_hour(f: Forecast) -> Forecast:
    """Only the rows whose cutoff is a full hour."""
    keep = f.series.close_ms[f.index] % INTERVALS["1h"] == 0
    return replace(f, index=f.index[keep], quantiles=f.quantiles[keep], mean=f.mean[keep], vol=f.vol[keep])


@torch.inference_mode()
def step_us(net: Forecaster, batch: int, steps: int = 100) -> float:
    """Median microseconds of one bar for ``batch`` series with carried state."""
    x, symbol = torch.randn(batch, net.spec.n_features), torch.zeros(batch, dtype=torch.long)
    state, taken = net.init_state(batch), []
    for _ in range(steps):
        start = clock()
        _, state = net.step(x, symbol, state)
        taken.append(clock() - start)
    return 1e6 * statistics.median(taken[steps // 4 :])


def boosted(p: Problem, who: Judge, seed: int) -> dict[str, Any]:
    """LightGBM on the model's own features: the logarithm of the mean variance ahead, then residual quantiles.

    Early stopping and the law of the standardised residuals come from the validation span, which the trees have not
    seen.
    """
    import lightgbm as lgb

    start, horizons = clock(), p.config.train.horizons
    # A label's mask comes per horizon; targets as in HAR: the de-seasonalised range variance ahead, over the base.
    learn = [label_mask(s, horizons, 0, p.split.train_until_ms) for s in p.data]
    check = [label_mask(s, horizons, p.split.val_since_ms, p.split.val_until_ms) for s in p.data]
    inputs = [np.column_stack([s.x, np.full(len(s.x), p.symbols.get(s.symbol, 0))]) for s in p.data]
    parts: dict[str, list[list[Floats]]] = {s.unique_id: [] for s in p.data[: p.own]}
    step_s = []
    for i, h in enumerate(horizons):
        wanted = [np.log(_mean_ahead(s.gk / s.season, h) + VARIANCE_FLOOR) - _log_base(s, i) for s in p.data]
        sets = []
        for masks in (learn, check):
            keep = [m[:, i] & np.isfinite(w) for m, w in zip(masks, wanted, strict=True)]
            x = np.concatenate([a[k] for a, k in zip(inputs, keep, strict=True)])
            y = np.concatenate([w[k] for w, k in zip(wanted, keep, strict=True)])
            sets.append(lgb.Dataset(x, y, categorical_feature=[x.shape[1] - 1], free_raw_data=False))
        settings = {
            "objective": "l2", "learning_rate": 0.05, "num_leaves": 31, "min_data_in_leaf": 500, "lambda_l2": 10.0,
            "feature_fraction": 0.7, "bagging_fraction": 0.7, "bagging_freq": 1, "seed": seed, "num_threads": torch.get_num_threads(), "verbose": -1,
        }  # fmt: skip
        trees = lgb.train(
            settings, sets[0], 600, valid_sets=[sets[1]], callbacks=[lgb.early_stopping(40, verbose=False)]
        )
        sigma = [
            np.exp(0.5 * np.asarray(trees.predict(a))) * s.scale[:, i]
            for a, s in zip(inputs, p.data, strict=True)
        ]
        z = np.concatenate(
            [(s.target[:, i] / g)[m[:, i]] for s, g, m in zip(p.data, sigma, check, strict=True)]
        )
        law = np.quantile(np.abs(z), np.round(2 * LEVELS[10:] - 1, 2))
        rms = float(np.sqrt(np.mean(z**2)))
        for s, g in zip(p.data[: p.own], sigma, strict=False):
            parts[s.unique_id].append([symmetric_quantiles(g[:, None] * law), g * rms])
        one = inputs[0][:1]
        began = clock()
        for _ in range(20):
            trees.predict(one)
        step_s.append((clock() - began) / 20)
    forecasts = []
    for s in p.data[: p.own]:
        at = cutoffs(s, p.split.test_since_ms, p.split.test_until_ms)
        quantiles = np.stack([q[at] for q, _ in parts[s.unique_id]], axis=1)
        vol = np.stack([v[at] for _, v in parts[s.unique_id]], axis=1)
        forecasts.append(Forecast(s, at, quantiles, np.zeros_like(vol), vol))
    return {
        "model": "lightgbm", "seed": seed, "parameters": None, "train_s": clock() - start,
        "step_us": {"1": 1e6 * sum(step_s), "500": None}, "forecast": who.scores(forecasts),
    }  # fmt: skip


def _log_base(s: SeriesArrays, i: int) -> Floats:
    """(T,) log of the base variance: the squared scale over the season ahead."""
    out: Floats = np.log(s.scale[:, i] ** 2 / s.season_ahead[:, i])
    return out


def _mean_ahead(values: Floats, h: int) -> Floats:
    """(T,) mean of the h values after each bar; NaN where one is missing."""
    out = np.full(len(values), np.nan)
    out[:-h] = np.lib.stride_tricks.sliding_window_view(values[1:], h).mean(axis=1)
    return out


def table(folder: Path, kinds: Sequence[str]) -> None:
    """Mean skill against EWMA over seeds (and their range), beside HAR on the same rows; how many seeds are better than HAR
    with p < .05 at each horizon."""
    for kind in kinds:
        found: dict[str, list[Mapping[str, Any]]] = {}
        for path in sorted(folder.glob(f"{kind or 'zoo'}--*.json")):
            result = json.loads(path.read_text())
            found.setdefault(result["model"], []).append(result)
        if not found:
            continue
        horizons = list(next(iter(found.values()))[0]["forecast"])
        header = (
            "model",
            "seeds",
            *(f"h={h}" for h in horizons),
            "QLIKE h=1",
            "better than HAR",
            "parameters",
            "train s",
            "step us",
            "500: us",
        )
        rows = []
        order = sorted(found, key=lambda n: (*MODELS, n, "lightgbm").index(n))
        for name in order:
            runs = found[name]
            cells = []
            for h in horizons:
                skills = [100 * r["forecast"][h]["baselines"]["ewma"]["crps_skill"] for r in runs]
                spread = f" ({min(skills):+.2f}…{max(skills):+.2f})" if len(skills) > 1 else ""
                cells.append(f"{statistics.mean(skills):+.2f}{spread}")
            qlike = statistics.mean(
                r["forecast"][horizons[0]]["baselines"]["ewma"]["qlike_diff"] for r in runs
            )
            one, many = (_mean([r["step_us"][b] for r in runs]) for b in ("1", "500"))
            seconds = f"{statistics.median(r['train_s'] for r in runs):.0f}"
            size = runs[0]["parameters"]
            rows.append(
                (
                    name,
                    str(len(runs)),
                    *cells,
                    f"{qlike:+.3f}",
                    ",".join(
                        str(sum(_better(r["forecast"][h]["baselines"]["har"]) for r in runs))
                        for h in horizons
                    ),
                    "" if size is None else f"{size:,}",
                    seconds,
                    one,
                    many,
                )
            )
        base = found[order[0]][0]["forecast"]
        for other in ("har", "random_walk"):
            skills = [
                100 * (1 - base[h]["baselines"][other]["crps"] / base[h]["baselines"]["ewma"]["crps"])
                for h in horizons
            ]
            first = base[horizons[0]]["baselines"]
            qlike = first[other]["qlike"] - first["ewma"]["qlike"]
            rows.append((other, "", *(f"{s:+.2f}" for s in skills), f"{qlike:+.3f}", *[""] * 5))
        show(f"CRPS skill against EWMA in %, {kind or 'hourly bars with the pool'}", header, rows)


def _better(har: Mapping[str, Any]) -> bool:
    return bool(har["crps_skill"] > 0 and har["dm_p"] < 0.05)


def _mean(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.mean(known):,.0f}" if known else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", default=",".join([*available(), "lightgbm"]))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=Config().train.epochs)
    parser.add_argument("--finer", default="", choices=["", "15m", "5m"])
    parser.add_argument("--variants", default=",".join(VARIANTS), help="for --finer")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out") / "zoo")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    asked = parser.parse_args()
    out = asked.out / asked.finer
    out.mkdir(parents=True, exist_ok=True)
    kinds = asked.variants.split(",") if asked.finer else [""]
    if not asked.table:
        if not (asked.data / "candles_bybit_perp_1h.parquet").exists():
            sys.exit(f"{asked.data} does not hold the candle files: give the folder with --data.")
        hourly = problem(asked.data, "hourly" if asked.finer else "", asked.finer)
        who = judge(hourly)
        for kind in kinds:
            p = hourly if kind in ("", "hourly") else problem(asked.data, kind, asked.finer)
            for name in asked.models.split(","):
                for seed in [int(s) for s in asked.seeds.split(",")]:
                    label = f"{kind or 'zoo'}--{name}--{seed}"
                    path = out / f"{label}.json"
                    if path.exists() or (name == "lightgbm" and kind == "finer"):
                        continue
                    if name == "lightgbm":
                        found = boosted(p, who, seed)
                    else:
                        found = train_and_judge(p, who, name, seed, asked.epochs, out / "work" / label)
                    path.write_text(json.dumps(found) + "\n")
                    print(f"{label}: {found['train_s']:.0f} s", file=sys.stderr, flush=True)
    table(out, kinds)


if __name__ == "__main__":
    main()
