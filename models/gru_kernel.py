"""Whole sequences of both forms of the gated recurrent unit on a CPU, time first, with gradients by hand.

torch's own GRU runs some sixty small operations per step on a CPU. Here the input side is one matrix product for all
steps, a step is six operations in place, and the way back three: the slopes of the gates are worked out for all steps
at once before it, all weight gradients in one product per matrix after it (:mod:`recur.models.sweep`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recur.models.sweep import apply_exact, sweep, times_sigmoid_slope, times_tanh_slope


class _ResetAfter(torch.autograd.Function):
    """Reset after the product. Gates r, z, n; w_i (3N, F), w_h (3N, N), b_i, b_h (3N,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_i: Tensor, w_h: Tensor, b_i: Tensor, b_h: Tensor, h0: Tensor
    ) -> Tensor:
        steps, batch, _ = x.shape
        n = h0.shape[1]
        flat = x.reshape(steps * batch, -1)
        bias = b_i[: 2 * n] + b_h[: 2 * n]
        rz = torch.addmm(bias, flat, w_i[: 2 * n].T).view(steps, batch, 2 * n)
        new = torch.addmm(b_i[2 * n :], flat, w_i[2 * n :].T).view(steps, batch, n)
        m, h = torch.empty_like(new), torch.empty_like(new)  # m is what the reset gate acts on
        u_rz, u_n, c_n, before = w_h[: 2 * n].T, w_h[2 * n :].T, b_h[2 * n :], h0
        lists = (rz, rz[..., :n], rz[..., n:], m, new, h)
        for g_rz, g_r, g_z, g_m, g_n, now in zip(*(part.unbind(0) for part in lists), strict=True):
            g_rz.addmm_(before, u_rz).sigmoid_()
            g_n.addcmul_(g_r, torch.addmm(c_n, before, u_n, out=g_m)).tanh_()
            before = torch.lerp(g_n, before, g_z, out=now)
        ctx.save_for_backward(x, w_i, w_h, h0, rz, m, new, h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_i, w_h, h0, rz, m, new, h = ctx.saved_tensors
        n = h0.shape[1]
        r, z = rz.chunk(2, dim=-1)
        before = torch.cat([h0[None], h[:-1]])
        slope_n = 1 - z
        times_tanh_slope(slope_n, new, out=slope_n)
        factors = torch.empty(*h.shape[:2], 3 * n, dtype=h.dtype, device=h.device)
        f_r, f_z, f_m = factors.chunk(3, dim=-1)
        times_sigmoid_slope(torch.mul(slope_n, m, out=f_r), r, out=f_r)
        times_sigmoid_slope(torch.sub(before, new, out=f_z), z, out=f_z)
        torch.mul(slope_n, r, out=f_m)
        adjoint = sweep(grad, z, factors, w_h)
        d_new = slope_n.mul_(adjoint[1:]).flatten(0, 1)
        g = factors.flatten(0, 1)
        flat = x.reshape(g.shape[0], -1)
        g_rz = g[:, : 2 * n]
        d_x = torch.addmm(g_rz @ w_i[: 2 * n], d_new, w_i[2 * n :]) if ctx.needs_input_grad[0] else None
        d_wi = torch.cat([g_rz.T @ flat, d_new.T @ flat])
        d_bh = g.sum(0)
        d_bi = torch.cat([d_bh[: 2 * n], d_new.sum(0)])
        d_wh = g.T @ before.flatten(0, 1)
        return None if d_x is None else d_x.view(x.shape), d_wi, d_wh, d_bi, d_bh, adjoint[0]


class _ResetBefore(torch.autograd.Function):
    """Reset before the product, h' = (1 − z) ∘ h + z ∘ n. Gates r, z, n; w (3N, F), u (3N, N), bias (3N,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, u: Tensor, bias: Tensor, h0: Tensor) -> Tensor:
        steps, batch, _ = x.shape
        n = h0.shape[1]
        flat = x.reshape(steps * batch, -1)
        rz = torch.addmm(bias[: 2 * n], flat, w[: 2 * n].T).view(steps, batch, 2 * n)
        new = torch.addmm(bias[2 * n :], flat, w[2 * n :].T).view(steps, batch, n)
        h, reset = torch.empty_like(new), torch.empty_like(new)
        u_rz, u_n, before = u[: 2 * n].T, u[2 * n :].T, h0
        lists = (rz, rz[..., :n], rz[..., n:], new, reset, h)
        for g_rz, g_r, g_z, g_n, g_rh, now in zip(*(part.unbind(0) for part in lists), strict=True):
            g_rz.addmm_(before, u_rz).sigmoid_()
            g_n.addmm_(torch.mul(g_r, before, out=g_rh), u_n).tanh_()
            before = torch.lerp(before, g_n, g_z, out=now)
        ctx.save_for_backward(x, w, u, h0, rz, new, reset, h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, u, h0, rz, new, reset, h = ctx.saved_tensors
        n = h0.shape[1]
        r, z = rz.chunk(2, dim=-1)
        before = torch.cat([h0[None], h[:-1]])
        keep = 1 - z
        factors = torch.empty(*h.shape[:2], 3 * n, dtype=h.dtype, device=h.device)
        f_r, f_z, f_n = factors.chunk(3, dim=-1)
        times_sigmoid_slope(before, r, out=f_r)
        times_sigmoid_slope(torch.sub(new, before, out=f_z), z, out=f_z)
        times_tanh_slope(z, new, out=f_n)
        adjoint = torch.cat([torch.zeros_like(h0)[None], grad])
        u_rz, u_n = u[: 2 * n], u[2 * n :]
        states = adjoint.unbind(0)
        lists = (f_r, f_z, f_n, factors[..., : 2 * n], keep, r)
        rows = list(zip(*(part.unbind(0) for part in lists), strict=True))
        for t in range(len(rows) - 1, -1, -1):
            g_r, g_z, g_n, g_rz, kept, gate = rows[t]
            now, earlier = states[t + 1], states[t]
            through = g_n.mul_(now) @ u_n  # ∂L/∂(r ∘ h)
            g_z.mul_(now)
            g_r.mul_(through)
            earlier.addcmul_(now, kept).addcmul_(through, gate).addmm_(g_rz, u_rz)
        g = factors.flatten(0, 1)
        flat = x.reshape(g.shape[0], -1)
        d_x = (g @ w).view(x.shape) if ctx.needs_input_grad[0] else None
        d_u = torch.cat([g[:, : 2 * n].T @ before.flatten(0, 1), g[:, 2 * n :].T @ reset.flatten(0, 1)])
        return d_x, g.T @ flat, d_u, g.sum(0), adjoint[0]


def reset_after(x: Tensor, w_i: Tensor, w_h: Tensor, b_i: Tensor, b_h: Tensor, h0: Tensor) -> Tensor:
    """x (T, B, F), weights of ``torch.nn.GRU``, h0 (B, N) → (T, B, N)."""
    return apply_exact(_ResetAfter, x, w_i, w_h, b_i, b_h, h0)


def reset_before(x: Tensor, w: Tensor, u: Tensor, bias: Tensor, h0: Tensor) -> Tensor:
    """x (T, B, F), w (3N, F), u (3N, N), bias (3N,) in the order r, z, n, h0 (B, N) → (T, B, N)."""
    return apply_exact(_ResetBefore, x, w, u, bias, h0)
