"""The state-space dual of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060, eq. 1-2 and section 6), chunked.

    S_t = e^(dt_t A) S_{t−1} + dt_t B_t x_tᵀ,     y_t = C_tᵀ S_t + D x_t        per head, S (N, P), A < 0 a scalar

Within chunks of Q steps the recurrence is a handful of matrix products; between chunks the state is carried. Two
forms give the same numbers (:mod:`recur.models.ssd_kernels`): the exact one takes any decay and has finite gradients
under the strongest; the scaled one is faster and is taken on a CPU where no chunk's sum of |dt·A| reaches
``SCALED_BELOW``, with shorter chunks where those are needed for it. On a CPU the batch is worked through in pieces
that fit the cache.

A step with dt = 0 leaves the state as it is. ``segment`` (B, T) counts the sequences that begin inside a row (0 up
to the first beginning): where it rises the state is put back to zero before the step.

State layout: (B, H, P, N) for H heads of P channels and N states; of G groups of B and C, head h reads group h // (H/G).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recur.models.ssd_kernels import Factors, Saved, Sums, back, direct, factors, finish
from recur.models.ssd_pieces import by_group, by_head, piece_size, rooms, scan_backward, scan_forward
from recur.models.tiles import Scratch

CHUNK = 64
"""Longest chunk: half as many states to write and read as with 32 outweigh the longer products within chunks."""
SCALED_BELOW = 80.0
"""Largest Σ|dt·A| of a chunk for the scaled form: its factors stay within e^±40."""
PIECE = 1 << 18
"""Numbers of a piece, see ``piece_size``: on a CPU what is made on the way is still in the cache when it is needed."""


def fitting(dt: Tensor, A: Tensor, chunk: int) -> tuple[int, bool]:
    """Steps per chunk for dt (b, T, H), T a multiple of ``chunk``, and whether the scaled form is taken: the longest of
    ``chunk``, its half and its quarter, 16 at least, for which it holds; where none does, the half, because the exact form
    works on every pair of steps of a chunk for each head. On other devices than a CPU the exact form of ``chunk``."""
    if dt.device.type != "cpu":
        return chunk, False
    logs = dt.detach() * A.detach()
    lengths = [n for n in (chunk, chunk // 2, chunk // 4) if n >= 16 and chunk % n == 0] or [chunk]
    for n in lengths:
        if bool((torch.unflatten(logs, 1, (-1, n)).sum(2) > -SCALED_BELOW).all()):
            return n, True
    return lengths[:2][-1], False


def cumulate(dt: Tensor, A: Tensor) -> Tensor:
    """Sums of dt·A within chunks in float64, dt (b, c, Q, g, h)."""
    return (dt * A.view(dt.shape[3:])).cumsum(2, dtype=torch.float64)


def for_later(f: Factors, saved: list[Saved]) -> tuple[Tensor | None, ...]:
    """What the backward pass needs of factors and pieces, as a flat tuple for autograd to keep."""
    return (*f._replace(cum=None, fine=None), *chain.from_iterable(saved))


def from_earlier(kept: Sequence[Any], p: int) -> tuple[Factors, Iterator[Saved]]:
    """The factors of the way back and the pieces, of ``for_later`` for heads of p channels."""
    n, each = len(Factors._fields), len(Saved._fields)
    return back(Factors(*kept[:n]), p), (Saved(*kept[i : i + each]) for i in range(n, len(kept), each))


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        state: Tensor | None,
        segment: Tensor | None,
        scaled: bool,
    ) -> tuple[Tensor, Tensor]:
        b, _, _, g, h, p = x.shape
        f = factors(cumulate(dt, A), dt, p, scaled)
        y, past = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
        own, end = x.new_empty(*x.shape[:4], 1, 1), x.new_empty(g, b, B.shape[-1], h * p)
        first = None if state is None else by_group(state, g)
        size = piece_size(x.shape, B.shape[-1], scaled, x.device, PIECE)
        saved = rooms(x, x.shape, B.shape[-1], not scaled, size)
        to = (y, past, own, end)
        scan_forward(f, x, dt, B, C, D, first, segment, size, to, iter(saved), Scratch(x))
        ctx.save_for_backward(x, dt, A, B, C, D, segment, past, own, end, *for_later(f, saved))
        ctx.size = size
        ctx.set_materialize_grads(False)
        return y, by_head(end, h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dend: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, segment, past, own, end, *rest = ctx.saved_tensors
        f, saved = from_earlier(rest, x.shape[5])
        sums, skip = Sums.room(x), direct(own, dt.unsqueeze(-1), D.unsqueeze(-1))
        to = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C))
        dfirst = torch.empty_like(end) if ctx.needs_input_grad[6] else None  # the state
        dy = torch.zeros_like(x) if dy is None else dy
        after = None if dend is None else by_group(dend, x.shape[3])
        scan_backward(
            f, dy, after, x, past, B, C, skip, saved, end, segment, ctx.size, to, dfirst, sums, Scratch(x)
        )
        ddt, dA, dD = finish(sums, f, own, dt, A)
        dstate = None if dfirst is None else by_head(dfirst, x.shape[4])
        return to[0], ddt, dA.view_as(A), *to[1:], dD, dstate, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _untraced(*args: Any) -> tuple[Tensor, Tensor]:
    """To a compiler the scan is one call: traced, it would break up at products that are written to their place."""
    out: tuple[Tensor, Tensor] = _SSD.apply(*args)  # type: ignore[no-untyped-call]
    return out


def chunk_length(length: int, longest: int) -> int:
    """Steps of equal chunks, ``longest`` at most: where there are several, of a multiple of 8 if ``longest`` is one."""
    if length <= longest:
        return max(1, length)
    chunks = -(-length // longest)
    return min(longest, -(-length // chunks // 8) * 8)


def pad_right(t: Tensor, multiple: int) -> Tensor:
    """Zeros behind dim 1 up to the next multiple; batch and time of the result collapse into one dimension."""
    short = -t.shape[1] % multiple
    if short:
        return torch.cat([t, t.new_zeros(t.shape[0], short, *t.shape[2:])], 1)
    return t if t.stride(0) == t.shape[1] * t.stride(1) and t[0, 0].is_contiguous() else t.contiguous()


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    segment: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The recurrence above over a sequence of any length, differentiable in every tensor but ``segment``.

    x (B, T, H, P); dt (B, T, H), ≥ 0; A (H,), < 0; B, C (B, T, G, N); D (H,) or None; state (B, H, P, N) or None
    for zeros → y (B, T, H, P) and the state after the last step. Half types are computed in float32.
    """
    kind = x.dtype
    wide = torch.float32 if kind in (torch.float16, torch.bfloat16) else kind
    x, dt, A, B, C = (t.to(wide) for t in (x, dt, A, B, C))
    b, length, h, p = x.shape
    g = B.shape[2]
    skip = x.new_zeros(h) if D is None else D.to(wide)
    q = chunk_length(length, chunk)
    if segment is not None and length % q:
        segment = torch.cat([segment, segment[:, -1:].expand(b, -length % q)], 1)
    padded = [pad_right(t, q) for t in (x, dt, B, C)]
    q, scaled = fitting(padded[1], A, q)
    parts = [torch.unflatten(t, 1, (-1, q)) for t in padded]
    with torch.autocast(x.device.type, enabled=False):
        y, end = _untraced(
            torch.unflatten(parts[0], 3, (g, -1)),
            torch.unflatten(parts[1], 3, (g, -1)),
            A,
            parts[2],
            parts[3],
            skip.view(g, -1),
            None if state is None else state.to(wide),
            segment,
            scaled,
        )
    return y.view(b, -1, h, p)[:, :length].to(kind), end


STEP_ROWS = 64
"""Rows of the batch that a step works through at a time on a CPU, so that a state is read and written once."""


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step: x (b, H, P), dt (b, H), B, C (b, G, N), state (b, H, P, N) → y (b, H, P), next state.

    The output is taken from the state before the step, y = e^(dt A) C·S + (C·B) dt x + D x: nothing has to wait for
    the next state, and a compiler makes one pass over memory of both. ``inplace`` writes the next state over
    ``state``; without gradients only.
    """
    b, h, p = x.shape
    g, n = B.shape[1:]
    heads = (b, g, h // g)
    inplace = inplace and not torch.is_grad_enabled()
    decay, into = (dt * A).exp().view(*heads, 1), (x * dt.unsqueeze(-1)).view(*heads, p)
    if torch.compiler.is_compiling():
        before, Bs, Cs = state.view(*heads, p, n), B.view(b, g, 1, 1, n), C.view(b, g, 1, 1, n)
        seen = (before * Cs).sum(-1)
        after = before * decay.unsqueeze(-1) + into.unsqueeze(-1) * Bs
        if inplace:
            before.copy_(after)
    else:
        wide = h // g * p
        flat = (b * g, wide, 1)
        seen, after = _steprows_of(
            decay.expand_as(into).reshape(flat),
            into.reshape(flat),
            B.reshape(b * g, 1, n),
            C.reshape(b * g, 1, n),
            state.reshape(b * g, wide, n),
            inplace,
        )
        if inplace and after.data_ptr() != state.data_ptr():  # strides that no view could keep
            state.copy_(after.view(state.shape))
    own = torch.addcmul(D.view(g, -1), (B * C).sum(-1, keepdim=True), dt.view(heads)).unsqueeze(-1)
    y = torch.addcmul(own * x.view(*heads, p), seen.view(*heads, p), decay)
    return y.view(x.shape), state if inplace else after.view(state.shape)


def _steprows_of(
    decay: Tensor, into: Tensor, B: Tensor, C: Tensor, state: Tensor, inplace: bool
) -> tuple[Tensor, Tensor]:
    """C·S (R, 1, W) and the next state, of decay, into (R, W, 1), B, C (R, 1, N) and state (R, W, N)."""
    if len(state) <= STEP_ROWS or state.device.type != "cpu" or torch.is_grad_enabled():
        seen = torch.bmm(C, state.transpose(1, 2))  # a row times a matrix: a column takes three times as long
        return seen, (state.mul_(decay) if inplace else state * decay).addcmul_(into, B)
    seen, after = (
        state.new_empty(len(state), 1, state.shape[1]),
        state if inplace else torch.empty_like(state),
    )
    parts = (torch.split(t, STEP_ROWS) for t in (decay, into, B, C, state, after, seen))
    for factor, x_t, b_t, c_t, old, new, out in zip(*parts, strict=True):
        torch.bmm(c_t, old.transpose(1, 2), out=out)
        torch.mul(old, factor, out=new).addcmul_(x_t, b_t)
    return seen, after
