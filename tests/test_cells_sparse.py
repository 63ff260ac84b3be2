"""Sparse wiring: what is not wired is neither stored, nor computed, nor in use."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import nn

from recur.models.interface import Steps
from recur.models.sparse import SparseLayer, SparseRNN, wiring


def test_every_block_hears_itself_and_as_many_as_hear_it() -> None:
    hears = wiring(512)
    assert hears.shape == (32, 2)
    assert (hears == torch.arange(32)[:, None]).any(1).all()
    assert all(sorted(column.tolist()) == list(range(32)) for column in hears.T)
    assert (hears[:, 0] != hears[:, 1]).all()
    assert torch.equal(hears, wiring(512))


@pytest.mark.parametrize(
    ("units", "shape"), [(8, (1, 1)), (24, (3, 3)), (48, (3, 2)), (7, (7, 7)), (64, (4, 2))]
)
def test_any_width_can_be_wired(units: int, shape: tuple[int, int]) -> None:
    assert wiring(units).shape == shape


def test_parameters_grow_with_the_width_and_not_with_its_square() -> None:
    sizes = [cast(SparseLayer, SparseRNN(4, d).cells[0]).weight.numel() for d in (64, 128, 512)]
    assert sizes == [2 * 32 * 64, 2 * 32 * 128, 2 * 32 * 512]


@pytest.mark.parametrize("elapsed", [None, 2.5])
def test_the_jacobian_is_zero_wherever_the_wiring_is_through_time_gates_too(elapsed: float | None) -> None:
    torch.manual_seed(0)
    layer = SparseLayer(4, 96).double()
    nn.init.normal_(layer.weight)
    u, x = torch.randn(1, 1, 4, dtype=torch.float64), torch.randn(1, 96, dtype=torch.float64)
    marks = None if elapsed is None else Steps(elapsed=torch.full((1, 1), elapsed, dtype=torch.float64))
    jacobian = torch.autograd.functional.jacobian(lambda s: layer(u, {"x": s}, marks)[1]["x"], x)[0, :, 0]  # type: ignore[no-untyped-call]
    hears = torch.zeros(6, 6, dtype=torch.bool)
    hears[torch.arange(6)[:, None], layer.hears] = True
    allowed = hears.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert allowed.sum() == 96 * 32
    assert (jacobian[~allowed] == 0).all()
    assert (jacobian[allowed] != 0).all()


def test_the_authors_wired_cell_uses_connections_that_its_wiring_forbids() -> None:
    """The mask of ncps does not cover the time gates; the test above is the one ours passes."""
    ncps = pytest.importorskip("ncps.torch")
    wirings = pytest.importorskip("ncps.wirings")
    torch.manual_seed(0)
    plan = wirings.AutoNCP(16, 4, seed=1)
    peer = ncps.CfC(6, plan)
    x = torch.randn(1, 1, 6)

    def state_after(inputs: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, peer(inputs)[1])

    jacobian = torch.autograd.functional.jacobian(state_after, x)[0, :, 0, 0]  # type: ignore[no-untyped-call]
    sensory = torch.from_numpy(plan.sensory_adjacency_matrix).abs().T  # (units, inputs)
    inter = torch.tensor(plan.get_neurons_of_layer(0))
    forbidden = sensory[inter] == 0
    assert forbidden.any()
    assert (jacobian[: len(inter)][forbidden] != 0).any()


def test_the_sparse_recurrence_equals_the_dense_one_with_zeros() -> None:
    torch.manual_seed(0)
    layer = SparseLayer(4, 48).double()
    dense = torch.zeros(2, 48, 48, dtype=torch.float64)
    blocks = layer.weight.detach().view(3, 2, 16, 2, 16)
    for block in range(3):
        for place, source in enumerate(layer.hears[block].tolist()):
            rows, columns = slice(16 * block, 16 * block + 16), slice(16 * source, 16 * source + 16)
            dense[:, rows, columns] = blocks[block, :, :, place]
    w_in = layer.w_in.detach().view(3, 2, 16, 4).transpose(0, 1).reshape(2, 48, 4)
    bias = layer.bias.detach().view(3, 2, 16).transpose(0, 1).reshape(2, 48)
    u, x = torch.randn(20, 4, dtype=torch.float64), torch.zeros(48, dtype=torch.float64)
    with torch.no_grad():
        y, _ = layer(u[None])
        for t in range(20):
            new, gate = (dense[k] @ x + w_in[k] @ u[t] + bias[k] for k in range(2))
            keep = torch.sigmoid(gate)
            x = keep * x + (1 - keep) * torch.tanh(new)
            assert (y[0, t] - x).abs().max() < 1e-13
