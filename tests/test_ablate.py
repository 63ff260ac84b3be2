"""With and without news: the same rows, a paired test, and a placebo that shuffles the times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from recur.models.registry import MODELS
from recur.models.widen import begin_as
from recur.pipeline.ablate import ablate_news
from recur.pipeline.config import Config
from recur.pipeline.features import FeatureTransform
from recur.pipeline.news import put_items
from recur.pipeline.newsfeatures import NAMES
from recur.pipeline.train import build_net, train_price
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


def test_news_that_say_nothing_change_nothing(tmp_path: Path) -> None:
    """Start, batches, dropout and steps are the same in both arms: without a word in time, so are the forecasts."""
    store = Store(tmp_path)
    store.put_candles(candles("BTCUSDT", START, 1500, seed=1), source="test", now_ms=START)
    late = _news(1).with_columns(pl.col("published_at") + pl.duration(days=400))
    put_items(store, late, source="test", now_ms=START, languages=("en",), backfill=True)
    found = ablate_news(tmp_path, _config(), placebo=0, progress=False)
    levels = pl.col("^q\\d+$")
    one, two = (pl.read_parquet(RunFolder(tmp_path, found[arm]).predictions) for arm in ("with", "without"))
    np.testing.assert_allclose(one.select(levels), two.select(levels), rtol=1e-3, atol=1e-7)
    assert all(abs(part["gain"]) < 1e-3 for part in found["horizons"].values())


@pytest.mark.parametrize("name", MODELS)
def test_both_arms_begin_as_the_same_forecaster(name: str) -> None:
    config = replace(_config(), model=replace(_config().model, name=name, hidden=16, layers=2))
    horizons = config.train.horizons
    without = FeatureTransform("1h", horizons)
    plain = build_net(config, without, {"BTCUSDT": 1}).eval()
    news = build_net(config, replace(without, has_news=True), {"BTCUSDT": 1}).eval()
    x = torch.randn(3, 12, len(without.names), generator=torch.Generator().manual_seed(1))
    told = 3 * torch.randn(3, 12, len(NAMES), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():  # the heads begin at zero: the state is what tells two starts apart
        symbol = torch.tensor([1, 0, 1])
        y, _ = plain.core(plain.inputs(x, symbol))
        y_news, _ = news.core(news.inputs(torch.cat([x, told], -1), symbol))
    torch.testing.assert_close(y_news, y, atol=1e-5, rtol=1e-5)
    assert y.std() > 1e-3


def test_the_news_are_learned_from_the_first_step_on() -> None:
    without = FeatureTransform("1h", (1, 6, 24))
    net = build_net(_config(), replace(without, has_news=True), {"BTCUSDT": 1})
    at, n = len(without.names), len(NAMES)
    x = torch.randn(2, 12, at + n, generator=torch.Generator().manual_seed(1))
    y, _ = net.core(net.inputs(x, torch.tensor([1, 1])))
    wide = at + n + _config().model.embed
    (weight,) = [p for name, p in net.named_parameters() if name.startswith("core.") and p.shape[-1] == wide]
    (grad,) = torch.autograd.grad(y.square().sum(), weight)
    assert not weight[:, at : at + n].any()
    assert (grad[:, at : at + n] != 0).any(dim=0).all()


class Odd(torch.nn.Module):
    """As many layers as inputs."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(d_in))


def test_a_network_of_another_build_keeps_its_own_start() -> None:
    wide = Odd(5)
    before = [p.clone() for p in wide.parameters()]
    assert not begin_as(wide, Odd(3), 2, 2)
    assert not begin_as(torch.nn.Linear(5, 5), torch.nn.Linear(3, 3), 2, 2)
    assert all(torch.equal(p, q) for p, q in zip(wide.parameters(), before, strict=True))
