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
    """What the forward pass writes and the backward pass needs beside the inputs."""

    cum: Tensor
    """(b, c, Q, g, h): sums of dt·A within chunks, in float64."""
    past: Tensor
    """(b, c, Q, g, h, p): y without self term and skip."""
    scores: Tensor
    """(g, b, c, Q, Q): C_i·B_j."""
    states: Tensor
    """(g, b, c, n, h·p): e^mid · state that enters each chunk (scaled), or that state itself (exact)."""
    end: Tensor
    """(g, b, n, h·p): the state after the last chunk."""

    @staticmethod
    def room(like: Tensor, shape: tuple[int, ...], n: int) -> Saved:
        """For inputs x of ``shape`` (b, c, Q, g, h, p) and n states; the type of ``like``."""
        b, c, q, g, h, p = shape
        rest = (shape, (g, b, c, q, q), (g, b, c, n, h * p), (g, b, n, h * p))
        cum = like.new_empty(shape[:-1], dtype=torch.float64)
        return Saved(cum, *(like.new_empty(s) for s in rest))

    def parts(self) -> tuple[Tensor, ...]:
        return self.cum, self.past, self.scores, self.states, self.end

    def rows(self, k: slice) -> Saved:
        return Saved(self.cum[k], self.past[k], self.scores[:, k], self.states[:, k], self.end[:, k])

    @property
    def own(self) -> Tensor:
        """(b, c, Q, g): C_i·B_i."""
        return self.scores.diagonal(dim1=3, dim2=4).permute(1, 2, 3, 0)


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


def _seen(scores: Tensor, marks: Marks | None, up_to: int = 0) -> Tensor:
    """Scores (b·c, Q, Q) of the steps j ≤ i + ``up_to`` of the same sequence, 0 elsewhere."""
    return torch.tril(scores if marks is None else scores * marks.same, up_to)


def _scores(C: Tensor, B: Tensor, marks: Marks | None, to: Tensor) -> Tensor:
    """Write C_i·B_j of one group, C and B (b·c, Q, n), ``to`` (b, c, Q, Q) → those of the steps j < i."""
    flat = to.view(len(C), C.shape[1], -1)
    torch.bmm(C, B.transpose(1, 2), out=flat)
    return _seen(flat, marks, -1)


def _dot(a: Tensor, b: Tensor, scratch: Tensor) -> Tensor:
    """Sum of a ∘ b over the last dimension in float64; the products are written over ``scratch``."""
    return torch.mul(a, b, out=scratch).sum(-1).double()


def _exp(logs: Tensor, dtype: torch.dtype) -> Tensor:
    """e^logs of logs in float64: rounded before, a log of 40 would cost the factor two digits."""
    return logs.exp().to(dtype)


def _factors(cum: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """u = e^(cum − mid) of the scaled form and 1/u."""
    u = _exp(cum - cum[:, :, -1:] / 2, dtype)
    return u, u.reciprocal()


def _decay_matrix(cum: Tensor, i: int, head: int, dtype: torch.dtype) -> Tensor:
    """(b·c, Q, Q): e^(cum_i − cum_j) for j ≤ i, and 1 above: bounded before the exponential, for the scores to mask."""
    s = cum[:, :, :, i, head].reshape(-1, cum.shape[2])
    return (s.unsqueeze(-1) - s.unsqueeze(-2)).clamp_(max=0.0).to(dtype).exp_()


def _log_decay_gradient(dcum: Tensor) -> Tensor:
    """Reversed running sum within each chunk (dim 2), in float64."""
    return dcum.flip(2).cumsum(2).flip(2)


def _alive(factor: Tensor, marks: Marks | None) -> Tensor:
    """``factor`` (b, c, g, h) of the state that enters each chunk in the one that leaves it."""
    return factor if marks is None else factor * marks.alive[..., None, None]


def _reached(B: Tensor, C: Tensor, marks: Marks | None) -> tuple[Tensor, Tensor]:
    """B of the steps that reach the state that leaves their chunk, C of those that the entering state reaches."""
    return (B, C) if marks is None else (B * marks.tail, C * marks.head)


def _chunk_states(B: Tensor, xs: Tensor) -> Tensor:
    """What each chunk adds to its state, Bᵀ xs → (g, b, c, n, h·p)."""
    b, c, _, g, h, p = xs.shape
    new = xs.new_empty(g, b, c, B.shape[-1], h * p)
    for i in range(g):
        torch.bmm(_flat(B, i).transpose(1, 2), _flat(xs, i), out=new[i].view(b * c, -1, h * p))
    return new


def _products(
    dscores: Tensor,
    dys: Tensor,
    xs: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    dnew: Tensor,
    marks: Marks | None,
    dB: Tensor,
    dC: Tensor,
) -> None:
    """Write the gradients of B and C (b·c, Q, n) of one group, through scores and states (b, c, n, h·p)."""
    torch.bmm(dys, states.view(len(dys), -1, dys.shape[2]).transpose(1, 2), out=dC)
    torch.bmm(xs, dnew.view(len(xs), -1, xs.shape[2]).transpose(1, 2), out=dB)
    if marks is not None:
        dC.mul_(marks.head.view(len(dC), -1, 1))
        dB.mul_(marks.tail.view(len(dB), -1, 1))
    dB.baddbmm_(dscores.transpose(1, 2), C)
    dC.baddbmm_(dscores, B)


def _leaving(products: Tensor, dend: Tensor, end: Tensor, heads: int) -> Tensor:
    """(b, c, g, h): ⟨dS', S'⟩ of the state that leaves each chunk, ``products`` being those of all but the last."""
    last = _per_head((dend * end).unsqueeze(2), heads)
    return torch.cat([_per_head(products, heads), last], 1)


def _carry(states: list[Tensor], new: Tensor, through: Tensor, backwards: bool = False) -> None:
    """states_(k+1) = new_k + through_k ∘ states_k for the chunks k (dim 2 of the others), from the first of the list
    on, which is there; ``backwards`` takes the chunks from the last one."""
    order = -1 if backwards else 1
    into, factors = new.unbind(2)[::order], through.unbind(2)[::order]
    for before, n, factor, after in zip(states[:-1], into, factors, states[1:], strict=True):
        torch.addcmul(n, before, factor, out=after)


def scaled_forward(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor, marks: Marks | None, to: Saved
) -> None:
    """Write what each step receives from the steps before it, and the states; ``state`` (g, b, n, h·p) enters."""
    b, c, _, g, h, p = x.shape
    u, grow = _factors(to.cum, x.dtype)
    xs = x * (grow * dt).unsqueeze(-1)
    Bm, Cm = _reached(B, C, marks)
    half = u[:, :, -1]
    step = half * torch.cat([half[:, 1:], torch.ones_like(half[:, :1])], 1)
    new = _chunk_states(Bm, xs).mul_(_wide(step, p))
    torch.mul(state, _wide(half[:, :1], p)[:, :, 0], out=to.states[:, :, 0])
    _carry([*to.states.unbind(2), to.end], new, _wide(_alive(step, marks), p))
    for i in range(g):
        y = _flat(to.past, i)
        torch.bmm(_scores(_flat(C, i), _flat(B, i), marks, to.scores[i]), _flat(xs, i), out=y)
        y.baddbmm_(_flat(Cm, i), to.states[i].view(b * c, -1, h * p))
    to.past.mul_(u.unsqueeze(-1))


def scaled_backward(
    dy: Tensor,
    dend: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    saved: Saved,
    marks: Marks | None,
    to: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes dx without the self term, dB and dC ``to`` tensors like x, B and C.

    → d(dt) without the self term and its way through dt·A, d(dt·A), d(state).
    """
    b, c, q, g, h, p = x.shape
    u, grow = _factors(saved.cum, x.dtype)
    v = grow * dt
    xs, dys = x * v.unsqueeze(-1), dy * u.unsqueeze(-1)
    Bm, Cm = _reached(B, C, marks)
    half = u[:, :, -1]
    step = half * torch.cat([torch.ones_like(half[:, :1]), half[:, :-1]], 1)
    into = _chunk_states(Cm, dys).mul_(_wide(step, p))
    dnew, dstate = torch.empty_like(into), torch.empty_like(dend)
    torch.mul(dend, _wide(half[:, -1:], p)[:, :, 0], out=dnew[:, :, -1])
    _carry([*dnew.unbind(2)[::-1], dstate], into, _wide(_alive(step, marks), p), backwards=True)
    dx, dB, dC = to
    for i in range(g):
        Ci, Bi, xi, di, dxi = (_flat(t, i) for t in (C, B, xs, dys, dx))
        scores = _seen(saved.scores[i].view(b * c, q, q), marks, -1)
        torch.bmm(scores.transpose(1, 2), di, out=dxi)
        dxi.baddbmm_(_flat(Bm, i), dnew[i].view(b * c, -1, h * p))
        dscores = _seen(torch.bmm(di, xi.transpose(1, 2), out=scores), marks)
        _products(dscores, di, xi, Bi, Ci, saved.states[i], dnew[i], marks, _flat(dB, i), _flat(dC, i))
    # step' is the factor between d(state) and what is carried back, so that the product is taken of what is at hand
    leaving = _leaving(
        torch.mul(dnew[:, :, :-1], saved.states[:, :, 1:], out=into[:, :, 1:]), dend, saved.end, h
    )
    leaving[:, :-1] /= step[:, 1:]
    r = _dot(dx, x, xs)
    dcum = _dot(dy, saved.past, xs) - r * v
    dcum[:, :, -1] += leaving
    dx.mul_(v.unsqueeze(-1))
    return r * grow, _log_decay_gradient(dcum), dstate


def exact_forward(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor, marks: Marks | None, to: Saved
) -> None:
    """As :func:`scaled_forward`, for any decay."""
    (b, c, q, g, h, p), cum = x.shape, to.cum
    xd = x * dt.unsqueeze(-1)
    Bm, Cm = _reached(B, C, marks)
    new = _chunk_states(Bm, xd * _exp(cum[:, :, -1:] - cum, x.dtype).unsqueeze(-1))
    to.states[:, :, 0] = state
    through = _alive(_exp(cum[:, :, -1], x.dtype), marks)
    _carry([*to.states.unbind(2), to.end], new, _wide(through, p))
    reach = _exp(cum, x.dtype).unsqueeze(-1)
    for i in range(g):
        scores = _scores(_flat(C, i), _flat(B, i), marks, to.scores[i])
        carried = torch.bmm(_flat(Cm, i), to.states[i].view(b * c, -1, h * p)).view(b, c, q, h, p)
        for k in range(h):
            seen = _decay_matrix(cum, i, k, x.dtype).mul_(scores)
            inside = torch.bmm(seen, xd[:, :, :, i, k].reshape(b * c, q, p)).view(b, c, q, p)
            torch.addcmul(inside, carried[:, :, :, k], reach[:, :, :, i, k], out=to.past[:, :, :, i, k])


def exact_backward(
    dy: Tensor,
    dend: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    saved: Saved,
    marks: Marks | None,
    to: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`scaled_backward`, for any decay."""
    (b, c, q, g, h, p), cum = x.shape, saved.cum
    late = _exp(cum[:, :, -1:] - cum, x.dtype).unsqueeze(-1)
    xd, dyu = x * dt.unsqueeze(-1), dy * _exp(cum, x.dtype).unsqueeze(-1)
    xw = xd * late
    Bm, Cm = _reached(B, C, marks)
    into = _chunk_states(Cm, dyu)
    dnew, dstate = torch.empty_like(into), torch.empty_like(dend)
    dnew[:, :, -1] = dend
    through = _alive(_exp(cum[:, :, -1], x.dtype), marks)
    _carry([*dnew.unbind(2)[::-1], dstate], into, _wide(through, p), backwards=True)
    dx, dB, dC = to
    for i in range(g):
        Ci, Bi = _flat(C, i), _flat(B, i)
        scores = _seen(saved.scores[i].view(b * c, q, q), marks, -1)
        dscores = torch.zeros_like(scores)
        carried = torch.bmm(_flat(Bm, i), dnew[i].view(b * c, -1, h * p)).view(b, c, q, h, p)
        for k in range(h):
            decay = _decay_matrix(cum, i, k, x.dtype)
            dyk = dy[:, :, :, i, k].reshape(b * c, q, p)
            dseen = torch.bmm(dyk, xd[:, :, :, i, k].reshape(b * c, q, p).transpose(1, 2))
            dscores.addcmul_(dseen, decay)
            inside = torch.bmm(decay.mul_(scores).transpose(1, 2), dyk).view(b, c, q, p)
            torch.addcmul(inside, carried[:, :, :, k], late[:, :, :, i, k], out=dx[:, :, :, i, k])
        dscores = _seen(dscores, marks)
        left = (saved.states[i], dnew[i], marks, _flat(dB, i), _flat(dC, i))
        _products(dscores, _flat(dyu, i), _flat(xw, i), Bi, Ci, *left)
    products = torch.mul(dnew[:, :, :-1], saved.states[:, :, 1:], out=into[:, :, 1:])
    r = _dot(dx, x, xw)
    dcum = _dot(dy, saved.past, xw) - r * dt
    dcum[:, :, -1] += _leaving(products, dend, saved.end, h)
    dx.mul_(dt.unsqueeze(-1))
    return r, _log_decay_gradient(dcum), dstate
