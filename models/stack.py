"""Layers of one kind on top of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from recur.models.interface import SequenceModel, State, Steps
from recur.models.steps import nothing, readable


class Stack(nn.Module):
    """``layers`` layers, the first from F inputs to D, dropout between them; itself a sequence model.

    State: each tensor of a layer's state, stacked in a second dimension, (B, layers, …).
    """

    def __init__(
        self, make: Callable[[int, int], nn.Module], d_in: int, d_out: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.d_in, self.d_out, self.layers = d_in, d_out, layers
        self.cells = nn.ModuleList(make(d_in if i == 0 else d_out, d_out) for i in range(layers))
        self.drop = nn.Dropout(dropout)

    def _cells(self) -> list[SequenceModel]:
        return [cast(SequenceModel, cell) for cell in self.cells]

    def init_state(self, batch: int) -> State:
        return _join([cell.init_state(batch) for cell in self._cells()])

    def forward(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]:
        if not u.shape[1]:
            return nothing(self, u, state)
        after = []
        for i, cell in enumerate(self._cells()):
            u, s = cell(self.drop(u) if i else u, None if state is None else _layer(state, i), steps)
            after.append(s)
        return u, _join(after)

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        u_t, after = readable(steps, u_t), []
        for i, cell in enumerate(self._cells()):
            u_t, s = cell.step(self.drop(u_t) if i else u_t, _layer(state, i), steps)
            after.append(s)
        return u_t, _join(after)


def _layer(state: State, i: int) -> State:
    return {k: v[:, i] for k, v in state.items()}


def _join(states: list[State]) -> State:
    return {k: torch.stack([s[k] for s in states], dim=1) for k in states[0]}
