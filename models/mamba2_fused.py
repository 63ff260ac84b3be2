"""A whole Mamba-2 layer as one node of the gradient graph, for a CPU.

The same computation as the composed path of :class:`recur.models.mamba2.Mamba2Mixer`. Step sizes, decays and the
factors made of them are taken of the whole batch first. Then both directions go through the batch in pieces, so that
little memory lies between the ends: projection, convolution, scan, gate and norm of some rows are done before the next
begin. Kept for the backward pass are the input, the projected values and what the scan saves; the convolution and
the gate are computed again, which is cheaper than to fetch them from memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recur.models.conv import conv_backward, conv_forward, next_window
from recur.models.ssd import PIECE, chunk_length, cumulate, fitting, for_later, from_earlier
from recur.models.ssd_kernels import Sums, direct, factors, finish
from recur.models.ssd_pieces import by_group, by_head, rooms, scan_backward, scan_forward, tile_of_rows
from recur.models.tiles import Scratch, tiles


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a layer; d_inner = groups · heads per group · head."""

    groups: int
    heads: int
    """Per group."""
    head: int
    state: int
    chunk: int
    eps: float

    @property
    def inner(self) -> int:
        return self.groups * self.heads * self.head

    @property
    def conv(self) -> int:
        return self.inner + 2 * self.groups * self.state

    def split(self, convolved: Tensor) -> tuple[Tensor, ...]:
        """Channels of the convolution (…, C) as x, B and C (…, ·)."""
        n = self.groups * self.state
        return torch.split(convolved, [self.inner, n, n], -1)


def _convolved(
    s: Shape, raw: Tensor, weight: Tensor, bias: Tensor, window: Tensor, segment: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Inputs (r, T, ·) of the convolution → its values, and x, B, C of the scan."""
    pre = conv_forward(raw, weight, bias, window, segment)
    x, B, C = (torch.unflatten(F.silu(part), 1, (-1, s.chunk)) for part in s.split(pre))
    by_group = (torch.unflatten(t, -1, (s.groups, s.state)) for t in (B, C))
    return pre, (torch.unflatten(x, -1, (s.groups, s.heads, s.head)), *by_group)


def _steps(dt_raw: Tensor, live: Tensor | None) -> Tensor:
    """Step sizes (b, T, H), 0 where a step is padding."""
    dt = F.softplus(dt_raw)
    return dt if live is None else dt * live.unsqueeze(-1)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        s: Shape,
        u: Tensor,
        w_in: Tensor,
        conv_w: Tensor,
        conv_b: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        norm_w: Tensor,
        w_out: Tensor,
        window: Tensor,
        state: Tensor,
        lengths: Tensor | None,
        live: Tensor | None,
        segment: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        b, length, d_model = u.shape
        w_z, w_raw, w_dt = torch.split(w_in, [s.inner, s.conv, len(dt_bias)])
        D = D.view(s.groups, s.heads)
        dt_raw = torch.addmm(dt_bias, u.view(-1, d_model), w_dt.t()).view(b, length, -1)
        dt = _steps(dt_raw, live)
        chunk, scaled = fitting(dt, A, s.chunk)
        s = replace(s, chunk=chunk)
        chunks = (b, length // s.chunk, s.chunk, s.groups, s.heads, s.head)
        dt = dt.view(chunks[:-1])
        f, first = factors(cumulate(dt, A), dt, s.head, scaled), by_group(state, s.groups)
        z, raw, out = (u.new_empty(b, length, len(w)) for w in (w_z, w_raw, w_out))
        last, rstd = torch.empty_like(window), u.new_empty(b, length, s.groups, 1)
        past, own, end = u.new_empty(chunks), u.new_empty(*chunks[:4], 1, 1), torch.empty_like(first)
        back, scratch = (w_out * norm_w).t(), Scratch(u)
        rows = tile_of_rows(chunks, scaled, u.device, PIECE)
        size = rows, chunks[1]
        saved = [
            piece
            for k in tiles(b, rows)
            for piece in rooms(u, (len(u[k]), *chunks[1:]), s.state, not scaled, size)
        ]
        left = iter(saved)
        for k in tiles(b, rows):
            for w, values in ((w_z, z), (w_raw, raw)):
                torch.mm(u[k].view(-1, d_model), w.t(), out=values[k].view(-1, len(w)))
            lengths_k, segment_k = (None if m is None else m[k] for m in (lengths, segment))
            _, (x, B, C) = _convolved(s, raw[k], conv_w, conv_b, window[k], segment_k)
            y = torch.empty_like(x)
            to = (y, past[k], own[k], end[:, k])
            scan_forward(f.rows(k), x, dt[k], B, C, D, first[:, k], segment_k, size, to, left, scratch)
            gated = torch.unflatten(y.view(z[k].shape).mul_(F.silu(z[k])), -1, (s.groups, -1))
            mean = torch.linalg.vecdot(gated, gated).unsqueeze(-1).div_(gated.shape[-1])
            torch.rsqrt(mean.add_(s.eps), out=rstd[k])
            torch.mm(gated.mul_(rstd[k]).view(-1, s.inner), back, out=out[k].view(-1, len(w_out)))
            last[k] = next_window(raw[k], window[k], lengths_k, segment_k)
        ctx.save_for_backward(
            u, w_in, conv_w, conv_b, A, D, norm_w, w_out, window, lengths, live, segment, dt_raw, z, raw, rstd,
            past, own, end, *for_later(f, saved),
        )  # fmt: skip
        ctx.s, ctx.size = s, size
        ctx.set_materialize_grads(False)
        return out, last, by_head(end, s.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None, dend: Tensor | None) -> tuple[Any, ...]:
        (u, w_in, conv_w, conv_b, A, D, norm_w, w_out, window, lengths, live, segment, dt_raw, z, raw, rstd,
         past, own, end, *rest) = ctx.saved_tensors  # fmt: skip
        s: Shape = ctx.s
        f, saved = from_earlier(rest, s.head)
        b, length, d_model = u.shape
        w_z, w_raw, w_dt = torch.split(w_in, [s.inner, s.conv, dt_raw.shape[-1]])
        back = w_out * norm_w
        dt = _steps(dt_raw, live).view(past.shape[:-1])
        skip, sums, scratch = direct(own, dt.unsqueeze(-1), D.unsqueeze(-1)), Sums.room(past), Scratch(u)
        dout = u.new_zeros(b, length, len(w_out)) if dout is None else dout.contiguous()
        after = None if dend is None else by_group(dend, s.groups)
        dstate = torch.empty_like(end) if ctx.needs_input_grad[11] else None  # the state
        du, dwindow = torch.empty_like(u), torch.empty_like(window)
        dw_z, dw_raw, dback, dconv, dconv_b = (
            torch.zeros_like(t) for t in (w_z, w_raw, w_out, conv_w.t(), conv_b)
        )
        for k in tiles(b, ctx.size[0]):
            lengths_k, segment_k = (None if m is None else m[k] for m in (lengths, segment))
            pre, (x, B, C) = _convolved(s, raw[k], conv_w, conv_b, window[k], segment_k)
            y, gate = torch.addcmul(past[k], x, skip[k]).view(z[k].shape), F.silu(z[k])
            normed = torch.unflatten(y * gate, -1, (s.groups, -1)).mul_(rstd[k])
            do = dout[k].view(-1, len(w_out))
            dback.addmm_(do.t(), normed.view(-1, s.inner))
            dgated = torch.mm(do, back).view_as(normed)
            along = torch.linalg.vecdot(dgated, normed).unsqueeze(-1).div_(normed.shape[-1])
            dgated = dgated.addcmul_(normed, along, value=-1).mul_(rstd[k]).view_as(y)
            dz, dpre = torch.empty_like(z[k]), pre.new_empty(len(pre), length + window.shape[1], s.conv)
            dpre[:, length:] = 0
            torch.ops.aten.silu_backward.grad_input(y.mul_(dgated), z[k], grad_input=dz)
            dy = dgated.mul_(gate).view(x.shape)
            to = (torch.empty_like(x), torch.empty_like(B), torch.empty_like(C))
            scan_backward(
                f.rows(k),
                dy,
                None if after is None else after[:, k],
                x,
                past[k],
                B,
                C,
                skip[k],
                saved,
                end[:, k],
                segment_k,
                ctx.size,
                to,
                None if dstate is None else dstate[:, k],
                sums.rows(k),
                scratch,
            )
            for part, at, dpart in zip(to, s.split(pre), s.split(dpre[:, :length]), strict=True):
                torch.ops.aten.silu_backward.grad_input(part.view(at.shape), at, grad_input=dpart)
            dconv_b += dpre.sum((0, 1))
            draw, dwindow[k] = conv_backward(dpre, raw[k], conv_w, window[k], segment_k, dconv)
            if dlast is not None:
                from_raw, from_window = _through_window(raw[k], window[k], lengths_k, segment_k, dlast[k])
                draw += from_raw
                dwindow[k] += from_window
            u_k, du_k, dz, draw = (t.view(-1, t.shape[-1]) for t in (u[k], du[k], dz, draw))
            torch.mm(dz, w_z, out=du_k).addmm_(draw, w_raw)
            dw_z.addmm_(dz.t(), u_k)
            dw_raw.addmm_(draw.t(), u_k)
        ddt, dA, dD = finish(sums, f, own, dt, A)
        ddt = ddt.view(dt_raw.shape) * torch.sigmoid(dt_raw)
        if live is not None:
            ddt = ddt * live.unsqueeze(-1)
        flat = ddt.view(-1, len(w_dt))
        du.view(-1, d_model).addmm_(flat, w_dt)
        dw_in = torch.cat([dw_z, dw_raw, flat.t() @ u.view(-1, d_model)])
        return (
            None, du, dw_in, dconv.t(), dconv_b, flat.sum(0), dA.view_as(A), dD.view(-1), (dback * w_out).sum(0),
            dback * norm_w, dwindow, None if dstate is None else by_head(dstate, s.heads), None, None, None,
        )  # fmt: skip


def _through_window(
    raw: Tensor, window: Tensor, lengths: Tensor | None, segment: Tensor | None, dlast: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the carried window with regard to the piece's raw inputs and the window before."""
    with torch.enable_grad():
        a, w = raw.detach().requires_grad_(), window.detach().requires_grad_()
        out = next_window(a, w, lengths, segment)
        got = torch.autograd.grad(out, (a, w), dlast, allow_unused=True, materialize_grads=True)
    return got[0], got[1]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def fused_layer(
    s: Shape,
    u: Tensor,
    weights: tuple[Tensor, ...],
    window: Tensor,
    state: Tensor,
    lengths: Tensor | None,
    segment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """u (B, T, d) → output (B, T, d), next window, next state.

    A compiler sees nothing of it: it would break up at every product that is written to its place.

    ``weights``: in_proj, convolution (C, K) and its bias, dt bias, A, D, norm, out_proj. ``s.chunk`` may be longer
    than the sequence; ``lengths`` (B,) and ``segment`` (B, T) as in :mod:`recur.models.conv`.
    """
    length = u.shape[1]
    chunk = chunk_length(length, s.chunk)
    short = -length % chunk
    live = None
    if short or lengths is not None:
        real = torch.full((u.shape[0],), length, device=u.device) if lengths is None else lengths
        live = (torch.arange(length + short, device=u.device) < real.unsqueeze(1)).to(u.dtype)
        lengths = real
        u = F.pad(u, (0, 0, 0, short))
        if segment is not None and short:
            segment = torch.cat([segment, segment[:, -1:].expand(-1, short)], 1)
    s = replace(s, chunk=chunk)
    y, window, state = _Layer.apply(  # type: ignore[no-untyped-call]
        s, u.contiguous(), *weights, window, state, lengths, live, segment
    )
    return y[:, :length], window, state
