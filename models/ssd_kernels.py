"""The two chunked forms of the state-space dual and their gradients, as plain functions on tensors.

:mod:`recur.models.ssd` states the recurrence and chooses between the forms; here a sequence is c chunks of Q steps,
and every matrix product is over whole chunks. With cum the sum of dt·A within a chunk up to and including a step::

    exact    y_i = Σ_{j≤i} (C_i·B_j) e^(cum_i − cum_j) dt_j x_j + e^(cum_i) C_i·S       every exponent ≤ 0
    scaled   y_i = u_i [Σ_{j≤i} (C_i·B_j) v_j x_j + C_i·T],   T = e^mid S,
             u_i = e^(cum_i − mid), v_j = e^(mid − cum_j) dt_j, mid = half of the chunk's sum

The scaled form needs no Q × Q decay matrix, so that all heads of a group share one product; it holds while
e^(±mid) is far from overflow. What a step gives itself (j = i) is kept apart as a skip (C_i·B_i) dt_i x_i, because
no decay touches it. With Y the output and Xs the scaled inputs without it, the gradient of cum needs no matrix::

    d cum_t = ⟨dY_t, Y_t⟩ − ⟨dXs_t, Xs_t⟩,  plus ⟨dS', S'⟩ at a chunk's last step for the state S' that leaves it

d(dt·A) is its reversed running sum, begun anew in every chunk, in float64. Without the self term both products are
small where the decay is strong, so that their difference keeps its digits.

Layouts: x, y (b, c, Q, g, h, p), dt (b, c, Q, g, h), B, C (b, c, Q, g, n), states (g, b, c, n, h·p) where g counts
groups, h heads of a group, p channels of a head, n states. ``Marks`` tells where sequences begin inside a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Marks:
    """Which steps see which, where sequences begin inside chunks; 1 and 0 in the dtype of the inputs."""

    same: Tensor
    """(b·c, Q, Q): j ≤ i and no beginning between them."""
    head: Tensor
    """(b, c, Q, 1, 1): the state that enters the chunk reaches the step."""
    tail: Tensor
    """(b, c, Q, 1, 1): the step reaches the state that leaves the chunk."""
    alive: Tensor
    """(b, c): the state that enters the chunk reaches the one that leaves it."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What the backward pass needs beside the inputs."""

    cum: Tensor
    past: Tensor
    """(b, c, Q, g, h, p): y without self term and skip."""
    own: Tensor
    """(b, c, Q, g): C_i·B_i."""
    states: Tensor
    """(g, b, c, n, h·p): e^mid · state that enters each chunk (scaled), or that state itself (exact)."""
    end: Tensor
    """(g, b, n, h·p): the state after the last chunk."""


def chunk_marks(segment: Tensor, chunk: int, dtype: torch.dtype) -> Marks:
    """``Marks`` from segment (b, T) that counts beginnings, T a multiple of ``chunk``."""
    seg = segment.view(segment.shape[0], -1, chunk)
    before = torch.cat([segment.new_zeros(segment.shape[0], 1), seg[:, :-1, -1]], 1)
    same = (seg.unsqueeze(-1) == seg.unsqueeze(-2)).tril()
    head, tail = seg == before.unsqueeze(-1), seg == seg[..., -1:]
    return Marks(
        same.view(-1, chunk, chunk).to(dtype),
        head.to(dtype)[..., None, None],
        tail.to(dtype)[..., None, None],
        head[..., -1].to(dtype),
    )


def _flat(t: Tensor, i: int) -> Tensor:
    """Group i of (b, c, Q, g, …) as (b·c, Q, ·) without a copy."""
    b, c, q = t.shape[:3]
    return t[:, :, :, i].flatten(3).view(b * c, q, -1) if t.ndim > 5 else t[:, :, :, i].view(b * c, q, -1)


def _wide(per_head: Tensor, p: int) -> Tensor:
    """(b, c, g, h) as (g, b, c, 1, h·p), to multiply states with."""
    return per_head.permute(2, 0, 1, 3).repeat_interleave(p, -1).unsqueeze(3)


def _per_head(products: Tensor, heads: int) -> Tensor:
    """Sum (g, b, c, n, h·p) over states and channels → (b, c, g, h)."""
    return torch.unflatten(products.sum(3), -1, (heads, -1)).sum(-1).permute(1, 2, 0, 3)


def _masks(chunk: int, like: Tensor, marks: Marks | None) -> tuple[Tensor, Tensor]:
    """(Q, Q) or (b·c, Q, Q): 1 where j ≤ i, and where j < i, within one sequence."""
    seen = like.new_ones(chunk, chunk).tril() if marks is None else marks.same
    return seen, seen.tril(-1)


def _diagonal(scores: Tensor, b: int) -> Tensor:
    return scores.diagonal(dim1=1, dim2=2).reshape(b, -1, scores.shape[1])


def _exp(logs: Tensor, dtype: torch.dtype) -> Tensor:
    """e^logs, the logs being float64 differences of running sums: they lose nothing where the sums are large."""
    return logs.to(dtype).exp()


def _decay_matrix(cum: Tensor, i: int, head: int, dtype: torch.dtype) -> Tensor:
    """(b·c, Q, Q): e^(cum_i − cum_j) for j ≤ i, and 1 above: bounded before the exponential, for the scores to mask."""
    s = cum[:, :, :, i, head].reshape(-1, cum.shape[2])
    return (s.unsqueeze(-1) - s.unsqueeze(-2)).clamp_(max=0.0).to(dtype).exp_()


def _log_decay_gradient(dcum: Tensor) -> Tensor:
    """Reversed running sum within each chunk (dim 2), in float64."""
    return dcum.flip(2).cumsum(2).flip(2)


def scaled_forward(
    x: Tensor, dt: Tensor, cum: Tensor, B: Tensor, C: Tensor, state: Tensor, marks: Marks | None
) -> Saved:
    """What each step receives from the steps before it, and the state that leaves; ``state`` (g, b, n, h·p) enters."""
    b, c, q, g, h, p = x.shape
    n = B.shape[-1]
    mid = cum[:, :, -1] / 2
    half = _exp(mid, x.dtype)
    u, v = _exp(cum - mid.unsqueeze(2), x.dtype), _exp(mid.unsqueeze(2) - cum, x.dtype).mul_(dt)
    xs = x * v.unsqueeze(-1)
    before = _masks(q, x, marks)[1]
    Cm, Bm = (C, B) if marks is None else (C * marks.head, B * marks.tail)
    y, own = x.new_empty(g, b * c, q, h * p), x.new_empty(b, c, q, g)
    new, states = x.new_empty(g, b, c, n, h * p), x.new_empty(g, b, c, n, h * p)
    for i in range(g):
        scores = torch.bmm(_flat(C, i), _flat(B, i).transpose(1, 2))
        own[..., i] = _diagonal(scores, b)
        torch.bmm(scores.mul_(before), _flat(xs, i), out=y[i])
        torch.bmm(_flat(Bm, i).transpose(1, 2), _flat(xs, i), out=new[i].view(b * c, n, h * p))
    step = _wide(half * torch.cat([half[:, 1:], torch.ones_like(half[:, :1])], 1), p).unbind(2)
    torch.mul(state, _wide(half[:, :1], p)[:, :, 0], out=states[:, :, 0])
    at, to = states.unbind(2), new.unbind(2)
    for k in range(c):
        _add_alive(to[k], at[k], marks, k)
        if k + 1 < c:
            torch.mul(to[k], step[k], out=at[k + 1])
    end = to[-1] * step[-1]
    for i in range(g):
        y[i].baddbmm_(_flat(Cm, i), states[i].view(b * c, n, h * p))
    y = y.view(g, b, c, q, h, p).permute(1, 2, 3, 0, 4, 5)
    past = torch.mul(y, u.unsqueeze(-1), out=y if g == 1 else torch.empty_like(xs))
    return Saved(cum, past, own, states, end)


def _add_alive(to: Tensor, state: Tensor, marks: Marks | None, k: int) -> None:
    """to += state, where the state outlives chunk k."""
    if marks is None:
        to.add_(state)
    else:
        to.addcmul_(state, marks.alive[None, :, k, None, None])


def scaled_backward(
    dy: Tensor,
    dend: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    saved: Saved,
    marks: Marks | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ dx and d(dt) without the self term, d(dt) also without its way through dt·A; d(dt·A), dB, dC, d(state)."""
    b, c, q, g, h, p = x.shape
    n, cum, states = B.shape[-1], saved.cum, saved.states
    mid = cum[:, :, -1] / 2
    half = _exp(mid, x.dtype)
    u, grow = _exp(cum - mid.unsqueeze(2), x.dtype), _exp(mid.unsqueeze(2) - cum, x.dtype)
    v = grow * dt
    xs, dys = x * v.unsqueeze(-1), dy * u.unsqueeze(-1)
    seen, before = _masks(q, x, marks)
    Cm, Bm = (C, B) if marks is None else (C * marks.head, B * marks.tail)
    dstates, dnew = x.new_empty(g, b, c, n, h * p), x.new_empty(g, b, c, n, h * p)
    for i in range(g):
        torch.bmm(_flat(Cm, i).transpose(1, 2), _flat(dys, i), out=dstates[i].view(b * c, n, h * p))
    step = _wide(half * torch.cat([torch.ones_like(half[:, :1]), half[:, :-1]], 1), p).unbind(2)
    torch.mul(dend, _wide(half[:, -1:], p)[:, :, 0], out=dnew[:, :, -1])
    at, to = dnew.unbind(2), dstates.unbind(2)
    for k in range(c - 1, -1, -1):
        _add_alive(to[k], at[k], marks, k)
        if k:
            torch.mul(to[k], step[k], out=at[k - 1])
    dstate = to[0] * step[0]
    dxs = x.new_empty(g, b * c, q, h * p)
    dB, dC = x.new_empty(g, b * c, q, n), x.new_empty(g, b * c, q, n)
    for i in range(g):
        Ci, Bi, xi, di = _flat(C, i), _flat(B, i), _flat(xs, i), _flat(dys, i)
        scores = torch.bmm(Ci, Bi.transpose(1, 2)).mul_(before)
        torch.bmm(scores.transpose(1, 2), di, out=dxs[i])
        dxs[i].baddbmm_(_flat(Bm, i), dnew[i].view(b * c, n, h * p))
        dscores = torch.bmm(di, xi.transpose(1, 2)).mul_(seen)
        torch.bmm(di, states[i].view(b * c, n, h * p).transpose(1, 2), out=dC[i])
        torch.bmm(xi, dnew[i].view(b * c, n, h * p).transpose(1, 2), out=dB[i])
        if marks is not None:
            dC[i].mul_(marks.head.view(b * c, q, 1))
            dB[i].mul_(marks.tail.view(b * c, q, 1))
        dC[i].baddbmm_(dscores, Bi)
        dB[i].baddbmm_(dscores.transpose(1, 2), Ci)
    dB, dC = (t.view(g, b, c, q, n).permute(1, 2, 3, 0, 4) for t in (dB, dC))
    leaving = x.new_empty(b, c, g, h)  # ⟨dS', S'⟩ of the state that leaves each chunk
    leaving[:, -1] = _per_head((dend * saved.end).unsqueeze(2), h)[:, 0]
    if c > 1:
        leaving[:, :-1] = _per_head(dstates[:, :, 1:].mul_(states[:, :, 1:]), h)
    dxs = dxs.view(g, b, c, q, h, p).permute(1, 2, 3, 0, 4, 5)
    r = (dxs * x).sum(-1).double()
    dcum = (dy * saved.past).sum(-1).double() - r * v
    dcum[:, :, -1] += leaving
    dx = dxs.mul_(v.unsqueeze(-1))
    return dx, r * grow, _log_decay_gradient(dcum), dB, dC, dstate


def exact_forward(
    x: Tensor, dt: Tensor, cum: Tensor, B: Tensor, C: Tensor, state: Tensor, marks: Marks | None
) -> Saved:
    """As :func:`scaled_forward`, for any decay."""
    b, c, q, g, h, p = x.shape
    n = B.shape[-1]
    xd = x * dt.unsqueeze(-1)
    whole = _exp(cum[:, :, -1], x.dtype)
    if marks is not None:
        whole = whole * marks.alive[..., None, None]
    xw = xd * _exp(cum[:, :, -1:] - cum, x.dtype).unsqueeze(-1)
    before = _masks(q, x, marks)[1]
    Cm, Bm = (C, B) if marks is None else (C * marks.head, B * marks.tail)
    new, states = x.new_empty(g, b, c, n, h * p), x.new_empty(g, b, c, n, h * p)
    for i in range(g):
        torch.bmm(_flat(Bm, i).transpose(1, 2), _flat(xw, i), out=new[i].view(b * c, n, h * p))
    states[:, :, 0] = state
    at, to, through = states.unbind(2), new.unbind(2), _wide(whole, p).unbind(2)
    for k in range(c - 1):
        torch.addcmul(to[k], at[k], through[k], out=at[k + 1])
    end = torch.addcmul(to[-1], at[-1], through[-1])
    past, own = x.new_empty(b, c, q, g, h, p), x.new_empty(b, c, q, g)
    reach = _exp(cum, x.dtype).unsqueeze(-1)
    for i in range(g):
        scores = torch.bmm(_flat(C, i), _flat(B, i).transpose(1, 2))
        own[..., i] = _diagonal(scores, b)
        scores.mul_(before)
        carried = torch.bmm(_flat(Cm, i), states[i].view(b * c, n, h * p)).view(b, c, q, h, p)
        for k in range(h):
            seen = _decay_matrix(cum, i, k, x.dtype).mul_(scores)
            inside = torch.bmm(seen, xd[:, :, :, i, k].reshape(b * c, q, p)).view(b, c, q, p)
            torch.addcmul(inside, carried[:, :, :, k], reach[:, :, :, i, k], out=past[:, :, :, i, k])
    return Saved(cum, past, own, states, end)


def exact_backward(
    dy: Tensor,
    dend: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    saved: Saved,
    marks: Marks | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`scaled_backward`, for any decay."""
    b, c, q, g, h, p = x.shape
    n, cum, states = B.shape[-1], saved.cum, saved.states
    whole = _exp(cum[:, :, -1], x.dtype)
    if marks is not None:
        whole = whole * marks.alive[..., None, None]
    late = _exp(cum[:, :, -1:] - cum, x.dtype).unsqueeze(-1)
    xd = x * dt.unsqueeze(-1)
    dyu = dy * _exp(cum, x.dtype).unsqueeze(-1)
    seen, before = _masks(q, x, marks)
    Cm, Bm = (C, B) if marks is None else (C * marks.head, B * marks.tail)
    dstates, dnew = x.new_empty(g, b, c, n, h * p), x.new_empty(g, b, c, n, h * p)
    for i in range(g):
        torch.bmm(_flat(Cm, i).transpose(1, 2), _flat(dyu, i), out=dstates[i].view(b * c, n, h * p))
    dnew[:, :, -1] = dend
    at, to, through = dnew.unbind(2), dstates.unbind(2), _wide(whole, p).unbind(2)
    for k in range(c - 1, 0, -1):
        torch.addcmul(to[k], at[k], through[k], out=at[k - 1])
    dstate = torch.addcmul(to[0], at[0], through[0])
    dxd = x.new_empty(b, c, q, g, h, p)
    dB, dC = x.new_empty(g, b * c, q, n), x.new_empty(g, b * c, q, n)
    xw = xd * late
    for i in range(g):
        Ci, Bi = _flat(C, i), _flat(B, i)
        scores = torch.bmm(Ci, Bi.transpose(1, 2)).mul_(before)
        dscores = torch.zeros_like(scores)
        carried = torch.bmm(_flat(Bm, i), dnew[i].view(b * c, n, h * p)).view(b, c, q, h, p)
        for k in range(h):
            decay = _decay_matrix(cum, i, k, x.dtype)
            dyk = dy[:, :, :, i, k].reshape(b * c, q, p)
            dseen = torch.bmm(dyk, xd[:, :, :, i, k].reshape(b * c, q, p).transpose(1, 2))
            dscores.addcmul_(dseen, decay)
            inside = torch.bmm(decay.mul_(scores).transpose(1, 2), dyk).view(b, c, q, p)
            torch.addcmul(inside, carried[:, :, :, k], late[:, :, :, i, k], out=dxd[:, :, :, i, k])
        dscores.mul_(seen)
        torch.bmm(_flat(dyu, i), states[i].view(b * c, n, h * p).transpose(1, 2), out=dC[i])
        torch.bmm(_flat(xw, i), dnew[i].view(b * c, n, h * p).transpose(1, 2), out=dB[i])
        if marks is not None:
            dC[i].mul_(marks.head.view(b * c, q, 1))
            dB[i].mul_(marks.tail.view(b * c, q, 1))
        dC[i].baddbmm_(dscores, Bi)
        dB[i].baddbmm_(dscores.transpose(1, 2), Ci)
    dB, dC = (t.view(g, b, c, q, n).permute(1, 2, 3, 0, 4) for t in (dB, dC))
    leaving = x.new_empty(b, c, g, h)
    leaving[:, -1] = _per_head((dend * saved.end).unsqueeze(2), h)[:, 0]
    if c > 1:
        leaving[:, :-1] = _per_head(dnew[:, :, :-1].mul_(states[:, :, 1:]), h)
    r = (dxd * x).sum(-1).double()
    dcum = (dy * saved.past).sum(-1).double() - r * dt
    dcum[:, :, -1] += leaving
    return dxd.mul_(dt.unsqueeze(-1)), r, _log_decay_gradient(dcum), dB, dC, dstate
