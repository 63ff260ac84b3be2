"""Back-propagation through time for recurrences whose gates have been reduced to two factors per step.

Many cells have a Jacobian of one shape, ∂h_t/∂h_{t−1} = diag(κ_t) + Σ_k diag(φ_tk) W_k: a part that is kept and k
pre-activations that read the state through W (kN, N). Once κ and φ are known for all steps, which is plain arithmetic
on whole tensors, only three operations per step are left, and every weight gradient is one matrix product afterwards.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def apply_exact(function: type[torch.autograd.Function], x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    """``function`` of x and its weights in the precision of the weights, under autocast too.

    Half precision in a recurrence would round the state at every step.
    """
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, function.apply(x.to(weight.dtype), weight, *rest))  # type: ignore[no-untyped-call]


def times_sigmoid_slope(x: Tensor, s: Tensor, out: Tensor) -> Tensor:
    """x ∘ s ∘ (1 − s) in one pass, for s = σ(·)."""
    torch.ops.aten.sigmoid_backward.grad_input(x, s, grad_input=out)
    return out


def times_tanh_slope(x: Tensor, t: Tensor, out: Tensor) -> Tensor:
    """x ∘ (1 − t²) in one pass, for t = tanh(·)."""
    torch.ops.aten.tanh_backward.grad_input(x, t, grad_input=out)
    return out


def sweep(grad: Tensor, keep: Tensor | None, factors: Tensor, w: Tensor) -> Tensor:
    """Adjoint states, (T + 1, B, N), the first being that of the state before the sequence.

    ``grad`` (T, B, N) is ∂L/∂h as it comes from outside, ``keep`` κ (T or 1, B or 1, N), None for 0, ``factors`` φ
    (T, B, kN), ``w`` (kN, N). In place ``factors`` becomes the gradient of the pre-activations, φ ∘ ∂L/∂h.
    """
    steps, batch, n = grad.shape
    adjoint = torch.cat([grad.new_zeros(1, batch, n), grad])
    states = adjoint.unbind(0)
    wide = factors.view(steps, batch, -1, n).unbind(0)
    flat = factors.unbind(0)
    kept = keep.expand(steps, -1, -1).unbind(0) if keep is not None else None
    for t in range(steps - 1, -1, -1):
        now, earlier = states[t + 1], states[t]
        wide[t].mul_(now[:, None])
        if kept is not None:
            earlier.addcmul_(now, kept[t])
        earlier.addmm_(flat[t], w)
    return adjoint
