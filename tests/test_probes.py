"""Measurements of a recurrence against recurrences whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from recur.models.gru import GRU
from recur.models.interface import State, Steps
from recur.models.probes import gates, gradient_by_lag, spectral_radius, state_size, states_along
from recur.models.registry import build_sequence_model
from recur.models.steps import scan_steps


class Rotation(nn.Module):
    """h' = ρ R h + u in n dimensions, R a rotation of every pair; y = h."""

    def __init__(self, n: int, rho: float) -> None:
        super().__init__()
        self.d_in = self.d_out = n
        turn = torch.tensor([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]])
        self.a = nn.Parameter(rho * torch.block_diag(*[turn] * (n // 2)))  # type: ignore[no-untyped-call]

    def init_state(self, batch: int) -> State:
        return {"h": torch.zeros(batch, self.d_out), "bars": torch.zeros(batch, dtype=torch.long)}

    def forward(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]:
        return scan_steps(self, u, state, steps)

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        h = state["h"] @ self.a.T + u_t
        return h, {"h": h, "bars": state["bars"] + 1}


class Shift(nn.Module):
    """The last n inputs in a row; y is the oldest."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.d_in = self.d_out = 1
        self.n = n

    def init_state(self, batch: int) -> State:
        return {"past": torch.zeros(batch, self.n)}

    def forward(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]:
        return scan_steps(self, u, state, steps)

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        past = torch.cat([state["past"], u_t], dim=1)
        return past[:, :1], {"past": past[:, 1:]}


@pytest.mark.parametrize("n", [6, 300])
def test_the_spectral_radius_is_the_largest_eigenvalue_written_out_or_by_powers(n: int) -> None:
    model = Rotation(n, 0.83)
    radius = spectral_radius(model, model.init_state(3), torch.randn(3, n))
    assert state_size(model.init_state(3)) == n
    assert radius.tolist() == pytest.approx([0.83] * 3, rel=1e-4)


@pytest.mark.parametrize("n", [5, 290])
def test_a_state_that_is_only_shifted_along_has_no_spectral_radius(n: int) -> None:
    model = Shift(n)
    radius = spectral_radius(model, {"past": torch.randn(2, n)}, torch.randn(2, 1), iterations=1000)
    assert radius.max() < 1e-2


class Moody(nn.Module):
    """Carries nothing; one gate of a single number, and where the sum of the inputs is positive another one."""

    def __init__(self) -> None:
        super().__init__()
        self.d_in = self.d_out = 2
        self.gate = nn.Parameter(torch.zeros(()))

    def init_state(self, batch: int) -> State:
        return {}

    def forward(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]:
        return scan_steps(self, u, state, steps)

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        y = torch.sigmoid(self.gate) * u_t
        return (torch.sigmoid(y) if u_t.sum() > 0 else y), {}


def test_a_model_without_a_state_has_radius_0() -> None:
    assert spectral_radius(Moody(), {}, torch.randn(3, 2)).tolist() == [0.0, 0.0, 0.0]


def test_a_gate_may_be_a_single_number_and_gates_taken_now_and_then_are_left_out() -> None:
    u = torch.ones(1, 4, 2)
    (gate,) = gates(Moody(), -u)
    assert (gate.width, gate.mean, gate.low, gate.high) == (1, 0.5, 0.5, 0.5)
    assert gates(Moody(), torch.cat([u, -u], 1)) == []


def test_the_gradient_at_a_lag_is_the_power_of_the_radius() -> None:
    model = Rotation(4, 0.9)
    found = gradient_by_lag(model, torch.randn(3, 50, 4), probes=64)
    # ‖(ρR)^k‖ in the Frobenius norm of 4 dimensions is 2 ρ^k.
    assert found[:3].tolist() == pytest.approx([2.0, 1.8, 1.62], rel=1e-4)
    assert found[49].item() == pytest.approx(2 * 0.9**49, rel=1e-4)
    assert gradient_by_lag(Shift(7), torch.randn(2, 20, 1)).nonzero().flatten().tolist() == [7]


def test_the_states_along_a_sequence_are_those_of_its_beginnings() -> None:
    torch.manual_seed(0)
    model, u = GRU(3, 5), torch.randn(2, 30, 3)
    first, middle, late = states_along(model, u, [0, 11, 30])
    assert torch.equal(first["h"], torch.zeros(2, 1, 5))
    with torch.no_grad():
        assert torch.allclose(middle["h"], model(u[:, :11])[1]["h"], atol=1e-6)
        assert torch.allclose(late["h"], model(u)[1]["h"], atol=1e-6)


def test_gates_are_seen_without_knowing_the_model() -> None:
    torch.manual_seed(0)
    model, u = GRU(3, 4, 2), torch.randn(2, 25, 3)
    biases = dict(model.named_parameters())
    with torch.no_grad():
        biases["rnn.bias_ih_l1"][4:8] = 9.0  # the update gate of the second layer: nothing is ever written
        biases["rnn.bias_ih_l0"][0:4] = -9.0  # the reset gate of the first layer stays closed
    found = gates(model, u)
    assert [g.width for g in found] == [4] * 4
    assert found[0].closed == 1.0 and found[0].mean < 0.02
    assert found[3].open == 1.0 and found[3].mean > 0.98
    assert 0.2 < found[1].mean < 0.8
    assert found[1].low < found[1].mean < found[1].high
    assert gates(Shift(3), u[..., :1]) == []


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("elman", 0.0, 1e-10),
        ("lstm", 1e-3, 1.0),
        ("ssm", 1e-3, 1.0),
        ("ssm_real", 1e-5, 1.0),
        ("mamba2", 1e-5, 1.0),
        ("mamba", 1e-7, 1.0),
    ],
)
def test_the_gradient_at_lag_200_vanishes_for_elman_and_not_for_models_with_a_memory(
    name: str, least: float, most: float
) -> None:
    torch.manual_seed(0)
    model = build_sequence_model(name, 8, 256, 1, 0.0)  # wide: Mamba-2 draws one memory per head of 64
    norm = gradient_by_lag(model, torch.randn(4, 256, 8))
    ratio = (norm[200] / norm[0]).item()
    assert least <= ratio < most
