"""How far back a gradient reaches before anything is learnt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recur.models.elman import Elman
from recur.models.lstm import LSTM
from recur.models.mingru import MinGRU
from recur.models.ssm import DiagonalSSM


def reach(make: Any, lag: int) -> float:
    """Norm of the gradient of the last output to the input ``lag`` bars earlier, relative to that of its own bar."""
    torch.manual_seed(0)
    model = make(8, 32).double()
    u = torch.randn(4, lag + 1, 8, dtype=torch.float64, requires_grad=True)
    y, _ = model(u)
    weight = torch.randn(4, 32, dtype=torch.float64)
    (g,) = torch.autograd.grad((y[:, -1] * weight).sum(), u)
    return float(g[:, 0].norm() / g[:, -1].norm())


def test_two_hundred_bars_back_the_gradient_of_an_elman_network_has_vanished() -> None:
    assert reach(Elman, 200) < 1e-12


@pytest.mark.parametrize("make", [LSTM, MinGRU, DiagonalSSM])
def test_two_hundred_bars_back_a_gradient_is_left_where_memory_is_kept(make: Any) -> None:
    assert reach(make, 200) > 1e-3
