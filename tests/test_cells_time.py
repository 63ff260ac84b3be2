"""Continuous time: integrators converge with their order, gaps relax the state, discretisation is exact."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from recur.models.ctrnn import CTRNN, CTRNNRK4, CTRNNEuler, substeps
from recur.models.interface import Steps
from recur.models.ltc import LTC, LTCLayer
from recur.models.ssm import DiagonalSSM, RealSSM, SSMLayer


def _same(make: Any) -> Any:
    torch.manual_seed(0)
    model = make(2, 6).double()
    with torch.no_grad():
        cell = model.cells[0]
        cell.log_tau.copy_(torch.linspace(-1.5, 1.0, 6))
        nn.init.normal_(cell.w, std=0.8)
    return model


def _truth(cell: Any, u: Tensor, x0: Tensor, time: float) -> np.ndarray[Any, Any]:
    drive = (cell.w_in @ u + cell.bias).detach().numpy()
    w, tau = cell.w.detach().numpy(), cell.tau.detach().numpy()
    found = solve_ivp(
        lambda _, x: (np.tanh(w @ x + drive) - x) / tau, (0, time), x0.numpy(), rtol=1e-12, atol=1e-13
    )
    return cast("np.ndarray[Any, Any]", found.y[:, -1])


@pytest.mark.parametrize(("make", "order"), [(CTRNN, 1), (CTRNNEuler, 1), (CTRNNRK4, 4)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(make: Any, order: int) -> None:
    model = _same(make)
    u, x0 = torch.tensor([0.7, -1.2], dtype=torch.float64), torch.linspace(-1, 1, 6, dtype=torch.float64)
    exact = _truth(model.cells[0], u, x0, 1.0)
    errors = []
    for parts in (4, 8, 16):
        elapsed = torch.full((1, parts), 1.0 / parts, dtype=torch.float64)
        with torch.no_grad():
            y, _ = model(u.expand(1, parts, 2), {"x": x0[None, None]}, Steps(elapsed=elapsed))
        errors.append(np.abs(y[0, -1].numpy() - exact).max())
    for coarse, fine in pairwise(errors):
        assert 0.8 * 2**order < coarse / fine < 1.25 * 2**order


def test_runge_kutta_follows_the_true_solution_through_a_gap_of_nine_and_a_half_bars() -> None:
    model = _same(CTRNNRK4)
    u, x0 = torch.tensor([0.7, -1.2], dtype=torch.float64), torch.linspace(-1, 1, 6, dtype=torch.float64)
    with torch.no_grad():
        gap = Steps(elapsed=torch.tensor([[9.5]], dtype=torch.float64))
        y, _ = model(u[None, None], {"x": x0[None, None]}, gap)
    assert np.abs(y[0, 0].numpy() - _truth(model.cells[0], u, x0, 9.5)).max() < 2e-3


def test_substeps_are_at_most_a_bar_and_add_up_to_the_elapsed_time_of_each_series() -> None:
    elapsed = torch.tensor([[0.5, 3.2], [1.0, 0.0]])
    bar, length, ends = substeps(elapsed)
    assert bar.tolist() == [0, 0, 0, 0, 1]
    assert ends.tolist() == [3, 4]
    assert torch.allclose(length, torch.tensor([[0.5, 0.8], [0, 0.8], [0, 0.8], [0, 0.8], [1.0, 0.0]]))


@pytest.mark.parametrize("make", [CTRNN, CTRNNEuler, CTRNNRK4, LTC])
@pytest.mark.parametrize("elapsed", [0.0, 1.0, 300.0])
def test_states_stay_bounded_and_gradients_finite_over_any_gap(make: Any, elapsed: float) -> None:
    torch.manual_seed(0)
    model = make(3, 6)
    y, _ = model(5 * torch.randn(2, 4, 3), None, Steps(elapsed=torch.full((2, 4), elapsed)))
    bound = 1.0 if make is not LTC else float(cast(LTCLayer, model.cells[0]).target.detach().abs().max())
    assert y.abs().max() <= bound
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), list(model.parameters())))


def test_no_elapsed_time_leaves_a_leaky_state_where_it_was() -> None:
    model = _same(CTRNN)
    x0 = torch.linspace(-1, 1, 6, dtype=torch.float64)
    u, none = torch.randn(1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    with torch.no_grad():
        y, _ = model(u, {"x": x0[None, None]}, Steps(elapsed=none))
    assert (y[0, 0] - x0).abs().max() < 1e-15


@pytest.mark.parametrize("make", [DiagonalSSM, RealSSM])
def test_zero_order_hold_is_exact_so_a_step_may_be_divided_at_will(make: Any) -> None:
    torch.manual_seed(0)
    model = make(3, 6).double()
    u = torch.randn(2, 1, 3, dtype=torch.float64)
    cuts = torch.tensor([0.3, 1.9, 0.05, 2.75], dtype=torch.float64)
    with torch.no_grad():
        _, once = model(u, None, Steps(elapsed=cuts.sum().expand(2, 1)))
        _, parts = model(u.expand(2, 4, 3), None, Steps(elapsed=cuts.expand(2, 4)))
    assert (once["x"] - parts["x"]).abs().max() < 1e-14


def test_the_state_space_solves_its_differential_equation() -> None:
    torch.manual_seed(0)
    cell = SSMLayer(3, 5, complex_states=True).double()
    u = torch.randn(3, dtype=torch.float64)
    with torch.no_grad():
        _, end = cell(u[None, None], None, Steps(elapsed=torch.tensor([[7.0]], dtype=torch.float64)))
        pole = (cell.poles() * cell.log_dt.exp()).numpy()
        drive = torch.view_as_complex(cell.b(u).unflatten(-1, (-1, 2))).mul(cell.log_dt.exp()).numpy()
    found = solve_ivp(lambda _, x: pole * x + drive, (0, 7.0), np.zeros(5, complex), rtol=1e-11, atol=1e-12)
    assert np.abs(torch.view_as_complex(end["x"])[0].numpy() - found.y[:, -1]).max() < 1e-9


def test_the_state_space_is_the_convolution_with_its_kernel() -> None:
    torch.manual_seed(0)
    cell = SSMLayer(3, 5, complex_states=True).double()
    u = torch.randn(1, 40, 3, dtype=torch.float64)
    with torch.no_grad():
        _, end = cell(u)
        a, hold = cell.discrete(None)
        b = torch.view_as_complex(cell.b(u[0]).unflatten(-1, (-1, 2)))  # (T, N)
        powers = a ** torch.arange(39, -1, -1)[:, None]
        expected = (powers * hold * b).sum(0)
    assert (torch.view_as_complex(end["x"])[0] - expected).abs().max() < 1e-12


def test_small_steps_keep_their_precision_in_single() -> None:
    cell = SSMLayer(1, 4, complex_states=False)
    with torch.no_grad():
        cell.log_dt.fill_(-16.0)  # Δ of 1e-7: e^z − 1 by subtraction would be 0 or off by half
        _, hold = cell.discrete(None)
        _, exact = cell.double().discrete(None)
    assert ((hold.double() - exact) / exact).abs().max() < 1e-6


def test_a_long_gap_lets_a_liquid_cell_settle_between_zero_and_its_target() -> None:
    model = LTC(3, 6).double()
    cell = cast(LTCLayer, model.cells[0])
    u = torch.randn(1, 1, 3, dtype=torch.float64)
    with torch.no_grad():
        y, _ = model(u, None, Steps(elapsed=torch.tensor([[1e7]], dtype=torch.float64)))
        x = y[0, 0]
        f = torch.sigmoid(cell.w @ x + cell.w_in @ u[0, 0] + cell.bias)
        rest = f * cell.target / (cell.log_leak.exp() + f)
        f_zero = torch.sigmoid(cell.w_in @ u[0, 0] + cell.bias)
    assert (x / cell.target.detach() > 0).all() and (x / cell.target.detach() < 1).all()
    assert (x - rest).abs().max() < 0.2 and f_zero.isfinite().all()


def test_the_slow_leak_of_a_liquid_cell_is_not_lost_in_single_precision() -> None:
    torch.manual_seed(0)
    model, u = LTC(3, 16), torch.ones(1, 256, 3)
    with torch.no_grad():
        single, _ = model(u)
        double, _ = model.double()(u.double())
    assert ((single.double() - double).abs().max() / double.abs().max()) < 3e-6
