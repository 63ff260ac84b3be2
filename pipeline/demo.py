"""``recur demo``: the whole path against the sandbox exchange, in minutes, without a network.

fetch (real pybit over HTTP) → train → backtest → predict → report, on an invented market. Because its truth is
known, the demo can say how close the model came to the best attainable: an **oracle** that knows the latent
volatility state and the parameters of the market at each cutoff, with the law of its standardised residuals taken
from the training span.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recur.connectors.bybit import BybitConnector
from recur.connectors.sandbox.generated import GeneratedMarket
from recur.connectors.sandbox.server import SandboxServer, VirtualClock
from recur.pipeline import metrics as score
from recur.pipeline.backtest import run_backtest
from recur.pipeline.baselines import symmetric_quantiles
from recur.pipeline.config import Config
from recur.pipeline.fetch import run_fetch
from recur.pipeline.plan import FetchRequest, plan_fetch
from recur.pipeline.predict import predict
from recur.pipeline.report import write_report
from recur.pipeline.train import train_price
from recur.storage.runs import RunFolder
from recur.storage.store import Store
from recur.vocabulary import DAY_MS, INTERVALS, parse_symbol, parse_time

SEED = 7
END = "2026-01-01T00:00:00Z"


def run_demo(home: Path | None, *, progress: bool, quick: bool) -> dict[str, Any]:
    """Run it and return ``{home, report, fetch, train, backtest, forecasts, seconds}``.

    ``home`` None takes a new temporary folder, which stays. ``quick`` takes a shorter history and one epoch.
    """
    started = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="recur-demo-")) if home is None else home
    end = parse_time(END)
    days = 240 if quick else 730
    config = Config()
    config = replace(
        config,
        train=replace(config.train, epochs=1 if quick else 4, val_days=30),
        backtest=replace(config.backtest, folds=1, test_days=60 if quick else 150, trade_horizon=24),
    )
    symbols = tuple(parse_symbol(s)[1] for s in config.market.symbols)
    market = GeneratedMarket(SEED, end - days * DAY_MS, end + 2 * DAY_MS, symbols)
    store = Store(home, wait_s=config.store.wait_s)
    steps: dict[str, float] = {}

    def timed(name: str, since: float) -> float:
        steps[name] = round(time.monotonic() - since, 2)
        return time.monotonic()

    at = time.monotonic()
    with SandboxServer(market, VirtualClock(end)) as server:
        connector = BybitConnector(server.base_url, workers=config.fetch.workers)
        request = FetchRequest(
            symbols=symbols, interval=config.market.interval, kinds=config.fetch.kinds, since_ms=market.start_ms,
            source="sandbox",
        )  # fmt: skip
        plan = plan_fetch(store, connector, request)
        fetched = run_fetch(store, connector, plan, lambda done, total: None)
    at = timed("fetch", at)
    trained = train_price(home, config, resume=None, progress=progress)
    at = timed("train", at)
    metrics = run_backtest(home, config, run=None, progress=progress)
    at = timed("backtest", at)
    forecasts = predict(home, config, run=trained["run_id"], as_of_ms=end)
    at = timed("predict", at)
    folder = RunFolder(home, metrics["run_id"])
    train_until = parse_time(metrics["folds"][0]["train_until"])
    metrics |= {"simulated": True, "oracle": oracle(market, folder, metrics, store, config, train_until)}
    folder.write_json("metrics.json", metrics)
    report = write_report(folder)
    timed("report", at)
    return {
        "simulated": True,
        "home": str(home),
        "report": str(report),
        "fetch": fetched.as_dict(),
        "train": trained,
        "backtest": metrics,
        "forecasts": forecasts["forecasts"],
        "seconds": steps | {"all": round(time.monotonic() - started, 2)},
    }


def oracle(
    market: GeneratedMarket,
    folder: RunFolder,
    metrics: dict[str, Any],
    store: Store,
    config: Config,
    train_until_ms: int,
) -> dict[str, Any]:
    """CRPS skill against EWMA of the forecaster who knows the truth, on the rows of the backtest, per horizon.

    ``share``: the model's skill as a share of it.
    """
    rows = pl.read_parquet(folder.predictions).filter(pl.col("actual").is_not_null())
    step = INTERVALS[config.market.interval]
    out: dict[str, Any] = {}
    for h in metrics["horizons"]:
        law = _law(market, store, config, h, step, train_until_ms)
        mine = rows.filter(pl.col("horizon") == h)
        losses = []
        for (unique,), part in mine.group_by(["unique_id"], maintain_order=True):
            symbol = str(unique).split(":")[2]
            cutoffs = part["cutoff"].dt.epoch("ms").to_numpy()
            sigma = np.sqrt(market.expected_variance(symbol, cutoffs, h * step))
            quantiles = symmetric_quantiles(sigma[:, None] * law)
            losses.append(score.crps(part["actual"].to_numpy(), quantiles))
        best = float(np.concatenate(losses).mean())
        ewma = metrics["forecast"][str(h)]["baselines"]["ewma"]
        attainable = 1 - best / ewma["crps"]
        share = ewma["crps_skill"] / attainable if attainable > 0 else None
        out[str(h)] = {
            "crps": best,
            "crps_skill": attainable,
            "share": share,
            "text": f"{100 * ewma['crps_skill']:.2f} % of an attainable {100 * attainable:.2f} % against EWMA",
        }
    return out


def _law(
    market: GeneratedMarket, store: Store, config: Config, h: int, step: int, until_ms: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Quantiles of |return| / oracle volatility over the training span, all series pooled."""
    residuals: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    for symbol in config.market.symbols:
        bars = store.candles(
            config.market.category, [symbol], config.market.interval, until_ms=until_ms - step
        )
        close = np.log(bars["close"].to_numpy())
        cutoffs = bars["open_time"].dt.epoch("ms").to_numpy()[:-h] + step
        sigma = np.sqrt(market.expected_variance(symbol, cutoffs, h * step))
        residuals.append((close[h:] - close[:-h]) / sigma)
    return np.quantile(np.abs(np.concatenate(residuals)), np.arange(1, 10) / 10)
