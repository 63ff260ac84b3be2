"""The registry imports nothing before it is asked to; a user's own model is checked, copied and only run on consent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recur import cli
from recur.models.gru import GRU
from recur.models.parity import ParityError, check_parity
from recur.models.registry import MODELS, build_sequence_model, find_core, model_label
from recur.pipeline.artefact import load_artefact
from recur.pipeline.backtest import run_backtest
from recur.pipeline.predict import predict
from recur.pipeline.train import train_price
from recur.storage.runs import RunFolder
from recur.vocabulary import UsageError
from tests.test_train import fill, small

LEAKY = '''
"""A leaky integrator: h' = (1 - a) h + a tanh(W u), y = h."""
import torch
from torch import nn
from recur.models.steps import keep_invalid, restart, scan_steps


class Leaky(nn.Module):
    def __init__(self, d_in, d_out, layers, dropout):
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.w = nn.Linear(d_in, d_out)
        self.a = nn.Parameter(torch.zeros(d_out))

    def init_state(self, batch):
        return {"h": self.a.new_zeros(batch, self.d_out)}

    def forward(self, u, state=None, steps=None):
        return scan_steps(self, u, state, steps)

    def step(self, u_t, state, steps=None):
        before = restart(steps, state, self.init_state(u_t.shape[0]))
        h = torch.lerp(before["h"], torch.tanh(self.w(u_t)), torch.sigmoid(self.a))
        return keep_invalid(steps, h, {"h": h}, before)
'''


@pytest.fixture
def leaky(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(LEAKY)
    return f"{tmp_path / 'mine.py'}:Leaky"


def refusal(tmp_path: Path, source: str, name: str = "Leaky") -> str:
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(UsageError) as caught:
        find_core(f"{path}:{name}")
    return caught.value.message.replace(str(tmp_path), "")


def failing(report: str) -> set[str]:
    """The comparisons of a refusal whose difference is no rounding."""
    found = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+e[+-]\d+),", report)}
    assert len(found) == 10
    return {name for name, value in found.items() if not value <= (1e-4 if name == "single" else 1e-9)}


def test_the_file_of_a_model_runs_once_for_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "told.py").write_text(LEAKY + '\nprint("this file runs")\n')
    fill(tmp_path, bars=900)
    config = small()
    config = replace(
        config,
        model=replace(config.model, name=f"{tmp_path / 'told.py'}:Leaky"),
        train=replace(config.train, epochs=1),
    )
    train_price(tmp_path, config, resume=None, progress=False)
    assert capsys.readouterr().out.count("this file runs") == 1


def test_weights_that_a_model_ties_are_saved(tmp_path: Path) -> None:
    tied = LEAKY.replace("self.a = nn", "self.again = self.w\n        self.a = nn")
    (tmp_path / "tied.py").write_text(tied)
    fill(tmp_path, bars=900)
    config = small()
    config = replace(
        config,
        model=replace(config.model, name=f"{tmp_path / 'tied.py'}:Leaky"),
        train=replace(config.train, epochs=1),
    )
    run = train_price(tmp_path, config, resume=None, progress=False)["run_id"]
    net = load_artefact(RunFolder(tmp_path, run), trust=True).net
    weights = dict(net.state_dict())
    assert torch.equal(weights["core.w.weight"], weights["core.again.weight"])


RUN = "return scan_steps(self, u, state, steps)"
TWO = "y, state = scan_steps(self, u, state, steps)\n        return "


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (RUN, TWO + "torch.cat([y[:, :64], 0 * y[:, 64:]], 1), state", {"steps", "pieces"}),
        ("self.w(u_t)", "self.w(u_t) - self.w(u_t).mean(0)", {"alone", "marks"}),
        (RUN, RUN.replace("steps)", "found_out(steps))"), {"reset", "marks"}),
        (RUN, TWO + "2 * y - y.detach(), state", {"gradient"}),
        (RUN, TWO + "y + 0.1 * (y.dtype == torch.float32), state", {"single"}),
        (RUN, "u = u.roll(-1, 1) if self.training else u\n        " + RUN, {"training"}),
    ],
    ids=["long", "neighbours", "reset at a missing bar", "gradient", "single precision", "training"],
)
def test_each_way_of_running_wrongly_is_told(tmp_path: Path, old: str, new: str, expected: set[str]) -> None:
    assert old in LEAKY
    report = refusal(tmp_path, LEAKY.replace(old, new) + FORGETFUL)
    assert failing(report) == expected


FORGETFUL = """

def found_out(steps):
    if steps is None or steps.valid is None or steps.reset is None:
        return steps
    return type(steps)(steps.valid, steps.reset & steps.valid, steps.elapsed)
"""


def test_importing_the_registry_imports_no_model() -> None:
    script = (
        "import sys, recur.models.registry as r;"
        "print(sorted({m.partition(':')[0] for m in r.MODELS.values()} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_name_builds_a_model_whose_ways_of_running_agree(name: str) -> None:
    report = check_parity(lambda: build_sequence_model(name, 5, 8, 2, 0.0))
    assert report.passed, str(report)


def test_a_model_of_the_users_own_is_found_by_its_file_and_class(leaky: str) -> None:
    core = find_core(leaky)
    assert core.make(3, 4, 1, 0.0)(torch.zeros(2, 5, 3))[0].shape == (2, 5, 4)
    assert core.source == LEAKY.encode()
    assert not core.continuous
    assert model_label(leaky) == "Leaky"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('torch.lerp(before["h"], ', 'torch.lerp(0.5 * state["h"], ', "fails parity in float64"),
        ("    def step(", "    def stride(", "is no sequence model"),
        ("layers, dropout)", "layers)", "failed: TypeError"),
        ("self.d_out)}", "self.d_out + 1)}", "failed: RuntimeError"),
        ('return {"h": self', 'return {"g": self', "failed: KeyError: 'h'"),
        ("torch.tanh(self.w(u_t))", "torch.tan(undefined)", "NameError: name 'undefined' is not defined (line 23)"),
        ("self.d_out = d_in, d_out", "self.d_out = d_in, 8", "d_out=16, layers=2, dropout=0) failed: RuntimeError"),
        ("class Leaky", "class Leeky", "has no class 'Leaky': found Leeky. Did you mean 'Leeky'?"),
        ("import torch\n", "import torhc\n", "cannot be run: ModuleNotFoundError: No module named 'torhc' (line 3)"),
        ("def init_state", "def init_state(", "cannot be run: SyntaxError"),
        ("import torch\n", "raise SystemExit(0)\n", "cannot be run: SystemExit: 0 (line 3)"),
        ("torch.tanh(self.w(u_t))", "exit(0)", "failed: SystemExit: 0 (line 23)"),
        ("scan_steps(self, u, state, steps)", "scan_steps(self, u, state, steps)[0]", "forward gave Tensor, expected"),
        ("return keep_invalid", "keep_invalid", "failed: TypeError: cannot unpack non-iterable NoneType object"),
        ("return keep_invalid", "state['h'].copy_(h)\n        return keep_invalid", "changes the state that it is given"),
        ("return scan_steps", "if state: state['h'].mul_(2)\n        return scan_steps", "forward changes the state that"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_hold_is_refused_in_one_line(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert old in LEAKY
    message = refusal(tmp_path, LEAKY.replace(old, new))
    assert expected in message
    assert "\n" not in message


def test_a_refusal_for_parity_gives_the_numbers(tmp_path: Path) -> None:
    cheating = LEAKY.replace(
        "return scan_steps(self, u, state, steps)",
        "y, end = scan_steps(self, u, state, steps)\n        return y + 0.25, end",
    )
    message = refusal(tmp_path, cheating)
    assert "largest differences steps 2.5e-01, pieces 0.0e+00, reset 2.5e-01, missing" in message
    assert "tolerated 1e-09" in message


def test_a_model_that_ignores_missing_bars_or_resets_is_found_out(tmp_path: Path) -> None:
    deaf = LEAKY.replace("scan_steps(self, u, state, steps)", "scan_steps(self, u, state, None)")
    report = refusal(tmp_path, deaf)
    assert "steps 0.0e+00, pieces 0.0e+00" in report and "fails parity" in report


NAN_AT_RESETS = """
    def restarted(self, steps, state):
        fresh = torch.full_like(state["h"], float("nan")) if steps else state["h"]
        return restart(steps, state, {"h": fresh})
"""


def test_a_model_that_gives_no_number_in_one_comparison_only_is_refused(tmp_path: Path) -> None:
    source = LEAKY.replace(
        "restart(steps, state, self.init_state(u_t.shape[0]))", "self.restarted(steps, state)"
    )
    message = refusal(tmp_path, source + NAN_AT_RESETS)
    assert "largest differences steps 0.0e+00, pieces 0.0e+00, reset nan" in message


def test_a_model_of_continuous_time_must_tell_its_steps_and_its_sequences_the_same_time(
    tmp_path: Path,
) -> None:
    rate = "torch.sigmoid(self.a) * (1 if steps is None or steps.elapsed is None else steps.elapsed[:, None])"
    timed = LEAKY.replace("torch.sigmoid(self.a)", rate).replace(
        "    def __init__", "    continuous = True\n\n    def __init__"
    )
    (tmp_path / "timed.py").write_text(timed)
    assert find_core(f"{tmp_path / 'timed.py'}:Leaky").continuous
    deaf = timed.replace(
        "scan_steps(self, u, state, steps)",
        "scan_steps(self, u, state, type(steps)(steps.valid, steps.reset) if steps else None)",
    )
    report = refusal(tmp_path, deaf)
    assert failing(report) == {"elapsed", "marks"} and "fails parity" in report


def test_parity_checks_leave_the_random_numbers_of_the_caller_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert check_parity(lambda: GRU(3, 4)).passed
    assert torch.equal(torch.rand(3), expected)


def test_a_state_without_the_batch_first_is_refused() -> None:
    class Odd(GRU):
        def init_state(self, batch: int) -> dict[str, torch.Tensor]:
            return {"h": super().init_state(batch)["h"].transpose(0, 1)}

    with pytest.raises(ParityError, match="batch first"):
        check_parity(lambda: Odd(3, 4, 2))


def test_a_file_that_is_not_there_is_wrong_usage_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = str(tmp_path / "home")
    assert cli.run(["train", "price", "--home", home, "--model", "nowhere.py:Name", "--json"]) == 2
    assert "Cannot read the model file nowhere.py" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (tmp_path / "home").exists()


def test_a_run_of_an_own_model_keeps_its_code_and_opens_only_on_consent(tmp_path: Path, leaky: str) -> None:
    fill(tmp_path)
    config = replace(
        small(), model=replace(small().model, name=leaky), train=replace(small().train, epochs=1)
    )
    config = replace(config, train=replace(config.train, until="2025-03-20"))
    metrics = train_price(tmp_path, config, resume=None, progress=False)
    folder = RunFolder(tmp_path, metrics["run_id"])
    assert metrics["model"] == "Leaky"
    assert metrics["run_id"].startswith("train-Leaky-")
    assert (folder.path / "model.py").read_text() == LEAKY
    assert folder.read_json("model.json")["spec"]["model"] == "mine.py:Leaky"

    Path(leaky.partition(":")[0]).unlink()  # from here on the copy is all there is
    with pytest.raises(UsageError, match="would run the code"):
        predict(tmp_path, small(), run=folder.run_id, as_of_ms=None)
    rows = predict(tmp_path, small(), run=folder.run_id, as_of_ms=None, trust=True)["forecasts"]
    assert {r["model"] for r in rows} == {"Leaky"}
    later = replace(small(), backtest=replace(small().backtest, test_since="2025-03-20", folds=1))
    with pytest.raises(UsageError, match="would run the code"):
        run_backtest(tmp_path, later, run=folder.run_id, progress=False)
    judged = run_backtest(tmp_path, later, run=folder.run_id, progress=False, trust=True)
    assert judged["model"] == "Leaky"

    (folder.path / "model.py").write_text(LEAKY + "\n# more\n")
    with pytest.raises(UsageError, match="is not the file that run"):
        load_artefact(folder, trust=True)


def test_going_on_with_an_own_model_takes_the_same_file_again(tmp_path: Path, leaky: str) -> None:
    fill(tmp_path)
    config = replace(
        small(), model=replace(small().model, name=leaky), train=replace(small().train, epochs=1)
    )
    run = train_price(tmp_path, config, resume=None, progress=False)["run_id"]
    with pytest.raises(UsageError, match="model of its own, Leaky, and going on runs its code"):
        train_price(tmp_path, small(), resume=run, progress=False)
    path = Path(leaky.partition(":")[0])
    path.write_text(LEAKY + "\n# more\n")
    with pytest.raises(UsageError, match="has changed since run"):
        train_price(tmp_path, config, resume=run, progress=False)
    path.write_text(LEAKY)
    assert train_price(tmp_path, config, resume=run, progress=False)["run_id"] == run
