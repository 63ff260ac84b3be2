"""The tasks of the memory benchmark ask what they say they ask."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_benchmark", BENCHMARKS / "memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["copy", "selective copy"])
def test_a_recall_asks_for_the_symbols_shown_in_their_order(memory: ModuleType, name: str) -> None:
    examples = memory.TASKS[name].draw(64, torch.Generator().manual_seed(0))
    ids = examples.u.argmax(-1)
    assert examples.u.shape == (64, 4 + 60 + 4, 6)
    for row, wanted in zip(ids, examples.target, strict=True):
        assert row[row < 4].tolist() == wanted.tolist()
        assert row[-4:].tolist() == [5] * 4
    shown = (ids < 4).nonzero()[:, 1]
    assert (shown.max() == 3) == (name == "copy")


def test_the_sum_needs_the_number_of_500_bars_before(memory: ModuleType) -> None:
    examples = memory.TASKS["sum at lag 500"].draw(32, torch.Generator().manual_seed(0))
    values, marks = examples.u.unbind(-1)
    assert examples.u.shape[1] == 501
    assert marks[:, 0].eq(1).all() and marks.sum(1).eq(2).all() and marks[:, 500].eq(0).all()
    second = values[:, 1:][marks[:, 1:] == 1]
    assert torch.allclose(examples.target[:, 0], values[:, 0] + second)


def test_the_oscillator_follows_its_closed_form_over_irregular_gaps(memory: ModuleType) -> None:
    examples = memory.TASKS["irregular time"].draw(3, torch.Generator().manual_seed(0))
    kicks, elapsed = examples.u[1, :, 0].double().numpy(), examples.elapsed[1].double().numpy()
    at = np.cumsum(elapsed)
    for bar in (20, 57, 99):
        ago = at[bar] - at[: bar + 1]
        expected = (kicks[: bar + 1] * np.exp(-ago / 12) * np.cos(2 * np.pi / 15 * ago)).sum()
        assert examples.target[1, bar - 20].item() == pytest.approx(expected, abs=2e-3)


def test_a_result_is_kept_and_shown_in_the_table(memory: ModuleType, tmp_path: Path) -> None:
    found = memory.learn("gru", "irregular time", 0, steps=3)
    assert found["steps"] == 3 and {"score", "shifted", "seconds"} <= set(found)
    memory.file_of(tmp_path, "gru", "irregular time", 0).write_text(json.dumps(found | {"score": 0.97}))
    memory.file_of(tmp_path, "gru", "copy", 0).write_text(json.dumps(found | {"score": 0.25}))
    row = memory.table(tmp_path).splitlines()[2]
    assert row.startswith("| gru | 25 % |  |  | **97 %** |")
