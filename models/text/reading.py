"""LSTM layers read a batch without gradients: the sums of :mod:`recur.models.text.recurrence`, arranged for one core.

* A vector that stands in many places (the embedding of a frequent word) goes through the first layer's input weights once.
* Rows that have ended take no part: at step t the first n_t rows are read, the longest row being the first.
* tanh(x) = 2 σ(2x) − 1, so that all four gates of a step are one call of σ, which processors have in faster code.

None of this depends on the other rows of a batch: a text reads the same alone and among others, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from recur.models.interface import State


def read_layers(
    cells: Sequence[nn.LSTM], distinct: Tensor, index: Tensor, lengths: Tensor, state: State
) -> tuple[Tensor, State]:
    """The outputs (B, T, D) of ``cells`` on top of each other for the inputs ``distinct[index]``, and the state after.

    ``distinct`` (U, d_in), ``index`` (B, T), ``lengths`` (B,) longest first and none zero, ``state`` as the recurrence
    names it. Outputs are zero after the end of a row; its state is that after its last token.
    """
    rows, breadth = index.shape
    there = (
        torch.arange(breadth)[:, None] < lengths
    ).flatten()  # in order of time, the rows of a step together
    sizes = torch.bincount(lengths - 1, minlength=breadth).flip(0).cumsum(0).flip(0)
    ends = [0, *sizes.cumsum(0).tolist()]
    last = torch.tensor(ends)[lengths - 1] + torch.arange(rows)
    place, x = index.T.flatten()[there], distinct
    after: State = {}
    for k, cell in enumerate(cells):
        w, u, b = _scaled(cell)
        gates = torch.addmm(b, x, w.T)
        gates = gates.index_select(0, place) if k == 0 else gates
        x, c = _sweep(gates, u.T, ends, state[f"h.{k}"], state[f"c.{k}"])
        after |= {f"h.{k}": x[last], f"c.{k}": c}
    y = x.new_zeros(breadth * rows, x.shape[1])
    y[there] = x
    return y.view(breadth, rows, -1).transpose(0, 1), after


def _scaled(cell: nn.LSTM) -> tuple[Tensor, Tensor, Tensor]:
    """W, U and the sum of the biases, with the rows of the gate g, which goes through tanh, doubled."""
    w, u, b, c = (getattr(cell, f"{n}_l0") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    n = cell.hidden_size
    scale = torch.ones(4 * n, 1)
    scale[2 * n : 3 * n] = 2
    return w * scale, u * scale, (b + c) * scale[:, 0]


def _sweep(gates: Tensor, u: Tensor, ends: Sequence[int], h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """gates (N, 4D), overwritten, with the rows of step t at ``ends[t]`` to ``ends[t + 1]`` → h (N, D), c (B, D)."""
    n = h.shape[1]
    y, c = gates.new_empty(len(gates), n), c.clone()
    for begin, end in pairwise(ends):
        rows = end - begin
        four, now = gates[begin:end].addmm_(h[:rows], u).sigmoid_(), c[:rows]
        i, f, g, o = four.view(rows, 4, n).unbind(1)
        now.mul_(f).addcmul_(i, g, value=2).sub_(i)
        h = torch.mul(now, 2, out=y[begin:end]).sigmoid_().mul_(2).sub_(1).mul_(o)
    return y, c
