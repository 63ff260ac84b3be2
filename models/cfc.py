"""Closed-form continuous-time network (Hasani et al. 2022, Nature Machine Intelligence 4, arXiv:2106.13898, eq. 2)::

    s  = 1.7159 tanh(0.666 (W h + V u + b))          backbone
    f₁ = tanh(W₁ s + b₁),  f₂ = tanh(W₂ s + b₂)
    σ_t = σ((W_a s + b_a) Δt + (W_b s + b_b))
    h' = (1 − σ_t) ∘ f₁ + σ_t ∘ f₂

Δt is the elapsed time in bars of each series (``Steps.elapsed``; 1 where it is not given): a gate between two answers
takes the place of an integrator. The equations and the constants are those of the authors' code, so its weights can be
used. The backbone is as wide as the state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from recur.models.interface import State, Steps
from recur.models.rows import RowLayer, after
from recur.models.stack import Stack
from recur.models.steps import keep_invalid, restart
from recur.models.sweep import apply_exact, times_sigmoid_slope, times_tanh_slope

_STRETCH, _SLOPE = 1.7159, 0.666


class _ClosedForm(torch.autograd.Function):
    """x (T, B, F), v (M, F), bias (M,), w (M, N), heads q (4N, M) and c (4N,), time (T or 1, B or 1, 1), h0 (B, N)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        bias: Tensor,
        w: Tensor,
        q: Tensor,
        c: Tensor,
        time: Tensor,
        h0: Tensor,
    ) -> Tensor:
        steps, batch, _ = x.shape
        n = h0.shape[1]
        s = torch.addmm(bias, x.reshape(steps * batch, -1), v.T).mul_(_SLOPE).view(steps, batch, -1)
        heads = x.new_empty(steps, batch, 4 * n)
        h, gate = x.new_empty(steps, batch, n), x.new_empty(steps, batch, n)
        times = time.expand(steps, -1, -1)
        wt, qt, before = (_SLOPE * w).T, (_STRETCH * q).T, h0
        lists = (
            s,
            heads,
            heads[..., : 2 * n],
            heads[..., 2 * n : 3 * n],
            heads[..., 3 * n :],
            gate,
            h,
            times,
        )
        for s_t, head, both, a, b, g, now, dt in zip(*(part.unbind(0) for part in lists), strict=True):
            torch.addmm(c, s_t.addmm_(before, wt).tanh_(), qt, out=head)
            both.tanh_()
            torch.addcmul(b, a, dt, out=g).sigmoid_()
            before = torch.lerp(both[:, :n], both[:, n:], g, out=now)
        ctx.save_for_backward(x, v, w, q, time, h0, s, heads, gate, h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, v, w, q, time, h0, s, heads, gate, h = ctx.saved_tensors
        n = h0.shape[1]
        f1, f2 = heads[..., :n], heads[..., n : 2 * n]
        factors = torch.empty_like(heads)
        d_1, d_2, d_a, d_b = factors.chunk(4, dim=-1)
        times_tanh_slope(1 - gate, f1, out=d_1)
        times_tanh_slope(gate, f2, out=d_2)
        times_sigmoid_slope(torch.sub(f2, f1, out=d_b), gate, out=d_b)
        torch.mul(d_b, time, out=d_a)
        scale = torch.full((), _STRETCH * _SLOPE, dtype=s.dtype, device=s.device)
        slope = times_tanh_slope(
            scale.expand_as(s), s, out=torch.empty_like(s)
        )  # becomes the backbone's gradient
        adjoint = torch.cat([torch.zeros_like(h0)[None], grad])
        states, flat, back = adjoint.unbind(0), factors.unbind(0), slope.unbind(0)
        wide = factors.view(*h.shape[:2], 4, n).unbind(0)
        for t in range(len(flat) - 1, -1, -1):
            wide[t].mul_(states[t + 1][:, None])
            back[t].mul_(flat[t] @ q)
            states[t].addmm_(back[t], w)
        g, g_q = slope.flatten(0, 1), factors.flatten(0, 1)
        before = torch.cat([h0[None], h[:-1]]).flatten(0, 1)
        d_x = (g @ v).view(x.shape) if ctx.needs_input_grad[0] else None
        d_q = (g_q.T @ s.flatten(0, 1)).mul_(_STRETCH)
        return (
            d_x, g.T @ x.reshape(g.shape[0], -1), g.sum(0), g.T @ before, d_q, g_q.sum(0), None, adjoint[0],
        )  # fmt: skip


class CfCLayer(RowLayer):
    """State: ``h`` (B, D)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.w_in = nn.Parameter(torch.empty(d_out, d_in))
        self.w = nn.Parameter(torch.empty(d_out, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out))
        self.heads = nn.Linear(d_out, 4 * d_out)
        """f₁, f₂, a, b"""
        for w in (self.w_in, self.w, *self.heads.weight.data.chunk(4)):
            nn.init.xavier_uniform_(w)

    def init_state(self, batch: int) -> State:
        return {"h": self.w.new_zeros(batch, self.d_out)}

    def kernel(
        self, u: Tensor, state: State, elapsed: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        time = self.w.new_ones(1, 1, 1) if elapsed is None else elapsed.T[..., None].to(self.w.dtype)
        weights = (self.w_in, self.bias, self.w, self.heads.weight, self.heads.bias)
        y = apply_exact(_ClosedForm, u.transpose(0, 1), *weights, time, state["h"]).transpose(0, 1)
        return y, {"h": after(y, state["h"], lengths)}

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        state = restart(steps, state, self.init_state(u_t.shape[0]))
        s = _STRETCH * torch.tanh(_SLOPE * (linear(state["h"], self.w) + linear(u_t, self.w_in, self.bias)))
        f1, f2, a, b = self.heads(s).chunk(4, dim=-1)
        time = 1.0 if steps is None or steps.elapsed is None else steps.elapsed[:, None].to(u_t.dtype)
        gate = torch.sigmoid(a * time + b)
        h = (1 - gate) * torch.tanh(f1) + gate * torch.tanh(f2)
        return keep_invalid(steps, h, {"h": h}, state)


class CfC(Stack):
    """Layers of closed-form continuous-time cells. State: ``h`` (B, layers, D)."""

    continuous = True

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(CfCLayer, d_in, d_out, layers, dropout)
