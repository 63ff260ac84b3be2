"""``recur backtest --ablate news``: is the news worth anything?

The same folds, seeds and market with and without the news features; the difference is tested on the same rows. The
placebo deals the times of the news anew within each month and repeats the whole procedure: what it then finds, it
finds where there is nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recur.pipeline import metrics as score
from recur.pipeline.backtest import run_backtest
from recur.pipeline.config import Config
from recur.pipeline.load import open_store
from recur.storage.runs import RunFolder
from recur.vocabulary import parse_time

Floats = NDArray[np.float64]
_KEY = ("unique_id", "cutoff", "horizon")


def ablate_news(home: Path, config: Config, *, placebo: int, progress: bool) -> dict[str, Any]:
    """Backtests with and without news, and ``placebo`` ones with shuffled news; all runs are kept.

    Returns run ids, per horizon the CRPS gain in percent (positive: news help) with its Diebold–Mariano test, the
    change of the net trading result, and the placebo's gains with the share of them that reach the real one.
    Raises DataMissing when there are no news.
    """
    with_news = replace(config, features=replace(config.features, news=True))
    without = replace(config, features=replace(config.features, news=False))
    one = run_backtest(home, with_news, run=None, progress=progress)
    other = run_backtest(home, without, run=None, progress=progress)
    base = _scored(home, other["run_id"])
    real = _compare(_scored(home, one["run_id"]), base)
    dealt = [
        run_backtest(home, with_news, run=None, progress=progress, placebo=seed) for seed in range(placebo)
    ]
    found = [_compare(_scored(home, run["run_id"]), base) for run in dealt]
    result: dict[str, Any] = {
        "ablate": "news",
        "with": one["run_id"],
        "without": other["run_id"],
        "horizons": {
            str(h): {**part, **_placebo(part["gain"], [f[h]["gain"] for f in found])}
            for h, part in real.items()
        },
        "trading": {
            "net_sharpe_with": one["trading"].get("net_sharpe"),
            "net_sharpe_without": other["trading"].get("net_sharpe"),
            "net_return_with": one["trading"].get("net_return"),
            "net_return_without": other["trading"].get("net_return"),
        },
        "placebo_runs": [run["run_id"] for run in dealt],
        "news": _tested_news(home, with_news, one["folds"]),
    }
    result["text"] = _sentence(result["horizons"])
    RunFolder(home, one["run_id"]).write_json("ablation.json", result)
    return result


def _scored(home: Path, run_id: str) -> pl.DataFrame:
    """Rows with a known outcome: key and CRPS."""
    rows = pl.read_parquet(RunFolder(home, run_id).predictions).filter(pl.col("actual").is_finite())
    levels = [f"q{round(100 * level):02d}" for level in score.LEVELS]
    loss = score.crps(rows["actual"].to_numpy(), rows.select(levels).to_numpy())
    return rows.select(*_KEY).with_columns(pl.Series("crps", loss))


def _compare(ours: pl.DataFrame, theirs: pl.DataFrame) -> dict[int, dict[str, Any]]:
    """Per horizon on the rows of both: gain in percent of CRPS, and the test of the difference by cutoff."""
    both = ours.join(theirs, on=list(_KEY), suffix="_other").sort(*_KEY)
    out = {}
    for (horizon,), part in both.group_by("horizon", maintain_order=True):
        cutoff = part["cutoff"].dt.epoch("ms").to_numpy()
        a, b = part["crps"].to_numpy(), part["crps_other"].to_numpy()
        statistic, p = score.diebold_mariano(
            score.by_cutoff(cutoff, a) - score.by_cutoff(cutoff, b), int(str(horizon))
        )
        out[int(str(horizon))] = {
            "n": part.height,
            "gain": float(100 * (1 - a.mean() / b.mean())),
            "dm_stat": None if np.isnan(statistic) else float(statistic),
            "dm_p": None if np.isnan(p) else float(p),
        }
    return out


def _tested_news(home: Path, config: Config, folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items published in the test span: how many, scored, and scored by a model that may have learned from them."""
    store, run = open_store(home, config), config.features.news_run
    since, until = parse_time(folds[0]["test_since"]), parse_time(folds[-1]["test_until"])
    items = store.news(since_ms=since, until_ms=until).select("news_id", "version")
    found = {"items": items.height, "run": run or None, "scored": 0, "contaminated": 0}
    if run:
        scored = store.sentiment(run).join(items, on=["news_id", "version"], how="semi")
        found |= {"scored": scored.height, "contaminated": int(scored["contaminated"].sum())}
    return found


def _placebo(gain: float, gains: Sequence[float]) -> dict[str, Any]:
    """Where the real gain stands among those of the placebo; p counts the real one among them."""
    if not gains:
        return {}
    reach = sum(g >= gain for g in gains)
    return {
        "placebo_gains": [round(g, 4) for g in gains],
        "placebo_mean": float(np.mean(gains)),
        "placebo_p": (reach + 1) / (len(gains) + 1),
    }


def _sentence(horizons: dict[str, dict[str, Any]]) -> str:
    good = [
        h
        for h, part in horizons.items()
        if part["gain"] > 0 and (part["dm_p"] or 1) < 0.05 and part.get("placebo_p", 0) <= 0.1
    ]
    if good:
        return f"News improve the forecast at {', '.join(good)} bars."
    return "No evidence that news improve the forecast at any horizon."
