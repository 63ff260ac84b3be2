"""The leaky tanh recurrence h_t = κ_t ∘ h_{t−1} + (1 − κ_t) ∘ tanh(V x_t + b + W h_{t−1}), time first.

Without κ it is Elman's. The steps are three operations in place, backward too (:mod:`recur.models.sweep`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recur.models.sweep import apply_exact, sweep, times_tanh_slope


class _Leaky(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, bias: Tensor, w: Tensor, keep: Tensor | None, h0: Tensor
    ) -> Tensor:
        steps, batch, _ = x.shape
        n = torch.addmm(bias, x.reshape(steps * batch, -1), v.T).view(steps, batch, -1)
        wt = w.T
        if keep is None:
            h = n
            before = h0
            for now in n.unbind(0):
                before = now.addmm_(before, wt).tanh_()
        else:
            h = torch.empty_like(n)
            before = h0
            kept = keep.expand(steps, -1, -1).unbind(0)
            for new, k, now in zip(n.unbind(0), kept, h.unbind(0), strict=True):
                before = torch.lerp(new.addmm_(before, wt).tanh_(), before, k.expand_as(before), out=now)
        ctx.save_for_backward(x, v, w, keep, h0, n, h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, v, w, keep, h0, n, h = ctx.saved_tensors
        share = torch.ones((), dtype=n.dtype, device=n.device) if keep is None else 1 - keep
        factors = times_tanh_slope(share.expand_as(n), n, out=torch.empty_like(n))
        adjoint = sweep(grad, keep, factors, w)
        before = torch.cat([h0[None], h[:-1]])
        d_keep = None
        if keep is not None and ctx.needs_input_grad[4]:
            d_keep = (before - n).mul_(adjoint[1:]).sum_to_size(keep.shape)
        g = factors.flatten(0, 1)
        d_x = (g @ v).view(x.shape) if ctx.needs_input_grad[0] else None
        d_v = g.T @ x.reshape(g.shape[0], -1)
        return d_x, d_v, g.sum(0), g.T @ before.flatten(0, 1), d_keep, adjoint[0]


def leaky(x: Tensor, v: Tensor, bias: Tensor, w: Tensor, keep: Tensor | None, h0: Tensor) -> Tensor:
    """x (T, B, F), v (N, F), bias (N,), w (N, N), keep κ (T or 1, B or 1, N) or None for 0, h0 (B, N) → (T, B, N)."""
    return apply_exact(_Leaky, x, v, bias, w, keep, h0)
