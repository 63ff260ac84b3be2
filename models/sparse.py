"""Continuous-time units with a fixed sparse recurrent wiring, stored and computed sparse::

    n_t = tanh(W x_{t−1} + U u_t + b)
    κ_t = σ(W_κ x_{t−1} + U_κ u_t + b_κ)^Δt
    x_t = κ_t ∘ x_{t−1} + (1 − κ_t) ∘ n_t

This is the exponential Euler step of dx/dt = r ∘ (n − x) with the rate r = softplus(−(W_κ x + …)), a time constant that
depends on state and input; Δt is the elapsed time in bars of each series (1 where it is not given). Every unit hears 32
others at most, through W and through the time gate's W_κ alike: no connection leaks in by the back door, and ∂x_t/∂x_{t−1}
has zeros wherever the wiring has none.

Units stand in blocks of 16. Only the blocks that exist are stored, and the product gathers the blocks it needs into one
batched matrix product. The wiring is a circulant graph under a random relabelling of the blocks: each block hears as
many blocks as it is heard by, itself among them, so the way back has the same shape and cost. Sparse reservoirs of
this kind: Jaeger 2001, "The echo state approach"; block sparsity for speed: Gray et al. 2017, "GPU kernels for
block-sparse weights".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from recur.models.initial import memory_bias
from recur.models.interface import State, Steps
from recur.models.rows import RowLayer, after
from recur.models.stack import Stack
from recur.models.steps import keep_invalid, restart
from recur.models.sweep import apply_exact, times_tanh_slope

FAN_IN = 32
"""Units that a unit hears, at most."""
BLOCK = 16


def wiring(units: int, fan_in: int = FAN_IN) -> Tensor:
    """(blocks, K) block that each block hears in its k-th place; every column is a permutation of the blocks.

    Blocks are of 16 units, or of the largest smaller power of two that divides ``units``. The graph is the same for
    the same size.
    """
    block = math.gcd(units, BLOCK)
    n = units // block
    k = min(n, max(1, fan_in // block))
    generator = torch.Generator().manual_seed(units)
    shifts = torch.cat(
        [torch.zeros(1, dtype=torch.long), 1 + torch.randperm(n - 1, generator=generator)[: k - 1]]
    )
    label = torch.randperm(n, generator=generator)
    return label[(label.argsort()[:, None] + shifts) % n]


class _Sparse(torch.autograd.Function):
    """Features come before the batch: u (T, F, B), w_in (2N, F), bias (2N, 1), w (blocks, 2P, K·P), time (T or 1, 1,
    B or 1), x0 (N, B), blocks of P units, each block with P rows for n and then P for the gate → (T, N, B)."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        w_in: Tensor,
        bias: Tensor,
        w: Tensor,
        time: Tensor | None,
        x0: Tensor,
        hears: Tensor,
    ) -> Tensor:
        steps, _, batch = u.shape
        blocks, places = hears.shape
        size = w.shape[1] // 2
        drive = torch.matmul(w_in, u).add_(bias).view(steps, blocks, 2 * size, batch)
        x = drive.new_empty(steps, blocks, size, batch)
        keep = drive[:, :, size:] if time is None else torch.empty_like(x)
        times = [None] * steps if time is None else time.expand(steps, -1, -1).unbind(0)
        before, source = x0.view(blocks, size, batch), hears.flatten()
        lists = (drive, drive[:, :, :size], drive[:, :, size:], keep, x)
        for (both, new, gate, kept, now), dt in zip(
            zip(*(part.unbind(0) for part in lists), strict=True), times, strict=True
        ):
            heard = before.index_select(0, source).view(blocks, places * size, batch)
            both.baddbmm_(w, heard)
            new.tanh_()
            gate.sigmoid_()
            if dt is not None:
                torch.pow(gate, dt, out=kept)
            before = torch.lerp(new, before, kept, out=now)
        ctx.save_for_backward(u, w_in, w, time, x0, hears, drive, keep, x)
        return x.view(steps, -1, batch)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, w_in, w, time, x0, hears, drive, keep, x = ctx.saved_tensors
        steps, blocks, size, batch = x.shape
        places = hears.shape[1]
        new, gate = drive[:, :, :size], drive[:, :, size:]
        before = torch.cat([x0.view(1, blocks, size, batch), x[:-1]])
        factors = torch.empty_like(drive)
        f_new, f_gate = factors[:, :, :size], factors[:, :, size:]
        times_tanh_slope(1 - keep, new, out=f_new)
        torch.sub(before, new, out=f_gate)
        f_gate.mul_(keep).mul_(1 - gate)
        if time is not None:
            f_gate.mul_(time[:, None])
        # Block c is heard by block heard_by[c, k] in its place k; its weights, turned round
        heard_by = hears.argsort(dim=0)
        place = torch.arange(places, device=w.device)
        there = w.view(blocks, 2 * size, places, size).transpose(1, 2)[heard_by, place]  # (blocks, K, 2P, P)
        turned = there.permute(0, 3, 1, 2).reshape(blocks, size, places * 2 * size)
        adjoint = torch.cat([torch.zeros_like(before[:1]), grad.reshape(x.shape)])
        states, flat, kept, target = adjoint.unbind(0), factors.unbind(0), keep.unbind(0), heard_by.flatten()
        wide = factors.view(steps, blocks, 2, size, batch).unbind(0)
        for t in range(steps - 1, -1, -1):
            now, earlier = states[t + 1], states[t]
            wide[t].mul_(now[:, None])
            earlier.addcmul_(now, kept[t])
            back = flat[t].index_select(0, target).view(blocks, places * 2 * size, batch)
            earlier.baddbmm_(turned, back)
        g = factors.permute(1, 2, 0, 3).reshape(blocks, 2 * size, -1)  # (blocks, 2P, T·B)
        h = before.permute(1, 0, 3, 2).reshape(blocks, -1, size)
        d_w = torch.cat([g @ h[hears[:, k]] for k in range(places)], dim=2)
        g = g.view(2 * blocks * size, -1)
        d_u = (w_in.T @ factors.view(steps, -1, batch)) if ctx.needs_input_grad[0] else None
        d_in = g @ u.transpose(1, 2).reshape(g.shape[1], -1)
        return d_u, d_in, g.sum(1, keepdim=True), d_w, None, adjoint[0].view(x0.shape), None


class SparseLayer(RowLayer):
    """State: ``x`` (B, D). ``weight`` (blocks, 2P, K·P) holds the connections there are, and no others."""

    def __init__(self, d_in: int, d_out: int, fan_in: int = FAN_IN) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.register_buffer("hears", wiring(d_out, fan_in))
        self.hears: Tensor
        blocks, places = self.hears.shape
        self.block = d_out // blocks
        heard = places * self.block
        self.weight = nn.Parameter(torch.randn(blocks, 2 * self.block, heard) / math.sqrt(heard))
        self.w_in = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * d_out, d_in)))
        bias = torch.stack([torch.zeros(d_out), memory_bias(d_out)])  # new state, gate
        self.bias = nn.Parameter(bias.view(2, blocks, self.block).transpose(0, 1).reshape(-1))

    def init_state(self, batch: int) -> State:
        return {"x": self.weight.new_zeros(batch, self.d_out)}

    def kernel(
        self, u: Tensor, state: State, elapsed: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        time = None if elapsed is None else elapsed.T[:, None].to(self.w_in.dtype)  # (T, 1, B)
        first = u.permute(1, 2, 0)  # (T, F, B)
        rest = (self.bias[:, None], self.weight, time, state["x"].T.contiguous(), self.hears)
        y = apply_exact(_Sparse, first, self.w_in, *rest).permute(2, 0, 1)
        return y, {"x": after(y, state["x"], lengths)}

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        state = restart(steps, state, self.init_state(u_t.shape[0]))
        x = state["x"]
        heard = x.reshape(x.shape[0], -1, self.block)[:, self.hears].flatten(2)  # (B, blocks, K·P)
        both = linear(u_t, self.w_in, self.bias).view(*heard.shape[:2], -1)
        both = both + torch.einsum("bnk,npk->bnp", heard, self.weight)
        new, gate = (part.flatten(1) for part in both.chunk(2, dim=2))
        keep = torch.sigmoid(gate)
        if steps is not None and steps.elapsed is not None:
            keep = keep ** steps.elapsed[:, None].to(u_t.dtype)
        x = keep * x + (1 - keep) * torch.tanh(new)
        return keep_invalid(steps, x, {"x": x}, state)


class SparseRNN(Stack):
    """Layers of sparsely wired continuous-time units. State: ``x`` (B, layers, D)."""

    continuous = True

    def __init__(self, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(SparseLayer, d_in, d_out, layers, dropout)
