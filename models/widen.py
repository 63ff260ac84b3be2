"""More inputs without another start: a network with further inputs that begins as the one without them.

Whoever compares a model with and without some of its inputs compares two random starts as well, since the weights are
drawn in an order that the number of inputs shifts. Here the wider network takes every weight of the narrower one, and
the weights of the new inputs begin at zero: before the first step both compute the same, and the gradient of the new
weights is not zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def begin_as(wide: nn.Module, narrow: nn.Module, at: int, extra: int) -> bool:
    """Give ``wide`` the weights of ``narrow``; its inputs ``at`` to ``at + extra`` are those that ``narrow`` lacks.

    Returns False, and changes nothing, when the two differ in more than the size of weights along their inputs.
    """
    theirs, mine = narrow.state_dict(), wide.state_dict()
    if theirs.keys() != mine.keys():
        return False
    found = {name: _spread(theirs[name], value, at, extra) for name, value in mine.items()}
    if any(value is None for value in found.values()):
        return False
    wide.load_state_dict(found)
    return True


def _spread(narrow: Tensor, wide: Tensor, at: int, extra: int) -> Tensor | None:
    """``narrow`` with ``extra`` zeros from place ``at`` on along the one dimension in which ``wide`` is longer."""
    if narrow.shape == wide.shape:
        return narrow
    if narrow.ndim != wide.ndim:
        return None
    longer = [k for k, (n, w) in enumerate(zip(narrow.shape, wide.shape, strict=True)) if n != w]
    (dim,) = longer if len(longer) == 1 else (-1,)
    if dim < 0 or wide.shape[dim] - narrow.shape[dim] != extra or narrow.shape[dim] < at:
        return None
    out = torch.zeros_like(wide)
    for source, place in (
        (range(at), range(at)),
        (range(at, narrow.shape[dim]), range(at + extra, wide.shape[dim])),
    ):
        index = torch.tensor(list(place), dtype=torch.long, device=wide.device)
        out.index_copy_(dim, index, narrow.narrow(dim, source.start, len(source)))
    return out
