"""Independent tiles of a batch, worked on one after the other: only one needs memory for what lies between the ends."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def tile_rows(batch: int, length: int, device: torch.device, steps: int) -> int:
    """Rows per tile: about ``steps`` steps (rows times time) on a CPU, else all."""
    return batch if device.type != "cpu" else max(1, min(batch, steps // max(length, 1)))


def tiles(batch: int, rows: int) -> list[slice]:
    return [slice(r, r + rows) for r in range(0, batch, rows)]


def totals(parts: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Sums over tiles of what each tile gives."""
    return [reduce(torch.add, part) for part in zip(*parts, strict=True)]
