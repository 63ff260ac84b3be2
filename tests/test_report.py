"""The report page: what it must say, and what must never be in it."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recur.pipeline.figures import drawdown
from recur.pipeline.report import MAX_BYTES, write_report
from recur.storage.runs import RunFolder
from recur.vocabulary import DataMissing

LEVELS = range(5, 100, 5)
BASELINES = ("random_walk", "ewma", "garch", "har", "linear")
START = datetime(2025, 1, 1, tzinfo=UTC)
SERIES = ["bybit:linear:BTCUSDT:1h", "bybit:linear:ETHUSDT:1h"]


def make_predictions(folder: RunFolder, series: list[str], cutoffs: int = 200) -> None:
    rng = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    z = np.array([-1.64, -1.28, -1.04, -0.84, -0.67, -0.52, -0.39, -0.25, -0.13, 0.0])
    z = np.concatenate([z, -z[:-1][::-1]])
    for name in series:
        log_price = np.log(60_000) + np.cumsum(0.004 * rng.standard_t(4, cutoffs + 30))
        for t in range(cutoffs):
            for h in (1, 6, 24):
                vol = 0.005 * np.sqrt(h)
                rows.append(
                    {"unique_id": name, "cutoff": START + timedelta(hours=t), "ds": START + timedelta(hours=t + h),
                     "horizon": h, "model": "gru", "run_id": "r", "mean": 0.0, "prob_up": 0.5, "vol": vol,
                     "close": float(np.exp(log_price[t])), "actual": float(log_price[t + h] - log_price[t]),
                     **{f"q{level:02d}": float(vol * z[i]) for i, level in enumerate(LEVELS)}}
                )  # fmt: skip
    folder.path.mkdir(parents=True, exist_ok=True)
    times = [pl.col("cutoff", "ds").cast(pl.Datetime("ms", "UTC"))]
    pl.DataFrame(rows).with_columns(times).write_parquet(folder.predictions)


def make_metrics() -> dict[str, Any]:
    forecast = {}
    for h in (1, 6, 24):
        baselines = {
            name: {"crps": 0.0021 * h**0.5, "crps_skill": s, "crps_skill_low": s - 0.011, "crps_skill_high": s + 0.012,
                   "qlike": -9.1, "qlike_diff": -0.03, "dm_stat": -3.2, "dm_p": 0.0014}
            for name, s in zip(BASELINES, (0.071, 0.032, 0.021, 0.005, -0.02), strict=True)
        }  # fmt: skip
        forecast[str(h)] = {
            "n": 4320, "crps": 0.002 * h**0.5, "pinball": 0.001, "coverage_50": 0.507, "coverage_90": 0.893,
            "pit_ks": 0.012, "qlike": -9.2, "ic": None, "rank_ic": None, "auc": None, "baselines": baselines,
            "by_series": {name: {"ewma": 0.03, "har": 0.004} for name in SERIES},
        }  # fmt: skip
    bounds = {"train_until": "2025-01-01T00:00:00Z", "test_since": "2025-01-02T00:00:00Z"}
    return {
        "run_id": "backtest-gru-1", "model": "gru", "series": SERIES, "horizons": [1, 6, 24], "n_forecasts": 25920,
        "folds": [bounds, bounds], "forecast": forecast,
        "pit_levels": {str(h): [level / 100 + 0.01 for level in LEVELS] for h in (1, 6, 24)},
        "trading": {"gross_sharpe": 0.9, "net_sharpe": 0.41, "net_return": 0.062, "max_drawdown": -0.11,
                    "turnover": 212.0, "fees": 0.1166, "slippage": 0.0212, "funding": -0.004, "break_even_bps": 8.3,
                    "deflated_sharpe": 0.42, "n_trials": 3, "buy_hold_sharpe": 0.7, "fee_bps": 5.5,
                    "slippage_bps": 1.0, "trade_horizon": 24, "bars_per_year": 8760.0},
        "verdict": {"skill": "weak", "text": "The model beats ewma at every horizon, and har nowhere for sure."},
    }  # fmt: skip


def make_backtest(home: Path, **changes: object) -> RunFolder:
    folder = RunFolder(home, "backtest-gru-1")
    make_predictions(folder, SERIES)
    folder.write_json("manifest.json", {"status": "complete", "run_id": "backtest-gru-1", "seed": 0})
    folder.write_text("config.toml", '[model]\nname = "gru"\n')
    folder.write_json("metrics.json", make_metrics() | changes)
    n = 4320
    rng = np.random.default_rng(5)
    times = pl.Series([START + timedelta(hours=t) for t in range(n)]).cast(pl.Datetime("ms", "UTC"))
    gross = np.cumsum(0.0005 * rng.standard_normal(n) + 0.00005)
    pl.DataFrame(
        {"time": times, "net": gross - np.arange(n) * 3e-5, "gross": gross,
         "buy_hold": np.cumsum(0.004 * rng.standard_normal(n))}
    ).write_parquet(folder.path / "equity.parquet")  # fmt: skip
    pl.concat(
        pl.DataFrame(
            {"time": times, "horizon": [h] * n, "ewma": np.cumsum(rng.standard_normal(n) - 0.1) * 1e-4}
        )
        for h in (1, 6, 24)
    ).write_parquet(folder.path / "cum_difference.parquet")
    return folder


class Structure(HTMLParser):
    """Collects tags and ids, and fails on an element that is closed by the wrong tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(make_backtest(tmp_path_factory.mktemp("home"))).read_text(encoding="utf-8")


def test_the_page_runs_no_script_and_asks_nobody_for_anything(page: str) -> None:
    assert re.findall(r"https?://", page) == []
    for forbidden in ("<script", "<link", "<img", "<iframe", "@import", "url(http", "javascript:"):
        assert forbidden not in page
    assert "default-src 'none'" in page
    assert len(page.encode()) < MAX_BYTES


def test_the_page_is_well_formed_and_every_id_is_used_once(page: str) -> None:
    found = Structure(page)
    assert sorted(found.ids) == sorted(set(found.ids))
    referred = re.findall(r'(?:url\(|href=")#([^")]+)', page)
    assert referred and set(referred) <= set(found.ids)
    assert found.tags.count("svg") == 1 + 3 + 1 + 2 * 2 + 1


def test_the_pictures_take_their_colours_from_the_page_so_that_dark_pages_are_legible(page: str) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert re.findall(r"(?:fill|stroke): #[0-9a-f]+", pictures) == []
    assert "var(--ours)" in pictures
    assert "prefers-color-scheme:dark" in page


def test_the_verdict_and_its_key_numbers_come_first(page: str) -> None:
    verdict = page.index("The model beats ewma at every horizon")
    assert verdict < page.index("<table")
    assert "−2.00 %" in page[verdict : page.index("<table")]
    assert "[−3.10, −0.80] %" in page
    assert "against linear, the strongest baseline there" in page
    assert "24 bars (1 d)" in page


def test_the_page_says_how_its_numbers_were_made(page: str) -> None:
    for words in ("95 % block bootstrap", "from 19 quantiles", "365 days", "no promise", "8.30 bps"):
        assert words in page


def test_a_real_market_has_no_banner_and_a_simulated_one_has_it(page: str, tmp_path: Path) -> None:
    assert "This market is simulated." not in page
    oracle = {"1": {"crps_skill": 0.05, "share": 0.64, "text": "The <i>true</i> law gives 5 %."}}
    simulated = write_report(make_backtest(tmp_path, simulated=True, oracle=oracle)).read_text(
        encoding="utf-8"
    )
    assert "This market is simulated." in simulated
    assert "What was attainable" in simulated
    assert "64.0 %" in simulated
    assert "The &lt;i&gt;true&lt;/i&gt; law gives 5 %." in simulated


def test_nulls_become_dashes_and_sentences(tmp_path: Path) -> None:
    metrics = make_metrics()
    metrics["trading"] = dict.fromkeys(metrics["trading"])
    metrics["verdict"] = metrics["pit_levels"] = metrics["folds"] = None
    metrics["forecast"] = {
        "1": {"n": None, "crps": None, "baselines": {"ewma": {"crps": 0.1, "crps_skill": None}}}
    }
    folder = make_backtest(tmp_path, **metrics)
    page = write_report(folder).read_text(encoding="utf-8")
    for sentence in (
        "The run holds no verdict.", "No baseline was scored", "No trading was simulated", "no calibration plot",
        "The bounds of the folds were not recorded.", "Skill by series was not recorded.",
    ):  # fmt: skip
        assert sentence in page
    for word in (">None<", "nan %", ">nan<"):
        assert word not in page


def test_absent_or_empty_files_are_named_in_a_sentence(tmp_path: Path) -> None:
    folder = make_backtest(tmp_path)
    folder.predictions.unlink()
    (folder.path / "cum_difference.parquet").write_bytes(b"not parquet")
    equity = pl.read_parquet(folder.path / "equity.parquet")
    equity.with_columns(pl.lit(None, dtype=pl.Float64).alias(name) for name in ("net", "gross", "buy_hold")
    ).write_parquet(folder.path / "equity.parquet")  # fmt: skip
    page = write_report(folder).read_text(encoding="utf-8")
    assert "This run has no predictions.parquet" in page
    assert "cum_difference.parquet cannot be read" in page
    assert "equity.parquet holds no numbers" in page


def test_predictions_with_nulls_still_draw_what_is_known(tmp_path: Path) -> None:
    folder = make_backtest(tmp_path)
    frame = pl.read_parquet(folder.predictions)
    last = pl.col("cutoff") == pl.col("cutoff").max()
    frame.with_columns(
        pl.when(last).then(None).otherwise(pl.col("actual")).alias("actual"),
        pl.when(last & (pl.col("unique_id") == SERIES[0])).then(None).otherwise(pl.col("q95")).alias("q95"),
    ).write_parquet(folder.predictions)
    page = write_report(folder).read_text(encoding="utf-8")
    assert f"{SERIES[0]}: the last cutoff has no price or no quantiles" in page
    assert f"Forecast fan of {SERIES[1]}" in page
    assert "of 71 outcomes lie outside" in page


def test_every_string_of_a_run_is_escaped(tmp_path: Path) -> None:
    evil = "<b>$x$ \"&'</b><script>alert(1)</script>"
    metrics = make_metrics()
    metrics["run_id"], metrics["model"], metrics["series"] = "run <b>bold</b>", evil, [evil]
    metrics["verdict"] = {"skill": evil, "text": evil}
    metrics["folds"] = [{evil: evil}]
    metrics["forecast"]["1"]["baselines"][evil] = {"crps_skill": 0.1}
    metrics["forecast"]["1"]["by_series"] = {evil: {evil: 0.1}}
    folder = make_backtest(tmp_path, **metrics)
    make_predictions(folder, [evil], cutoffs=40)
    folder.write_json("manifest.json", {"status": "complete", evil: evil})
    folder.write_text("config.toml", f"# {evil}\n")
    page = write_report(folder).read_text(encoding="utf-8")
    assert "run &lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>bold" not in page and "<b>$x$" not in page and "<script" not in page
    assert "script" not in Structure(page).tags


def test_a_training_run_gets_its_curve_and_no_claim_of_skill(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "train-gru-1")
    folder.write_json("manifest.json", {"status": "complete", "model": "gru"})
    folder.write_json(
        "metrics.json", {"val_pinball": [0.31, 0.29, None, 0.295], "epochs": 4, "best_epoch": 1}
    )
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Training report" in page
    assert "the lowest validation loss is 0.29000, after epoch 2" in page
    assert page.count("<svg") == 1
    assert "no proof of skill" in page


def test_a_run_without_metrics_says_so_and_one_without_a_manifest_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "train-gru-2")
    with pytest.raises(DataMissing, match=r"has no manifest\.json"):
        write_report(folder)
    folder.write_json("manifest.json", {"status": "complete"})
    assert "This run has no metrics.json" in write_report(folder).read_text(encoding="utf-8")
    assert sorted(path.name for path in folder.path.iterdir()) == ["manifest.json", "report.html"]


def test_many_series_and_a_huge_manifest_stay_under_the_size_limit(tmp_path: Path) -> None:
    folder = make_backtest(tmp_path)
    make_predictions(folder, [f"bybit:linear:COIN{i:02d}USDT:1h" for i in range(20)], cutoffs=80)
    folder.write_json("manifest.json", {"status": "complete", "data": ["x" * 100] * 20_000})
    page = write_report(folder).read_text(encoding="utf-8")
    assert len(page.encode()) < MAX_BYTES
    assert "Shown are 12 of 20 series" in page
    assert "more characters in the file itself" in page


def test_drawdown_is_the_loss_from_the_highest_value_so_far() -> None:
    equity = np.log([0.8, 1.0, 2.0, 1.0, np.nan, 4.0])
    np.testing.assert_allclose(drawdown(equity), [-0.2, 0.0, 0.0, -0.5, np.nan, 0.0], atol=1e-12)
