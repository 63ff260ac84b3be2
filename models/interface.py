"""The interface of every sequence model: a recurrent dynamical system x' = f(x, u, W).

Notation: B batch, T time, F inputs, D outputs. The same object runs over a whole sequence (training) and one step
per bar (production); the two must agree, and the parity tests hold every model to it.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

State = dict[str, Tensor]
"""Named tensors whose first dimension is the batch: they can be saved, split by series, and restored."""


@runtime_checkable
class SequenceModel(Protocol):
    """A recurrence that is run in parallel over time or step by step."""

    d_in: int
    d_out: int

    def init_state(self, batch: int) -> State:
        """State before the first bar: tensors (B, …)."""
        ...

    def forward(self, u: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """u (B, T, F) → y (B, T, D) and the state after the last step; ``None`` starts afresh."""
        ...

    def step(self, u_t: Tensor, state: State) -> tuple[Tensor, State]:
        """u_t (B, F) → y_t (B, D) and the next state, in time and memory that do not grow with history."""
        ...

    def __call__(self, u: Tensor, state: State | None = None) -> tuple[Tensor, State]: ...
