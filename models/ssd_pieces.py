"""How a batch goes through the state-space dual piece by piece: what is made on the way stays in the cache.

A piece is some chunks of a group of heads, s of each of r rows (:mod:`recur.models.ssd_kernels`). The pieces of the same
rows come one after the other, because a state goes from each to the next and its gradient comes back.

Outside, a state is (b, H, p, n) with H = g·h, as in the public implementations; :func:`by_group` and :func:`by_head`
go from one to the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from recur.models.ssd_kernels import (
    Factors,
    Marks,
    Saved,
    Sums,
    chunks_of,
    piece_backward,
    piece_forward,
)
from recur.models.tiles import Scratch, tile_rows, tiles

Pieces = Iterable[Iterable[Any]]
"""Tiles of rows, each of them as its pieces in the order of time."""


def piece_size(
    shape: tuple[int, ...], n: int, scaled: bool, device: torch.device, numbers: int
) -> tuple[int, int]:
    """Rows and chunks of x of ``shape`` (b, c, Q, g, h, p) to work on at a time, for n states. One chunk of as many rows, whose
    states are carried together, as make about ``numbers`` of the largest of inputs, states and decays; where rows are
    few, whole rows as :func:`tile_of_rows` has them, or chunks of one row: of one group, these follow each other in memory.
    """
    b, c, q, _, h, p = shape
    room = tile_rows(b * c, h * max(q * p, n * p, 0 if scaled else q * q), device, numbers)
    if 2 * b >= room:
        return -(-b // -(-b // room)), 1
    return (tile_of_rows(shape, scaled, device, numbers), c) if room >= c else (1, room)


def tile_of_rows(shape: tuple[int, ...], scaled: bool, device: torch.device, numbers: int) -> int:
    """Whole rows of x of ``shape`` (b, c, Q, g, h, p) to work on at a time where rows are few or there is more to do with
    them than the scan: about ``numbers`` numbers of a group, fewer in the exact form where a head's decays are wider than its inputs. Up
    to three times as much where that makes five rows: torch gives a second thread nothing to do below 32,769 numbers,
    which is five states of 64 by 128."""
    b, c, q, _, h, p = shape
    each = c * q * h * (p if scaled else max(p, q))
    rows, most = (tile_rows(b, each, device, n) for n in (numbers, 3 * numbers))
    return max(rows, min(most, 5))


def rooms(like: Tensor, shape: tuple[int, ...], n: int, exact: bool, size: tuple[int, int]) -> list[Saved]:
    """Room for the pieces of x of ``shape`` (b, c, Q, g, h, p), in the order in which they are worked on."""
    b, c, q, g, h, p = shape
    if size[0] > 1 and 1 < size[1] < c:
        raise ValueError(f"a piece is of one chunk, whole rows or one row, not {size} of {(b, c)}")
    of_rows, of_chunks = (
        [min(step, whole - at) for at in range(0, whole, step)]
        for whole, step in zip((b, c), size, strict=True)
    )
    each = [(r * s, q, h, p) for r in of_rows for s in of_chunks]
    return [Saved.room(like, piece, n, exact) for piece in g * each]


def by_group(state: Tensor, groups: int) -> Tensor:
    """State (b, H, p, n) as (g, b, n, h·p), contiguous."""
    return torch.unflatten(state, 1, (groups, -1)).flatten(2, 3).permute(1, 0, 3, 2).contiguous()


def by_head(state: Tensor, heads: int) -> Tensor:
    """The inverse for ``heads`` heads of each group: contiguous, memory of its own."""
    parts = torch.unflatten(state, -1, (heads, -1))
    return parts.permute(1, 0, 3, 4, 2).flatten(1, 2).clone(memory_format=torch.contiguous_format)


def _pieces(t: Tensor | None, size: tuple[int, int]) -> Pieces:
    """(b, c, …) in views (k, …); None: as many as there may be."""
    if t is None:
        return repeat(repeat(None))
    if t.shape[0] <= size[0] and t.shape[1] <= size[1]:
        return [[t.flatten(0, 1)]]
    if size[1] == 1:
        return [rows.unbind(1) for rows in torch.split(t, size[0])]
    return [
        [part.flatten(0, 1) for part in torch.split(rows, size[1], 1)] for rows in torch.split(t, size[0])
    ]


def _factors(f: Factors, i: int, size: tuple[int, int]) -> Pieces:
    """What pieces of group i need."""
    steps = (t[:, :, :, i] for t in f[:4])
    chunks = (None if t is None else t[:, :, i] for t in (f.through, None, f.lift, f.cum, f.fine))
    for rows in zip(*(_pieces(t, size) for t in (*steps, *chunks)), strict=False):
        yield map(Factors._make, zip(*rows, strict=False))


def chunk_marks(segment: Tensor, before: Tensor, dtype: torch.dtype) -> Marks:
    """``Marks`` from segment (k, Q) that counts beginnings, and (k,) what it was at the step before each chunk."""
    same = (segment.unsqueeze(2) == segment.unsqueeze(1)).tril()
    head, tail = segment == before.unsqueeze(1), segment == segment[:, -1:]
    each = (same, head.unsqueeze(2), tail.unsqueeze(2), head[:, -1:, None])
    return Marks(*(t.to(dtype) for t in each))


def _marks(segment: Tensor | None, chunk: int, size: tuple[int, int], dtype: torch.dtype) -> Pieces:
    """``Marks`` of pieces from segment (b, T), 0 up to the first beginning, T a multiple of ``chunk``."""
    if segment is None:
        return repeat(repeat(None))
    seg = torch.unflatten(segment, 1, (-1, chunk))
    before = torch.cat([torch.zeros_like(seg[:, :1, 0]), seg[:, :-1, -1]], 1)
    tiles_of_rows = zip(_pieces(seg, size), _pieces(before, size), strict=True)
    return [[chunk_marks(*piece, dtype) for piece in zip(*rows, strict=True)] for rows in tiles_of_rows]


def _rows(t: Tensor | None, i: int, k: slice) -> Tensor | None:
    """Rows k of group i of a state (g, b, n, h·p)."""
    return None if t is None else t[i, k]


def _enter(state: Tensor | None, edge: Tensor | None, to: Tensor) -> None:
    """Write the state (r, n, h·p) that comes first on the way, as its form scales it with edge (r, 1, h·p)."""
    if state is None:
        to.zero_()
    elif edge is None:
        to.copy_(state)
    else:
        torch.mul(state, edge, out=to)


def scan_forward(
    f: Factors,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    first: Tensor | None,
    segment: Tensor | None,
    size: tuple[int, int],
    to: tuple[Tensor, Tensor, Tensor, Tensor],
    saved: Iterator[Saved],
    scratch: Scratch,
) -> None:
    """Write y, y without self term and skip, C_i·B_i (b, c, Q, g, 1, 1) and the last state (g, b, n, h·p) ``to`` tensors,
    in pieces of ``size``, and what is ``saved`` of each to the next of its :func:`rooms`; ``first`` (g, b, n, h·p)
    enters, or zeros."""
    *outputs, end = to
    for i in range(x.shape[3]):
        whole = [t[:, :, :, i] for t in (x, dt.unsqueeze(-1), B, C, *outputs)]
        parts = [
            _factors(f, i, size),
            *(_pieces(t, size) for t in whole),
            _marks(segment, x.shape[2], size, x.dtype),
        ]
        for k, rows in zip(tiles(len(x), size[0]), zip(*parts, strict=False), strict=True):
            pieces = list(zip(*rows, strict=False))
            here, last = [next(saved) for _ in pieces], end[i, k]
            entering = [chunks_of(t.states, len(t.states) // len(last))[0] for t in here]
            _enter(_rows(first, i, k), None if f.edge is None else f.edge[k, 0, i], entering[0])
            for piece, *of_piece in zip(pieces, here, [*entering[1:], last], strict=True):
                piece_forward(*(*piece, D[i].unsqueeze(-1), *of_piece, scratch))


def scan_backward(
    f: Factors,
    dy: Tensor,
    dend: Tensor | None,
    x: Tensor,
    past: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor,
    saved: Iterator[Saved],
    end: Tensor,
    segment: Tensor | None,
    size: tuple[int, int],
    to: tuple[Tensor, ...],
    dfirst: Tensor | None,
    sums: Sums,
    scratch: Scratch,
) -> None:
    """Write dx, dB and dC ``to`` tensors like x, B and C, d(first) where there is room for it, and the sums; ``dend`` is
    the gradient of ``end``, the last state, None for zeros, ``skip`` is :func:`recur.models.ssd_kernels.direct`,
    ``saved`` what :func:`scan_forward` wrote."""
    for i in range(x.shape[3]):
        whole = [*(t[:, :, :, i] for t in (dy, x, past, B, C, skip, *to, *sums[:3])), sums.leaving[:, :, i]]
        parts = [
            _factors(f, i, size),
            *(_pieces(t, size) for t in whole),
            _marks(segment, x.shape[2], size, x.dtype),
        ]
        for k, rows in zip(tiles(len(x), size[0]), zip(*parts, strict=False), strict=True):
            pieces = list(zip(*rows, strict=False))
            here, last = [next(saved) for _ in pieces], end[i, k]
            s = [len(t.states) // len(last) for t in here]
            after = [*(chunks_of(t.states, n)[0] for t, n in zip(here[1:], s[1:], strict=True)), last]
            dafter = [scratch(f"dafter{at % 2}", t.states.shape) for at, t in enumerate(here)]
            *dleaving, dlast = (chunks_of(t, n)[-1] for t, n in zip(dafter, s, strict=True))
            _enter(_rows(dend, i, k), None if f.edge is None else f.edge[k, 0, i], dlast)
            dbefore = [_rows(dfirst, i, k), *dleaving]
            for piece, *of_piece in reversed(list(zip(pieces, here, after, dafter, dbefore, strict=True))):
                piece_backward(*(*piece, *of_piece, scratch))
