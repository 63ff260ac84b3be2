"""What every sequence model must show; used by the tests of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from recur.models.interface import SequenceModel, State, Steps

Make = Callable[[int, int, int, float], Any]
D_IN, D_OUT = 5, 8
BATCH = 8  # equal to the width, which hides a batch that is taken for one


def build(make: Make, layers: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    """A model in evaluation, no parameter of which is left at a special value such as zero."""
    torch.manual_seed(0)
    model = make(D_IN, D_OUT, layers, 0.0)
    assert isinstance(model, nn.Module) and isinstance(model, SequenceModel)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(dtype).eval()


def inputs(length: int, seed: int = 1) -> Tensor:
    return torch.randn(
        BATCH, length, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def marks(length: int, seed: int = 2) -> Steps:
    """Missing steps, resets and uneven times at random, another pattern in every series."""
    g = torch.Generator().manual_seed(seed)
    shape = (BATCH, length)
    return Steps(
        valid=torch.rand(shape, generator=g) > 0.25,
        reset=torch.rand(shape, generator=g) < 0.05,
        elapsed=3 * torch.rand(shape, generator=g, dtype=torch.float64),
    )


def by_step(
    model: SequenceModel, u: Tensor, state: State | None, steps: Steps | None
) -> tuple[Tensor, State]:
    state = model.init_state(u.shape[0]) if state is None else state
    out = []
    for t in range(u.shape[1]):
        y, state = model.step(u[:, t], state, None if steps is None else steps.at(t))
        out.append(y)
    return torch.stack(out, 1), state


def in_pieces(
    model: SequenceModel, u: Tensor, cuts: Sequence[int], steps: Steps | None
) -> tuple[Tensor, State]:
    state, out = model.init_state(u.shape[0]), []
    for low, high in pairwise(sorted({0, u.shape[1], *(c for c in cuts if c < u.shape[1])})):
        y, state = model(u[:, low:high], state, None if steps is None else steps.slice(low, high))
        out.append(y)
    return torch.cat(out, 1), state


def gap(a: tuple[Tensor, State], b: tuple[Tensor, State]) -> float:
    """Largest difference of outputs and states, in units of the largest value where that is above 1.

    A state that grows with history may be cut differently, so its shape may differ; then its outputs speak for it.
    """
    assert set(a[1]) == set(b[1])
    pairs = [(a[0], b[0]), *((v, b[1][k]) for k, v in a[1].items() if v.shape == b[1][k].shape)]
    found = [(x - y).abs().max() / y.abs().max().clamp(min=1) for x, y in pairs if x.numel()]
    return float(torch.stack([x.detach().double() for x in found]).max())


def gradients(
    model: Any, run: Callable[[Tensor, State], tuple[Tensor, State]], u: Tensor
) -> dict[str, Tensor]:
    """Of a random functional of outputs and last state: to inputs, first state and parameters."""
    g = torch.Generator().manual_seed(3)
    u = u.clone().requires_grad_()
    with torch.no_grad():
        _, state = model(inputs(9, seed=4)[: len(u)].to(u.dtype))
    first = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in state.items()}
    y, end = run(u, first)
    loss = (y * torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)).sum()
    loss = loss + torch.stack([v.square().sum() for v in end.values() if v.is_floating_point()]).sum()
    names = [n for n, _ in model.named_parameters()]
    sources = [u, *(v for v in first.values() if v.requires_grad), *model.parameters()]
    found = torch.autograd.grad(loss, sources, allow_unused=True)
    labels = ["u", *(k for k, v in first.items() if v.requires_grad), *names]
    return {k: torch.zeros(()) if x is None else x for k, x in zip(labels, found, strict=True)}


def largest(gaps: Iterable[float]) -> float:
    """NaN when one is: ``max`` would keep what it met before a NaN."""
    return float(torch.tensor(list(gaps), dtype=torch.float64).max())


def gradient_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference per source, relative to its largest gradient where that is above 1."""
    return {k: float((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1)) for k in b}
