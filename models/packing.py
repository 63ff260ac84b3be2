"""Steps that are not valid, and sequences that begin inside a row, as mixers of a stack want them.

A missing or padded step must leave no trace: neither in a state, nor in a convolution's window, nor among the keys of
an attention layer. So the valid steps of each row are moved to its front, in order; then only padding on the right is
left, and the outputs are moved back. Everything in a stack but its mixers works on single steps and does not notice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recur.models.interface import Steps


@dataclass(frozen=True, slots=True)
class Packed:
    """``order`` (B, T): where each packed step comes from; ``lengths`` (B,): valid steps; ``segment`` (B, T): how many
    sequences have begun since the row's start, in its last column also by steps that are not valid. None: none."""

    order: Tensor | None = None
    lengths: Tensor | None = None
    segment: Tensor | None = None

    def _live(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, 1): whether a packed step of x (B, T, F) is a valid one."""
        return (torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)).unsqueeze(-1)

    def gather(self, u: Tensor) -> Tensor:
        """(B, T, F): valid steps first, then 0: what stands at the others may be anything, NaN too."""
        if self.order is None or self.lengths is None:
            return u
        packed = u.gather(1, self.order.unsqueeze(-1).expand_as(u))
        return torch.where(self._live(u, self.lengths), packed, torch.zeros_like(packed))

    def scatter(self, y: Tensor) -> Tensor:
        """The inverse, with 0 at the steps that are not valid."""
        if self.order is None or self.lengths is None:
            return y
        live = self._live(y, self.lengths)
        return torch.zeros_like(y).scatter(1, self.order.unsqueeze(-1).expand_as(y), y * live)


def pack(steps: Steps | None) -> Packed:
    """Resets and valid marks as :class:`Packed`; marks that mark nothing cost nothing further."""
    valid = None if steps is None or steps.valid is None or bool(steps.valid.all()) else steps.valid
    reset = None if steps is None or steps.reset is None or not bool(steps.reset.any()) else steps.reset
    segment = None if reset is None else reset.long().cumsum(1)
    if valid is None:
        return Packed(segment=segment)
    order = valid.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    lengths = valid.sum(1)
    if segment is not None:
        live = torch.arange(valid.shape[1], device=valid.device) < lengths.unsqueeze(1)
        segment = torch.where(live, segment.gather(1, order), segment[:, -1:])
    return Packed(order, lengths, segment)
