"""Independent tiles of a batch, worked on one after the other: only one needs memory for what lies between the ends."""

from __future__ import annotations

import torch

ON_A_GPU = 256
"""How many times as much a tile holds there: no cache to stay in, but memory to be bounded."""


def tile_rows(batch: int, each: int, device: torch.device, numbers: int) -> int:
    """Rows per tile: about ``numbers`` in sum on a CPU where a row has ``each``."""
    room = numbers if device.type == "cpu" else ON_A_GPU * numbers
    return max(1, min(batch, room // max(each, 1)))


def tiles(batch: int, rows: int) -> list[slice]:
    return [slice(r, r + rows) for r in range(0, batch, rows)]
