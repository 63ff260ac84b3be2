"""``recur doctor``: is everything here that is needed, and does it work?"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from recur.storage.store import Store
from recur.vocabulary import RecurError

PACKAGES = ("torch", "lightning", "polars", "duckdb", "pyarrow", "pybit", "numpy", "scipy", "safetensors")
Check = tuple[str, bool, str]
"""Name, whether it passed, and what was found."""


def checks(home: Path, store: Store, base_url: str, *, offline: bool) -> list[Check]:
    """Versions, GPU, disk, store and, unless ``offline``, the venue and its clock."""
    found: list[Check] = [("recur", True, f"{version_of('recur')}, Python {sys.version.split()[0]}")]
    for package in PACKAGES:
        version = version_of(package)
        found.append((package, version != "not installed", version))
    found += [check("gpu", gpu), check("disk", lambda: disk(home)), check("store", lambda: stored(store))]
    if not offline:
        found.append(check("venue", lambda: venue(base_url)))
    return found


def version_of(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def check(name: str, look: Callable[[], str]) -> tuple[str, bool, str]:
    try:
        return name, True, look()
    except (RecurError, OSError, ImportError) as error:
        hint = error.hint if isinstance(error, RecurError) else ""
        return name, False, f"{error} {hint}".strip()


def gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none: the processor is used"


def disk(home: Path) -> str:
    import shutil

    folder = next(path for path in (home.resolve(), *home.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < 1 << 30:
        raise RecurError(
            f"only {free / 2**20:.0f} MiB free at {folder}.", "Make room: a gigabyte is the least."
        )
    return f"{free / 2**30:.1f} GiB free at {folder}"


def stored(store: Store) -> str:
    return f"{store.path}: {store.series_summary().height} series" if store.path.exists() else "none yet"


def venue(base_url: str) -> str:
    from recur.connectors.bybit import BybitConnector

    before = time.time_ns() // 1_000_000
    there = BybitConnector(base_url or None, attempts=1, timeout_s=5.0).server_time_ms()
    after = time.time_ns() // 1_000_000
    drift_s = (there - (before + after) / 2) / 1000
    if not base_url and abs(drift_s) > 5:
        raise RecurError(f"this clock is {-drift_s:+.1f} s off the venue's.", "Set the clock (NTP).")
    return f"answers in {after - before} ms, its clock is {drift_s:+.1f} s from this one"
