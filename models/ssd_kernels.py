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
Outside, a state is (b, H, p, n) with H = g·h, as in the public implementations; :func:`by_group` and :func:`by_head`
go from one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from recur.models.tiles import tile_rows

PIECE = 1 << 18
"""Inputs of one group worked on at a time on a CPU: all that is made of them on the way fits the cache."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Which steps see which, where sequences begin inside chunks; 1 and 0 in the dtype of the inputs."""

    same: Tensor
    """(b·c, Q, Q): j ≤ i and no beginning between them."""
    head: Tensor
    """(b·c, Q, 1): the state that enters the chunk reaches the step."""
    tail: Tensor
    """(b·c, Q, 1): the step reaches the state that leaves the chunk."""
    alive: Tensor
    """(b, c): the state that enters the chunk reaches the one that leaves it."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What the forward pass writes and the backward pass needs beside the inputs."""

    cum: Tensor
    """(b, c, Q, g, h): sums of dt·A within chunks, in float64."""
    past: Tensor
    """(b, c, Q, g, h, p): y without self term and skip."""
    scores: Tensor
    """(g, b·c, Q, Q): C_i·B_j of the steps j < i of the same sequence."""
    own: Tensor
    """(b, c, Q, g): C_i·B_i."""
    states: Tensor
    """(g, b, c, n, h·p): e^mid · state that enters each chunk (scaled), or that state itself (exact)."""
    end: Tensor
    """(g, b, n, h·p): the state after the last chunk."""

    @staticmethod
    def room(like: Tensor, shape: tuple[int, ...], n: int) -> Saved:
        """For inputs x of ``shape`` (b, c, Q, g, h, p) and n states; the type of ``like``."""
        b, c, q, g, h, p = shape
        rest = (shape, (g, b * c, q, q), (b, c, q, g), (g, b, c, n, h * p), (g, b, n, h * p))
        cum = like.new_empty(shape[:-1], dtype=torch.float64)
        return Saved(cum, *(like.new_empty(s) for s in rest))

    def parts(self) -> tuple[Tensor, ...]:
        return self.cum, self.past, self.scores, self.own, self.states, self.end

    def rows(self, k: slice) -> Saved:
        c = self.cum.shape[1]
        scores, states, end = self.scores[:, k.start * c : k.stop * c], self.states[:, k], self.end[:, k]
        return Saved(self.cum[k], self.past[k], scores, self.own[k], states, end)


def by_group(state: Tensor, groups: int) -> Tensor:
    """State (b, H, p, n) as (g, b, n, h·p), without a copy where it is contiguous."""
    return torch.unflatten(state, 1, (groups, -1)).flatten(2, 3).permute(1, 0, 3, 2)


def by_head(state: Tensor, heads: int) -> Tensor:
    """The inverse for ``heads`` heads of each group: contiguous, memory of its own."""
    parts = torch.unflatten(state, -1, (heads, -1))
    return parts.permute(1, 0, 3, 4, 2).flatten(1, 2).clone(memory_format=torch.contiguous_format)


def chunk_marks(segment: Tensor, chunk: int, dtype: torch.dtype) -> Marks:
    """``Marks`` from segment (b, T) that counts beginnings, T a multiple of ``chunk``."""
    seg = segment.view(segment.shape[0], -1, chunk)
    before = torch.cat([segment.new_zeros(segment.shape[0], 1), seg[:, :-1, -1]], 1)
    same = (seg.unsqueeze(-1) == seg.unsqueeze(-2)).tril()
    head, tail = seg == before.unsqueeze(-1), seg == seg[..., -1:]
    return Marks(
        same.view(-1, chunk, chunk).to(dtype),
        head.view(-1, chunk, 1).to(dtype),
        tail.view(-1, chunk, 1).to(dtype),
        head[..., -1].to(dtype),
    )


def _group(t: Tensor, i: int) -> Tensor:
    """Group i of (b, c, Q, g, …) as (b·c, Q, …), a view."""
    return t[:, :, :, i].flatten(0, 1)


def _pieces(x: Tensor, each: int, /, **parts: Tensor | None) -> Iterator[Any]:
    """Rows of the batch to work on at a time, ``each`` numbers a row: namespaces of the parts, views all of them.

    The first dimension of a part is b or b·c. They are split once, because to cut a view takes as long as a small sum.
    """
    b = x.shape[0]
    rows = tile_rows(b, each, x.device, PIECE)
    split = (repeat(None) if t is None else torch.split(t, rows * (t.shape[0] // b)) for t in parts.values())
    for piece in zip(*split, strict=False):
        yield SimpleNamespace(**dict(zip(parts, piece, strict=True)))


def _wide(per_head: Tensor, p: int) -> Tensor:
    """(b, c, h) as (b, c, 1, h·p), to multiply the states of a group with."""
    return per_head.repeat_interleave(p, -1).unsqueeze(2)


def _seen(scores: Tensor, same: Tensor | None, up_to: int = 0) -> Tensor:
    """Puts scores (k, Q, Q) to zero but for the steps j ≤ i + ``up_to`` of the same sequence."""
    return (scores if same is None else scores.mul_(same)).tril_(up_to)


def _dot(a: Tensor, b: Tensor, scratch: Tensor, to: Tensor) -> None:
    """Write the sum of a ∘ b over the last dimension; the products are written over ``scratch``."""
    torch.sum(torch.mul(a, b, out=scratch), -1, out=to)


def _exp(logs: Tensor, dtype: torch.dtype) -> Tensor:
    """e^logs of logs in float64: rounded before, a log of 40 would cost the factor two digits."""
    return logs.exp().to(dtype)


def _factors(cum: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """u = e^(cum − mid) of the scaled form and 1/u."""
    u = _exp(cum - cum[:, :, -1:] / 2, dtype)
    return u, u.reciprocal()


def _decay_matrix(cum: Tensor, dtype: torch.dtype) -> Tensor:
    """cum (…, Q) → (…, Q, Q): e^(cum_i − cum_j) for j ≤ i, and 1 above: bounded before the exponential, for the
    scores to mask."""
    return (cum.unsqueeze(-1) - cum.unsqueeze(-2)).to(dtype).clamp_(max=0.0).exp_()


def _log_decay_gradient(dcum: Tensor) -> Tensor:
    """Reversed running sum within each chunk (dim 2), in float64."""
    return dcum.flip(2).cumsum(2).flip(2)


def _masks(marks: Marks | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if marks is None else (marks.same, marks.head, marks.tail)


def _alive(factor: Tensor, marks: Marks | None) -> Tensor:
    """``factor`` (b, c, g, h) of the state that enters each chunk in the one that leaves it."""
    return factor if marks is None else factor * marks.alive[..., None, None]


def _reached(B: Tensor, C: Tensor, marks: Marks | None) -> tuple[Tensor, Tensor]:
    """B of the steps that reach the state that leaves their chunk, C of those that the entering state reaches."""
    return (B, C) if marks is None else (B * marks.tail, C * marks.head)


def _scores(C: Tensor, Bt: Tensor, same: Tensor | None, scores: Tensor, own: Tensor) -> None:
    """Write C_i·B_j of the steps j < i, (k, Q, Q), and what stands on the diagonal, (k, Q)."""
    torch.bmm(C, Bt, out=scores)
    own.copy_(scores.diagonal(dim1=1, dim2=2))
    _seen(scores, same, -1)


def _carry(first: Tensor, new: Tensor, through: Tensor, to: list[Tensor], order: int = 1) -> None:
    """Write state_(k+1) = new_k + through_k ∘ state_k ``to`` places in turn, over the chunks k (dim 1 of the others);
    ``order`` −1 takes the chunks from the last one."""
    for n, factor, after in zip(new.unbind(1)[::order], through.unbind(1)[::order], to, strict=True):
        torch.addcmul(n, first, factor, out=after)
        first = after


def _by_head(t: Tensor, factor: Tensor | None = None) -> Tensor:
    """(k, Q, h, p) as (k·h, Q, p), times ``factor`` (k, Q, h, 1)."""
    t = t.transpose(1, 2)
    if factor is not None:
        t = torch.mul(t, factor.transpose(1, 2), out=t.new_empty(t.shape))
    return t.flatten(0, 1)


def _apart(t: Tensor, heads: int) -> Tensor:
    """(k·h, Q, p) as (k, Q, h, p)."""
    return torch.unflatten(t, 0, (-1, heads)).transpose(1, 2)


def direct(own: Tensor, dt: Tensor, D: Tensor) -> Tensor:
    """(…, h, 1): what a step's input is multiplied by in its own output, own (…), dt (…, h), D (h,)."""
    return torch.addcmul(D, own.unsqueeze(-1), dt).unsqueeze(-1)


def scaled_forward(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    marks: Marks | None,
    to: Saved,
    y: Tensor,
) -> None:
    """Write y and what the way back needs; ``state`` (g, b, n, h·p) enters."""
    c, q, g, h, p = x.shape[1:]
    same, _, _ = _masks(marks)
    u, grow = _factors(to.cum, x.dtype)
    half = u[:, :, -1]
    step = half * torch.cat([half[:, 1:], torch.ones_like(half[:, :1])], 1)
    through = _alive(step, marks)
    for i in range(g):
        xi, ui, vi, dti, Bi, Ci = (_group(t, i) for t in (x, u, grow * dt, dt, B, C))
        past, own, yi = (_group(t, i) for t in (to.past, to.own, y))
        Bm, Cm = _reached(Bi, Ci, marks)
        torch.mul(state[i], _wide(half[:, :1, i], p)[:, 0], out=to.states[i, :, 0])
        for t in _pieces(
            x, c * q * h * p,
            x=xi, u=ui.unsqueeze(-1), v=vi.unsqueeze(-1), dt=dti, C=Ci, Bt=Bi.mT, Cm=Cm, Bmt=Bm.mT,
            same=same, step=_wide(step[:, :, i], p), through=_wide(through[:, :, i], p),
            scores=to.scores[i], own=own, past=past, y=yi, states=to.states[i], end=to.end[i],
        ):  # fmt: skip
            xs, received = (t.x * t.v).flatten(2), t.past.flatten(2)
            new = torch.bmm(t.Bmt, xs).view(t.states.shape).mul_(t.step)
            first, *later = t.states.unbind(1)
            _carry(first, new, t.through, [*later, t.end])
            _scores(t.C, t.Bt, t.same, t.scores, t.own)
            torch.bmm(t.scores, xs, out=received)
            received.baddbmm_(t.Cm, t.states.flatten(0, 1))
            t.past.mul_(t.u)
            torch.addcmul(t.past, t.x, direct(t.own, t.dt, D[i]), out=t.y)


def scaled_backward(
    dy: Tensor,
    dend: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    saved: Saved,
    marks: Marks | None,
    to: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes dx, dB and dC ``to`` tensors like x, B and C.

    → d(dt) without the self term and its way through dt·A, d(dt·A), d(state), and ⟨dy, x⟩ of each step and head.
    """
    c, q, g, h, p = x.shape[1:]
    same, head, tail = _masks(marks)
    u, grow = _factors(saved.cum, x.dtype)
    v, half = grow * dt, u[:, :, -1]
    ones = torch.ones_like(half[:, :1])
    step, back = (half * torch.cat(t, 1) for t in ((half[:, 1:], ones), (ones, half[:, :-1])))
    through = _alive(back, marks)
    dstate = torch.empty_like(dend)
    received, given, dyx, leaving = (x.new_empty(t.shape) for t in (dt, dt, dt, x[:, :, 0]))
    for i in range(g):
        xi, ui, vi, dti, Bi, Ci, own, dyi = (_group(t, i) for t in (x, u, v, dt, B, C, saved.own, dy))
        dxi, dBi, dCi, past, ri, gi, dyxi = (_group(t, i) for t in (*to, saved.past, received, given, dyx))
        Bm, Cm = _reached(Bi, Ci, marks)
        for t in _pieces(
            x, c * q * h * p,
            dy=dyi, x=xi, u=ui.unsqueeze(-1), v=vi.unsqueeze(-1), skip=direct(own, dti, D[i]), B=Bi, C=Ci, Bm=Bm, Cmt=Cm.mT,
            same=same, head=head, tail=tail,
            back=_wide(back[:, :, i], p), through=_wide(through[:, :, i], p),
            scores_t=saved.scores[i].mT, past=past, states=saved.states[i], end=saved.end[i],
            dend=dend[i] * _wide(half[:, -1:, i], p)[:, 0], dx=dxi, dB=dBi, dC=dCi, dstate=dstate[i],
            received=ri, given=gi, dyx=dyxi, leaving=leaving[:, :, i].flatten(2),
        ):  # fmt: skip
            xs, dys = t.x * t.v, t.dy * t.u
            xf, df, dxf = xs.flatten(2), dys.flatten(2), t.dx.flatten(2)
            into = torch.bmm(t.Cmt, df).view(t.states.shape).mul_(t.back)
            dnew = _carried_back(into, t)
            torch.bmm(t.scores_t, df, out=dxf)
            dxf.baddbmm_(t.Bm, dnew.flatten(0, 1))
            _products(_seen(torch.bmm(df, xf.mT), t.same), df, xf, dnew, t)
            _sums(dnew, into, xs, t)
            t.dx.mul_(t.v).addcmul_(t.dy, t.skip)
    given, dcum = given.double(), received.double()
    dcum -= given * v
    dcum[:, :, -1] += torch.unflatten(leaving.flatten(2).double(), 2, (g, h, p)).sum(-1) / step
    return given * grow, _log_decay_gradient(dcum), dstate, dyx


def _carried_back(into: Tensor, t: Any) -> Tensor:
    """Gradient of the state that leaves each chunk, (r, c, n, h·p); writes that of the state before the first."""
    dnew = torch.empty_like(into)
    *earlier, last = dnew.unbind(1)
    last.copy_(t.dend)
    _carry(last, into, t.through, [*earlier[::-1], t.dstate], -1)
    return dnew


def _products(dscores: Tensor, dys: Tensor, xs: Tensor, dnew: Tensor, t: Any) -> None:
    """Write the gradients of B and C (k, Q, n), through scores and states."""
    torch.bmm(dys, t.states.flatten(0, 1).mT, out=t.dC)
    torch.bmm(xs, dnew.flatten(0, 1).mT, out=t.dB)
    if t.same is not None:
        t.dC.mul_(t.head)
        t.dB.mul_(t.tail)
    t.dB.baddbmm_(dscores.mT, t.C)
    t.dC.baddbmm_(dscores, t.B)


def _sums(dnew: Tensor, into: Tensor, scratch: Tensor, t: Any) -> None:
    """Write the inner products that the gradient of the decay is made of; ``into`` and ``scratch`` are overwritten."""
    torch.mul(dnew[:, :-1], t.states[:, 1:], out=into[:, :-1])
    torch.mul(dnew[:, -1], t.end, out=into[:, -1])
    torch.sum(into, 2, out=t.leaving)
    _dot(t.dy, t.past, scratch, t.received)
    _dot(t.dx, t.x, scratch, t.given)
    _dot(t.dy, t.x, scratch, t.dyx)


def exact_forward(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    marks: Marks | None,
    to: Saved,
    y: Tensor,
) -> None:
    """As :func:`scaled_forward`, for any decay."""
    c, q, g, h, p = x.shape[1:]
    same, _, _ = _masks(marks)
    to_end, reach = _exp(to.cum[:, :, -1:] - to.cum, x.dtype) * dt, _exp(to.cum, x.dtype)
    through = _alive(reach[:, :, -1], marks)
    for i in range(g):
        xi, dti, cum, late, reach_i, Bi, Ci = (_group(t, i) for t in (x, dt, to.cum, to_end, reach, B, C))
        past, own, yi = (_group(t, i) for t in (to.past, to.own, y))
        Bm, Cm = _reached(Bi, Ci, marks)
        to.states[i, :, 0] = state[i]
        for t in _pieces(
            x, c * q * h * max(p, q),
            x=xi, dt=dti, cum=cum.mT.contiguous(), to_end=late.unsqueeze(-1), reach=reach_i.unsqueeze(-1),
            C=Ci, Bt=Bi.mT, Cm=Cm, Bmt=Bm.mT, same=same, through=_wide(through[:, :, i], p),
            scores=to.scores[i], own=own, past=past, y=yi, states=to.states[i], end=to.end[i],
        ):  # fmt: skip
            new = torch.bmm(t.Bmt, (t.x * t.to_end).flatten(2)).view(t.states.shape)
            first, *later = t.states.unbind(1)
            _carry(first, new, t.through, [*later, t.end])
            _scores(t.C, t.Bt, t.same, t.scores, t.own)
            decayed = _decay_matrix(t.cum, x.dtype).mul_(t.scores.unsqueeze(1))
            inside = torch.bmm(decayed.flatten(0, 1), _by_head(t.x, t.dt.unsqueeze(-1)))
            carried = torch.bmm(t.Cm, t.states.flatten(0, 1)).view(t.x.shape)
            torch.addcmul(_apart(inside, h), carried, t.reach, out=t.past)
            torch.addcmul(t.past, t.x, direct(t.own, t.dt, D[i]), out=t.y)


def exact_backward(
    dy: Tensor,
    dend: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    saved: Saved,
    marks: Marks | None,
    to: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`scaled_backward`, for any decay."""
    c, q, g, h, p = x.shape[1:]
    same, head, tail = _masks(marks)
    late, reach = (_exp(t, x.dtype) for t in (saved.cum[:, :, -1:] - saved.cum, saved.cum))
    to_end = late * dt
    through = _alive(reach[:, :, -1], marks)
    dstate = torch.empty_like(dend)
    received, given, dyx, leaving = (x.new_empty(t.shape) for t in (dt, dt, dt, x[:, :, 0]))
    for i in range(g):
        xi, dti, cum, late_i, reach_i, end_i = (_group(t, i) for t in (x, dt, saved.cum, late, reach, to_end))
        Bi, Ci, own, dyi = (_group(t, i) for t in (B, C, saved.own, dy))
        dxi, dBi, dCi, past, ri, gi, dyxi = (_group(t, i) for t in (*to, saved.past, received, given, dyx))
        Bm, Cm = _reached(Bi, Ci, marks)
        for t in _pieces(
            x, c * q * h * max(p, q),
            dy=dyi, x=xi, dt=dti.unsqueeze(-1), cum=cum.mT.contiguous(), late=late_i.unsqueeze(-1),
            reach=reach_i.unsqueeze(-1), to_end=end_i.unsqueeze(-1), skip=direct(own, dti, D[i]), B=Bi, C=Ci, Bm=Bm, Cmt=Cm.mT,
            same=same, head=head, tail=tail,
            through=_wide(through[:, :, i], p), scores=saved.scores[i], past=past, states=saved.states[i],
            end=saved.end[i], dend=dend[i], dx=dxi, dB=dBi, dC=dCi, dstate=dstate[i],
            received=ri, given=gi, dyx=dyxi, leaving=leaving[:, :, i].flatten(2),
        ):  # fmt: skip
            dyu, by_head = (t.dy * t.reach).flatten(2), _by_head(t.dy)
            into = torch.bmm(t.Cmt, dyu).view(t.states.shape)
            dnew = _carried_back(into, t)
            decay = _decay_matrix(t.cum, x.dtype)
            dseen = torch.bmm(by_head, _by_head(t.x, t.dt).mT).view(decay.shape).mul_(decay).sum(1)
            inside = torch.bmm(decay.mul_(t.scores.unsqueeze(1)).flatten(0, 1).mT, by_head)
            carried = torch.bmm(t.Bm, dnew.flatten(0, 1)).view(t.x.shape)
            torch.addcmul(_apart(inside, h), carried, t.late, out=t.dx)
            xw = t.x * t.to_end
            _products(_seen(dseen, t.same), dyu, xw.flatten(2), dnew, t)
            _sums(dnew, into, xw, t)
            t.dx.mul_(t.dt).addcmul_(t.dy, t.skip)
    given, dcum = given.double(), received.double()
    dcum -= given * dt
    dcum[:, :, -1] += torch.unflatten(leaving.flatten(2).double(), 2, (g, h, p)).sum(-1)
    return given, _log_decay_gradient(dcum), dstate, dyx
