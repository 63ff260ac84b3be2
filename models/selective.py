"""The selective scan of Mamba (Gu and Dao 2023, arXiv:2312.00752, eq. 2 and algorithm 2), sequential in time.

    h_t = e^(dt_t A) ∘ h_{t−1} + (dt_t x_t) B_tᵀ,     y_t = h_t C_t        per channel, N states, A (D, N) < 0

On a CPU a loop over time beats a parallel scan, which reads and writes every state many times: here a block of
steps of a tile of rows is discretised at once, the loop is one multiply-add per step, and the readout is one
product. The backward pass keeps only the state at the start of each block and walks it again.

State layout: (B, N, D). A step with dt = 0 leaves it as it is; where ``segment`` (B, T) rises, a sequence begins
and the state is put back to zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 16
TILE_STATES = 1 << 19
"""State entries of one block of steps of one tile of rows."""


def _rows(batch: int, states: int, device: torch.device) -> int:
    return batch if device.type != "cpu" else max(1, min(batch, TILE_STATES // (BLOCK * states)))


def _keeps(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T): 0 where a sequence begins, 1 elsewhere."""
    before = torch.cat([segment.new_zeros(len(segment), 1), segment[:, :-1]], 1)
    return (segment == before).to(dtype)


def _block(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, keep: Tensor | None, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (k, r, ·) of k steps, first (r, N, D) → decay, states (k, r, N, D), and dt·x (k, r, 1, D)."""
    decay = (dt.unsqueeze(2) * A).exp_()
    if keep is not None:
        decay.mul_(keep[:, :, None, None])
    into = (dt * x).unsqueeze(2)
    h = into * B.unsqueeze(3)
    now = first
    for a_t, h_t in zip(decay.unbind(0), h.unbind(0), strict=True):
        now = h_t.addcmul_(a_t, now)
    return decay, h, into


class _Selective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        length, batch, d = x.shape
        n = A.shape[0]
        rows, blocks = _rows(batch, n * d, x.device), -(-length // BLOCK)
        y, starts, end = torch.empty_like(x), x.new_empty(blocks, batch, n, d), torch.empty_like(state)
        for r in range(0, batch, rows):
            s, now = slice(r, r + rows), state[r : r + rows]
            for i in range(blocks):
                t = slice(i * BLOCK, (i + 1) * BLOCK)
                starts[i, s] = now
                k = None if keep is None else keep[t, s]
                _, h, _ = _block(x[t, s], dt[t, s], A, B[t, s], k, now)
                y[t, s] = torch.matmul(C[t, s].unsqueeze(2), h).squeeze(2)
                now = h[-1]
            end[s] = now
        ctx.save_for_backward(x, dt, A, B, C, starts, keep)
        ctx.rows = rows
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dend: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, starts, keep = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty_like(v) for v in (x, dt, B, C))
        dA, dstate = torch.zeros_like(A), torch.empty_like(dend)
        for r in range(0, x.shape[1], ctx.rows):
            s, later = slice(r, r + ctx.rows), dend[r : r + ctx.rows]
            for i in range(len(starts) - 1, -1, -1):
                t = slice(i * BLOCK, (i + 1) * BLOCK)
                k = None if keep is None else keep[t, s]
                decay, h, into = _block(x[t, s], dt[t, s], A, B[t, s], k, starts[i, s])
                out = dy[t, s].unsqueeze(2)
                g = C[t, s].unsqueeze(3) * out
                g[-1].add_(later)
                steps, through = g.unbind(0), decay.unbind(0)
                for j in range(len(steps) - 1, 0, -1):
                    steps[j - 1].addcmul_(through[j], steps[j])
                later = through[0] * steps[0]
                dC[t, s] = torch.matmul(h, out.transpose(2, 3)).squeeze(3)
                dB[t, s] = torch.matmul(g, into.transpose(2, 3)).squeeze(3)
                dinto = torch.matmul(B[t, s].unsqueeze(2), g).squeeze(2)
                g[1:].mul_(h[:-1])
                g[0].mul_(starts[i, s])
                g.mul_(decay)  # d(dt·A)
                dA += torch.einsum("krnd,krd->nd", g, dt[t, s])
                ddt[t, s] = g.mul_(A).sum(2).addcmul_(dinto, x[t, s])
                torch.mul(dinto, dt[t, s], out=dx[t, s])
            dstate[s] = later
        return dx, ddt, dA, dB, dC, dstate, None


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    segment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence above, plus D x, differentiable in every tensor but ``segment``.

    x, dt (B, T, D), dt ≥ 0; A (D, N), < 0; B, C (B, T, N); D (D,) or None; state (B, N, D) or None for zeros
    → y (B, T, D) and the state after the last step. Half types are computed in float32.
    """
    kind = x.dtype
    wide = torch.promote_types(kind, torch.float32)
    x, dt, A, B, C = (t.to(wide) for t in (x, dt, A, B, C))
    state = x.new_zeros(x.shape[0], A.shape[1], A.shape[0]) if state is None else state.to(wide)
    keep = None if segment is None else _keeps(segment, wide).t()
    timed = (v.transpose(0, 1).contiguous() for v in (x, dt, B, C))
    xt, dtt, Bt, Ct = timed
    with torch.autocast(x.device.type, enabled=False):
        y, end = _Selective.apply(  # type: ignore[no-untyped-call]
            xt, dtt, A.t().contiguous(), Bt, Ct, state, keep
        )
    y = y.transpose(0, 1)
    return (y if D is None else torch.addcmul(y, x, D.to(wide))).to(kind), end


def selective_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step: x, dt (b, D), B, C (b, N), state (b, N, D) → y (b, D) and the next state.

    ``inplace`` writes the next state over ``state``; without gradients only.
    """
    decay = (dt.unsqueeze(1) * A.t()).exp()
    kept = state.mul_(decay) if inplace and not torch.is_grad_enabled() else state * decay
    state = kept.addcmul_(B.unsqueeze(2), (dt * x).unsqueeze(1))
    y = torch.matmul(C.unsqueeze(1), state).squeeze(1)
    return torch.addcmul(y, x, D), state
