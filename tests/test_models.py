"""The recurrence agrees with itself (whole, in chunks, step by step) and with the reference."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recur.models.forecaster import Forecaster, ForecasterSpec, forecast_loss, pinball_loss
from recur.models.gru import GRU
from recur.models.registry import build_sequence_model
from recur.vocabulary import UsageError


def _model(layers: int = 2) -> GRU:
    torch.manual_seed(0)
    return GRU(5, 8, layers).double().eval()


def _slow_gru(model: GRU, u: torch.Tensor) -> torch.Tensor:
    """The equations of the docstring, one element of the batch and one step at a time."""
    w = {k: v.detach() for k, v in model.rnn.named_parameters()}
    out = torch.empty(u.shape[0], u.shape[1], model.d_out, dtype=torch.float64)
    for b in range(u.shape[0]):
        h = [torch.zeros(model.d_out, dtype=torch.float64) for _ in range(model.layers)]
        for t in range(u.shape[1]):
            x = u[b, t]
            for i in range(model.layers):
                gi = w[f"weight_ih_l{i}"] @ x + w[f"bias_ih_l{i}"]
                gh = w[f"weight_hh_l{i}"] @ h[i] + w[f"bias_hh_l{i}"]
                n = model.d_out
                r = 1 / (1 + torch.exp(-(gi[:n] + gh[:n])))
                z = 1 / (1 + torch.exp(-(gi[n : 2 * n] + gh[n : 2 * n])))
                new = torch.tanh(gi[2 * n :] + r * gh[2 * n :])
                x = h[i] = (1 - z) * new + z * h[i]
            out[b, t] = x
    return out


def test_the_whole_sequence_equals_a_slow_float64_loop_over_the_equations() -> None:
    model, u = _model(), torch.randn(3, 17, 5, dtype=torch.float64)
    y, _ = model(u)
    assert (y - _slow_gru(model, u)).abs().max() < 1e-12


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 200), cuts=st.lists(st.integers(0, 200), max_size=4))
def test_any_split_into_chunks_with_carried_state_equals_the_whole(length: int, cuts: list[int]) -> None:
    model, u = _model(), torch.randn(2, length, 5, dtype=torch.float64)
    with torch.no_grad():
        whole, end = model(u)
        edges = sorted({0, length, *(min(c, length) for c in cuts)})
        state, parts = model.init_state(2), []
        for low, high in pairwise(edges):
            y, state = model(u[:, low:high], state)
            parts.append(y)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
    assert (state["h"] - end["h"]).abs().max() < 1e-12


def test_the_recurrent_weights_of_each_gate_begin_orthogonal() -> None:
    weight = dict(GRU(5, 8).rnn.named_parameters())["weight_hh_l0"].detach()
    for gate in weight.chunk(3):
        assert torch.allclose(gate @ gate.T, torch.eye(8), atol=1e-5)


def _net(drift: bool = False) -> Forecaster:
    torch.manual_seed(2)
    spec = ForecasterSpec(
        model="gru",
        n_features=4,
        n_symbols=3,
        horizons=(1, 6),
        hidden=8,
        layers=1,
        embed=2,
        dropout=0.0,
        drift=drift,
    )
    net = Forecaster(spec)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return net.eval()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), drift=st.booleans(), size=st.floats(0.1, 50))
def test_quantiles_never_cross_whatever_the_weights_and_inputs(seed: int, drift: bool, size: float) -> None:
    net = _net(drift)
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(seed)) * size
    with torch.no_grad():
        out, _ = net(x, torch.tensor([0, 2]))
    assert (out.quantiles.diff(dim=-1) > 0).all()


def test_without_drift_the_median_is_zero_and_the_quantiles_are_symmetric() -> None:
    with torch.no_grad():
        q = _net()(torch.randn(2, 9, 4), torch.tensor([1, 2]))[0].quantiles
    assert (q[..., 9] == 0).all()
    assert torch.equal(q, -q.flip(-1))


def test_an_untrained_forecaster_emits_the_normal_law_in_units_of_scale() -> None:
    spec = ForecasterSpec(
        model="gru",
        n_features=4,
        n_symbols=3,
        horizons=(1,),
        hidden=8,
        layers=1,
        embed=2,
        dropout=0.0,
        drift=False,
    )
    with torch.no_grad():
        q = Forecaster(spec)(torch.zeros(1, 1, 4), torch.tensor([0]))[0].quantiles[0, 0, 0]
    assert q[18].item() == pytest.approx(1.6449, abs=1e-4)
    assert q[14].item() == pytest.approx(0.6745, abs=1e-4)


def test_one_step_of_the_forecaster_equals_the_sequence() -> None:
    net, x, symbol = _net(), torch.randn(2, 20, 4), torch.tensor([1, 0])
    with torch.no_grad():
        whole, _ = net(x, symbol)
        state = net.init_state(2)
        for t in range(20):
            one, state = net.step(x[:, t], symbol, state)
            assert torch.allclose(one.quantiles[:, 0], whole.quantiles[:, t], atol=1e-5)
            assert torch.allclose(one.log_var[:, 0], whole.log_var[:, t], atol=1e-5)


def test_masked_targets_do_not_touch_the_loss_or_its_gradient() -> None:
    net, x, symbol = _net(), torch.randn(2, 20, 4), torch.tensor([1, 0])
    mask = torch.rand(2, 20, 2) > 0.4
    y = torch.randn(2, 20, 2)
    spoiled = torch.where(mask, y, torch.full_like(y, float("nan")))
    losses, gradients = [], []
    for target in (y, spoiled):
        net.zero_grad()
        loss = forecast_loss(net(x, symbol)[0], target, mask)
        torch.autograd.backward(loss)
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert losses[0] == losses[1]
    assert torch.equal(gradients[0], gradients[1])


def test_pinball_loss_is_the_textbook_sum() -> None:
    net = _net()
    with torch.no_grad():
        out, _ = net(torch.randn(1, 3, 4), torch.tensor([1]))
    y, mask = torch.randn(1, 3, 2), torch.ones(1, 3, 2, dtype=torch.bool)
    total = 0.0
    for t in range(3):
        for k in range(19):
            level, e = 0.05 * (k + 1), (y[0, t, 0] - out.quantiles[0, t, 0, k]).item()
            total += level * e if e > 0 else (level - 1) * e
    assert pinball_loss(out, y, mask)[0].item() == pytest.approx(total / (3 * 19), rel=1e-5)


def test_an_unknown_model_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'gru'"):
        build_sequence_model("gruu", 1, 1, 1, 0.0)
