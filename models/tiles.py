"""Independent tiles of a batch, worked on one after the other: only one needs memory for what lies between the ends."""

from __future__ import annotations

import torch
from torch import Tensor

ON_A_GPU = 256
"""How many times as much a tile holds on a GPU: no cache to stay in, but memory to be bounded."""


def tile_rows(batch: int, each: int, device: torch.device, numbers: int) -> int:
    """Rows per tile, each of them of ``each`` numbers: about ``numbers`` in sum, ``ON_A_GPU`` times as many there."""
    room = numbers if device.type == "cpu" else ON_A_GPU * numbers
    return max(1, min(batch, room // max(each, 1)))


def tiles(batch: int, rows: int) -> list[slice]:
    return [slice(r, r + rows) for r in range(0, batch, rows)]


class Scratch:
    """Memory that is used again from tile to tile. An allocator may hand out other memory each time, which is not in
    the cache: the same multiplication then takes up to four times as long."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._memory: dict[tuple[str, int], Tensor] = {}
        self._views: dict[tuple[str, torch.Size], Tensor] = {}

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        """Contiguous memory of that name and size in that shape, with whatever was written there last."""
        view = self._views.get((name, shape))
        if view is None:
            kept = self._memory.get((name, shape.numel()))
            view = self._like.new_empty(shape) if kept is None else kept.view(shape)
            self._memory.setdefault((name, shape.numel()), view)
            self._views[name, shape] = view
        return view
