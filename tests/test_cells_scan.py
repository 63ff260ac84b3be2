"""The linear scan: right, by both of its ways, at any length, where scans of logarithms drift."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recur.models.interface import Steps
from recur.models.mingru import MinGRU, MinLSTM
from recur.models.scan import (
    doubling,
    doubling_adjoint,
    linear_scan,
    mark_scan,
    sequential,
    sequential_adjoint,
)
from tests.parity import largest


def plain(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    out = []
    for t in range(b.shape[0]):
        h = a[t if a.shape[0] > 1 else 0] * h + b[t]
        out.append(h)
    return torch.stack(out)


def problem(length: int, dtype: torch.dtype, gate: tuple[int, int], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((length if gate[0] else 1, 3 if gate[1] else 1, 4), (length, 3, 4), (3, 4))
    return [(0.6 * torch.randn(s, dtype=dtype, generator=g)).requires_grad_() for s in shapes]


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 70),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
    gate=st.tuples(st.integers(0, 1), st.integers(0, 1)),
)
def test_values_and_gradients_equal_autograd_through_the_plain_loop(
    length: int, dtype: torch.dtype, gate: tuple[int, int]
) -> None:
    parts = problem(length, dtype, gate)
    g = torch.Generator().manual_seed(9)
    weight = torch.randn(length, 3, 4, dtype=dtype, generator=g)
    found = []
    for scan in (linear_scan, plain):
        h = scan(*parts)
        loss = (h * weight).sum().abs().square()
        found.append((h, *torch.autograd.grad(loss, parts)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-9 * max(1.0, float(theirs.detach().abs().max()))


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 70), gate=st.tuples(st.integers(0, 1), st.integers(0, 1)))
def test_the_doubling_scan_of_other_devices_gives_the_same_both_ways(
    length: int, gate: tuple[int, int]
) -> None:
    a, b, h0 = (x.detach() for x in problem(length, torch.float64, gate))
    a = a.tanh()
    one, other = b.clone(), b.clone()
    sequential(a, one, h0)
    doubling(a, other, h0)
    assert (one - other).abs().max() < 1e-12
    assert (sequential_adjoint(a, b.clone()) - doubling_adjoint(a, b.clone())).abs().max() < 1e-12


def test_marks_are_gates() -> None:
    a, b = torch.full((4, 1, 1), 0.5), torch.ones(4, 1, 1)
    steps = Steps(
        valid=torch.tensor([[True, False, True, True]]), reset=torch.tensor([[False, False, False, True]])
    )
    h = linear_scan(*mark_scan(a, b, steps), torch.tensor([[8.0]]))
    assert h.flatten().tolist() == [5.0, 5.0, 3.5, 1.0]


def _relative(single: Tensor, double: Tensor) -> float:
    return float((single.detach().double() - double.detach()).abs().max() / double.detach().abs().max())


@pytest.mark.parametrize("make", [MinGRU, MinLSTM])
def test_single_precision_does_not_drift_over_4096_steps(make: type[MinGRU | MinLSTM]) -> None:
    torch.manual_seed(0)
    model = make(16, 16)
    u = torch.randn(4, 4096, 16)
    weight = torch.randn(4, 4096, 16)

    def run(dtype: torch.dtype) -> list[Tensor]:
        model.to(dtype)
        x = u.to(dtype).requires_grad_()
        y, _ = model(x)
        return [y, *torch.autograd.grad((y * weight.to(dtype)).sum(), [x, *model.parameters()])]

    single, double = run(torch.float32), run(torch.float64)
    assert _relative(single[0], double[0]) < 1e-6
    assert largest(_relative(a, b) for a, b in zip(single, double, strict=True)) < 2e-6


def test_the_public_log_space_scan_drifts_where_this_one_does_not() -> None:
    public = pytest.importorskip("minGRU_pytorch.minGRU")
    torch.manual_seed(0)
    theirs = public.minGRU(16)
    u, weight = torch.randn(4, 4096, 16), torch.randn(4, 4096, 16)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        candidate, gate = torch.nn.functional.linear(x.transpose(0, 1), w).chunk(2, dim=-1)
        b = torch.sigmoid(gate) * public.g(candidate)
        return linear_scan(torch.sigmoid(-gate), b, torch.zeros(4, 16, dtype=x.dtype)).transpose(0, 1)

    w = theirs.to_hidden_and_gate.weight
    exact = w.detach().double().requires_grad_()
    (target,) = torch.autograd.grad((ours(u.double(), exact) * weight).sum(), exact)
    (mine,) = torch.autograd.grad((ours(u, w) * weight).sum(), w)
    (public_grad,) = torch.autograd.grad((theirs(u) * weight).sum(), w)
    assert _relative(mine, target) < 2e-6
    assert _relative(public_grad, target) > 1e-3


def test_minlstm_goes_on_from_a_state_where_the_public_one_bends_it() -> None:
    torch.manual_seed(0)
    model, u = MinLSTM(6, 6).eval(), torch.randn(3, 40, 6)
    with torch.no_grad():
        whole, _ = model(u)
        _, state = model(u[:, :20])
        assert (model(u[:, 20:], state)[0] - whole[:, 20:]).abs().max() < 1e-6
        public = pytest.importorskip("minGRU_pytorch.minLSTM").minLSTM(6)
        theirs = public(u)
        _, hidden = public(u[:, :20], return_next_prev_hidden=True)
        assert (public(u[:, 20:], prev_hidden=hidden) - theirs[:, 20:]).abs().max() > 0.05


def test_minlstm_stays_finite_where_both_gates_are_shut() -> None:
    model = MinLSTM(2, 3)
    with torch.no_grad():
        dict(model.named_parameters())["cells.0.linear.bias"][:6] = -200.0
    y, _ = model(torch.randn(1, 5, 2))
    found = torch.autograd.grad(y.sum(), list(model.parameters()))
    assert y.isfinite().all() and all(g.isfinite().all() for g in found)
