"""Liquid time-constant network (Hasani et al. 2021, AAAI, arXiv:2006.04439, eq. 1 and 3)::

    dx/dt = −(1/τ + f) ∘ x + f ∘ A,     f = σ(W x + U u + b)

The synapses f move the time constant itself, 1 / (1/τ + f), with the state and the input. The fused solver of the paper
(its algorithm 1) takes K = 6 steps h = Δt / K, implicit in x and explicit in f::

    x' = (x + h f ∘ A) / (1 + h (1/τ + f))

which for f > 0 is a weighted mean of x, A and 0: stable and bounded however long the elapsed time Δt (in bars, of each
series its own). It is computed as x plus a change, x' = x + (f ∘ A − (1/τ + f) ∘ x) / (1/h + 1/τ + f): in single precision
little is left of a slow 1/τ in the sum 1 + h/τ. f is one layer over the whole state, as in the paper, and not a synapse
per pair of units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from recur.models.initial import memory_bias
from recur.models.interface import State, Steps
from recur.models.rows import RowLayer, after
from recur.models.stack import Stack
from recur.models.steps import keep_invalid, restart
from recur.models.sweep import apply_exact, sweep, times_sigmoid_slope

UNFOLDS = 6


class _Fused(torch.autograd.Function):
    """u (T, B, F), v (N, F), bias (N,), w (N, N), leak 1/τ and target A (N,), h (T or 1, B or 1, 1), x0 (B, N)."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        bias: Tensor,
        w: Tensor,
        leak: Tensor,
        target: Tensor,
        h: Tensor,
        x0: Tensor,
    ) -> Tensor:
        steps, batch, _ = u.shape
        drive = torch.addmm(bias, u.reshape(steps * batch, -1), v.T).view(steps, batch, -1)
        f = drive.new_empty(steps * UNFOLDS, *x0.shape)
        x = torch.empty_like(f)
        wt, before = w.T, x0
        f_s, x_s = f.unbind(0), x.unbind(0)
        rate, change, below = (torch.empty_like(x0) for _ in range(3))
        inverse = h.reciprocal().expand(steps, -1, -1)
        for t, (pushed, per_bar) in enumerate(zip(drive.unbind(0), inverse.unbind(0), strict=True)):
            for s in range(t * UNFOLDS, (t + 1) * UNFOLDS):
                now = torch.addmm(pushed, before, wt, out=f_s[s]).sigmoid_()
                torch.add(now, leak, out=rate)
                torch.mul(now, target, out=change).addcmul_(rate, before, value=-1)
                before = torch.addcdiv(before, change, torch.add(rate, per_bar, out=below), out=x_s[s])
        ctx.save_for_backward(u, v, w, leak, target, h, x0, f, x)
        return x.view(steps, UNFOLDS, *x0.shape)[:, -1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, v, w, leak, target, h, x0, f, x = ctx.saved_tensors
        steps = grad.shape[0]
        keep = (f + leak).view(steps, UNFOLDS, *x0.shape).mul_(h[:, None]).add_(1).reciprocal_().view_as(f)
        scaled = keep.view(steps, UNFOLDS, *x0.shape) * h[:, None]  # h / (1 + h (1/τ + f))
        scaled = scaled.view_as(keep)
        factors = (target - x).mul_(scaled)
        times_sigmoid_slope(factors, f, out=factors)
        spread = grad.new_zeros(steps, UNFOLDS, *x0.shape)
        spread[:, -1] = grad
        adjoint = sweep(spread.view_as(x), keep, factors, w)
        pull = scaled.mul_(adjoint[1:])
        d_target, d_leak = (pull * f).sum((0, 1)), -(pull * x).sum((0, 1))
        before = torch.cat([x0[None], x[:-1]]).flatten(0, 1)
        d_w = factors.flatten(0, 1).T @ before
        g = factors.view(steps, UNFOLDS, *x0.shape).sum(1).flatten(0, 1)
        d_u = (g @ v).view(u.shape) if ctx.needs_input_grad[0] else None
        return d_u, g.T @ u.reshape(g.shape[0], -1), g.sum(0), d_w, d_leak, d_target, None, adjoint[0]


class LTCLayer(RowLayer):
    """State: ``x`` (B, D). 1/τ = e^s stays positive without a constraint to be called after each update."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.w_in = nn.Parameter(nn.init.xavier_uniform_(torch.empty(d_out, d_in)))
        self.w = nn.Parameter(nn.init.orthogonal_(torch.empty(d_out, d_out)))
        slow = -memory_bias(d_out)
        self.bias = nn.Parameter(slow.clone())
        self.log_leak = nn.Parameter(slow)
        self.target = nn.Parameter(torch.randn(d_out))

    def init_state(self, batch: int) -> State:
        return {"x": self.w.new_zeros(batch, self.d_out)}

    def kernel(
        self, u: Tensor, state: State, elapsed: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        time = self.w.new_ones(1, 1, 1) if elapsed is None else elapsed.T[..., None].to(self.w.dtype)
        weights = (self.w_in, self.bias, self.w, self.log_leak.exp(), self.target)
        y = apply_exact(_Fused, u.transpose(0, 1), *weights, time / UNFOLDS, state["x"]).transpose(0, 1)
        return y, {"x": after(y, state["x"], lengths)}

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        state = restart(steps, state, self.init_state(u_t.shape[0]))
        x, drive, leak = state["x"], linear(u_t, self.w_in, self.bias), self.log_leak.exp()
        time = 1.0 if steps is None or steps.elapsed is None else steps.elapsed[:, None].to(u_t.dtype)
        per_bar = UNFOLDS / time
        for _ in range(UNFOLDS):
            f = torch.sigmoid(linear(x, self.w) + drive)
            x = x + (f * self.target - (leak + f) * x) / (per_bar + leak + f)
        return keep_invalid(steps, x, {"x": x}, state)


class LTC(Stack):
    """Layers of liquid time-constant cells. State: ``x`` (B, layers, D)."""

    continuous = True

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(LTCLayer, d_in, d_out, layers, dropout)
