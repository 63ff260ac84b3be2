"""A whole Mamba-2 layer as one node of the gradient graph, for a CPU.

The same computation as the composed path of :class:`recur.models.mamba2.Mamba2Mixer`. Both directions go through the
batch in tiles, so that little memory lies between the ends: projections, convolution, scan, gate and norm of a tile
are done before the next one begins. Kept for the backward pass are the input, the projected values and what the scan saves; the
convolution and the gate are computed again, which is cheaper than to fetch them from memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recur.models.conv import conv_backward, conv_forward, next_window
from recur.models.ssd import chunk_length, scan_tile, scan_tile_backward
from recur.models.ssd_kernels import Saved, by_group, by_head, chunk_marks, direct
from recur.models.tiles import tile_rows, tiles, totals

TILE_STEPS = 4096
"""Steps (batch times time) of one tile."""


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


@dataclass(slots=True)
class _Tile:
    """What lies between projection and scan: raw and activated convolution, step sizes, inputs of the scan."""

    z: Tensor
    raw: Tensor
    pre: Tensor
    dt_raw: Tensor
    dt: Tensor
    x: Tensor
    B: Tensor
    C: Tensor


def _tile(
    s: Shape,
    zx: Tensor,
    conv_w: Tensor,
    conv_b: Tensor,
    dt_bias: Tensor,
    window: Tensor,
    live: Tensor | None,
    segment: Tensor | None,
) -> _Tile:
    z, raw, dt_raw, _ = torch.split(
        zx, [s.inner, s.conv, len(dt_bias), zx.shape[-1] - s.inner - s.conv - len(dt_bias)], -1
    )
    pre = conv_forward(raw, conv_w, conv_b, window, segment)
    x, B, C = (torch.unflatten(F.silu(part), 1, (-1, s.chunk)) for part in s.split(pre))
    dt_raw = dt_raw + dt_bias
    dt = F.softplus(dt_raw)
    if live is not None:
        dt = dt * live.unsqueeze(-1)
    return _Tile(
        z,
        raw,
        pre,
        dt_raw,
        dt.view(*x.shape[:3], s.groups, s.heads),
        torch.unflatten(x, -1, (s.groups, s.heads, s.head)),
        torch.unflatten(B, -1, (s.groups, s.state)),
        torch.unflatten(C, -1, (s.groups, s.state)),
    )


def _padded(weight: Tensor) -> Tensor:
    """Rows of zeros up to a multiple of 16, at which the matrix product runs half as fast again."""
    return F.pad(weight, (0, 0, 0, -weight.shape[0] % 16))


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
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        b, length, _ = u.shape
        rows = tile_rows(b, length, u.device, TILE_STEPS)
        wide, back = _padded(w_in).t(), (w_out * norm_w).t()
        zx, out = u.new_empty(b, length, wide.shape[1]), u.new_empty(b, length, w_out.shape[0])
        last, rstd = torch.empty_like(window), u.new_empty(b, length, s.groups, 1)
        chunks = (b, length // s.chunk, s.chunk, s.groups, s.heads, s.head)
        saved = Saved.room(u, chunks, s.state)
        D = D.view(s.groups, s.heads)

        def tile(k: slice) -> bool:
            torch.mm(u[k].view(-1, u.shape[2]), wide, out=zx[k].view(-1, wide.shape[1]))
            live_k, segment_k, lengths_k = (None if m is None else m[k] for m in (live, segment, lengths))
            t = _tile(s, zx[k], conv_w, conv_b, dt_bias, window[k], live_k, segment_k)
            marks = None if segment_k is None else chunk_marks(segment_k, s.chunk, u.dtype)
            before, y = by_group(state[k], s.groups), torch.empty_like(t.x)
            scaled = scan_tile(t.x, t.dt, A, t.B, t.C, D, before, marks, saved.rows(k), y)
            gated = torch.unflatten(y.view(t.z.shape).mul_(F.silu(t.z)), -1, (s.groups, -1))
            torch.rsqrt(
                torch.linalg.vecdot(gated, gated).unsqueeze(-1).div_(gated.shape[-1]).add_(s.eps), out=rstd[k]
            )
            torch.mm(gated.mul_(rstd[k]).view(-1, s.inner), back, out=out[k].view(-1, w_out.shape[0]))
            last[k] = next_window(t.raw, window[k], lengths_k, segment_k)
            return scaled

        ctx.scaled = [tile(k) for k in tiles(b, rows)]
        ctx.save_for_backward(
            u, w_in, conv_w, conv_b, dt_bias, A, D, norm_w, w_out, window, lengths, live, segment, zx, rstd,
            *saved.parts(),
        )  # fmt: skip
        ctx.s, ctx.rows, ctx.compiled = s, rows, compiled
        ctx.set_materialize_grads(False)
        return out, last, by_head(saved.end, s.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None, dend: Tensor | None) -> tuple[Any, ...]:
        (u, w_in, conv_w, conv_b, dt_bias, A, D, norm_w, w_out, window, lengths, live, segment, zx, rstd,
         *rest) = ctx.saved_tensors  # fmt: skip
        s: Shape = ctx.s
        saved = Saved(*rest)
        b, length, d_model = u.shape
        wide, back = _padded(w_in), w_out * norm_w
        dout = u.new_zeros(b, length, w_out.shape[0]) if dout is None else dout.contiguous()
        du, dwindow = torch.empty_like(u), torch.empty_like(window)
        dstate = u.new_empty(b, s.groups * s.heads, s.head, s.state)

        def tile(k: slice) -> tuple[Tensor, ...]:
            live_k, segment_k, lengths_k = (None if m is None else m[k] for m in (live, segment, lengths))
            t = _tile(s, zx[k], conv_w, conv_b, dt_bias, window[k], live_k, segment_k)
            kept, scaled = saved.rows(k), ctx.scaled[k.start // ctx.rows]
            y = torch.addcmul(kept.past, t.x, direct(kept.own, t.dt, D)).view(t.z.shape)
            gate = F.silu(t.z)
            normed = torch.unflatten(y * gate, -1, (s.groups, -1)).mul_(rstd[k])
            do = dout[k].view(-1, w_out.shape[0])
            dback = torch.mm(do.t(), normed.view(-1, s.inner))
            dgated = torch.mm(do, back).view_as(normed)
            along = torch.linalg.vecdot(dgated, normed).unsqueeze(-1).div_(normed.shape[-1])
            dgated = dgated.addcmul_(normed, along, value=-1).mul_(rstd[k]).view_as(y)
            dzx = torch.empty_like(zx[k])
            dz, draw, ddt_raw, spare = torch.split(
                dzx, [s.inner, s.conv, len(dt_bias), wide.shape[0] - w_in.shape[0]], -1
            )
            torch.ops.aten.silu_backward.grad_input(y.mul_(dgated), t.z, grad_input=dz)
            dy = dgated.mul_(gate).view(t.x.shape)
            marks = None if segment_k is None else chunk_marks(segment_k, s.chunk, u.dtype)
            to = (torch.empty_like(t.x), u.new_empty(t.B.shape), u.new_empty(t.C.shape))
            after = torch.zeros_like(kept.end) if dend is None else by_group(dend[k], s.groups)
            ddt, dA, dD, before = scan_tile_backward(
                dy, after, t.x, t.dt, A, t.B, t.C, D, kept, scaled, marks, to
            )
            dpre = torch.empty_like(t.pre)
            for part, pre, dpart in zip(to, s.split(t.pre), s.split(dpre), strict=True):
                torch.ops.aten.silu_backward.grad_input(part.view(pre.shape), pre, grad_input=dpart)
            dconv = torch.zeros_like(conv_w.t())
            dwindow_k = conv_backward(dpre, t.raw, conv_w, window[k], segment_k, draw, dconv, ctx.compiled)
            if dlast is not None:
                from_raw, from_window = _through_window(t.raw, window[k], lengths_k, segment_k, dlast[k])
                draw += from_raw
                dwindow_k += from_window
            ddt = ddt.reshape(t.dt_raw.shape) * torch.sigmoid(t.dt_raw)
            if live_k is not None:
                ddt = ddt * live_k.unsqueeze(-1)
            ddt_raw.copy_(ddt)
            spare.zero_()
            flat = dzx.view(-1, wide.shape[0])
            torch.mm(flat, wide, out=du[k].view(-1, d_model))
            dwindow[k], dstate[k] = dwindow_k, by_head(before, s.heads)
            dwide = torch.mm(flat.t(), u[k].view(-1, d_model))
            return dwide, dconv, dpre.sum((0, 1)), ddt.sum((0, 1)), dA, dD, dback

        dwide, dconv, dconv_b, ddt_bias, dA, dD, dback = totals([tile(k) for k in tiles(b, ctx.rows)])
        return (
            None, du, dwide[: w_in.shape[0]], dconv.t(), dconv_b, ddt_bias, dA.view_as(A), dD.view(-1),
            (dback * w_out).sum(0), dback * norm_w, dwindow, dstate, None, None, None, None,
        )  # fmt: skip


def _through_window(
    raw: Tensor, window: Tensor, lengths: Tensor | None, segment: Tensor | None, dlast: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the carried window with regard to the tile's raw inputs and the window before."""
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
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """u (B, T, d) → output (B, T, d), next window, next state.

    A compiler sees nothing of it: it would break up at every product that is written to its place. ``compiled`` is
    what it may do instead, the convolution's way back as one loop.

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
    s = Shape(s.groups, s.heads, s.head, s.state, chunk, s.eps)
    y, window, state = _Layer.apply(  # type: ignore[no-untyped-call]
        s, u.contiguous(), *weights, window, state, lengths, live, segment, compiled
    )
    return y[:, :length], window, state
