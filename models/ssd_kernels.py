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

:func:`factors` is taken of a whole batch before and :func:`finish` after: they are many operations on little. What is
large, :func:`piece_forward` and :func:`piece_backward`, is done of a group in pieces of k = r·s chunks, s of each of r
rows, which :mod:`recur.models.ssd_pieces` cuts.

Layouts: x, y (b, c, Q, g, h, p), dt (b, c, Q, g, h), B, C (b, c, Q, g, n), states (g, b, n, h·p) where g counts
groups, h heads of a group, p channels of a head, n states; of a piece x, y (k, Q, h, p), B, C (k, Q, n), states
(k, n, h·p). ``Marks`` tells where sequences begin inside a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recur.models.tiles import Scratch

FAINT = 1e-9
"""Half a chunk's decay below which a state and its gradient, each scaled by one such half, are not multiplied as they
are: the product of small ones would be zero."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Which steps see which, where sequences begin inside chunks; 1 and 0 in the dtype of the inputs."""

    same: Tensor
    """(k, Q, Q): j ≤ i and no beginning between them."""
    head: Tensor
    """(k, Q, 1): the state that enters the chunk reaches the step."""
    tail: Tensor
    """(k, Q, 1): the step reaches the state that leaves the chunk."""
    alive: Tensor
    """(k, 1, 1): the state that enters the chunk reaches the one that leaves it."""


class Factors(NamedTuple):
    """What a form makes of dt and the sums of dt·A, for one direction. Of a piece: without g, k for b and c."""

    take: Tensor
    """(b, c, Q, g, h, 1): of what a step receives; u of the scaled form, e^cum of the exact one."""
    give: Tensor
    """(b, c, Q, g, h, 1): of what a step adds to the state; v, or e^(cum_Q − cum) dt."""
    rest: Tensor
    """(b, c, Q, g, h, 1): what :func:`piece_backward` leaves out of dx until the last; v, or dt."""
    late: Tensor
    """(b, c, Q, g, h, 1): ``give`` without ``rest``; 1/u, not used in pieces, or e^(cum_Q − cum)."""
    through: Tensor
    """(b, c, g, 1, h·p): of the state from chunk to chunk."""
    edge: Tensor | None = None
    """(b, 1, g, 1, h·p), scaled form: of the first state on the way."""
    lift: Tensor | None = None
    """(b, c, g, 1, h·p), scaled form on the way back, where a decay is ``FAINT``: takes its scale from the gradient of
    the state that leaves a chunk before that is multiplied with the state."""
    cum: Tensor | None = None
    """(b, c, g, h, Q), exact form forwards: the sums."""
    fine: Tensor | None = None
    """(b, c, g, h, Q), exact form forwards: what the rounding of the sums left."""

    def rows(self, k: slice) -> Factors:
        return Factors._make(t if t is None else t[k] for t in self)


class Saved(NamedTuple):
    """What the forward pass of a piece writes and the backward pass needs beside whole tensors."""

    scores: Tensor
    """(k, Q, Q): C_i·B_j of the steps j < i of the same sequence."""
    states: Tensor
    """(k, n, h·p): e^mid · state that enters each chunk (scaled), or that state itself (exact)."""
    decays: Tensor | None
    """(k, h, Q, Q), exact form: e^(cum_i − cum_j) for j ≤ i, and 1 above."""

    @staticmethod
    def room(like: Tensor, shape: tuple[int, ...], n: int, exact: bool) -> Saved:
        """For a piece x of ``shape`` (k, Q, h, p) and n states; the type of ``like``."""
        k, q, h, p = shape
        decays = like.new_empty(k, h, q, q) if exact else None
        return Saved(like.new_empty(k, q, q), like.new_empty(k, n, h * p), decays)


class Sums(NamedTuple):
    """Inner products that :func:`piece_backward` writes: the gradients of dt, A and D are made of them."""

    received: Tensor
    """(b, c, Q, g, h): ⟨dy, past⟩."""
    given: Tensor
    """(b, c, Q, g, h): ⟨dx, x⟩ of dx without self term and ``rest``."""
    dyx: Tensor
    """(b, c, Q, g, h): ⟨dy, x⟩."""
    leaving: Tensor
    """(b, c, g, h·p): ⟨dS', S'⟩ over the states for the state that leaves each chunk, as they are scaled."""

    @staticmethod
    def room(x: Tensor) -> Sums:
        b, c, _, g, h, p = x.shape
        each = x.shape[:-1]
        return Sums(*(x.new_empty(size) for size in (each, each, each, (b, c, g, h * p))))

    def rows(self, k: slice) -> Sums:
        return Sums(*(t[k] for t in self))


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


def _wide(per_head: Tensor, p: int) -> Tensor:
    """(b, c, g, h) as (b, c, g, 1, h·p)."""
    return per_head.repeat_interleave(p, -1).unsqueeze(3)


def factors(cum: Tensor, dt: Tensor, p: int, scaled: bool) -> Factors:
    """Of the way forward, from the sums of dt·A within chunks (b, c, Q, g, h) in float64."""
    if scaled:
        u, grow = _growth(cum, dt.dtype)
        v, half = (grow * dt).unsqueeze(-1), u[:, :, -1]
        through, edge = _wide(_times_next(half), p), _wide(half[:, :1], p)
        return Factors(u.unsqueeze(-1), v, v, grow.unsqueeze(-1), through, edge)
    late, reach = (_exp(t, dt.dtype).unsqueeze(-1) for t in (cum[:, :, -1:] - cum, cum))
    rest, sums = dt.unsqueeze(-1), cum.movedim(2, -1).contiguous()
    rounded = sums.to(dt.dtype)
    through = _wide(reach[:, :, -1, ..., 0], p)
    return Factors(reach, late * rest, rest, late, through, cum=rounded, fine=(sums - rounded).to(dt.dtype))


def back(f: Factors, p: int) -> Factors:
    """Factors of the way back from those of the way forward."""
    if f.edge is None:
        return f
    half = f.take[:, :, -1, ..., 0]
    lift = _wide(f.late[:, :, -1, ..., 0], p) if bool((half < FAINT).any()) else None
    return f._replace(through=_wide(_times_next(half, True), p), edge=_wide(half[:, -1:], p), lift=lift)


def finish(sums: Sums, f: Factors, own: Tensor, dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d(dt) (b, c, Q, g, h), dA and dD (g, h), of sums over the whole batch and the factors of the way back."""
    given = ddt = sums.given.double()
    leaving = torch.unflatten(sums.leaving.double(), -1, (dt.shape[-1], -1)).sum(-1)
    if f.edge is not None:
        grow = f.late.squeeze(-1)
        ddt = given * grow
        leaving[:, :-1] *= grow[:, 1:, -1]
        if f.lift is None:
            leaving *= grow[:, :, -1]
    dcum = torch.addcmul(sums.received.double(), given, f.rest.squeeze(-1).double(), value=-1)
    dcum[:, :, -1] += leaving
    da = dcum.flip(2).cumsum(2).flip(2)
    ddt = (ddt + sums.dyx * own.squeeze(-1)).addcmul_(da, A.view(dt.shape[3:]).double())
    return ddt.to(dt.dtype), (da * dt).sum((0, 1, 2)).to(dt.dtype), sums.dyx.sum((0, 1, 2))


def direct(own: Tensor, dt: Tensor, D: Tensor) -> Tensor:
    """(…, h, 1): what a step's input is multiplied by in its own output, own (…, 1, 1), dt (…, h, 1), D (h, 1)."""
    return torch.addcmul(D, own, dt)


def chunks_of(t: Tensor, s: int) -> Sequence[Tensor]:
    """(r·s, …) as s chunks (r, …), one after the other."""
    return (t,) if s == 1 else t.view(-1, s, *t.shape[1:]).unbind(1)


def _carry(first: Tensor, new: Tensor, through: Tensor, to: Sequence[Tensor], s: int, order: int = 1) -> None:
    """Write state_(k+1) = new_k + through_k ∘ state_k ``to`` places in turn, over the s chunks of the others, as many as
    there are places; ``order`` −1 takes the chunks from the last one."""
    for n, factor, after in zip(chunks_of(new, s)[::order], chunks_of(through, s)[::order], to, strict=False):
        torch.addcmul(n, first, factor, out=after)
        first = after


def _whole(t: Tensor, name: str, scratch: Scratch) -> Tensor:
    """``t`` or, where it has gaps, memory of its shape: into gaps torch writes a product matrix by matrix."""
    return t if t.is_contiguous() else scratch(name, t.shape)


def _reached(B: Tensor, C: Tensor, marks: Marks | None) -> tuple[Tensor, Tensor]:
    """B of the steps that reach the state that leaves their chunk, C of those that the entering state reaches."""
    return (B, C) if marks is None else (B * marks.tail, C * marks.head)


def _decays(f: Factors, to: Tensor) -> Tensor:
    """Write ``Saved.decays`` ``to`` their place: bounded before the exponential, for the scores to mask."""
    assert f.cum is not None and f.fine is not None
    torch.sub(f.cum.unsqueeze(-1), f.cum.unsqueeze(-2), out=to)
    return to.add_(f.fine.unsqueeze(-1)).sub_(f.fine.unsqueeze(-2)).clamp_(max=0.0).exp_()


def piece_forward(
    f: Factors,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    y: Tensor,
    past: Tensor,
    own: Tensor,
    marks: Marks | None,
    D: Tensor,
    to: Saved,
    after: Tensor,
    scratch: Scratch,
) -> None:
    """Write y, ``past`` (y without self term and skip), own (k, Q, 1, 1) (C_i·B_i), ``to``, whose first state is there,
    and the state ``after`` (r, n, h·p) that leaves the piece; dt (k, Q, h, 1), D (h, 1)."""
    k, q, h, p = x.shape
    s, packed = k // len(after), torch.Size((k, q, h * p))
    Bm, Cm = _reached(B, C, marks)
    torch.mul(x, f.give, out=scratch("xs", x.shape))
    xs, new = scratch("xs", packed), scratch("new", to.states.shape)
    torch.bmm(Bm.mT, xs, out=new)
    if to.decays is None:
        new.mul_(f.through)
    first, *later = chunks_of(to.states, s)
    _carry(first, new, f.through if marks is None else f.through * marks.alive, [*later, after], s)
    scores = torch.bmm(C, B.mT, out=scratch("scores", to.scores.shape))
    own.copy_(scores.diagonal(dim1=1, dim2=2)[..., None, None])
    torch.tril(scores if marks is None else scores.mul_(marks.same), -1, out=to.scores)
    if to.decays is None:
        received = _whole(past, "received", scratch)
        torch.bmm(to.scores, xs, out=received.view(packed)).baddbmm_(Cm, to.states)
        torch.mul(received, f.take, out=past)
    else:
        torch.bmm(Cm, to.states, out=scratch("carried", packed))
        # per head from here: (k, h, Q, p), and (k·h, Q, p) for the product
        by_head, apart, pairs = torch.Size((k, h, q, p)), torch.Size((k * h, q, p)), torch.Size((k * h, q, q))
        torch.mul(_decays(f, to.decays), to.scores.unsqueeze(1), out=scratch("pairs", to.decays.shape))
        each = scratch("each", by_head)
        torch.mul(x.transpose(1, 2), f.rest.transpose(1, 2), out=each)
        torch.bmm(scratch("pairs", pairs), each.flatten(0, 1), out=scratch("inside", apart))
        carried, take = (t.transpose(1, 2) for t in (scratch("carried", x.shape), f.take))
        torch.addcmul(scratch("inside", by_head), carried, take, out=past.transpose(1, 2))
    torch.addcmul(past, x, direct(own, dt, D), out=y)


def piece_backward(
    f: Factors,
    dy: Tensor,
    x: Tensor,
    past: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor,
    dx: Tensor,
    dB: Tensor,
    dC: Tensor,
    received: Tensor,
    given: Tensor,
    dyx: Tensor,
    leaving: Tensor,
    marks: Marks | None,
    saved: Saved,
    after: Tensor,
    dafter: Tensor,
    dbefore: Tensor | None,
    scratch: Scratch,
) -> None:
    """Write dx, dB, dC, the sums and, where there is room for it, the gradient ``dbefore`` (r, n, h·p) of the state that
    enters the piece. ``dafter`` (k, n, h·p) is room for the gradients of the states that leave its chunks, the last of
    which is there; ``skip`` is :func:`direct`."""
    k, q, h, p = x.shape
    s, packed = k // len(after), torch.Size((k, q, h * p))
    scores, states, decays = saved
    Bm, Cm = _reached(B, C, marks)
    torch.mul(dy, f.take, out=scratch("dys", x.shape))
    dys, into = scratch("dys", packed), scratch("into", states.shape)
    torch.bmm(Cm.mT, dys, out=into)
    if decays is None:
        into.mul_(f.through)
    *earlier, last = chunks_of(dafter, s)
    places = [*earlier[::-1], *([] if dbefore is None else [dbefore])]
    _carry(last, into, f.through if marks is None else f.through * marks.alive, places, s, -1)
    torch.mul(x, f.give, out=scratch("xs", x.shape))
    xs, got = scratch("xs", packed), _whole(dx, "got", scratch)
    dscores = scratch("dscores", scores.shape)
    if decays is None:
        torch.bmm(scores.mT, dys, out=got.view(packed)).baddbmm_(Bm, dafter)
        torch.bmm(dys, xs.mT, out=dscores)
    else:
        torch.bmm(Bm, dafter, out=scratch("carried", packed))
        by_head, apart, pairs = torch.Size((k, h, q, p)), torch.Size((k * h, q, p)), torch.Size((k * h, q, q))
        scratch("dy", by_head).copy_(dy.transpose(1, 2))
        each = scratch("each", by_head)
        torch.mul(x.transpose(1, 2), f.rest.transpose(1, 2), out=each)
        torch.bmm(scratch("dy", apart), each.flatten(0, 1).mT, out=scratch("pairs", pairs))
        heads = zip(scratch("pairs", decays.shape).unbind(1), decays.unbind(1), strict=True)
        torch.mul(*next(heads), out=dscores)
        for dpairs, decay in heads:
            dscores.addcmul_(dpairs, decay)
        torch.mul(decays, scores.unsqueeze(1), out=scratch("pairs", decays.shape))
        torch.bmm(scratch("pairs", pairs).mT, scratch("dy", apart), out=scratch("inside", apart))
        carried, late = (t.transpose(1, 2) for t in (scratch("carried", x.shape), f.late))
        torch.addcmul(scratch("inside", by_head), carried, late, out=got.transpose(1, 2))
    (dscores if marks is None else dscores.mul_(marks.same)).tril_()
    for outer, state, mark, score, other, total in (
        (dys, states, None if marks is None else marks.head, dscores, B, dC),
        (xs, dafter, None if marks is None else marks.tail, dscores.mT, C, dB),
    ):
        from_states = torch.bmm(outer, state.mT, out=_whole(total, "from states", scratch))
        if mark is not None:
            from_states.mul_(mark)
        if from_states is total:
            total.baddbmm_(score, other)
        else:
            torch.add(from_states, torch.bmm(score, other, out=scratch("from scores", B.shape)), out=total)
    if f.lift is not None:
        dafter.mul_(f.lift)
    if s > 1:
        dleft, entered, total = (torch.unflatten(t, 0, (-1, s)) for t in (dafter, states, into))
        torch.mul(dleft[:, :-1], entered[:, 1:], out=total[:, :-1])
    torch.mul(last, after, out=chunks_of(into, s)[-1])
    torch.sum(into, 1, out=leaving)
    for a, b, total in ((dy, past, received), (got, x, given), (dy, x, dyx)):
        torch.sum(
            torch.mul(a, b, out=scratch("xs", x.shape)), -1, out=total
        )  # written over xs, which is done
    torch.addcmul(got.mul_(f.rest), dy, skip, out=dx)
