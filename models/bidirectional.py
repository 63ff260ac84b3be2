"""Both directions over a text (Schuster & Paliwal 1997, IEEE Transactions on Signal Processing 45).

For sequences that are known whole before they are read. It has no ``step`` and no state on purpose: what reads the
future cannot be served bar by bar, and is refused where a causal model is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from recur.models.interface import SequenceModel, Steps
from recur.vocabulary import UsageError

Make = Callable[[int, int, int, float], SequenceModel]


class Bidirectional(nn.Module):
    """``layers`` layers, each of two models of half the width: u (B, T, F) → (B, T, D), past beside future.

    Each layer hears both halves of the one below. ``make(d_in, d_out, layers, dropout)`` is the class of any sequence
    model. UsageError for an odd width.
    """

    def __init__(self, make: Make, d_in: int, d_out: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if d_out % 2:
            raise UsageError(f"A bidirectional model needs an even width: got {d_out}.")
        self.d_in, self.d_out = d_in, d_out
        pairs = [[make(d_out if i else d_in, d_out // 2, 1, 0.0) for _ in range(2)] for i in range(layers)]
        self.onwards = nn.ModuleList(cast(nn.Module, pair[0]) for pair in pairs)
        self.backwards = nn.ModuleList(cast(nn.Module, pair[1]) for pair in pairs)
        self.drop = nn.Dropout(dropout)

    def forward(self, u: Tensor, steps: Steps | None = None) -> Tensor:
        """Outputs are 0 where a step is not valid, and no output depends on what stands there."""
        mirrored = None if steps is None else mirror(steps)
        for i, (ahead, back) in enumerate(zip(self.onwards, self.backwards, strict=True)):
            u = self.drop(u) if i else u
            past, _ = ahead(u, None, steps)
            future, _ = back(u.flip(1), None, mirrored)
            u = torch.cat([past, future.flip(1)], dim=-1)
        return u


def mirror(steps: Steps) -> Steps:
    """The marks of the same sequence read from its end.

    What began at a step ends there, so the reset moves to the step before; and the time since the bar before is now
    the time to the valid bar after.
    """
    valid, reset, elapsed = steps.valid, steps.reset, steps.elapsed
    if reset is not None:
        reset = torch.cat([reset[:, 1:], torch.zeros_like(reset[:, :1])], 1).flip(1)
    if elapsed is not None:
        here = torch.ones_like(elapsed, dtype=torch.bool) if valid is None else valid
        place = torch.arange(elapsed.shape[1], device=elapsed.device).expand_as(elapsed)
        last = elapsed.shape[1]
        following = torch.where(here, place, torch.full_like(place, last)).flip(1).cummin(1).values.flip(1)
        following = torch.cat([following[:, 1:], torch.full_like(following[:, :1], last)], 1)
        padded = torch.cat([elapsed, torch.ones_like(elapsed[:, :1])], 1)  # nothing comes after the last
        elapsed = padded.gather(1, following).flip(1)
    return Steps(None if valid is None else valid.flip(1), reset, elapsed)
