"""Keep freed memory in the process: two ``mallopt`` calls of glibc, for training on a CPU.

glibc hands every block above its map threshold (at most 32 MiB by default) straight back to the kernel when it is
freed. A training step that allocates larger tensors then pays page faults for the same memory again and again,
which caps element-wise operations at a fraction of the memory's speed. Raising the two thresholds (``mallopt(3)``:
``M_TRIM_THRESHOLD``, ``M_MMAP_THRESHOLD``) keeps the pages.

The price: memory that was freed stays with the process, so its resident size is the peak of the run and falls only
when the process ends. So the training code calls this once; serving and data code does not.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAP_ABOVE, _TRIM_ABOVE = 1 << 30, (1 << 31) - 1


@cache
def keep_freed_memory() -> bool:
    """Raise both thresholds once per process; False, and nothing done, where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAP_ABOVE)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_ABOVE))
