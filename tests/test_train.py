"""Training, resuming, judging and predicting end to end on small real runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from recur.models.registry import MODELS
from recur.pipeline.artefact import load_artefact
from recur.pipeline.backtest import run_backtest
from recur.pipeline.config import Config, MarketConfig
from recur.pipeline.fit import save_state
from recur.pipeline.inspect import inspect_run
from recur.pipeline.predict import predict
from recur.pipeline.settings import dump_toml, load_config
from recur.pipeline.train import train_price
from recur.storage.ledger import first_broken
from recur.storage.runs import RunFolder, list_runs
from recur.storage.store import Store
from recur.vocabulary import HOUR_MS, DataMissing, StoreBusy, UsageError, from_ms, iso, parse_time
from tests.market import candles, funding_frame

START = parse_time("2025-01-01")
SYMBOLS = ("BTCUSDT", "ETHUSDT")


def small() -> Config:
    config = Config()
    return replace(
        config,
        market=replace(config.market, symbols=SYMBOLS),
        model=replace(config.model, hidden=8),
        train=replace(config.train, epochs=3, window=96, burn_in=24, batch=8, val_days=10, device="cpu"),
        backtest=replace(config.backtest, folds=2, test_days=20),
    )


def fill(home: Path, bars: int = 2400) -> None:
    store = Store(home)
    for k, symbol in enumerate(SYMBOLS):
        store.put_candles(candles(symbol, START, bars, seed=k), source="test", now_ms=START)
    store.put_funding(funding_frame("BTCUSDT", START, 300), source="test", now_ms=START)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home")
    fill(path)
    return path


@pytest.fixture(scope="module")
def trained(home: Path) -> dict[str, Any]:
    return train_price(home, small(), resume=None, progress=False)


def test_a_training_run_leaves_weights_spec_logs_and_a_complete_manifest(
    home: Path, trained: dict[str, Any]
) -> None:
    folder = RunFolder(home, trained["run_id"])
    assert folder.status() == "complete"
    assert len(trained["val_pinball"]) == 3
    assert set(load_file(folder.weights)) >= {"head.weight", "core.rnn.weight_hh_l0", "embedding.weight"}
    assert {f.name for f in folder.path.iterdir()} == {
        "config.toml", "features.json", "logs", "manifest.json", "metrics.json", "model.json", "model.safetensors",
    }  # fmt: skip
    assert list(folder.logs.rglob("metrics.csv"))
    assert list(folder.logs.rglob("events.out.tfevents*"))
    assert not [f for f in folder.path.rglob("*") if f.suffix in (".pkl", ".ckpt", ".pt")]


def test_the_same_seed_gives_the_same_weights(home: Path, trained: dict[str, Any]) -> None:
    again = train_price(home, small(), resume=None, progress=False)
    assert again["val_pinball"] == trained["val_pinball"]
    a, b = (load_file(RunFolder(home, r["run_id"]).weights) for r in (trained, again))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_training_killed_after_an_epoch_resumes_and_ends_as_an_undisturbed_one(
    tmp_path: Path, trained: dict[str, Any], home: Path
) -> None:
    fill(tmp_path)
    (tmp_path / "recur.toml").write_text(dump_toml(small()))
    script = (
        "from pathlib import Path; from recur.pipeline.settings import load_config;"
        "from recur.pipeline.train import train_price;"
        f"train_price(Path({str(tmp_path)!r}), load_config([Path({str(tmp_path / 'recur.toml')!r})], [], {{}})[0],"
        "resume=None, progress=False)"
    )
    child = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("runs/*/state.safetensors")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    (run,) = list_runs(tmp_path)
    assert run.status() == "running"
    with pytest.raises(DataMissing):
        predict(tmp_path, small(), run=run.run_id, as_of_ms=None)
    resumed = train_price(tmp_path, small(), resume="last", progress=False)
    assert resumed["run_id"] == run.run_id
    assert run.status() == "complete"
    assert resumed["val_pinball"] == pytest.approx(trained["val_pinball"], rel=1e-6)
    a, b = load_file(run.weights), load_file(RunFolder(home, trained["run_id"]).weights)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


@pytest.mark.parametrize("name", [*MODELS, "hybrid:M*-"])
def test_every_model_is_trained_forecasts_and_is_inspected(tmp_path: Path, name: str) -> None:
    fill(tmp_path, bars=900)
    config = replace(
        small(), model=replace(small().model, name=name), train=replace(small().train, epochs=1, batch=32)
    )
    found = train_price(tmp_path, config, resume=None, progress=False)
    run = found["run_id"]
    assert found["series"] == ["bybit:linear:BTCUSDT:1h", "bybit:linear:ETHUSDT:1h"]
    assert load_artefact(RunFolder(tmp_path, run)).net.spec.model == name
    rows = predict(tmp_path, config, run=run, as_of_ms=None)["forecasts"]
    assert {row["model"] for row in rows} == {name}
    assert len(rows) == len(SYMBOLS) * len(config.train.horizons)
    assert inspect_run(tmp_path, run)["parameters"]["parts"]["core"] > 0


def cut_off(home: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> str:
    """Train, and die after the first epoch is saved; returns the run's id."""
    with monkeypatch.context() as patch:

        def dies(*of: Any) -> None:
            save_state(*of)
            raise KeyboardInterrupt

        patch.setattr("recur.pipeline.fit.save_state", dies)
        with pytest.raises(KeyboardInterrupt):
            train_price(home, config, resume=None, progress=False)
    (run,) = list_runs(home)
    assert run.status() == "running" and (run.path / "state.safetensors").exists()
    return run.run_id


def test_a_run_goes_on_with_the_bars_that_it_began_with_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    run = cut_off(tmp_path, small(), monkeypatch)
    before = (RunFolder(tmp_path, run).path / "features.json").read_bytes()
    earlier = candles("BTCUSDT", START - 100 * HOUR_MS, 100, seed=9)
    Store(tmp_path).put_candles(earlier, source="test", now_ms=START)
    with pytest.raises(
        UsageError, match=r"BTCUSDT:1h has changed since run .* had 2400 bars .* now it has 2500"
    ):
        train_price(tmp_path, small(), resume=run, progress=False)
    assert (RunFolder(tmp_path, run).path / "features.json").read_bytes() == before


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    run = cut_off(tmp_path, small(), monkeypatch)
    newer = candles("BTCUSDT", START + 2400 * HOUR_MS, 50, seed=9)
    Store(tmp_path).put_candles(
        newer, source="test", now_ms=START
    )  # beyond what the run looks at: no hindrance
    with RunFolder(tmp_path, run).at_work(), pytest.raises(StoreBusy, match="by another process"):
        train_price(tmp_path, small(), resume=run, progress=False)
    assert train_price(tmp_path, small(), resume=run, progress=False)["epochs"] == 3


def test_a_damaged_state_of_a_training_is_told_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    run = cut_off(tmp_path, small(), monkeypatch)
    state = RunFolder(tmp_path, run).path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(DataMissing, match=r"state\.safetensors cannot be read"):
        train_price(tmp_path, small(), resume=run, progress=False)
    assert RunFolder(tmp_path, run).status() == "running"


def test_a_backtest_is_no_run_to_predict_with(home: Path) -> None:
    config = replace(
        small(), train=replace(small().train, epochs=1), backtest=replace(small().backtest, folds=1)
    )
    run = run_backtest(home, config, run=None, progress=False)["run_id"]
    with pytest.raises(UsageError, match="no trained price model but a backtest run"):
        predict(home, small(), run=run, as_of_ms=None)


def test_the_configuration_of_a_run_says_how_many_layers_it_has(tmp_path: Path) -> None:
    fill(tmp_path, bars=900)
    config = replace(
        small(),
        model=replace(small().model, name="hybrid:M-"),
        train=replace(small().train, epochs=1, batch=32),
    )
    run = train_price(tmp_path, config, resume=None, progress=False)["run_id"]
    assert load_config([RunFolder(tmp_path, run).config], [], {})[0].model.layers == 2


def test_resuming_with_other_features_is_refused(home: Path, trained: dict[str, Any]) -> None:
    other = replace(small(), train=replace(small().train, horizons=(1, 12, 24)))
    with pytest.raises(UsageError, match="season_12"):
        train_price(home, other, resume=trained["run_id"], progress=False)


def test_resuming_says_what_it_was_given_and_does_not_use(
    home: Path, trained: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = trained["run_id"]
    assert train_price(home, small(), resume=run, progress=False) == trained
    assert caplog.messages == []
    more = replace(small(), train=replace(small().train, epochs=9), model=replace(small().model, hidden=12))
    assert train_price(home, more, resume=run, progress=False) == trained
    assert caplog.messages == [
        f"run {run} goes on with its own configuration: model.hidden = 12, train.epochs = 9 given now is not used"
    ]


def test_resuming_a_run_that_is_not_there_is_refused(home: Path) -> None:
    with pytest.raises(UsageError, match="no training run"):
        train_price(home, small(), resume="train-gru-nothing", progress=False)


def test_training_without_data_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(DataMissing):
        train_price(tmp_path, small(), resume=None, progress=False)
    fill(tmp_path)
    unknown = replace(small(), market=replace(small().market, symbols=("BTCUSDT", "ETHUSD")))
    with pytest.raises(DataMissing, match="Did you mean 'ETHUSDT'"):
        train_price(tmp_path, unknown, resume=None, progress=False)


def test_training_on_too_short_a_history_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, bars=200)
    with pytest.raises(DataMissing, match="nothing is left to train on"):
        train_price(tmp_path, small(), resume=None, progress=False)
    assert list((tmp_path / "runs").iterdir()) == []  # else status would call it running for ever


def test_nothing_after_the_training_span_changes_the_weights(
    home: Path, tmp_path: Path, trained: dict[str, Any]
) -> None:
    """Poisoned later bars leave the fitted network bit-identical (labels, scaler, season, early stopping)."""
    until = parse_time("2025-03-20")
    config = replace(small(), train=replace(small().train, until=iso(until)))
    clean = train_price(home, config, resume=None, progress=False)
    store = Store(tmp_path)
    for k, symbol in enumerate(SYMBOLS):
        frame = candles(symbol, START, 2400, seed=k)
        late = pl.col("open_time").dt.epoch("ms") >= until
        frame = frame.with_columns(
            *(
                pl.when(late).then(pl.col(c) * 9).otherwise(pl.col(c)).alias(c)
                for c in ("open", "high", "low", "close")
            )
        )
        store.put_candles(frame, source="test", now_ms=START)
    store.put_funding(funding_frame("BTCUSDT", START, 300), source="test", now_ms=START)
    poisoned = train_price(tmp_path, config, resume=None, progress=False)
    a = load_file(RunFolder(home, clean["run_id"]).weights)
    b = load_file(RunFolder(tmp_path, poisoned["run_id"]).weights)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_forecast_is_appended_once_and_says_what_it_knew(home: Path, trained: dict[str, Any]) -> None:
    first = predict(home, small(), run=trained["run_id"], as_of_ms=None)
    assert first["appended"] == 6
    rows = first["forecasts"]
    assert [(r["unique_id"], r["horizon"]) for r in rows] == [
        (f"bybit:linear:{s}:1h", h) for s in SYMBOLS for h in (1, 6, 24)
    ]
    assert rows[0]["cutoff"] == "2025-04-11T00:00:00Z"
    assert rows[1]["ds"] == "2025-04-11T06:00:00Z"
    assert rows[0]["late"] is True
    assert rows[0]["known_at"] == "2025-01-01T00:00:00Z"
    assert rows[0]["q05"] < rows[0]["q50"] < rows[0]["q95"]
    assert predict(home, small(), run=trained["run_id"], as_of_ms=None)["appended"] == 0
    assert Store(home).forecasts().height == 6


def test_a_forecast_as_of_an_earlier_time_uses_no_later_bar(home: Path, trained: dict[str, Any]) -> None:
    as_of = parse_time("2025-04-01T12:30")
    rows = predict(home, small(), run=trained["run_id"], as_of_ms=as_of)["forecasts"]
    assert rows[0]["cutoff"] == "2025-04-01T12:00:00Z"


def test_a_market_that_ended_does_not_cost_the_others_their_forecasts(
    home: Path, trained: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(home / "runs", tmp_path / "runs")
    store = Store(tmp_path)
    store.put_candles(candles("BTCUSDT", START + 20_000 * HOUR_MS, 800), source="test", now_ms=START)
    store.put_candles(candles("ETHUSDT", START, 300), source="test", now_ms=START)
    at = START + 20_800 * HOUR_MS
    rows = predict(tmp_path, small(), run=trained["run_id"], as_of_ms=at)["forecasts"]
    assert [(r["unique_id"], r["horizon"]) for r in rows] == [
        ("bybit:linear:BTCUSDT:1h", h) for h in (1, 6, 24)
    ]
    (said,) = caplog.messages
    assert said.startswith("ETHUSDT is left out: its last stored bar closed at 2025-01-13T12:00:00Z.")
    never = replace(small(), market=replace(small().market, symbols=("BTCUSDT", "SOLUSDT")))
    with pytest.raises(DataMissing, match="no linear 1h candles of SOLUSDT"):
        predict(tmp_path, never, run=trained["run_id"], as_of_ms=at)


def test_a_forecast_from_an_old_bar_comes_with_a_warning(
    home: Path, trained: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    end = START + 2400 * HOUR_MS
    predict(home, small(), run=trained["run_id"], as_of_ms=end + HOUR_MS)
    assert caplog.messages == []
    predict(home, small(), run=trained["run_id"], as_of_ms=end + 2 * HOUR_MS)
    assert [text.split(",")[0] for text in caplog.messages] == [
        "BTCUSDT is forecast from 2025-04-11T00:00:00Z",
        "ETHUSDT is forecast from 2025-04-11T00:00:00Z",
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", "xx", "The weights of run .* cannot be loaded"),
        ("features.json", "{}", "does not describe a model .KeyError: 'interval'."),
        ("model.json", '{"spec": 1, "symbols": {}}', "does not describe a model"),
        ("model.json", "[]", "is not a JSON object"),
    ],
)
def test_a_damaged_part_of_a_run_is_missing_data_and_not_a_crash(
    home: Path, trained: dict[str, Any], tmp_path: Path, name: str, content: str, says: str
) -> None:
    folder = tmp_path / "runs" / trained["run_id"]
    shutil.copytree(home / "runs" / trained["run_id"], folder)
    (folder / name).write_text(content)
    with pytest.raises(DataMissing, match=says):
        predict(tmp_path, small(), run=trained["run_id"], as_of_ms=None)


@pytest.fixture(scope="module")
def judged(home: Path) -> dict[str, Any]:
    return run_backtest(home, small(), run=None, progress=False)


def test_a_backtest_scores_every_forecaster_on_the_same_rows(home: Path, judged: dict[str, Any]) -> None:
    assert set(judged["forecast"]) == {"1", "6", "24"}
    f = judged["forecast"]["1"]
    assert f["n"] == 2 * 20 * 24  # the last cutoff is a close with nothing after it, the first one counts
    assert set(f["baselines"]) == {"random_walk", "ewma", "har"}
    for b in f["baselines"].values():
        assert b["crps_skill"] == pytest.approx(1 - f["crps"] / b["crps"], abs=1e-12)
        assert b["crps_skill_low"] < b["crps_skill"] < b["crps_skill_high"]
    assert f["pinball"] == pytest.approx(f["crps"] / 2)
    assert 0.7 < f["coverage_90"] < 1
    assert judged["verdict"]["skill"] in ("none", "weak", "strong")
    assert len(judged["folds"]) == 2
    stored = json.loads(RunFolder(home, judged["run_id"]).metrics.read_text())
    assert stored == json.loads(json.dumps(judged))


def test_the_predictions_of_a_backtest_are_long_rows_with_their_outcomes(
    home: Path, judged: dict[str, Any]
) -> None:
    rows = pl.read_parquet(RunFolder(home, judged["run_id"]).predictions)
    assert rows.height == judged["n_forecasts"]
    assert rows.select("unique_id", "cutoff", "horizon").is_duplicated().sum() == 0
    one = rows.filter((pl.col("unique_id") == "bybit:linear:BTCUSDT:1h") & (pl.col("horizon") == 6))
    close = (
        Store(home)
        .candles(symbols=["BTCUSDT"])
        .select(
            (pl.col("open_time") + pl.duration(hours=1)).alias("ds"), pl.col("close").log().alias("log_close")
        )
    )
    joined = one.join(close, on="ds", how="left").filter(pl.col("actual").is_not_null())
    np.testing.assert_allclose(
        joined["actual"].to_numpy(),
        joined["log_close"].to_numpy() - np.log(joined["close"].to_numpy()),
        atol=1e-12,
    )


def test_a_run_that_has_seen_the_test_span_cannot_be_judged_on_it(
    home: Path, trained: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="would mean nothing"):
        run_backtest(home, small(), run=trained["run_id"], progress=False)


def test_a_trained_run_is_judged_on_what_came_after_it(home: Path) -> None:
    earlier = replace(small(), train=replace(small().train, until="2025-03-20"))
    run = train_price(home, earlier, resume=None, progress=False)["run_id"]
    config = replace(small(), backtest=replace(small().backtest, test_since="2025-03-20", folds=1))
    metrics = run_backtest(home, config, run=run, progress=False)
    assert metrics["folds"][0]["reused"] == run
    unsaid = replace(config, market=MarketConfig())
    again = run_backtest(home, unsaid, run=run, progress=False)
    assert again["series"] == ["bybit:linear:BTCUSDT:1h", "bybit:linear:ETHUSDT:1h"]


def test_a_forecast_for_now_equals_the_backtests_row_for_that_bar(home: Path) -> None:
    """Serving from a short history gives what the backtest gave from the long one, with the same weights."""
    earlier = replace(small(), train=replace(small().train, until="2025-03-20"))
    run = train_price(home, earlier, resume=None, progress=False)["run_id"]
    config = replace(small(), backtest=replace(small().backtest, test_since="2025-03-20", folds=1))
    folder = RunFolder(home, run_backtest(home, config, run=run, progress=False)["run_id"])
    at = parse_time("2025-04-05T09:00")
    backtested = pl.read_parquet(folder.predictions).filter(pl.col("cutoff").dt.epoch("ms") == at)
    served = predict(home, small(), run=run, as_of_ms=at)["forecasts"]
    for row in served:
        same = backtested.filter(
            (pl.col("unique_id") == row["unique_id"]) & (pl.col("horizon") == row["horizon"])
        )
        assert same["q95"][0] == pytest.approx(row["q95"], rel=2e-3)
        assert same["vol"][0] == pytest.approx(row["vol"], rel=2e-3)


def test_a_test_span_after_the_data_is_refused(home: Path) -> None:
    config = replace(small(), backtest=replace(small().backtest, test_since="2030-01-01"))
    with pytest.raises(UsageError, match=r"test span .* is empty"):
        run_backtest(home, config, run=None, progress=False)


def test_a_predict_killed_at_any_moment_leaves_a_ledger_that_a_rerun_completes(
    tmp_path: Path, home: Path, trained: dict[str, Any]
) -> None:
    whole = predict(home, small(), run=trained["run_id"], as_of_ms=parse_time("2025-04-02"))
    command = [
        sys.executable, "-m", "recur.cli", "--home", str(home), "--json", "predict", "--run", trained["run_id"],
        "--as-of", "2025-04-03T05:00Z",
    ]  # fmt: skip
    for wait_s in (0.8, 1.6, 2.4):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait_s)
        child.kill()
        child.wait()
        assert Store(home).forecasts().filter(
            pl.col("cutoff") == from_ms(parse_time("2025-04-03T05:00"))
        ).height in (0, 6)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    entries = Store(home).forecasts()
    assert entries.filter(pl.col("cutoff") == from_ms(parse_time("2025-04-03T05:00"))).height == 6
    assert first_broken(entries) is None
    assert len(whole["forecasts"]) == 6


def test_a_market_that_does_not_move_is_trained_judged_and_forecast_without_failing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for symbol in SYMBOLS:
        flat = candles(symbol, START, 1500).with_columns(
            *(pl.lit(100.0).alias(c) for c in ("open", "high", "low", "close")), pl.lit(0.0).alias("volume")
        )
        store.put_candles(flat, source="test", now_ms=START)
    metrics = run_backtest(
        tmp_path, replace(small(), backtest=replace(small().backtest, folds=1)), run=None, progress=False
    )
    assert metrics["verdict"]["skill"] == "none"
