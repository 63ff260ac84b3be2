"""GRU and LSTM against torch's own, the two forms of the GRU against each other, CfC against the authors' code."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from recur.models.cfc import CfC, CfCLayer
from recur.models.gru import GRU, StandardGRU, StandardGRULayer
from recur.models.gru_forms import as_cudnn, as_standard
from recur.models.interface import Steps
from recur.models.lstm import LSTM, LSTMLayer
from recur.vocabulary import UsageError


def _grads(y: Tensor, sources: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    return torch.autograd.grad((y * torch.randn_like(y)).sum(), sources)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_gru_equals_torch_in_values_states_and_gradients(layers: int) -> None:
    torch.manual_seed(0)
    model = GRU(5, 8, layers).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    u = torch.randn(4, 50, 5, dtype=torch.float64, requires_grad=True)
    h = torch.randn(4, layers, 8, dtype=torch.float64, requires_grad=True)
    y, end = model(u, {"h": h})
    expected, last = model.rnn(u, h.transpose(0, 1).contiguous())
    assert (y - expected).abs().max() < 1e-13
    assert (end["h"] - last.transpose(0, 1)).abs().max() < 1e-13
    sources = [u, h, *model.parameters()]
    for ours, theirs in zip(_grads(y, sources), _grads(expected, sources), strict=True):
        assert (ours - theirs).abs().max() < 1e-11


def test_the_lstm_equals_torch_stacked_in_two_layers() -> None:
    torch.manual_seed(0)
    model, peer = LSTM(5, 8, 2).double(), nn.LSTM(5, 8, 2, batch_first=True).double()
    for i, cell in enumerate(model.cells):
        for name, p in cast(LSTMLayer, cell).rnn.named_parameters():
            getattr(peer, name.replace("l0", f"l{i}")).data.copy_(p.data)
    u = torch.randn(4, 50, 5, dtype=torch.float64)
    state = {k: torch.randn(4, 2, 8, dtype=torch.float64) for k in ("h", "c")}
    y, end = model(u, state)
    expected, (h, c) = peer(
        u, (state["h"].transpose(0, 1).contiguous(), state["c"].transpose(0, 1).contiguous())
    )
    assert (y - expected).abs().max() < 1e-13
    assert (end["h"] - h.transpose(0, 1)).abs().max() < 1e-13
    assert (end["c"] - c.transpose(0, 1)).abs().max() < 1e-13


def test_forget_biases_begin_between_one_and_a_memory_of_500_bars() -> None:
    torch.manual_seed(0)
    _, _, b, c = cast(LSTMLayer, LSTM(3, 400).cells[0]).weights()
    forget = torch.sigmoid((b + c).detach()[400:800])
    memory = 1 / (1 - forget)
    assert 3.7 < memory.min() < 4.0 and 470 < memory.max() < 500.5
    assert 30 < memory.median() < 60  # the geometric middle of 3.7 and 500 is 43


def _diagonal() -> GRU:
    torch.manual_seed(0)
    gru = GRU(5, 8, 2).double()
    with torch.no_grad():
        for p in gru.parameters():
            nn.init.normal_(p, std=0.7)
        for layer in range(2):
            _, u, _, c = gru.weights(layer)
            u[16:] = torch.diag(torch.linspace(-2, 2, 8))
            c[16:] = 0
    return gru


def test_a_diagonal_recurrence_converts_to_the_standard_form_and_back() -> None:
    gru, u = _diagonal(), torch.randn(3, 60, 5, dtype=torch.float64)
    with torch.no_grad():
        y, _ = gru(u)
        standard = as_standard(gru)
        assert (standard(u)[0] - y).abs().max() < 1e-12
        assert (as_cudnn(standard)(u)[0] - y).abs().max() < 1e-12


def test_units_that_share_their_reset_gate_may_be_joined() -> None:
    gru, u = _diagonal(), torch.randn(3, 60, 5, dtype=torch.float64)
    with torch.no_grad():
        for layer in range(2):
            w, u_, b, c = gru.weights(layer)
            for x in (w, u_, b, c):
                x[1] = x[0]  # units 0 and 1 have one reset gate
            u_[16, 1], u_[17, 0] = 0.8, -0.6
        y, _ = gru(u)
        assert (as_standard(gru)(u)[0] - y).abs().max() < 1e-12


def test_a_bias_behind_a_constant_reset_gate_moves_into_the_other_bias() -> None:
    gru, u = _diagonal(), torch.randn(3, 60, 5, dtype=torch.float64)
    with torch.no_grad():
        for layer in range(2):
            w, u_, _, c = gru.weights(layer)
            w[2], u_[2], c[18] = 0, 0, 1.3
        y, _ = gru(u)
        assert (as_standard(gru)(u)[0] - y).abs().max() < 1e-12


def test_forms_that_do_not_exist_are_refused_and_the_refusal_is_right() -> None:
    gru, u = _diagonal(), torch.randn(3, 60, 5, dtype=torch.float64)
    standard = as_standard(gru)
    with torch.no_grad():
        gru.weights(1)[1][16, 3] = 0.5
        with pytest.raises(UsageError, match=r"Layer 1 .* joins 1 pairs of units with different reset gates"):
            as_standard(gru)
        cast(StandardGRULayer, standard.cells[1]).u[16, 3] = 0.5  # the same weights in the other form
        assert (standard(u)[0] - gru(u)[0]).abs().max() > 1e-3
        with pytest.raises(UsageError, match="joins 1 pairs"):
            as_cudnn(standard)
        moved = _diagonal()
        moved.weights(0)[3][20] = 1.0
        with pytest.raises(
            UsageError, match=r"Layer 0 .* 1 units have a bias c_n behind a reset gate that moves"
        ):
            as_standard(moved)


def test_the_standard_form_equals_a_loop_over_its_equations() -> None:
    torch.manual_seed(0)
    model = StandardGRU(3, 4).double()
    cell = cast(StandardGRULayer, model.cells[0])
    for p in model.parameters():
        nn.init.normal_(p, std=0.7)
    u, h = torch.randn(9, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        y, _ = model(u[None])
        for t in range(9):
            i = cell.w @ u[t] + cell.bias
            r = 1 / (1 + torch.exp(-(i[:4] + cell.u[:4] @ h)))
            z = 1 / (1 + torch.exp(-(i[4:8] + cell.u[4:8] @ h)))
            h = (1 - z) * h + z * torch.tanh(i[8:] + cell.u[8:] @ (r * h))
            assert (y[0, t] - h).abs().max() < 1e-14


def test_cfc_equals_the_authors_cell_one_series_at_a_time_where_their_batch_does_not() -> None:
    """With a batch as large as the state, their elapsed times are taken for one per unit, silently."""
    ncps = pytest.importorskip("ncps.torch")
    torch.manual_seed(0)
    peer = ncps.CfC(5, 8, backbone_units=8).double()
    cell = peer.rnn_cell
    model = CfC(5, 8).double()
    ours = cast(CfCLayer, model.cells[0])
    with torch.no_grad():
        backbone = cell.backbone[0]
        ours.w_in.copy_(backbone.weight[:, :5])
        ours.w.copy_(backbone.weight[:, 5:])
        ours.bias.copy_(backbone.bias)
        heads = (cell.ff1, cell.ff2, cell.time_a, cell.time_b)
        ours.heads.weight.copy_(torch.cat([h.weight for h in heads]))
        ours.heads.bias.copy_(torch.cat([h.bias for h in heads]))
        u, elapsed = torch.randn(8, 20, 5, dtype=torch.float64), 5 * torch.rand(8, 20, dtype=torch.float64)
        y, _ = model(u, None, Steps(elapsed=elapsed))
        single = torch.cat([peer(u[b : b + 1], timespans=elapsed[b : b + 1])[0] for b in range(8)])
        assert (y - single).abs().max() < 1e-12
        batched, _ = peer(u, timespans=elapsed)
        assert (batched - single).abs().max() > 0.01
