"""Independent tiles of a batch on the threads of a CPU, a whole tile each.

An operation on a tile that stays in the cache takes some tens of microseconds. Split among threads, each such operation
ends at a barrier, where a thread that other work on the machine holds up keeps all of them waiting, and what Python does
between two operations is done by one thread while the others wait. Here a thread takes tiles of its own and computes on
them alone; torch lets go of the interpreter's lock inside its operations.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, reduce
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """A pool all of whose threads compute alone; the number that others compute with is left as it was."""
    pool, all_there = ThreadPoolExecutor(threads, "tiles"), Barrier(threads)

    def begin(_: int) -> None:
        torch.set_num_threads(1)  # of this thread, and of all that ask for the first time from now on,
        torch.get_num_threads()  # as this one does here, before the number is set back
        all_there.wait()

    list(pool.map(begin, range(threads)))
    torch.set_num_threads(threads)
    return pool


os.register_at_fork(after_in_child=_workers.cache_clear)  # a child has no threads but the one that forked


def tile_rows(batch: int, length: int, device: torch.device, steps: int, threads: int = 1) -> int:
    """Rows per tile: about ``steps`` steps (rows times time) on a CPU, and a tile for each of ``threads``; else all."""
    if device.type != "cpu":
        return batch
    return max(1, min(steps // max(length, 1), -(-batch // threads)))


def tiles(batch: int, rows: int) -> list[slice]:
    return [slice(r, r + rows) for r in range(0, batch, rows)]


def each_tile(work: Callable[[slice], T], parts: list[slice]) -> list[T]:
    """``work`` of every part of the batch, without gradients, in order of the parts."""
    threads = torch.get_num_threads()

    def alone(part: slice) -> T:
        with torch.no_grad():
            return work(part)

    if threads == 1 or len(parts) == 1 or torch.compiler.is_compiling():
        return [alone(part) for part in parts]
    return list(_workers(threads).map(alone, parts))


def totals(parts: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Sums over tiles of what each tile gives, in order of the tiles, whichever is ready first."""
    return [reduce(torch.add, part) for part in zip(*parts, strict=True)]
