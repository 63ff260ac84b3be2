"""Resets, padding and missing bars, the same for every model that runs step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from recur.models.interface import SequenceModel, State, Steps


def _like(mark: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, …) with as many dimensions as ``x``."""
    return mark.view(-1, *(1,) * (x.ndim - 1))


def restart(steps: Steps | None, state: State, fresh: State) -> State:
    """``fresh`` where a new sequence begins, ``state`` elsewhere."""
    if steps is None or steps.reset is None:
        return state
    return {k: torch.where(_like(steps.reset, v), fresh[k], v) for k, v in state.items()}


def keep_invalid(steps: Steps | None, y: Tensor, state: State, before: State) -> tuple[Tensor, State]:
    """Output 0 and the state of before where the step is not valid."""
    if steps is None or steps.valid is None:
        return y, state
    y = torch.where(_like(steps.valid, y), y, torch.zeros_like(y))
    return y, {k: torch.where(_like(steps.valid, v), v, before[k]) for k, v in state.items()}


def readable(steps: Steps | None, u: Tensor) -> Tensor:
    """u (B, …, F) with zeros where a step is not valid: what stands there may be anything, NaN too, and 0 · NaN in a
    gradient is NaN."""
    if steps is None or steps.valid is None:
        return u
    return torch.where(steps.valid.unsqueeze(-1), u, torch.zeros_like(u))


def nothing(model: SequenceModel, u: Tensor, state: State | None) -> tuple[Tensor, State]:
    """What a sequence without a step gives: u (B, 0, F) → y (B, 0, D), and the state as it was."""
    return u.new_zeros(u.shape[0], 0, model.d_out), model.init_state(u.shape[0]) if state is None else state


def scan_steps(
    model: SequenceModel, u: Tensor, state: State | None, steps: Steps | None
) -> tuple[Tensor, State]:
    """Run ``model`` one step after the other: u (B, T, F) → y (B, T, D) and the last state."""
    if not u.shape[1]:
        return nothing(model, u, state)
    state = model.init_state(u.shape[0]) if state is None else state
    out = []
    for t, u_t in enumerate(readable(steps, u).unbind(1)):
        y, state = model.step(u_t, state, None if steps is None else steps.at(t))
        out.append(y)
    return torch.stack(out, dim=1), state
