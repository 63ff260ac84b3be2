"""The interface of every sequence model: a recurrent dynamical system x' = f(x, u, W).

Notation: B batch, T time, F inputs, D outputs. The same object runs over a whole sequence (training) and one step
per bar (production); the two must agree, and the parity tests hold every model to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

State = dict[str, Tensor]
"""Named tensors whose first dimension is the batch: they can be saved, split by series, and restored."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What is known about the steps beside their inputs; each tensor is (B, T) for a sequence, (B,) for one step.

    ``valid``    False: padding or a missing bar. The state passes unchanged and the output of the step is 0.
    ``reset``    True: a new sequence begins here; the state is put back to ``init_state`` before the step.
    ``elapsed``  time since the previous valid step in bars (1 where None); only continuous-time models read it.
    """

    valid: Tensor | None = None
    reset: Tensor | None = None
    elapsed: Tensor | None = None

    def at(self, t: int) -> Steps:
        """The (B,) slice of step ``t``."""
        parts = (None if x is None else x[:, t] for x in (self.valid, self.reset, self.elapsed))
        return Steps(*parts)

    def slice(self, since: int, until: int) -> Steps:
        """The (B, until − since) part of a sequence's marks."""
        parts = (None if x is None else x[:, since:until] for x in (self.valid, self.reset, self.elapsed))
        return Steps(*parts)


@runtime_checkable
class SequenceModel(Protocol):
    """A recurrence that is run in parallel over time or step by step."""

    d_in: int
    d_out: int

    def init_state(self, batch: int) -> State:
        """State before the first bar: tensors (B, …)."""
        ...

    def forward(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]:
        """u (B, T, F) → y (B, T, D) and the state after the last step; ``None`` starts afresh."""
        ...

    def step(self, u_t: Tensor, state: State, steps: Steps | None = None) -> tuple[Tensor, State]:
        """u_t (B, F) → y_t (B, D) and the next state, in time and memory that do not grow with history."""
        ...

    def __call__(
        self, u: Tensor, state: State | None = None, steps: Steps | None = None
    ) -> tuple[Tensor, State]: ...
