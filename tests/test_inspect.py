"""Inspecting a run: counts against the formulas, findings of a known recurrence, and what happens without data."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recur import cli
from recur.models.forecaster import Forecaster, ForecasterSpec
from recur.pipeline.backtest import run_backtest
from recur.pipeline.inspect import ablation, inspect_run, parameters
from recur.pipeline.samples import Samples
from recur.pipeline.train import train_price
from recur.storage.runs import RunFolder
from recur.vocabulary import DataMissing
from tests.test_train import fill, small


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home")
    fill(path)
    return path


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, Any]:
    config = replace(small(), train=replace(small().train, epochs=1))
    run = train_price(home, config, resume=None, progress=False)["run_id"]
    return inspect_run(home, run)


def net(model: str, layers: int = 1) -> Forecaster:
    spec = ForecasterSpec(
        model=model, n_features=10, n_symbols=5, horizons=(1, 6), hidden=8, layers=layers, embed=3, dropout=0.0,
        drift=False,
    )  # fmt: skip
    return Forecaster(spec)


def test_the_parameters_of_a_gru_are_the_formulas_and_a_second_bias() -> None:
    counted = parameters(net("gru", layers=2))
    # 3 · 8 · (13 + 8 + 1) + 3 · 8 · (8 + 8 + 1)
    assert counted["core"]["expected"] == 528 + 408
    assert counted["core"]["second_bias"] == 2 * 24
    assert counted["core"]["other"] == 0
    assert counted["parts"] == {"embedding": 15, "core": 984, "head": 9 * 22, "mean_head": 9 * 2}
    assert counted["total"] == 15 + 984 + 198 + 18


def test_an_inspection_holds_every_finding_and_a_picture(home: Path, found: dict[str, Any]) -> None:
    folder = RunFolder(home, found["run_id"])
    assert json.loads((folder.path / "inspect.json").read_text()) == {
        k: v for k, v in found.items() if k != "plot"
    }
    svg = ET.parse(folder.path / "inspect.svg").getroot()
    assert svg.tag.endswith("svg")
    assert found["spectral_radius"]["state_size"] == 8
    assert found["spectral_radius"]["points"] == 64
    assert 0 < found["spectral_radius"]["median"] < 1.2
    assert [g["gate"] for g in found["gates"]] == ["layer 1 reset", "layer 1 update"]
    assert all(0 < g["mean"] < 1 for g in found["gates"])
    norms = found["gradient"]["norm_by_lag"]
    assert len(norms) == 512
    assert norms[0] > norms[200]
    bars = [row["bars"] for row in found["ablation"]["rows"]]
    assert bars == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, found["ablation"]["longest"]]
    assert found["ablation"]["rows"][-1]["worse"] == 0
    assert set(found["ablation"]["rows"][0]["pinball"]) == {"1", "6", "24"}


def test_the_ablation_finds_a_memory_of_four_bars() -> None:
    """The outcome is as wide as the input of three bars ago says: less than four bars of state must cost."""
    torch.manual_seed(0)
    n = 4000
    loud = (torch.rand(n, 1) < 0.5).float()
    width = 1 + 4 * loud.roll(3, 0)
    target = (torch.randn(n, 1) * width).expand(n, 2)
    mask = torch.ones(n, 2, dtype=torch.bool)
    mask[:8] = False
    x = torch.cat([loud, torch.zeros(n, 9)], 1)
    series = Samples(1, x, target.contiguous(), mask, torch.ones(n, dtype=torch.bool), torch.ones(n))
    model = net("gru")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    from recur.models.forecaster import forecast_loss

    for _ in range(150):
        at = torch.randint(8, n - 40, (16,))
        rows = [slice(int(t), int(t) + 40) for t in at]
        out, _ = model(torch.stack([x[r] for r in rows]), torch.ones(16, dtype=torch.long))
        optimizer.zero_grad()
        loss = forecast_loss(
            out, torch.stack([target[r] for r in rows]), torch.stack([mask[r] for r in rows])
        )
        torch.autograd.backward(loss)
        optimizer.step()
    worse = {row["bars"]: row["worse"] for row in ablation(model.eval(), [series])["rows"]}
    assert worse[1] > 0.04 and worse[2] > 0.04
    assert abs(worse[8]) < 0.02


def test_a_backtest_is_inspected_by_its_last_fold(home: Path) -> None:
    config = replace(small(), train=replace(small().train, epochs=1))
    run = run_backtest(home, config, run=None, progress=False)["run_id"]
    assert inspect_run(home, run)["run_id"] == run


def test_without_the_bars_an_inspection_says_that_data_are_missing(
    home: Path, found: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / found["run_id"]).symlink_to(home / "runs" / found["run_id"])
    words = ["inspect", found["run_id"], "--home", str(tmp_path), "--json"]
    assert cli.run(words) == 3
    assert "no store" in json.loads(capsys.readouterr().out)["error"]["message"]
    fill(tmp_path, bars=300)
    with pytest.raises(DataMissing, match="was checked on"):
        inspect_run(tmp_path, found["run_id"])
    assert cli.run(["inspect", "--home", str(tmp_path / "empty")]) == 3


def test_a_run_without_its_weights_is_to_be_trained_again(
    home: Path, found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = RunFolder(home, found["run_id"]).weights
    aside = weights.rename(weights.with_suffix(".aside"))
    try:
        assert cli.run(["inspect", found["run_id"], "--home", str(home), "--json"]) == 3
    finally:
        aside.rename(weights)
    error = json.loads(capsys.readouterr().out)["error"]
    assert f"The weights of run {found['run_id']} cannot be loaded: No such file" in error["message"]
    assert error["hint"] == "Train again with 'recur train price'."


def test_the_command_prints_tables_or_one_document_and_repeats_itself(
    home: Path, found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["inspect", found["run_id"], "--home", str(home)]) == 0
    text = capsys.readouterr().out
    assert "3·d_h·(d_x + d_h + 1)" in text
    assert "layer 1 update" in text
    folder = RunFolder(home, found["run_id"])
    before = [(folder.path / name).read_bytes() for name in ("inspect.json", "inspect.svg")]
    assert cli.run(["inspect", "--home", str(home), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert before == [(folder.path / name).read_bytes() for name in ("inspect.json", "inspect.svg")]
