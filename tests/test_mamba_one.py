"""The selective scan of the first Mamba against a plain float64 loop, and the layer against published ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recur.models.mamba import MambaMixer
from recur.models.selective import BLOCK, selective_scan, selective_step
from tests.parity import largest

NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def loop(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    segment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h, ys = state.transpose(1, 2), []  # (b, D, N)
    for t in range(x.shape[1]):
        if segment is not None:
            before = segment[:, t - 1] if t else torch.zeros_like(segment[:, 0])
            h = h * (segment[:, t] == before)[:, None, None]
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1) + D * x[:, t])
    return torch.stack(ys, 1), h.transpose(1, 2)


def inputs(length: int, strong: bool = False, seed: int = 0, batch: int = 3) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    d, n = 6, 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    return {
        "x": normal(batch, length, d),
        "dt": torch.rand(batch, length, d, generator=make, dtype=torch.float64) * (8.0 if strong else 0.1),
        "A": -torch.rand(d, n, generator=make, dtype=torch.float64) * 16,
        "B": normal(batch, length, n),
        "C": normal(batch, length, n),
        "D": normal(d),
        "state": normal(batch, n, d),
    }


Scan = Callable[..., tuple[Tensor, Tensor]]


def run(f: Scan, given_: dict[str, Tensor], segment: Tensor | None = None) -> dict[str, Tensor]:
    args = {k: v.clone().requires_grad_() for k, v in given_.items()}
    y, end = f(*(args[k] for k in NAMES), segment)
    make = torch.Generator().manual_seed(9)
    weights = [torch.randn(v.shape, generator=make, dtype=torch.float64).to(v.dtype) for v in (y, end)]
    torch.autograd.backward((y * weights[0]).sum() + (end * weights[1]).sum())
    out = {f"d{k}": v.grad for k, v in args.items() if v.grad is not None}
    return {"y": y.detach(), "end": end.detach(), **out}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys() and len(ours) == 9
    return largest(
        ((ours[k].double() - theirs[k]).abs().max() / theirs[k].abs().max().clamp(min=1e-9)).item()
        for k in ours
    )


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_output_state_and_all_gradients_equal_the_loop(length: int, strong: bool) -> None:
    given_ = inputs(length, strong)
    assert worst(run(selective_scan, given_), run(loop, given_)) < 1e-12


def test_sequences_that_begin_inside_a_row_equal_the_loop() -> None:
    given_ = inputs(50)
    begins = torch.zeros(3, 50, dtype=torch.long)
    begins[0, [0, 15, 16, 40]] = 1
    begins[1, [3, 4, 49]] = 1
    segment = begins.cumsum(1)
    assert worst(run(selective_scan, given_, segment), run(loop, given_, segment)) < 1e-12


@pytest.mark.parametrize("strong", [False, True])
def test_float32_stays_within_two_millionths_of_the_float64_loop(strong: bool) -> None:
    single = {k: v.float() for k, v in inputs(300, strong).items()}
    assert worst(run(selective_scan, single), run(loop, {k: v.double() for k, v in single.items()})) < 2e-6


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 80), cuts=st.lists(st.integers(0, 80), max_size=3))
def test_any_split_with_carried_state_equals_one_pass(length: int, cuts: list[int]) -> None:
    a = inputs(length)
    whole, end = selective_scan(*(a[k] for k in NAMES))
    edges = sorted({0, length, *(min(c, length) for c in cuts)})
    state, parts = a["state"], []
    for low, high in pairwise(edges):
        x, dt, B, C = (a[k][:, low:high] for k in ("x", "dt", "B", "C"))
        y, state = selective_scan(x, dt, a["A"], B, C, a["D"], state)
        parts.append(y)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
    assert (state - end).abs().max() < 1e-12


def test_a_step_equals_a_sequence_of_one() -> None:
    a = inputs(1)
    y, end = selective_scan(*(a[k] for k in NAMES))
    x, dt, B, C = (a[k][:, 0] for k in ("x", "dt", "B", "C"))
    one, state = selective_step(x, dt, a["A"], B, C, a["D"], a["state"])
    assert torch.allclose(one, y[:, 0], atol=1e-14) and torch.allclose(state, end, atol=1e-14)


def test_the_layer_of_mambapy_has_the_same_weights_by_name_and_gives_the_same_numbers() -> None:
    mambapy = pytest.importorskip("mambapy.mamba")
    torch.manual_seed(0)
    ours = MambaMixer(16)
    theirs = mambapy.MambaBlock(mambapy.MambaConfig(d_model=16, n_layers=1))
    theirs.load_state_dict(ours.state_dict())
    u = torch.randn(2, 45, 16)
    grads = []
    for layer in (lambda x: ours(x, ours.init_state(2))[0], theirs):
        x = u.clone().requires_grad_()
        y = layer(x)
        torch.autograd.backward(y.square().sum())
        grads.append((y.detach(), x.grad))
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None
        assert (a - b).abs().max() / b.abs().max() < 3e-6


def test_the_layer_of_transformers_reads_our_weights_and_gives_the_same_numbers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = pytest.importorskip("transformers.models.mamba.modeling_mamba").MambaMixer(
        transformers.MambaConfig(hidden_size=16, state_size=16, num_hidden_layers=1, vocab_size=8), 0
    )
    torch.manual_seed(0)
    ours = MambaMixer(16)
    theirs.load_state_dict(ours.state_dict())
    u = torch.randn(2, 45, 16)
    with torch.no_grad():
        a, b = ours(u, ours.init_state(2))[0], theirs(u)
    assert (a - b).abs().max() / b.abs().max() < 2e-6


def test_the_first_decays_count_from_one_to_the_number_of_states() -> None:
    made = MambaMixer(16)
    assert torch.allclose(made.A_log.exp(), torch.arange(1.0, 17).repeat(32, 1))
    dt = torch.nn.functional.softplus(made.dt_proj.bias)
    assert dt.min() > 0.00099 and dt.max() < 0.1001
    marked = {n for n, p in made.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"dt_proj.bias", "A_log", "D"}
