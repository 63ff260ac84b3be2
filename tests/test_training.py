"""How training runs through the bars, what it decays, when it stops, and that missing bars mean the same everywhere."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from recur.models.forecaster import Forecaster, ForecasterSpec, forecast_loss, in_chunks
from recur.models.gru import GRU
from recur.models.registry import Core
from recur.pipeline import fit as fitting
from recur.pipeline.backtest import run_backtest
from recur.pipeline.config import Config
from recur.pipeline.dataset import elapsed_bars
from recur.pipeline.predict import predict
from recur.pipeline.samples import NOTHING, Samples, Streams, Windows
from recur.pipeline.train import train_price
from recur.storage.runs import RunFolder
from recur.storage.store import Store
from recur.vocabulary import RecurError, parse_time
from tests.market import candles
from tests.test_own_models import LEAKY
from tests.test_train import START, SYMBOLS, fill, small

TIMED = LEAKY.replace("class Leaky(nn.Module):", "class Leaky(nn.Module):\n    continuous = True\n").replace(
    'h = torch.lerp(before["h"], torch.tanh(self.w(u_t)), torch.sigmoid(self.a))',
    "dt = 1.0 if steps is None or steps.elapsed is None else steps.elapsed[:, None]\n"
    "        keep = torch.sigmoid(-self.a) ** dt\n"
    '        h = keep * before["h"] + (1 - keep) * torch.tanh(self.w(u_t))',
)


def samples(lengths: list[int], first_label: int = 3) -> list[Samples]:
    """Series whose only feature counts the bars: 1000 · series + bar."""
    out = []
    for k, n in enumerate(lengths):
        count = torch.arange(n, dtype=torch.float32)[:, None]
        mask = torch.ones(n, 1, dtype=torch.bool)
        mask[:first_label] = mask[-1:] = False
        out.append(
            Samples(k + 1, 1000 * k + count, count, mask, torch.ones(n, dtype=torch.bool), torch.ones(n))
        )
    return out


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(6, 200), min_size=1, max_size=5),
    batch=st.integers(1, 9),
    window=st.integers(4, 40),
    epoch=st.integers(0, 3),
)
def test_a_carried_row_goes_on_exactly_where_its_last_window_ended(
    lengths: list[int], batch: int, window: int, epoch: int
) -> None:
    streams = Streams(samples(lengths), window, 2, batch, 0, shuffle=True)
    streams.epoch = epoch
    seen: dict[int, float] = {}
    labels: list[float] = []
    for b in streams:
        assert len(b.x) == len(seen or b.x), "the rows of the batch stay the same"
        for row in range(len(b.x)):
            used = int((b.x[row, :, 0] > 0).nonzero().max()) + 1 if (b.x[row, :, 0] > 0).any() else 0
            if not used:
                seen[row] = math.nan
                continue
            if not b.fresh[row]:
                assert float(b.x[row, 0, 0]) == seen[row] + 1
            assert b.x[row, :used, 0].diff().eq(1).all()
            seen[row] = float(b.x[row, window - 1, 0])  # padding leaves 0 here: nothing may go on from it
            labels += b.x[row][b.mask[row, :, 0]].flatten().tolist()
    assert len(labels) == len(set(labels))
    # What is left out: a part of a window at each begin, and the warm-up of each row's begin.
    total = sum(max(0, n - 4) for n in lengths)
    assert total - len(lengths) * (window + 2) - 2 * batch <= len(labels) <= total


def test_rows_that_came_to_their_end_carry_no_loss() -> None:
    streams = Streams(samples([45, 45]), 8, 2, 4, 0, shuffle=True)
    assert len(streams._plan()[0]) == 4
    met = 0
    for streams.epoch in range(6):
        empty = [row for row, w in enumerate(streams._plan()[-1]) if w == NOTHING]
        met += len(empty)
        assert not list(streams)[-1].mask[empty].any()
    assert met


def net(continuous: bool = False, core: Core | None = None) -> Forecaster:
    torch.manual_seed(0)
    spec = ForecasterSpec(
        model="gru", n_features=1, n_symbols=9, horizons=(1,), hidden=6, layers=1, embed=2, dropout=0.0,
        drift=False, continuous=continuous,
    )  # fmt: skip
    made = Forecaster(spec, core)
    nn.init.normal_(made.head.weight)
    return made


def test_the_carried_state_makes_windows_equal_to_one_long_pass() -> None:
    config = replace(Config().train, state="carried", window=16, burn_in=2, batch=1)
    streams = Streams(samples([100]), 16, 2, 1, 0, shuffle=True)
    module = fitting.ForecasterModule(net(), config, len(streams))
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    module.trainer = L.Trainer(logger=False, barebones=True)
    total, count, parts = 0.0, 0, []
    for k, b in enumerate(streams):
        loss = module.training_step(b, k)
        total, count = total + loss.item() * int(b.mask.sum()), count + int(b.mask.sum())
        parts.append((b.x, b.target, b.mask))
    x, y, mask = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    out, _ = module.net(x, b.symbol)
    assert total / count == pytest.approx(forecast_loss(out, y, mask).item(), rel=1e-5)


def test_gradients_end_at_the_window_although_the_state_goes_on() -> None:
    config = replace(Config().train, state="carried")
    module = fitting.ForecasterModule(net(), config, 1)
    module.state = {"h": torch.ones(2, 1, 6, requires_grad=True)}
    state = module._begin(torch.tensor([True, False]))
    assert state is not None
    assert state["h"][:, 0, 0].tolist() == [0.0, 1.0]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_step_gives_the_loss_and_gradients_of_the_plain_one() -> None:
    pytest.importorskip("torch._inductor")
    found = []
    for compiled in (False, True):
        module = fitting.ForecasterModule(net(), Config().train, 1, compiled=compiled)
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
        module.trainer = L.Trainer(logger=False, barebones=True)
        loss = module.training_step(next(iter(Windows(samples([60]), 16, 2, 2, 0, shuffle=True))), 0)
        torch.autograd.backward(loss)
        grads = [p.grad.flatten() for p in module.net.parameters() if p.grad is not None]
        found.append(torch.cat([loss.detach()[None], *grads]))
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_only_matrices_that_mix_are_decayed() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.free = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
            self.free._no_weight_decay = True  # type: ignore[attr-defined]
            self.A_log, self.D, self.Dense = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
            self.dt_bias, self.norm = nn.Parameter(torch.ones(2)), nn.LayerNorm((2, 2))

    marked = Marked()
    names = {id(p): n for n, p in marked.named_parameters()}
    decayed, plain = fitting.decay_groups(marked)
    assert [names[id(p)] for p in decayed] == ["w", "Dense"]
    assert {names[id(p)] for p in plain} == {"free", "A_log", "D", "dt_bias", "norm.weight", "norm.bias"}
    whole = net()
    names = {id(p): n for n, p in whole.named_parameters()}
    decayed, plain = fitting.decay_groups(whole)
    assert [names[id(p)] for p in decayed] == [
        "core.rnn.weight_ih_l0", "core.rnn.weight_hh_l0", "head.weight", "mean_head.weight",
    ]  # fmt: skip
    assert len(decayed) + len(plain) == len(list(whole.parameters()))


@pytest.mark.parametrize("chunk", [1, 7, 16, 50])
def test_checkpointing_in_time_changes_neither_outputs_nor_gradients(chunk: int) -> None:
    torch.manual_seed(0)
    model, u = GRU(3, 5, 2).double(), torch.randn(2, 40, 3, dtype=torch.float64)
    found = []
    for run in (model(u), in_chunks(model, u, None, None, chunk)):
        model.zero_grad()
        (run[0].square().sum() + run[1]["h"].sum()).backward()
        found.append(
            (run[0].detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        )
    assert (found[0][0] - found[1][0]).abs().max() < 1e-14
    assert (found[0][1] - found[1][1]).abs().max() < 1e-11


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home")
    fill(path, bars=1500)
    return path


def trained(home: Path, **settings: Any) -> dict[str, Tensor]:
    config = replace(small(), train=replace(small().train, epochs=2, **settings))
    run = train_price(home, config, resume=None, progress=False)["run_id"]
    weights: dict[str, Tensor] = load_file(RunFolder(home, run).weights)
    return weights


def same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 0.0) -> bool:
    return all(torch.allclose(a[k], b[k], rtol=0, atol=atol) for k in a)


def test_carried_and_fresh_training_differ_and_each_repeats_itself(home: Path) -> None:
    fresh, carried = trained(home), trained(home, state="carried")
    assert not same(fresh, carried, atol=1e-4)
    assert same(carried, trained(home, state="carried"))


def test_deterministic_training_gives_the_same_bits_and_leaves_the_switch_as_it_was(home: Path) -> None:
    plain = trained(home)
    assert same(plain, trained(home, deterministic=True, compile=True, device="cpu"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_training_in_pieces_of_time_learns_the_same(home: Path) -> None:
    """Up to rounding, which Adam's first steps magnify in weights whose gradient is next to nothing."""
    losses = []
    for chunk in (0, 40):
        config = replace(small(), train=replace(small().train, epochs=2, checkpoint=chunk))
        losses.append(train_price(home, config, resume=None, progress=False)["val_pinball"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_bf16_products_keep_float32_weights(home: Path) -> None:
    half = trained(home, precision="bf16")
    assert {v.dtype for v in half.values()} == {torch.float32}
    assert not same(half, trained(home))


def test_a_carried_training_cut_short_goes_on_and_ends_as_an_undisturbed_one(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, bars=1500)
    config = replace(small(), train=replace(small().train, epochs=2, state="carried"))
    save = fitting.save_state

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fitting, "save_state", save_and_stop)
        train_price(tmp_path, config, resume=None, progress=False)
    run = train_price(tmp_path, config, resume="last", progress=False)
    assert run["epochs"] == 2
    weights = load_file(RunFolder(tmp_path, run["run_id"]).weights)
    assert same(weights, trained(home, state="carried"), atol=1e-6)


def test_a_gradient_that_is_not_a_number_stops_training_before_the_update(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "spoiled.py"
    spoilt = (
        "torch.sigmoid(self.a)) + (torch.sqrt(self.a - self.a) if self.d_in > 50 and self.training else 0)"
    )
    path.write_text(LEAKY.replace("torch.sigmoid(self.a))", spoilt))
    config = replace(small(), model=replace(small().model, name=f"{path}:Leaky"))
    with pytest.raises(RecurError, match=r"gradient norm became nan at step 0: stopped before the update"):
        train_price(home, config, resume=None, progress=False)


def test_elapsed_bars_count_from_the_last_one_observed() -> None:
    observed = np.array([False, True, True, False, False, True, True, False])
    assert elapsed_bars(observed).tolist() == [1, 1, 1, 1, 2, 3, 1, 1]
    assert elapsed_bars(observed)[[2, 5, 6]].tolist() == [1, 3, 1]


def timed_core(tmp_path: Path) -> Core:
    from recur.models.registry import find_core

    (tmp_path / "timed.py").write_text(TIMED)
    return find_core(f"{tmp_path / 'timed.py'}:Leaky")


def test_a_continuous_model_skips_missing_bars_and_is_told_how_long_they_took(tmp_path: Path) -> None:
    core = timed_core(tmp_path)
    assert core.continuous
    forecaster = net(continuous=True, core=core).eval()
    x, symbol = torch.randn(1, 30, 1), torch.tensor([1])
    observed = torch.ones(30, dtype=torch.bool)
    observed[[7, 8, 20]] = False
    marks = forecaster.steps(observed[None], torch.from_numpy(elapsed_bars(observed.numpy()))[None])
    assert marks is not None and marks.elapsed is not None
    spoiled = torch.where(observed[:, None], x, torch.full_like(x, 99.0))
    with torch.no_grad():
        a, _ = forecaster(x, symbol, None, marks)
        b, _ = forecaster(spoiled, symbol, None, marks)
        state = forecaster.init_state(1)
        for t in range(30):
            one, state = forecaster.step(x[:, t], symbol, state, marks.at(t))
            if observed[t]:
                assert torch.allclose(one.quantiles[:, 0], a.quantiles[:, t], atol=1e-6)
        c, _ = forecaster(x, symbol, None, None)
    assert torch.equal(a.quantiles[:, observed], b.quantiles[:, observed])
    assert not torch.allclose(a.quantiles[:, 9], c.quantiles[:, 9])
    assert forecaster.steps(observed[None, :5], torch.ones(1, 5)) is None, "nothing is missing: the fast path"
    assert net().steps(observed[None], torch.ones(1, 30)) is None, (
        "a discrete model takes missing bars as inputs"
    )


def test_a_continuous_model_serves_over_gaps_what_it_was_judged_on(tmp_path: Path) -> None:
    timed_core(tmp_path)
    store = Store(tmp_path)
    gone = [*range(1900, 1905), 2050, 2100, 2101]
    for k, symbol in enumerate(SYMBOLS):
        frame = candles(symbol, START, 2400, seed=k)
        store.put_candles(frame[[i for i in range(2400) if i not in gone]], source="test", now_ms=START)
    model = replace(small().model, name=f"{tmp_path / 'timed.py'}:Leaky")
    config = replace(small(), model=model, train=replace(small().train, epochs=1, until="2025-03-15"))
    run = train_price(tmp_path, config, resume=None, progress=False)["run_id"]
    judge = replace(small(), backtest=replace(small().backtest, test_since="2025-03-15", folds=1))
    folder = RunFolder(tmp_path, run_backtest(tmp_path, judge, run=run, progress=False, trust=True)["run_id"])
    rows = pl.read_parquet(folder.predictions)
    at = parse_time("2025-03-29T22:00")  # the close of bar 2109, a few bars after a gap
    served = predict(tmp_path, small(), run=run, as_of_ms=at, trust=True)["forecasts"]
    assert served[0]["cutoff"] == "2025-03-29T22:00:00Z"
    for row in served:
        same_row = rows.filter(
            (pl.col("cutoff").dt.epoch("ms") == at)
            & (pl.col("unique_id") == row["unique_id"])
            & (pl.col("horizon") == row["horizon"])
        )
        assert same_row["q95"][0] == pytest.approx(row["q95"], rel=2e-3)


def test_fresh_windows_are_what_they_were_before_there_was_a_choice() -> None:
    """The order and the warm-up of windows decide results that are published: they must not move unnoticed."""
    windows = Windows(samples([40, 25]), 10, 4, 3, 7, shuffle=True)
    starts = [(w.series, w.start, w.warm) for batch in windows._plan() for w in batch]
    assert len(starts) == len(set(starts))
    assert {w[2] for w in starts if w[1] > 0} == {4}
    assert all(w[2] == max(0, 4 + w[1]) for w in starts if w[1] <= 0)
