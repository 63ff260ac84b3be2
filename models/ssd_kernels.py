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

Where a batch is worked on in pieces, :func:`factors` is taken of all of it before and :func:`finish` after: they are
many operations on little. :func:`piece_forward` and :func:`piece_backward` do what is large, piece by piece.

Layouts: x, y (b, c, Q, g, h, p), dt (b, c, Q, g, h), B, C (b, c, Q, g, n), states (g, b, c, n, h·p) where g counts
groups, h heads of a group, p channels of a head, n states. ``Marks`` tells where sequences begin inside a chunk.
Outside, a state is (b, H, p, n) with H = g·h, as in the public implementations; :func:`by_group` and :func:`by_head`
go from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recur.models.tiles import Scratch, tile_rows, tiles

DECAYS = 1 << 20
"""Decays between two steps of a chunk held at the same time on a CPU: only long rows of many heads have more."""


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
    """(b, c, 1, 1): the state that enters the chunk reaches the one that leaves it."""


class Factors(NamedTuple):
    """What a form makes of dt and the sums of dt·A, for one direction; a first dimension b in all of them."""

    take: Tensor
    """(b, c, Q, g, h, 1): of what a step receives; u of the scaled form, e^cum of the exact one."""
    give: Tensor
    """(b, c, Q, g, h, 1): of what a step adds to the state; v, or e^(cum_Q − cum) dt."""
    through: Tensor
    """(b, c, g, 1, h·p): of the state from chunk to chunk."""
    rest: Tensor
    """(b, c, Q, g, h, 1): what :func:`piece_backward` leaves out of dx until the last; v, or dt."""
    late: Tensor
    """(b, c, Q, g, h, 1): ``give`` without ``rest``; e^(cum_Q − cum) of the exact form, 1/u, not used, of the scaled."""
    edge: Tensor | None = None
    """(b, 1, g, 1, h·p), scaled form: of the first state on the way."""
    lift: Tensor | None = None
    """(b, c, g, 1, h·p), scaled form: takes its scale from the gradient of the state that leaves a chunk, so that its
    product with the state, itself as small as e^−40, stays a number where the gradient is small."""
    cum: Tensor | None = None
    """(b, c, g, h, Q), exact form: the sums, in float64."""

    def rows(self, k: slice) -> Factors:
        return Factors._make(t if t is None else t[k] for t in self)


class Saved(NamedTuple):
    """What the forward pass writes and the backward pass needs beside the inputs."""

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
        sizes = (shape, (g, b * c, q, q), (b, c, q, g), (g, b, c, n, h * p), (g, b, n, h * p))
        return Saved(*(like.new_empty(size) for size in sizes))

    def rows(self, k: slice) -> Saved:
        c = self.past.shape[1]
        scores, states, end = self.scores[:, k.start * c : k.stop * c], self.states[:, k], self.end[:, k]
        return Saved(self.past[k], scores, self.own[k], states, end)


class Sums(NamedTuple):
    """Inner products that :func:`piece_backward` writes: the gradients of dt, A and D are made of them."""

    received: Tensor
    """(b, c, Q, g, h): ⟨dy, past⟩."""
    given: Tensor
    """(b, c, Q, g, h): ⟨dx, x⟩ of dx without self term and ``rest``."""
    dyx: Tensor
    """(b, c, Q, g, h): ⟨dy, x⟩."""
    leaving: Tensor
    """(b, c, g, h·p): ⟨dS', S'⟩ over the states for the state that leaves each chunk, S' as it is scaled."""

    @staticmethod
    def room(x: Tensor) -> Sums:
        b, c, _, g, h, p = x.shape
        each = x.shape[:-1]
        return Sums(*(x.new_empty(size) for size in (each, each, each, (b, c, g, h * p))))

    def rows(self, k: slice) -> Sums:
        return Sums(*(t[k] for t in self))


def piece_rows(shape: tuple[int, ...], scaled: bool, device: torch.device, inputs: int) -> int:
    """Rows of x of ``shape`` (b, c, Q, g, h, p) to work on at a time, about ``inputs`` numbers of a group: fewer in the
    exact form, where a head's decays are as wide as a chunk. Up to three times as much where that makes five rows: their
    states are carried from chunk to chunk together, and torch gives a second thread nothing to do below 32,769 numbers,
    which is five states of 64 by 128."""
    b, c, q, _, h, p = shape
    each = c * q * h * (p if scaled else max(p, q))
    rows, most = (tile_rows(b, each, device, n) for n in (inputs, 3 * inputs))
    return max(rows, min(most, 5))


def by_group(state: Tensor, groups: int) -> Tensor:
    """State (b, H, p, n) as (g, b, n, h·p), contiguous."""
    return torch.unflatten(state, 1, (groups, -1)).flatten(2, 3).permute(1, 0, 3, 2).contiguous()


def rows_of(state: Tensor | None, k: slice) -> Tensor | None:
    """Rows k of a state (g, b, n, h·p)."""
    return None if state is None else state[:, k]


def by_head(state: Tensor, heads: int) -> Tensor:
    """The inverse for ``heads`` heads of each group: contiguous, memory of its own."""
    parts = torch.unflatten(state, -1, (heads, -1))
    return parts.permute(1, 0, 3, 4, 2).flatten(1, 2).clone(memory_format=torch.contiguous_format)


def chunk_marks(segment: Tensor, chunk: int, dtype: torch.dtype) -> Marks:
    """``Marks`` from segment (b, T) that counts beginnings, T a multiple of ``chunk``."""
    seg = segment.reshape(segment.shape[0], -1, chunk)
    before = torch.cat([segment.new_zeros(segment.shape[0], 1), seg[:, :-1, -1]], 1)
    same = (seg.unsqueeze(-1) == seg.unsqueeze(-2)).tril()
    head, tail = seg == before.unsqueeze(-1), seg == seg[..., -1:]
    return Marks(
        same.reshape(-1, chunk, chunk).to(dtype),
        head.reshape(-1, chunk, 1).to(dtype),
        tail.reshape(-1, chunk, 1).to(dtype),
        head[..., -1, None, None].to(dtype),
    )


def _exp(logs: Tensor, dtype: torch.dtype) -> Tensor:
    """e^logs of logs in float64: rounded before, a log of 40 would cost the factor two digits."""
    return logs.exp().to(dtype)


def _growth(cum: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """u = e^(cum − mid) of the scaled form and 1/u."""
    u = _exp(cum - cum[:, :, -1:] / 2, dtype)
    return u, u.reciprocal()


def _times_next(half: Tensor, backwards: bool = False) -> Tensor:
    """(b, c, g, h): each chunk's factor times that of the chunk that comes next on the way, or 1."""
    one = torch.ones_like(half[:, :1])
    return half * torch.cat([one, half[:, :-1]] if backwards else [half[:, 1:], one], 1)


def factors(cum: Tensor, dt: Tensor, p: int, scaled: bool, backwards: bool = False) -> Factors:
    """From the sums of dt·A within chunks (b, c, Q, g, h) in float64."""

    def wide(per_head: Tensor) -> Tensor:
        return per_head.repeat_interleave(p, -1).unsqueeze(3)

    if scaled:
        u, grow = _growth(cum, dt.dtype)
        v, half = (grow * dt).unsqueeze(-1), u[:, :, -1]
        edge = half[:, -1:] if backwards else half[:, :1]
        through, lift = wide(_times_next(half, backwards)), wide(grow[:, :, -1])
        return Factors(u.unsqueeze(-1), v, through, v, grow.unsqueeze(-1), wide(edge), lift)
    late, reach = (_exp(t, dt.dtype).unsqueeze(-1) for t in (cum[:, :, -1:] - cum, cum))
    rest = dt.unsqueeze(-1)
    sums = cum.movedim(2, -1).contiguous()
    return Factors(reach, late * rest, wide(reach[:, :, -1, ..., 0]), rest, late, cum=sums)


def finish(sums: Sums, f: Factors, own: Tensor, dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d(dt) (b, c, Q, g, h), dA and dD (g, h), of sums over the whole batch and the factors of the way back."""
    given = ddt = sums.given.double()
    leaving = torch.unflatten(sums.leaving.double(), -1, (dt.shape[-1], -1)).sum(-1)
    if f.lift is not None:
        grow = f.late.squeeze(-1)
        ddt = given * grow
        leaving[:, :-1] *= grow[:, 1:, -1]
    dcum = torch.addcmul(sums.received.double(), given, f.rest.squeeze(-1).double(), value=-1)
    dcum[:, :, -1] += leaving
    da = dcum.flip(2).cumsum(2).flip(2)
    ddt = (ddt + sums.dyx * own.unsqueeze(-1)).addcmul_(da, A.view(dt.shape[3:]).double())
    return ddt.to(dt.dtype), (da * dt).sum((0, 1, 2)).to(dt.dtype), sums.dyx.sum((0, 1, 2))


def direct(own: Tensor, dt: Tensor, D: Tensor) -> Tensor:
    """(…, h, 1): what a step's input is multiplied by in its own output, own (…), dt (…, h), D (h,)."""
    return torch.addcmul(D, own.unsqueeze(-1), dt).unsqueeze(-1)


def _group(t: Tensor, i: int) -> Tensor:
    """Group i of (b, c, Q, g, …) as (b·c, Q, …), a view."""
    return t[:, :, :, i].flatten(0, 1)


def _through(f: Factors, marks: Marks | None, i: int) -> tuple[Tensor, Tensor]:
    """(b, c, 1, h·p): ``f.through`` of group i, and that of the states that no beginning stops."""
    through = f.through[:, :, i]
    return through, through if marks is None else through * marks.alive


def _enter(state: Tensor | None, edge: Tensor | None, i: int, to: Tensor) -> None:
    """Write the state of group i that comes first on the way, as its form scales it."""
    if state is None:
        to.zero_()
    elif edge is None:
        to.copy_(state[i])
    else:
        torch.mul(state[i], edge[:, 0, i], out=to)


def _carry(first: Tensor, new: Tensor, through: Tensor, to: list[Tensor], order: int = 1) -> None:
    """Write state_(k+1) = new_k + through_k ∘ state_k ``to`` places in turn, over the chunks k (dim 1 of the others),
    as many as there are places; ``order`` −1 takes the chunks from the last one."""
    for n, factor, after in zip(new.unbind(1)[::order], through.unbind(1)[::order], to, strict=False):
        torch.addcmul(n, first, factor, out=after)
        first = after


def _reached(B: Tensor, C: Tensor, marks: Marks | None) -> tuple[Tensor, Tensor]:
    """B of the steps that reach the state that leaves their chunk, C of those that the entering state reaches."""
    return (B, C) if marks is None else (B * marks.tail, C * marks.head)


def _seen(scores: Tensor, marks: Marks | None, up_to: int = 0) -> Tensor:
    """Puts scores (b·c, Q, Q) to zero but for the steps j ≤ i + ``up_to`` of the same sequence."""
    return (scores if marks is None else scores.mul_(marks.same)).tril_(up_to)


def _decays(cum: Tensor, scratch: Scratch) -> Tensor:
    """cum (b, c, h, Q) → (b·c, h, Q, Q): e^(cum_i − cum_j) for j ≤ i, and 1 above: bounded before the exponential, for
    the scores to mask."""
    sums = cum.flatten(0, 1)
    shape = torch.Size((*sums.shape, sums.shape[-1]))
    logs = torch.sub(sums.unsqueeze(-1), sums.unsqueeze(-2), out=scratch("logs", shape, sums.dtype))
    return scratch("decays", shape).copy_(logs).clamp_(max=0.0).exp_()


def _apart(t: Tensor, j: slice) -> Tensor:
    """Heads j of (k, Q, h, p) as (k, heads, Q, p), a view."""
    return t[:, :, j].transpose(1, 2)


def _head_tiles(scores: Tensor, heads: int) -> list[slice]:
    """Heads whose decays, each as large as ``scores``, are held at the same time."""
    return tiles(heads, tile_rows(heads, scores.numel(), scores.device, DECAYS))


def piece_forward(
    f: Factors,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None,
    marks: Marks | None,
    to: Saved,
    y: Tensor,
    scratch: Scratch,
) -> None:
    """Write y and what the way back needs; ``state`` (g, b, n, h·p) enters, or zeros."""
    for i in range(x.shape[3]):
        xi, dti, Bi, Ci, take, give = (_group(t, i) for t in (x, dt, B, C, f.take, f.give))
        past, own, yi = (_group(t, i) for t in (to.past, to.own, y))
        scores, states = to.scores[i], to.states[i]
        flat = states.flatten(0, 1)
        Bm, Cm = _reached(Bi, Ci, marks)
        xs = torch.mul(xi, give, out=scratch("xs", xi.shape)).flatten(2)
        new = scratch("new", states.shape)
        torch.bmm(Bm.mT, xs, out=new.flatten(0, 1))
        step, through = _through(f, marks, i)
        if f.edge is not None:
            new.mul_(step)
        first, *later = states.unbind(1)
        _enter(state, f.edge, i, first)
        _carry(first, new, through, [*later, to.end[i]])
        torch.bmm(Ci, Bi.mT, out=scores)
        own.copy_(scores.diagonal(dim1=1, dim2=2))
        _seen(scores, marks, -1)
        if f.cum is None:
            received = past.flatten(2)
            torch.bmm(scores, xs, out=received)
            received.baddbmm_(Cm, flat)
            past.mul_(take)
        else:
            carried = scratch("carried", xi.shape)
            torch.bmm(Cm, flat, out=carried.flatten(2))
            rest = _group(f.rest, i)
            for j in _head_tiles(scores, x.shape[4]):
                decayed = _decays(f.cum[:, :, i, j], scratch).mul_(scores.unsqueeze(1)).flatten(0, 1)
                xj = _apart(xi, j)
                xd, inside = scratch("xd", xj.shape), scratch("inside", xj.shape)
                torch.mul(xj, _apart(rest, j), out=xd)
                torch.bmm(decayed, xd.flatten(0, 1), out=inside.flatten(0, 1))
                torch.addcmul(inside, _apart(carried, j), _apart(take, j), out=_apart(past, j))
        torch.addcmul(past, xi, direct(own, dti, D[i]), out=yi)


def piece_backward(
    f: Factors,
    dy: Tensor,
    dend: Tensor | None,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor,
    saved: Saved,
    marks: Marks | None,
    to: tuple[Tensor, Tensor, Tensor],
    dstate: Tensor | None,
    sums: Sums,
    scratch: Scratch,
) -> None:
    """Write dx, dB and dC ``to`` tensors like x, B and C, d(state) where there is room for it, and the sums; ``dend`` is
    the gradient of the last state, None for zeros, ``skip`` is :func:`direct`."""
    for i in range(x.shape[3]):
        xi, Bi, Ci, dyi = (_group(t, i) for t in (x, B, C, dy))
        take, give, rest, late = (_group(t, i) for t in (f.take, f.give, f.rest, f.late))
        past, dx, dB, dC, skip_i = (_group(t, i) for t in (saved.past, *to, skip))
        scores, states, end = saved.scores[i], saved.states[i], saved.end[i]
        Bm, Cm = _reached(Bi, Ci, marks)
        dys = torch.mul(dyi, take, out=scratch("dys", xi.shape)).flatten(2)
        into, dnew = scratch("into", states.shape), scratch("dnew", states.shape)
        torch.bmm(Cm.mT, dys, out=into.flatten(0, 1))
        step, through = _through(f, marks, i)
        if f.edge is not None:
            into.mul_(step)
        *earlier, last = dnew.unbind(1)
        _enter(dend, f.edge, i, last)
        _carry(last, into, through, [*earlier[::-1], *([] if dstate is None else [dstate[i]])], -1)
        xs, dflat = torch.mul(xi, give, out=scratch("xs", xi.shape)), dnew.flatten(0, 1)
        dscores = scratch("dscores", scores.shape)
        if f.cum is None:
            dgiven = dx.flatten(2)
            torch.bmm(scores.mT, dys, out=dgiven)
            dgiven.baddbmm_(Bm, dflat)
            torch.bmm(dys, xs.flatten(2).mT, out=dscores)
        else:
            carried = scratch("carried", xi.shape)
            torch.bmm(Bm, dflat, out=carried.flatten(2))
            for j in _head_tiles(scores, x.shape[4]):
                decay, xj = _decays(f.cum[:, :, i, j], scratch), _apart(xi, j)
                dyj = scratch("dy", xj.shape).copy_(_apart(dyi, j)).flatten(0, 1)
                inside, dseen = scratch("inside", xj.shape), scratch("dseen", decay.shape)
                xd = torch.mul(xj, _apart(rest, j), out=inside).flatten(0, 1)
                torch.bmm(dyj, xd.mT, out=dseen.flatten(0, 1))
                if j.start:
                    dscores += dseen.mul_(decay).sum(1)
                else:
                    torch.sum(dseen.mul_(decay), 1, out=dscores)
                torch.bmm(decay.mul_(scores.unsqueeze(1)).flatten(0, 1).mT, dyj, out=inside.flatten(0, 1))
                torch.addcmul(inside, _apart(carried, j), _apart(late, j), out=_apart(dx, j))
        _seen(dscores, marks)
        torch.bmm(dys, states.flatten(0, 1).mT, out=dC)
        torch.bmm(xs.flatten(2), dflat.mT, out=dB)
        if marks is not None:
            dC.mul_(marks.head)
            dB.mul_(marks.tail)
        dB.baddbmm_(dscores.mT, Ci)
        dC.baddbmm_(dscores, Bi)
        if f.lift is not None:
            dnew.mul_(f.lift[:, :, i])
        torch.mul(dnew[:, :-1], states[:, 1:], out=into[:, :-1])
        torch.mul(last, end, out=into[:, -1])
        torch.sum(into, 2, out=sums.leaving[:, :, i])
        for a, b, total in ((dyi, past, sums.received), (dx, xi, sums.given), (dyi, xi, sums.dyx)):
            torch.sum(torch.mul(a, b, out=xs), -1, out=_group(total, i))  # written over xs, which is done
        dx.mul_(rest).addcmul_(dyi, skip_i)
