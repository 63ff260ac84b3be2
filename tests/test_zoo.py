"""The comparison of models scores finer bars on the same hours and the same outcomes as hourly bars."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest

from recur.pipeline.inference import Forecast, cutoffs
from recur.vocabulary import parse_time
from tests.market import candles

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
START = parse_time("2025-05-01")


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("zoo_benchmark", BENCHMARKS / "zoo.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


def frames() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Quarter-hour bars of 100 days and the hourly bars that they make."""
    fine = candles("BTCUSDT", START, 4 * 24 * 100, interval="15m")
    hourly = (
        fine.group_by(pl.col("open_time").dt.truncate("1h"), maintain_order=True)
        .agg(
            pl.col("category", "symbol", "kind", "open").first(), pl.col("high").max(), pl.col("low").min(),
            pl.col("close").last(), pl.col("volume", "turnover").sum(),
        )
        .with_columns(pl.lit("1h").alias("interval"))
        .select(fine.columns)
    )  # fmt: skip
    return fine, hourly


@pytest.fixture
def data(zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of candle and funding files, and a test span inside them."""
    fine, hourly = frames()
    for name, frame in (("perp_1h", hourly), ("perp_15m", fine)):
        frame.drop("category", "kind").rename({"open_time": "ts"}).write_parquet(
            tmp_path / f"candles_bybit_{name}.parquet"
        )
    times = pl.Series([START]).cast(pl.Datetime("ms", "UTC"))
    pl.DataFrame({"symbol": ["BTCUSDT"], "ts": times, "funding_rate": [1e-4]}).write_parquet(
        tmp_path / "funding_bybit.parquet"
    )
    monkeypatch.setattr(zoo, "SINCE", "2025-07-20")
    monkeypatch.setattr(zoo, "UNTIL", {"15m": "2025-08-01"})
    return tmp_path


def test_finer_bars_are_judged_on_the_rows_of_the_hourly_ones(zoo: ModuleType, data: Path) -> None:
    coarse = zoo.problem(data, "hourly", "15m")
    measures, finer = (zoo.problem(data, kind, "15m") for kind in ("measures", "finer"))
    assert "fine_24" in measures.transform.names and "fine_24" not in coarse.transform.names
    assert finer.config.train.horizons == (4, 24, 96)
    assert finer.config.train.window * finer.config.train.batch == 512 * 32
    assert finer.data[0].target[103, 0] == pytest.approx(coarse.data[0].target[25, 0], abs=1e-12)

    who = zoo.judge(coarse)
    scores = []
    for p in (coarse, finer):
        s = p.data[0]
        at = cutoffs(s, p.split.test_since_ms, p.split.test_until_ms)
        # The same law of standard deviation 1 % at every bar: the scores can differ by the rows alone.
        quantiles = np.broadcast_to(0.01 * np.linspace(-1.6, 1.6, 19), (len(at), 3, 19)).copy()
        flat = np.full((len(at), 3), 0.01)
        scores.append(who.scores([zoo.on_the_hour(Forecast(s, at, quantiles, 0 * flat, flat))]))
    assert scores[0] == scores[1]
    assert scores[0]["1"]["n"] == 12 * 24


def test_the_mean_ahead_is_of_the_bars_after(zoo: ModuleType) -> None:
    found = zoo._mean_ahead(np.array([9.0, 1.0, 3.0, 5.0]), 2)
    assert found[:2].tolist() == [2.0, 4.0]
    assert np.isnan(found[2:]).all()


def test_training_a_model_of_the_zoo_leaves_every_figure_of_the_table(
    zoo: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    p = zoo.problem(data, "hourly", "15m")
    found = zoo.train_and_judge(p, zoo.judge(p), "gru", 0, 1, data / "work")
    (data / "hourly--gru--0.json").write_text(json.dumps(found))
    zoo.table(data, ["hourly"])
    lines = {words[0]: words for words in map(str.split, capsys.readouterr().out.splitlines()) if words}
    assert lines["gru"][1] == "1" and len(lines["gru"]) == 11
    assert f"{found['parameters']:,}" in lines["gru"]
    assert {"har", "random_walk"} <= set(lines)
