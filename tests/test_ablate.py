"""With and without news: the same rows, a paired test, and a placebo that shuffles the times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recur.pipeline.ablate import ablate_news
from recur.pipeline.config import Config
from recur.pipeline.news import put_items
from recur.pipeline.train import train_price
from recur.storage.runs import RunFolder
from recur.storage.store import Store
from recur.vocabulary import DAY_MS, HOUR_MS, DataMissing, parse_time
from tests.market import candles

START = parse_time("2025-01-01")


def _config() -> Config:
    config = Config()
    return replace(
        config,
        market=replace(config.market, symbols=("BTCUSDT",)),
        model=replace(config.model, hidden=8),
        train=replace(config.train, epochs=1, window=96, burn_in=24, batch=8, val_days=10, device="cpu"),
        backtest=replace(config.backtest, folds=1, test_days=15),
    )


def _news(days: int) -> pl.DataFrame:
    times = [START + d * DAY_MS + h * HOUR_MS + 7 * 60_000 for d in range(days) for h in (3, 11, 17)]
    return pl.DataFrame(
        {
            "news_id": [str(k) for k in range(len(times))],
            "published_at": pl.Series(times).cast(pl.Datetime("ms", "UTC")),
            "published_precision": ["minute"] * len(times),
            "title": [f"Bitcoin item number {k} of the day" for k in range(len(times))],
        }
    ).with_columns(
        pl.lit(None, dtype=pl.String).alias("body"),
        pl.lit(None, dtype=pl.String).alias("url"),
        pl.lit("paper").alias("source"),
        pl.lit("[]").alias("tags"),
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home")
    store = Store(path)
    store.put_candles(candles("BTCUSDT", START, 1500, seed=1), source="test", now_ms=START)
    put_items(store, _news(62), source="test", now_ms=START, languages=("en",), backfill=True)
    return path


@pytest.fixture(scope="module")
def result(home: Path) -> dict[str, Any]:
    return ablate_news(home, _config(), placebo=2, progress=False)


def test_both_arms_and_the_placebo_are_runs_on_the_same_rows(home: Path, result: dict[str, Any]) -> None:
    arms = [RunFolder(home, result[arm]) for arm in ("with", "without")]
    names = [[f["name"] for f in a.part("folds/1").read_json("features.json")["features"]] for a in arms]
    assert len(names[0]) - len(names[1]) == 22
    assert all(name.startswith("news_") for name in set(names[0]) - set(names[1]))
    rows = [pl.read_parquet(a.predictions).select("unique_id", "cutoff", "horizon") for a in arms]
    assert rows[0].equals(rows[1])
    assert [RunFolder(home, r).read_manifest()["placebo"] for r in result["placebo_runs"]] == [0, 1]


def test_the_gain_of_every_horizon_has_its_test_and_its_place_among_the_placebos(
    result: dict[str, Any],
) -> None:
    assert set(result["horizons"]) == {"1", "6", "24"}
    for part in result["horizons"].values():
        assert len(part["placebo_gains"]) == 2
        assert part["placebo_p"] in (pytest.approx(1 / 3), pytest.approx(2 / 3), pytest.approx(1.0))
        assert -20 < part["gain"] < 20
    assert result["text"].endswith(".")


def test_without_any_news_the_ablation_says_what_to_do(tmp_path: Path) -> None:
    Store(tmp_path).put_candles(candles("BTCUSDT", START, 1500, seed=1), source="test", now_ms=START)
    with pytest.raises(DataMissing, match="holds no news"):
        ablate_news(tmp_path, _config(), placebo=0, progress=False)


def test_scores_that_are_not_there_are_asked_for(home: Path) -> None:
    config = _config()
    config = replace(config, features=replace(config.features, news=True, news_run="sentiment-none"))
    with pytest.raises(DataMissing, match="no scores of features"):
        train_price(home, config, resume=None, progress=False)
