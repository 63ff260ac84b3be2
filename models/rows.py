"""A batch with resets and missing steps as a larger batch without: each unbroken stretch becomes a row of its own.

Kernels such as cuDNN's and oneDNN's know no marks. So every series is cut where a new sequence begins, the valid steps
of each piece are moved together to the left, and after the kernel the outputs go back to where they came from. What a
kernel computes beyond the length of a row is thrown away.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recur.models.interface import State, Steps


@dataclass(frozen=True, slots=True)
class Rows:
    """``u`` (R, L, F) and ``elapsed`` (R, L) of R ≥ B rows of ``lengths`` (R,) steps."""

    u: Tensor
    elapsed: Tensor | None
    lengths: Tensor
    series: Tensor
    """(R,) which of the B series a row is a piece of."""
    fresh: Tensor
    """(R,) whether it begins with a reset."""
    last: Tensor
    """(B,) the row in which each series ends."""
    valid: Tensor
    """(B, T)"""
    where: tuple[Tensor, Tensor]
    """Row and column of every valid step, in the order in which ``valid`` selects them."""

    def begin(self, state: State, fresh: State) -> State:
        """State before each row, of the state before each series."""
        out = {}
        for k, v in state.items():
            mark = self.fresh.view(-1, *(1,) * (v.ndim - 1))
            out[k] = torch.where(mark, fresh[k][self.series], v[self.series])
        return out

    def spread(self, y: Tensor) -> Tensor:
        """Outputs of the rows (R, L, D) at their places (B, T, D), 0 where a step is not valid."""
        out = y.new_zeros(*self.valid.shape, y.shape[-1])
        return out.index_put(tuple(self.valid.nonzero().T), y[self.where])

    def end(self, state: State) -> State:
        """State after each series, of the state after each row."""
        return {k: v[self.last] for k, v in state.items()}


def has_marks(steps: Steps | None) -> bool:
    """Whether anything interrupts the sequences."""
    if steps is None:
        return False
    gaps = steps.valid is not None and not bool(steps.valid.all())
    return gaps or (steps.reset is not None and bool(steps.reset.any()))


def cut(u: Tensor, steps: Steps) -> Rows:
    """u (B, T, F) and its marks as rows."""
    batch, length = u.shape[:2]
    nothing = torch.zeros(batch, length, dtype=torch.bool, device=u.device)
    valid = ~nothing if steps.valid is None else steps.valid
    reset = nothing if steps.reset is None else steps.reset
    pieces = reset.sum(1) + 1  # (B,)
    last = pieces.cumsum(0) - 1
    row = (last - pieces + 1)[:, None] + reset.cumsum(1)  # (B, T)
    n_rows = int(last[-1]) + 1
    at_row = row[valid]  # valid steps in order: series by series, forwards in time
    lengths = torch.bincount(at_row, minlength=n_rows)
    column = torch.arange(len(at_row), device=u.device) - (lengths.cumsum(0) - lengths)[at_row]
    longest = max(1, int(lengths.max()))
    where = (at_row, column)
    elapsed = None
    if steps.elapsed is not None:
        elapsed = steps.elapsed.new_ones(n_rows, longest).index_put(where, steps.elapsed[valid])
    series = torch.repeat_interleave(torch.arange(batch, device=u.device), pieces)
    fresh = torch.ones(n_rows, dtype=torch.bool, device=u.device)
    fresh[last - pieces + 1] = False
    packed = u.new_zeros(n_rows, longest, u.shape[-1]).index_put(where, u[valid])
    return Rows(packed, elapsed, lengths, series, fresh, last, valid, where)


def after(h: Tensor, h0: Tensor, lengths: Tensor | None) -> Tensor:
    """h (R, L, D) and the state before, h0 (R, D) → the state after ``lengths`` (R,) steps, all where None."""
    if lengths is None:
        return h[:, -1]
    found = h[torch.arange(h.shape[0], device=h.device), (lengths - 1).clamp(min=0)]
    return torch.where(lengths[:, None] > 0, found, h0)


class RowLayer(nn.Module):
    """A layer whose kernel knows no marks; :meth:`forward` brings them to it."""

    @abstractmethod
    def init_state(self, batch: int) -> State: ...

    @abstractmethod
    def kernel(
        self, u: Tensor, state: State, elapsed: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        """u (R, L, F), elapsed (R, L) → y (R, L, D) and the state after ``lengths`` steps of each row."""

    def forward(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]:
        fresh = self.init_state(u.shape[0])
        state = fresh if state is None else state
        if steps is None or not has_marks(steps):
            return self.kernel(u, state, None if steps is None else steps.elapsed, None)
        rows = cut(u, steps)
        y, end = self.kernel(rows.u, rows.begin(state, fresh), rows.elapsed, rows.lengths)
        return rows.spread(y), rows.end(end)
